"""ProcessBench by its official rule: the first step below a threshold is predicted as the first wrong step.

A case is a hit if the first wrong step is found, or if no step of a right solution is predicted wrong. F1 is the
harmonic mean of the hit rates on the two kinds, and the headline is its average over four subsets. Each case is a hit
for one interval of thresholds, which gives the whole curve and the best threshold exactly.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.formats.processbench import read_processbench
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.intervals import Measurement
from fractal_rm.evaluation.responses import gold_labels, measure_responses, ranking_of
from fractal_rm.evaluation.statistics import Statistic, as_points, average_of, first_wrong, hit_range, hit_rates

# Cases of the official subsets: with a wrong step, without one.
SUBSETS = {"gsm8k": (207, 193), "math": (594, 406), "olympiadbench": (661, 339), "omnimath": (759, 241)}
# The subset on which the official evaluation of reward models chooses its threshold.
TUNED_ON = "gsm8k"


class Cases(NamedTuple):
    """Cases of ProcessBench and the subset of each."""

    bags: list[Bag]
    subsets: list[str]


class Point(NamedTuple):
    """Metrics at a threshold: averages over the subsets."""

    threshold: float
    first_error_accuracy: float
    all_correct_accuracy: float
    f1: float


def read_cases(rows: Iterable[Mapping[str, Any]], *, source: str = "data") -> Cases:
    """Cases from rows in the official format (as the Hub has them) or in this package's schema.

    Args:
        rows: Rows with `problem`, `steps`, `label` (the index of the first wrong step or -1) and an `id` that begins
            with the subset; or with `prompt`, `steps`, `step_labels` and `meta.subset`.
        source: Name of the data in messages.

    Raises:
        ValueError: If a column is missing, a subset is unknown, or the first wrong step of a row is unknown.
    """
    given = list(rows)
    official = bool(given) and "problem" in given[0]
    bags = (
        read_processbench(given, source=source) if official else read_bags(given, Segmentation("given"), source=source)
    )
    subsets = []
    for number, (row, bag) in enumerate(zip(given, bags, strict=True), 1):
        meta = row.get("meta") or {}
        subset = meta.get("subset") or str(row.get("id")).removeprefix("processbench-").partition("-")[0]
        if subset not in SUBSETS:
            raise ValueError(f"{source}, row {number}: unknown subset {subset!r}; use {', '.join(SUBSETS)}.")
        gold = gold_labels(bag)
        if np.isnan(gold[: first_wrong(gold)]).any():
            raise ValueError(f"{source}, row {number}: a step before the first wrong one has no label; label it.")
        subsets.append(subset)
    return Cases(bags, subsets)


class Hits:
    """The thresholds at which each case is a hit."""

    def __init__(self, scored: Sequence[StepScores], cases: Cases) -> None:
        firsts = [first_wrong(gold_labels(bag)) for bag in cases.bags]
        ranges = [hit_range(result.step_scores, first) for result, first in zip(scored, firsts, strict=True)]
        self.low, self.high = np.array(ranges, dtype=float).reshape(-1, 2).T
        self.wrong = np.array([first is not None for first in firsts], dtype=bool)
        self.subset = np.array(cases.subsets)

    @property
    def subsets(self) -> list[str]:
        """Subsets that have cases, in the official order."""
        return [name for name in SUBSETS if (self.subset == name).any()]

    def at(self, threshold: float) -> np.ndarray:
        """Whether each case is a hit (N,)."""
        return (self.low < threshold) & (threshold <= self.high)

    def curve(self, subsets: Sequence[str]) -> list[Point]:
        """The metrics at every threshold, averaged over subsets; nothing changes between neighbouring points.

        A point represents all thresholds above the previous point's, up to and including its own.
        """
        ends = np.unique(np.concatenate([self.low, self.high]))
        ends = np.append(ends[np.isfinite(ends)], np.inf)
        rates = {kind: np.array([self._rates(kind, name, ends) for name in subsets]) for kind in (True, False)}
        total = rates[True] + rates[False]
        f1 = np.divide(2 * rates[True] * rates[False], total, out=np.zeros_like(total), where=total != 0)
        columns = (ends, rates[True].mean(0), rates[False].mean(0), f1.mean(0))
        return [Point(*map(float, row)) for row in zip(*columns, strict=True)]

    def _rates(self, wrong: bool, subset: str, ends: np.ndarray) -> np.ndarray:
        """Share of hits among the cases of a kind at each threshold; NaN if there is none."""
        chosen = (self.wrong == wrong) & (self.subset == subset) & (self.low < self.high)
        # Hits whose interval has begun, minus hits whose interval has ended.
        begun = np.searchsorted(np.sort(self.low[chosen]), ends, side="left")
        over = np.searchsorted(np.sort(self.high[chosen]), ends, side="left")
        count = ((self.wrong == wrong) & (self.subset == subset)).sum()
        return (begun - over) / count if count else np.full(len(ends), np.nan)

    def statistics(self, threshold: float, prefix: str = "") -> dict[str, Statistic]:
        """`first_error_accuracy`, `all_correct_accuracy` and `f1`: averages over subsets, then of each subset."""
        hits, names = self.at(threshold).astype(float), ("f1", "first_error_accuracy", "all_correct_accuracy")
        rates = {name: hit_rates(np.where(self.subset == name, hits, np.nan), self.wrong) for name in self.subsets}
        averages = {f"{prefix}{name}": average_of([found[name] for found in rates.values()]) for name in names}
        return averages | {f"{prefix}{name}_{subset}": found[name] for name in names for subset, found in rates.items()}


def best_threshold(curve: Sequence[Point]) -> Point:
    """The point with the highest F1; the lowest threshold in a tie. Its threshold lies inside its interval."""
    defined = [i for i, point in enumerate(curve) if not math.isnan(point.f1)]
    if not defined:
        return Point(*[math.nan] * 4)
    i = max(defined, key=lambda i: (curve[i].f1, -i))
    before = curve[i - 1].threshold if i else curve[i].threshold
    here = curve[i].threshold
    return curve[i]._replace(threshold=(before + here) / 2 if math.isfinite(here) else math.nextafter(before, math.inf))


def measure_processbench(
    scored: Sequence[StepScores], cases: Cases, threshold: float, *, tuned_on: str = TUNED_ON
) -> Measurement:
    """ProcessBench metrics of scores at three thresholds.

    Args:
        scored: Scores of each case.
        cases: The cases.
        threshold: A threshold chosen without gold step labels: the model's own.
        tuned_on: The subset on whose gold labels a second threshold is chosen, as in the official evaluation of reward
            models. As there, its hits count in the average.

    Returns:
        `f1`, `first_error_accuracy`, `all_correct_accuracy` (averages over the subsets) and the same with the suffix
        `_<subset>`; `tuned_...` with the threshold chosen on the gold labels of `tuned_on`; the metrics of
        [`measure_responses`] that need no threshold. Counts: cases, `best_f1` (the top of the curve, a ceiling: it
        reads all gold labels) and the thresholds. Curve: `thresholds`.

    Raises:
        ValueError: If there are no cases.

    Source:
        Zheng et al., ProcessBench, 2024 (arXiv 2412.06559), and its public code for reward models.
    """
    if not cases.bags:
        raise ValueError("There are no cases of ProcessBench to measure on. Give some.")
    hits = Hits(scored, cases)
    general = measure_responses(scored, cases.bags, threshold)
    statistics = hits.statistics(threshold)
    curve = hits.curve(hits.subsets)
    best = best_threshold(curve)
    counts = {**general.counts, "threshold": threshold, "best_f1": best.f1, "best_threshold": best.threshold}
    if tuned_on in hits.subsets:
        tuned = best_threshold(hits.curve([tuned_on])).threshold
        counts["tuned_threshold"] = tuned
        statistics |= hits.statistics(tuned, "tuned_")
    counts |= {f"responses_{name}": int((hits.subset == name).sum()) for name in hits.subsets}
    return Measurement(
        len(cases.bags), statistics | ranking_of(general), counts, {"thresholds": as_points(curve, most=201)}
    )


def missing_cases(cases: Cases) -> str | None:
    """What is missing from the official test set, in one sentence; None if it is complete."""
    hits = {name: [0, 0] for name in SUBSETS}
    for bag, subset in zip(cases.bags, cases.subsets, strict=True):
        hits[subset][first_wrong(gold_labels(bag)) is None] += 1
    parts = [f"{name} {sum(n)} of {sum(SUBSETS[name])}" for name, n in hits.items() if tuple(n) != SUBSETS[name]]
    known = "Averages are over the subsets present."
    return f"This is not all of ProcessBench: {', '.join(parts)}. {known}" if parts else None
