"""Writes the tables of README and docs from the rows in `benchmarks/results`; a test compares them.

Command: python benchmarks/tables.py
"""

from pathlib import Path
from typing import Any

from disaggregation_page import FIGURE, draw_figure, page
from scale_page import scale_page

from fractal_rm.report.tables import markdown_table, replace_table
from fractal_rm.results import read_results, write_atomic

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def last_rows(name: str, arms: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The last evaluation of each arm and seed of a quickstart's results file."""
    rows = [row for row in read_results(RESULTS / name) if row["split"] == "held_out"]
    last = max(row["metrics"]["rollouts"] for row in rows)
    chosen = [row for row in rows if row["metrics"]["rollouts"] == last and (arms is None or row["arm"] in arms)]
    return sorted(chosen, key=lambda row: (row["arm"], row["seed"]))


def documents() -> dict[Path, str]:
    """Each document with its tables made anew."""
    shown = ["accuracy", "accuracy_greedy", "step_accuracy", "step_auc", "within_bag_auc", "rollouts"]
    readme, quickstart = REPOSITORY / "README.md", REPOSITORY / "docs" / "quickstart.md"
    arms = ("dense+outcome", "outcome")
    short = markdown_table(last_rows("quickstart.jsonl", arms), metrics=shown)
    # One line a seed: a mean over a policy that learned and one that did not would describe neither.
    own = [row | {"arm": f"{row['arm']}, seed {row['seed']}"} for row in last_rows("quickstart_own_policy.jsonl", arms)]
    text = quickstart.read_text(encoding="utf-8")
    text = replace_table(text, "quickstart_arms", markdown_table(last_rows("quickstart.jsonl"), metrics=shown))
    text = replace_table(text, "quickstart_own_policy", markdown_table(own, metrics=shown[:5]))
    disaggregation = REPOSITORY / "docs" / "disaggregation.md"
    tables = page(disaggregation.read_text(encoding="utf-8"), read_results(RESULTS / "disaggregation.jsonl"))
    scale = REPOSITORY / "docs" / "scale.md"
    plan = scale_page(scale.read_text(encoding="utf-8"), read_results(RESULTS / "scale_plan.jsonl"))
    # One line a trainer: shares of the runs, and the mean step of the last whole checkpoint when they were killed.
    moments = read_results(RESULTS / "kill_and_resume.jsonl")
    killed = markdown_table(moments, metrics=["equal", "files_that_differ", "checkpoint_torn", "checkpoint_step"])
    return {
        disaggregation: tables,
        scale: replace_table(plan, "kill_and_resume", killed),
        readme: replace_table(readme.read_text(encoding="utf-8"), "quickstart", short),
        quickstart: text,
    }


if __name__ == "__main__":
    for path, text in documents().items():
        write_atomic(path, text)
    draw_figure(REPOSITORY / "docs" / FIGURE, read_results(RESULTS / "disaggregation.jsonl"))
