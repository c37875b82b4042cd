"""Question: with equal rollouts, do dense step rewards beat outcome-only rewards on the arithmetic task, and
which forms do?

Rival: the arm `outcome` (PPO with the exact checker's outcome reward only). For every seed a policy is made, responses
are sampled and labelled by outcome, a reward model is trained, and PPO runs once per arm from the same policy on the
same prompts. Each evaluation appends a row to `benchmarks/results/quickstart.jsonl`; seed 0 also leaves the scored
responses of its report in `quickstart_examples.jsonl`, for README's picture.

Command: python -m benchmarks.evidence.quickstart --seeds 1 2 3 --ablations dense dense_raw+outcome
Resumable: a finished stage or arm is not run again.
"""

import argparse
import json
from pathlib import Path

from benchmarks.common.places import RESULTS
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.files import write_atomic
from fractal_rm.report.quickstart_report import summarize
from fractal_rm.study.arms import Arm
from fractal_rm.study.quickstart import ARMS, Quickstart, QuickstartArguments

EXAMPLES = "quickstart_examples.jsonl"
ABLATIONS = (
    Arm("dense", steps="fractal"),
    Arm("dense_raw+outcome", steps="fractal", outcome=True, options=(("shaping", "raw"),)),
    Arm("dense_group+outcome", steps="fractal", outcome=True, options=(("advantage", "group"),)),
    Arm("outcome_group", outcome=True, options=(("advantage", "group"),)),
)


def key(row: dict) -> str:
    """What makes a row the same measurement."""
    return json.dumps([row["arm"], row["seed"], row["split"], row["metrics"].get("rollouts"), row["config"]["budget"]])


def save_examples(folder: Path, seed: int, path: Path) -> None:
    """Keep the scored responses that the report of a finished run shows."""
    report = summarize(folder, [arm.name for arm in ARMS], seed, "small")
    write_atomic(path, "".join(f"{json.dumps(example)}\n" for example in report.examples))


def main() -> None:
    """Run the seeds and copy their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--ablations", nargs="*", default=[], choices=[arm.name for arm in ABLATIONS])
    parser.add_argument("--results", type=Path, default=RESULTS / "quickstart.jsonl")
    arguments = parser.parse_args()
    arms = (*ARMS, *(arm for arm in ABLATIONS if arm.name in arguments.ablations))
    for seed in arguments.seeds:
        folder = arguments.work_dir / f"seed-{seed}"
        Quickstart(QuickstartArguments(output_dir=str(folder), seed=seed), arms=arms).run()
        if seed == 0:
            save_examples(folder, seed, arguments.results.with_name(EXAMPLES))
        target = ResultsFile(arguments.results)
        present = {key(row) for row in target.rows()}
        for row in read_results(folder / "results.jsonl"):
            if key(row) not in present:
                fields = ("benchmark", "arm", "dataset", "seed", "split", "metrics", "config", "seconds")
                target.append(**{name: row[name] for name in fields})


if __name__ == "__main__":
    main()
