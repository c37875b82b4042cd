"""The implicit process reward as a rival in `disaggregation.py`: its trials, and the scores of the chosen one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.common.implicit import ImplicitReward
from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.evaluation.statistics import bag_metrics

# Trials, as many as other arms have: learning rate, weight of the log-ratio.
EPOCHS, BATCH_SIZE = 3, 64
GRID = ((1e-3, 0.1), (1e-3, 0.5), (2e-3, 0.1), (2e-3, 0.5))


def implicit_scores(
    path: Path, splits: Mapping[str, list[Bag]], *, seed: int, max_steps: int | None = None
) -> tuple[dict[str, list[StepScores]], dict[str, float]]:
    """Scores of validation and test by the configuration that validation bag labels choose, and that configuration."""
    labels = [float(bag.label or 0.0) for bag in splits["validation"]]
    found = []
    for learning_rate, beta in GRID:
        model = ImplicitReward(path, beta, seed)
        model.train(
            splits["train"], learning_rate=learning_rate, epochs=EPOCHS, batch_size=BATCH_SIZE, max_steps=max_steps
        )
        scored = model.score(splits["validation"])
        auc = bag_metrics([result.score for result in scored], labels)["bag_auc"]
        found.append((auc, model, scored, {"learning_rate": learning_rate, "beta": beta, "epochs": EPOCHS}))
    _, model, scored, config = max(found, key=lambda trial: -1.0 if np.isnan(trial[0]) else trial[0])
    return {"validation": scored, "test": model.score(splits["test"])}, config
