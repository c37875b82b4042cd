"""Shared by the trials on development seeds: their arguments, and the file of their rows."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.places import RESULTS
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS, ShippedArithmetic
from fractal_rm.tasks.task import Task

ROWS = RESULTS / "dense_vs_outcome_development.jsonl"
FIRST_SEED = 2000
# The settings of the study, and the task of the quickstart, whose base policy the package ships.
TASKS: dict[str, Task] = {**CONDITIONS, ShippedArithmetic.name: ShippedArithmetic()}


def parse_arguments(description: str | None, tried: str, choices: Iterable[str]) -> argparse.Namespace:
    """Settings, seeds that no study reports, the work folder, and which of the things to try.

    Args:
        description: Of the script.
        tried: Name of the option for what is tried.
        choices: What there is to try; all of it by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["easy", "medium"], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[FIRST_SEED, FIRST_SEED + 1])
    parser.add_argument(f"--{tried}", nargs="+", default=list(choices), choices=list(choices))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"))
    arguments = parser.parse_args()
    if min(arguments.seeds) < FIRST_SEED:
        parser.error(f"Seeds below {FIRST_SEED} are those of the study. Give seeds from {FIRST_SEED} on.")
    return arguments
