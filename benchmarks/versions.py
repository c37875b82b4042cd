"""Question: does the suite pass with the lowest and with the newest allowed versions of all packages?

    make test-min    the lowest version that pyproject.toml allows, for every dependency
    make test-max    the newest that pip finds
    python -m benchmarks.versions --environment test-min tests/test_contract.py    some tests, in this environment

Runs pytest, whose arguments come after the options, and adds a row with the counts and all versions to
`benchmarks/results/versions.jsonl`; docs/versions.md shows the last row of each environment and choice of tests.
"""

import argparse
import itertools
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.places import REPOSITORY, RESULTS
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.versions import PACKAGES

BENCHMARK = "versions"
_COUNTS = ("tests", "failures", "errors", "skipped")
_WHOLE = "all"


def run_tests(arguments: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Run pytest.

    Args:
        arguments: Of pytest.

    Returns:
        Its exit status, and how many tests passed, failed (errors included) and were skipped.

    Raises:
        ValueError: If it ended before it could report.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        if not report.is_file():
            raise ValueError(f"pytest ended with status {status} and wrote no report. Look at what it printed.")
        return status, counts(report)


def counts(report: Path) -> dict[str, int]:
    """The counts of a JUnit report: `passed`, `failed`, `skipped`."""
    suites = xml.parse(report).getroot().iter("testsuite")
    found = {name: 0 for name in _COUNTS}
    for suite in suites:
        for name in _COUNTS:
            found[name] += int(suite.get(name, 0))
    failed = found["failures"] + found["errors"]
    return {"passed": found["tests"] - failed - found["skipped"], "failed": failed, "skipped": found["skipped"]}


def chosen_tests(arguments: Sequence[str]) -> list[str]:
    """The files and the `-k` expression that pytest is given; empty: the whole suite.

    Example:
        >>> chosen_tests(["-n", "2", "tests/test_a.py", "-k", "not slow"])
        ['test_a', '-k not slow']
    """
    files = [Path(one).stem for one in arguments if one.endswith(".py")]
    return files + [f"-k {after}" for one, after in itertools.pairwise(arguments) if one == "-k"]


def versions_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for the last row of each environment, Python and choice of tests: when, versions, counts."""
    last = {(row["arm"], row["config"]["python"], row["split"]): row for row in rows}
    heads = ("day", "environment", "Python", *PACKAGES[:-1], "tests", "passed", "failed", "skipped")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * (len(heads) - 3)}{'---:|' * 3}"]
    for row in last.values():
        versions = [str(row["versions"][name]) for name in PACKAGES[:-1]]
        tests = row["config"]["tests"]
        cells = [row["finished_at"][:10], f"`{row['arm']}`", row["config"]["python"], *versions]
        cells += [", ".join(f"`{one}`" for one in tests) or _WHOLE]
        cells += [f"{row['metrics'][name]:,}" for name in ("passed", "failed", "skipped")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--environment", required=True, help="name of the set of versions, such as test-min")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{BENCHMARK}.jsonl", help="file of rows")
    given, arguments = parser.parse_known_args()
    results, start = ResultsFile(given.results), time.perf_counter()
    status, found = run_tests(arguments)
    tests = chosen_tests(arguments)
    results.append(
        benchmark=BENCHMARK,
        arm=given.environment,
        dataset="tests",
        seed=None,
        split=" ".join(tests) or _WHOLE,
        metrics=found,
        config={"python": platform.python_version(), "tests": tests},
        seconds=time.perf_counter() - start,
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
