"""Metrics of scores against labels.

A metric is a [`Statistic`]: a function of weights (D, N) that say how often each of N items (responses, or questions)
counts in each of D draws. Weights of one give the point value, and weights of resampled items the bootstrap
distribution. A draw costs a few sums, and two models are compared on the same draws.

Scores and labels have one entry per item: a number, or a row with one number per step. A label is good from 0.5 on; NaN
is an unknown label and is left out. A metric that is undefined, such as an AUC over labels of one kind, is NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fractal_rm.objectives.aggregation import GOOD

Rows = Sequence[Any] | np.ndarray

BINS = 10


@dataclass(frozen=True)
class Statistic:
    """A metric of items.

    Args:
        items: Number of items N.
        of: Maps weights (D, N) to one value per draw (D,), NaN where undefined.

    Example:
        >>> accuracy = mean_of([1.0, 0.0, np.nan])
        >>> accuracy.value, accuracy(np.array([[1, 1, 1], [2, 0, 5]]))
        (0.5, array([0.5, 1. ]))
    """

    items: int
    of: Callable[[np.ndarray], np.ndarray]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """One value per draw (D,)."""
        return self.of(weights)

    @property
    def value(self) -> float:
        """The point value, with all weights one."""
        return float(self.of(np.ones((1, self.items)))[0])


# Means and combinations -----------------------------------------------------------------------------------------------


def mean_of(values: ArrayLike) -> Statistic:
    """Mean over items of their values (N,); NaN marks items that do not count."""
    array = np.asarray(values, dtype=float)
    known = ~np.isnan(array)
    return ratio_of(np.where(known, array, 0.0), known)


def ratio_of(above: ArrayLike, below: ArrayLike) -> Statistic:
    """Sum over items of one number (N,), divided by the sum of another: a mean over parts of items."""
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return Statistic(len(a), lambda weights: divided(weights @ a, weights @ b))


def harmonic_mean_of(first: Statistic, second: Statistic) -> Statistic:
    """Harmonic mean of two statistics, such as F1 of two accuracies; 0 where both are.

    Example:
        >>> round(harmonic_mean_of(mean_of([1.0, 0.0]), mean_of([1.0, 1.0])).value, 3)
        0.667
    """

    def mean(weights: np.ndarray) -> np.ndarray:
        a, b = first(weights), second(weights)
        return np.where(a + b == 0, 0.0, divided(2 * a * b, a + b))

    return Statistic(first.items, mean)


def average_of(statistics: Sequence[Statistic]) -> Statistic:
    """Unweighted average of statistics, whatever their numbers of items."""
    return Statistic(statistics[0].items, lambda weights: np.mean([part(weights) for part in statistics], axis=0))


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a / b`, NaN where `b` is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


# Ranking --------------------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """Scores with a known label: for each its item, its position in the row, the score and the label."""

    owner: np.ndarray
    place: np.ndarray
    score: np.ndarray
    label: np.ndarray

    def auc(self, items: int, chosen: Any = slice(None)) -> Statistic:
        """Area under the ROC curve over chosen scores."""
        owner, score, good = self.owner[chosen], self.score[chosen], self.label[chosen] >= GOOD
        order = np.argsort(-score, kind="stable")
        owner, good, ties = owner[order], good[order], _runs(score[order])

        def areas(weights: np.ndarray) -> np.ndarray:
            each = weights[:, owner]
            counts = [np.add.reduceat(each * kind, ties, axis=1) for kind in (good, ~good)]
            return np.array([_roc_area(right, wrong) for right, wrong in zip(*counts, strict=True)])

        return Statistic(items, areas)


def _known(scores: Rows, labels: Rows) -> _Known:
    _check_bags(scores, labels)
    lengths = [np.size(row) for row in scores]
    for i, (length, row) in enumerate(zip(lengths, labels, strict=True)):
        if length != np.size(row):
            raise ValueError(
                f"Bag {i} has {length} scores and {np.size(row)} labels. "
                "Pass one label per step, NaN where it is unknown."
            )
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths, dtype=int) - lengths, lengths)
    flat, gold = (
        np.concatenate([np.ravel(row) for row in rows] or [np.empty(0)]).astype(float) for rows in (scores, labels)
    )
    known = np.flatnonzero(~np.isnan(gold))
    found = _Known(owner[known], place[known], flat[known], gold[known])
    if not np.isfinite(found.score).all():
        i = found.owner[~np.isfinite(found.score)][0]
        raise ValueError(f"Bag {i} has a NaN or infinite score. Leave out bags that were not scored.")
    return found


def _check_bags(scores: Rows, labels: Rows) -> None:
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} bags have scores and {len(labels)} have labels. Pass both for every bag.")


def _runs(ordered: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.diff(ordered, prepend=np.nan) != 0)


def _roc_area(right: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the ROC curve from the weights of right and wrong scores at each distinct score, the highest first."""
    hits, false = np.cumsum(right), np.cumsum(wrong)
    if not len(hits) or hits[-1] == 0 or false[-1] == 0:
        return math.nan
    # Points on a straight line are left out, as scikit-learn does: the digits are the same.
    corner = np.ones(len(hits), dtype=bool)
    corner[1:-1] = (right[2:] != right[1:-1]) | (wrong[2:] != wrong[1:-1])
    height, width = (np.append(0.0, total[corner]) / total[-1] for total in (hits, false))
    return float((np.diff(width) * (height[1:] + height[:-1]) / 2).sum())


