"""docs/migration.md: every argument of TRL's former trainers has a row, and every name on our side exists."""

import ast
import dataclasses
import inspect
import re
from typing import Any

import pytest
from conftest import REPOSITORY
from support.documents import blocks
from support.stand_ins import byte_tokenizer, save_policy, save_reward_model, solutions
from support.step_ppo import make
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from fractal_rm import FractalConfig, FractalTrainer, StepPPOConfig, StepPPOTrainer

PAGE = (REPOSITORY / "docs" / "migration.md").read_text(encoding="utf-8")
NONE = "—"

# Fields and constructor parameters, as TRL 1.12.0 (PPO) and 1.13.0 (PRM) had them beyond `TrainingArguments`.
THEIRS = {
    "constructor of `PPOTrainer`": """args processing_class model ref_model reward_model train_dataset value_model
        data_collator eval_dataset optimizers callbacks peft_config""",
    "field of `PPOConfig`": """learning_rate dataset_num_proc num_mini_batches total_episodes
        local_rollout_forward_batch_size num_sample_generations response_length stop_token stop_token_id temperature
        missing_eos_penalty sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
        local_mini_batch_size mini_batch_size push_to_hub reward_model_path model_adapter_name ref_adapter_name
        num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam
        ds3_gather_for_generation""",
    "logged by `PPOTrainer`": """eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward
        objective/scores policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg
        policy/entropy_avg val/ratio val/ratio_var val/num_eos_tokens lr episode""",
    "constructor of `PRMTrainer`": """model args data_collator train_dataset eval_dataset processing_class model_init
        compute_metrics callbacks optimizers preprocess_logits_for_metrics peft_config""",
    "field of `PRMConfig`": """learning_rate max_length max_completion_length disable_dropout step_separator
        train_on_last_step_only dataset_num_proc logging_steps gradient_checkpointing bf16""",
}


def table(first: str) -> list[dict[str, str]]:
    """Rows of the table whose first column has this title; the code of a cell that is code."""
    lines = PAGE.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    titles = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(titles), line
        row = dict(zip(["theirs", *titles[1:-1], "says"], cells, strict=True))
        if len(cells) == 5:  # two columns are called "default"
            row |= {"their default": cells[1], "here": cells[2], "our default": cells[3]}
        rows.append({name: cell.strip("`") if name != "says" else cell for name, cell in row.items()})
    return rows


def fields(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


def parameters(*trainers: type) -> set[str]:
    return {name for trainer in trainers for name in inspect.signature(trainer.__init__).parameters} - {"self"}


@pytest.mark.parametrize("title", THEIRS)
def test_every_argument_of_theirs_has_one_row(title):
    assert sorted(row["theirs"] for row in table(title)) == sorted(THEIRS[title].split())


@pytest.mark.parametrize("title", THEIRS)
def test_what_has_no_counterpart_says_so_and_why(title):
    for row in table(title):
        assert row["here"] != ""
        plain = title.startswith("logged") or row["theirs"] in ("model_init", "dataset_num_proc")
        assert row["here"] != NONE or row["says"] or plain, row


@pytest.mark.parametrize(("title", "trainers"), [("PPO", (StepPPOTrainer, GRPOTrainer)), ("PRM", (FractalTrainer,))])
def test_parameters_that_are_named_exist(title, trainers):
    named = {row["here"] for row in table(f"constructor of `{title}Trainer`")} - {NONE}
    assert named <= parameters(*trainers)


@pytest.mark.parametrize(("title", "config"), [("PPO", StepPPOConfig), ("PRM", FractalConfig)])
def test_fields_that_are_named_exist_with_the_default_that_is_given(title, config):
    ours = fields(config)
    for row in table(f"field of `{title}Config`"):
        if row["here"] == NONE:
            assert row["our default"] == ""
        else:
            default = ours[row["here"]]
            if row["here"] == "gradient_checkpointing":  # off is None in some versions of transformers, False in others
                default = default or None
            assert row["our default"] == repr(default), row["here"]


@pytest.mark.parametrize(("title", "config"), [("PPO", StepPPOConfig), ("PRM", FractalConfig)])
def test_other_options_in_the_text_exist(title, config):
    """Names in code in the last column and below the tables: options, or something that is spelt out here."""
    _, _, section = PAGE.partition(f"## {title}Trainer")
    section = section.partition("\n## ")[0]
    text = "\n".join(row["says"] for row in table(f"field of `{title}Config`"))
    text += "".join(line for line in section.splitlines(keepends=True) if not line.startswith("|"))
    named = {name for code in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"^([a-z]\w*)(?:=.*)?$", code)}
    columns = {"prompt", "completions", "labels", "label", "response", "steps", "step_labels", "map", "fractal"}
    metrics = {name for name in named if name.startswith("eval_") and name != "eval_steps"}
    theirs = {row["theirs"] for row in table(f"field of `{title}Config`")}
    trainers = (StepPPOTrainer, GRPOTrainer) if title == "PPO" else (FractalTrainer,)
    assert named - columns - metrics - theirs <= fields(config).keys() | parameters(*trainers)


