"""Question: which share of the package's lines and branches does the suite run?

    make coverage
    python -m benchmarks.coverage --report coverage.json    from the output of `coverage json` of an earlier run

Processes that tests start are counted too. One row for each room and one for all go to
`benchmarks/results/coverage.jsonl`; docs/testing.md shows the last run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.places import REPOSITORY, RESULTS
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.report.tables import markdown_table

BENCHMARK = "coverage"
ALL = "all"
_COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def run_tests(folder: Path) -> Path:
    """Run the suite under coverage, whose files go to a folder; the report in JSON.

    Raises:
        ValueError: If a test failed: what ran before it says nothing of the suite.
    """
    report, data = folder / "coverage.json", f"--data-file={folder / 'data'}"
    for arguments in (
        ["run", data, "-m", "pytest", "-q"],
        ["combine", "-q", data],
        ["json", "-q", data, f"-o{report}"],
    ):
        if subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=REPOSITORY, check=False).returncode:
            raise ValueError(f"`coverage {arguments[0]}` failed. Look at what it printed.")
    return report


def by_room(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Shares of lines and branches that ran, by room of the package, and of all.

    Args:
        report: What `coverage json` writes of a run with branches.

    Example:
        >>> counts = {"num_statements": 8, "covered_lines": 6, "num_branches": 2, "covered_branches": 1}
        >>> by_room({"files": {"fractal_rm/data/bag.py": {"summary": counts}}})["data"]
        {'statements': 8, 'lines': 0.75, 'branches': 0.5}
    """
    rooms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, file in report["files"].items():
        parts = Path(name).parts
        below = parts[len(parts) - parts[::-1].index("fractal_rm") :]
        for room in (below[0].removesuffix(".py"), ALL):
            rooms[room].update({count: file["summary"][count] for count in _COUNTS})
    return {
        room: {
            "statements": counts["num_statements"],
            "lines": _share(counts["covered_lines"], counts["num_statements"]),
            "branches": _share(counts["covered_branches"], counts["num_branches"]),
        }
        for room, counts in sorted(rooms.items(), key=lambda pair: pair[0] == ALL)
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def coverage_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last run: a line a room, all last."""
    last = {row["arm"]: {**row, "arm": f"`{row['arm']}`"} for row in rows}
    return markdown_table(list(last.values()), metrics=["statements", "lines", "branches"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--report", type=Path, help="what `coverage json` wrote; without it the suite runs")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{BENCHMARK}.jsonl", help="file of rows")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = json.loads((arguments.report or run_tests(Path(folder))).read_text())
    results, seconds = ResultsFile(arguments.results), time.perf_counter() - start
    for room, metrics in by_room(report).items():
        results.append(
            benchmark=BENCHMARK,
            arm=room,
            dataset="tests",
            seed=None,
            split=ALL,
            metrics=metrics,
            config={"coverage": report["meta"]["version"]},
            seconds=seconds,
        )


if __name__ == "__main__":
    main()
