"""Question: how does a reward model change when continued learning does harm (`fractal_online` on `hard`)?

Runs of the study are repeated. At each evaluation their reward model scores the policy's responses to the held-out
problems. Rows have the ranking (bag AUC, which also decides whether an update is kept), the fit to the labels (negative
log-likelihood), and the scores of right and wrong steps. The checker's step labels are used for
evaluation only. `frozen` is `fractal_mix`, whose model does not change.

    python -m benchmarks.evidence.dense_vs_outcome_learning_on --settings hard --seeds 0 6 8

Rows go to `benchmarks/results/dense_vs_outcome_learning_on.jsonl` as they are made; finished runs are skipped.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common.places import RESULTS
from benchmarks.evidence.dense_vs_outcome_reward_models import label_metrics, step_levels, step_metrics
from benchmarks.evidence.page import LEARNING_ON
from fractal_rm.data.bag import StepScores
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import ARMS, FRACTAL, Assets, Options
from fractal_rm.study.rivals import oracle
from fractal_rm.study.run import Budget, quiet, run_arm
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS

ROWS = RESULTS / f"{LEARNING_ON}.jsonl"
# Each is an arm of the study, with these settings changed.
VARIANTS: dict[str, tuple[str, Options]] = {
    "frozen": ("fractal_mix", {}),
    "online": ("fractal_online", {}),
    "online_slow": ("fractal_online", {"rm_learning_rate": 1e-4}),
}


class WatchedModel(StepRewardModel):
    """A reward model that remembers what it scored last: at an evaluation, the policy's responses."""

    last: tuple[list[str], list[StepScores]]

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        """Scores, which are kept too."""
        scored = super().score(prompts, responses, **kwargs)
        self.last = list(prompts), scored
        return scored


class WatchedAssets(Assets):
    """Assets whose reward model can be asked afterwards."""

    judge: WatchedModel

    def reward_model(self, kind: str) -> StepRewardModel:
        """The trained model of a kind."""
        self.judge = WatchedModel.from_pretrained(self.reward_model_folder(kind), device="cpu", batch_size=64)
        return self.judge


def measure(assets: WatchedAssets) -> dict[str, float]:
    """How the model's last scores fit the labels of the responses, and the gold labels of their steps."""
    used = [(prompt, one) for prompt, one in zip(*assets.judge.last, strict=True) if one.steps]
    found = [one for _, one in used]
    gold = [oracle(assets.task)(prompt, [step.text for step in one.steps]) for prompt, one in used]
    labels = np.array([assets.task.label(prompt, one.response) for prompt, one in used])
    return {
        **label_metrics(found, labels, luck=FRACTAL["missed_bad"]),
        **step_metrics(found, gold),
        **step_levels(found, gold),
    }


def options_of(variant: str, chosen: Mapping[str, Options]) -> Options:
    """Settings of a variant: those of its arm, with what is done differently."""
    arm, changed = VARIANTS[variant]
    return {**chosen[arm], **changed}


def run(assets: WatchedAssets, variant: str, chosen: Mapping[str, Options], budget: Budget, results: Path) -> None:
    """Make a run of the study again and write what its reward model knows at each evaluation.

    Args:
        assets: Of its setting and seed.
        variant: What is done differently.
        chosen: Settings of the arms.
        budget: How much to do.
        results: The file of rows.
    """
    start = time.monotonic()
    options = options_of(variant, chosen)
    rows: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any]) -> None:
        rows.append(metrics | measure(assets))

    with quiet(), tempfile.TemporaryDirectory() as folder:
        run_arm(ARMS[VARIANTS[variant][0]], options, assets, budget, report, Path(folder))
    for metrics in rows:  # written at the end, so a run is complete or absent
        ResultsFile(results).append(
            benchmark=LEARNING_ON,
            arm=variant,
            dataset=assets.task.name,
            seed=assets.seed,
            split="held_out",
            metrics=metrics,
            config=options,
            seconds=time.monotonic() - start,
        )


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["hard"], choices=list(CONDITIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 6, 8])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="Work folder of the study.")
    arguments = parser.parse_args()
    chosen = yaml.safe_load(Path(__file__).with_name("dense_vs_outcome.yaml").read_text(encoding="utf-8"))
    results = ResultsFile(ROWS)
    for setting in arguments.settings:
        for seed in arguments.seeds:
            for variant in arguments.variants:
                if not results.has(dataset=setting, seed=seed, arm=variant, config=options_of(variant, chosen)):
                    assets = WatchedAssets(arguments.output_dir, CONDITIONS[setting], seed)
                    run(assets, variant, chosen, Budget(), ROWS)
                    print(setting, seed, variant, flush=True)


if __name__ == "__main__":
    main()
