"""How long does `fractal-rm train` take to its first step on a file of hundreds of megabytes, and with how much memory?

The command makes one step and ends. Arms: the whole file, and its first 1,000 rows (`--limit`). Measured are seconds of
the wall clock and of the processor (`cpu_seconds`, which other work on the machine changes less), and the most memory
that the process held. The rival is the package at another commit: `--package FOLDER` runs that checkout.

    python -m benchmarks.speed.large_file

Appends one row for each arm to `benchmarks/results/large_file.jsonl`. The file is made in a temporary folder.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.places import RESULTS
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

ARMS = {"whole": [], "limit": ["--limit", "1000"]}
REPOSITORY = RESULTS.parent.parent
SOLUTIONS = 1000


def write_rows(path: Path, megabytes: float) -> int:
    """Fill a file with sums in steps, every prompt another one, and return how many rows it has."""
    rng, solved = random.Random(0), []
    for _ in range(SOLUTIONS):
        value, steps = rng.randrange(100), []
        prompt = f"Problem %d: start at {value} and add the numbers one by one.\n"
        for _ in range(rng.randint(2, 8)):
            change = rng.randrange(1, 50)
            steps.append(f"{value} + {change} = {value + change}, so far.")
            value += change
        row = {"prompt": prompt, "completion": "\n".join(steps), "label": bool(rng.randrange(2))}
        solved.append(json.dumps(row) + "\n")
    count, written = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            written += file.write(solved[count % SOLUTIONS] % count)
            count += 1
    return count


def measure(argv: list[str], package: Path, patience: float) -> dict[str, Any]:
    """Wall and processor seconds and peak memory (MiB) of a command; None for the seconds of one that is stopped."""
    before, start = os.times(), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(package)}
    process = subprocess.Popen([sys.executable, "-m", "fractal_rm.cli.main", *argv], env=environment, cwd=package)
    try:
        if process.wait(timeout=patience):
            raise SystemExit(f"The command ended with status {process.returncode}.")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    after = os.times()
    done = process.returncode == 0
    # Linux keeps the maximum over all ended children, so the arm with the small file comes first.
    return {
        "seconds": time.perf_counter() - start if done else None,
        "cpu_seconds": sum(after[2:4]) - sum(before[2:4]),
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=float, default=500.0, help="size of the file")
    parser.add_argument("--package", type=Path, default=REPOSITORY, help="checkout whose package is run")
    parser.add_argument("--split", default="now", help="name of that package in the rows")
    parser.add_argument("--patience", type=float, default=1800.0, help="seconds after which a command is stopped")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["limit", "whole"], help="what to read")
    parser.add_argument("--results", type=Path, default=RESULTS / "large_file.jsonl", help="file of rows")
    given = parser.parse_args(arguments)
    results = ResultsFile(given.results)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = write_rows(file, given.megabytes)
        for arm in given.arms:
            start = time.perf_counter()
            argv = ["train", "--model", str(SHIPPED_POLICY), "--scorer", "token", "--train_file", str(file)]
            argv += ["--output_dir", f"{folder}/{arm}", "--max_steps", "1", "--report_to", "none", *ARMS[arm]]
            argv += ["--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true"]
            metrics = measure(argv, given.package, given.patience)
            results.append(
                benchmark="large_file",
                arm=arm,
                dataset="arithmetic",
                seed=0,
                split=given.split,
                metrics=metrics,
                config={"megabytes": given.megabytes, "rows": rows, "patience": given.patience},
                seconds=time.perf_counter() - start,
            )
            print(arm, metrics, flush=True)


if __name__ == "__main__":
    main()
