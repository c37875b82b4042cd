"""How well step scores and response probabilities match gold labels: functions on arrays and lists.

A label is good from 0.5 on; NaN is an unknown label and is left out. A metric that is undefined on the given data, such
as an AUC over labels of one kind, is NaN and never a number that looks like a result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score

from fractal_rm.objectives.aggregation import GOOD


def _arrays(scores: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Scores of each bag as a float array."""
    arrays = [np.asarray(bag_scores, dtype=float).reshape(-1) for bag_scores in scores]
    for i, array in enumerate(arrays):
        if not np.isfinite(array).all():
            raise ValueError(f"Bag {i} has a score that is not a finite number. Leave out bags that were not scored.")
    return arrays


def _check_bags(scores: int, labels: int) -> None:
    if scores != labels:
        raise ValueError(f"{scores} bags have scores and {labels} have labels. Pass both for every bag.")


def _rows(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores and labels of each bag as float arrays of equal length."""
    _check_bags(len(scores), len(labels))
    rows = []
    for i, (bag_scores, bag_labels) in enumerate(zip(_arrays(scores), labels, strict=True)):
        gold = np.asarray(bag_labels, dtype=float).reshape(-1)
        if len(bag_scores) != len(gold):
            raise ValueError(
                f"Bag {i} has {len(bag_scores)} scores and {len(gold)} labels. "
                "Pass one label per step, NaN where it is unknown."
            )
        rows.append((bag_scores, gold))
    return rows


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve over known labels, NaN if they are all of one kind."""
    known = ~np.isnan(labels)
    good = labels[known] >= GOOD
    if not good.any() or good.all():
        return float("nan")
    return float(roc_auc_score(good, scores[known]))


def step_auc(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> float:
    """Probability that a good step scores above a bad one, over all steps of all bags.

    Args:
        scores: Step scores of each bag.
        labels: Gold step labels of each bag, NaN where unknown.

    Returns:
        Area under the ROC curve, ties counted half; NaN if all known labels are of one kind.

    Raises:
        ValueError: If a bag has another number of scores than labels, or a score that is not finite.

    Example:
        >>> step_auc([[0.9, 0.2], [0.4]], [[1, 0], [1]])
        1.0
    """
    rows = _rows(scores, labels)
    if not rows:
        return float("nan")
    return _auc(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def within_bag_auc(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> float:
    """Mean over bags of the AUC among the bag's own steps.

    Telling hard prompts from easy ones, which lifts [`step_auc`], does not help here: only telling the steps of one
    response apart does.

    Args:
        scores: Step scores of each bag.
        labels: Gold step labels of each bag, NaN where unknown.

    Returns:
        The mean over bags with known steps of both kinds; NaN if there is no such bag.

    Raises:
        ValueError: If a bag has another number of scores than labels, or a score that is not finite.

    Example:
        >>> within_bag_auc([[0.9, 0.2], [0.4]], [[1, 0], [1]])
        1.0
    """
    aucs = bag_aucs(scores, labels)
    return float(np.nanmean(aucs)) if (~np.isnan(aucs)).any() else float("nan")


def bag_aucs(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> np.ndarray:
    """The AUC among the steps of each bag, whose mean is [`within_bag_auc`].

    Args:
        scores: Step scores of each bag.
        labels: Gold step labels of each bag, NaN where unknown.

    Returns:
        One AUC a bag, NaN where its known steps are of one kind.

    Raises:
        ValueError: If a bag has another number of scores than labels, or a score that is not finite.

    Example:
        >>> bag_aucs([[0.9, 0.2], [0.4]], [[1, 0], [1]])
        array([ 1., nan])
    """
    return np.array([_pair_auc(*row) for row in _rows(scores, labels)])


def _pair_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUC by comparing every pair: a few steps take microseconds, not the millisecond of a general implementation."""
    good, bad = scores[labels >= GOOD], scores[labels < GOOD]
    if not len(good) or not len(bad):
        return float("nan")
    return float(np.mean(good[:, None] > bad) + np.mean(good[:, None] == bad) / 2)


def same_position_auc(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> float:
    """Probability that a right step scores above a wrong one that stands at the same place of another bag.

    Where labels end at the first wrong step, that step is the last known one of its bag, and "early is good" has a
    [`within_bag_auc`] of 1. Here it has 0.5.

    Args:
        scores: Step scores of each bag.
        labels: Gold step labels of each bag, NaN where unknown.

    Returns:
        The share of pairs in the right order, a tie counting half; NaN if no place has steps of both kinds.

    Raises:
        ValueError: If a bag has another number of scores than labels, or a score that is not finite.

    Example:
        >>> same_position_auc([[0.9, 0.2], [0.4, 0.7]], [[1, 0], [0, 1]])
        1.0
    """
    rows = _rows(scores, labels)
    wins = pairs = 0.0
    for place in range(max((len(row) for row, _ in rows), default=0)):
        column, known = np.array([(row[place], gold[place]) for row, gold in rows if len(row) > place]).T
        right, wrong = column[known >= GOOD], np.sort(column[known < GOOD])
        below, up_to = (np.searchsorted(wrong, right, side=side) for side in ("left", "right"))
        wins += (below + up_to).sum() / 2
        pairs += len(right) * len(wrong)
    return float(wins / pairs) if pairs else float("nan")


def _first_below(values: np.ndarray, threshold: float) -> int | None:
    """Index of the first value below the threshold, None if there is none."""
    below = np.flatnonzero(values < threshold)
    return int(below[0]) if len(below) else None


def first_error_accuracy(
    scores: Sequence[ArrayLike], labels: Sequence[ArrayLike], threshold: float
) -> dict[str, float]:
    """How often the first step scored below the threshold is the first wrong step.

    A bag counts where its gold answer is known: labels are known up to the first wrong one, or all of them are and none
    is wrong. Bags without steps are left out.

    Args:
        scores: Step scores of each bag.
        labels: Gold step labels of each bag, NaN where unknown.
        threshold: A step scored below it is predicted wrong. Choose it with [`choose_threshold`], not on these labels.

    Returns:
        `first_error_accuracy` over bags with an error, `all_correct_accuracy` over bags without one, and their harmonic
        mean `f1`. Each is NaN if there are no such bags; `f1` is 0 where both accuracies are.

    Raises:
        ValueError: If a bag has another number of scores than labels, or a score that is not finite.

    Source:
        F1 of ProcessBench (Zheng et al., 2024).

    Example:
        >>> first_error_accuracy([[0.9, 0.2, 0.1], [0.8]], [[1, 0, float("nan")], [1]], threshold=0.5)
        {'first_error_accuracy': 1.0, 'all_correct_accuracy': 1.0, 'f1': 1.0}
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for bag_scores, bag_labels in _rows(scores, labels):
        gold = _first_below(bag_labels, GOOD)
        if len(bag_labels) and not np.isnan(bag_labels[:gold]).any():
            hits[gold is not None].append(_first_below(bag_scores, threshold) == gold)
    erroneous, correct = (float(np.mean(hits[key])) if hits[key] else float("nan") for key in (True, False))
    total = erroneous + correct
    f1 = 2 * erroneous * correct / total if total != 0 else 0.0
    return {"first_error_accuracy": erroneous, "all_correct_accuracy": correct, "f1": f1}


def choose_threshold(
    scores: Sequence[ArrayLike], bag_labels: ArrayLike, *, rule: Literal["min", "max"] = "min"
) -> float:
    """Threshold on a bag's lowest, or highest, step score that best tells good bags from bad ones.

    It needs response labels only, so no gold step label touches it. A bag is predicted good if none of its steps scores
    below the threshold, or by the other rule if some step does not. Candidates lie halfway between neighbouring lowest
    (highest) scores and at both ends; of equally accurate ones the nearest to 0.5 is taken.

    Args:
        scores: Step scores of each bag of a validation set. Bags without steps are left out.
        bag_labels: Response label of each bag, NaN where unknown.
        rule: When a response is good: `"min"`, if every step is; `"max"`, if some step is.

    Returns:
        The threshold; NaN if no labelled bag has a step.

    Raises:
        ValueError: If there are not as many bags as labels, or a score is not finite.

    Example:
        >>> choose_threshold([[0.9, 0.75], [0.8, 0.25], [0.75]], [1, 0, 1])
        0.5
        >>> choose_threshold([[0.75, 0.25], [0.25, 0.1]], [1, 0], rule="max")
        0.5
    """
    deciding = np.min if rule == "min" else np.max
    labels = np.asarray(bag_labels, dtype=float).reshape(-1)
    _check_bags(len(scores), len(labels))
    pairs = zip(_arrays(scores), labels, strict=True)
    known = [(deciding(row), label >= GOOD) for row, label in pairs if len(row) and not np.isnan(label)]
    if not known:
        return float("nan")
    extremes, good = (np.array(column) for column in zip(*sorted(known), strict=True))
    distinct = np.unique(extremes)
    halfway = distinct[:-1] / 2 + distinct[1:] / 2
    candidates = np.concatenate([distinct[:1], halfway, np.nextafter(distinct[-1:], np.inf)])
    below = np.searchsorted(extremes, candidates, side="left")
    good_below = np.concatenate([[0], np.cumsum(good)])[below]
    hits = (below - good_below) + (good.sum() - good_below)
    best = candidates[hits == hits.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def expected_calibration_error(probs: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Mean distance between predicted probability and share of good responses, over bins of equal width.

    Args:
        probs: Predicted probability of each response, in [0, 1].
        labels: Response labels in [0, 1], NaN where unknown.
        bins: Number of bins over [0, 1].

    Returns:
        The distance, each bin weighted by its size; NaN if no label is known.

    Raises:
        ValueError: If there are not as many probabilities as labels, or a probability is outside [0, 1].

    Example:
        >>> expected_calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 0, 0])
        0.25
    """
    p, y = _known_bags(probs, labels)
    if not len(p):
        return float("nan")
    index = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=p - y, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def mean_absolute_error(values: ArrayLike, labels: ArrayLike) -> float:
    """Mean distance between predictions and labels, such as grades of steps.

    Args:
        values: Predictions (n,), not rounded.
        labels: Labels (n,) on the same scale, NaN where unknown.

    Returns:
        The distance; NaN if no label is known.

    Raises:
        ValueError: If there are not as many predictions as labels, or a prediction is not finite.

    Example:
        >>> mean_absolute_error([0.5, 3.0], [1, 3])
        0.25
    """
    ((predicted, gold),) = _rows([values], [labels])
    known = ~np.isnan(gold)
    return float(np.abs(predicted - gold)[known].mean()) if known.any() else float("nan")


def _known_bags(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the bags whose label is known."""
    p, y = np.asarray(probs, dtype=float).reshape(-1), np.asarray(labels, dtype=float).reshape(-1)
    _check_bags(len(p), len(y))
    outside = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if len(outside):
        i = outside[0]
        raise ValueError(f"Bag {i} has probability {p[i]}, outside [0, 1]. Pass probabilities, not logits.")
    known = ~np.isnan(y)
    return p[known], y[known]


def bag_metrics(probs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """How well response probabilities match response labels.

    Args:
        probs: Predicted probability of each response, in [0, 1].
        labels: Response labels in [0, 1], NaN where unknown.

    Returns:
        `bag_auc`, `bag_accuracy` at 0.5, and `bag_ece` ([`expected_calibration_error`]). All are NaN if no label is
        known, `bag_auc` also if all labels are of one kind.

    Raises:
        ValueError: If there are not as many probabilities as labels, or a probability is outside [0, 1].

    Example:
        >>> bag_metrics([0.9, 0.6, 0.2], [1, 0, 0])["bag_auc"]
        1.0
    """
    p, y = _known_bags(probs, labels)
    accuracy = float(np.mean((p >= GOOD) == (y >= GOOD))) if len(p) else float("nan")
    return {"bag_auc": _auc(p, y), "bag_accuracy": accuracy, "bag_ece": expected_calibration_error(p, y)}


@dataclass(frozen=True)
class PairedDifference:
    """A difference between two systems on the same items, with its bootstrap interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Callable[[np.ndarray], float] = np.mean,
    n: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Interval of `statistic(a) - statistic(b)` when items are drawn anew, the same items for both.

    Args:
        a: One value (or row of values) per item for the first system.
        b: The same items for the second system.
        statistic: Turns drawn items into a number, such as the mean.
        n: Number of draws.
        seed: Seed of the draws: equal seeds give equal intervals.
        confidence: Share of draws within the interval.

    Returns:
        The difference on the items as they are and the percentile interval of the draws. All are NaN without items;
        with one item the interval is a point and says nothing.

    Raises:
        ValueError: If the systems have different numbers of items.

    Source:
        Percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).

    Example:
        >>> paired_bootstrap([1, 1, 0, 1], [1, 0, 0, 0]).difference
        0.5
    """
    first, second = np.asarray(a), np.asarray(b)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} items against {len(second)}. Pair the systems: the same items in one order.")
    if not len(first):
        return PairedDifference(float("nan"), float("nan"), float("nan"))
    draws = np.random.default_rng(seed).integers(len(first), size=(n, len(first)))
    if statistic is np.mean and first.ndim == 1:  # linear: all draws at once, of the items' differences
        differences = np.subtract(first, second, dtype=float)[draws].mean(axis=1)
    else:
        differences = [statistic(first[drawn]) - statistic(second[drawn]) for drawn in draws]
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(float(statistic(first) - statistic(second)), float(low), float(high))


def interval_of_mean(
    values: ArrayLike, n: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over runs at each point of their curves, when runs are drawn anew.

    Args:
        values: One curve per run (runs, P). Of fewer than five runs the interval is too narrow.
        n: Number of draws, the same runs for all points.
        seed: Seed of the draws.
        confidence: Share of draws within the interval.

    Returns:
        Lower and upper ends (P,).

    Source:
        Percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).

    Example:
        >>> interval_of_mean([[0.25, 1.0], [0.75, 1.0]])
        (array([0.25, 1.  ]), array([0.75, 1.  ]))
    """
    curves = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(curves), size=(n, len(curves)))
    low, high = np.quantile(curves[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
