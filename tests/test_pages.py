"""Seeing what PPO does: pages of step scores, TRL's table of completions, and the numbers that trackers get."""

import contextlib
import io
import json
import math
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from datasets import Dataset
from support.stand_ins import save_policy
from support.step_ppo import COMPLETIONS, SCORES, count_of_a, make, policy_tokenizer, replay, reward_model
from transformers.integrations import integration_utils
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from fractal_rm import FractalConfig, FractalTrainer, StepPPOTrainer, StepScoresCallback

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

# As many different completions as a rollout holds, without the empty one, so that every row has a text of its own.
ROWS = [ids for ids in COMPLETIONS if len(ids) > 1]
STEPS = 5


def undecided(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """An outcome reward that says nothing about completions that start like the first."""
    return [None if tuple(ids[:2]) == ROWS[0][:2] else 2.0 for ids in completion_ids]


def silent(completion_ids: list[list[int]], **_: Any) -> list[None]:
    """An outcome reward that never says anything: TRL logs None for it."""
    return [None for _ in completion_ids]


class Scalars:
    """A `SummaryWriter` that keeps what it gets."""

    written: ClassVar[dict[str, list[Any]]] = defaultdict(list)

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.written[name].append(value)

    def add_text(self, name: str, text: str, step: int | None = None) -> None:
        json.dumps(text)

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Any:
    """A training that shows all there is to see, with what it printed."""
    folder = tmp_path_factory.mktemp("run")
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
        patch.setitem(
            sys.modules,
            "torch.utils.tensorboard",
            types.SimpleNamespace(SummaryWriter=Scalars),  # type: ignore[arg-type]
        )
        patch.setenv("COLUMNS", "300")
        Scalars.written.clear()
        torch.manual_seed(0)
        trainer = make(
            folder,
            StepPPOTrainer,
            reward_model=reward_model(),
            reward_funcs=[count_of_a, undecided, silent],
            reward_weights=[1.0, 0.5, 1.0],
            rollout_func=replay(ROWS),
            eval_dataset=Dataset.from_dict({"prompt": ["cc"] * 4}),
            eval_strategy="steps",
            eval_steps=1,
            max_steps=STEPS,
            log_completions=True,
            report_to="tensorboard",
        )
        trainer.add_callback(StepScoresCallback(trainer, every_n_steps=2, keep=2))
        trainer.train()
    return types.SimpleNamespace(trainer=trainer, folder=folder, screen=screen.getvalue())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Pages ----------------------------------------------------------------------------------------------------------------


def test_pages_are_written_every_n_steps_and_at_the_end_and_the_last_are_kept(run):
    found = sorted(path.name for path in (run.folder / "step_scores").iterdir())
    assert found == ["step-000004.html", "step-000004.jsonl", "step-000005.html", "step-000005.jsonl"]


def test_rows_hold_the_steps_of_the_rollout_with_their_scores(run):
    rows = rows_of(run.folder / "step_scores" / "step-000005.jsonl")
    assert len(rows) == 8
    tokenizer = policy_tokenizer()
    for row, ids in zip(rows, [*ROWS, *ROWS], strict=False):
        letters = list(COMPLETIONS[ids].values())
        assert row["step"] == 5
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert [step["text"][-1] for step in row["steps"]] == letters
        assert [row["response"][step["start"] : step["end"]] for step in row["steps"]] == [
            step["text"] for step in row["steps"]
        ]
        assert [step["score"] for step in row["steps"]] == pytest.approx([SCORES[x] for x in letters], abs=1e-5)
        if letters:
            assert row["score"] == pytest.approx(min(SCORES[x] for x in letters), abs=1e-5)
        else:
            assert row["score"] is None
            assert "the response is empty" in row["error"]


def test_rows_hold_what_is_known_of_the_outcome(run):
    rows = rows_of(run.folder / "step_scores" / "step-000005.jsonl")
    counts = count_of_a([list(ids) for ids in ROWS])
    for row, ids, count in zip(rows, ROWS, counts, strict=False):
        if ids is ROWS[0]:
            assert row["rewards"] == {"count_of_a": count}
            assert row["label"] == pytest.approx(count)
        else:
            assert row["rewards"] == {"count_of_a": count, "undecided": 2.0}
            assert row["label"] == pytest.approx(count + 0.5 * 2.0)


def test_the_rollout_shown_is_that_of_the_training_though_evaluation_came_after(run):
    prompts = {row["prompt"] for row in rows_of(run.folder / "step_scores" / "step-000005.jsonl")}
    assert "cc" not in prompts
    assert prompts <= {"q", "qa", "qab b", "qc"}


def test_a_page_shows_every_row(run):
    page = (run.folder / "step_scores" / "step-000004.html").read_text(encoding="utf-8")
    assert "Step scores of the rollout at step 4" in page
    assert page.count("<article") == 8
    assert ">0.90<" in page


def test_without_outcome_functions_no_label_is_known(tmp_path):
    trainer = make(tmp_path, StepPPOTrainer, reward_model=reward_model(), rollout_func=replay(ROWS), max_steps=1)
    trainer.add_callback(StepScoresCallback(trainer))
    trainer.train()
    rows = rows_of(tmp_path / "step_scores" / "step-000001.jsonl")
    assert {row["label"] for row in rows} == {None}
    assert all(row["rewards"] == {} for row in rows)


def test_pages_of_an_earlier_run_make_room_for_those_of_this_one(tmp_path, run):
    callback = StepScoresCallback(run.trainer, keep=1)
    args = types.SimpleNamespace(output_dir=str(tmp_path))
    for step in (900, 10):
        callback.write(args, types.SimpleNamespace(global_step=step, is_world_process_zero=True))
    assert {path.stem for path in (tmp_path / "step_scores").iterdir()} == {"step-000010"}
    callback.write(args, types.SimpleNamespace(global_step=20, is_world_process_zero=False))
    assert {path.stem for path in (tmp_path / "step_scores").iterdir()} == {"step-000010"}


def test_a_trainer_without_step_scores_is_refused(tmp_path, run):
    trainer = make(tmp_path, StepPPOTrainer, reward_funcs=[count_of_a])
    with pytest.raises(ValueError, match=r"this trainer has none\. Give it a `reward_model`"):
        StepScoresCallback(trainer)
    with pytest.raises(ValueError, match="`keep` of StepScoresCallback is 0"):
        StepScoresCallback(run.trainer, keep=0)


# TRL's table of completions -------------------------------------------------------------------------------------------


def test_logged_completions_show_steps_with_their_scores(run):
    table = pd.read_parquet(run.folder / "completions" / "completions_00005.parquet")
    assert len(table) == 8
    for completion, lines in zip(table["completion"], table["steps/step_reward_model"], strict=True):
        texts = [line.strip() for line in completion.splitlines() if line.strip()]
        shown = [line.partition("  ") for line in lines.splitlines()]
        if not texts:
            assert lines.startswith("not scored: ")
            continue
        assert [text for _, _, text in shown] == texts
        assert [score for score, _, _ in shown] == [f"{SCORES[text[-1]]:.2f}" for text in texts]


def test_the_table_on_the_screen_has_the_column_too(run):
    assert "steps/step_reward_model" in run.screen
    assert "0.90  a" in run.screen


# Trackers -------------------------------------------------------------------------------------------------------------


def test_logs_are_finite_numbers_and_what_is_unknown_is_left_out(run):
    history = run.trainer.state.log_history
    assert len(history) > STEPS
    for entry in history:
        assert all(type(value) in (int, float) and math.isfinite(value) for value in entry.values()), entry
    names = {name for entry in history for name in entry}
    assert {"steps/score", "value/loss", "rewards/undecided/mean", "eval_rewards/step_reward_model/mean"} <= names
    assert "rewards/silent/mean" not in names


def test_tensorboard_gets_the_numbers_of_steps(run):
    assert len(Scalars.written["train/steps/score"]) == STEPS
    assert "train/rewards/silent/mean" not in Scalars.written
    values = [value for found in Scalars.written.values() for value in found]
    assert all(type(value) in (int, float) and math.isfinite(value) for value in values)


def test_a_loss_that_is_no_number_is_left_out_with_a_warning(run, caplog):
    run.trainer.log({"loss": math.nan, "grad_norm": 1.0})
    assert "loss" not in run.trainer.state.log_history[-1]
    assert run.trainer.state.log_history[-1]["grad_norm"] == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "`loss` is nan at step 5: training diverges. Lower `learning_rate`, or go back to a checkpoint."
    ]


