"""Step logits -> bag log-probability: one function, every aggregator in log space.

A response is good with probability `AGG(p_1, ..., p_S)`, where `p_s` is the probability that step `s` is good. The
functions here never leave log space, so a thousand confident steps neither underflow nor lose their gradient.

Most aggregations soften a rule on step labels, which `meaning` names: a response is good if every step is ("min"), if
some step is ("max"), or it has a share of good steps ("mean").
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Aggregation = Literal["min", "max", "mean", "product", "noisy_or", "softmin", "softmax"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
Meaning = Literal["min", "max", "mean"]

# Labels and probabilities of responses count as good from here on.
GOOD = 0.5

# The rule on step labels that each aggregation softens.
MEANINGS: dict[str, Meaning] = {
    "min": "min",
    "max": "max",
    "mean": "mean",
    "product": "min",
    "noisy_or": "max",
    "softmin": "min",
    "softmax": "max",
}

# "Some step is good" is the opposite of "every step is bad", so each of these is computed as its partner with negated
# logits and the two results swapped.
_MIRRORED: dict[str, Aggregation] = {"max": "min", "noisy_or": "product", "softmax": "softmin"}

# Removed aggregations that no experiment needed, and the closest replacement.
REMOVED = {
    "geometric_mean": "product",
    "power_min": "softmin",
    "power_max": "softmax",
    "lse_min": "softmin",
    "lse_max": "softmax",
}


def _unknown(aggregation: str) -> ValueError:
    if aggregation in REMOVED:
        return ValueError(f"The aggregation {aggregation!r} was removed; use {REMOVED[aggregation]!r}.")
    return ValueError(f"Unknown aggregation {aggregation!r}. Choose one of {', '.join(AGGREGATIONS)}.")


def meaning(aggregation: str) -> Meaning:
    """The rule on step labels that an aggregation softens.

    Args:
        aggregation: How step probabilities become a bag probability.

    Returns:
        `"min"`: a response is good if every step is; `"max"`: if some step is; `"mean"`: its label is the share of good
        steps.

    Raises:
        ValueError: If the aggregation is unknown.

    Example:
        >>> meaning("noisy_or")
        'max'
    """
    if aggregation not in MEANINGS:
        raise _unknown(aggregation)
    return MEANINGS[aggregation]


def log1mexp(log_probs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log(1 - exp(x))` for `x <= 0`, accurate at both ends.

    Two forms are needed: `log(-expm1(x))` loses digits for very negative `x`, `log1p(-exp(x))` near 0; they meet at
    `-log 2` (Machler, "Accurately computing log(1 - exp(-|a|))", 2012). Arguments are clamped one float spacing below
    0, because value and gradient are infinite at 0.

    Example:
        >>> log1mexp(torch.tensor([-0.6931472]))
        tensor([-0.6931])
    """
    # One float32 spacing below zero: probability 1 - 1e-7, which limits the loss to 16 nats.
    log_probs = log_probs.clamp(max=-torch.finfo(torch.float32).eps)
    near_zero = log_probs > -0.6931472
    # `where` before and after the function: the branch not taken must not put NaN into the gradient.
    close = torch.log(-torch.expm1(torch.where(near_zero, log_probs, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, log_probs)))
    return torch.where(near_zero, close, far)


def check_mask(mask: Bool[Tensor, "B S"]) -> None:
    """Check that every bag has a real step.

    Raises:
        ValueError: If a row of `mask` is all False; names the first such row.
    """
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(mask)} bags have no steps (first: row {empty[0]}). "
            "Drop empty responses before aggregating."
        )


def _log_mean_exp(values: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, " B"]:
    """`log(mean(exp(x)))` over the real steps of each bag.

    `expm1` and `log1p` keep precision when all values are close to 0, like log-probabilities of confident steps;
    `logsumexp(x) - log(count)` would then subtract two nearly equal numbers.
    """
    # A constant shift: its own gradient would cancel.
    peak = values.detach().masked_fill(~mask, -torch.inf).amax(dim=1)
    above = torch.expm1(values - peak[:, None]).masked_fill(~mask, 0.0)
    return peak + torch.log1p(above.sum(dim=1) / mask.sum(dim=1))


