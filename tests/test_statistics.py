"""Values of metrics against counting pairs, plain loops, trying every threshold, and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score, roc_curve

from fractal_rm.data.bag import Bag, Step, StepScores
from fractal_rm.evaluation import responses as responses_module
from fractal_rm.evaluation.intervals import Estimate, paired_difference
from fractal_rm.evaluation.statistics import (
    absolute_error_of,
    bag_aucs,
    bag_metrics,
    expected_calibration_error,
    first_error_statistics,
    same_position_auc,
    step_auc,
    values_of,
    within_bag_auc,
)

NAN = float("nan")
score = st.integers(0, 8).map(lambda n: n / 8)  # coarse, so that ties are common
label = st.sampled_from([0.0, 1.0, 0.3, 0.7, NAN])
steps = st.lists(st.tuples(score, label), max_size=5)
bags = st.lists(steps, max_size=5)


def first_error_accuracy(scores, labels, threshold):
    return values_of(first_error_statistics(scores, labels, threshold))


def choose_threshold(scores, labels, aggregation="min"):
    """The threshold chosen on responses with these step scores and labels."""
    responses = [StepScores("", [Step("", 0, 0, value) for value in row], 0.0) for row in scores]
    bags = [Bag("", "x", ((0, 1),), label=None if math.isnan(label) else float(label)) for label in labels]
    return responses_module.choose_threshold(responses, bags, aggregation=aggregation)


def unzip(rows):
    return [[s for s, _ in row] for row in rows], [[y for _, y in row] for row in rows]


def pair_auc(pairs):
    """Share of (good, bad) pairs in the right order, ties counted half."""
    good = [s for s, y in pairs if y >= 0.5]
    bad = [s for s, y in pairs if y < 0.5]
    if not good or not bad:
        return NAN
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


@given(bags)
def test_step_auc_counts_pairs_over_all_steps(rows):
    expected = pair_auc([pair for row in rows for pair in row])
    assert step_auc(*unzip(rows)) == pytest.approx(expected, nan_ok=True)


@given(bags)
def test_within_bag_auc_is_the_mean_of_the_bags_that_hold_both_kinds(rows):
    defined = [auc for auc in map(pair_auc, rows) if not math.isnan(auc)]
    expected = sum(defined) / len(defined) if defined else NAN
    assert within_bag_auc(*unzip(rows)) == pytest.approx(expected, nan_ok=True)


@given(bags, st.floats(-5, 5))
def test_shifting_one_bag_leaves_the_auc_within_bags_alone(rows, shift):
    scores, labels = unzip(rows)
    shifted = [[s + shift * (i == 0) for s in row] for i, row in enumerate(scores)]
    assert within_bag_auc(shifted, labels) == pytest.approx(within_bag_auc(scores, labels), nan_ok=True)


def test_difficulty_of_prompts_lifts_the_step_auc_but_not_the_one_within_bags():
    scores, labels = [[0.9, 0.8, 0.9], [0.1, 0.2, 0.1]], [[1, 1, 0], [0, 0, 1]]
    assert step_auc(scores, labels) > 0.5
    assert within_bag_auc(scores, labels) < 0.5


def first_error_loop(rows, threshold):
    erroneous, correct = [], []
    for row in rows:
        gold: int | str | None = None
        for i, (_, y) in enumerate(row):
            if math.isnan(y):
                gold = "unknown"
                break
            if y < 0.5:
                gold = i
                break
        if gold == "unknown" or not row:
            continue
        found = next((i for i, (s, _) in enumerate(row) if s < threshold), None)
        (correct if gold is None else erroneous).append(found == gold)
    return erroneous, correct


@given(bags, score)
def test_first_error_accuracy_is_that_of_a_plain_loop(rows, threshold):
    erroneous, correct = first_error_loop(rows, threshold)
    result = first_error_accuracy(*unzip(rows), threshold)
    first = sum(erroneous) / len(erroneous) if erroneous else NAN
    second = sum(correct) / len(correct) if correct else NAN
    f1 = 0.0 if first + second == 0 else 2 / (1 / first + 1 / second) if first and second else first * second
    assert result["first_error_accuracy"] == pytest.approx(first, nan_ok=True)
    assert result["all_correct_accuracy"] == pytest.approx(second, nan_ok=True)
    assert result["f1"] == pytest.approx(f1, nan_ok=True)


def test_the_right_bag_at_the_wrong_step_is_no_hit():
    result = first_error_accuracy([[0.9, 0.1], [0.9, 0.9]], [[0, 1], [1, 1]], 0.5)
    assert result == {"first_error_accuracy": 0.0, "all_correct_accuracy": 1.0, "f1": 0.0}


def test_labels_after_the_first_error_may_be_unknown_and_before_it_may_not():
    scores = [[0.9, 0.1, 0.1], [0.9, 0.1, 0.1], [0.9, 0.9, 0.9]]
    labels = [[1, 0, NAN], [NAN, 0, 0], [1, NAN, 1]]
    result = first_error_accuracy(scores, labels, 0.5)
    assert result["first_error_accuracy"] == 1.0
    assert math.isnan(result["all_correct_accuracy"])


@pytest.mark.parametrize(("rule", "passes"), [("min", all), ("max", any)])
@given(rows=st.lists(st.tuples(st.lists(score, max_size=4), st.sampled_from([0.0, 1.0, 0.4, NAN])), max_size=8))
def test_no_threshold_tells_bags_apart_better_than_the_chosen_one(rule, passes, rows):
    threshold = choose_threshold([s for s, _ in rows], [y for _, y in rows], aggregation=rule)
    known = [(s, y >= 0.5) for s, y in rows if s and not math.isnan(y)]

    def hits(cut):
        return sum(passes(step >= cut for step in steps) == good for steps, good in known)

    if not known:
        assert math.isnan(threshold)
    else:
        assert hits(threshold) == max(hits(cut) for cut in [-1.0, *(n / 16 for n in range(18))])


@given(st.lists(st.tuples(score, st.booleans()), min_size=2, max_size=12))
def test_the_chosen_threshold_is_as_accurate_as_the_best_of_the_roc_curve(rows):
    scores, good = np.array([s for s, _ in rows]), np.array([y for _, y in rows])
    if good.all() or not good.any():
        return
    cuts = roc_curve(good, scores, drop_intermediate=False)[2]
    threshold = choose_threshold([[s] for s in scores], good)
    best = max(accuracy_score(good, scores >= cut) for cut in cuts)
    assert accuracy_score(good, scores >= threshold) == pytest.approx(best)


def test_a_threshold_that_separates_lies_in_the_middle_of_the_gap():
    assert choose_threshold([[0.9, 0.8], [0.9, 0.2], [0.9, 0.1]], [1, 0, 0]) == pytest.approx(0.5)
    assert choose_threshold([[2.0], [-4.0]], [1, 0]) == -1.0  # logits serve as well


def test_where_one_good_step_is_enough_the_highest_score_of_a_bag_decides():
    scores, labels = [[0.1, 0.9], [0.2, 0.3], [0.1, 0.4]], [1, 0, 0]
    assert choose_threshold(scores, labels, aggregation="max") == pytest.approx((0.4 + 0.9) / 2)
    assert choose_threshold(scores, labels) == choose_threshold(scores, labels, aggregation="min")
    assert choose_threshold(scores, labels) == math.nextafter(0.2, 1.0)  # no lowest score tells them apart


def test_of_equally_accurate_thresholds_the_one_nearest_to_a_half_is_taken():
    assert choose_threshold([[0.1], [0.3], [0.6]], [1, 0, 1]) == pytest.approx(0.45)  # 0.1 is as accurate


def test_neighbouring_floats_are_told_apart():
    low = 0.3
    high = math.nextafter(low, 1.0)
    assert choose_threshold([[low], [high]], [0, 1]) == high


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.3])), max_size=20), st.integers(1, 12))
def test_calibration_error_is_that_of_a_plain_loop_over_bins(pairs, bins):
    expected = 0.0
    for b in range(bins):
        inside = [(p, y) for p, y in pairs if min(int(p * bins), bins - 1) == b]
        if inside:
            gap = sum(p for p, _ in inside) / len(inside) - sum(y for _, y in inside) / len(inside)
            expected += len(inside) / len(pairs) * abs(gap)
    result = expected_calibration_error([p for p, _ in pairs], [y for _, y in pairs], bins)
    assert result == pytest.approx(expected if pairs else NAN, nan_ok=True)


def test_labels_drawn_with_the_predicted_probability_are_calibrated_and_overconfidence_is_not():
    rng = np.random.default_rng(0)
    probs = rng.random(20_000)
    labels = rng.random(20_000) < probs
    assert expected_calibration_error(probs, labels) < 0.02
    assert expected_calibration_error((probs >= 0.5).astype(float), labels) == pytest.approx(0.25, abs=0.02)


@given(st.lists(st.tuples(score, st.booleans()), min_size=1, max_size=20))
def test_bag_metrics_are_those_of_scikit_learn(pairs):
    probs, labels = np.array([p for p, _ in pairs]), np.array([y for _, y in pairs])
    result = bag_metrics(probs, labels.astype(float))
    assert result["bag_accuracy"] == pytest.approx(accuracy_score(labels, probs >= 0.5))
    assert result["bag_ece"] == expected_calibration_error(probs, labels)
    auc = roc_auc_score(labels, probs) if len(set(labels.tolist())) == 2 else NAN
    assert result["bag_auc"] == pytest.approx(auc, nan_ok=True)


@given(st.lists(st.tuples(score, label), max_size=8))
def test_bags_without_a_label_do_not_count(pairs):
    known = [(p, y) for p, y in pairs if not math.isnan(y)]
    every, some = ([[p for p, _ in rows], [y for _, y in rows]] for rows in (pairs, known))
    assert bag_metrics(*every) == pytest.approx(bag_metrics(*some), nan_ok=True)


def test_the_absolute_error_is_that_of_known_labels():
    assert absolute_error_of([0.5, 3.0, 9.0], [1, 3, NAN]).value == 0.25
    assert math.isnan(absolute_error_of([0.5], [NAN]).value)


def test_without_bags_every_metric_is_undefined():
    results = [metric([], []) for metric in (step_auc, within_bag_auc, same_position_auc, choose_threshold)]
    results += [expected_calibration_error([], []), absolute_error_of([], []).value]
    results += [*first_error_accuracy([], [], 0.5).values(), *bag_metrics([], []).values()]
    results += paired_difference([], [])
    assert all(math.isnan(result) for result in results)


def test_arrays_and_lists_give_the_same():
    scores, labels = [[0.9, 0.2], [0.4]], [[1, 0], [1]]
    arrays = [[np.array(row, dtype=np.float32) for row in rows] for rows in (scores, labels)]
    assert step_auc(*arrays) == step_auc(scores, labels)
    assert first_error_accuracy(*arrays, threshold=0.3) == first_error_accuracy(scores, labels, threshold=0.3)


def test_a_system_against_itself_differs_by_nothing():
    values = np.random.default_rng(0).random(30)
    assert paired_difference(values, values) == Estimate(0.0, 0.0, 0.0)


def test_a_constant_gain_has_an_interval_without_width_however_noisy_the_items():
    values = np.random.default_rng(0).random(30) * 100
    assert paired_difference(values + 1.5, values) == pytest.approx((1.5, 1.5, 1.5))


def test_swapping_the_systems_turns_the_interval_round():
    a, b = np.random.default_rng(1).random((2, 40))
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert (-back.high, -back.low) == pytest.approx((forth.low, forth.high))
    assert forth.low <= forth.value <= forth.high
    assert forth == paired_difference(a, b)
    assert forth != paired_difference(a, b, draws=1999)


def test_the_interval_of_a_small_sample_is_that_of_every_draw_there_is():
    a, b = [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]
    draws = [np.mean([a[i] - b[i] for i in drawn]) for drawn in itertools.product(range(3), repeat=3)]
    result = paired_difference(a, b, draws=3000)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975], method="inverted_cdf")))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        b = rng.random(40)
        result = paired_difference(b + rng.normal(0.2, 1.0, 40), b, draws=200)
        covered += result.low <= 0.2 <= result.high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: step_auc([[0.1]], [[1, 0]]), "Bag 0 has 1 scores and 2 labels"),
        (lambda: step_auc([[0.1]], []), "1 bags have scores and 0 have labels"),
        (lambda: within_bag_auc([[0.1], [NAN]], [[1], [0]]), "Bag 1 has a NaN or infinite score"),
        (lambda: same_position_auc([[0.1]], [[1, 0]]), "Bag 0 has 1 scores and 2 labels"),
        (lambda: choose_threshold([[0.1], [math.inf]], [1, 0]), "A step has a NaN or infinite score"),
        (lambda: first_error_accuracy([[0.1]], [], 0.5), "1 bags have scores and 0 have labels"),
        (lambda: bag_metrics([0.2, 1.5], [1, 0]), "Bag 1 has probability 1.5"),
        (lambda: expected_calibration_error([NAN], [1]), "Bag 0 has a NaN or infinite score"),
        (lambda: bag_metrics([0.2], [1, 0]), "1 bags have scores and 2 have labels"),
        (lambda: absolute_error_of([0.1], [1, 0]).value, "1 bags have scores and 2 have labels"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 items against 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# Steps at the same place --------------------------------------------------------------------------------------------


@given(bags)
def test_same_position_auc_counts_every_pair_of_steps_at_one_place(rows):
    credit = [
        (good > bad) + (good == bad) / 2
        for one in rows
        for other in rows
        for (good, y), (bad, z) in zip(one, other, strict=False)
        if y >= 0.5 and z < 0.5
    ]
    expected = sum(credit) / len(credit) if credit else NAN
    assert same_position_auc(*unzip(rows)) == pytest.approx(expected, nan_ok=True)


def test_position_alone_is_worth_nothing_at_the_same_place():
    scores, labels = [[1.0, 0.5, 0.25], [1.0, 0.5]], [[1, 1, 0], [1, 0]]
    assert within_bag_auc(scores, labels) == 1.0
    assert same_position_auc(scores, labels) == 0.5


def test_bag_aucs_are_those_whose_mean_is_the_within_bag_auc():
    scores, labels = [[0.9, 0.2, 0.5], [0.1, 0.8], [0.3]], [[1, 0, 1], [1, 0], [1]]
    assert bag_aucs(scores, labels).tolist() == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)
    assert within_bag_auc(scores, labels) == 0.5
