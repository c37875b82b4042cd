"""What commands keep: finished models, scores of a stopped run, a first loss; and what they say at their end."""

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.stand_ins import save_policy, save_reward_model, solutions, write_jsonl
from transformers import Trainer, TrainingArguments

from fractal_rm.cli.checks import checkpoint_to_resume, print_table, refuse_finished_output
from fractal_rm.cli.evaluate import draw, why_absent
from fractal_rm.cli.main import COMMANDS, loading, main
from fractal_rm.cli.ppo import closing
from fractal_rm.cli.train import _closing
from fractal_rm.data.bag import Bag
from fractal_rm.evaluation import kept_scores
from fractal_rm.evaluation.intervals import Estimate
from fractal_rm.hf.progress import RichProgress, bar_on_terminal
from fractal_rm.interrupts import Interrupted, interrupt
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.trainer import FractalTrainer

TINY = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_policy(folder / "policy")
    save_reward_model(folder / "rm")
    return folder


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """Arguments of a training that is finished."""
    folder = tmp_path_factory.mktemp("trained")
    rows = write_jsonl(folder / "rows.jsonl", solutions(12))
    arguments = ["train", "--model_name_or_path", str(models / "policy"), "--output_dir", str(folder / "rm"), *TINY]
    arguments += ["--train_file", rows, "--eval_file", rows]
    assert main([*arguments, "--max_steps", "11"]) == 0
    return folder, arguments


def test_a_finished_model_is_overwritten_on_request_only(trained, capsys):
    folder, arguments = trained
    before = (folder / "rm" / "model.safetensors").read_bytes()
    assert main([*arguments, "--max_steps", "1", "--seed", "7"]) == 2
    said = capsys.readouterr().err
    assert f"{folder}/rm already holds a finished model. Give another `output_dir`, or `--overwrite_output_dir" in said
    assert (folder / "rm" / "model.safetensors").read_bytes() == before
    refuse_finished_output(folder / "rm", overwrite=True)
    refuse_finished_output(folder, overwrite=False)  # rows, and no model


@pytest.mark.parametrize(
    ("holds", "options", "told"),
    [
        ("checkpoint-3/manifest.json", {}, True),
        ("checkpoint-3/manifest.json", {"resume_from_checkpoint": "false"}, False),
        ("checkpoint-3/manifest.json", {"overwrite_output_dir": True}, False),
        ("rows.jsonl", {}, False),
    ],
)
def test_a_repeated_command_says_that_it_could_go_on(tmp_path, capsys, holds, options, told):
    write_jsonl(tmp_path / holds, [{}])
    given = {"output_dir": str(tmp_path), "resume_from_checkpoint": None, "overwrite_output_dir": False} | options
    assert checkpoint_to_resume(SimpleNamespace(**given)) is False
    assert ("add `--resume_from_checkpoint true` to continue." in capsys.readouterr().err) == told


def test_the_first_loss_is_logged_after_ten_steps_however_rare_logs_are(trained):
    history = json.loads((trained[0] / "rm" / "metrics.json").read_text())["history"]
    assert [logs["step"] for logs in history if "loss" in logs] == [10]


def test_a_policy_is_saved_if_its_evaluation_is_interrupted(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StepPPOTrainer, "evaluate", lambda self: interrupt(signal.SIGINT, None))
    arguments = ["--model", str(models / "policy"), "--reward_model", str(models / "rm"), *TINY, "--bf16", "false"]
    arguments += ["--task", "arithmetic", "--num_problems", "8", "--num_eval_problems", "4", "--num_generations", "1"]
    arguments += ["--reward_function", "exact_answer", "--max_steps", "1", "--max_completion_length", "12"]
    assert main(["ppo", *arguments, "--output_dir", str(tmp_path / "ppo")]) == 130
    assert f"{tmp_path}/ppo holds the trained policy, but no metrics.json." in capsys.readouterr().err
    assert (tmp_path / "ppo" / "model.safetensors").is_file()


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.linear(x) - labels).square().mean(), "y": self.linear(x)}


