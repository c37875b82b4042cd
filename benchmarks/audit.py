"""What do scanners find: bandit in the sources, pip-audit in installed packages, schemathesis in the scoring server?

    python -m benchmarks.audit          # with the extra `audit`; `make audit` installs it

bandit leaves out the rules that SECURITY.md explains. pip-audit looks up known vulnerabilities; packages for which it
cannot reach the database are counted. schemathesis sends requests that follow the schema of a server with an untrained
model, and requests that do not. Rows go to `benchmarks/results/audit.jsonl`; the exit status is 1 if anything was
found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.places import REPOSITORY, RESULTS
from benchmarks.common.servers import save_model, serving
from fractal_rm.evaluation.results import ResultsFile

# Rules of bandit that are left out; SECURITY.md has the reason of each.
EXPLAINED = ("B101", "B105", "B106", "B310", "B311", "B404", "B506", "B603", "B607", "B615", "B704")
# A check of schemathesis that is left out: requests may follow the schema and still be refused, because a schema cannot
# express every rule; its description lists these rules.
NOT_CHECKED = ("positive_data_acceptance",)
EXAMPLES = 100


class Found(NamedTuple):
    """What a scanner looked at, and what it found.

    Args:
        checked: How much was looked at.
        unit: Of what.
        findings: A line each.
        left_out: How much of the same unit could not be looked at.
    """

    checked: int
    unit: str
    findings: list[str]
    left_out: int = 0


def scan(name: str, *arguments: str) -> str:
    """What a scanner of this environment prints; it fails where it finds something."""
    command = [str(Path(sys.executable).parent / name), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout


def bandit() -> Found:
    """Rules on the source."""
    told = json.loads(scan("bandit", "-q", "-r", "fractal_rm", "recipes", "-f", "json", "-s", ",".join(EXPLAINED)))
    findings = [f"{one['test_id']} {one['filename']}:{one['line_number']}" for one in told["results"]]
    return Found(told["metrics"]["_totals"]["loc"], "lines", findings)


def pip_audit() -> Found:
    """Known vulnerabilities of the packages that are installed."""
    told = json.loads(scan("pip-audit", "-f", "json", "--progress-spinner", "off") or '{"dependencies": []}')
    known = [one for one in told["dependencies"] if "vulns" in one]
    findings = [f"{one['name']} {one['version']}: {flaw['id']}" for one in known for flaw in one["vulns"]]
    return Found(len(known), "packages", findings, left_out=len(told["dependencies"]) - len(known))


def schemathesis() -> Found:
    """Requests that follow the schema of a running server, and requests that do not."""
    with tempfile.TemporaryDirectory() as place:
        report, model = Path(place) / "report.json", save_model(Path(place) / "model")
        with serving(model, Path(place) / "log") as server:
            flags = ["--checks", "all", "--exclude-checks", ",".join(NOT_CHECKED), "--max-examples", str(EXAMPLES)]
            flags += ["--seed", "0", "--report", "json", "--report-json-path", str(report)]
            print(scan("schemathesis", "run", f"http://127.0.0.1:{server.port}/openapi.json", *flags))
        return read_report(json.loads(report.read_text(encoding="utf-8")))


def read_report(report: Mapping[str, Any]) -> Found:
    """What schemathesis says in JSON."""
    failed = [f"{one['title']} ({', '.join(one['operations'])}): {one['count']}" for one in report["failures"]]
    failed += [f"{one['title']}: {one['count']}" for one in report["errors"]]
    return Found(report["test_cases"]["generated"], "requests", failed)


SCANNERS: dict[str, Callable[[], Found]] = {"bandit": bandit, "pip-audit": pip_audit, "schemathesis": schemathesis}


def run(results: ResultsFile, name: str) -> Found:
    """Run a scanner, append its row, and print what it found."""
    began = time.perf_counter()
    found = SCANNERS[name]()
    results.append(
        benchmark="audit",
        arm=name,
        dataset=found.unit,
        seed=None,
        split="audit",
        metrics={"checked": found.checked, "left_out": found.left_out, "findings": len(found.findings)},
        config={"version": version(name), "findings": found.findings},
        seconds=time.perf_counter() - began,
    )
    print(f"{name}: {found.checked:,} {found.unit}, {len(found.findings)} findings.")
    if found.left_out:
        print(f"{name} reached no data for {found.left_out:,} {found.unit}.")
    print("".join(f"  {one}\n" for one in found.findings), end="", flush=True)
    return found


def audit_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for the last run of each scanner, as Markdown."""
    last = {row["arm"]: row for row in rows}
    lines = ["| scanner | version | looked at | left out | findings | on |", "|---|---|---:|---:|---:|---|"]
    for name, row in sorted(last.items()):
        metrics, day = row["metrics"], row["finished_at"].partition("T")[0]
        counts = f"{metrics['checked']:,} {row['dataset']} | {metrics['left_out']:,} | {metrics['findings']:,}"
        lines.append(f"| {name} | {row['config']['version']} | {counts} | {day} |")
    return "\n".join(lines)


def main() -> None:
    """Run the scanners and append their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--scanners", nargs="+", choices=list(SCANNERS), default=list(SCANNERS))
    parser.add_argument("--results", default=str(RESULTS / "audit.jsonl"))
    given = parser.parse_args()
    results = ResultsFile(given.results)
    found = [run(results, name) for name in given.scanners]
    sys.exit(any(one.findings for one in found))


if __name__ == "__main__":
    main()
