"""The quickstart with a tiny budget: every stage runs, resumes, and leaves what it promises."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers

from fractal_rm.evaluation.results import read_results
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study import quickstart
from fractal_rm.study.quickstart import ARMS, Amounts, Quickstart, QuickstartArguments
from fractal_rm.study.run import quiet

TINY = Amounts(
    responses=192,
    updates=2,
    evaluate_every=1,
    held_out=16,
    rollouts_per_update=16,
    validation=48,
    ppo_prompts=64,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    Quickstart(QuickstartArguments(output_dir=str(folder)), TINY).run()
    return folder


def test_rows_hold_both_arms_at_every_evaluation_with_the_promised_metrics(finished):
    rows = [row for row in read_results(finished / "results.jsonl") if row["split"] == "held_out"]
    found = {(row["arm"], row["metrics"]["rollouts"]) for row in rows}
    assert found == {(arm.name, rollouts) for arm in ARMS for rollouts in (0, 16, 32)}
    assert all({"accuracy", "step_auc", "within_bag_auc", "rollouts"} <= set(row["metrics"]) for row in rows)


def test_both_arms_start_from_the_same_accuracy(finished):
    starts = {
        row["metrics"]["accuracy"]
        for row in read_results(finished / "results.jsonl")
        if row["split"] == "held_out" and row["metrics"]["rollouts"] == 0
    }
    assert len(starts) == 1


def test_training_responses_carry_outcomes_and_no_step_labels(finished):
    rows = [json.loads(line) for line in (finished / "responses.jsonl").read_text().splitlines()]
    assert len(rows) > 100
    assert all(set(row) == {"prompt", "completion", "label"} for row in rows)


def test_the_reward_model_folder_scores_and_the_report_stands_alone(finished):
    reward_model = StepRewardModel.from_pretrained(finished / "reward_model", device="cpu")
    row = json.loads((finished / "validation.jsonl").read_text().splitlines()[0])
    scored = reward_model.score([row["prompt"]], [row["steps"]])[0]
    assert len(scored.steps) == len(row["steps"])
    page = re.sub("<[^>]+>", "", (finished / "report.html").read_text())
    assert "dense+outcome" in page
    assert "fractal-rm ppo" in page
    assert (finished / "picture.png").stat().st_size > 10_000


def test_a_finished_run_is_not_run_again(finished):
    before = (finished / "results.jsonl").read_bytes()
    weights = (finished / "reward_model" / "model.safetensors").stat().st_mtime_ns
    Quickstart(QuickstartArguments(output_dir=str(finished)), TINY).run()
    assert (finished / "results.jsonl").read_bytes() == before
    assert (finished / "reward_model" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_stage_that_was_stopped_runs_again_without_doubling_its_rows(finished):
    before = read_results(finished / "results.jsonl")
    (finished / "done" / "ppo-outcome.json").unlink()
    Quickstart(QuickstartArguments(output_dir=str(finished)), TINY).run()
    assert read_results(finished / "results.jsonl") == before


def test_a_policy_that_was_stopped_in_training_goes_on_from_its_last_measurement(finished, tmp_path, monkeypatch):
    folder, measured = tmp_path / "run", []
    shutil.copytree(finished, folder)
    (folder / "done" / "ppo-outcome.json").unlink()
    shutil.rmtree(folder / "ppo" / "outcome")
    rows = read_results(folder / "results.jsonl")
    others = [row for row in rows if row["arm"] != "outcome"]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    measure = quickstart.measure

    def stopping(*args, **kwargs):
        measured.append(args)
        if len(measured) == 3:  # after the second of two updates
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(quickstart, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        Quickstart(QuickstartArguments(output_dir=str(folder)), TINY).run()
    Quickstart(QuickstartArguments(output_dir=str(folder)), TINY).run()
    assert len(measured) == 4  # the start and the first update were not measured again
    found = [row["metrics"] for row in read_results(folder / "results.jsonl") if row["arm"] == "outcome"]
    assert found == [row["metrics"] for row in rows if row["arm"] == "outcome"]
    assert not list(folder.glob("ppo/*/checkpoint-*"))


def test_a_folder_that_is_removed_meanwhile_is_named(tmp_path):
    class Removed(Quickstart):
        def take_policy(self):
            shutil.rmtree(self.folder)
            raise OSError("There is no tokenizer.")

    with pytest.raises(FileNotFoundError, match=r"run was removed while the quickstart ran in it\. Start it again"):
        Removed(QuickstartArguments(output_dir=str(tmp_path / "run")), TINY).run()


def test_a_folder_of_another_seed_is_refused(finished):
    with pytest.raises(ValueError, match="another seed or budget"):
        Quickstart(QuickstartArguments(output_dir=str(finished), seed=1), TINY).run()


def test_held_out_prompts_are_seen_by_no_other_stage():
    run = Quickstart(QuickstartArguments(output_dir="unused"), TINY)
    held_out = {problem.prompt for problem in run.held_out}
    for name in ("reward_model", "validation", "train"):
        assert not held_out & {problem.prompt for problem in run.problems[name]}


def test_libraries_speak_again_after_a_quiet_block():
    notes = transformers.utils.logging

    def state():
        return notes.get_verbosity(), notes.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()

    before = state()
    with quiet():
        assert state() == (notes.ERROR, False, True)
    assert state() == before


def test_a_policy_that_cannot_be_copied_is_one_sentence(tmp_path, monkeypatch):
    def fail(*asked: Any, **options: Any) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device")])

    monkeypatch.setattr(shutil, "copytree", fail)
    given: Any = SimpleNamespace(folder=tmp_path, task=SimpleNamespace(base_policy=lambda *asked: tmp_path))
    with pytest.raises(OSError, match=r"policy could not be written \(.*No space left on device\)\. Free space, and"):
        Quickstart.take_policy(given)


def test_a_damaged_note_of_an_earlier_run_is_one_sentence(tmp_path):
    (tmp_path / "quickstart.json").write_text("{")
    with pytest.raises(ValueError, match=r"quickstart\.json is invalid JSON .* fix or delete it\."):
        Quickstart(QuickstartArguments(output_dir=str(tmp_path)), TINY)._claim_folder()
