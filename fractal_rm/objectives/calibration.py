"""Temperature scaling: step logits are divided by one number, fitted on held-out response labels."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.objectives.aggregation import Aggregation, check_mask
from fractal_rm.objectives.bag_loss import bag_loss

# Temperatures from 1/148 to 148: beyond, labels are separable and any temperature fits equally well.
MAX_LOG_TEMPERATURE = 5.0

# Evenly spaced points of the search over log temperatures, and the number of rounds around the best point. Each round
# narrows the range tenfold: four rounds leave a relative error of 1e-3.
_POINTS = 21
_ROUNDS = 4


@torch.no_grad()
def fit_temperature(
    logits: Float[Tensor, "B S"],
    bag_labels: Float[Tensor, " B"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
    sharpness: float = 1.0,
) -> float:
    """The temperature `T` with the lowest mean bag loss of `logits / T`.

    Response labels suffice: no gold step label is read. The search tries log temperatures in [-5, 5] on a grid, then on
    finer grids around the best: it is deterministic, and needs no convexity.

    Args:
        logits: Step scores before the sigmoid, of responses that the model was not trained on.
        bag_labels: Response labels, as probabilities in [0, 1]; NaN where unknown.
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.
        sharpness: How close the smooth aggregations come to the extreme step.

    Returns:
        The temperature; its loss is never higher than that of 1. It is 1 if labels are all equal or unknown, because
        they do not determine a temperature.

    Raises:
        ValueError: If a bag has no real step or the aggregation is unknown.

    Source:
        Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017), with the bag loss as
        its likelihood.

    Example:
        >>> logits = torch.tensor([[4.0], [4.0], [4.0], [-4.0]])  # sure, and right in three of four cases
        >>> labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> round(fit_temperature(logits, labels, torch.ones(4, 1, dtype=torch.bool)), 1)
        3.6
    """
    check_mask(mask)
    known = ~bag_labels.isnan()
    logits, bag_labels, mask = logits[known].float(), bag_labels[known], mask[known]
    if bag_labels.unique().numel() < 2:
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return bag_loss(scaled, bag_labels, mask, aggregation=aggregation, sharpness=sharpness).double().mean().item()

    best, spacing = 0.0, 2 * MAX_LOG_TEMPERATURE / (_POINTS - 1)  # T = 1 is the one to beat
    lowest = loss(best)
    centre, half = 0.0, _POINTS // 2
    for _ in range(_ROUNDS):
        for i in range(-half, half + 1):
            candidate = min(max(centre + i * spacing, -MAX_LOG_TEMPERATURE), MAX_LOG_TEMPERATURE)
            value = loss(candidate)
            if value < lowest:
                best, lowest = candidate, value
        centre, spacing = best, spacing / half
    return math.exp(best)