def _product(
    logits: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """`log P` that all steps are good, and that one is not.

    The second is a sum over which step is the first bad one. `log1mexp` of the first would be simpler, but it loses all
    precision if every step is almost surely good, so such a response with label 0 would give no gradient.
    """
    good = F.logsigmoid(logits).masked_fill(~mask, 0.0)
    before = good.cumsum(dim=1) - good
    bad = F.logsigmoid(-logits).masked_fill(~mask, -torch.inf)
    return good.sum(dim=1), torch.logsumexp(before + bad, dim=1)


def bag_log_probs(
    logits: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
    sharpness: float = 1.0,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Log-probabilities that a bag is good and that it is not.

    With `p` the step probabilities, `x` their logits and `r` the sharpness:

    | aggregation | bag probability |
    |---|---|
    | `"min"`, `"max"` | the extreme step's: the sigmoid is monotone, so that step gets all the gradient |
    | `"mean"` | `mean p`, the expected share of good steps |
    | `"product"` | `prod p`, the exact probability of "every step is good" if steps are independent |
    | `"noisy_or"` | `1 - prod (1 - p)`, the exact probability of "some step is good" if steps are independent |
    | `"softmax"`, `"softmin"` | `sigmoid(sum w x)`, `w = softmax(r x)`, `softmax(-r x)`; gradient reaches `w` too |

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.
        sharpness: How close `"softmin"` and `"softmax"` come to the extreme step; others ignore it.

    Returns:
        `log P(bag is good)` and `log P(bag is not good)`, in nats, float32.

    Raises:
        ValueError: If a bag has no real step, the aggregation is unknown, or the sharpness is not finite and above 0.

    Source:
        `"min"`, `"max"`, `"mean"`: FRACTAL (Makhija et al., ACL 2025). `"softmax"`: LCA (arXiv 2606.27739).
        `"product"` is our own exact form of the minimum.

    Example:
        >>> good, bad = bag_log_probs(
        ...     torch.zeros(1, 3), torch.tensor([[True, True, False]]), aggregation="product"
        ... )
        >>> good.exp(), bad.exp()  # two real steps at p = 0.5
        (tensor([0.2500]), tensor([0.7500]))
    """
    check_mask(mask)
    if not (sharpness > 0 and math.isfinite(sharpness)):
        raise ValueError(f"The sharpness is {sharpness}. Give a finite number above 0.")
    if aggregation in _MIRRORED:
        bad, good = bag_log_probs(-logits, mask, aggregation=_MIRRORED[aggregation], sharpness=sharpness)
        return good, bad
    # From here on padding is an ordinary number without gradient, so products and powers cannot turn it into NaN.
    logits = logits.float().masked_fill(~mask, 0.0)
    if aggregation == "mean":
        return _log_mean_exp(F.logsigmoid(logits), mask), _log_mean_exp(F.logsigmoid(-logits), mask)
    if aggregation == "product":
        return _product(logits, mask)
    if aggregation == "min":
        logit = logits.masked_fill(~mask, torch.inf).amin(dim=1)
    elif aggregation == "softmin":
        weights = (-sharpness * logits).masked_fill(~mask, -torch.inf).softmax(dim=1)
        logit = (weights * logits).sum(dim=1)
    else:
        raise _unknown(aggregation)
    return F.logsigmoid(logit), F.logsigmoid(-logit)


def aggregate(
    logits: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
    sharpness: float = 1.0,
) -> Float[Tensor, " B"]:
    """The bag's logit, `log P(good) - log P(not good)`.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        mask: True where a step is real. Every bag needs one.
        aggregation: How step probabilities become a bag probability.
        sharpness: How close `"softmin"` and `"softmax"` come to the extreme step; others ignore it.

    Returns:
        Bag scores before the sigmoid, float32.

    Raises:
        ValueError: If a bag has no real step, the aggregation is unknown, or the sharpness is not finite and above 0.

    Example:
        >>> aggregate(torch.tensor([[2.0, -1.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([-1.])
    """
    good, bad = bag_log_probs(logits, mask, aggregation=aggregation, sharpness=sharpness)
    return good - bad
