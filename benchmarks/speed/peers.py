"""What the comparisons with TRL's older trainers share: where these are, how a side runs, and common options."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.places import REPOSITORY, RESULTS
from benchmarks.speed.sized_policy import SIZES

# Interpreters that `make peer-env` makes.
PPO_PYTHON = REPOSITORY / ".venv-peer" / "bin" / "python"
PRM_PYTHON = REPOSITORY / ".venv-peer-prm" / "bin" / "python"


def environment() -> dict[str, str]:
    """The environment of a side: this one, offline, with the repository on the path."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | offline | {"PYTHONPATH": str(REPOSITORY)}


def run_side(module: str, arm: str, seed: int, given: argparse.Namespace, names: Sequence[str]) -> Any:
    """One run in a process and an environment of its own.

    Args:
        module: The benchmark, as `python -m` takes it.
        arm: The side: one of TRL runs with the peer's interpreter.
        seed: Of the run.
        given: Arguments of the command line.
        names: Of those that the side needs.

    Returns:
        What it said.

    Raises:
        RuntimeError: If it failed; the sentence holds the end of what it said.
    """
    python = given.peer_python if arm.startswith("trl_") else sys.executable
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    command = [str(python), "-m", module, "--side", arm, "--seed", str(seed), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{arm}, seed {seed}, ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def speed_parser(description: str, name: str, arms: Sequence[str], python: Path) -> argparse.ArgumentParser:
    """The options that speed benchmarks share.

    Args:
        description: What is measured.
        name: Of the file of rows.
        arms: The comparisons.
        python: The rival's interpreter.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--arms", nargs="+", choices=list(arms), help="Default: all.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="Default: 0.35M; on a GPU 125M and 340M.")
    parser.add_argument("--blocks", type=int, default=10, help="Of each side, beside the first, which is not counted.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", type=Path, default=python, help="Interpreter that has the rival's TRL.")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--smoke", action="store_true", help="The smallest run that goes through everything.")
    return parser


def sizes_of(given: argparse.Namespace) -> list[str]:
    """The sizes that are measured."""
    return given.sizes or (["0.35M"] if given.device == "cpu" else ["125M", "340M"])
