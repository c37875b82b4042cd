"""Step logits -> bag log-probability: one function, every aggregator in log space.

A response is good with probability `AGG(p_1, ..., p_S)`, where `p_s` is the probability that step `s` is good. The
functions here never leave log space, so a thousand confident steps neither underflow nor lose their gradient.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Aggregation = Literal["min", "max", "mean", "product"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def log1mexp(log_probs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log(1 - exp(x))` for `x <= 0`, accurate at both ends.

    Two forms are needed: `log(-expm1(x))` loses digits for very negative `x`, `log1p(-exp(x))` near 0; they meet at
    `-log 2` (Machler, "Accurately computing log(1 - exp(-|a|))", 2012). Arguments are kept a float's spacing below 0,
    where the value and its gradient would be infinite.

    Example:
        >>> log1mexp(torch.tensor([-0.6931472]))
        tensor([-0.6931])
    """
    # One float32 spacing below zero: probability 1 - 1e-7, where a loss of 16 nats is all that can be said.
    log_probs = log_probs.clamp(max=-torch.finfo(torch.float32).eps)
    near_zero = log_probs > -0.6931472
    # `where` before the function as well as after: the branch not taken must not put NaN into the gradient.
    close = torch.log(-torch.expm1(torch.where(near_zero, log_probs, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, log_probs)))
    return torch.where(near_zero, close, far)


def check_mask(mask: Bool[Tensor, "B S"]) -> None:
    """Raise a sentence if a bag has no real step.

    Raises:
        ValueError: If a row of `mask` is all False; it names the first such row.
    """
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(mask)} bags have no steps (first: row {empty[0]}). "
            "Drop empty responses before aggregating."
        )


def bag_log_probs(
    logits: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Log-probabilities that a bag is good and that it is not.

    `"min"` and `"max"` take one step's probability (the sigmoid is monotone, so the extreme logit decides and receives
    all of the gradient); `"mean"` is the expected share of good steps; `"product"` is the exact probability that all
    steps are good if they are independent.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.

    Returns:
        `log P(bag is good)` and `log P(bag is not good)`, in nats, float32.

    Raises:
        ValueError: If a bag has no real step or the aggregation is unknown.

    Source:
        Aggregations of FRACTAL (Makhija et al., ACL 2025); `"product"` is our own exact form of its minimum.

    Example:
        >>> good, bad = bag_log_probs(
        ...     torch.zeros(1, 3), torch.tensor([[True, True, False]]), aggregation="product"
        ... )
        >>> good.exp(), bad.exp()  # two real steps at p = 0.5
        (tensor([0.2500]), tensor([0.7500]))
    """
    check_mask(mask)
    logits = logits.float()
    if aggregation == "min":
        extreme = logits.masked_fill(~mask, torch.inf).amin(dim=1)
        return F.logsigmoid(extreme), F.logsigmoid(-extreme)
    if aggregation == "max":
        extreme = logits.masked_fill(~mask, -torch.inf).amax(dim=1)
        return F.logsigmoid(extreme), F.logsigmoid(-extreme)
    if aggregation == "mean":
        log_count = mask.sum(dim=1).log()
        good = torch.logsumexp(F.logsigmoid(logits).masked_fill(~mask, -torch.inf), dim=1) - log_count
        bad = torch.logsumexp(F.logsigmoid(-logits).masked_fill(~mask, -torch.inf), dim=1) - log_count
        return good, bad
    if aggregation == "product":
        good = F.logsigmoid(logits).masked_fill(~mask, 0.0).sum(dim=1)
        return good, log1mexp(good)
    raise ValueError(f"Unknown aggregation {aggregation!r}. Choose one of {', '.join(AGGREGATIONS)}.")


def aggregate(
    logits: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
) -> Float[Tensor, " B"]:
    """The bag's logit, `log P(good) - log P(not good)`.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.

    Returns:
        Bag scores before the sigmoid, float32.

    Raises:
        ValueError: If a bag has no real step or the aggregation is unknown.

    Example:
        >>> aggregate(torch.tensor([[2.0, -1.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([-1.])
    """
    good, bad = bag_log_probs(logits, mask, aggregation=aggregation)
    return good - bad
