"""The benchmark of the reward models of real words: its numbers on cases with known answers, and a run."""

import json

import numpy as np
import pytest
from support.stand_ins import save_policy, save_reward_model

from benchmarks.common.floors import position, score_by
from benchmarks.evidence import words_reward_models as benchmark
from fractal_rm.cli.main import main
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import read_questions


def questions(labels, step_labels, answers=None):
    """One prompt for each row of labels, eight responses of two lines to each."""
    rows = [
        {"prompt": f"p{i}", "response": f"a{j}\nb", "label": label, "step_labels": steps, "answer": str(answer)}
        for i, (row, gold) in enumerate(zip(labels, step_labels, strict=True))
        for j, (label, steps, answer) in enumerate(zip(row, gold, answers[i] if answers else row, strict=True))
    ]
    return read_questions(rows, Segmentation("lines"))


GOOD, LATE, EARLY = [1.0, 1.0], [1.0, 0.0], [0.0, None]


def test_numbers_of_a_case_that_is_worked_out_by_hand():
    # The first prompt: one right response among eight; the second: all wrong.
    asked = questions([[1, *[0] * 7], [0] * 8], [[GOOD, *[LATE] * 7], [EARLY] * 8])
    oracle = score_by(lambda bag: [0.0 if gold == 0 else 1.0 for gold in bag.step_labels], asked.bags)
    measured = benchmark.judge(oracle, asked, 0.5).values
    assert measured["within_bag_auc"] == measured["first_error_accuracy"] == measured["bag_auc"] == 1.0
    assert measured["best_of_8"] == measured["best_of_8_min"] == 0.5
    assert measured["mixed_bags"] == 7
    backwards = score_by(lambda bag: [1.0 if gold == 0 else 0.0 for gold in bag.step_labels], asked.bags)
    measured = benchmark.judge(backwards, asked, 0.5).values
    assert measured["within_bag_auc"] == measured["first_error_accuracy"] == 0.0
    # Early is good: right about every bag whose labels end at the first wrong line, by nothing that it knows.
    measured = benchmark.judge(score_by(position, asked.bags), asked, 0.6).values
    assert (measured["within_bag_auc"], measured["same_position_auc"]) == (1.0, 0.5)


def test_a_vote_and_its_difference():
    asked = questions([[1, 1, 0, 0, 0, 0, 0, 0]] * 2, [[GOOD] * 2 + [LATE] * 6] * 2, [[7, 7, 1, 2, 3, 4, 5, 6]] * 2)
    policy = benchmark.policy_level(asked)
    assert policy.values == {"accuracy": 0.25, "majority_8": 1.0, "pass_8": 1.0}
    worst = score_by(lambda bag: [float(bag.label == 0)] * 2, asked.bags)
    rival = benchmark.judge(score_by(lambda bag: [bag.label] * 2, asked.bags), asked, 0.5)
    found = benchmark.comparisons(benchmark.judge(worst, asked, 0.5), policy, rival)
    assert found["best_of_8_over_majority"] == found["best_of_8_over_likelihood"] == -1.0
    assert found["bag_auc_over_likelihood"] == -1.0


def test_the_benchmark_runs_on_what_sample_writes(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")
    policy, reward_model = save_policy(tmp_path / "policy"), save_reward_model(tmp_path / "reward_model")
    files = {}
    for split in ("validation", "held_out"):
        files[split] = tmp_path / f"{split}.jsonl"
        flags = ["--model", policy, "--task", "reasoning_gym", "--task_name", "gsm_symbolic", "--split", split]
        more = ["--num_prompts", "3", "--max_new_tokens", "6", "--gold_steps", "true", "--output", str(files[split])]
        assert main(["sample", *flags, *more]) == 0
    results = tmp_path / "rows.jsonl"
    flags = ["--validation", str(files["validation"]), "--data", f"gsm_symbolic={files['held_out']}"]
    benchmark.main([*flags, "--policy", policy, "--models", f"fractal={reward_model}", "--results", str(results)])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["arm"] for row in rows] == [benchmark.LIKELIHOOD, *benchmark.FLOORS, "fractal"]
    assert all(np.isfinite(row["metrics"]["best_of_8"]) and row["metrics"]["prompts"] == 3 for row in rows)
    assert "within_bag_auc_over_likelihood" in rows[-1]["metrics"]
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text(json.dumps({"prompt": "p", "completion": "a", "label": 1.0}) + "\n")
    with pytest.raises(ValueError, match="has no step labels"):
        benchmark.read(unlabelled)
