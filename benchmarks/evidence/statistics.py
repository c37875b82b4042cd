"""Statistics of the evidence beyond `fractal-rm compare`: areas, rollouts to reach the rival's final accuracy, costs
included."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.evidence.arms import AS_LONG, LONGER
from fractal_rm.evaluation.intervals import Estimate
from fractal_rm.study.arms import CEILING
from fractal_rm.study.statistics import (
    FEWEST_SEEDS,
    Comparison,
    Curves,
    Runs,
    compare_arm,
    curves,
    difference,
    shared_seeds,
)
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS


def improvement_probability(ours: Any, theirs: Any) -> float:
    """Probability that a run of ours is better than one of theirs, ties counting half.

    Example:
        >>> improvement_probability([0.5, 0.7], [0.5, 0.6])
        0.625
    """
    a, b = np.asarray(ours, dtype=float)[:, None], np.asarray(theirs, dtype=float)[None]
    return float(np.mean((a > b) + 0.5 * (a == b)))


def area(rollouts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Area under each curve (..., P), as a mean accuracy over the rollouts, by the trapezoid rule.

    Example:
        >>> float(area(np.array([0, 10, 20]), np.array([0.0, 1.0, 1.0])))
        0.75
    """
    return np.trapezoid(values, rollouts, axis=-1) / (rollouts[-1] - rollouts[0])


def rollouts_to_reach(rollouts: np.ndarray, curve: np.ndarray, target: float) -> float:
    """Where a curve first reaches a target, by straight lines between its points; infinite if it never does.

    Example:
        >>> rollouts_to_reach(np.array([0, 100, 200]), np.array([0.2, 0.4, 0.8]), 0.6)
        150.0
    """
    if curve[0] >= target:
        return float(rollouts[0])
    for left in range(len(curve) - 1):
        if curve[left + 1] >= target:
            share = (target - curve[left]) / (curve[left + 1] - curve[left])
            return float(rollouts[left] + share * (rollouts[left + 1] - rollouts[left]))
    return float("inf")


def largest_fall(values: np.ndarray) -> float:
    """The most that one of several runs (N, P) ends below its own best.

    Example:
        >>> float(largest_fall(np.array([[0.1, 0.5, 0.25], [0.2, 0.3, 0.4]])))
        0.25
    """
    return float((values.max(axis=1) - values[:, -1]).max())


@dataclass(frozen=True)
class Evidence(Comparison):
    """An arm against the better of the outcome-only arms on a setting, with what it costs.

    Args:
        area: Difference of the areas under the curves.
        improvement: Probability that a run of ours ends above one of the rival's.
        reach: Share of the rival's rollouts after which our mean curve reaches the rival's end, with the interval over
            draws of seeds; infinite where it does not.
        with_rollouts: Difference where ours has as many rollouts less as its reward model took; None if that is all.
        longer: Difference at the end to the better outcome-only arm of as many rollouts as ours and the reward model's
            together; None without runs of each such arm.
        with_seconds: Difference to the better of the outcome-only arms that train as long as our reward model and our
            run take together, where they have taken that many seconds; None without runs of each such arm.
        drop: The most that one of our runs ends below its own best.
        ceiling: Difference to supervised steps at the end; None without them.
    """

    area: Estimate
    improvement: float
    reach: Estimate
    with_rollouts: Estimate | None
    longer: Estimate | None
    with_seconds: Estimate | None
    drop: float
    ceiling: Estimate | None


