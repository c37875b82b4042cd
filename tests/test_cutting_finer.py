"""Cutting finer never pays under the defaults: with fixed scorers, with trained ones, and in the benchmark."""

import hashlib
import math
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fractal import make
from support.models import sums
from support.stand_ins import save_reward_model, write_jsonl

from benchmarks.evidence import cutting_finer
from benchmarks.evidence.cutting_finer import CUTS, FORMS, in_halves, measure, score_cuts, sums_in_batches
from fractal_rm.credit.advantages import gae
from fractal_rm.credit.shaping import shape_step_scores
from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.results import read_results
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rewards import step_rewards
from fractal_rm.reward_model import StepRewardModel

Steps = list[tuple[str, ...]]
# Words are scored, and steps are rows of words. Other responses of the batch stand beside the one that is cut anew.
words = st.sampled_from("abcdefgh")
responses = st.lists(st.lists(words, min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)
others = st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=3, max_size=3)


def config(**options):
    return StepPPOConfig("unused", use_cpu=True, bf16=False, report_to=[], **options)


DEFAULT = config()
LIMITED = {"default": DEFAULT, **{form: config(**FORMS[form]) for form in ("min_form", "first_mistake", "cap")}}


@st.composite
def recuts(draw) -> tuple[Steps, Steps]:
    """A response, and the same after a few splits, repetitions, fillers or changes of the order."""
    steps = draw(responses)
    changed = list(steps)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(changed) - 1))
        how = draw(st.sampled_from(["split", "filler", "repeat", "reorder"]))
        if how == "split" and len(changed[place]) > 1:
            at = draw(st.integers(1, len(changed[place]) - 1))
            changed[place : place + 1] = [changed[place][:at], changed[place][at:]]
        elif how == "filler":
            changed.insert(place, draw(st.lists(words, min_size=1, max_size=2).map(tuple)))
        elif how == "repeat":
            changed.insert(place, changed[draw(st.integers(0, len(changed) - 1))])
        else:
            changed = draw(st.permutations(changed))
    return steps, changed


def number(*parts) -> float:
    """Some number in [0, 1), always the same for the same parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big") / 2**32


def by_its_end(steps: Steps) -> list[float]:
    """A fixed scorer that looks at a step's last word: a split keeps the score of the end."""
    return [number(step[-1]) for step in steps]


def by_everything_before(steps: Steps) -> list[float]:
    """A fixed scorer that looks at the whole text up to a step's end, and where it was cut."""
    return [number(steps[: i + 1]) for i in range(len(steps))]


def earned(steps: Steps, beside: list[list[float]], args: StepPPOConfig, scorer) -> float:
    return sum(step_rewards([scorer(steps), *beside], args, group_size=4)[0])


# Properties -----------------------------------------------------------------------------------------------------------


@given(recuts(), others)
def test_under_the_defaults_no_cut_raises_what_a_completion_earns_whatever_the_scorer(pair, beside):
    for scorer in (by_its_end, by_everything_before):
        before, after = (earned(steps, beside, DEFAULT, scorer) for steps in pair)
        assert after <= before + 1e-9
        assert before == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("form", LIMITED)
@given(pair=recuts(), beside=others)
def test_a_minimum_and_a_cap_are_not_raised_where_a_step_keeps_its_score(form, pair, beside):
    before, after = (earned(steps, beside, LIMITED[form], by_its_end) for steps in pair)
    assert after <= before + 1e-9


@given(responses)
def test_with_the_min_form_going_on_by_a_new_step_is_never_worth_more(steps):
    # What the tokens of a step are credited with is at most what the next one would be without it.
    scores = torch.tensor([by_its_end(steps)], dtype=torch.float64)
    mask = torch.ones(scores.shape, dtype=torch.bool)
    rewards = shape_step_scores(scores, mask, shaping="min_form")
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    for here, after in pairwise(returns[0].tolist()):
        assert here <= after + 1e-9


# What the other forms pay for, one case each: these are not the default for a reason.
PAID = {
    "batch": (["good", "bad"], ["good", "good", "bad"]),
    "group": (["good", "bad"], ["good", "good", "bad"]),
    "threshold": (["good", "bad"], ["good", "good", "bad"]),
    "raw": (["bad"], ["bad", "bad"]),
    "log_odds": (["good"], ["good", "good"]),
    "mean": (["good", "bad"], ["good", "good", "bad"]),
    "delta": (["good", "bad"], ["bad", "good"]),
}