def auc_of(scores: Rows, labels: Rows) -> Statistic:
    """Area under the ROC curve over all scores of all items, ties counted half; each score has its item's weight.

    Raises:
        ValueError: If an item's numbers of scores and labels differ, or a score with a label is not finite.
    """
    return _known(scores, labels).auc(len(scores))


def bag_aucs(scores: Rows, labels: Rows) -> np.ndarray:
    """The AUC among the steps of each bag (N,), NaN where its known steps are of one kind.

    Example:
        >>> bag_aucs([[0.9, 0.2], [0.4]], [[1, 0], [1]])
        array([ 1., nan])
    """
    known = _known(scores, labels)
    order = np.lexsort((-known.score, known.owner))
    owner, score, good = known.owner[order], known.score[order], known.label[order] >= GOOD
    ties = np.union1d(_runs(owner), _runs(score))
    right, wrong = (np.add.reduceat(kind.astype(float), ties) for kind in (good, ~good))
    cuts = np.searchsorted(owner[ties], np.arange(len(scores) + 1)).tolist()
    return np.array([_roc_area(right[start:end], wrong[start:end]) for start, end in pairwise(cuts)])


def same_position_auc_of(scores: Rows, labels: Rows) -> Statistic:
    """Share of correctly ordered pairs of a right and a wrong step at the same position of two bags.

    If labels end at the first wrong step, that step is the last known one of its bag, and "early is good" reaches a
    [`within_bag_auc`] of 1. Here it gets 0.5.
    """
    known = _known(scores, labels)
    good = known.label >= GOOD
    columns = [(known.place == place, known.auc(len(scores), known.place == place)) for place in np.unique(known.place)]

    def share(weights: np.ndarray) -> np.ndarray:
        wins, pairs = np.zeros((2, len(weights)))
        for here, auc in columns:
            right, wrong = (weights[:, known.owner[here & kind]].sum(1) for kind in (good, ~good))
            wins += np.nan_to_num(auc(weights)) * right * wrong
            pairs += right * wrong
        return divided(wins, pairs)

    return Statistic(len(scores), share)


# Errors and calibration -----------------------------------------------------------------------------------------------


def accuracy_of(probs: Rows, labels: Rows) -> Statistic:
    """Share of scores on the same side of 0.5 as their label."""
    return _mean_over_known(probs, labels, lambda p, y: (p >= GOOD) == (y >= GOOD))


def brier_of(probs: Rows, labels: Rows) -> Statistic:
    """Mean squared distance between probability and label.

    Example:
        >>> brier_of([0.5, 1.0], [1.0, 1.0]).value
        0.125
    """
    return _mean_over_known(probs, labels, lambda p, y: (p - y) ** 2)


def absolute_error_of(values: Rows, labels: Rows) -> Statistic:
    """Mean distance between predictions, not rounded, and labels on the same scale, such as grades."""
    return _mean_over_known(values, labels, lambda value, label: np.abs(value - label))


