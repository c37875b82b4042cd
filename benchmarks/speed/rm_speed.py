"""Question: how many tokens a second does FractalTrainer train on, and what does grouping by length add?

Rivals: TRL 1.13's PRMTrainer, the last one, on labels of steps (`make peer-env`); TRL's RewardTrainer on preferences;
our own training without grouping.

    python -m benchmarks.speed.rm_speed

Both sides of a comparison are processes that alternate, a block of optimizer steps each, with the same texts,
backbone, batch size, optimizer and precision. Against the rivals every padded token counts, since each side pads to the
same widths; grouping by length is measured in real tokens, since padding is what it saves. Rows go to
`benchmarks/results/rm_speed.jsonl`.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.speed.alternation import Side, alternate, record
from benchmarks.speed.peers import PRM_PYTHON, measured_models, speed_parser
from fractal_rm.evaluation.results import ResultsFile


class Arm(NamedTuple):
    """A comparison: what we train on, the rival, and which tokens count."""

    ours: str
    rival: str
    count: str = "padded"


ARMS = {
    "trl_prm_1.13": Arm("labels", "prm"),
    "trl_reward_1.16": Arm("preferences", "reward"),
    "length_grouping": Arm("grouped", "labels", count="real"),
}


def compare(name: str, split: str, policy: Path, described: dict[str, object], given: argparse.Namespace) -> None:
    """One comparison, one row."""
    arm, results, start = ARMS[name], ResultsFile(given.results), time.perf_counter()
    options = ["--batch", given.batch, "--rows", given.rows, "--longest", given.longest]
    options += ["--dtype", given.dtype, "--device", given.device, "--threads", given.threads]
    arguments = [str(policy), *map(str, options), "--count", arm.count]

    def side(kind: str) -> Side:
        python = given.peer_python if kind == "prm" else None
        return Side(kind, "benchmarks.speed.rm_speed_side", [kind, *arguments], python=python)

    ours, rival = side(arm.ours), side(arm.rival)
    with ours, rival:
        metrics = alternate(ours, rival, blocks=given.blocks, updates=given.updates)
    settings = ("batch", "rows", "longest", "blocks", "updates", "device", "threads")
    record(
        results,
        arm=name,
        metrics=metrics,
        benchmark="rm_speed",
        split=split,
        config=described
        | {"count": arm.count, "autocast": given.dtype}
        | {setting: getattr(given, setting) for setting in settings},
        seconds=time.perf_counter() - start,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons that the command line names."""
    description = "Tokens a second in the training of reward models; weights are float32, `--dtype` is the autocast's."
    parser = speed_parser(description, "rm_speed", list(ARMS), python=PRM_PYTHON)
    parser.add_argument("--updates", type=int, default=10, help="Optimizer steps in a block.")
    parser.add_argument("--batch", type=int, default=32, help="Responses in a batch.")
    parser.add_argument("--rows", type=int, default=8192, help="Rows of training data.")
    parser.add_argument("--longest", type=int, default=10, help="Most steps of a response; the shortest have two.")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.blocks, given.updates, given.batch, given.rows, given.sizes = 1, 1, 4, 32, ["0.2M"]
    for split, models, described in measured_models(given, dtype="float32"):
        for name in given.arms or ARMS:
            if ARMS[name].rival == "prm" and not given.peer_python.exists():
                print(f"{name}: skipped, for TRL 1.13 is not here ({given.peer_python}). Run `make peer-env`.")
                continue
            compare(name, split, models / "policy", described, given)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
