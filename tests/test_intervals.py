"""Metrics as statistics of weights: against scikit-learn on repeated items, and against the plain bootstrap."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, mean_absolute_error, roc_auc_score
from support.stand_ins import solutions

from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.intervals import (
    Measurement,
    as_columns,
    differences,
    estimates,
    interval_of_share,
    paired_difference,
)
from fractal_rm.evaluation.responses import evaluate_scores, measure_responses
from fractal_rm.evaluation.statistics import (
    absolute_error_of,
    as_points,
    auc_of,
    aurc_of,
    bag_aucs,
    brier_of,
    ece_of,
    expected_calibration_error,
    first_error_statistics,
    harmonic_mean_of,
    mean_of,
    ratio_of,
    reliability_curve,
    risk_coverage_curve,
    same_position_auc_of,
)

coarse = st.integers(0, 8).map(lambda n: n / 8)  # ties are common
label = st.sampled_from([0.0, 1.0, math.nan])
item = st.lists(st.tuples(coarse, label), min_size=1, max_size=4)
counted = st.lists(st.tuples(item, st.integers(0, 3)), min_size=1, max_size=6)


def repeated(rows):
    """Scores and labels of items written out as often as they count."""
    return [pair for row, weight in rows for _ in range(weight) for pair in row if not math.isnan(pair[1])]


@given(counted)
def test_a_weighted_auc_is_scikit_learns_auc_of_repeated_items(rows):
    scores, labels = ([[pair[i] for pair in row] for row, _ in rows] for i in (0, 1))
    found = auc_of(scores, labels)(np.array([[weight for _, weight in rows]], dtype=float))[0]
    pairs = repeated(rows)
    kinds = {gold for _, gold in pairs}
    expected = roc_auc_score([gold for _, gold in pairs], [s for s, _ in pairs]) if len(kinds) == 2 else math.nan
    assert found == pytest.approx(expected, nan_ok=True)


@given(counted)
def test_the_value_of_an_auc_has_scikit_learns_digits(rows):
    scores, labels = ([pair[i] for row, _ in rows for pair in row] for i in (0, 1))
    known = [(gold, value) for value, gold in zip(scores, labels, strict=True) if not math.isnan(gold)]
    if len({gold for gold, _ in known}) == 2:
        assert auc_of(scores, labels).value == roc_auc_score(*zip(*known, strict=True))


@given(counted)
def test_weights_count_items_in_every_statistic_of_steps(rows):
    def made(items):
        scores, labels = ([[pair[i] for pair in row] for row in items] for i in (0, 1))
        errors = first_error_statistics(scores, labels, 0.5)
        makers = (auc_of, same_position_auc_of, absolute_error_of, brier_of, ece_of)
        return [make(scores, labels) for make in makers] + [mean_of(bag_aucs(scores, labels)), *errors.values()]

    weights = np.array([[weight for _, weight in rows]], dtype=float)
    found = [statistic(weights)[0] for statistic in made([row for row, _ in rows])]
    again = [row for row, weight in rows for _ in range(weight)]
    expected = [statistic.value for statistic in made(again)] if again else [math.nan] * len(found)
    assert found == pytest.approx(expected, nan_ok=True)


@given(counted)
def test_weights_count_items_in_every_statistic(rows):
    weights = np.array([[weight for _, weight in rows]], dtype=float)
    firsts, again = [row[0] for row, _ in rows], [row[0] for row, weight in rows for _ in range(weight)]
    probs, labels = (np.array([pair[i] for pair in firsts]) for i in (0, 1))
    more_probs, more_labels = (np.array([pair[i] for pair in again]) for i in (0, 1))
    for make in (brier_of, ece_of, aurc_of):
        expected = make(more_probs, more_labels)(np.ones((1, len(again))))[0] if again else math.nan
        assert make(probs, labels)(weights)[0] == pytest.approx(expected, nan_ok=True)
    if again:
        expected = np.nanmean(more_labels) if not np.isnan(more_labels).all() else math.nan
        assert mean_of(labels)(weights)[0] == pytest.approx(expected, nan_ok=True)


def test_a_ratio_is_a_mean_over_what_items_consist_of():
    assert ratio_of([3.0, 1.0], [4, 4])(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])) == pytest.approx(
        [0.75, 0.5, math.nan], nan_ok=True
    )


def test_intervals_and_differences_equal_those_of_the_plain_bootstrap():
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)
    drawn = np.random.default_rng(5).integers(40, size=(120, 40))

    def plain(values):
        return [values.mean(), *np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])]

    one, other = (Measurement(40, {"mean": mean_of(values)}) for values in (a, b))
    assert differences(one, other, draws=120, seed=5)["mean"] == pytest.approx(plain(a - b))
    assert estimates(one, draws=120, seed=5)["mean"] == pytest.approx(plain(a))
    assert paired_difference(a, b, draws=120) == pytest.approx(differences(one, other, draws=120)["mean"])


def test_pairing_makes_the_interval_of_a_difference_narrow():
    hard = np.random.default_rng(0).random(200)
    one, other = (Measurement(200, {"m": mean_of(hard + gain)}) for gain in (0.1, 0.0))
    gain, alone = differences(one, other)["m"], estimates(one)["m"]
    assert gain.low == pytest.approx(0.1)
    assert gain.high == pytest.approx(0.1)
    assert alone.high - alone.low > 0.05


def test_a_metric_that_is_undefined_has_no_interval():
    found = estimates(Measurement(2, {"auc": auc_of([[0.5], [0.7]], [[1], [1]])}))["auc"]
    assert all(math.isnan(value) for value in found)


def test_two_models_on_different_data_are_refused():
    with pytest.raises(ValueError, match=r"2 items against 3\. Measure both models on the same data\."):
        differences(Measurement(2, {}), Measurement(3, {}))


def test_the_harmonic_mean_of_nothing_found_is_zero():
    assert harmonic_mean_of(mean_of([0.0]), mean_of([0.0]))(np.ones((1, 1))) == [0.0]


# Calibration


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30))
def test_brier_score_and_reliability_curve_are_those_of_scikit_learn(pairs):
    probs, labels = (np.array(column) for column in zip(*pairs, strict=True))
    expected = brier_score_loss(labels, probs)
    assert brier_of(probs, labels)(np.ones((1, len(pairs))))[0] == pytest.approx(expected, abs=1e-9)
    curve = reliability_curve(probs, labels, bins=5)
    assert sum(point.count for point in curve) == len(pairs)
    # Scikit-learn's bins hold their upper edge, ours their lower one, as those of our calibration error do.
    if not (np.isclose(probs * 5 % 1, 0) | np.isclose(probs * 5 % 1, 1)).any():
        share, mean = calibration_curve(labels, probs, n_bins=5)
        assert [point.share_good for point in curve] == pytest.approx(share)
        assert [point.mean_probability for point in curve] == pytest.approx(mean)
    found = ece_of(probs, labels)(np.ones((1, len(pairs))))[0]
    assert found == pytest.approx(expected_calibration_error(probs, labels))


@given(st.lists(st.tuples(coarse, st.sampled_from([0.0, 1.0])), min_size=1, max_size=12))
def test_risk_at_a_coverage_is_the_error_rate_of_the_surest(pairs):
    probs, labels = (np.array(column) for column in zip(*pairs, strict=True))
    curve = risk_coverage_curve(probs, labels)
    for point in curve:
        size = round(point.coverage * len(pairs))
        surest = np.sort(np.abs(probs - 0.5))[::-1][size - 1]
        called = np.abs(probs - 0.5) >= surest
        assert called.sum() == size
        assert point.risk == pytest.approx(np.mean((probs >= 0.5)[called] != (labels == 1)[called]))
    widths = np.diff([0.0, *[point.coverage for point in curve]])
    area = sum(width * point.risk for width, point in zip(widths, curve, strict=True))
    assert aurc_of(probs, labels)(np.ones((1, len(pairs))))[0] == pytest.approx(area)
    assert curve[-1].coverage == 1.0


def test_a_curve_is_thinned_with_both_ends_kept():
    curve = risk_coverage_curve(np.linspace(0.5, 1, 500), np.ones(500))
    points = as_points(curve, most=11)
    assert len(points) == 11
    assert (points[0]["coverage"], points[-1]["coverage"]) == (curve[0].coverage, 1.0)
    assert as_points([]) == []


# Labelled responses


def labelled(count: int):
    """Bags whose every step is labelled."""
    rows = [row | {"step_labels": [1, row["label"], 1]} for row in solutions(count)]
    return read_bags(rows, Segmentation())


def scored_at_random(count: int, *, seed: int = 0, cut: bool = True):
    """Bags and random scores; some responses are cut, one has no score."""
    bags = labelled(count)
    rng = np.random.default_rng(seed)
    scored = []
    for i, bag in enumerate(bags):
        kept = len(bag.steps) - (1 if cut and i % 4 == 1 else 0)
        values = [] if cut and i == 2 else rng.random(kept).round(1).tolist()
        steps = [Step("", *span, value) for span, value in zip(bag.step_spans, values, strict=False)]
        score = float(np.prod(values)) if values else math.nan
        scored.append(StepScores(bag.response, steps, score, len(bag.steps) - len(values), None if values else "long"))
    return scored, bags


def graded(bag):
    """The same bag with grades 0 to 3 in place of labels 0 and 1."""
    return replace(bag, label=3 * bag.label, step_labels=tuple(3 * label for label in bag.step_labels), num_grades=4)


@pytest.mark.parametrize("grades", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_the_values_of_labelled_responses_are_those_of_scikit_learn(cut, grades):
    scored, bags = scored_at_random(30, cut=cut)
    had = [(result.score, bag.label) for result, bag in zip(scored, bags, strict=True) if result.steps]
    probs, labels = zip(*had, strict=True)
    steps = [
        pair
        for result, bag in zip(scored, bags, strict=True)
        for pair in zip(result.step_scores, bag.step_labels, strict=False)
    ]
    scores, gold = zip(*steps, strict=True)
    expected = {
        "responses": 30,
        "unscored": int(cut),
        "truncated": sum(result.truncated_steps > 0 for result in scored),
        "threshold": 0.4,
        "bag_auc": roc_auc_score(labels, probs),
        "bag_accuracy": accuracy_score(labels, np.array(probs) >= 0.5),
        "step_auc": roc_auc_score(gold, scores),
        "bag_brier": brier_score_loss(labels, probs),
        "step_brier": brier_score_loss(gold, scores),
    }
    if grades:  # of 0 to 3, in which the errors are
        bags = [graded(bag) for bag in bags]
        expected["bag_mae"] = 3 * mean_absolute_error(labels, probs)
        expected["step_mae"] = 3 * mean_absolute_error(gold, scores)
    found = measure_responses(scored, bags, 0.4).values
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    first_errors = ["first_error_accuracy", "all_correct_accuracy", "f1"]
    assert found.keys() - expected.keys() == {"bag_ece", "bag_aurc", "step_ece", "within_bag_auc", *first_errors}
    without = {"bag_brier", "bag_aurc", "step_brier", "step_ece", "within_prompt_auc"}
    assert evaluate_scores(scored, bags, 0.4) == {name: found[name] for name in found if name not in without}


def test_intervals_hold_their_value_and_a_twin_differs_by_nothing():
    scored, bags = scored_at_random(30)
    measured = measure_responses(scored, bags, 0.4)
    for estimate in estimates(measured, draws=100).values():
        assert estimate.low <= estimate.value <= estimate.high
    assert {tuple(gain) for gain in differences(measured, measured, draws=20).values()} == {(0.0, 0.0, 0.0)}


def test_a_scripted_oracle_is_perfect_and_a_constant_has_its_known_values():
    bags = labelled(30)

    def judged(good, bad):
        scored = []
        for bag in bags:
            values = [bad if gold == 0 else good for gold in bag.step_labels]
            steps = [Step("", *span, value) for span, value in zip(bag.step_spans, values, strict=True)]
            scored.append(StepScores(bag.response, steps, min(values)))
        return as_columns(estimates(measure_responses(scored, bags, 0.5), draws=10))

    oracle = judged(1.0, 0.0)
    for name in ("bag_auc", "bag_accuracy", "step_auc", "within_bag_auc", "f1"):
        assert (oracle[name], oracle[f"{name}_low"], oracle[f"{name}_high"]) == (1.0, 1.0, 1.0)
    assert (oracle["bag_brier"], oracle["bag_ece"], oracle["bag_aurc"], oracle["step_brier"]) == (0, 0, 0, 0)
    constant = judged(0.8, 0.8)
    share = np.mean([bag.label for bag in bags])
    for name in ("bag_auc", "step_auc", "within_bag_auc"):
        assert constant[name] == 0.5
    assert constant["bag_ece"] == pytest.approx(abs(0.8 - share))
    assert constant["bag_brier"] == pytest.approx(share * 0.04 + (1 - share) * 0.64)
    assert constant["bag_aurc"] == pytest.approx(1 - share)


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_interval_of_a_share_is_the_one_of_scipy(count, share):
    good = round(share * count)
    expected = stats.binomtest(good, count).proportion_ci(method="wilson")
    assert interval_of_share(good / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