def _mean_over_known(scores: Rows, labels: Rows, term: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Statistic:
    known = _known(scores, labels)
    sums = np.bincount(known.owner, weights=term(known.score, known.label), minlength=len(scores))
    return ratio_of(sums, np.bincount(known.owner, minlength=len(scores)))


def ece_of(probs: Rows, labels: Rows, bins: int = BINS) -> Statistic:
    """Mean distance between probability and share of good ones over bins of equal width, each weighted by its size.

    Raises:
        ValueError: As [`auc_of`], or if a probability is outside [0, 1].
    """
    known = _known(probs, labels)
    outside = np.flatnonzero((known.score < 0) | (known.score > 1))
    if len(outside):
        i = outside[0]
        raise ValueError(
            f"Bag {known.owner[i]} has probability {known.score[i]}, outside [0, 1]. Pass probabilities, not logits."
        )
    gaps = np.eye(bins)[_bin_of(known.score, bins)] * (known.score - known.label)[:, None]  # (P, bins)

    def mean_gap(weights: np.ndarray) -> np.ndarray:
        each = weights[:, known.owner]
        return divided(np.abs(each @ gaps).sum(1), each.sum(1))

    return Statistic(len(probs), mean_gap)


def _bin_of(probs: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((probs * bins).astype(int), bins - 1)


class Bin(NamedTuple):
    """Probabilities between two edges: how many, their mean, and the share that is good."""

    low: float
    high: float
    count: int
    mean_probability: float
    share_good: float


def reliability_curve(probs: Rows, labels: Rows, bins: int = BINS) -> list[Bin]:
    """Predicted probability against the share of good ones, in the bins of [`ece_of`]; empty bins are left out.

    Example:
        >>> reliability_curve([0.75, 0.75, 0.1], [1, 0, 0], bins=2)[1]
        Bin(low=0.5, high=1.0, count=2, mean_probability=0.75, share_good=0.5)
    """
    known = _known(probs, labels)
    bin_of = _bin_of(known.score, bins)
    found = []
    for i in np.unique(bin_of).tolist():
        p, y = known.score[bin_of == i], known.label[bin_of == i]
        found.append(Bin(i / bins, (i + 1) / bins, len(p), float(p.mean()), float(y.mean())))
    return found


class Risk(NamedTuple):
    """Share of wrong predictions among the `coverage` share of most confident items."""

    coverage: float
    risk: float


def risk_coverage_curve(probs: Rows, labels: Rows) -> list[Risk]:
    """How often the prediction "good from 0.5 on" errs on the most confident responses, which are farthest from 0.5.

    Returns:
        One point for each distinct distance from 0.5, the most confident first. Equally confident responses enter
        together, so that no point depends on the order of the responses.

    Source:
        Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.

    Example:
        >>> risk_coverage_curve([0.9, 0.6, 0.1, 0.5], [1, 0, 0, 1])[1:]
        [Risk(coverage=0.75, risk=0.3333333333333333), Risk(coverage=1.0, risk=0.25)]
    """
    sizes, risks = (drawn[0] for drawn in _risk_by_sureness(probs, labels)(np.ones((1, len(probs)))))
    covered = np.cumsum(sizes)
    return [Risk(float(end / covered[-1]), float(risk)) for end, risk in zip(covered, risks, strict=True)]


def aurc_of(probs: Rows, labels: Rows) -> Statistic:
    """Area under [`risk_coverage_curve`], each step at the height it ends with: lower is better.

    Example:
        >>> aurc_of([0.9, 0.6], [1, 0]).value
        0.25
    """
    risk_by_sureness = _risk_by_sureness(probs, labels)

    def mean_risk(weights: np.ndarray) -> np.ndarray:
        sizes, risks = risk_by_sureness(weights)
        return divided((sizes * np.nan_to_num(risks)).sum(1), sizes.sum(1))

    return Statistic(len(probs), mean_risk)


def _risk_by_sureness(probs: Rows, labels: Rows) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """From weights (D, N) the weight of each run of equally sure items, the surest first, and the risk up to it."""
    known = _known(probs, labels)
    sureness = np.abs(known.score - GOOD)
    order = np.argsort(-sureness, kind="stable")
    owner, ties = known.owner[order], _runs(sureness[order])
    errs = ((known.score >= GOOD) != (known.label >= GOOD))[order]

    def risks(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        each = weights[:, owner]
        sizes, wrong = (np.add.reduceat(part, ties, axis=1) for part in (each, each * errs))
        return sizes, divided(np.cumsum(wrong, axis=1), np.cumsum(sizes, axis=1))

    return risks


def as_points(curve: Sequence[Any], most: int = 101) -> list[dict[str, float]]:
    """Points of a curve for JSON, thinned evenly to at most `most`, both ends kept."""
    chosen = np.unique(np.linspace(0, len(curve) - 1, min(most, len(curve))).round().astype(int)) if curve else []
    return [dict(curve[i]._asdict()) for i in chosen]


# The first wrong step -------------------------------------------------------------------------------------------------


def first_wrong(labels: np.ndarray) -> int | None:
    """Index of the first step that is labelled wrong, None if there is none."""
    wrong = np.flatnonzero(labels < GOOD)
    return int(wrong[0]) if len(wrong) else None


def hit_range(step_scores: ArrayLike, first: int | None) -> tuple[float, float]:
    """The thresholds `low < threshold <= high` at which the first step scored below is the first wrong one.

    Without a wrong one `first` is None. The range is empty if `low >= high`: a wrong step that was not scored is never
    found, and a response without any score is never a hit.

    Example:
        >>> hit_range([0.9, 0.2, 0.1], 1)  # found by thresholds above 0.2, up to 0.9
        (0.2, 0.9)
        >>> hit_range([0.9, 0.4], None)
        (-inf, 0.4)
    """
    scores = np.asarray(step_scores, dtype=float)
    if not len(scores) or (first is not None and first >= len(scores)):
        return math.inf, -math.inf
    low = -math.inf if first is None else float(scores[first])
    return low, float(np.min(scores[:first], initial=math.inf))


def first_error_statistics(scores: Rows, labels: Rows, threshold: float) -> dict[str, Statistic]:
    """How often the first step scored below the threshold is the first wrong step.

    A bag counts where its gold answer is known: labels are known up to the first wrong one, or all of them are and none
    is wrong. Bags without steps are left out. Last steps may have no score.

    Source:
        F1 of ProcessBench (Zheng et al., 2024).
    """
    return hit_rates(*first_error_hits(scores, labels, threshold))


def first_error_hits(scores: Rows, labels: Rows, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Hits of [`first_error_statistics`] (N,), NaN where a bag does not count, and which bags have a wrong step."""
    _check_bags(scores, labels)
    hits, wrong = np.full(len(labels), np.nan), np.zeros(len(labels), dtype=bool)
    for i, (row, gold) in enumerate(zip(scores, labels, strict=True)):
        known = np.asarray(gold, dtype=float).reshape(-1)
        first = first_wrong(known)
        wrong[i] = first is not None
        if len(known) and not np.isnan(known[:first]).any():
            low, high = hit_range(row, first)
            hits[i] = low < threshold <= high
    return hits, wrong


def hit_rates(hits: np.ndarray, wrong: np.ndarray) -> dict[str, Statistic]:
    """Shares of hits: `first_error_accuracy`, `all_correct_accuracy`, and `f1`.

    Args:
        hits: Whether each bag is a hit (N,), NaN where it does not count.
        wrong: Whether the bag has a wrong step (N,). `f1` is the harmonic mean of the shares with and without one.
    """
    first, right = (mean_of(np.where(wrong == kind, hits, np.nan)) for kind in (True, False))
    return {"first_error_accuracy": first, "all_correct_accuracy": right, "f1": harmonic_mean_of(first, right)}


# Values ---------------------------------------------------------------------------------------------------------------


def step_auc(scores: Rows, labels: Rows) -> float:
    """Value of [`auc_of`]: the probability that a good step scores above a bad one, over all steps of all bags."""
    return auc_of(scores, labels).value


def within_bag_auc(scores: Rows, labels: Rows) -> float:
    """Mean of [`bag_aucs`]: knowing which prompts are hard lifts [`step_auc`], but not this."""
    return mean_of(bag_aucs(scores, labels)).value


def same_position_auc(scores: Rows, labels: Rows) -> float:
    """Value of [`same_position_auc_of`]."""
    return same_position_auc_of(scores, labels).value


def expected_calibration_error(probs: Rows, labels: Rows, bins: int = BINS) -> float:
    """Value of [`ece_of`]."""
    return ece_of(probs, labels, bins).value


def bag_statistics(probs: Rows, labels: Rows) -> dict[str, Statistic]:
    """How well response probabilities (N,) match response labels (N,): `bag_auc`, `bag_accuracy`, and `bag_ece`."""
    return {
        "bag_auc": auc_of(probs, labels),
        "bag_accuracy": accuracy_of(probs, labels),
        "bag_ece": ece_of(probs, labels),
    }


def bag_metrics(probs: Rows, labels: Rows) -> dict[str, float]:
    """Values of [`bag_statistics`]."""
    return values_of(bag_statistics(probs, labels))


def step_statistics(scores: Rows, labels: Rows) -> dict[str, Statistic]:
    """How well steps are ranked: `step_auc` and `within_bag_auc`."""
    return {"step_auc": auc_of(scores, labels), "within_bag_auc": mean_of(bag_aucs(scores, labels))}


def values_of(statistics: Mapping[str, Statistic]) -> dict[str, float]:
    """The point value of each statistic."""
    return {name: statistic.value for name, statistic in statistics.items()}
