"""Step scores -> step rewards: what a step earns, given P(step is good) of every step of every response.

Shaping changes what a policy is paid for, so each form states what a whole response earns and what bounds hold. With
`s_1 ... s_S` the scores of a response and `c` the threshold:

| form | reward of step t | a response earns |
|---|---|---|
| `"raw"` | `s_t`, in [0, 1] | more with every step, good or bad |
| `"centered"` | `s_t - baseline`, in [-1, 1] | more with every step above the baseline |
| `"log_odds"` | `log(s_t / (1 - s_t))`, in [-6.9, 6.9] | the log-odds that every step is good against every step bad |
| `"delta"` | `s_t - s_(t-1)`, the first `s_1 - c`; in [-1, 1] | `s_S - c`: what its last step scores |
| `"min_form"` | `m_t - m_(t+1)`, where `m_t` is the minimum of `s_t ... s_S`, the last `s_S`; in [-1, 1] | `m_1` |
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Shaping = Literal["raw", "centered", "log_odds", "delta", "min_form"]
Center = Literal["batch", "group", "threshold"]
LengthNeutral = Literal["none", "mean", "cap"]
KLEstimator = Literal["k1", "k3"]

# Scores nearer than this to 0 or 1 count as this near: a saturated sigmoid says no more than odds of a thousand to one.
LOG_ODDS_EPSILON = 1e-3
# A log-ratio of 20 nats is a ratio of 5e8: beyond it, k3's exponential would drown every other token of a batch.
MAX_LOG_RATIO = 20.0
# Below this variance, rewards are the same number with rounding errors: there is no spread to divide by.
MIN_VARIANCE = 1e-8
# How fast the coefficient of the KL penalty follows, and the largest relative error it answers (Ziegler et al., 2019).
ADAPTIVE_KL_GAIN = 0.1
ADAPTIVE_KL_CLIP = 0.2


def _baseline(
    scores: Float[Tensor, "B S"], mask: Bool[Tensor, "B S"], center: str, threshold: float, group_size: int
) -> Float[Tensor, "B 1"]:
    """What `"centered"` subtracts; `scores` are 0 at padding."""
    if center == "threshold":
        return scores.new_full((len(scores), 1), threshold)
    size = len(scores) if center == "batch" else group_size
    if size < 1 or len(scores) % size:
        raise ValueError(
            f"{len(scores)} responses are not whole groups of {size}. "
            "Pass all completions of each prompt together, `num_generations` consecutive rows a prompt."
        )
    totals = scores.sum(dim=1).view(-1, size).sum(dim=1)
    counts = mask.sum(dim=1).view(-1, size).sum(dim=1)
    return (totals / counts.clamp(min=1)).repeat_interleave(size)[:, None]


def shape_step_scores(
    scores: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    shaping: Shaping = "centered",
    center: Center = "batch",
    threshold: float = 0.5,
    group_size: int = 1,
) -> Float[Tensor, "B S"]:
    """Rewards of steps from their scores: see the table of forms at the head of this module.

    Args:
        scores: P(step is good), in [0, 1]. Values at padding are ignored.
        mask: True where a step is real. The real steps of a row come first; a row may have none.
        shaping: The form.
        center: Baseline of `"centered"`: the mean over the batch, over the prompt's completions, or the threshold.
        threshold: Score that is neither good nor bad: for `center="threshold"`, and what the first difference of
            `"delta"` is taken from.
        group_size: Completions per prompt, for `center="group"`. Rows of a group are consecutive.

    Returns:
        Rewards, 0 at padding, in float32 or wider. With `"delta"` and `"min_form"`, rewards that follow one another sum
        to a score: clip or divide them and they no longer do.

    Raises:
        ValueError: If the form is unknown, or the rows are not whole groups.

    Source:
        `"min_form"`: the return of PURE (Cheng et al., "Stop Summation: Min-Form Credit Assignment Is All Process
        Reward Model Needs for Reasoning", 2025), here exact: differences, where PURE weighs by a softmax. `"delta"`:
        after Gao et al., "On Designing Effective RL Reward at Training Time for LLM Reasoning", 2024.

    Example:
        >>> scores, mask = torch.tensor([[0.75, 0.25, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
        >>> shape_step_scores(scores, mask, shaping="delta")  # sums to 0.5 - 0.5
        tensor([[ 0.2500, -0.5000,  0.2500]])
        >>> shape_step_scores(scores, mask, shaping="min_form")  # returns: 0.25, 0.25, 0.5
        tensor([[ 0.0000, -0.2500,  0.5000]])
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
    raise ValueError(f"Unknown shaping {shaping!r}. Choose raw, centered, log_odds, delta or min_form.")


def limit_step_rewards(
    rewards: Float[Tensor, "B S"],
    mask: Bool[Tensor, "B S"],
    *,
    clip: float | None = None,
    length_neutral: LengthNeutral = "none",
) -> Float[Tensor, "B S"]:
    """Bound what one step earns, and what a response earns by having many.

    `"mean"` divides by the number of steps: a response earns the mean of its steps, so it can neither gain by repeating
    what it has nor earn more than its best step. But steps above the mean raise it, and so hide a bad one. `"cap"` lets
    a step lose reward and never gain any, so appending good steps never raises a total, whatever the others are.

    Args:
        rewards: Reward of each step. Values at padding are ignored.
        mask: True where a step is real.
        clip: Rewards are kept in [-clip, clip]; None: as they are.
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


class RunningMoments:
    """Mean and variance of everything seen so far, batch by batch, as if it had come at once.

    Source:
        Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Example:
        >>> moments = RunningMoments()
        >>> moments.update(torch.tensor([1.0, 3.0]))
        >>> moments.update(torch.tensor([5.0]))
        >>> moments.mean, moments.std
        (3.0, 2.0)
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: Float[Tensor, " N"]) -> None:
        """Add a batch; an empty one changes nothing."""
        if not len(values):
            return
        values = values.double()
        mean, count = float(values.mean()), self.count + len(values)
        shift = mean - self.mean
        self._squares += float((values - mean).square().sum()) + shift**2 * self.count * len(values) / count
        self.mean += shift * len(values) / count
        self.count = count

    @property
    def variance(self) -> float:
        """Sample variance; 0 of less than two values."""
        return self._squares / max(self.count - 1, 1)

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 where there is no spread, so that it can be divided by."""
        return math.sqrt(self.variance) if self.variance > MIN_VARIANCE else 1.0

    def state_dict(self) -> dict[str, int | float]:
        """Everything there is to save, as numbers that JSON keeps to the last bit."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Go on from a saved state."""
        self.count, self.mean, self._squares = int(state["count"]), state["mean"], state["squares"]


def kl_estimates(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    estimator: KLEstimator = "k1",
) -> Float[Tensor, "B T"]:
    """KL divergence of the policy from the reference, estimated at each sampled token.

    `"k1"` is the log-ratio, which is negative where the reference likes the token better; `"k3"` is never negative and
    varies less. Both have the KL divergence as their mean over tokens that the policy sampled.

    Args:
        logprobs: The policy's log-probability of each sampled token. Values at masked positions are ignored.
        ref_logprobs: The reference's.
        mask: True where the policy wrote the token.
        estimator: `"k1"` or `"k3"`.

    Returns:
        Nats per token, 0 at masked positions. Log-ratios are kept in [-20, 20].

    Source:
        Schulman, "Approximating KL divergence", 2020.

    Example:
        >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -2.0]])
        >>> kl_estimates(logprobs, ref_logprobs, torch.ones(1, 2, dtype=torch.bool), estimator="k3")
        tensor([[0.0000, 0.3679]])
    """
    ratios = (logprobs.float() - ref_logprobs.float()).masked_fill(~mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ratios if estimator == "k1" else torch.expm1(-ratios) + ratios


class AdaptiveKL:
    """Coefficient of the KL penalty, which rises while the policy is further from the reference than a target.

    Args:
        coef: The coefficient at the start.
        target: KL per response that it steers to, in nats; None: the coefficient stays as it is.

    Source:
        Ziegler et al., "Fine-tuning language models from human preferences", 2019, section 2.2.

    Example:
        >>> kl = AdaptiveKL(0.1, target=6.0)
        >>> kl.update(12.0)  # twice too far; the relative error counts as 0.2
        >>> round(kl.coef, 6)
        0.102
    """

    def __init__(self, coef: float, *, target: float | None = None) -> None:
        self.coef, self.target = coef, target

    def update(self, kl: float) -> None:
        """Follow the mean KL per response of a rollout batch, in nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -ADAPTIVE_KL_CLIP), ADAPTIVE_KL_CLIP)
            self.coef *= 1.0 + ADAPTIVE_KL_GAIN * error

    def state_dict(self) -> dict[str, float]:
        """Everything there is to save."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.coef = state["coef"]
