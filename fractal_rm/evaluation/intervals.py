"""Bootstrap intervals of metrics, and of the difference between two models on the same resampled items."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fractal_rm.evaluation.statistics import Statistic, mean_of, values_of

DRAWS = 1000
CONFIDENCE = 0.95
# Draws computed at a time: a matrix of draws and steps needs a few tens of megabytes.
_CHUNK = 50


class Estimate(NamedTuple):
    """A point value, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """Measurements of one model on one set of items.

    Args:
        items: Number of items, which are resampled.
        statistics: Metrics by name.
        counts: Numbers without an interval: responses, unscored responses, the threshold.
        curves: Points of curves by name, ready for JSON.
    """

    items: int
    statistics: Mapping[str, Statistic]
    counts: Mapping[str, int | float] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, int | float]:
        """Counts, then the value of each metric."""
        return {**self.counts, **values_of(self.statistics)}


def estimates(measured: Measurement, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """Every metric with its 95 % percentile interval over resampled items.

    Draws in which a metric is undefined are left out.

    Source:
        Percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).

    Example:
        >>> estimates(Measurement(4, {"accuracy": mean_of([1, 1, 0, 1])}))["accuracy"]
        Estimate(value=0.75, low=0.25, high=1.0)
    """
    return {name: _estimate(drawn) for name, drawn in _drawn(measured, draws, seed).items()}


def differences(first: Measurement, second: Measurement, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """First minus second for every metric that both have, with the interval over the same resampled items.

    Raises:
        ValueError: If the numbers of items differ. The items must be the same, in the same order.

    Example:
        >>> one, other = (Measurement(2, {"accuracy": mean_of(hits)}) for hits in ([1, 1], [1, 0]))
        >>> differences(one, other)["accuracy"]
        Estimate(value=0.5, low=0.0, high=1.0)
    """
    if first.items != second.items:
        raise ValueError(f"{first.items} items against {second.items}. Measure both models on the same data.")
    values, others = (_drawn(measured, draws, seed) for measured in (first, second))
    return {name: _estimate(values[name] - others[name]) for name in values if name in others}


def as_columns(found: Mapping[str, Estimate]) -> dict[str, float]:
    """Estimates as one number per name: `name`, `name_low`, `name_high`.

    Example:
        >>> as_columns({"f1": Estimate(0.5, 0.4, 0.6)})
        {'f1': 0.5, 'f1_low': 0.4, 'f1_high': 0.6}
    """
    ends = ("", "_low", "_high")
    return {name + end: value for name, estimate in found.items() for end, value in zip(ends, estimate, strict=True)}


def _drawn(measured: Measurement, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Each metric's point value, then its value in each draw: (1 + draws,)."""
    count = measured.items
    parts: dict[str, list[Any]] = {name: [[statistic.value]] for name, statistic in measured.statistics.items()}
    generator = np.random.default_rng(seed)
    for start in range(0, draws if count else 0, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(float)
        for name, statistic in measured.statistics.items():
            parts[name].append(statistic(weights))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _estimate(values: np.ndarray) -> Estimate:
    drawn = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(drawn):
        return Estimate(float(values[0]), math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(values[0]), float(low), float(high))


def paired_difference(a: ArrayLike, b: ArrayLike, *, draws: int = 2 * DRAWS) -> Estimate:
    """Mean of one system minus the mean of another on the same items (N,), with the interval over resampled items.

    Raises:
        ValueError: If the systems have different numbers of items.

    Example:
        >>> paired_difference([1, 1, 0, 1], [1, 0, 0, 0])
        Estimate(value=0.5, low=0.0, high=1.0)
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} items against {len(second)}. Measure both systems on the same items.")
    return estimates(Measurement(len(first), {"mean": mean_of(first - second)}), draws=draws)["mean"]


def interval_of_share(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share of `count` items.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Example:
        >>> [round(end, 3) for end in interval_of_share(0.5, 10)]
        [0.237, 0.763]
    """
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return middle - half, middle + half


def interval_of_mean(values: ArrayLike, *, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over runs at each point of their curves.

    Args:
        values: One curve per run (runs, P). With fewer than five runs the interval is too narrow.
        draws: Number of draws, the same runs for all points.
    """
    curves = np.asarray(values, dtype=float)
    points = {str(point): mean_of(column) for point, column in enumerate(curves.T)}
    _, low, high = np.array(list(estimates(Measurement(len(curves), points), draws=draws).values())).T
    return low, high
