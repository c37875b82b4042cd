"""Metrics from the logits collected by an evaluation of [`FractalTrainer`], item by item."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from fractal_rm.evaluation.intervals import Measurement
from fractal_rm.evaluation.statistics import bag_statistics, step_statistics
from fractal_rm.reward_model import probabilities
from fractal_rm.scorers.settings import FractalSettings


def by_item(values: Tensor, chosen: Tensor) -> Tensor:
    """Values per response (B, ...) -> per item, with two places for the item's responses; 0 in empty places.

    Trainer and accelerate count items: from the last batch they keep as many rows as it has items. The places are the
    third axis, after the steps, because Trainer pads the second: (items, S, 2, ...), or (items, 2) without steps.

    Args:
        values: Values in the order of [`~fractal_rm.reward_training.data.BagCollator`].
        chosen: `chosen` of the same batch (B,).
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
        chosen: 1 for the chosen response of a preference, 0 for the rejected one after it, -1 for others (B,).
    """

    logits: list[np.ndarray]
    labels: np.ndarray
    step_labels: list[np.ndarray]
    chosen: np.ndarray


def collected_bags(prediction: EvalPrediction) -> CollectedBags:
    """The bags from items that [`by_item`] laid out in every `prediction_step` and Trainer padded and concatenated."""
    laid: Any = (prediction.predictions, *prediction.label_ids)
    logits, labels, step_labels, mask, chosen = (_by_row(values) for values in laid)
    # Trainer pads shorter batches with -100, masks included: only 1 is a real step. A bag without real steps is an
    # empty place for the second response of a preference.
    real = mask == 1
    rows = np.flatnonzero(real.any(axis=1))
    return CollectedBags(
        logits=[logits[row][real[row]] for row in rows],
        labels=labels[rows],
        step_labels=[step_labels[row][real[row]] for row in rows],
        chosen=chosen[rows],
    )


def _by_row(laid: np.ndarray) -> np.ndarray:
    """The inverse of [`by_item`], without the empty places."""
    rows = laid if laid.ndim == 2 else laid.swapaxes(1, 2)
    return rows.reshape(-1, *rows.shape[2:])


def measure_logits(bags: CollectedBags, settings: FractalSettings) -> Measurement:
    """Metrics of response labels, and of gold step labels if any are known. Grades count as shares of the highest.

    Returns:
        The metrics of [`~fractal_rm.evaluation.statistics.bag_statistics`] and
        [`~fractal_rm.evaluation.statistics.step_statistics`], and `pair_accuracy` if there are preferences.
    """
    highest = (settings.num_grades or 2) - 1
    found = [
        probabilities(torch.tensor(row)[None], torch.ones(1, len(row), dtype=torch.bool), settings)
        for row in bags.logits
    ]
    scores, bag_scores = [steps[0].numpy() for steps, _ in found], np.array([bag.item() for _, bag in found])
    metrics, counts = bag_statistics(bag_scores, bags.labels / highest), {}
    if (bags.chosen >= 0).any():
        counts["pair_accuracy"] = float(np.mean(bag_scores[bags.chosen == 1] > bag_scores[bags.chosen == 0]))
    if any(not np.isnan(row).all() for row in bags.step_labels):
        metrics |= step_statistics(scores, [row / highest for row in bags.step_labels])
    return Measurement(len(scores), metrics, counts)
