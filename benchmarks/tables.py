"""Writes the tables of README and docs from the rows in `benchmarks/results`; a test compares them.

Command: python benchmarks/tables.py
"""

from pathlib import Path
from typing import Any

from fractal_rm.report.tables import markdown_table, replace_table
from fractal_rm.results import read_results, write_atomic

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def quickstart_rows(arms: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The last evaluation of each arm and seed of the quickstart's small budget."""
    rows = [row for row in read_results(RESULTS / "quickstart.jsonl") if row["split"] == "held_out"]
    last = max(row["metrics"]["rollouts"] for row in rows)
    chosen = [row for row in rows if row["metrics"]["rollouts"] == last and (arms is None or row["arm"] in arms)]
    return sorted(chosen, key=lambda row: (row["arm"], row["seed"]))


def documents() -> dict[Path, str]:
    """Each document with its tables made anew."""
    shown = ["accuracy", "accuracy_greedy", "step_accuracy", "step_auc", "within_bag_auc", "rollouts"]
    readme, page = REPOSITORY / "README.md", REPOSITORY / "docs" / "quickstart.md"
    short = markdown_table(quickstart_rows(("dense+outcome", "outcome")), metrics=shown)
    return {
        readme: replace_table(readme.read_text(encoding="utf-8"), "quickstart", short),
        page: replace_table(
            page.read_text(encoding="utf-8"), "quickstart_arms", markdown_table(quickstart_rows(), metrics=shown)
        ),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        write_atomic(path, text)
