"""Question: how many episodes a second does StepPPOTrainer do, and what do dense rewards cost?

Rivals: TRL 1.12's PPOTrainer, the last one, with the same four models (`make peer-env`); the same trainer with one
number per response from the same reward model; the same trainer with a rule instead of a reward model.

    python -m benchmarks.speed.ppo_speed

Both sides of a comparison are processes that alternate, a block of updates each. All sides have the same policy
(the shipped one inside a larger network, so that responses and their lengths are the same at every size), prompts,
sampling, epochs, minibatches and precision. A row has the medians in episodes a second, and the median of the ratios
of neighbouring blocks with a bootstrap interval. Rows go to `benchmarks/results/ppo_speed.jsonl`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed.alternation import Side, alternate, record
from benchmarks.speed.peers import PPO_PYTHON, measured_models, speed_parser
from fractal_rm.evaluation.results import ResultsFile


class Arm(NamedTuple):
    """A comparison: what we run, what it is compared with, and where the KL divergence goes."""

    ours: str
    rival: str
    kl: str = "reward"


ARMS = {
    "trl_ppo_1.12": Arm("dense", "trl_ppo"),
    # As in TRL since GRPO.
    "trl_ppo_1.12_kl_in_loss": Arm("dense", "trl_ppo", kl="loss"),
    # TRL 1.12 has no such option: values come from forward passes that the policy needs anyway.
    "trl_ppo_1.12_shared_value": Arm("shared", "trl_ppo"),
    "dense_over_outcome": Arm("dense", "outcome"),
    "dense_over_rule": Arm("dense", "rule"),
}


def side(arm: str, models: Path, given: argparse.Namespace, *, kl: str = "reward", stages: Path | None = None) -> Side:
    """Start one side.

    Args:
        arm: What it trains.
        models: Folder of its models.
        given: Arguments of the command line.
        kl: Where our trainer puts the KL divergence.
        stages: File for the seconds of each stage.
    """
    options = ["--rollouts", given.rollouts, "--device", given.device, "--dtype", given.dtype]
    options += ["--response-length", given.response_length, "--threads", given.threads]
    options += ["--kl", kl, *(["--stages", stages] if stages else [])]
    python = given.peer_python if arm == "trl_ppo" else None
    return Side(arm, "benchmarks.speed.ppo_speed_side", [arm, str(models), *map(str, options)], python=python)


def compare(arm: Arm, models: Path, given: argparse.Namespace) -> dict[str, float]:
    """The two sides of a comparison, in turns."""
    ours, rival = side(arm.ours, models, given, kl=arm.kl), side(arm.rival, models, given, kl=arm.kl)
    with ours, rival:
        return alternate(ours, rival, blocks=given.blocks, updates=given.updates)


def shares_of_stages(arm: str, models: Path, given: argparse.Namespace) -> dict[str, float]:
    """What dominates an update of one side: the share of its time that each stage takes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stages.json"
        with side(arm, models, given, stages=file) as running:
            total = sum(running.block(given.updates)["seconds"] for _ in range(2))
        seconds = json.loads(file.read_text())
    shares = {stage: took / total for stage, took in seconds.items()}
    return shares | {"everything_else": 1.0 - sum(shares.values())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons that the command line names."""
    description = "Episodes a second of PPO, against TRL 1.12 and against itself."
    parser = speed_parser(description, "ppo_speed", list(ARMS), python=PPO_PYTHON)
    parser.add_argument("--updates", type=int, default=3, help="In a block.")
    parser.add_argument("--rollouts", type=int, default=64, help="In an update.")
    parser.add_argument("--response-length", type=int, default=64, help="Most tokens of a response.")
    parser.add_argument("--no-stages", action="store_true", help="Leave out what dominates an update.")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.blocks, given.updates, given.rollouts, given.sizes = 1, 1, 8, ["0.2M"]
        given.arms = given.arms or ["trl_ppo_1.12", "dense_over_outcome"]
    has_peer = given.peer_python.exists()
    names = ("rollouts", "response_length", "blocks", "updates", "device", "dtype", "threads")
    settings = {name: getattr(given, name) for name in names}
    results = ResultsFile(given.results)
    for split, models, described in measured_models(given):
        work: list[tuple[str, str, Callable[[], dict[str, float]]]] = []
        for name in given.arms or ARMS:
            if ARMS[name].rival == "trl_ppo" and not has_peer:
                print(f"{name}: skipped, for TRL 1.12 is not here ({given.peer_python}). Run `make peer-env`.")
                continue
            work.append((name, ARMS[name].kl, partial(compare, ARMS[name], models, given)))
        for name in () if given.no_stages else ("dense", *(("trl_ppo",) if has_peer else ())):
            work.append((f"stages_of_{name}", "reward", partial(shares_of_stages, name, models, given)))
        for name, kl, measure in work:
            start = time.perf_counter()
            record(
                results,
                arm=name,
                metrics=measure(),
                benchmark="ppo_speed",
                split=split,
                config=described | {"kl": kl} | settings,
                seconds=time.perf_counter() - start,
            )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
