"""Every recipe runs: each configuration for two steps, with small stand-ins for its models and data."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.documents import blocks, commands, script
from support.stand_ins import (
    gsm8k_problems,
    preferences,
    save_encoder,
    save_policy,
    save_reward_model,
    solutions,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from fractal_rm.cli.main import main
from fractal_rm.cli.options.arguments import DataArguments, LoraArguments
from fractal_rm.cli.options.parser import parse
from fractal_rm.cli.ppo import PPOArguments
from fractal_rm.ppo.config import StepPPOConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# `accelerate` holds configurations of launches, which test_parallelism.py reads; `remote_reward` is for other trainers:
# test_serving.py calls it.
FOLDERS = sorted(
    path for path in RECIPES.iterdir() if path.is_dir() and path.name not in ("accelerate", "engines", "remote_reward")
)
CONFIGS = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def command_of(config: Path) -> str:
    """The command line in the first line of a configuration file."""
    return config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


# Configurations of scripts, and those of `fractal-rm`.
SCRIPTED = [path for path in CONFIGS if command_of(path).startswith("python ")]
CONFIGURED = [path for path in CONFIGS if path not in SCRIPTED]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with a policy and a reward model that can read chats, and a sentence encoder."""
    folder = tmp_path_factory.mktemp("stand_ins")
    save_policy(folder / "policy", chat=True)
    save_reward_model(folder / "reward_model", chat=True)
    save_encoder(folder)
    return folder


def invented_data(config: dict, folder: Path) -> list[str]:
    """Flags that put invented rows in the place of the data of a configuration."""
    rows = gsm8k_problems(24) if config.get("task") == "gsm8k" else solutions(24)
    if "preference_loss" in config:
        rows = preferences(12)
    flags = ["--data_dir", str(folder)]
    for split in ("train", "eval", "test"):
        if f"{split}_file" in config:
            flags += [f"--{split}_file", write_jsonl(folder / f"{split}.jsonl", rows)]
    if "dataset_name" in config:
        for split in ("train", "validation", "test"):
            write_jsonl(folder / config["dataset_name"] / f"{split}.jsonl", rows)
    return flags


