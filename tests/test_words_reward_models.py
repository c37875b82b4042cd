"""The benchmark of the reward models of real words: its numbers on cases with known answers, and a run."""

import json

import numpy as np
import pytest
import torch
from support.stand_ins import save_policy, save_reward_model
from transformers import AutoTokenizer

from benchmarks.common.floors import position, score_by
from benchmarks.evidence import words_heads
from benchmarks.evidence import words_reward_models as benchmark
from fractal_rm.cli.main import main
from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import read_questions
from fractal_rm.evaluation.statistics import auc_of


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
    assert measured["within_prompt_auc"] == 1.0
    assert measured["mixed_bags"] == 7
    backwards = score_by(lambda bag: [1.0 if gold == 0 else 0.0 for gold in bag.step_labels], asked.bags)
    measured = benchmark.judge(backwards, asked, 0.5).values
    assert measured["within_bag_auc"] == measured["first_error_accuracy"] == 0.0
    # Early is good: right about every bag whose labels end at the first wrong line, by nothing that it knows.
    measured = benchmark.judge(score_by(position, asked.bags), asked, 0.6).values
    assert (measured["within_bag_auc"], measured["same_position_auc"]) == (1.0, 0.5)
    # To know which prompts are easy is something across prompts, and nothing within them.
    easy = questions([[*[1] * 7, 0], [1, *[0] * 7]], [[LATE] * 8] * 2)
    measured = benchmark.judge(
        score_by(lambda bag: [0.1 + 0.8 * (bag.prompt == "p0")] * 2, easy.bags), easy, 0.5
    ).values
    assert measured["bag_auc"] > 0.8
    assert measured["within_prompt_auc"] == 0.5


def test_heads_read_what_answers_tell_of_steps():
    # Of four steps a response, the second number of each says whether it is good; a response is right if all are.
    generator = np.random.default_rng(0)
    good = generator.random((200, 4)) < 0.8
    states = np.stack([generator.normal(size=good.size), good.ravel() + 0.1 * generator.normal(size=good.size)], axis=1)
    features = words_heads.Features(np.zeros((800, 1)), {7: states}, np.full(200, 4))
    right = good.all(axis=1).astype(float)
    prompts = [str(i // 4) for i in range(200)]
    pairs = words_heads.pairs_of(right, prompts)
    assert all(prompts[i] == prompts[j] and right[i] > right[j] for i, j in pairs.tolist())
    mask = features.mask
    answers = words_heads.of_answers(torch.tensor(right, dtype=torch.float32), mask)
    spans = tuple((place, place + 1) for place in range(4))
    gold = [Bag("p", "abcd", spans, None, tuple(row)) for row in good.astype(float).tolist()]
    for loss in (
        answers,
        words_heads.of_pairs(pairs, mask),
        words_heads.of_steps(words_heads.gold_targets(gold, mask, 1.0)),
        words_heads.weighted(answers, words_heads.of_steps(words_heads.gold_targets(gold, mask, 0.1)), 0.5),
    ):
        head = words_heads.Head(7, 1e-3, [0]).fit(features, loss)
        whole, steps = head.scores(features)
        assert auc_of(steps, list(good.astype(float))).value > 0.99
        assert words_heads.within_prompts(whole, right, prompts) > 0.99
    assert words_heads.within_prompts(-whole, right, prompts) < 0.01


def test_gold_labels_are_read_for_their_share_of_responses_only():
    bags = [Bag("p", "ab", ((0, 1), (1, 2)), None, (1.0, None)) for _ in range(40)]
    mask = torch.ones(40, 2, dtype=torch.bool)
    found = words_heads.gold_targets(bags, mask, 0.1)
    assert (~found.isnan()).sum(0).tolist() == [4, 0]
    assert words_heads.of_steps(found)(torch.full((40, 2), 20.0)) < 1e-6
    unread = [Bag("p", "ab", ((0, 1), (1, 2)), None)] * 40
    assert words_heads.gold_targets(unread, mask, 1.0).isnan().all()


def test_responses_written_twice_agree_and_are_learned_from_once(tmp_path):
    rows = [("1\n2", 0), ("1\n3", 1), ("1\n2", 2)]
    bags = [Bag("p0", text, ((0, 1), (2, 3)), float(number == 1)) for text, number in rows]
    asked = words_heads.Questions(bags, [[0, 1, 2]], None)
    features = words_heads.Features(np.zeros((4, 6)), {}, np.array([2, 2]))
    np.savez(tmp_path / "f.npz", numbers=features.numbers, counts=features.counts)
    found = words_heads.with_features(asked, tmp_path / "f.npz", None, None)
    assert (found.places, found.different, found.labels.tolist()) == ([0, 1, 0], [0, 1], [0.0, 1.0])
    shares = np.exp(found.features.numbers[:, 6]) - 0.1
    assert np.allclose(shares, [1.0, 0.5, 1.0, 0.0])


def test_tokens_belong_to_the_step_they_stand_in(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_policy(tmp_path / "policy"))
    bag = Bag("ab", "c\n---\nde", ((0, 5), (6, 8)), None)
    ids, steps = words_heads.tokenize(tokenizer, bag)
    assert len(ids) == len(steps)
    assert steps.tolist()[-8:] == [0] * 6 + [1] * 2  # the line break belongs to what it ends
    assert set(steps.tolist()[:-8]) == {-1}


def test_a_vote_and_its_difference():
    asked = questions([[1, 1, 0, 0, 0, 0, 0, 0]] * 2, [[GOOD] * 2 + [LATE] * 6] * 2, [[7, 7, 1, 2, 3, 4, 5, 6]] * 2)
    policy = benchmark.policy_level(asked)
    assert policy.values == {"accuracy": 0.25, "majority_8": 1.0, "pass_8": 1.0}
    worst = score_by(lambda bag: [float(bag.label == 0)] * 2, asked.bags)
    rival = benchmark.judge(score_by(lambda bag: [bag.label] * 2, asked.bags), asked, 0.5)
    found = benchmark.comparisons(benchmark.judge(worst, asked, 0.5), policy, rival)
    assert found["best_of_8_over_majority"] == found["best_of_8_over_likelihood"] == -1.0
    assert found["bag_auc_over_likelihood"] == -1.0


def test_the_benchmark_runs_on_what_sample_writes(tmp_path, monkeypatch):
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
    files |= {"train": tmp_path / "train.jsonl"}
    labelled = [json.loads(line) for line in files["validation"].read_text().splitlines()]
    right = [{**row, "label": float(i % 2)} for i, row in enumerate(labelled)]  # the stand-in is never right
    files["train"].write_text("".join(json.dumps(row) + "\n" for row in right))
    flags = ["--validation", str(files["train"]), "--data", f"gsm_symbolic={files['held_out']}", "--policy", policy]
    flags += ["--train", str(files["train"]), "--features", str(tmp_path / "features"), "--results", str(results)]
    monkeypatch.setattr(words_heads, "PENALTIES", (0.01,))
    for _ in range(2):  # once with forward passes, once with what was kept of them
        words_heads.main(flags)
    rows = [json.loads(line) for line in results.read_text().splitlines() if '"frozen_' in line]
    assert rows[9]["arm"] == "frozen_states_supervised"
    found = [(row["arm"], row["metrics"]["first_error_accuracy"]) for row in rows]
    assert found[:10] == found[10:]
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text(
        json.dumps({"prompt": "p", "completion": "a", "label": 1.0, "answer": "1", "responses": 1}) + "\n"
    )
    with pytest.raises(ValueError, match="has no step labels"):
        benchmark.read(unlabelled)
