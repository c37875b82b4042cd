"""Grades instead of good and bad: each step has one of `G` ordered grades, and a response has the grade of its best
step.

A step's scores are `G` logits, softmax over grades 0, ..., G - 1, and steps are independent. For two grades this equals
the noisy-or of the binary case.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Real
from torch import Tensor

from fractal_rm.objectives.aggregation import check_mask


def ordinal_max_log_probs(logits: Float[Tensor, "B S G"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B G"]:
    """Log-probability that a bag's highest grade is `c`, for each `c`.

    With `F_i(c) = P(grade_i <= c)` it is `prod F_i(c) - prod F_i(c - 1)`. The difference is written as a sum over which
    step is the first of grade `c`, so no two nearly equal products cancel, and a grade that no step is likely to have
    keeps its gradient.

    Args:
        logits: Scores of each step and grade before the softmax. Values at padding are ignored.
        mask: True where a step is real. Every bag needs one.

    Returns:
        Log-probabilities in nats, float32; their exponentials sum to 1 over grades.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        This package's exact form of the maximum over graded steps in FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> two_fair_coins = torch.zeros(1, 2, 2)
        >>> ordinal_max_log_probs(two_fair_coins, torch.ones(1, 2, dtype=torch.bool)).exp()
        tensor([[0.2500, 0.7500]])
    """
    check_mask(mask)
    padding = ~mask[:, :, None]
    log_probs = logits.float().masked_fill(padding, 0.0).log_softmax(dim=2)
    at_most = log_probs.logcumsumexp(dim=2)
    below = F.pad(at_most[:, :, :-1], (1, 0), value=-torch.inf)
    at_most, below = at_most.masked_fill(padding, 0.0), below.masked_fill(padding, 0.0)
    # Of the steps before i and after i; neither includes i.
    before = F.pad(below.cumsum(dim=1)[:, :-1], (0, 0, 1, 0))
    after = F.pad(at_most.flip(1).cumsum(dim=1).flip(1)[:, 1:], (0, 0, 0, 1))
    return (before + log_probs.masked_fill(padding, -torch.inf) + after).logsumexp(dim=1)


def ordinal_bag_loss(
    logits: Float[Tensor, "B S G"], grades: Real[Tensor, " B"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    """Cross entropy between a bag's grade and the distribution of its highest step grade.

    Args:
        logits: Scores of each step and grade before the softmax. Values at padding are ignored.
        grades: Response grades, whole numbers from 0 to G - 1.
        mask: True where a step is real. Every bag needs one.

    Returns:
        Loss of each bag, in nats, not averaged.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        Ordinal bag loss of FRACTAL (Makhija et al., ACL 2025), with the exact distribution of the maximum.

    Example:
        >>> ordinal_bag_loss(torch.zeros(1, 1, 4), torch.tensor([2]), torch.tensor([[True]]))
        tensor([1.3863])
    """
    return -ordinal_max_log_probs(logits, mask).gather(1, grades.long()[:, None])[:, 0]


def ordinal_instance_loss(
    logits: Float[Tensor, "B S G"], step_grades: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    """Cross entropy of the steps whose grade is known, averaged over the bag.

    Args:
        logits: Scores of each step and grade before the softmax. Values at padding are ignored.
        step_grades: Whole numbers from 0 to G - 1, NaN where unknown.
        mask: True where a step is real. Every bag needs one.

    Returns:
        Loss of each bag, in nats; 0 for a bag without a known step grade.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        Instance loss of FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> grades = torch.tensor([[3.0, float("nan")]])
        >>> ordinal_instance_loss(torch.zeros(1, 2, 4), grades, torch.ones(1, 2, dtype=torch.bool))
        tensor([1.3863])
    """
    check_mask(mask)
    known = mask & ~step_grades.isnan()
    targets = step_grades.masked_fill(~known, 0.0).long()
    losses = -logits.float().log_softmax(dim=2).gather(2, targets[:, :, None])[:, :, 0]
    return losses.masked_fill(~known, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)


def expected_grades(logits: Float[Tensor, "B S G"]) -> Float[Tensor, "B S"]:
    """Mean grade of each step: one number to rank steps by.

    Args:
        logits: Scores of each step and grade before the softmax.

    Returns:
        Expected grades in [0, G - 1].

    Example:
        >>> expected_grades(torch.zeros(1, 1, 4))
        tensor([[1.5000]])
    """
    probs = logits.float().softmax(dim=2)
    return probs @ torch.arange(logits.shape[2], device=logits.device, dtype=probs.dtype)


def ordinal_pseudo_labels(
    logits: Float[Tensor, "B S G"], grades: Real[Tensor, " B"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, "B S"]:
    """The step grades that are most likely under the model among those whose maximum is the bag's grade.

    Each step takes its most likely grade among those up to the bag's. If no step reaches the bag's grade, the step
    whose likelihood falls least is raised to it: the step with the largest ratio of its probability of the bag's grade
    to that of its most likely grade. The authors' rule raises the step with the largest probability of the bag's grade,
    which need not give the most likely grades.

    Args:
        logits: Scores of each step and grade before the softmax. Values at padding are ignored.
        grades: Response grades, whole numbers from 0 to G - 1.
        mask: True where a step is real. Every bag needs one.

    Returns:
        Step grades; NaN at padding. They carry no gradient.

    Raises:
        ValueError: If a bag has no real step.

    Source:
        Maximum-likelihood pseudo-labels of FRACTAL (Makhija et al., ACL 2025), with this package's exact rule.

    Example:
        >>> logits = torch.tensor([[[3.0, 0.0, 0.0], [3.0, 1.0, 5.0]]])
        >>> ordinal_pseudo_labels(logits, torch.tensor([1]), torch.ones(1, 2, dtype=torch.bool))
        tensor([[0., 1.]])
    """
    check_mask(mask)
    scores = logits.detach().float().masked_fill(~mask[:, :, None], 0.0)
    bag_grades = grades.long()[:, None]
    too_high = torch.arange(logits.shape[2], device=logits.device) > bag_grades
    best, chosen = scores.masked_fill(too_high[:, None], -torch.inf).max(dim=2)
    # The softmax normaliser is the same for all grades of a step, so logits and log-probabilities have the same
    # differences.
    at_bag_grade = scores.gather(2, bag_grades[:, :, None].expand(-1, logits.shape[1], 1))[:, :, 0]
    cheapest = (at_bag_grade - best).masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
    # If a step already has the bag's grade, its cost is 0 and raising it changes nothing.
    labels = chosen.scatter(1, cheapest, bag_grades)
    return labels.float().masked_fill(~mask, torch.nan)
