"""Are probabilities worth what they say: Brier score, reliability curve, and risk against coverage.

A label is good from 0.5 on, and NaN where it is not known.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fractal_rm.evaluation.intervals import Statistic, divided, mean_of
from fractal_rm.objectives.aggregation import GOOD

BINS = 10


class Bin(NamedTuple):
    """Probabilities between two edges: how many, their mean, and the share that is good."""

    low: float
    high: float
    count: int
    mean_probability: float
    share_good: float


def reliability_curve(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Predicted probability against the share of good ones, in bins of equal width; empty bins are left out.

    Args:
        probs: Probabilities in [0, 1].
        labels: Labels in [0, 1], NaN where unknown.
        bins: Number of bins over [0, 1].

    Example:
        >>> reliability_curve([0.75, 0.75, 0.1], [1, 0, 0], bins=2)[1]
        Bin(low=0.5, high=1.0, count=2, mean_probability=0.75, share_good=0.5)
    """
    p, y = _known(probs, labels)
    index = _bin_of(p, bins)
    found = []
    for i in range(bins):
        inside = index == i
        if inside.any():
            share = float(y[inside].mean())
            found.append(Bin(i / bins, (i + 1) / bins, int(inside.sum()), float(p[inside].mean()), share))
    return found


def ece_of(probs: ArrayLike, labels: ArrayLike, owners: ArrayLike | None = None, bins: int = BINS) -> Statistic:
    """[`~fractal_rm.evaluation.metrics.expected_calibration_error`] as a statistic.

    Args:
        probs: Probabilities in [0, 1].
        labels: Labels in [0, 1], NaN where unknown.
        owners: The item that each probability belongs to; default: each is an item.
        bins: Number of bins over [0, 1].
    """
    p, y = np.asarray(probs, dtype=float), np.asarray(labels, dtype=float)
    owner = np.arange(len(p)) if owners is None else np.asarray(owners, dtype=int)
    known = ~np.isnan(y) & ~np.isnan(p)
    p, y, owner = p[known], y[known], owner[known]
    inside = np.eye(bins)[_bin_of(p, bins)]  # (P, bins)

    def statistic(weights: np.ndarray) -> np.ndarray:
        each = weights[:, owner]
        gaps = each @ (inside * (p - y)[:, None])
        return divided(np.abs(gaps).sum(1), each.sum(1))

    return statistic


def brier_of(probs: ArrayLike, labels: ArrayLike) -> Statistic:
    """Brier score of items: mean squared distance between probability and label.

    Example:
        >>> brier_of([0.5, 1.0], [1.0, 1.0])(np.ones((1, 2)))
        array([0.125])
    """
    return mean_of((np.asarray(probs, dtype=float) - np.asarray(labels, dtype=float)) ** 2)


class Risk(NamedTuple):
    """Among the surest items that make up `coverage` of all, the share that is called wrongly."""

    coverage: float
    risk: float


def risk_coverage_curve(probs: ArrayLike, labels: ArrayLike) -> list[Risk]:
    """How often the call "good from 0.5 on" errs if only the surest responses are called.

    Args:
        probs: Probabilities that a response is good. How sure a call is: the distance from 0.5.
        labels: Labels, NaN where unknown.

    Returns:
        One point for each distinct distance, the surest first. Equally sure responses are called together, so that no
        point depends on the order of the responses.

    Source:
        Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.

    Example:
        >>> risk_coverage_curve([0.9, 0.6, 0.1, 0.5], [1, 0, 0, 1])[1:]
        [Risk(coverage=0.75, risk=0.3333333333333333), Risk(coverage=1.0, risk=0.25)]
    """
    errs, ties, _ = _by_sureness(probs, labels)
    if not len(errs):
        return []
    ends = np.append(ties[1:], len(errs))
    return [Risk(float(end / len(errs)), float(errs[:end].mean())) for end in ends]


def aurc_of(probs: ArrayLike, labels: ArrayLike) -> Statistic:
    """Area under [`risk_coverage_curve`], each step at the height it ends with: lower is better.

    Example:
        >>> aurc_of([0.9, 0.6], [1, 0])(np.ones((1, 2)))
        array([0.25])
    """
    errs, ties, order = _by_sureness(probs, labels)
    if not len(errs):
        return lambda weights: np.full(len(weights), np.nan)

    def statistic(weights: np.ndarray) -> np.ndarray:
        each = weights[:, order]
        size, wrong = np.add.reduceat(each, ties, axis=1), np.add.reduceat(each * errs, ties, axis=1)
        covered = np.cumsum(size, axis=1)
        risk = np.divide(np.cumsum(wrong, axis=1), covered, out=np.zeros_like(covered), where=covered > 0)
        return divided((size * risk).sum(1), covered[:, -1])

    return statistic


def _by_sureness(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each call errs, the surest first; where runs of equally sure ones begin; and the items they are of."""
    p, y = np.asarray(probs, dtype=float), np.asarray(labels, dtype=float)
    items = np.flatnonzero(~np.isnan(p) & ~np.isnan(y))
    sureness = np.abs(p[items] - GOOD)
    order = np.argsort(-sureness, kind="stable")
    items, sureness = items[order], sureness[order]
    errs = ((p[items] >= GOOD) != (y[items] >= GOOD)).astype(float)
    ties = np.flatnonzero(np.append(True, sureness[1:] != sureness[:-1])) if len(items) else np.empty(0, dtype=int)
    return errs, ties, items


def _known(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probs, dtype=float), np.asarray(labels, dtype=float)
    known = ~np.isnan(p) & ~np.isnan(y)
    return p[known], y[known]


def _bin_of(p: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((p * bins).astype(int), bins - 1)


def as_points(curve: Sequence[Any], most: int = 101) -> list[dict[str, float]]:
    """Points of a curve for JSON, thinned evenly to at most `most`, both ends kept."""
    chosen = np.unique(np.linspace(0, len(curve) - 1, min(most, len(curve))).round().astype(int)) if curve else []
    return [dict(curve[i]._asdict()) for i in chosen]
