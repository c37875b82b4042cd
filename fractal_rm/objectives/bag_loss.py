"""Losses: plain functions from logits, labels and masks to one loss per bag.

No function here sees a model, and none averages over bags: the trainer reduces.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.objectives.aggregation import Aggregation, bag_log_probs, check_mask


def check_label_noise(label_noise: tuple[float, float]) -> None:
    """Raise unless two shares of wrong labels are valid; the only check of `missed_good` and `missed_bad`.

    Args:
        label_noise: Share of good responses labelled bad, and of bad responses labelled good.

    Raises:
        ValueError: If one is negative, or their sum is 1 or more.
    """
    if min(label_noise) < 0 or not sum(label_noise) < 1:  # `not <` refuses NaN too
        raise ValueError(
            f"The label noise (`missed_good`, `missed_bad`) is {label_noise}. Give two shares from 0 that sum to less "
            "than 1, or labels would mean the opposite."
        )


def bag_loss(
    logits: Float[Tensor, "B S"],
    bag_labels: Float[Tensor, " B"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
    sharpness: float = 1.0,
    label_noise: tuple[float, float] = (0.0, 0.0),
) -> Float[Tensor, " B"]:
    """Cross entropy between a bag's label and its aggregated step probabilities.

    Ties step scores to the response label: with `"min"` a response counts as good only if its worst step does. A soft
    label is the probability that the response is good, so the loss is the cross entropy against that probability.

    Labels that are sometimes wrong are modelled, not cleaned: with noise rates `(a, b)` the probability of an observed
    good label is `(1 - a) P(good) + b P(bad)`, so a bag that contradicts its label costs at most `-log b` or `-log a`.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        bag_labels: Response labels, as probabilities in [0, 1].
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.
        sharpness: How close the smooth aggregations come to the extreme step.
        label_noise: Share of good responses labelled bad, and of bad responses labelled good.

    Returns:
        Loss of each bag, in nats, not averaged.

    Raises:
        ValueError: If a bag has no real step, or the noise rates leave [0, 1) or sum to 1 or more.

    Source:
        Bag loss of FRACTAL (Makhija et al., ACL 2025); forward correction (Patrini et al., CVPR 2017).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 9.0]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> bag_loss(logits, torch.tensor([1.0]), mask)  # worst step: p = 0.5
        tensor([0.6931])
    """
    check_label_noise(label_noise)
    good, bad = bag_log_probs(logits, mask, aggregation=aggregation, sharpness=sharpness)
    rates = good.new_tensor(label_noise)
    kept, flipped = torch.log1p(-rates), rates.log()
    seen_good = torch.logaddexp(good + kept[0], bad + flipped[1])
    seen_bad = torch.logaddexp(bad + kept[1], good + flipped[0])
    return -(bag_labels * seen_good + (1.0 - bag_labels) * seen_bad)


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


def easyllp_loss(
    logits: Float[Tensor, "B S"],
    proportions: Float[Tensor, " B"],
    mask: Bool[Tensor, "B S"],
    *,
    base_rate: float,
) -> Float[Tensor, " B"]:
    """Unbiased estimate, from the bag's share of good steps, of the loss with gold step labels.

    With `k` steps, share `y` and base rate `q`, `k (y - q) + q` estimates each step's own label without bias if step
    labels are independent: the other steps contribute their base rate on average, and it is subtracted. A single
    bag's loss may be negative.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        proportions: Share of good steps of each bag, in [0, 1].
        mask: True where a step is real. Every bag needs one.
        base_rate: Share of good steps in the whole data set, in [0, 1].

    Returns:
        Estimated cross entropy of each bag's steps, in nats, averaged over its steps.

    Raises:
        ValueError: If a bag has no real step, or the base rate is outside [0, 1].

    Source:
        EasyLLP (Busa-Fekete et al., "Easy Learning from Label Proportions", NeurIPS 2023).

    Example:
        >>> one_step = torch.ones(1, 1, dtype=torch.bool)
        >>> easyllp_loss(torch.zeros(1, 1), torch.tensor([1.0]), one_step, base_rate=0.5)
        tensor([0.6931])
    """
    check_mask(mask)
    if not 0 <= base_rate <= 1:
        raise ValueError(f"The base rate is {base_rate}. Give the share of good steps, from 0 to 1.")
    count = mask.sum(dim=1)
    label = (count * (proportions - base_rate) + base_rate)[:, None]
    losses = -(label * F.logsigmoid(logits.float()) + (1.0 - label) * F.logsigmoid(-logits.float()))
    return losses.masked_fill(~mask, 0.0).sum(dim=1) / count