def test_every_form_has_its_property_or_a_case_in_which_cutting_pays():
    assert set(PAID) | set(LIMITED) == set(FORMS)
    score = {"good": 0.9, "bad": 0.2}
    for form, pair in PAID.items():
        args = config(**FORMS[form])
        before, after = (
            sum(step_rewards([[score[step] for step in steps], [0.3, 0.6]], args, group_size=2)[0]) for steps in pair
        )
        assert after > before + 0.01, form


def test_two_halves_of_a_wrong_line_can_score_better_than_the_line():
    # The likelihood scorer's logit is a weight times the log-likelihood, which halves share, plus a bias.
    def logits(*log_likelihoods: float) -> list[float]:
        return [1 / (1 + math.exp(-(x + 1.0))) for x in log_likelihoods]

    whole, halves = logits(-0.1, -6.0), logits(-0.1, -3.0, -3.0)
    paid = {
        form: sum(step_rewards([halves, [0.9]], args)[0]) - sum(step_rewards([whole, [0.9]], args)[0])
        for form, args in LIMITED.items()
    }
    assert paid["min_form"] > 0.1
    assert paid["default"] == pytest.approx(0.0, abs=1e-9)


# Trained scorers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["likelihood", "token"])
def trained(request, tmp_path_factory) -> StepRewardModel:
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make(folder, sums(64), scorer=request.param, max_steps=20, aggregation="product")
    trainer.train()
    trainer.save_model()
    return StepRewardModel.from_pretrained(folder)


ROWS = sums(24, seed=1)


def score(model: StepRewardModel, prompts: list[str], steps: list[list[str]]) -> list[list[float]]:
    return [one.step_scores for one in model.score(prompts, steps)]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_under_the_defaults_no_cut_raises_what_a_completion_earns_with_a_trained_scorer(trained, data):
    row = data.draw(st.sampled_from(ROWS))
    texts = tuple(tuple(step) for step in row["steps"])  # steps of letters
    changed = list(texts)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(changed) - 1))
        at = data.draw(st.integers(0, len(changed[place])))
        if 0 < at < len(changed[place]):
            changed[place : place + 1] = [changed[place][:at], changed[place][at:]]
        else:
            changed.insert(place, data.draw(st.sampled_from([*map(tuple, cutting_finer.FILLER), *changed])))
    changed = data.draw(st.permutations(changed))
    cuts = [["".join(letters) for letters in steps] for steps in (texts, changed)]
    whole, finer, *beside = score(trained, [row["prompt"]] * 5, [*cuts, *(other["steps"] for other in ROWS[:3])])
    before, after = (sum(step_rewards([scores, *beside], DEFAULT)[0]) for scores in (whole, finer))
    assert after <= before + 1e-9


def test_with_a_trained_scorer_cuts_pay_where_the_batch_is_the_baseline(trained):
    rows, scores = score_cuts(trained, [{"prompt": row["prompt"], "completion": "\n".join(row["steps"])}
                                        for row in ROWS], 1)  # fmt: skip
    assert len(rows) == len(ROWS)
    of_batch = measure(rows, scores, config(center="batch"), 8, 1)
    of_itself = measure(rows, scores, DEFAULT, 8, 1)
    assert max(of_batch[f"{cut}_rising"] for cut in CUTS) > 0
    assert [of_itself[f"{cut}_rising"] for cut in CUTS] == [0.0] * len(CUTS)


# The benchmark --------------------------------------------------------------------------------------------------------


class ByLength:
    """A reward model that likes short steps, and cannot score long responses."""

    segmentation = Segmentation("lines")

    def score(self, prompts, responses):
        return [
            StepScores("", error="too long")
            if len(steps) > 6
            else StepScores("", [Step(text, 0, len(text), 1 / len(text)) for text in steps], 0.5)
            for steps in responses
        ]


