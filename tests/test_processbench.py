"""ProcessBench: a scripted oracle, known values, every threshold against a plain loop, and both formats of its rows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.intervals import estimates
from fractal_rm.evaluation.processbench import (
    SUBSETS,
    Cases,
    Hits,
    best_threshold,
    measure_processbench,
    missing_cases,
    read_cases,
)
from fractal_rm.evaluation.responses import evaluate_scores
from fractal_rm.evaluation.statistics import hit_range

coarse = st.integers(0, 6).map(lambda n: n / 6)


def official(subset: str, number: int, first: int, steps: int = 3) -> dict:
    """A row as the Hub has it."""
    return {
        "id": f"{subset}-{number}",
        "generator": "a model",
        "problem": f"Problem {number} of {subset}?",
        "steps": [f"Step {i}." for i in range(steps)],
        "final_answer_correct": first < 0,
        "label": first,
    }


def some_cases() -> Cases:
    """Two cases with a wrong step and one without in each subset."""
    rows = [official(subset, number, first) for subset in SUBSETS for number, first in enumerate((-1, 0, 2))]
    return read_cases(rows)


def scores(cases: Cases, rule) -> list[StepScores]:
    """Scores by a rule on bags; it may give fewer than there are steps."""
    found = []
    for bag in cases.bags:
        values = rule(bag)
        steps = [Step("", *span, value) for span, value in zip(bag.step_spans, values, strict=False)]
        missing = len(bag.step_spans) - len(steps)
        found.append(StepScores(bag.response, steps, min(values, default=math.nan), missing))
    return found


def values_of(scored, cases, threshold=0.5, **options) -> dict[str, float]:
    measured = measure_processbench(scored, cases, threshold, **options)
    return {**measured.counts, **{name: found.value for name, found in estimates(measured, draws=2).items()}}


def test_a_scripted_oracle_gets_one_everywhere():
    cases = some_cases()
    found = values_of(scores(cases, lambda bag: [0.0 if gold == 0 else 1.0 for gold in bag.step_labels]), cases)
    figures = [
        f"{name}{end}"
        for name in ("f1", "first_error_accuracy", "all_correct_accuracy")
        for end in ("", *[f"_{s}" for s in SUBSETS])
    ]
    assert {found[name] for name in figures} | {found[f"tuned_{name}"] for name in figures} == {1.0}
    assert found["best_f1"] == found["bag_auc"] == found["step_auc"] == 1.0


@pytest.mark.parametrize(("score", "first", "right"), [(0.9, 0.0, 1.0), (0.1, 0.5, 0.0)])
def test_a_constant_gets_its_known_value(score, first, right):
    cases = some_cases()
    found = values_of(scores(cases, lambda bag: [score] * 3), cases)
    # Below the threshold, the first step is called wrong: so it is in one of two cases with a wrong step.
    assert (found["first_error_accuracy"], found["all_correct_accuracy"], found["f1"]) == (first, right, 0.0)
    assert found["best_f1"] == 0.0


def test_a_case_by_hand():
    cases = read_cases(
        [official("gsm8k", 0, 1), official("gsm8k", 1, -1), official("math", 0, 0), official("math", 1, -1)]
    )
    values = iter([[0.9, 0.2, 0.1], [0.9, 0.9, 0.4], [0.3, 0.9, 0.9], [0.9, 0.8, 0.7]])
    found = values_of(scores(cases, lambda bag: next(values)), cases, 0.5)
    assert (found["f1_gsm8k"], found["first_error_accuracy_gsm8k"], found["all_correct_accuracy_gsm8k"]) == (0, 1, 0)
    assert (found["f1_math"], found["f1"]) == (1.0, 0.5)
    # With 0.2 < threshold <= 0.4 both cases of gsm8k are hits; with 0.3 < threshold both of math are, too.
    assert 0.2 < found["tuned_threshold"] < 0.4, "not on the edge, where rounding decides"
    assert found["tuned_f1_gsm8k"] == found["best_f1"] == 1.0
    assert 0.3 < found["best_threshold"] < 0.4


def test_the_rule_agrees_with_the_metric_of_one_set():
    rng = np.random.default_rng(0)
    cases = read_cases([official("math", i, int(rng.integers(-1, 4)), steps=4) for i in range(60)])
    scored = scores(cases, lambda bag: rng.random(4).round(1).tolist())
    for threshold in (0.05, 0.3, 0.5, 0.9):
        found, expected = values_of(scored, cases, threshold), evaluate_scores(scored, cases.bags, threshold)
        for name in ("f1", "first_error_accuracy", "all_correct_accuracy", "step_auc", "within_bag_auc"):
            assert found[name] == pytest.approx(expected[name])


@given(st.lists(st.tuples(st.lists(coarse, min_size=1, max_size=4), st.integers(-1, 3)), min_size=1, max_size=8))
def test_every_point_of_the_curve_is_what_a_plain_loop_finds(rows):
    rows = [(values, min(first, len(values) - 1)) for values, first in rows]
    cases = read_cases([official("gsm8k", i, first, len(values)) for i, (values, first) in enumerate(rows)])
    given_scores = iter([values for values, _ in rows])
    hits = Hits(scores(cases, lambda bag: next(given_scores)), cases)

    def loop(threshold):
        kinds: dict[bool, list[bool]] = {True: [], False: []}
        for values, first in rows:
            called = next((i for i, value in enumerate(values) if value < threshold), -1)
            kinds[first >= 0].append(called == first)
        return [np.mean(kinds[kind]) if kinds[kind] else math.nan for kind in (True, False)]

    curve = hits.curve(["gsm8k"])
    for point in curve:
        assert [point.first_error_accuracy, point.all_correct_accuracy] == pytest.approx(
            loop(point.threshold), nan_ok=True
        )
    for before, point in itertools.pairwise(curve):  # what stands between two points is what the upper one says
        between = (before.threshold + min(point.threshold, before.threshold + 1)) / 2
        assert loop(between) == pytest.approx([point.first_error_accuracy, point.all_correct_accuracy], nan_ok=True)
    best = best_threshold(curve)
    if not math.isnan(best.f1):
        first, right = loop(best.threshold)
        assert best.f1 == pytest.approx(2 * first * right / (first + right) if first + right else 0.0)
        assert best.f1 == max(point.f1 for point in curve)


def test_what_was_not_scored_is_never_a_hit():
    assert hit_range([0.9], 1) == hit_range([], None) == (math.inf, -math.inf)
    cases = some_cases()
    found = values_of(scores(cases, lambda bag: []), cases)
    assert (found["f1"], found["unscored"], found["truncated"], found["best_f1"]) == (0.0, 12, 12, 0.0)


def test_a_part_of_the_cases_is_said_to_be_a_part():
    cases = read_cases([official("gsm8k", 0, 1), official("gsm8k", 1, -1)])
    said = missing_cases(cases)
    assert said == (
        "This is not all of ProcessBench: gsm8k 2 of 400, math 0 of 1000, olympiadbench 0 of 1000, omnimath 0 of 1000. "
        "Averages are over the subsets present."
    )
    found = values_of(scores(cases, lambda bag: [0.9, 0.1, 0.5]), cases)
    assert found["responses_gsm8k"] == 2
    assert "f1_math" not in found


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (official("aime", 0, 1), "data, row 1: unknown subset 'aime'; use gsm8k, math, olympiadbench, omnimath."),
        (
            {"id": "gsm8k-0", "prompt": "1?", "steps": ["a", "b"], "step_labels": [None, 0], "label": 0},
            "data, row 1: a step before the first wrong one has no label; label it.",
        ),
    ],
)
def test_a_row_that_is_no_case_is_named(row, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        read_cases([row])
    assert str(caught.value) == sentence


def test_judging_on_nothing_is_refused():
    with pytest.raises(ValueError, match="There are no cases of ProcessBench"):
        measure_processbench([], Cases([], []), 0.5)


def test_the_local_file_holds_all_official_cases(data_dir):
    cases = read_cases(read_jsonl(data_dir / "processbench" / "test.jsonl.gz"))
    assert len(cases.bags) == 3400
    assert missing_cases(cases) is None
    answers = {bag.id: 1.0 for bag in cases.bags}
    found = values_of(scores(cases, lambda bag: [answers[bag.id]] * len(bag.steps)), cases)
    assert (found["f1"], found["all_correct_accuracy"]) == (0.0, 1.0)
    oracle = scores(cases, lambda bag: [0.0 if gold == 0 else 1.0 for gold in bag.step_labels])
    assert values_of(oracle, cases)["f1"] == 1.0
