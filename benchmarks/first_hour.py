"""Question: how long is the help of each command, and how long do the help and the answer to a typo take?

    python -m benchmarks.first_hour

Each call is a new process. Seconds are wall time and processor time (`cpu_seconds`, which other work on the machine
does not change), each the minimum of several tries. Rows go to `benchmarks/results/first_hour.jsonl`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.places import RESULTS
from fractal_rm.cli.main import COMMANDS
from fractal_rm.cli.options.help import options_of
from fractal_rm.evaluation.results import ResultsFile

WIDTH = 80
# The calls: arguments after the command; the last one is a flag that no command has. Commands with choices also get a
# wrong choice.
CALLS = {"help": ["--help"], "help_all": ["--help", "all"], "typo": ["--modle", "x"]}


def measure(argv: list[str], tries: int) -> dict[str, float]:
    """Lines that a call of the command line prints, and the least seconds it takes."""
    environment = os.environ | {"COLUMNS": str(WIDTH)}
    wall, cpu, lines = [], [], 0
    for _ in range(tries):
        start, before = time.perf_counter(), os.times()
        command = [sys.executable, "-m", "fractal_rm.cli.main", *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        after = os.times()
        wall.append(time.perf_counter() - start)
        cpu.append(sum(after[2:4]) - sum(before[2:4]))  # of child processes
        lines = len((done.stdout + done.stderr).splitlines())
    return {"lines": lines, "seconds": min(wall), "cpu_seconds": min(cpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tries", type=int, default=3, help="processes for each call")
    parser.add_argument("--results", type=Path, default=RESULTS / "first_hour.jsonl", help="file of rows")
    given = parser.parse_args()
    results = ResultsFile(given.results)
    calls = {(name, call): [name, *flags] for name in COMMANDS for call, flags in CALLS.items()}
    for name in COMMANDS:
        chosen = next((option.name for option in options_of(name).options if option.choices), None)
        if chosen is not None:
            calls[name, "choice"] = [name, f"--{chosen}", "x"]
    for (name, call), argv in {**calls, ("fractal-rm", "typo"): ["trian"]}.items():
        start = time.perf_counter()
        metrics = measure(argv, given.tries)
        results.append(
            benchmark="first_hour",
            arm=call,
            dataset=name,
            seed=None,
            split="command line",
            metrics=metrics,
            config={"tries": given.tries, "width": WIDTH},
            seconds=time.perf_counter() - start,
        )
        print(f"{name} {call}: {metrics['lines']} lines, {metrics['seconds']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
