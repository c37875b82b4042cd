"""Step labels inferred from a response's label: the most likely ones, and the probability of each.

Both treat the model's step probabilities as independent. The bag label is either a fact, so step labels must satisfy
its rule (`meaning`), or evidence that is wrong for known shares of responses. Neither carries gradient: they return
targets.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.objectives.aggregation import GOOD, Aggregation, check_mask, log1mexp, meaning
from fractal_rm.objectives.bag_loss import check_label_noise


def _evidence(
    logits: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], gold: Float[Tensor, "B S"] | None
) -> tuple[Float[Tensor, "B S"], Bool[Tensor, "B S"], Bool[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Gold labels, NaN where unknown; masks of the steps without one, known to be good, and known to be bad."""
    check_mask(mask)
    gold = torch.full_like(logits, torch.nan) if gold is None else gold
    known = mask & ~gold.isnan()
    good = known & (gold >= GOOD)
    return gold, mask & ~known, good, known & ~good


def _round_half_up(bag_labels: Float[Tensor, " B"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, " B"]:
    """Number of good steps for a share of good steps."""
    return (bag_labels * mask.sum(dim=1) + 0.5).floor()


def _evidence_of_label(says_good: Bool[Tensor, " B"], label_noise: tuple[float, float]) -> Float[Tensor, " B"]:
    """Log-odds (B,) of a good against a bad response given its label; infinite if the label cannot be wrong."""
    missed_good, missed_bad = (math.log(share) if share else -math.inf for share in label_noise)
    kept_good, kept_bad = (math.log1p(-share) for share in label_noise)
    return torch.where(says_good, kept_good - missed_bad, missed_good - kept_bad).double()


def _most_likely_of_all(
    logits: Float[Tensor, "B S"],
    likely: Bool[Tensor, "B S"],
    evidence: Float[Tensor, " B"],
    free: Bool[Tensor, "B S"],
    bad: Bool[Tensor, "B S"],
) -> Bool[Tensor, "B S"]:
    """Labels of the free steps under "every step is good", or under "some step is bad", whichever is more likely.

    `likely` are the labels that no rule constrains; `evidence` are the log-odds that the label gives for "every step is
    good"; `bad` are the steps known to be bad.
    """
    open_case = ~bad.any(dim=1)  # with a step known to be bad, one rule holds already and the other cannot
    unbroken = (likely | ~free).all(dim=1)
    worst = F.one_hot(logits.masked_fill(~free, torch.inf).argmin(dim=1), logits.shape[1]).bool()
    # How much more likely "all good" is than the most likely labels with a bad step: the sum of the logits of the steps
    # that are bad there, which are the negative ones, or else the lowest one.
    bad_there = free & torch.where(unbroken[:, None], worst, ~likely)
    odds = logits.double().masked_fill(~bad_there, 0.0).sum(dim=1)
    all_good = odds + evidence > 0
    broken = (open_case & ~all_good & unbroken)[:, None] & worst
    return (likely | (open_case & all_good)[:, None]) & ~broken


def _most_likely_of_count(
    logits: Float[Tensor, "B S"],
    likely: Bool[Tensor, "B S"],
    good_free: Float[Tensor, " B"],
    free: Bool[Tensor, "B S"],
) -> Bool[Tensor, "B S"]:
    """Labels of the free steps if exactly `good_free` of them are good; unconstrained labels if that is impossible."""
    order = logits.masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    possible = (good_free >= 0) & (good_free <= free.sum(dim=1))
    return torch.where(possible[:, None], rank < good_free[:, None], likely)


def _rule(aggregation: str, label_noise: tuple[float, float]) -> str:
    """The rule that the label of a response sets for its steps."""
    check_label_noise(label_noise)
    rule = meaning(aggregation)
    if rule == "mean" and any(label_noise):
        raise ValueError(
            f"The label noise is {label_noise} under {aggregation!r}, where a label is a share of good steps, not "
            "right or wrong. Give (0, 0), or another aggregation."
        )
    return rule


def pseudo_labels(
    logits: Float[Tensor, "B S"],
    bag_labels: Float[Tensor, " B"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
    gold: Float[Tensor, "B S"] | None = None,
    label_noise: tuple[float, float] = (0.0, 0.0),
) -> Float[Tensor, "B S"]:
    """The step labels that are most likely under the model among those that agree with the bag label.

    - Every step is good (`meaning` "min", label 1): all 1. Some step is bad (label 0): each step is thresholded, and if
      none falls below, the least likely one becomes 0.
    - `meaning` "max": the mirror image.
    - `meaning` "mean": the `round(k y)` most likely of the `k` steps are 1, halves rounded up.

    Soft labels count as 1 from 0.5 on under "min" and "max". Without a constraint a step is 1 from probability 0.5 on.
    Gold labels are fixed, and the other labels are the most likely ones given them. Where gold labels contradict the
    bag label, gold wins, and the other steps are unconstrained. With label noise the bag label may be wrong: the step
    labels are then the most likely ones given model and bag label together.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        bag_labels: Response labels, as probabilities in [0, 1]; the share of good steps under "mean".
        mask: True where a step is real. Every bag needs one.
        aggregation: How step labels determine the response's label.
        gold: Step labels that are known, NaN elsewhere.
        label_noise: Share of good responses labelled bad, and of bad responses labelled good; (0, 0) under "mean".

    Returns:
        Labels, 0 or 1 except for soft gold labels; NaN at padding.

    Raises:
        ValueError: If a bag has no real step, the aggregation is unknown, or the label noise is not two shares whose
            sum is less than 1, or is above 0 for a share of good steps.

    Source:
        Maximum-likelihood pseudo-labels of FRACTAL (Makhija et al., ACL 2025); the share of good steps and gold labels
        are this package's extension.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, 2.0]])
        >>> pseudo_labels(logits, torch.tensor([0.0]), torch.ones(1, 3, dtype=torch.bool))
        tensor([[1., 0., 1.]])
    """
    rule = _rule(aggregation, label_noise)
    gold, free, good, bad = _evidence(logits, mask, gold)
    likely = logits >= 0.0
    evidence = _evidence_of_label(bag_labels >= GOOD, label_noise)
    if rule == "min":
        labels = _most_likely_of_all(logits, likely, evidence, free, bad)
    elif rule == "max":
        labels = ~_most_likely_of_all(-logits, ~likely, -evidence, free, good)
    else:
        good_free = _round_half_up(bag_labels, mask) - good.sum(dim=1)
        labels = _most_likely_of_count(logits, likely, good_free, free)
    return torch.where(good | bad, gold, labels.float()).masked_fill(~mask, torch.nan)


def _posterior_of_all(
    logits: Float[Tensor, "B S"],
    all_good: Float[Tensor, " B"],
    free: Bool[Tensor, "B S"],
    bad: Bool[Tensor, "B S"],
) -> Float[Tensor, "B S"]:
    """Probability that a free step is good if every step is with probability `all_good`."""
    log_good = F.logsigmoid(logits).masked_fill(~free, 0.0)
    log_bad = F.logsigmoid(-logits).masked_fill(~free, -torch.inf)
    # P(some step is bad) = sum over steps of P(it is the first bad one): all terms are positive, so nothing cancels if
    # all steps are almost surely good and 1 - prod(p) would round to 0.
    before = F.pad(log_good.cumsum(dim=1)[:, :-1], (1, 0))
    log_some_bad = (log_bad + before).logsumexp(dim=1, keepdim=True)
    good_given_some_bad = -torch.expm1((log_bad - log_some_bad).clamp(max=0.0))
    mixed = all_good[:, None] + (1.0 - all_good[:, None]) * good_given_some_bad
    return torch.where(bad.any(dim=1, keepdim=True), logits.sigmoid(), mixed)


def _true_labels(
    logits: Float[Tensor, "B S"],
    labels: Float[Tensor, " B"],
    free: Bool[Tensor, "B S"],
    label_noise: tuple[float, float],
) -> Float[Tensor, " B"]:
    """Probability (B,) that every free step is good, given the steps and a label that may be wrong.

    A soft label mixes the results for label 1 and label 0.
    """
    if not any(label_noise):
        return labels
    log_good = F.logsigmoid(logits).masked_fill(~free, 0.0).sum(dim=1)
    # A response without free steps needs no result.
    odds = torch.where(free.any(dim=1), log_good - log1mexp(log_good.clamp(max=-1e-300)), 0.0)
    says_good = torch.ones_like(labels, dtype=torch.bool)
    good, bad = ((odds + _evidence_of_label(said, label_noise)).sigmoid() for said in (says_good, ~says_good))
    return labels * good + (1.0 - labels) * bad


def _one_more(log_probs: Tensor) -> Tensor:
    """Shift left: entry `c` becomes the old entry `c + 1`."""
    return F.pad(log_probs[:, 1:], (0, 1), value=-torch.inf)


def _posterior_of_count(
    logits: Float[Tensor, "B S"], good_free: Float[Tensor, " B"], free: Bool[Tensor, "B S"]
) -> Float[Tensor, "B S"]:
    """Probability that a free step is good if exactly `good_free` are: forward and backward over the running count."""
    bags, steps = logits.shape
    log_good = F.logsigmoid(logits).masked_fill(~free, -torch.inf)[:, :, None]  # a step that is not free adds nothing
    log_bad = F.logsigmoid(-logits).masked_fill(~free, 0.0)[:, :, None]
    counts = torch.arange(steps + 1, device=logits.device)

    # remaining[i][:, c]: log P(steps i, i + 1, ... raise the count from c to good_free).
    remaining = [torch.where(counts == good_free[:, None], 0.0, -torch.inf).to(logits)]
    for i in reversed(range(steps)):
        rest = remaining[0]
        remaining.insert(0, torch.logaddexp(rest + log_bad[:, i], _one_more(rest) + log_good[:, i]))
    # reached[:, c]: log P(c of the steps before i are good).
    reached = torch.where(counts == 0, 0.0, -torch.inf).to(logits).expand(bags, -1)
    joint = []
    for i in range(steps):
        joint.append((reached + log_good[:, i] + _one_more(remaining[i + 1])).logsumexp(dim=1))
        one_less = F.pad(reached[:, :-1], (1, 0), value=-torch.inf)
        reached = torch.logaddexp(reached + log_bad[:, i], one_less + log_good[:, i])
    evidence = remaining[0][:, :1]  # log P(good_free of the free steps are good)
    posterior = (torch.stack(joint, dim=1) - evidence).clamp(max=0.0).exp()
    return torch.where(evidence.isinf(), logits.sigmoid(), posterior)


def posteriors(
    logits: Float[Tensor, "B S"],
    bag_labels: Float[Tensor, " B"],
    mask: Bool[Tensor, "B S"],
    *,
    aggregation: Aggregation = "min",
    gold: Float[Tensor, "B S"] | None = None,
    label_noise: tuple[float, float] = (0.0, 0.0),
) -> Float[Tensor, "B S"]:
    """Probability that each step is good, given the bag label.

    Exact, by Bayes' rule for independent steps with the bag label as evidence:

    - `meaning` "min": 1 if every step is good; `(p_i - prod p) / (1 - prod p)` if some step is bad.
    - `meaning` "max": the mirror image.
    - `meaning` "mean": `P(z_i = 1 | sum z = round(k y))`, halves rounded up, in time quadratic in the steps.

    Soft labels mix the two answers under "min" and "max", and so does label noise, with the probability that the
    response is good by its label and the model together. Gold labels are evidence too. Where they contradict the bag
    label, gold wins, and the other steps keep their own probability.

    Args:
        logits: Step scores before the sigmoid. Values at padding are ignored.
        bag_labels: Response labels, as probabilities in [0, 1]; the share of good steps under "mean".
        mask: True where a step is real. Every bag needs one.
        aggregation: How step labels determine the response's label.
        gold: Step labels that are known, NaN elsewhere.
        label_noise: Share of good responses labelled bad, and of bad responses labelled good; (0, 0) under "mean".

    Returns:
        Probabilities in [0, 1], gold labels where known; NaN at padding.

    Raises:
        ValueError: If a bag has no real step, the aggregation is unknown, or the label noise is not two shares whose
            sum is less than 1, or is above 0 for a share of good steps.

    Source:
        This package's derivation: the expectation step, which hard pseudo-labels replace by the mode.

    Example:
        >>> posteriors(torch.zeros(1, 2), torch.tensor([0.0]), torch.ones(1, 2, dtype=torch.bool))  # 00, 01 or 10
        tensor([[0.3333, 0.3333]])
    """
    rule = _rule(aggregation, label_noise)
    gold, free, good, bad = _evidence(logits, mask, gold)
    # Double precision: for confident steps, the probability of a count is a difference of sums of thousands of nats.
    scores, labels = logits.detach().double().masked_fill(~mask, 0.0), bag_labels.double()
    if rule == "min":
        probs = _posterior_of_all(scores, _true_labels(scores, labels, free, label_noise), free, bad)
    elif rule == "max":
        mirrored = _true_labels(-scores, 1.0 - labels, free, (label_noise[1], label_noise[0]))
        probs = 1.0 - _posterior_of_all(-scores, mirrored, free, good)
    else:
        probs = _posterior_of_count(scores, _round_half_up(bag_labels, mask) - good.sum(dim=1), free)
    return torch.where(good | bad, gold, probs.float()).masked_fill(~mask, torch.nan)
