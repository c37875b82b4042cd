"""Priors: beliefs about single steps before any label is seen, as targets, and the losses that pull towards them.

A prior is a target in [0, 1] for each step or pair of steps, from embeddings, likelihoods or another model's scores.
One loss, `teacher_prior`, serves every prior on single steps.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.objectives.aggregation import check_mask
from fractal_rm.objectives.bag_loss import instance_loss

Distance = Literal["cross_entropy", "absolute"]
Schedule = Literal["constant", "linear", "cosine"]

# A vector whose spread is below this share of its norm counts as constant: the float32 rounding error of its mean is
# about as large.
CONSTANT_BELOW = 1e-6

# Minimum scale of log-probabilities, in nats: if all are equal, rounding must not move a target from 0 to 1.
MIN_LIKELIHOOD_SCALE = 1e-3

# Distance of a normal distribution's quartiles, in standard deviations.
NORMAL_IQR = 1.349


def _as_prior(cosines: Tensor) -> Tensor:
    """Map cosines or correlations from [-1, 1] to [0, 1], clamped against rounding."""
    return ((1.0 + cosines) / 2.0).clamp(0.0, 1.0)


def cosine_targets(step_embeddings: Float[Tensor, "S D"], contexts: Float[Tensor, "S D"]) -> Float[Tensor, " S"]:
    """`(1 + cos) / 2` of each step to its context. The authors' released code uses the opposite sign, `(1 - cos) / 2`.

    Args:
        step_embeddings: An embedding of each step.
        contexts: For each step the embedding of the part of the prompt that is nearest to it.

    Returns:
        Targets in [0, 1]; 0.5 for a zero vector.

    Source:
        Cosine prior of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> cosine_targets(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([1.0000, 0.5000])
    """
    steps, contexts = F.normalize(step_embeddings.float(), dim=-1), F.normalize(contexts.float(), dim=-1)
    return _as_prior(torch.einsum("sd,sd->s", steps, contexts))


def correlation_targets(step_embeddings: Float[Tensor, "B S D"]) -> Float[Tensor, "B S S"]:
    """`(1 + rho) / 2` of each pair of steps, `rho` the Pearson correlation of their embeddings.

    Args:
        step_embeddings: An embedding of each step.

    Returns:
        Symmetric targets in [0, 1]; 0.5 for a constant vector.

    Source:
        Correlation prior of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> correlation_targets(torch.tensor([[[1.0, 2.0, 3.0], [6.0, 4.0, 2.0]]])).round(decimals=4)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    vectors = step_embeddings.float()
    centred = vectors - vectors.mean(dim=-1, keepdim=True)
    constant = centred.norm(dim=-1) <= CONSTANT_BELOW * vectors.norm(dim=-1)
    units = F.normalize(centred.masked_fill(constant[:, :, None], 0.0), dim=-1)
    return _as_prior(units @ units.transpose(1, 2))


def likelihood_targets(mean_log_probs: Float[Tensor, "B S"], *, location: float, scale: float) -> Float[Tensor, "B S"]:
    """A step's mean log-probability under a language model, as a probability of being good.

    Args:
        mean_log_probs: Mean log-probability of each step's tokens, in nats; NaN where unknown.
        location: The log-probability mapped to 0.5, from `fit_likelihood_scale`.
        scale: The distance in nats mapped to `sigmoid(1)`, above 0.

    Returns:
        `sigmoid((x - location) / scale)`; NaN stays NaN.

    Raises:
        ValueError: If the scale is not above 0.

    Source:
        This package: the reference policy's likelihood is free in reinforcement learning.

    Example:
        >>> likelihood_targets(torch.tensor([[-1.0, -2.0]]), location=-1.0, scale=0.5)
        tensor([[0.5000, 0.1192]])
    """
    if not scale > 0:
        raise ValueError(f"The scale of the likelihood prior is {scale}. Give a number of nats above 0.")
    return torch.sigmoid((mean_log_probs.float() - location) / scale)


def fit_likelihood_scale(
    mean_log_probs: Sequence[float] | Float[Tensor, " N"],
) -> tuple[float, float]:
    """Location and scale of log-probabilities, robust to outliers.

    Args:
        mean_log_probs: Mean log-probability of each step of a data set. Values that are not finite are left out.

    Returns:
        The median and the interquartile range over 1.349, which is the standard deviation of normal values; at least
        `MIN_LIKELIHOOD_SCALE`.

    Raises:
        ValueError: If no value is finite.

    Example:
        >>> location, scale = fit_likelihood_scale([-3.0, -2.0, -1.0, 0.0, 1.0])
        >>> location, round(scale, 3)
        (-1.0, 1.483)
    """
    values = torch.as_tensor(mean_log_probs).detach().double().cpu().numpy()
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ValueError(
            f"None of {len(values)} log-probabilities is finite. Score some steps before fitting the likelihood prior."
        )
    low, median, high = np.quantile(finite, [0.25, 0.5, 0.75])
    return float(median), max(float(high - low) / NORMAL_IQR, MIN_LIKELIHOOD_SCALE)


def teacher_prior(
    logits: Float[Tensor, "B S"],
    targets: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    distance: Distance = "cross_entropy",
) -> Float[Tensor, " B"]:
    """Distance of step probabilities from scores you already have, averaged over the bag.

    The teacher may be a model fitted on a few gold steps, a larger reward model, a likelihood or an embedding.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        targets: The teacher's probabilities in [0, 1], NaN where unknown.
        mask: True where a step is real. Every bag needs one.
        distance: `"cross_entropy"`, or `"absolute"`: `|p - target|`, which is bounded.

    Returns:
        Loss of each bag; 0 for a bag without a known target.

    Raises:
        ValueError: If a bag has no real step or the distance is unknown.

    Source:
        Priors and gold-fraction loss of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> targets = torch.tensor([[0.75, float("nan")]])
        >>> teacher_prior(torch.zeros(1, 2), targets, torch.ones(1, 2, dtype=torch.bool), distance="absolute")
        tensor([0.2500])
    """
    if distance == "cross_entropy":
        return instance_loss(logits, targets, mask)
    if distance != "absolute":
        raise ValueError(f"Unknown distance {distance!r}. Choose cross_entropy or absolute.")
    check_mask(mask)
    known = mask & ~targets.isnan()
    gaps = (logits.float().sigmoid() - targets.masked_fill(~known, 0.0)).abs()
    return gaps.masked_fill(~known, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)


def correlation_prior(
    logits: Float[Tensor, "B S"], targets: Float[Tensor, "B S S"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    """Pulls the labels of similar steps together: the probability that two steps agree should match their correlation.

    Over the ordered pairs of a bag's `k` steps, including a step with itself, with `t` the target of a pair:
    `sum |(1 - p_i)(1 - p_j) - t| |p_i p_j - t| / k`.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        targets: Target of each pair in [0, 1], from `correlation_targets`. Values at padding are ignored.
        mask: True where a step is real. Every bag needs one.

    Returns:
        Loss of each bag. It grows with the number of steps: `k` pairs for each.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        Correlation prior of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> correlation_prior(torch.zeros(1, 1), torch.ones(1, 1, 1), torch.tensor([[True]]))  # (1/4 - 1)^2
        tensor([0.5625])
    """
    check_mask(mask)
    pairs = mask[:, :, None] & mask[:, None, :]
    targets = targets.masked_fill(~pairs, 0.0)
    good = logits.float().masked_fill(~mask, 0.0).sigmoid()
    bad = 1.0 - good
    both_good = good[:, :, None] * good[:, None, :]
    both_bad = bad[:, :, None] * bad[:, None, :]
    losses = (both_bad - targets).abs() * (both_good - targets).abs()
    return losses.masked_fill(~pairs, 0.0).sum(dim=(1, 2)) / mask.sum(dim=1)


def prior_weight(weight: float, progress: float, schedule: Schedule = "constant") -> float:
    """Weight of a prior at a point of training: a prior helps most early in training.

    Args:
        weight: The weight at the start.
        progress: Share of training that is done, clamped to [0, 1].
        schedule: `"constant"`, or a `"linear"` or `"cosine"` decay to 0.

    Returns:
        The weight now.

    Raises:
        ValueError: If the schedule is unknown.

    Example:
        >>> prior_weight(0.4, 0.75, "linear")
        0.1
    """
    left = 1.0 - min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return weight
    if schedule == "linear":
        return weight * left
    if schedule == "cosine":
        return weight * (1.0 - math.cos(math.pi * left)) / 2.0
    raise ValueError(f"Unknown schedule {schedule!r}. Choose constant, linear or cosine.")