def keywords(call_of: str) -> dict[str, Any]:
    """Keywords with constant values of a call in the examples of the page."""
    calls = [
        node
        for block in blocks(PAGE, "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == call_of
    ]
    (call,) = calls
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if isinstance(word.value, ast.Constant)}


def test_the_ppo_example_repeats_their_defaults_wherever_ours_differ():
    given = keywords("StepPPOConfig")
    batches = {"per_device_train_batch_size": 64, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    expected = {"output_dir": "ppo", "num_generations": 1, "disable_dropout": True} | batches
    # Neither changes what is learned, or there is another row for it.
    said = {"num_mini_batches", "total_episodes", "missing_eos_penalty", "num_sample_generations", "batch_size"}
    for row in table("field of `PPOConfig`"):
        differs = row["here"] != NONE and row["their default"] != row["our default"]
        if differs and row["theirs"] not in said | {"local_rollout_forward_batch_size"}:
            expected[row["here"]] = ast.literal_eval(row["their default"])
    assert given == expected
    config = StepPPOConfig(**given, report_to="none", use_cpu=True, bf16=False)
    assert config.generation_batch_size == 64 * 4


def test_the_prm_example_repeats_their_defaults_and_reads_gold_labels_only(tmp_path):
    given = keywords("FractalConfig")
    for row in table("field of `PRMConfig`"):
        if row["here"] != NONE and row["their default"] != row["our default"] and row["theirs"] != "bf16":
            assert given[row["here"]] == ast.literal_eval(row["their default"])
    assert given["bf16"] is True
    smaller = {"output_dir": str(tmp_path), "max_length": 256, "logging_steps": 1, "bf16": False}
    config = FractalConfig(**given | smaller, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [
        {"prompt": row["prompt"], "completions": row["steps"], "labels": [1, row["step_labels"][1], 1]}
        for row in solutions(12)
    ]
    trainer = FractalTrainer(save_policy(tmp_path / "backbone"), config, train_dataset=rows, eval_dataset=rows[:6])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss"] == pytest.approx(entry["loss/instance"], abs=1e-4) for entry in logged)
    assert not any("loss/bag" in entry for entry in logged)
    named = {name for name in re.findall(r"`(eval_\w+)`", PAGE) if name not in ("eval_accuracy", "eval_steps")}
    assert {"eval_step_auc", "eval_within_bag_auc"} <= named - {"eval_dataset", "eval_strategy"}
    assert named - {"eval_dataset", "eval_strategy"} <= trainer.evaluate().keys()


def test_numbers_that_are_named_are_logged(tmp_path):
    def score(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 2) for text in completions]

    trainer = make(
        tmp_path,
        StepPPOTrainer,
        model=save_policy(tmp_path / "policy"),
        processing_class=byte_tokenizer(),
        reward_model=save_reward_model(tmp_path / "rm"),
        reward_funcs=[score],
        num_generations=1,
        kl_coef=0.05,
        max_steps=1,
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    rows = table("logged by `PPOTrainer`")
    named = {row["here"] for row in rows} | {name for row in rows for name in re.findall(r"`([^`]+)`", row["says"])}
    assert {name.replace("<function>", "score") for name in named - {NONE, "kl_coef"}} <= logged


def test_grpo_defaults_are_inherited():
    """The page says "that of GRPO" where it gives no number."""
    assert fields(StepPPOConfig)["num_generations"] == fields(GRPOConfig)["num_generations"] != 1
