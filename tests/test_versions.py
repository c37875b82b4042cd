"""The runs with the lowest and the newest versions: what is pinned, what is counted, what the page shows."""

import re
import subprocess
import sys
import tomllib

from conftest import REPOSITORY
from packaging.requirements import Requirement

from benchmarks.versions import counts, versions_table
from fractal_rm.versions import PACKAGES


def test_test_min_pins_the_lower_bound_of_every_package():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    code = re.search(r"^LOWEST := (.*)$", makefile, re.MULTILINE)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    pins = [Requirement(line) for line in done.stdout.splitlines()]
    needed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert [one.name for one in pins] == [Requirement(one).name for one in needed]
    for pin, one in zip(pins, needed, strict=True):
        (found,), (lowest,) = pin.specifier, Requirement(one).specifier
        assert (found.operator, lowest.operator, found.version) == ("==", ">=", lowest.version)


def test_errors_count_as_failed_and_the_rest_as_passed(tmp_path):
    suites = '<testsuite tests="9" failures="1" errors="2" skipped="3"/><testsuite tests="1" failures="0" errors="0"/>'
    (tmp_path / "report.xml").write_text(f"<testsuites>{suites}</testsuites>")
    assert counts(tmp_path / "report.xml") == {"passed": 4, "failed": 3, "skipped": 3}


def test_the_page_shows_the_last_run_of_each_environment_and_choice():
    row = {
        "arm": "test-min",
        "split": "test_a",
        "config": {"python": "3.11.7", "tests": ["test_a"]},
        "metrics": {"passed": 1, "failed": 1, "skipped": 0},
        "versions": dict.fromkeys(PACKAGES, "1.0"),
        "finished_at": "2026-11-29T10:00:00+00:00",
    }
    later = row | {"metrics": {"passed": 1234, "failed": 0, "skipped": 2}, "finished_at": "2026-11-30T10:00:00+00:00"}
    whole = later | {"arm": "test-max", "split": "all", "config": {"python": "3.13.0", "tests": []}}
    lines = versions_table([row, later, whole]).splitlines()[2:]
    versions = " | ".join(["1.0"] * 6)
    assert lines == [
        f"| 2026-11-30 | `test-min` | 3.11.7 | {versions} | `test_a` | 1,234 | 0 | 2 |",
        f"| 2026-11-30 | `test-max` | 3.13.0 | {versions} | all | 1,234 | 0 | 2 |",
    ]
