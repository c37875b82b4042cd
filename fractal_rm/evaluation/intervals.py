"""Metrics with bootstrap intervals: items are drawn anew by weights, the same ones for every metric and every model.

A metric is a statistic: a function of weights (D, N) that say how often each of N items (responses, or questions)
counts in each of D draws. A draw then costs a few sums, where computing a metric anew on drawn items would sort them
each time; and two models are compared on the same draws, so that what is hard for both cancels out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fractal_rm.objectives.aggregation import GOOD

# Weights (D, N) of the items in each draw -> one value a draw, NaN where it is undefined.
Statistic = Callable[[np.ndarray], np.ndarray]

DRAWS = 1000
# Draws that are computed at a time: a matrix of draws and steps takes a few tens of megabytes.
_CHUNK = 50


class Estimate(NamedTuple):
    """A value on the items as they are, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """What was measured of one model on one set of items.

    Args:
        items: How many items there are: what draws are made of.
        statistics: Metrics by name.
        counts: Numbers that have no interval: how many responses there were, were not scored, the threshold.
        curves: Points of curves by name, ready for JSON.
    """

    items: int
    statistics: Mapping[str, Statistic]
    counts: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)


def mean_of(values: ArrayLike) -> Statistic:
    """Mean over items; NaN marks items that do not count.

    Args:
        values: One value an item (N,).

    Example:
        >>> mean_of([1.0, 0.0, np.nan])(np.array([[1, 1, 1], [2, 0, 5]]))
        array([0.5, 1. ])
    """
    array = np.asarray(values, dtype=float)
    known = ~np.isnan(array)
    filled = np.where(known, array, 0.0)
    return lambda weights: divided(weights @ filled, weights @ known)


def ratio_of(above: Sequence[float], below: Sequence[float]) -> Statistic:
    """Sum over items of one number, divided by the sum of another: a mean over what items consist of.

    Example:
        >>> ratio_of([1, 2], [2, 4])(np.array([[1, 1], [1, 0]]))
        array([0.5, 0.5])
    """
    a, b = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return lambda weights: divided(weights @ a, weights @ b)


def auc_of(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> Statistic:
    """Area under the ROC curve over all scores of all items, ties counted half; the weight of an item is that of each.

    Args:
        scores: Scores of each item: one, or one a step.
        labels: Their labels, good from 0.5 on; NaN leaves a score out.

    Example:
        >>> auc_of([[0.9, 0.2], [0.4]], [[1, 0], [1]])(np.ones((1, 2)))
        array([1.])
    """
    lengths = [np.size(row) for row in scores]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    flat, gold = (
        np.concatenate([np.ravel(row) for row in rows] or [np.empty(0)]).astype(float) for rows in (scores, labels)
    )
    known = ~np.isnan(gold)
    owner, flat, good = owner[known], flat[known], gold[known] >= GOOD
    order = np.argsort(flat, kind="stable")
    owner, flat, good = owner[order], flat[order], good[order]
    if not len(flat):
        return lambda weights: np.full(len(weights), np.nan)
    ties = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        each = weights[:, owner].astype(float)
        right, wrong = (np.add.reduceat(each * kind, ties, axis=1) for kind in (good, ~good))
        wins = right * (np.cumsum(wrong, axis=1) - wrong / 2)
        return divided(wins.sum(1), right.sum(1) * wrong.sum(1))

    return statistic


def harmonic_mean_of(first: Statistic, second: Statistic) -> Statistic:
    """Harmonic mean of two statistics, such as F1 of two accuracies; 0 where both are.

    Example:
        >>> harmonic_mean_of(mean_of([1.0, 0.0]), mean_of([1.0, 1.0]))(np.ones((1, 2))).round(3)
        array([0.667])
    """

    def statistic(weights: np.ndarray) -> np.ndarray:
        a, b = first(weights), second(weights)
        return np.where(a + b == 0, 0.0, divided(2 * a * b, a + b))

    return statistic


def average_of(statistics: Sequence[Statistic]) -> Statistic:
    """Plain average of statistics, each counting alike however many items it stands on."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a / b`, NaN where `b` is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def estimates(
    judgement: Judgement, *, draws: int = DRAWS, seed: int = 0, confidence: float = 0.95
) -> dict[str, Estimate]:
    """Every metric with its percentile interval over drawn items.

    Args:
        judgement: What was measured.
        draws: Number of draws.
        seed: Seed of the draws.
        confidence: Share of draws within the interval. Draws in which a metric is undefined are left out.

    Source:
        Percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).

    Example:
        >>> estimates(Judgement(4, {"accuracy": mean_of([1, 1, 0, 1])}))["accuracy"]
        Estimate(value=0.75, low=0.25, high=1.0)
    """
    values = _values(judgement, draws, seed)
    return {name: _estimate(drawn, confidence) for name, drawn in values.items()}


def differences(
    first: Judgement, second: Judgement, *, draws: int = DRAWS, seed: int = 0, confidence: float = 0.95
) -> dict[str, Estimate]:
    """First minus second in every metric that both have, with the interval over the same drawn items.

    Args:
        first: What was measured of one model.
        second: The same items in the same order, measured of another.
        draws: Number of draws.
        seed: Seed of the draws.
        confidence: Share of draws within the interval.

    Raises:
        ValueError: If the numbers of items differ.

    Example:
        >>> one, other = (Judgement(2, {"accuracy": mean_of(hits)}) for hits in ([1, 1], [1, 0]))
        >>> differences(one, other)["accuracy"]
        Estimate(value=0.5, low=0.0, high=1.0)
    """
    if first.items != second.items:
        raise ValueError(f"{first.items} items against {second.items}. Judge both models on the same data.")
    values, others = (_values(judgement, draws, seed) for judgement in (first, second))
    return {name: _estimate(values[name] - others[name], confidence) for name in values if name in others}


def as_columns(found: Mapping[str, Estimate]) -> dict[str, float]:
    """Estimates as one number a name: `name`, `name_low`, `name_high`.

    Example:
        >>> as_columns({"f1": Estimate(0.5, 0.4, 0.6)})
        {'f1': 0.5, 'f1_low': 0.4, 'f1_high': 0.6}
    """
    ends = ("", "_low", "_high")
    return {name + end: value for name, estimate in found.items() for end, value in zip(ends, estimate, strict=True)}


def _values(judgement: Judgement, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Each metric on the items as they are, then in each draw: (1 + draws,)."""
    count = judgement.items
    parts: dict[str, list[np.ndarray]] = {name: [f(np.ones((1, count)))] for name, f in judgement.statistics.items()}
    generator = np.random.default_rng(seed)
    for start in range(0, draws if count else 0, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)
        for name, statistic in judgement.statistics.items():
            parts[name].append(statistic(weights))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _estimate(values: np.ndarray, confidence: float) -> Estimate:
    drawn = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(drawn):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values[0]), float(low), float(high))
