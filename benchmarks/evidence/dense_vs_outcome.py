"""Question: do step rewards learned from response labels train a better policy than the response labels themselves?

Rivals: the outcome alone, with TRL's group baseline and with PPO's value model; a reward model that scores whole
responses. Bounds: reward models of gold step labels, the checker's own steps. Controls: random step scores, the
response label at every step. Same base policies, prompts, rollouts and updates for all; several settings, paired seeds.

    python -m benchmarks.evidence.dense_vs_outcome --tune true   # trials on the tuning seed
    python -m benchmarks.evidence.dense_vs_outcome --jobs 2      # the study
    python -m benchmarks.evidence.dense_vs_outcome --smoke true  # minutes; rows and models in a temporary folder

This is `fractal-rm compare` with further arms and the files of this repository. Rows go to
`benchmarks/results/dense_vs_outcome.jsonl` as they are made; a killed run continues where it stopped.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common.places import RESULTS
from benchmarks.evidence.arms import ARMS, Evidence
from benchmarks.evidence.claims import verdicts
from benchmarks.evidence.study_page import DEFAULT_ARMS
from fractal_rm.cli.compare import CompareArguments, run_comparison
from fractal_rm.cli.options.parser import parse
from fractal_rm.study.study import write_chosen

CHOSEN = Path(__file__).with_name("dense_vs_outcome.yaml")


@dataclass
class EvidenceArguments(CompareArguments):
    """Arguments of `fractal-rm compare`, with further arms."""

    arms: list[str] | None = field(default=None, metadata={"help": "Rewards to compare; default: all."})


def main(argv: Sequence[str]) -> None:
    (arguments,) = parse("compare", [EvidenceArguments], argv)
    if not arguments.smoke:
        name = "dense_vs_outcome_tuning" if arguments.tune else "dense_vs_outcome"
        arguments.results = arguments.results or str(RESULTS / f"{name}.jsonl")
        arguments.chosen = arguments.chosen or str(CHOSEN)
        for sentence in verdicts(run_comparison(arguments, Evidence), DEFAULT_ARMS):
            print(sentence)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = folder
        arguments.settings = arguments.settings or ["easy", "branching"]
        arguments.chosen = f"{folder}/chosen.yaml"
        write_chosen(Path(arguments.chosen), {name: arm.trials[0] for name, arm in ARMS.items()}, "a smoke run")
        arguments.seeds = 1
        run_comparison(arguments, Evidence)


if __name__ == "__main__":
    main(sys.argv[1:])