def test_an_evaluation_has_a_bar_until_it_ends(tmp_path, monkeypatch):
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 12
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True)
    trainer = Trainer(Line(), args, eval_dataset=rows)
    with RichProgress(trainer, "PPO") as shown:
        bars = []
        advance = shown.progress.advance

        def advanced(task):
            advance(task)
            bars.append([(bar.description, bar.completed, bar.total) for bar in shown.progress.tasks][1:])

        monkeypatch.setattr(shown.progress, "advance", advanced)
        trainer.evaluate()
        assert bars == [[("Evaluation", batch, 3)] for batch in (1, 2, 3)]
        assert [bar.description for bar in shown.progress.tasks] == ["PPO"]


def test_the_end_of_train_says_how_good_the_model_is_and_what_comes_next(trained, capsys):
    folder, arguments = trained
    assert main([*arguments, "--max_steps", "1", "--overwrite_output_dir", "--resume_from_checkpoint", "true"]) == 0
    said = capsys.readouterr()
    assert f"{folder}/rm has no checkpoint: training starts from the beginning." in said.err
    found = json.loads((folder / "rm" / "metrics.json").read_text())["eval"]
    assert f"Held-out AUC {found['bag_auc']:.4g} (" in said.out
    assert f"a step below {found['threshold']:.4g} counts as wrong." in said.out
    assert f"Next: fractal-rm score --model {folder}/rm --input {folder}/rows.jsonl --output" in said.out


def test_without_step_labels_the_end_of_train_still_says_the_threshold(tmp_path):
    said = _closing(tmp_path, {"eval": {"bag_auc": 0.75}}, 0.25, "rows.jsonl")
    assert "Held-out AUC 0.75 (`eval`, `bag_auc`: 0.5 is chance); a step below 0.25 counts as wrong." in said


