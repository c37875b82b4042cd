"""The rows of the comparison, as all that reads them sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

BENCHMARK = "dense_vs_outcome"
Rows = Sequence[Mapping[str, Any]]


def latest(rows: Rows, *, split: str = "held_out") -> list[Mapping[str, Any]]:
    """One row for each run and number of rollouts: the last one, if a run was stopped and started again."""
    found = {
        (row["dataset"], row["seed"], row["arm"], row["config"].get("trial"), row["metrics"]["rollouts"]): row
        for row in rows
        if row["split"] == split and row["benchmark"] == BENCHMARK
    }
    return list(found.values())
