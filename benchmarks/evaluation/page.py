"""Tables of docs/evaluation.md, from the rows of `processbench.py` and `best_of_n.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.marks import replace_table
from fractal_rm.evaluation.processbench import SUBSETS
from fractal_rm.report.tables import markdown_table

FIGURES = ("first_error_accuracy", "all_correct_accuracy", "f1")
# Data sets of best-of-n, each with its tables.
DATASETS = ("gsm8k_solutions", "arithmetic")
READINGS = ("accuracy", "min", "product", "mean", "last")
Rows = Sequence[Mapping[str, Any]]


def page(document: str, processbench: Rows, best_of_n: Rows) -> str:
    """The page with its tables made anew.

    Args:
        document: Its text.
        processbench: Rows of `processbench.jsonl`.
        best_of_n: Rows of `best_of_n.jsonl`.
    """
    ordered = by_arm(processbench)
    columns = ["f1", "tuned_f1", "best_f1", *[f"f1_{name}" for name in SUBSETS], "truncated", "cpu_minutes_of_all"]
    document = table(document, "processbench", ordered, columns)
    detailed = [f"{figure}_{name}" for name in SUBSETS for figure in FIGURES[:2]]
    document = table(document, "processbench subsets", ordered, detailed)
    tuned = [f"tuned_f1_{name}" for name in SUBSETS]
    document = table(document, "processbench tuned", ordered, ["tuned_f1", *tuned, "tuned_threshold"])
    for name in DATASETS:
        rows = by_arm([row for row in best_of_n if row["dataset"] == name])
        keys = {key for row in rows for key in row["metrics"] if key.startswith("accuracy@")}
        sizes = sorted({int(key.partition("@")[2].partition("_")[0]) for key in keys})
        document = table(document, f"best_of_n {name}", rows, [f"accuracy@{n}" for n in sizes])
        most = max(sizes, default=0)
        learned = [row for row in rows if f"min@{most}" in row["metrics"] and not row["arm"].startswith("floor_")]
        document = table(document, f"best_of_n readings {name}", learned, [f"{reading}@{most}" for reading in READINGS])
        gains = [f"gain@{most}{end}" for end in ("", "_low", "_high")]
        document = table(document, f"best_of_n gains {name}", learned, gains)
    return document


def by_arm(rows: Rows) -> list[Mapping[str, Any]]:
    """Models first, then what learns nothing, then the ceiling."""
    return sorted(
        rows, key=lambda row: (row["arm"].startswith("ceiling_"), row["arm"].startswith("floor_"), row["arm"])
    )


def table(document: str, name: str, rows: Rows, columns: Sequence[str]) -> str:
    """The document with one table made anew; without rows it stays as it is."""
    present = [column for column in columns if any(column in row["metrics"] for row in rows)]
    return replace_table(document, name, markdown_table(rows, metrics=present)) if present else document