def test_cuts_are_what_they_are_named_for():
    steps = ["a bb ccc", "dd", "e f"]
    assert CUTS["halves"](steps) == ["a bb", "ccc", "dd", "e", "f"]
    assert CUTS["repeated"](steps) == ["a bb ccc", "a bb ccc", "dd", "e f"]
    assert CUTS["reversed"](steps) == ["e f", "dd", "a bb ccc"]
    assert [text for text in CUTS["filler"](steps) if text in cutting_finer.FILLER] == list(cutting_finer.FILLER[:2])
    assert CUTS["filler"](steps)[::2] == steps


@given(st.text("ab \t", min_size=1).filter(str.strip))
def test_halves_hold_the_whole_line_and_are_never_blank(line):
    halves = in_halves(line)
    assert "".join(halves).replace(" ", "").replace("\t", "") == line.replace(" ", "").replace("\t", "")
    assert all(half.strip() for half in halves)


def test_sums_are_of_the_response_that_was_cut_beside_the_others_as_they_were():
    scores, halves = [[0.5], [1.0], [0.2], [0.8]], [[0.5, 0.5], [1.0, 1.0], [0.2], [0.8, 0.0]]
    found = list(chain.from_iterable(sums_in_batches(scores, halves, config(center="batch"), 2, 1)))
    before = [0.5 - 0.75, 1.0 - 0.75, 0.2 - 0.5, 0.8 - 0.5]
    after = [1.0 - 2 * 2 / 3, 2.0 - 2 * 2.5 / 3, 0.2 - 0.5, 0.8 - 2 / 3]
    assert found == pytest.approx(list(chain.from_iterable(zip(before, after, strict=True))))


def test_a_row_says_how_many_responses_earn_more_and_how_much():
    rows = [
        {"prompt": "p", "completion": "aa bb\ncc dd", "label": 0},
        {"prompt": "p", "completion": [{"role": "assistant", "content": "a\nb"}], "label": 1},
        {"prompt": "q", "completion": "long\n" * 7, "label": 1},
        {"prompt": "q", "completion": "a", "label": 1},
    ]
    kept, scores = score_cuts(ByLength(), rows, 2)
    assert [row["prompt"] for row in kept] == ["p", "p"], "a group that cannot be scored whole is left out"
    found = measure(kept, scores, config(shaping="raw"), 2, 2)
    assert (found["halves_rising"], found["repeated_rising"], found["reversed_rising"]) == (0.5, 1.0, 0.0)
    assert found["halves_change_wrong"] == pytest.approx(4 / 2 - 2 / 5)
    assert found["halves_change"] == pytest.approx((4 / 2 - 2 / 5) / 2)
    assert found["repeated_change"] == pytest.approx((1 / 5 + 1) / 2)


def test_the_benchmark_appends_a_row_for_each_form(tmp_path, capsys):
    model = save_reward_model(tmp_path / "rm", log_weight=-3.0, bias=2.0)
    rows = [
        {"prompt": f"{i // 2}?\n", "completion": f"{i} + 1 = {i + 1}.\nSo {i + 1} apples.", "label": i % 2}
        for i in range(8)
    ]
    write_jsonl(tmp_path / "samples.jsonl.gz", [*rows, {"prompt": "alone?\n", "completion": "1 + 1 = 2."}])
    flags = ["--reward_model", model, "--samples", str(tmp_path / "samples.jsonl.gz"), "--dataset", "invented"]
    more = ["--results", str(tmp_path / "rows.jsonl"), "--group_size", "2", "--batch_size", "4", "--limit", "6"]
    cutting_finer.main([*flags, *more])
    found = {row["arm"]: row for row in read_results(tmp_path / "rows.jsonl")}
    assert set(found) == set(FORMS)
    for row in found.values():
        assert (row["metrics"]["responses"], row["metrics"]["left_out"], row["dataset"]) == (6, 0, "invented")
    assert [found["default"]["metrics"][f"{cut}_rising"] for cut in CUTS] == [0.0] * len(CUTS)
    assert found["raw"]["metrics"]["repeated_rising"] == 1.0
    with pytest.raises(ValueError, match="No prompt has 4 responses"):
        cutting_finer.main([*flags, *more, "--group_size", "4"])
    with pytest.raises(SystemExit):
        cutting_finer.main([*flags, *more, "--batch_size", "5"])
    assert "A batch of 5 is not whole groups of 2" in capsys.readouterr().err
