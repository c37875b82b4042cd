"""Curves of the comparison, and paired differences with intervals, from its rows.

A run's curve is its held-out accuracy at fixed numbers of rollouts. Seeds pair the arms: with the same seed they have
the same policy, prompts and held-out problems. Intervals are percentile bootstraps over five or more seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fractal_rm.evaluation.intervals import Estimate, paired_difference
from fractal_rm.study.arms import OUTCOME_ONLY
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS

BENCHMARK = "dense_vs_outcome"
Rows = Sequence[Mapping[str, Any]]
# Metrics of finished runs: by setting and arm, by seed, by rollouts.
Runs = Mapping[tuple[str, str], Mapping[int, Mapping[int, Mapping[str, Any]]]]
# With fewer seeds a bootstrap is meaningless: differences have no interval, and no claim is decided.
FEWEST_SEEDS = 5


def latest(rows: Rows, *, split: str = "held_out", benchmark: str = BENCHMARK) -> list[Mapping[str, Any]]:
    """One row for each run and number of rollouts: the last one, if a stopped run was started again.

    If a run was repeated with other settings, only the rows of its last settings remain.
    """
    found: dict[tuple[Any, ...], dict[Any, Mapping[str, Any]]] = {}
    for row in rows:
        if row["split"] == split and row["benchmark"] == benchmark and "rollouts" in row["metrics"]:
            run = row["dataset"], row["seed"], row["arm"], row["config"].get("trial")
            points = found.setdefault(run, {})
            if points and _settings(next(iter(points.values()))) != _settings(row):
                points.clear()
            points[row["metrics"]["rollouts"]] = row
    return [row for points in found.values() for row in points.values()]


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row["config"].items() if name != "last"}


def finished_runs(rows: Rows, *, benchmark: str = BENCHMARK) -> Runs:
    """The runs of the study whose last evaluation has a row."""
    found: dict[tuple[str, str], dict[int, dict[int, Mapping[str, Any]]]] = {}
    ended = set()
    for row in latest(rows, benchmark=benchmark):
        run, seed = (row["dataset"], row["arm"]), row["seed"]
        found.setdefault(run, {}).setdefault(seed, {})[row["metrics"]["rollouts"]] = row["metrics"]
        if row["config"]["last"]:
            ended.add((run, seed))
    finished = {run: {seed: found[run][seed] for seed in sorted(found[run]) if (run, seed) in ended} for run in found}
    return {run: seeds for run, seeds in finished.items() if seeds}


@dataclass(frozen=True)
class Curves:
    """The learning curves of an arm on a setting, one row per seed."""

    rollouts: np.ndarray  # rollouts at each point (P,)
    seeds: tuple[int, ...]  # in the order of the rows
    values: np.ndarray  # a metric (seeds, P)
    rm_rollouts: float  # rollouts for the reward model's training data, mean over seeds
    rm_seconds: float  # CPU seconds to make the reward model, mean over seeds
    seconds: np.ndarray  # CPU seconds of training up to each point (P,), mean over seeds

    def of(self, seeds: Sequence[int]) -> np.ndarray:
        """Values of these seeds (S, P)."""
        return self.values[[self.seeds.index(seed) for seed in seeds]]


def curves(runs: Runs, setting: str, arm: str, metric: str = "accuracy") -> Curves | None:
    """The curves of an arm on a setting from its finished runs; None without any."""
    finished = runs.get((setting, arm), {})
    # Points that every seed has: greedy accuracy is measured only at some.
    has = [{n for n, metrics in run.items() if metrics.get(metric) is not None} for run in finished.values()]
    points = sorted(set.intersection(*has)) if has else []
    if not points:
        return None
    table = [[run[n] for n in points] for run in finished.values()]

    def mean(name: str) -> np.ndarray:
        return np.array([[metrics[name] for metrics in line] for line in table], dtype=float).mean(axis=0)

    values = np.array([[metrics[metric] for metrics in line] for line in table], dtype=float)
    rm_rollouts, rm_seconds = float(mean("rm_rollouts")[-1]), float(mean("rm_seconds")[-1])
    return Curves(np.array(points), tuple(finished), values, rm_rollouts, rm_seconds, mean("seconds"))


def interquartile_mean(values: Any) -> float:
    """Mean of the middle half of the values: less affected by a single run than the mean, more precise than the median.

    If a quarter of their number is not an integer, the values at the edges count in part.

    Source:
        Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021.

    Example:
        >>> interquartile_mean([0.0, 1.0, 2.0, 100.0])
        1.5
    """
    ordered = np.sort(np.asarray(values, dtype=float).ravel())
    edges = np.arange(len(ordered) + 1) / len(ordered)
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return float(ordered @ weights / weights.sum())


def makes_gain(values: np.ndarray) -> bool:
    """Whether runs (N, P) end above their start by an interval above 0, or with too few runs by their mean.

    Example:
        >>> makes_gain(np.array([[0.1, 0.5]] * 5)), makes_gain(np.array([[0.1, 0.1]] * 5))
        (True, False)
    """
    gain = difference(values[:, -1], values[:, 0])
    return (gain.value if np.isnan(gain.low) else gain.low) > 0


def half_gain_point(values: np.ndarray) -> int:
    """The first evaluation at which the mean curve of runs (N, P) has made half of its gain from start to end.

    For runs without a gain ([`makes_gain`]) it is the last evaluation.

    Example:
        >>> half_gain_point(np.array([[0.1, 0.2, 0.4, 0.5]] * 5)), half_gain_point(np.array([[0.1, 0.2, 0.1]] * 5))
        (2, 2)
    """
    curve = values.mean(axis=0)
    if not makes_gain(values):
        return len(curve) - 1
    return int(np.argmax(curve >= curve[0] + 0.5 * (curve[-1] - curve[0])))


@dataclass(frozen=True)
class Comparison:
    """An arm against the better outcome-only arm on a setting."""

    rival: str  # the outcome-only arm with the higher mean accuracy at the end
    seeds: int  # number of seeds that both have
    learns: bool  # the rival ends above its start, by an interval that excludes 0
    half_rollouts: float  # rollouts at half of the rival's gain; its last ones without a gain
    half: Estimate  # difference at `half_rollouts`
    end: Estimate  # difference at the end
    means: tuple[float, float]  # accuracy at the end: this arm's, the rival's


def compare_arm(runs: Runs, setting: str, arm: str) -> Comparison | None:
    """An arm against the better outcome-only arm, on the seeds that both have; None if one of them has no run."""
    ours = curves(runs, setting, arm)
    rivals = {name: found for name in OUTCOME_ONLY if (found := curves(runs, setting, name)) is not None}
    if ours is None or not rivals:
        return None
    rival = max(rivals, key=lambda name: rivals[name].values[:, -1].mean())
    theirs = rivals[rival]
    seeds = shared_seeds(ours, theirs)
    if not seeds:
        return None
    a, b = ours.of(seeds), theirs.of(seeds)
    half = half_gain_point(theirs.values)
    return Comparison(
        rival=rival,
        seeds=len(seeds),
        learns=makes_gain(theirs.values),
        half_rollouts=float(ours.rollouts[half]),
        half=difference(a[:, half], b[:, half]),
        end=difference(a[:, -1], b[:, -1]),
        means=(float(a[:, -1].mean()), float(b[:, -1].mean())),
    )


def comparisons(runs: Runs, arm: str) -> dict[str, Comparison]:
    """An arm against the better outcome-only arm on each setting where both have runs."""
    return {name: found for name in CONDITIONS if (found := compare_arm(runs, name, arm)) is not None}


def shared_seeds(ours: Curves | None, theirs: Curves | None) -> list[int]:
    """The seeds that both arms have."""
    return sorted(set(ours.seeds) & set(theirs.seeds)) if ours is not None and theirs is not None else []


def difference(ours: Any, theirs: Any) -> Estimate:
    """Mean difference over paired seeds; its interval is NaN if there are too few."""
    found = paired_difference(ours, theirs)
    return found if len(ours) >= FEWEST_SEEDS else Estimate(found.value, np.nan, np.nan)
