"""Step scores -> step rewards: what a step earns, given P(step is good) of every step of every response.

Shaping changes what a policy is rewarded for, so the table gives each form's total for a response and its bounds. With
`s_1 ... s_S` the scores of a response and `c` the threshold:

| form | reward of step t | a response earns |
|---|---|---|
| `"raw"` | `s_t`, in [0, 1] | more with every step, good or bad |
| `"centered"` | `s_t - baseline`, in [-1, 1] | 0 with its own mean, else more with every step above the baseline |
| `"log_odds"` | `log(s_t / (1 - s_t))`, in [-6.9, 6.9] | the log-odds that every step is good against every step bad |
| `"delta"` | `s_t - s_(t-1)`, the first `s_1 - c`; in [-1, 1] | `s_S - c`: its last step's score |
| `"min_form"` | `m_t - m_(t+1)`, where `m_t` is the minimum of `s_t ... s_S`, the last `s_S`; in [-1, 1] | `m_1` |
| `"first_mistake"` | `-s_1 ... s_(t-1) (1 - s_t)`, in [-1, 0]: minus P(first mistake is step t) | `s_1 ... s_S - 1` |

A policy chooses how its text is cut. Splitting a step, adding a filler line, repeating a line and changing the order
never raise what a response earns

- with `"centered"` and `center="response"`, whatever scores the pieces get: the sum is 0;
- with `"min_form"`, as long as a step's score does not depend on its position and the last piece of a split keeps the
  step's score: more scores have no higher minimum. A scorer that scores the halves of a wrong step higher than the
  whole breaks this;
- with `"first_mistake"`, under the same condition: more factors of at most 1;
- with `length_neutral="cap"` of [`limit_step_rewards`], under the same condition: more terms of 0 or less.

With all other forms a response can earn more by more steps above the baseline or its mean, or by another last step.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Shaping = Literal["raw", "centered", "log_odds", "delta", "min_form", "first_mistake"]
Center = Literal["response", "batch", "group", "threshold"]
LengthNeutral = Literal["none", "mean", "cap"]

# Scores are clamped this far from 0 and 1: a saturated sigmoid counts as odds of a thousand to one.
LOG_ODDS_EPSILON = 1e-3


def _baseline(
    scores: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], center: str, threshold: float, group_size: int
) -> Float[Tensor, "B 1"]:
    """The baseline of `"centered"`; `scores` are 0 at padding."""
    if center == "threshold":
        return scores.new_full((len(scores), 1), threshold)
    size = {"response": 1, "batch": len(scores)}.get(center, group_size)
    if size < 1 or len(scores) % size:
        raise ValueError(
            f"{len(scores)} responses are not whole groups of {size}. Pass all completions of each prompt together, "
            "`num_generations` consecutive rows per prompt."
        )
    totals = scores.sum(dim=1).view(-1, size).sum(dim=1)
    counts = mask.sum(dim=1).view(-1, size).sum(dim=1)
    return (totals / counts.clamp(min=1)).repeat_interleave(size)[:, None]


def shape_step_scores(
    scores: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    shaping: Shaping = "centered",
    center: Center = "response",
    threshold: float = 0.5,
    group_size: int = 1,
) -> Float[Tensor, "B S"]:
    """Step rewards from step scores: see the table of forms at the top of this module.

    Args:
        scores: P(step is good), in [0, 1]. Values at padding are ignored.
        mask: True where a step is real. The real steps of a row come first; a row may have none.
        shaping: The form.
        center: Baseline of `"centered"`: the mean over the steps of the response, of the batch or of the prompt's
            completions, or the threshold.
        threshold: Score that counts as neither good nor bad: for `center="threshold"`, and the start of `"delta"`.
        group_size: Completions per prompt, for `center="group"`. Rows of a group are consecutive.

    Returns:
        Rewards, 0 at padding, in float32 or wider. With `"delta"`, `"min_form"`, `"first_mistake"` and
        `center="response"`, the rewards of a response sum to a score, or to 0; clipping them breaks this.

    Raises:
        ValueError: If the form is unknown, or the rows are not whole groups.

    Source:
        `"min_form"`: the return of PURE (Cheng et al., "Stop Summation: Min-Form Credit Assignment Is All Process
        Reward Model Needs for Reasoning", 2025), here exact, by differences, while PURE weighs by a softmax. `"delta"`:
        after Gao et al., "On Designing Effective RL Reward at Training Time for LLM Reasoning", 2024.
        `"first_mistake"`: potential-based shaping (Ng et al., "Policy Invariance Under Reward Transformations", 1999);
        the potential is the probability that all steps so far are good, as the aggregation `product` has it.

    Example:
        >>> scores, mask = torch.tensor([[0.75, 0.25, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
        >>> shape_step_scores(scores, mask, shaping="delta")  # sums to 0.5 - 0.5
        tensor([[ 0.2500, -0.5000,  0.2500]])
        >>> shape_step_scores(scores, mask, shaping="min_form")  # returns: 0.25, 0.25, 0.5
        tensor([[ 0.0000, -0.2500,  0.5000]])
        >>> shape_step_scores(scores, mask, shaping="first_mistake")  # sums to 0.75 * 0.25 * 0.5 - 1
        tensor([[-0.2500, -0.5625, -0.0938]])
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, 0.0)
    if shaping == "raw":
        return scores
    if shaping == "centered":
        return (scores - _baseline(scores, mask, center, threshold, group_size)).masked_fill(~mask, 0.0)
    if shaping == "log_odds":
        return scores.clamp(LOG_ODDS_EPSILON, 1.0 - LOG_ODDS_EPSILON).logit().masked_fill(~mask, 0.0)
    start = scores.new_full((len(scores), 1), threshold)
    if shaping == "delta":
        return (scores - torch.cat([start, scores], dim=1)[:, :-1]).masked_fill(~mask, 0.0)
    if shaping == "min_form":
        to_go = scores.masked_fill(~mask, torch.inf).flip(1)
        to_go = (to_go.cummin(dim=1).values if scores.shape[1] else to_go).flip(1).masked_fill(~mask, 0.0)
        return to_go - torch.cat([to_go, torch.zeros_like(start)], dim=1)[:, 1:]
    if shaping == "first_mistake":
        good_so_far = scores.masked_fill(~mask, 1.0).cumprod(dim=1)
        return good_so_far - torch.cat([torch.ones_like(start), good_so_far], dim=1)[:, :-1]
    raise ValueError(f"Unknown shaping {shaping!r}. Choose raw, centered, log_odds, delta, min_form or first_mistake.")


def limit_step_rewards(
    rewards: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    clip: float | None = None,
    length_neutral: LengthNeutral = "none",
) -> Float[Tensor, "B S"]:
    """Bound the reward of a step, and the gain from having many steps.

    `"mean"` divides by the number of steps: a response earns the mean of its steps, so it cannot gain by repeating all
    its steps or earn more than its best step. But steps above the mean raise it, and so hide a bad step. `"cap"` makes
    every step reward 0 or less, so appending good steps never raises the total.

    Args:
        rewards: Reward of each step. Values at padding are ignored.
        mask: True where a step is real.
        clip: Rewards are clipped to [-clip, clip]; None: no clipping.
        length_neutral: `"none"`, `"mean"` or `"cap"`.

    Returns:
        Rewards, 0 at padding.

    Raises:
        ValueError: If `clip` is not above 0, or `length_neutral` is unknown.

    Example:
        >>> rewards, mask = torch.tensor([[0.5, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> limit_step_rewards(rewards, mask, clip=1.0, length_neutral="mean")
        tensor([[ 0.2500, -0.5000]])
        >>> limit_step_rewards(rewards, mask, clip=1.0, length_neutral="cap")
        tensor([[ 0., -1.]])
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"The clip of step rewards is {clip}. Give a number above 0, or None for no clip.")
        rewards = rewards.clamp(-clip, clip)
    if length_neutral == "mean":
        return rewards / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if length_neutral == "cap":
        return rewards.clamp(max=0.0)
    if length_neutral != "none":
        raise ValueError(f"Unknown length_neutral {length_neutral!r}. Choose none, mean or cap.")
    return rewards