def test_trl_itself_logs_none_for_what_is_unknown(tmp_path):
    trainer = make(
        tmp_path,
        GRPOTrainer,
        GRPOConfig,
        reward_funcs=[count_of_a, silent],
        rollout_func=replay(ROWS),
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/silent/mean"] is None  # so there is something to leave out


def test_what_evaluate_returns_keeps_its_nan_and_its_epoch(tmp_path):
    rows = [{"prompt": "q\n", "completion": f"a{i}\nb", "label": i < 4} for i in range(8)]
    trainer = FractalTrainer(
        save_policy(tmp_path / "policy"),
        FractalConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=rows,
        eval_dataset=rows[:2],
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_bag_auc"])
    assert metrics["epoch"] == trainer.state.epoch
    (logged,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged.keys() | {"eval_bag_auc"} == metrics.keys() | {"step"}
    json.dumps(trainer.state.log_history, allow_nan=False)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_installed_gets_the_numbers_of_steps(tracker, tmp_path, monkeypatch):
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make(
        tmp_path / "out",
        StepPPOTrainer,
        reward_model=reward_model(),
        reward_funcs=[count_of_a, silent],
        rollout_func=replay(ROWS),
        report_to=tracker,
        log_completions=True,
    )
    trainer.train()
    if tracker == "wandb":
        import wandb

        summary = dict(wandb.run.summary)
        wandb.finish()
        assert summary["train/steps/score"] > 0
        assert summary["completions"]["ncols"] == 8
        assert "train/rewards/silent/mean" not in summary
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert len(events.Scalars("train/steps/score")) == 2
    assert "train/rewards/silent/mean" not in events.Tags()["scalars"]
