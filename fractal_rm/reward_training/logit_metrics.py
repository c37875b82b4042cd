"""Metrics of the logits that an evaluation of [`FractalTrainer`] has collected, item by item."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from fractal_rm.evaluation import metrics
from fractal_rm.evaluation.intervals import Judgement, Statistic, auc_of, mean_of
from fractal_rm.evaluation.reliability import ece_of
from fractal_rm.reward_model import probabilities
from fractal_rm.scorers.settings import FractalSettings


def by_item(values: Tensor, chosen: Tensor) -> Tensor:
    """Values of responses (B, ...) -> of items, with two places for the responses of each; 0 where there is none.

    Trainer and accelerate count items: of the last batch they keep as many rows as it has items. The places are the
    third axis, behind the steps, because Trainer pads the second: (items, S, 2, ...), or (items, 2) without steps.

    Args:
        values: In the order of [`~fractal_rm.reward_training.data.BagCollator`].
        chosen: Of the same batch (B,).
    """
    place = (chosen == 0).long()
    item = (1 - place).cumsum(dim=0) - 1
    laid = values.new_zeros(int(item[-1]) + 1, 2, *values.shape[1:])
    laid[item, place] = values
    return laid if values.dim() == 1 else laid.transpose(1, 2)


class CollectedBags(NamedTuple):
    """The bags that an evaluation has seen.

    Attributes:
        logits: Step logits of each bag, (S,) or (S, G), real steps only.
        labels: Response labels (B,).
        step_labels: Gold step labels of each bag, NaN where unknown.
        chosen: 1 for the chosen response of a preference, 0 for the rejected one behind it, -1 for others (B,).
    """

    logits: list[np.ndarray]
    labels: np.ndarray
    step_labels: list[np.ndarray]
    chosen: np.ndarray


def collected_bags(prediction: EvalPrediction) -> CollectedBags:
    """The bags of items that [`by_item`] laid out and Trainer padded and put together.

    Args:
        prediction: What `FractalTrainer.prediction_step` gave for every batch.
    """
    laid: Any = (prediction.predictions, *prediction.label_ids)
    logits, labels, step_labels, mask, chosen = (_by_row(values) for values in laid)
    # Trainer pads shorter batches with -100, masks included: only 1 is a real step. A bag without any is the place
    # of the second response of a preference, where there is none.
    real = mask == 1
    rows = np.flatnonzero(real.any(axis=1))
    return CollectedBags(
        logits=[logits[row][real[row]] for row in rows],
        labels=labels[rows],
        step_labels=[step_labels[row][real[row]] for row in rows],
        chosen=chosen[rows],
    )


def _by_row(laid: np.ndarray) -> np.ndarray:
    """[`by_item`] undone, but for the empty places."""
    rows = laid if laid.ndim == 2 else laid.swapaxes(1, 2)
    return rows.reshape(-1, *rows.shape[2:])


def _scores(logits: list[np.ndarray], settings: FractalSettings) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of the steps of each bag, and of the bags (B,)."""
    found = [
        probabilities(torch.tensor(row)[None], torch.ones(1, len(row), dtype=torch.bool), settings) for row in logits
    ]
    return [steps[0].numpy() for steps, _ in found], np.array([bag.item() for _, bag in found])


def judge_logits(
    logits: list[np.ndarray], bag_labels: np.ndarray, step_labels: list[np.ndarray], settings: FractalSettings
) -> Judgement:
    """The metrics of [`evaluate_logits`] that have an interval, as statistics; the arguments are the same."""
    highest = (settings.num_grades or 2) - 1
    scores, bag_scores = _scores(logits, settings)
    labels, gold = bag_labels / highest, [row / highest for row in step_labels]
    statistics: dict[str, Statistic] = {
        "bag_auc": auc_of(list(bag_scores), list(labels)),
        "bag_accuracy": mean_of((bag_scores >= metrics.GOOD) == (labels >= metrics.GOOD)),
        "bag_ece": ece_of(bag_scores, labels),
    }
    if any(not np.isnan(row).all() for row in gold):
        statistics["step_auc"] = auc_of(scores, gold)
        statistics["within_bag_auc"] = mean_of(metrics.bag_aucs(scores, gold))
    return Judgement(len(logits), statistics)


def evaluate_logits(
    logits: list[np.ndarray],
    bag_labels: np.ndarray,
    step_labels: list[np.ndarray],
    settings: FractalSettings,
    *,
    chosen: np.ndarray | None = None,
) -> dict[str, float]:
    """Bag metrics, and step metrics where gold step labels are known.

    Args:
        logits: Step logits of each bag, (S,) or (S, G), real steps only.
        bag_labels: Response labels (B,).
        step_labels: Gold step labels of each bag, NaN where unknown.
        settings: Gives aggregation and grades.
        chosen: 1 for the chosen response of a preference, 0 for the rejected one behind it, -1 for others (B,).

    Returns:
        Those of [`~fractal_rm.evaluation.metrics.bag_metrics`]; `pair_accuracy` if there are preferences; `step_auc`
        and `within_bag_auc` if any gold step label is known. Grades count as shares of the highest.
    """
    highest = (settings.num_grades or 2) - 1
    scores, bag_scores = _scores(logits, settings)
    results = metrics.bag_metrics(bag_scores, bag_labels / highest)
    if chosen is not None and (chosen >= 0).any():
        results["pair_accuracy"] = float(np.mean(bag_scores[chosen == 1] > bag_scores[chosen == 0]))
    if any(not np.isnan(row).all() for row in step_labels):
        gold = [row / highest for row in step_labels]
        results["step_auc"] = metrics.step_auc(scores, gold)
        results["within_bag_auc"] = metrics.within_bag_auc(scores, gold)
    return results
