"""Question: what do the reward models of `dense_vs_outcome.py` know about single steps, without step labels?

Each reward model of a finished run scores the steps of the base policy's responses to held-out problems, and the
checker says which are right. (`supervised` was trained on step labels.)

    python -m benchmarks.evidence.dense_vs_outcome_step_scores

Rows go to `benchmarks/results/dense_vs_outcome_step_scores.jsonl` as they are made; finished ones are skipped.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common.places import RESULTS
from benchmarks.evidence.arms import ARMS, Assets
from benchmarks.evidence.dense_vs_outcome_reward_models import HELD_OUT, score_held_out, step_levels, step_metrics
from benchmarks.evidence.page import STEP_SCORES
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.study.run import quiet
from fractal_rm.study.statistics import finished_runs
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS


def trained_models(results: Path) -> list[tuple[str, int, str]]:
    """Setting, seed and kind of each trained model that scored the steps of a finished run."""
    found = {
        (setting, seed, ARMS[arm].steps)
        for (setting, arm), seeds in finished_runs(read_results(results)).items()
        for seed in seeds
    }
    # Gold labels are for lines; `result_token` scores parts of lines.
    return sorted(
        (setting, seed, kind)
        for setting, seed, kind in found
        if kind in Assets.recipes(CONDITIONS[setting]) and kind != "result_token"
    )


def measure(assets: Assets, kind: str) -> dict[str, float]:
    """How well scores tell right steps from wrong ones, how high they are, and what responses get more than is true."""
    found, gold, labels = score_held_out(assets, kind)
    return {
        **step_metrics(found, gold),
        **step_levels(found, gold),
        "score_less_truth": float(np.mean([one.score for one in found]) - labels.mean()),
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "dense_vs_outcome.jsonl", help="Rows of the study.")
    parser.add_argument("--rows", type=Path, default=RESULTS / f"{STEP_SCORES}.jsonl", help="Where to write.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="Work folder of the study.")
    arguments = parser.parse_args()
    results = ResultsFile(arguments.rows)
    for setting, seed, kind in tqdm(trained_models(arguments.results)):
        task = CONDITIONS[setting]
        config = {"reward_model": Assets.recipes(task)[kind], "responses": HELD_OUT}
        if results.has(dataset=setting, seed=seed, arm=kind, config=config):
            continue
        start = time.monotonic()
        with quiet():
            metrics = measure(Assets(arguments.output_dir, task, seed), kind)
        results.append(
            benchmark=STEP_SCORES,
            arm=kind,
            dataset=setting,
            seed=seed,
            split="held_out",
            metrics=metrics,
            config=config,
            seconds=time.monotonic() - start,
        )


if __name__ == "__main__":
    main()
