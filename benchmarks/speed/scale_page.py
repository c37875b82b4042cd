"""The tables of docs/scale.md, from the rows that `scale_plan.py` writes."""

from typing import Any

from benchmarks.common.marks import replace_table
from fractal_rm.report.tables import markdown_table

# What memory and time are spent on, and their sums.
MEMORY = ("weights", "gradients", "optimizer", "value", "reference", "reward", "activations", "generation", "total")
TIME = ("generate", "score", "evaluate", "update", "rollout")


def scale_page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with its tables made anew."""
    for size in ("7B", "70B"):
        planned = [row for row in rows if row["dataset"] == size]
        held = [f"{part}_gb" for part in MEMORY]
        text = replace_table(text, f"scale_memory_{size}", markdown_table(planned, metrics=[*held, "fits"]))
        # The latest row of a plan and arm counts, as in every table.
        fitting = [row for row in planned if row["metrics"]["fits"]]
        spent = markdown_table(fitting, metrics=[f"{part}_s" for part in TIME])
        text = replace_table(text, f"scale_time_{size}", spent)
    for name, arm in (("scale_bytes", "bytes"), ("scale_training", "training")):
        text = replace_table(text, name, markdown_table([row for row in rows if row["arm"] == arm]))
    return text
