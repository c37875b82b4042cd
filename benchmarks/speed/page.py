"""Tables of docs/speed.md from the rows of the speed and parity benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.marks import replace_table
from benchmarks.speed.plan_page import CHECKED
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.report.tables import markdown_table

SPEED = ("ours", "rival", "ratio", "ratio_low", "ratio_high", "cpu_time_ratio", "peak_memory_ratio")
PREFIXES = (*SPEED, "tokens_ratio", "ratio_over_tokens_ratio")
STAGES = "stages_of_"
# Splits of a real language model, which has tables of its own.
REAL = "135M"


def page(document: str, results: Path) -> str:
    """The document with its tables made anew.

    Args:
        document: Text of docs/speed.md.
        results: Folder of the rows.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        return ResultsFile(results / f"{name}.jsonl").rows()

    def is_real(row: Mapping[str, Any]) -> bool:
        return row["split"].startswith(REAL)

    timed = {name: rows(name) for name in ("ppo_speed", "rm_speed", "scoring_speed")}
    real = [row for name in timed for row in timed[name] if is_real(row)]
    ppo, reward_models, scoring = ([row for row in timed[name] if not is_real(row)] for name in timed)
    tables = {
        "ppo_speed": _table([row for row in ppo if not row["arm"].startswith(STAGES)], SPEED),
        "ppo_stages": _table([row for row in ppo if row["arm"].startswith(STAGES)]),
        "real_speed": _table([row for row in real if not row["arm"].startswith(STAGES)], SPEED),
        "real_stages": _table([row for row in real if row["arm"].startswith(STAGES)]),
        "rm_speed": _table(reward_models, SPEED),
        "scoring_speed": _table([row for row in scoring if row["arm"] != "alignment"], PREFIXES),
        "alignment": _table([row for row in scoring if row["arm"] == "alignment"]),
        "plan_check": _table(rows("plan_check"), CHECKED),
        "ppo_parity": _table(_learning(rows("ppo_parity"))),
        "prm_parity": _table(rows("prm_parity")),
    }
    for name, table in tables.items():
        document = replace_table(document, name, table)
    return document


def _table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] | None = None) -> str:
    """A table with the machine of its last row below, or a sentence where there is no row yet."""
    if not rows:
        return "No rows yet."
    present = {name for row in rows for name in row["metrics"]}
    shown = None if metrics is None else [name for name in metrics if name in present]
    machine = rows[-1]["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    date = rows[-1]["finished_at"].split("T")[0]
    return f"{markdown_table(rows, metrics=shown)}\n\nLast row: {where}, {date}."


def _learning(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Learning curves with one line a point."""
    found = [dict(row) | {"split": f"{row['metrics']['rollouts']} rollouts"} for row in rows]
    return sorted(found, key=lambda row: (row["metrics"]["rollouts"], row["arm"], row["seed"]))
