"""The pieces of the comparisons with TRL's former trainers that need no environment of theirs."""

import argparse
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.speed import ppo_parity, prm_parity
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import Beliefs, Problem, exact_answer, make_problems


def test_the_outcome_as_a_reward_model_is_the_outcome():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY, padding_side="left")
    problems = make_problems(12, seed=5)
    responses = [Beliefs().respond(problem, random.Random(i)) for i, problem in enumerate(problems)]
    texts = [problem.prompt + response + "<eos>" for problem, response in zip(problems, responses, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    model = ppo_parity.OutcomeReward(tokenizer)
    body = getattr(model, model.base_model_prefix)
    found = model.score(body(**batch, output_hidden_states=True).hidden_states[-1])
    expected = exact_answer([problem.prompt for problem in problems], responses)
    assert len(set(expected)) == 2
    assert found.shape == (*batch["input_ids"].shape, 1)
    torch.testing.assert_close(found[:, -1, 0], torch.tensor(expected))


def test_the_difference_is_that_of_the_last_points():
    rows = [
        {"arm": arm, "seed": seed, "metrics": {"rollouts": rollouts, "accuracy": value, "accuracy_greedy": value}}
        for arm, shift in (("step_ppo", 0.5), ("trl_ppo_1.12", 0.25))
        for seed in range(3)
        for rollouts, value in ((0, 9.0), (64, shift + 0.01 * seed))
    ]
    found = ppo_parity.difference(rows)
    assert found["rollouts"] == 64
    assert found["accuracy"] == pytest.approx(0.25)
    assert found["accuracy_low"] < 0.25 < found["accuracy_high"]


def test_both_sides_of_the_step_labels_read_the_same_rows():
    rows = prm_parity.rows_of(8, seed=1)
    assert rows == prm_parity.rows_of(8, seed=1)
    for row in rows:
        assert row["labels"] == Problem.from_prompt(row["prompt"]).check_steps("\n".join(row["completions"]))
    assert {flag for row in rows for flag in row["labels"]} == {True, False}


def test_runs_whose_rows_are_there_are_not_made_again(tmp_path, monkeypatch):
    made = []

    def run_side(module: str, arm: str, seed: int, given: argparse.Namespace, names: list[str]) -> dict:
        made.append((arm, seed))
        return {"scores": [[float(flag) for flag in row["labels"]] for row in prm_parity.rows_of(given.test, seed=-9)]}

    monkeypatch.setattr(prm_parity, "run_side", run_side)
    options = ["--test", "8", "--results", str(tmp_path / "rows.jsonl"), "--peer-python", str(tmp_path / "absent")]
    prm_parity.main(["--seeds", "0", *options])
    prm_parity.main(["--seeds", "0", "1", *options])
    assert made == [("fractal_supervised", 0), ("fractal_supervised", 1)]
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["metrics"]["step_auc"] for line in lines] == [1.0, 1.0]
