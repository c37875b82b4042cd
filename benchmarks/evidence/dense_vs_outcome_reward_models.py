"""Question: how should the reward models of `dense_vs_outcome.py` be trained? Recipes on development seeds.

The criterion is the likelihood of held-out *response* labels, which needs no gold step labels. The shares of wrong and
of right steps on the wrong side of one half are reported too.

    python -m benchmarks.evidence.dense_vs_outcome_reward_models --settings easy medium branching hard --seeds 2000 2001

Rows go to `benchmarks/results/dense_vs_outcome_development.jsonl` as they are made; finished ones are skipped.
"""

import time
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import log_loss
from tqdm import tqdm

from benchmarks.evidence.arms import IMPLICIT, Assets
from benchmarks.evidence.development_arguments import ROWS, TASKS, parse_arguments
from benchmarks.evidence.page import REWARD_MODELS
from fractal_rm.data.bag import StepScores
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import bag_metrics, step_auc
from fractal_rm.study.arms import FRACTAL, TRAINING, Recipe
from fractal_rm.study.arms import Assets as ShippedAssets
from fractal_rm.study.rivals import oracle
from fractal_rm.study.run import measure_start, quiet
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS
from fractal_rm.tasks.task import Task

HELD_OUT = 256
_PLAIN, _FLIPS_20 = TRAINING | FRACTAL, Assets.recipes(CONDITIONS["noise_20"])["fractal_flips"]
# Each is `fractal` with other settings; `supervised` learns from gold step labels.
RECIPES: dict[str, Recipe] = {
    "fractal": _PLAIN,
    "supervised": Assets.recipes(CONDITIONS["easy"])["supervised"],
    "fractal_8x5e-4": {**_PLAIN, "num_train_epochs": 8, "learning_rate": 5e-4},
    "fractal_8x3e-4": {**_PLAIN, "num_train_epochs": 8},
    "fractal_16x2e-4": {**_PLAIN, "learning_rate": 2e-4},
    # For `noise_20`: fewer passes over the labels, and a known share of flipped labels, as in `fractal_flips`.
    "fractal_4x3e-4": {**_PLAIN, "num_train_epochs": 4},
    "flips_20": _FLIPS_20,
    "flips_20_4x3e-4": {**_FLIPS_20, "num_train_epochs": 4},
    # The rival that scores log-ratios. Its score of a response is the probability of the label itself, luck included.
    "implicit": IMPLICIT,
    "implicit_1e-3": {**IMPLICIT, "learning_rate": 1e-3},
    "implicit_beta_0.5": {**IMPLICIT, "beta": 0.5},
}


class TriedAssets(Assets):
    """Assets whose reward models are trained by the recipes that are tried."""

    @classmethod
    def recipes(cls, task: Task) -> dict[str, Recipe]:
        """What each kind of reward model is trained with."""
        return RECIPES


def score_held_out(assets: ShippedAssets, kind: str) -> tuple[list[StepScores], list[list[float]], np.ndarray]:
    """What a reward model says of held-out responses of the base policy: scores, gold step labels, response labels."""
    task = assets.task
    prompts = [problem.prompt for problem in task.problems("held_out", HELD_OUT, assets.seed)]
    _, texts = measure_start(assets, HELD_OUT)
    scored = assets.reward_model(kind).score(prompts, texts, progress=False)
    used = [(p, text, found) for p, text, found in zip(prompts, texts, scored, strict=True) if found.steps]
    gold = [oracle(task)(prompt, [step.text for step in found.steps]) for prompt, _, found in used]
    labels = np.array([task.label(prompt, text) for prompt, text, _ in used])
    return [found for *_, found in used], gold, labels


def measure(assets: Assets, recipe: str) -> dict[str, float]:
    """How well a reward model knows held-out responses of the base policy, by their labels and by gold step labels."""
    found, gold, labels = score_held_out(assets, recipe)
    known = RECIPES[recipe]
    luck = 0.0 if "beta" in known else known.get("missed_bad", FRACTAL["missed_bad"])
    return {
        **label_metrics(found, labels, luck=luck, loss=known.get("missed_good", 0.0)),
        **step_metrics(found, gold),
        "train_seconds": assets.cost(recipe)["rm_seconds"],
    }


def label_metrics(
    found: Sequence[StepScores], labels: np.ndarray, *, luck: float, loss: float = 0.0
) -> dict[str, float]:
    """How well scores fit response labels, of which a share of the bad and of the good ones says the other thing."""
    probs = np.array([one.score for one in found])
    return {
        "bag_nll": float(log_loss(labels, (1 - loss) * probs + luck * (1 - probs), labels=[0, 1])),
        "bag_auc": bag_metrics(probs, labels)["bag_auc"],
    }


def step_levels(found: Sequence[StepScores], gold: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean scores of right and of wrong steps."""
    scores, good = np.concatenate([one.step_scores for one in found]), np.concatenate(gold)
    return {
        "right_step_score": float(scores[good == 1].mean()),
        "wrong_step_score": float(scores[good == 0].mean()),
    }


def step_metrics(found: Sequence[StepScores], gold: Sequence[Sequence[float]]) -> dict[str, float]:
    """How well scores tell right steps from wrong ones, and the shares that are on the wrong side of a half."""
    rows = [one.step_scores for one in found]
    scores, good = np.concatenate(rows), np.concatenate(gold)
    return {
        "step_auc": step_auc(rows, gold),
        "wrong_steps_above_half": float((scores[good == 0] > 0.5).mean()),
        "right_steps_below_half": float((scores[good == 1] < 0.5).mean()),
    }


def main() -> None:
    """Train and measure what is missing."""
    arguments = parse_arguments(__doc__, "recipes", RECIPES)
    results = ResultsFile(ROWS)
    units = [(s, n, r) for n in arguments.seeds for s in arguments.settings for r in arguments.recipes]
    for setting, seed, recipe in tqdm(units):
        config = {"reward_model": RECIPES[recipe]}
        if results.has(benchmark=REWARD_MODELS, dataset=setting, seed=seed, arm=recipe, config=config):
            continue
        start = time.monotonic()
        with quiet():
            metrics = measure(TriedAssets(arguments.output_dir, TASKS[setting], seed), recipe)
        results.append(
            benchmark=REWARD_MODELS,
            arm=recipe,
            dataset=setting,
            seed=seed,
            split="development",
            metrics=metrics,
            config=config,
            seconds=time.monotonic() - start,
        )


if __name__ == "__main__":
    main()
