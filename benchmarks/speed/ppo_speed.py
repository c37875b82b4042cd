"""Question: how many episodes a second does StepPPOTrainer do, and what do dense rewards cost?

Rivals: TRL 1.12's PPOTrainer, the last one, with the same four models (`make peer-env`); the same trainer with one
number a response from the same reward model; the same trainer with a rule in place of a reward model.

    python -m benchmarks.speed.ppo_speed

Both sides of a comparison are processes that work in turns, a block of updates each. All sides have the same policy
(the shipped one inside a larger network, so that responses and their lengths are the same at every size), prompts,
sampling, epochs, minibatches and precision. A row holds the medians in episodes a second, and the median of the ratios
of neighbouring blocks with a bootstrap interval. Rows go to `benchmarks/results/ppo_speed.jsonl`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.places import REPOSITORY, RESULTS
from benchmarks.speed.alternation import Side, alternate, record
from benchmarks.speed.sized_policy import SIZES, save_models
from fractal_rm.evaluation.results import ResultsFile

PEER_PYTHON = REPOSITORY / ".venv-peer" / "bin" / "python"
MODULE = "benchmarks.speed.ppo_speed_side"


class Arm(NamedTuple):
    """A comparison: what we run, what it is compared with, and where the KL divergence goes."""

    ours: str
    rival: str
    kl: str = "reward"


ARMS = {
    "trl_ppo_1.12": Arm("dense", "trl_ppo"),
    # TRL's own place for it since GRPO.
    "trl_ppo_1.12_kl_in_loss": Arm("dense", "trl_ppo", kl="loss"),
    # TRL 1.12 has no such option: values from the forward passes of the policy that there are anyway.
    "trl_ppo_1.12_shared_value": Arm("shared", "trl_ppo"),
    "dense_over_outcome": Arm("dense", "outcome"),
    "dense_over_rule": Arm("dense", "rule"),
}


class Bench:
    """Runs comparisons and appends their rows.

    Args:
        arguments: Those of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results = ResultsFile(arguments.results)

    def side(self, arm: str, models: Path, kl: str, *, stages: Path | None = None) -> Side:
        """Start one side."""
        given = self.arguments
        options = ["--rollouts", given.rollouts, "--device", given.device, "--dtype", given.dtype]
        options += ["--threads", given.threads, "--kl", kl, *(["--stages", stages] if stages else [])]
        python = given.peer_python if arm == "trl_ppo" else None
        return Side(arm, MODULE, [arm, str(models), *map(str, options)], python=python)

    def compare(self, name: str, size: str, models: Path, described: dict[str, Any]) -> None:
        """One comparison, one row."""
        arm, start = ARMS[name], time.perf_counter()
        ours, rival = self.side(arm.ours, models, arm.kl), self.side(arm.rival, models, arm.kl)
        with ours, rival:
            metrics = alternate(ours, rival, blocks=self.arguments.blocks, updates=self.arguments.updates)
        self.append(name, size, metrics, described | {"kl": arm.kl}, time.perf_counter() - start)

    def profile(self, side: str, size: str, models: Path, described: dict[str, Any]) -> None:
        """What dominates an update of one side: the share of its time that each stage takes."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stages.json"
            with self.side(side, models, "reward", stages=file) as running:
                total = sum(running.block(self.arguments.updates)["seconds"] for _ in range(2))
            seconds = json.loads(file.read_text())
        shares = {stage: took / total for stage, took in seconds.items()}
        shares["everything_else"] = 1.0 - sum(shares.values())
        self.append(f"stages_of_{side}", size, shares, described | {"kl": "reward"}, time.perf_counter() - start)

    def append(self, arm: str, size: str, metrics: dict[str, Any], described: dict[str, Any], seconds: float) -> None:
        """Write a row and show it."""
        given = self.arguments
        settings = ("rollouts", "blocks", "updates", "device", "dtype", "threads")
        record(
            self.results,
            arm=arm,
            metrics=metrics,
            benchmark="ppo_speed",
            split=f"{size}, {given.device}",
            config=described | {name: getattr(given, name) for name in settings},
            seconds=seconds,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons that the command line names."""
    parser = argparse.ArgumentParser(description="Episodes a second of PPO, against TRL 1.12 and against itself.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="Default: all.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="Default: 0.35M; on a GPU 125M and 340M.")
    parser.add_argument("--blocks", type=int, default=10, help="Of each side, beside the first, which is not counted.")
    parser.add_argument("--updates", type=int, default=3, help="In a block.")
    parser.add_argument("--rollouts", type=int, default=64, help="In an update.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="Interpreter that has TRL 1.12.")
    parser.add_argument("--no-stages", action="store_true", help="Leave out what dominates an update.")
    parser.add_argument("--results", type=Path, default=RESULTS / "ppo_speed.jsonl")
    parser.add_argument("--smoke", action="store_true", help="The smallest run that goes through everything.")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.blocks, given.updates, given.rollouts, given.sizes = 1, 1, 8, ["0.2M"]
        given.arms = given.arms or ["trl_ppo_1.12", "dense_over_outcome"]
    given.sizes = given.sizes or (["0.35M"] if given.device == "cpu" else ["125M", "340M"])
    has_peer = given.peer_python.exists()
    bench = Bench(given)
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            described = save_models(Path(folder), size, dtype=getattr(torch, given.dtype))
            for name in given.arms or ARMS:
                if ARMS[name].rival == "trl_ppo" and not has_peer:
                    print(f"{name}: skipped, for TRL 1.12 is not here ({given.peer_python}). Run `make peer-env`.")
                    continue
                bench.compare(name, size, Path(folder), described)
            for side in () if given.no_stages else ("dense", *(("trl_ppo",) if has_peer else ())):
                bench.profile(side, size, Path(folder), described)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
