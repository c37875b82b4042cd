"""What is learned: plain functions from logits, labels and masks to one loss per bag.

No function here sees a model, and none averages over bags: the trainer reduces.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.aggregation import Aggregation, bag_log_probs, check_mask


def bag_loss(
    logits: Float[Tensor, "B S"],
    bag_labels: Float[Tensor, " B"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
) -> Float[Tensor, " B"]:
    """Cross entropy between a bag's label and its aggregated step probabilities.

    Ties step scores to the response label: with `"min"` a response counts as good only if its worst step does. A soft
    label is the probability that the response is good, so the loss is the cross entropy against that probability.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        bag_labels: Response labels, as probabilities in [0, 1].
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.

    Returns:
        Loss of each bag, in nats, not averaged.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        Bag loss of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 9.0]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> bag_loss(logits, torch.tensor([1.0]), mask)  # worst step: p = 0.5
        tensor([0.6931])
    """
    good, bad = bag_log_probs(logits, mask, aggregation=aggregation)
    return -(bag_labels * good + (1.0 - bag_labels) * bad)


def instance_loss(
    logits: Float[Tensor, "B S"],
    step_labels: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
) -> Float[Tensor, " B"]:
    """Cross entropy of the steps whose label is known, averaged over the bag.

    Step labels are gold labels (supervised ceilings, a gold fraction) or pseudo-labels; soft ones are probabilities.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        step_labels: Step labels in [0, 1], NaN where unknown.
        mask: True where a step is real. Every bag needs one.

    Returns:
        Loss of each bag, in nats; 0 for a bag without a known step label.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        Instance loss of FRACTAL (Makhija et al., ACL 2025), with unknown labels left out instead of guessed.

    Example:
        >>> labels = torch.tensor([[1.0, float("nan")]])
        >>> instance_loss(torch.zeros(1, 2), labels, torch.ones(1, 2, dtype=torch.bool))
        tensor([0.6931])
    """
    check_mask(mask)
    known = mask & ~torch.isnan(step_labels)
    targets = step_labels.masked_fill(~known, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return losses.masked_fill(~known, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)
