"""Shared by comparisons with TRL's older trainers: their environments, how a side runs, and common options."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.places import REPOSITORY, RESULTS
from benchmarks.speed.sized_policy import SIZES, save_models

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


def speed_parser(
    description: str, name: str, arms: Sequence[str], *, python: Path | None = None, sizes: Sequence[str] = ("0.35M",)
) -> argparse.ArgumentParser:
    """The options that speed benchmarks share.

    Args:
        description: What is measured.
        name: Of the file of rows.
        arms: The comparisons.
        python: The rival's interpreter, if it needs one of its own.
        sizes: Measured on a CPU by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--arms", nargs="+", choices=list(arms), help="Default: all.")
    sized = f"Default: {', '.join(sizes)}; on a GPU 125M and 340M."
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help=sized)
    parser.add_argument("--model", type=Path, help="Folder of a causal language model, measured in place of `--sizes`.")
    parser.add_argument("--split", help="Name of `--model` in the rows, such as 135M; default: that of its folder.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--blocks", type=int, default=10, help="Of each side, beside the first, which is not counted.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    if python is not None:
        parser.add_argument("--peer-python", type=Path, default=python, help="Interpreter that has the rival's TRL.")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--smoke", action="store_true", help="The smallest run that goes through everything.")
    parser.set_defaults(cpu_sizes=list(sizes))
    return parser


def measured_models(
    given: argparse.Namespace, *, dtype: str | None = None
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """The models that are measured, each in a folder that is removed when the next one is asked for.

    Args:
        given: Arguments of [`speed_parser`].
        dtype: Of the weights; default: the one that is given.

    Yields:
        The `split` of the rows, the folder (see [`save_models`]), and what describes them in a row.
    """
    if given.model is not None:
        if not (given.model / "config.json").is_file():
            raise SystemExit(f"{given.model} is not a model folder: it holds no config.json. Give another `--model`.")
        sizes = [given.split or given.model.name]
    else:
        sizes = given.sizes or (given.cpu_sizes if given.device == "cpu" else ["125M", "340M"])
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            weights = getattr(torch, dtype or given.dtype)
            described = save_models(Path(folder), size, source=given.model, dtype=weights)
            split = f"{size}, {given.device}" + (f", {given.dtype}" if given.dtype != "float32" else "")
            yield split, Path(folder), described