def test_one_of_many_trainings_has_a_bar_on_a_terminal_alone(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(Line(), args)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert not isinstance(bar_on_terminal(trainer, "easy"), RichProgress)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = bar_on_terminal(trainer, "easy")
    assert isinstance(shown, RichProgress)
    assert not shown.progress.disable
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the one with the bars")
    assert not isinstance(bar_on_terminal(trainer, "easy"), RichProgress)


def test_slow_imports_are_said_on_a_terminal_and_leave_no_line(monkeypatch, capsys):
    with loading():
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with loading():
        pass
    assert capsys.readouterr().err == "Loading libraries ...\r\033[K"


def test_the_end_of_ppo_names_rewards_and_alarms():
    history = [
        {"rewards/exact_answer/mean": 0.1, "rewards/step_reward_model/mean": 9.0, "steps/score": 0.5},
        {"rewards/exact_answer/mean": 0.4, "steps/score": 0.6, "guards/alarm/length": 1.0},
        {"train_loss": 1.0},
    ]
    assert closing(history) == "Outcome (exact_answer) 0.1 -> 0.4, step score 0.5 -> 0.6. Alarms: length."
    assert closing([{"train_loss": 1.0}]) == "No reward was logged. Alarms: none."


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_promises_only_flags_that_it_has(command, monkeypatch, capsys):
    ends = [
        KeyboardInterrupt(),
        Interrupted(signal.SIGINT, "Interrupted after step 3.", "Add --resume_from_checkpoint."),
    ]

    def interrupted(name, argv):
        raise ends.pop(0)

    monkeypatch.setattr("fractal_rm.cli.main.run", interrupted)
    goes_on = command in ("quickstart", "score", "evaluate", "sample", "compare")
    assert main([command]) == 130
    said = capsys.readouterr().err
    assert said.startswith("Interrupted. ")
    assert "--" not in said  # train and ppo say how to go on once there is something to go on from
    assert ("are kept; the same command continues" in said) == goes_on
    assert main([command]) == 130  # while one of its trainings runs
    said = capsys.readouterr().err
    assert said.startswith("Interrupted after step 3. ")
    assert ("--resume_from_checkpoint" in said) == (not goes_on)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_reward_model_is_saved_if_its_evaluation_is_interrupted(trained, tmp_path, monkeypatch, capsys, resumed):
    monkeypatch.setattr(FractalTrainer, "finish", lambda self, *_, **__: interrupt(signal.SIGINT, None))
    monkeypatch.setattr("fractal_rm.hf.checkpoints.can_resume", lambda folder: resumed)
    _, arguments = trained
    arguments = [str(tmp_path / "rm") if word.endswith("/rm") else word for word in arguments]
    assert main([*arguments, "--max_steps", "1"]) == 130
    said = capsys.readouterr().err
    assert f"Interrupted while evaluating: {tmp_path}/rm holds the trained reward model, but no metrics.json." in said
    flag = "evaluates it with --resume_from_checkpoint" if resumed else "trains again with --overwrite_output_dir"
    assert f"The same command {flag} true." in said
    assert (tmp_path / "rm" / "model.safetensors").is_file()


# Scores of a stopped run ----------------------------------------------------------------------------------------------


class Stopped(RuntimeError):
    """As a killed process leaves its files."""


@pytest.fixture
def stopping(monkeypatch):
    """Chunks of two responses, and a reward model that stops when it is asked for the third chunk."""
    monkeypatch.setattr(kept_scores, "CHUNK", 2)
    score, asked = StepRewardModel.score, []

    def stop(self, prompts, responses, **options):
        if len(asked) == stop.chunks:
            raise Stopped
        asked.append(len(responses))
        return score(self, prompts, responses, **options)

    stop.chunks = 2
    monkeypatch.setattr(StepRewardModel, "score", stop)
    stop.asked = asked
    return stop


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_stopped_run_goes_on_with_the_scores_that_it_has(models, tmp_path, stopping, command, capsys):
    rows = write_jsonl(tmp_path / "in.jsonl", solutions(9))
    data = "--input" if command == "score" else "--data"
    arguments = [command, "--model", str(models / "rm"), data, rows]
    whole, output = tmp_path / "whole", tmp_path / "out"
    stopping.chunks = -1
    assert main([*arguments, "--output", str(whole)]) == 0
    assert stopping.asked == [2, 2, 2, 2, 1]
    said = capsys.readouterr().err
    assert "Scoring" in said  # one bar over all
    assert "have scores already" not in said
    stopping.asked.clear()
    stopping.chunks = 2
    with pytest.raises(Stopped):
        main([*arguments, "--output", str(output)])
    assert not output.exists()
    with (tmp_path / "out.part").open("a") as file:
        file.write('["cut by a kill')
    stopping.asked.clear()
    stopping.chunks = -1
    assert main([*arguments, "--output", str(output)]) == 0
    assert stopping.asked == [2, 2, 1]
    assert f"4 of 9 responses have scores already, in {output}.part." in capsys.readouterr().err
    assert not (tmp_path / "out.part").exists()
    if command == "score":
        assert output.read_text() == whole.read_text()
    else:
        one, other = (json.loads(path.read_text()) for path in (output, whole))
        assert {name: value for name, value in other.items() if name in one} == one
        assert other.keys() - one.keys() == {"seconds", "responses_per_second"}  # not of all responses


@pytest.mark.parametrize(("command", "data"), [("score", "--input"), ("evaluate", "--data")])
def test_beside_a_device_no_scores_are_kept_and_a_full_one_is_named(models, tmp_path, command, data, capsys):
    rows = write_jsonl(tmp_path / "in.jsonl", solutions(3))
    assert main([command, "--model", str(models / "rm"), data, rows, "--output", "/dev/null"]) == 0
    assert main([command, "--model", str(models / "rm"), data, rows, "--output", "/dev/full"]) == 2
    assert "/dev/full: No space left on device. Free space, and run the command again." in capsys.readouterr().err
    assert not Path("/dev/full.part").exists()


def test_scores_of_another_model_or_other_steps_are_never_taken(models, tmp_path):
    model = StepRewardModel.from_pretrained(models / "rm", device="cpu")
    ask = {"prompts": ["1+1?\n"], "responses": ["2.\n2."]}
    first = kept_scores.KeptScores(model, tmp_path / "part", "one")
    first.score(**ask, spans=[[(0, 2), (3, 5)]])
    for name, spans, reused in (("one", [(0, 2), (3, 5)], 1), ("one", [(0, 5)], 0), ("two", [(0, 2), (3, 5)], 0)):
        again = kept_scores.KeptScores(model, tmp_path / "part", name)
        (found,) = again.score(**ask, spans=[spans])
        assert (again.reused, found.spans) == (reused, spans)
    assert torch.isfinite(torch.tensor(found.step_scores)).all()


# What evaluate says ---------------------------------------------------------------------------------------------------


def test_a_limit_draws_from_all_of_a_sorted_file():
    rows = [{"prompt": str(i // 4), "label": float(i >= 50)} for i in range(100)]
    taken = draw(rows, 20, 0)
    assert {row["label"] for row in taken} == {0.0, 1.0}
    assert taken == [row for row in rows if any(row is one for one in taken)]
    assert (len(taken), draw(rows, 20, 0) == taken, draw(rows, 20, 1) == taken) == (20, True, False)
    whole = [row["prompt"] for row in draw(rows, 10, 0, whole_prompts=True)]
    assert sorted(whole.count(prompt) for prompt in set(whole)) == [4, 4]
    pairs = [Bag("?", "a", ((0, 1),), label, pair_id=str(i)) for i in range(10) for label in (1.0, 0.0)]
    assert [bag.label for bag in draw(pairs, 4, 0)] == [1.0, 0.0, 1.0, 0.0]


def test_why_a_metric_is_absent_is_said():
    nothing = Estimate(math.nan, math.nan, math.nan)
    bags = [Bag("?", "a", ((0, 1),), 1.0)] * 3
    assert why_absent({"bag_auc": nothing, "bag_ece": Estimate(0.1, 0.0, 0.2)}, bags) == [
        "Not measured: bag_auc. All 3 responses have the label 1.",
        "No step metrics: no row has `step_labels`.",
    ]
    known = [Bag("?", "a", ((0, 1),), label, step_labels=(1.0,)) for label in (1.0, 0.0)]
    assert why_absent({"step_auc": nothing}, known) == ["Not measured: step_auc. All 2 step labels are 1."]
    assert why_absent({"bag_auc": nothing}, bags[:1])[0] == "Not measured: bag_auc. The only response has the label 1."
    wrong = [Bag("?", "a b", ((0, 1), (2, 3)), 0.0, step_labels=(1.0, 0.0))] * 2
    (said,) = why_absent({"f1": nothing}, wrong)
    assert said.startswith(
        "Not measured: f1. They need responses with a wrong step, and responses with only right steps"
    )
    assert why_absent({"bag_auc": Estimate(1.0, 1.0, 1.0)}, [*known, *bags]) == []


def test_a_narrow_table_cuts_no_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"a_metric_with_a_long_name_that_ends_in_{end}" for end in ("gsm8k", "omnimath")]
    columns = ["a model with a long name", "another model with a long name", "difference"]
    print_table(columns, {name: ["0.123 [0.100, 0.150]"] * 3 for name in names})
    shown = capsys.readouterr().out
    assert "…" not in shown
    cells = "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│"))
    assert cells == "".join(names)
    print_table(columns, {name: ["0.123 [0.100, 0.150]"] * 3 for name in ("responses_per_second", "f1")})
    shown = capsys.readouterr().out
    assert "│ responses_per_second │" in shown  # in one piece where there is room
    assert " difference ┃" in shown
    assert max(map(len, shown.splitlines())) <= 80