def evidence_of(runs: Runs, setting: str, arm: str) -> Evidence | None:
    """An arm against the better outcome-only arm, on the seeds that both have; None if one of them has no run.

    Args:
        runs: Runs of the study.
        setting: Its name.
        arm: Its name.
    """
    found, ours = compare_arm(runs, setting, arm), curves(runs, setting, arm)
    theirs = None if found is None else curves(runs, setting, found.rival)
    if found is None or ours is None or theirs is None:
        return None
    seeds, rollouts = shared_seeds(ours, theirs), ours.rollouts
    a, b = ours.of(seeds), theirs.of(seeds)
    return Evidence(
        **vars(found),
        area=difference(area(rollouts, a), area(rollouts, b)),
        improvement=improvement_probability(a[:, -1], b[:, -1]),
        reach=_reach(rollouts, a, b),
        with_rollouts=_with_rollouts_less(rollouts, a, b, ours.rm_rollouts),
        longer=end_difference(ours, _better(_all_curves(runs, setting, LONGER.values()))),
        with_seconds=_at_equal_seconds(runs, setting, ours),
        drop=largest_fall(a),
        ceiling=end_difference(ours, curves(runs, setting, CEILING)),
    )


def evidence(runs: Runs, arm: str) -> dict[str, Evidence]:
    """An arm against the better outcome-only arm on each setting where both have runs.

    Args:
        runs: Runs of the study.
        arm: Its name.
    """
    return {name: found for name in CONDITIONS if (found := evidence_of(runs, name, arm)) is not None}


def _better(rivals: Iterable[Curves]) -> Curves | None:
    """The one whose mean is higher at the end; None of none."""
    return max(rivals, key=lambda one: one.values[:, -1].mean(), default=None)


def _at_equal_seconds(runs: Runs, setting: str, ours: Curves) -> Estimate | None:
    """Our end less where the better outcome-only arm is after the seconds of our reward model and our run.

    An arm that is done before is at its end.
    """
    total = ours.rm_seconds + ours.seconds[-1]
    there = [
        replace(one, values=np.array([[np.interp(total, one.seconds, curve)] for curve in one.values]))
        for one in _all_curves(runs, setting, AS_LONG.values())
    ]
    return end_difference(ours, _better(there))


def _all_curves(runs: Runs, setting: str, arms: Iterable[str]) -> list[Curves]:
    """Curves of rivals, of which the better one counts: none where one has no runs, as it may be that one."""
    found = [curves(runs, setting, name) for name in arms]
    return [one for one in found if one is not None] if None not in found else []


def _reach(rollouts: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Share of the rollouts after which our mean curve reaches where theirs ends, from runs (N, P) of each.

    Its interval is that of draws of seeds, the same for both; quantiles are draws themselves, as some may be infinite.
    """

    def share(drawn: Any) -> float:
        target = theirs[drawn, -1].mean()
        return rollouts_to_reach(rollouts, ours[drawn].mean(axis=0), target) / float(rollouts[-1])

    count = len(ours)
    if count < FEWEST_SEEDS:
        return Estimate(share(slice(None)), np.nan, np.nan)
    draws = np.random.default_rng(0).integers(count, size=(1000, count))
    low, high = np.quantile([share(drawn) for drawn in draws], [0.025, 0.975], method="inverted_cdf")
    return Estimate(share(slice(None)), float(low), float(high))


def end_difference(ours: Curves | None, theirs: Curves | None) -> Estimate | None:
    """Difference of the last values on the seeds that both have; None without any."""
    seeds = shared_seeds(ours, theirs)
    if ours is None or theirs is None or not seeds:
        return None
    return difference(ours.of(seeds)[:, -1], theirs.of(seeds)[:, -1])


def area_difference(ours: Curves | None, theirs: Curves | None) -> Estimate | None:
    """Difference of the areas under curves of as many rollouts, on the seeds that both have; None without any."""
    seeds = shared_seeds(ours, theirs)
    if ours is None or theirs is None or not seeds or ours.rollouts[-1] != theirs.rollouts[-1]:
        return None
    return difference(area(ours.rollouts, ours.of(seeds)), area(theirs.rollouts, theirs.of(seeds)))


def _with_rollouts_less(rollouts: np.ndarray, ours: np.ndarray, theirs: np.ndarray, fewer: float) -> Estimate | None:
    """Difference to the rival's end where ours has made some rollouts less; None if that is all of them."""
    if fewer >= rollouts[-1]:
        return None
    return difference([np.interp(rollouts[-1] - fewer, rollouts, curve) for curve in ours], theirs[:, -1])
