"""Losses and step labels for preferences: pairs of responses of which only the better one is known."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fractal_rm.objectives.aggregation import Aggregation, aggregate, bag_log_probs, check_mask, meaning
from fractal_rm.objectives.pseudo_labels import pseudo_labels

PreferenceForm = Literal["bradley_terry", "ratio"]


def preference_loss(
    chosen_logits: Float[Tensor, "B S"],
    chosen_mask: Bool[Tensor, "B S"],
    rejected_logits: Float[Tensor, "B R"],
    rejected_mask: Bool[Tensor, "B R"],
    *,
    form: PreferenceForm = "bradley_terry",
    aggregation: Aggregation = "mean",
    sharpness: float = 1.0,
) -> Float[Tensor, " B"]:
    """Cross entropy between a preference and the aggregated step probabilities of both responses.

    With `s` the aggregated probability of a response and `x` its logit, the chosen one is better with probability
    `sigmoid(x_c - x_r)` (`"bradley_terry"`) or `s_c / (s_c + s_r)` (`"ratio"`). The first separates two good responses
    as well as two bad ones; the second is nearly 1/2 for any two good ones.

    Args:
        chosen_logits: Step scores of the chosen response before the sigmoid. Values at padding are ignored.
        chosen_mask: True where a step is real. Every response needs one.
        rejected_logits: Step scores of the rejected response.
        rejected_mask: True where a step is real.
        form: How two aggregated scores become the probability of a preference.
        aggregation: How step probabilities become a response's probability.
        sharpness: How close the smooth aggregations come to the extreme step.

    Returns:
        Loss of each pair, in nats, not averaged.

    Raises:
        ValueError: If a response has no real step, or the form is unknown.

    Source:
        `"ratio"`: preference loss of FRACTAL (Makhija et al., ACL 2025). `"bradley_terry"`: Bradley & Terry, 1952.

    Example:
        >>> mask = torch.ones(1, 1, dtype=torch.bool)
        >>> preference_loss(torch.tensor([[1.0]]), mask, torch.tensor([[1.0]]), mask)
        tensor([0.6931])
    """
    if form == "bradley_terry":
        chosen = aggregate(chosen_logits, chosen_mask, aggregation=aggregation, sharpness=sharpness)
        rejected = aggregate(rejected_logits, rejected_mask, aggregation=aggregation, sharpness=sharpness)
    elif form == "ratio":
        chosen, _ = bag_log_probs(chosen_logits, chosen_mask, aggregation=aggregation, sharpness=sharpness)
        rejected, _ = bag_log_probs(rejected_logits, rejected_mask, aggregation=aggregation, sharpness=sharpness)
    else:
        raise ValueError(f"Unknown form {form!r}. Choose bradley_terry or ratio.")
    return -F.logsigmoid(chosen - rejected)  # s_c / (s_c + s_r) = sigmoid(log s_c - log s_r)


def _best_sums(logits: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S+1"]:
    """The largest sum of `n` logits of a response, for each `n`; -inf beyond its number of steps.

    Up to a constant this is the log-likelihood of the best labels with `n` good steps.
    """
    ranked = logits.detach().double().masked_fill(~mask, -torch.inf).sort(dim=1, descending=True).values
    return F.pad(ranked.cumsum(dim=1), (1, 0))


def _best_counts(
    chosen: Float[Tensor, "B A"],
    chosen_steps: Int[Tensor, " B"],
    rejected: Float[Tensor, "B C"],
    rejected_steps: Int[Tensor, " B"],
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Numbers of good steps of the most likely pair of labelings with the larger share in the chosen response."""
    device = chosen.device
    a = torch.arange(chosen.shape[1], device=device)[None, :, None] * rejected_steps[:, None, None]
    b = torch.arange(rejected.shape[1], device=device)[None, None, :] * chosen_steps[:, None, None]
    totals = (chosen[:, :, None] + rejected[:, None, :]).masked_fill(a <= b, -torch.inf)
    best = totals.flatten(1).argmax(dim=1)
    return best // rejected.shape[1], best % rejected.shape[1]


def preference_pseudo_labels(
    chosen_logits: Float[Tensor, "B S"],
    chosen_mask: Bool[Tensor, "B S"],
    rejected_logits: Float[Tensor, "B R"],
    rejected_mask: Bool[Tensor, "B R"],
    *,
    aggregation: Aggregation = "mean",
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B R"]]:
    """The step labels of both responses, most likely under the model, that make the chosen one strictly better.

    - `meaning` "mean": of all numbers of good steps `a` and `b` with `a / k_c > b / k_r`, the most likely pair; each
      response's most likely steps are its good ones.
    - `meaning` "min": every chosen step is good and some rejected one is bad, as in `pseudo_labels` for labels 1 and 0.
      Under "max" some chosen step is good and no rejected one.

    Neither rule allows equally good responses: leave ties out.

    Args:
        chosen_logits: Step scores of the chosen response before the sigmoid. Values at padding are ignored.
        chosen_mask: True where a step is real. Every response needs one.
        rejected_logits: Step scores of the rejected response.
        rejected_mask: True where a step is real.
        aggregation: How step labels determine a response's label.

    Returns:
        Labels of the chosen and of the rejected steps, 0 or 1; NaN at padding.

    Raises:
        ValueError: If a response has no real step or the aggregation is unknown.

    Source:
        This package's extension of the maximum-likelihood pseudo-labels of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> preference_pseudo_labels(torch.tensor([[2.0, 1.0]]), mask, torch.tensor([[3.0, 0.5]]), mask)
        (tensor([[1., 1.]]), tensor([[1., 0.]]))
    """
    check_mask(chosen_mask)
    check_mask(rejected_mask)
    if meaning(aggregation) == "mean":
        counts = _best_counts(
            _best_sums(chosen_logits, chosen_mask),
            chosen_mask.sum(dim=1),
            _best_sums(rejected_logits, rejected_mask),
            rejected_mask.sum(dim=1),
        )
        shares = (counts[0] / chosen_mask.sum(dim=1), counts[1] / rejected_mask.sum(dim=1))
    else:
        shares = (chosen_logits.new_ones(len(chosen_logits)), rejected_logits.new_zeros(len(rejected_logits)))
    return (
        pseudo_labels(chosen_logits, shares[0], chosen_mask, aggregation=aggregation),
        pseudo_labels(rejected_logits, shares[1], rejected_mask, aggregation=aggregation),
    )
