"""The rows of the comparison, as all that reads them sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

BENCHMARK = "dense_vs_outcome"
Rows = Sequence[Mapping[str, Any]]
# Metrics of finished runs: by setting and arm, by seed, by rollouts.
Runs = Mapping[tuple[str, str], Mapping[int, Mapping[int, Mapping[str, Any]]]]


def latest(rows: Rows, *, split: str = "held_out") -> list[Mapping[str, Any]]:
    """One row for each run and number of rollouts: the last one, if a run was stopped and started again.

    Of a run that was made again with other settings only the rows of the last settings are left.
    """
    found: dict[tuple[Any, ...], dict[Any, Mapping[str, Any]]] = {}
    for row in rows:
        if row["split"] == split and row["benchmark"] == BENCHMARK:
            run = row["dataset"], row["seed"], row["arm"], row["config"].get("trial")
            points = found.setdefault(run, {})
            if points and _settings(next(iter(points.values()))) != _settings(row):
                points.clear()
            points[row["metrics"]["rollouts"]] = row
    return [row for points in found.values() for row in points.values()]


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row["config"].items() if name != "last"}


def finished_runs(rows: Rows) -> Runs:
    """The runs of the study whose last evaluation has its row."""
    found: dict[tuple[str, str], dict[int, dict[int, Mapping[str, Any]]]] = {}
    ended = set()
    for row in latest(rows):
        run, seed = (row["dataset"], row["arm"]), row["seed"]
        found.setdefault(run, {}).setdefault(seed, {})[row["metrics"]["rollouts"]] = row["metrics"]
        if row["config"]["last"]:
            ended.add((run, seed))
    finished = {run: {seed: found[run][seed] for seed in sorted(found[run]) if (run, seed) in ended} for run in found}
    return {run: seeds for run, seeds in finished.items() if seeds}