def small(command: str, config: dict, stand_ins: Path) -> list[str]:
    """Flags that make a run small, and leave what the recipe is about as it is."""
    embeds = config.get("scorer") == "embedding"
    flags = ["--model", str(stand_ins / ("encoder" if embeds else "policy"))]
    flags += ["--embedding_cache", str(stand_ins / "cache")] if embeds else []
    flags += ["--use_cpu", "--bf16", "false", "--disable_tqdm", "true"]
    flags += ["--max_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "1"]
    flags += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8"]
    if command == "ppo":
        flags += ["--max_completion_length", "8"]
        if "num_problems" in config:
            flags += ["--num_problems", "16", "--num_eval_problems", "8"]
        if "reward_model" in config:
            flags += ["--reward_model", str(stand_ins / "reward_model")]
    return flags


@pytest.mark.parametrize("path", CONFIGURED, ids=name)
def test_a_configuration_runs_for_two_steps(path, stand_ins, tmp_path):
    program, command, *rest = command_of(path).split()
    assert (program, rest) == ("fractal-rm", ["--config", f"recipes/{name(path)}"])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    flags = invented_data(config, tmp_path / "data") + small(command, config, stand_ins)
    output = tmp_path / "out"
    assert main([command, "--config", str(path), *flags, "--output_dir", str(output)]) == 0
    history = json.loads((output / "metrics.json").read_text())["history"]
    assert max(logs["step"] for logs in history) == 2
    assert (output / "model.safetensors").is_file() or (output / "adapter_model.safetensors").is_file()
    assert (output / "README.md").is_file()
    if "page_steps" in config:
        assert (output / "step_scores" / "step-000002.html").is_file()
    if "pseudo_labels" in config:
        assert {logs["stage"] for logs in history} == {"stage-joint", "stage-pseudo-1"}


@pytest.mark.parametrize("path", SCRIPTED, ids=name)
def test_a_script_runs_for_two_steps(path, stand_ins, tmp_path):
    program, file, trainer, *rest = command_of(path).split()
    assert (program, file, rest) == (
        "python",
        f"recipes/{name(path.parent)}/train.py",
        ["--config", f"recipes/{name(path)}"],
    )
    flags = small("ppo", yaml.safe_load(path.read_text(encoding="utf-8")), stand_ins)
    output = tmp_path / "out"
    script(path.parent / "train.py").main([trainer, "--config", str(path), *flags, "--output_dir", str(output)])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert max(logs["step"] for logs in history) == 2
    rewards = [logs["rewards/fractal_reward/mean"] for logs in history if "rewards/fractal_reward/mean" in logs]
    assert len(rewards) == 2
    assert all(0 < reward < 1 for reward in rewards)
    assert len([logs for logs in history if "eval_rewards/exact_answer/mean" in logs]) == 2  # before and after
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_readme_gives_the_command_of_every_configuration(folder):
    readme = (folder / "README.md").read_text(encoding="utf-8")
    configs = [path for path in CONFIGS if path.parent == folder]
    assert configs
    assert all(command_of(path) in readme for path in configs)


def test_the_arithmetic_recipe_says_how_to_get_its_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no runs/quickstart
    assert main(["ppo", "--config", str(RECIPES / "arithmetic" / "config.yaml"), "--use_cpu"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "fractal-rm: There is no model folder runs/quickstart/policy. "
        "Run `make quickstart` first: it makes this folder.\n"
    )
    assert not list(tmp_path.iterdir())


def recipe_commands(model: str, run: str) -> list[list[str]]:
    """The words of every `fractal-rm` command of the recipe gsm8k_ppo, for a model and a folder."""
    text = (RECIPES / "gsm8k_ppo" / "README.md").read_text(encoding="utf-8")
    lines = [line.replace("$MODEL", model).replace("$RUN", run) for line in commands(text)]
    return [line.split()[1:] for line in lines if line.startswith("fractal-rm ")]


def label_in_turns(path: Path) -> None:
    """Call every second response of a file right."""
    rows = [json.loads(line) | {"label": float(i % 2)} for i, line in enumerate(path.read_text().splitlines())]
    write_jsonl(path, rows)


def test_the_gsm8k_recipe_runs_from_its_first_command_to_the_merged_model(stand_ins, tmp_path, monkeypatch, capsys):
    """Every command of its README in order, two steps each, for two models side by side; then its Python block."""
    monkeypatch.chdir(RECIPES.parent)
    rows = gsm8k_problems(24)
    problems = {
        "train": write_jsonl(tmp_path / "train.jsonl", rows[:12]),
        "test": write_jsonl(tmp_path / "test.jsonl", rows[12:]),
    }
    counts = {"6700": "8", "773": "4", "1319": "12"}
    two_steps = ["--max_steps", "2", "--use_cpu", "true", "--bf16", "false", "--gradient_accumulation_steps", "1"]
    small = {
        "sample": ["--max_new_tokens", "6", "--batch_size", "8", "--dtype", "float32"],
        "train": two_steps,
        "ppo": [*two_steps, "--per_device_train_batch_size", "8", "--max_completion_length", "6"],
    }
    small["ppo"] += ["--train_file", problems["train"], "--eval_file", problems["test"]]
    written: dict[Path, bytes] = {}
    for name in ("first", "second"):
        run = tmp_path / name
        for command, *flags in recipe_commands(str(stand_ins / "policy"), str(run)):
            if command == "serve" or "--use_vllm" in flags:
                continue  # they need a port, and a GPU
            if command == "sample":
                split = "test" if "--dataset_train_split" in flags else "train"
                for option in {"--dataset_name", "--dataset_config", "--dataset_train_split"} & set(flags):
                    del flags[flags.index(option) : flags.index(option) + 2]
                flags = [counts.get(word, word) for word in flags] + ["--train_file", problems[split]]
            assert main([command, *flags, *small.get(command, [])]) == 0, capsys.readouterr().err
            if command == "sample" and split == "train":  # the stand-in is never right
                label_in_turns(run / "solutions" / Path(flags[flags.index("--output") + 1]).name)
        solutions = {
            split: [json.loads(line) for line in (run / "solutions" / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "validation")
        }
        asked = {split: {row["prompt"][0]["content"] for row in rows} for split, rows in solutions.items()}
        assert {split: len(prompts) for split, prompts in asked.items()} == {"train": 8, "validation": 4}
        assert not asked["train"] & asked["validation"]
        assert (run / "policy" / "adapter_model.safetensors").is_file()
        assert (run / "reward_model" / "validation.json").is_file()
        assert all(path.read_bytes() == content for path, content in written.items()), "the second model overwrote"
        written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (merge,) = blocks((RECIPES / "gsm8k_ppo" / "README.md").read_text(encoding="utf-8"), "python")
    exec(merge.replace("runs/gsm8k/qwen2.5-1.5b", str(tmp_path / "first")), {})
    merged, adapted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "first" / name, dtype=torch.float32)
        for name in ("merged", "policy")
    )
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=0.02, rtol=0.02)


def test_the_flags_of_vllm_reach_the_configuration():
    (flags,) = [flags for flags in recipe_commands("m", "runs/m") if "--use_vllm" in flags]
    given = [*flags[1:], "--use_cpu", "true", "--bf16", "false"]
    *_, config = parse("ppo", [PPOArguments, DataArguments, LoraArguments, StepPPOConfig], given)
    assert (config.use_vllm, config.vllm_mode) == (True, "colocate")
    assert (config.vllm_gpu_memory_utilization, config.vllm_enable_sleep_mode) == (0.3, True)
    assert config.model_init_kwargs == {"dtype": "bfloat16"}


def test_rows_can_be_passed_over_and_not_beyond_the_end(stand_ins, tmp_path, capsys):
    problems = write_jsonl(tmp_path / "problems.jsonl", gsm8k_problems(3))
    flags = ["sample", "--model", str(stand_ins / "policy"), "--output", str(tmp_path / "out.jsonl")]
    for more, sentence in (
        (["--task", "gsm8k", "--train_file", problems, "--skip_prompts", "3"], "but there are 3 prompts"),
        (["--task", "arithmetic", "--skip_prompts", "1"], "`task=arithmetic` makes its own prompts"),
        (["--task", "gsm8k", "--train_file", problems, "--skip_prompts", "-1"], "Give a whole number from 0"),
    ):
        assert main([*flags, *more]) == 2
        assert sentence in capsys.readouterr().err
