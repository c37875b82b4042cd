"""Commands, called as the console script calls them."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stand_ins import gsm8k_problems, save_policy, save_reward_model, solutions, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils.logging import is_progress_bar_enabled

from fractal_rm import __version__
from fractal_rm.cli.checks import hide_loading_bars
from fractal_rm.cli.main import COMMANDS, is_bad_input, main
from fractal_rm.data.readers import read_bags, read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.responses import choose_threshold, score_bags
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.reward_model import StepRewardModel

TINY = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
TINY += ["--save_strategy", "no"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a policy and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    save_policy(folder / "policy")
    save_reward_model(folder / "reward_model")
    return folder


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> Path:
    """What `fractal-rm train` wrote, from a configuration file and flags."""
    folder = tmp_path_factory.mktemp("trained")
    write_jsonl(folder / "data" / "sums" / "train.jsonl.gz", solutions(12))
    write_jsonl(folder / "data" / "sums" / "validation.jsonl", solutions(6))
    config = folder / "config.yaml"
    config.write_text("dataset_name: sums\nlearning_rate: 1e-3\nmax_steps: 50\neval_strategy: no\nsave_steps: 1\n")
    arguments = ["--config", str(config), "--model", str(models / "policy"), "--output_dir", str(folder / "rm")]
    arguments += ["--data_dir", str(folder / "data"), "--test_file", write_jsonl(folder / "test.jsonl", solutions(9))]
    assert main(["train", *arguments, *TINY, "--max_steps", "2", "--save_strategy", "steps"]) == 0
    return folder


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fractal-rm {__version__}\n"


def test_help_and_version_import_no_heavy_library():
    code = "import sys; from fractal_rm.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("command", ["train", "score", "evaluate", "ppo", "serve", "report"])
def test_a_command_explains_its_arguments(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: fractal-rm {command} [--config file.yaml]")
    assert "--config reads a YAML file" in shown


def test_train_writes_a_reward_model_that_loads(trained):
    scored = StepRewardModel.from_pretrained(trained / "rm").score(["2+2?\n"], ["2+2=4.\nSo 4."])
    assert len(scored[0].steps) == 2
    assert AutoModelForCausalLM.from_pretrained(trained / "rm") is not None


def test_flags_beat_the_configuration_file(trained):
    metrics = json.loads((trained / "rm" / "metrics.json").read_text())
    assert metrics["history"][-1]["step"] == 2  # --max_steps 2, and max_steps: 50 in the file


def test_train_writes_metrics_of_every_split(trained):
    metrics = json.loads((trained / "rm" / "metrics.json").read_text())
    assert [metrics[split]["responses"] for split in ("train", "eval", "test")] == [12, 6, 9]
    assert 0 <= metrics["test"]["within_bag_auc"] <= 1
    assert metrics["test"]["threshold"] == metrics["eval"]["threshold"]


def test_the_threshold_comes_from_the_evaluation_data(trained):
    model = StepRewardModel.from_pretrained(trained / "rm")
    bags = read_bags(read_jsonl(trained / "data" / "sums" / "validation.jsonl"), Segmentation())
    expected = choose_threshold(score_bags(model, bags), bags)
    assert expected != 0.5
    assert model.settings.threshold == pytest.approx(expected, abs=1e-6)


def test_the_threshold_is_on_the_highest_step_where_one_good_step_is_enough(models, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", solutions(12))
    arguments = ["--model", str(models / "policy"), "--output_dir", str(tmp_path / "rm"), *TINY, "--max_steps", "1"]
    assert main(["train", *arguments, "--train_file", rows, "--eval_file", rows, "--aggregation", "max"]) == 0
    model = StepRewardModel.from_pretrained(tmp_path / "rm")
    bags = read_bags(read_jsonl(rows), Segmentation())
    scored = score_bags(model, bags)
    highest, lowest = (choose_threshold(scored, bags, aggregation=aggregation) for aggregation in ("max", "min"))
    assert model.settings.threshold == pytest.approx(highest, abs=1e-6)
    assert abs(highest - lowest) > 1e-4
    assert model.settings.chat is False


def test_train_writes_a_model_card_without_this_machines_folders(trained):
    card = (trained / "rm" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| test | step_auc |" in card
    assert str(trained.parent) not in card


def test_train_goes_on_from_its_last_checkpoint(trained, models, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    trained = tmp_path
    before = [logs for logs in json.loads((trained / "rm" / "metrics.json").read_text())["history"] if "loss" in logs]
    assert (trained / "rm" / "checkpoint-2").is_dir()
    arguments = ["--model", str(models / "policy"), "--output_dir", str(trained / "rm"), *TINY]
    arguments += ["--learning_rate", "1e-3"]
    arguments += ["--train_file", str(trained / "data" / "sums" / "train.jsonl.gz")]
    assert main(["train", *arguments, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    steps = [logs for logs in json.loads((trained / "rm" / "metrics.json").read_text())["history"] if "loss" in logs]
    assert [logs["step"] for logs in steps] == [1, 2, 3]
    assert steps[:2] == before  # taken from the checkpoint


def test_resuming_without_a_checkpoint_starts_from_the_beginning(trained, models, tmp_path):
    arguments = ["--model", str(models / "policy"), "--output_dir", str(tmp_path / "rm"), *TINY, "--max_steps", "1"]
    arguments += ["--train_file", str(trained / "test.jsonl"), "--limit", "4", "--resume_from_checkpoint", "true"]
    assert main(["train", *arguments]) == 0
    assert json.loads((tmp_path / "rm" / "metrics.json").read_text())["train"]["responses"] == 4


def test_adapters_are_merged_into_an_ordinary_folder(trained, models, tmp_path):
    arguments = ["--model", str(models / "policy"), "--output_dir", str(tmp_path / "rm"), *TINY, "--max_steps", "1"]
    arguments += ["--train_file", str(trained / "test.jsonl"), "--use_peft", "--lora_r", "2"]
    assert main(["train", *arguments, "--lora_target_modules", "q_proj", "v_proj"]) == 0
    names = AutoModelForCausalLM.from_pretrained(tmp_path / "rm").state_dict()
    assert not any("lora" in name for name in names)


def test_a_new_head_is_no_news_and_lost_weights_are(models, tmp_path):
    hide_loading_bars()
    hide_loading_bars()  # commands that load two models call it twice
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(listener)
    try:
        whole, broken = models / "policy", tmp_path / "broken"
        AutoModelForTokenClassification.from_pretrained(whole, num_labels=1)
        assert said == []
        shutil.copytree(whole, broken)
        weights = load_file(broken / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        AutoModelForTokenClassification.from_pretrained(broken, num_labels=1)
        AutoModelForTokenClassification.from_pretrained(whole, num_labels=1).save_pretrained(tmp_path / "token")
        AutoModelForCausalLM.from_pretrained(tmp_path / "token")  # its head would be random text
        AutoModelForTokenClassification.from_pretrained(whole, num_labels=1, num_hidden_layers=1)  # a body cut short
        assert ["LOAD REPORT" in record.getMessage() for record in said] == [True, True, True]
    finally:
        logger.removeHandler(listener)
    assert not is_progress_bar_enabled()


def test_score_writes_one_line_a_response_and_a_page(models, tmp_path, capsys):
    rows = [
        {"prompt": "1+1?\n", "response": "1+1=2.\nSo 2.", "label": 1},
        {"prompt": "1+2?\n", "completion": "1+2=4 <b>."},
        {"id": "cut", "prompt": "1+3?\n", "steps": ["1+3=4.", "So 4."], "step_labels": [1, None], "label": True},
        {"prompt": "3?\n", "response": "It is 3.  It stays 3.", "steps": ["It is 3.", "It stays 3."]},
    ]
    arguments = ["--model", str(models / "reward_model"), "--input", write_jsonl(tmp_path / "in.jsonl", rows)]
    assert main(["score", *arguments, "--output", str(tmp_path / "out.jsonl"), "--html", str(tmp_path / "v.html")]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(record["steps"]) for record in records] == [2, 1, 2, 2]
    assert records[2]["id"] == "cut"
    assert [step["gold"] for step in records[2]["steps"]] == [1, None]
    for record in records:
        for step in record["steps"]:
            assert record["response"][step["start"] : step["end"]] == step["text"]
    assert records[3]["steps"][1]["text"] == "It stays 3."
    captured = capsys.readouterr()
    assert captured.out.replace("\n", "").startswith("Scored 4 of 4 responses: ")
    assert captured.err == ""
    assert "1+2=4 &lt;b&gt;." in (tmp_path / "v.html").read_text()


def test_a_scored_file_equals_scoring_in_python(models, tmp_path):
    rows = [{"prompt": row["prompt"], "response": "\n".join(row["steps"])} for row in solutions(5)]
    arguments = ["--model", str(models / "reward_model"), "--input", write_jsonl(tmp_path / "in.jsonl", rows)]
    assert main(["score", *arguments, "--output", str(tmp_path / "out.jsonl"), "--batch_size", "2"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = StepRewardModel.from_pretrained(models / "reward_model")
    expected = model.score([row["prompt"] for row in rows], [row["response"] for row in rows])
    for record, result in zip(records, expected, strict=True):
        assert [step["score"] for step in record["steps"]] == pytest.approx(result.step_scores, abs=1e-5)
        assert record["score"] == pytest.approx(result.score, abs=1e-5)


def test_a_second_model_scores_the_same_steps(models, tmp_path, capsys):
    rows = [
        {"prompt": row["prompt"], "response": " | ".join(row["steps"]), "steps": row["steps"]} for row in solutions(3)
    ]
    rows.append({"prompt": "1+1?\n", "response": "", "id": "empty"})
    one, two = str(tmp_path / "one"), str(tmp_path / "cut_elsewhere")
    model = StepRewardModel.from_pretrained(models / "reward_model")
    model.settings.temperature = 50.0  # no score is 0 or 1
    model.save_pretrained(one)
    model.settings.segmentation, model.settings.temperature = Segmentation("sentences"), 100.0
    model.save_pretrained(two)
    arguments = ["--model", one, "--compare_to", two, "--input", write_jsonl(tmp_path / "in.jsonl", rows)]
    output, page = tmp_path / "out.jsonl", tmp_path / "v.html"
    assert main(["score", *arguments, "--output", str(output), "--html", str(page), "--show", "1"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for record in records[:3]:
        assert len(record["steps"]) == len(rows[record["row"] - 1]["steps"])
        for step in record["steps"]:
            logits = [math.log(score / (1 - score)) for score in (step["score"], step["other_score"])]
            assert logits[0] == pytest.approx(2 * logits[1], rel=1e-3)
    assert records[3]["other_score"] is None
    shown = capsys.readouterr().out
    assert rows[0]["steps"][0] in shown
    assert rows[1]["steps"][0] not in shown
    assert "cut_elsewhere" in page.read_text()


def test_evaluate_prints_a_table_and_writes_metrics(trained, models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", solutions(9))
    arguments = ["--model", str(models / "reward_model"), "--data", data, "--output", str(tmp_path / "m.json")]
    assert main(["evaluate", *arguments]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["responses"] == 9
    assert {"bag_auc", "bag_ece", "step_auc", "within_bag_auc", "first_error_accuracy", "f1"} <= set(metrics)
    assert metrics["threshold"] == 0.5  # what the checkpoint remembers
    assert "within_bag_auc" in capsys.readouterr().out


def test_evaluate_chooses_the_threshold_on_another_file(models, tmp_path):
    data, other = write_jsonl(tmp_path / "a.jsonl", solutions(9)), write_jsonl(tmp_path / "b.jsonl", solutions(12))
    arguments = ["--model", str(models / "reward_model"), "--data", data, "--output", str(tmp_path / "m.json")]
    assert main(["evaluate", *arguments, "--threshold_file", other]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["threshold"] != 0.5


def test_evaluate_finds_a_data_set_by_name_in_the_folder_of_the_environment(models, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "sets" / "sums" / "test.jsonl.gz", solutions(6))
    monkeypatch.setenv("FRACTAL_RM_DATA", str(tmp_path / "sets"))
    arguments = ["--model", str(models / "reward_model"), "--data", "sums", "--output", str(tmp_path / "m.json")]
    assert main(["evaluate", *arguments]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["responses"] == 6


def test_labels_of_one_kind_become_null_and_not_a_number(models, tmp_path):
    rows = [row for row in solutions(9) if row["label"] == 1]
    arguments = ["--model", str(models / "reward_model"), "--data", write_jsonl(tmp_path / "a.jsonl", rows)]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["bag_auc"] is None


def test_ppo_trains_on_the_embedded_task(models, tmp_path, capsys):
    arguments = ["--model", str(models / "policy"), "--reward_model", str(models / "reward_model")]
    arguments += ["--reward_function", "exact_answer", "--task", "arithmetic", "--num_problems", "8"]
    arguments += ["--num_eval_problems", "4", "--num_generations", "1", "--max_completion_length", "12", *TINY]
    arguments += ["--bf16", "false", "--max_steps", "2", "--per_device_eval_batch_size", "4", "--logging_steps", "1"]
    assert main(["ppo", *arguments, "--output_dir", str(tmp_path / "ppo")]) == 0
    metrics = json.loads((tmp_path / "ppo" / "metrics.json").read_text())
    assert 0 <= metrics["eval"]["eval_rewards/exact_answer/mean"] <= 1
    assert any("value/loss" in logs for logs in metrics["history"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ppo") is not None
    assert "`exact_answer`" in (tmp_path / "ppo" / "README.md").read_text()
    *_, rewards, holds, following = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Outcome \(exact_answer\) 0 -> 0, step score \S+ -> \S+\. Alarms: none\.", rewards)
    assert holds == f"{tmp_path}/ppo holds the policy, metrics.json and README.md."
    assert following == f"Next: fractal-rm report --runs {tmp_path}/ppo --output {tmp_path}/ppo/training.html"


def test_ppo_trains_on_a_data_set_of_reasoning_gym_with_its_verifier(models, tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")
    arguments = ["--model", str(models / "policy"), "--reward_function", "verifier", "--task", "reasoning_gym"]
    arguments += ["--num_problems", "8", "--num_eval_problems", "4", "--num_generations", "2", *TINY]
    arguments += ["--max_completion_length", "12", "--advantage", "group", "--bf16", "false", "--max_steps", "1"]
    for name in ("gsm_symbolic", "chain_sum"):
        folder = tmp_path / name
        assert main(["ppo", *arguments, "--task_name", name, "--output_dir", str(folder)]) == 0
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["eval"]["eval_rewards/outcome/mean"] == 0.0
        assert "`verifier`" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--task", "reasoning_gym", "--task_name", "chain_sum", "--reward_function", "gsm8k_answer"],
            "Give `verifier`",
        ),
        (["--task", "arithmetic", "--reward_function", "verifier"], "Give `verifier` with the tasks"),
        (["--task", "reasoning_gym", "--reward_function", "verifier"], "needs `task_name`"),
        (
            ["--task", "reasoning_gym", "--task_name", "chain_sums", "--reward_function", "verifier"],
            "Nearest: chain_sum",
        ),
    ],
)
def test_ppo_refuses_a_task_and_a_reward_that_do_not_suit(flags, message, models, tmp_path, capsys):
    pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["ppo", "--model", str(models / "policy"), "--bf16", "false", *flags, *out]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ppo_takes_several_reward_models_with_weights(models, tmp_path):
    (tmp_path / "ppo.yaml").write_text(f"reward_model: {models / 'reward_model'}\ntask: arithmetic\n")
    arguments = ["--config", str(tmp_path / "ppo.yaml"), "--model", str(models / "policy"), "--bf16", "false", *TINY]
    arguments += ["--num_problems", "4", "--num_eval_problems", "0", "--num_generations", "2", "--max_steps", "1"]
    arguments += ["--max_completion_length", "8", "--advantage", "group"]
    two = ["--reward_model", str(models / "reward_model"), str(models / "reward_model")]
    for given, names in (
        ([], {"step_reward_model"}),
        ([*two, "--step_reward_weights", "1", "-0.5"], {"step_reward_model_1", "step_reward_model_2"}),
    ):
        assert main(["ppo", *arguments, *given, "--output_dir", str(tmp_path / "ppo"), "--overwrite_output_dir"]) == 0
        history = json.loads((tmp_path / "ppo" / "metrics.json").read_text())["history"]
        assert {name.split("/")[1] for name in history[0] if name.startswith("rewards/")} == names
        assert (tmp_path / "ppo" / "README.md").read_text().count("`reward_model`") == len(names)


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        (["--value_model", "shared"], "model.safetensors"),
        (["--use_peft", "--lora_r", "2"], "adapter/adapter_model.safetensors"),
        (["--use_peft", "--lora_r", "2", "--value_use_peft", "false"], "model.safetensors"),
        (["--use_peft", "--lora_r", "2", "--value_model", "shared"], "model.safetensors"),
    ],
)
def test_ppo_takes_the_value_model_that_its_flags_say(models, tmp_path, flags, saved):
    arguments = ["--model", str(models / "policy"), "--reward_function", "exact_answer", "--task", "arithmetic"]
    arguments += ["--num_problems", "4", "--num_eval_problems", "0", "--num_generations", "1", "--max_steps", "1"]
    arguments += ["--max_completion_length", "4", "--bf16", "false", *TINY, "--output_dir", str(tmp_path / "ppo")]
    assert main(["ppo", *arguments, *flags]) == 0
    assert [
        name
        for name in ("model.safetensors", "adapter/adapter_model.safetensors")
        if (tmp_path / "ppo" / "value_model" / name).is_file()
    ] == [saved]
    assert (tmp_path / "ppo" / "adapter_model.safetensors").is_file() == ("--use_peft" in flags)


def test_a_flag_takes_the_reward_model_of_the_file_out(models, tmp_path):
    (tmp_path / "ppo.yaml").write_text("reward_model: runs/none\nreward_function: exact_answer\ntask: arithmetic\n")
    arguments = ["--config", str(tmp_path / "ppo.yaml"), "--model", str(models / "policy"), "--bf16", "false", *TINY]
    arguments += ["--num_problems", "4", "--num_eval_problems", "0", "--num_generations", "2", "--max_steps", "1"]
    arguments += ["--max_completion_length", "8", "--advantage", "group", "--reward_model", "none"]
    assert main(["ppo", *arguments, "--output_dir", str(tmp_path / "ppo")]) == 0
    metrics = json.loads((tmp_path / "ppo" / "metrics.json").read_text())
    assert not any("steps/score" in logs for logs in metrics["history"])


def test_ppo_trains_on_chats_with_answers_from_a_file(tmp_path):
    arguments = ["--model", save_policy(tmp_path / "policy", chat=True), "--task", "gsm8k"]
    arguments += ["--train_file", write_jsonl(tmp_path / "problems.jsonl", gsm8k_problems(4))]
    arguments += ["--reward_function", "gsm8k_answer", "--advantage", "group", "--num_generations", "2", *TINY]
    arguments += ["--bf16", "false", "--max_steps", "1", "--max_completion_length", "8"]
    assert main(["ppo", *arguments, "--output_dir", str(tmp_path / "ppo")]) == 0
    assert "train_loss" in json.loads((tmp_path / "ppo" / "metrics.json").read_text())["train"]


@pytest.fixture
def results(tmp_path) -> Path:
    file = ResultsFile(tmp_path / "results.jsonl")
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        file.append(
            benchmark="quickstart",
            arm="dense+outcome",
            dataset="arithmetic",
            seed=seed,
            split="test",
            metrics={"accuracy": accuracy, "rollouts": 64},
            config={},
            seconds=1.0,
        )
    return file.path


def test_report_prints_the_mean_over_seeds_as_markdown(results, capsys):
    assert main(["report", "--results", str(results), "--metrics", "accuracy"]) == 0
    assert "| dense+outcome | 2 | 0.600 ± 0.141 |" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["md", "html"])
def test_report_writes_a_file(results, ending, capsys):
    output = results.with_name(f"table.{ending}")
    assert main(["report", "--results", str(results), "--output", str(output), "--title", "A & B"]) == 0
    text = output.read_text()
    assert "dense+outcome" in text
    assert ("<h1>A &amp; B</h1>" if ending == "html" else "# A & B") in text


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    def broken(argv):
        read_bags(None, Segmentation())  # a TypeError, deep in the package, that nobody meant to raise

    monkeypatch.setattr("fractal_rm.cli.report.report", broken)
    with pytest.raises(TypeError):
        main(["report"])


def test_a_complaint_of_this_package_is_no_bug(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_jsonl(tmp_path / "none.jsonl")
    assert is_bad_input(caught.value)


@pytest.mark.parametrize("command", ["train", "ppo"])
def test_a_launched_command_leaves_its_process_group(models, tmp_path, command):
    arguments = ["--model", str(models / "policy"), "--max_steps", "1", "--bf16", "false", *TINY]
    if command == "train":
        arguments += ["--train_file", write_jsonl(tmp_path / "train.jsonl", solutions(4))]
    else:
        arguments += ["--reward_function", "exact_answer", "--task", "arithmetic", "--advantage", "group"]
        arguments += ["--num_problems", "4", "--num_eval_problems", "0", "--num_generations", "2"]
        arguments += ["--max_completion_length", "4"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert main([command, *arguments, "--output_dir", str(tmp_path / "out")]) == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
