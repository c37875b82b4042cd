"""What FRACTAL gains over each rival of the benchmark `disaggregation`, paired over responses."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.disaggregation.data import Data
from fractal_rm.evaluation import statistics as metrics
from fractal_rm.evaluation.intervals import paired_difference
from fractal_rm.evaluation.responses import gold_labels as gold
from fractal_rm.evaluation.results import ResultsFile

OURS = ("fractal", "fractal_gold_10")
DRAWS = 2000


def within_bag_aucs(file_pattern: str, folder: Path, labels: Sequence[np.ndarray]) -> np.ndarray | None:
    """For each response with both kinds of step its AUC, averaged over the seeds of an arm; None without scores."""
    files = sorted(folder.glob(file_pattern))
    found = []
    for file in files:
        with np.load(file) as saved:
            cuts = np.cumsum(saved["lengths"])[:-1]
            found.append(metrics.bag_aucs(np.split(saved["scores"], cuts), labels))
    if not found:
        return None
    mean = np.mean(found, axis=0)
    return mean[~np.isnan(mean)]


def gains(data: Data, folder: Path, arms: Sequence[str]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Our arm, its rival, and the difference of their within-bag AUCs with its interval."""
    labels = [gold(bag) for bag in data.splits["test"]]
    aucs = {arm: within_bag_aucs(f"{arm}-*.npz", folder / data.name, labels) for arm in arms}
    for ours in OURS:
        for rival, theirs in aucs.items():
            mine = aucs.get(ours)
            if rival != ours and mine is not None and theirs is not None:
                found = paired_difference(mine, theirs, draws=DRAWS)
                yield ours, rival, {
                    "gain": found.value, "gain_low": found.low, "gain_high": found.high, "mixed_bags": len(mine),
                }  # fmt: skip


def write_gains(load: Callable[[str], Data], datasets: Sequence[str], folder: Path, results: Path) -> None:
    """Append a row for each comparison that has none with the same numbers."""
    target = ResultsFile(results)
    rows = target.rows()
    known: dict[Any, dict[str, float]] = {
        (row["dataset"], row["arm"], row["config"]["rival"]): row["metrics"] for row in rows if row["split"] == "gain"
    }
    for name in datasets:
        arms = list(dict.fromkeys(row["arm"] for row in rows if row["dataset"] == name and row["split"] == "test"))
        for ours, rival, found in gains(load(name), folder, arms):
            before, now = (
                np.array([*one.values()], dtype=float) for one in (known.get((name, ours, rival), {}), found)
            )
            if len(before) != len(now) or not np.allclose(before, now, rtol=0.0, atol=1e-9, equal_nan=True):
                target.append(
                    benchmark="disaggregation", arm=ours, dataset=name, seed=None, split="gain", metrics=found,
                    config={"rival": rival, "metric": "within_bag_auc"}, seconds=0.0,
                )  # fmt: skip
