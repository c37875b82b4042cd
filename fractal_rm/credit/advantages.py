"""Rewards and values -> advantages: plain functions on (B, T) tensors, True in a mask = a token of the policy.

Interior masked tokens (the output of a tool) are not decisions of the policy. Rewards and values there are ignored, and
credit from later tokens passes over them as if they were not there.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.credit.placement import check_step_rewards, placeable_ends

Baseline = Literal["step", "token"]

# Keep a division by a standard deviation finite. The values are TRL's, for whitening (1e-8 inside the root) and for
# group advantages (1e-4 outside it), so that numbers can be compared.
WHITEN_EPSILON = 1e-8
GROUP_EPSILON = 1e-4


def _next_real(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Value at the next real token after each position; 0 where there is none."""
    width = mask.shape[1]
    positions = torch.arange(width, device=mask.device).expand(mask.shape).masked_fill(~mask, width)
    first_from_here = positions.flip(1).cummin(dim=1).values.flip(1)
    after = F.pad(first_from_here, (0, 1), value=width)[:, 1:]
    return F.pad(values, (0, 1)).gather(1, after)


def _discounted_sums(x: Float[Tensor, "B T"], decay: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`y[t] = x[t] + decay[t] * y[t + 1]` for every t at once, in log2(T) rounds.

    After a round with `reach` k, `x[t]` holds the sum over the next 2k positions and `decay[t]` the product of their
    decays. It never divides by a power of the decay, so it is as safe as the loop for decay 1 and long rows, with a few
    kernels per doubling instead of a few per token.
    """
    reach, width = 1, x.shape[1]
    while reach < width:
        x = x + decay * F.pad(x[:, reach:], (0, reach))
        decay = decay * F.pad(decay[:, reach:], (0, reach))
        reach *= 2
    return x


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, "B T"] = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimates and the returns a value model learns.

    Episodes end at their last real token: nothing is bootstrapped after it. The recursion runs over all tokens at once
    (a doubling scan over T), not in a loop over tokens.

    Args:
        rewards: Reward of each token. Values at masked positions are ignored.
        values: Value of the state before each token, as the value model predicts it. Ignored at masked positions.
        mask: True where the policy wrote the token. Masked tokens in the middle are skipped over.
        gamma: Discount per real token.
        lam: From one-step errors (0) to full returns (1): one number, or one per token as from [`step_lambdas`].

    Returns:
        Advantages and returns (advantages + values), both 0 at masked positions, in float32 or wider.

    Source:
        Schulman et al., "High-dimensional continuous control using generalized advantage estimation", 2016.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0, 1.0, 9.0]])
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> advantages, returns = gae(rewards, torch.full((1, 4), 0.5), mask, gamma=1.0, lam=1.0)
        >>> advantages  # the reward that follows, less the value
        tensor([[0.5000, 0.5000, 0.5000, 0.0000]])
        >>> returns
        tensor([[1., 1., 1., 0.]])
    """
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    values = values.to(dtype).masked_fill(~mask, 0.0)
    errors = (rewards.to(dtype) + gamma * _next_real(values, mask) - values).masked_fill(~mask, 0.0)
    # Decay 1 at a masked token passes later credit on unchanged.
    decay = (gamma * lam * torch.ones_like(errors)).masked_fill(~mask, 1.0)
    advantages = _discounted_sums(errors, decay).masked_fill(~mask, 0.0)
    return advantages, advantages + values


def step_lambdas(
    step_ends: Sequence[Sequence[int | None]], mask: Bool[Tensor, "B T"], lam: float
) -> Float[Tensor, "B T"]:
    """`lam` of [`gae`] for credit that decays from step to step instead of from token to token.

    All tokens of a step, however long, are credited with all that it earns and with `lam` of the next step's credit:
    the recursion over tokens becomes one over steps.

    Args:
        step_ends: Token at which each step of each row ends, or None where a step has none.
        mask: True where the policy wrote the token.
        lam: Share of later steps' credit: with 0 only the step's own reward and the next state's value, with 1 all.

    Returns:
        `lam` where a step ends, 1 elsewhere.

    Example:
        >>> step_lambdas([[1, 2]], torch.ones(1, 4, dtype=torch.bool), 0.5)
        tensor([[1.0000, 0.5000, 0.5000, 1.0000]])
    """
    lambdas = torch.ones(mask.shape, device=mask.device)
    for row, ends in enumerate(placeable_ends(step_ends, mask)):
        lambdas[row, [end for end in ends if end is not None]] = lam
    return lambdas


def _here(total: Tensor) -> Tensor:
    """The sum over a single process."""
    return total


def whiten(
    x: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    shift_mean: bool = True,
    all_reduce: Callable[[Tensor], Tensor] = _here,
) -> Float[Tensor, "B T"]:
    """Scale to standard deviation 1 over all real tokens of the batch, by default with mean 0.

    Args:
        x: What to whiten. Values at masked positions are ignored.
        mask: True where a token is real.
        shift_mean: Remove the mean. False keeps it, as is usual for rewards.
        all_reduce: Turns a sum over this process's rows into the sum over all processes' rows.

    Returns:
        Whitened values, 0 at masked positions, in float32 or wider. A single real token has no variance: it becomes 0,
        or stays unchanged without `shift_mean`.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask, 0.0)
    count = all_reduce(mask.sum())
    mean = all_reduce(x.sum()) / count.clamp(min=1)
    centred = (x - mean).masked_fill(~mask, 0.0)
    variance = all_reduce(centred.square().sum()) / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + WHITEN_EPSILON)
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def global_advantages(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    scale: bool = True,
    all_reduce: Callable[[Tensor], Tensor] = _here,
) -> Float[Tensor, "B T"]:
    """Discounted rewards to go minus their mean over all tokens of the batch: no value model, no groups.

    Args:
        rewards: Reward of each token. Values at masked positions are ignored.
        mask: True where the policy wrote the token.
        gamma: Discount per real token.
        scale: Also divide by the standard deviation over the batch.
        all_reduce: As for [`whiten`].

    Returns:
        Advantages, 0 at masked positions, in float32 or wider.

    Source:
        Hu et al., "REINFORCE++", 2025: a global baseline and a global scale.

    Example:
        >>> rewards, mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool)
        >>> global_advantages(rewards, mask, scale=False)
        tensor([[ 0.5000,  0.5000],
                [-0.5000, -0.5000]])
    """
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    if scale:
        return whiten(to_go, mask, all_reduce=all_reduce)
    return (to_go - all_reduce(to_go.sum()) / all_reduce(mask.sum()).clamp(min=1)).masked_fill(~mask, 0.0)


class _Step(NamedTuple):
    """A placed step: its row, first and last token, reward, and number of real tokens."""

    row: int
    start: int
    end: int
    reward: float
    tokens: int


def _placed_steps(
    row: int, rewards: Sequence[float], ends: Sequence[int | None], real_before: Sequence[int]
) -> list[_Step]:
    """The placed steps of a row in order; `real_before[t]` is the number of real tokens before token t."""
    steps: list[_Step] = []
    for reward, end in zip(rewards, ends, strict=True):
        if end is None:
            continue
        start = steps[-1].end + 1 if steps else 0
        if end < start - 1:
            raise ValueError(f"Step ends of row {row} decrease: {list(ends)}. Pass the steps in the order of the text.")
        steps.append(_Step(row, start, end, reward, real_before[end + 1] - real_before[start]))
    return steps


def _centred(steps: Sequence[_Step], baseline: str, *, scale: bool) -> list[float]:
    """Rewards of a group's steps minus their baselines: the group's mean rate times the step's size."""
    reward = torch.tensor([step.reward for step in steps], dtype=torch.float64)
    size = torch.tensor([step.tokens if baseline == "token" else 1 for step in steps], dtype=torch.float64)
    centred = reward - size * reward.sum() / size.sum()
    if scale and len(steps) > 1:
        centred = centred / (reward.std() + GROUP_EPSILON)
    return centred.tolist()


def group_step_advantages(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int | None]],
    mask: Bool[Tensor, "B T"],
    group_size: int,
    *,
    gamma: float,
    scale: bool,
    baseline: Baseline = "step",
) -> Float[Tensor, "B T"]:
    """Advantages of steps relative to the other steps of the same prompt's completions, without a value model.

    A baseline from the group is subtracted from each step's reward (and with `scale` the result is divided by the
    standard deviation of the group's rewards):

    | baseline | of a step |
    |---|---|
    | `"step"` | mean reward per step, subtracted per step: if steps are below the mean, fewer steps help |
    | `"token"` | mean reward per token, times the step's tokens: splitting steps does not change the total |

    A step's advantage is the discounted sum of these from itself to the response's end, and every token from
    after the previous step's end to this step's end gets it. Steps that end on one token count as one step there, whose
    centred rewards add up. Steps that cannot be placed are left out of everything.

    Args:
        step_rewards: Reward of each step of each row.
        step_ends: Token at which each step ends, or None; in the order of the text.
        mask: True where the policy wrote the token.
        group_size: Completions per prompt. Rows of a group are consecutive, and groups must be whole.
        gamma: Discount per step: 0 gives a step its own reward only, 1 everything that follows.
        scale: Divide by the group's standard deviation + 1e-4; a group with one step is not divided.
        baseline: The baseline that is subtracted.

    Returns:
        Advantages, float32; 0 at masked positions and on tokens after the last step.

    Raises:
        ValueError: If the rows are not whole groups, step ends decrease, or rewards and ends do not match.

    Source:
        Process supervision of GRPO (Shao et al., DeepSeekMath, 2024), which is `gamma=1, scale=True`. The baseline per
        token: PURE (Cheng et al., 2025).

    Example:
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> group_step_advantages([[1.0, 0.0], [1.0]], [[0, 1], [2]], mask, 2, gamma=0.0, scale=False)
        tensor([[ 0.3333, -0.6667,  0.0000],
                [ 0.3333,  0.3333,  0.3333]])
    """
    if group_size < 1 or len(mask) % group_size:
        raise ValueError(
            f"{len(mask)} completions are not whole groups of {group_size}. Pass all completions of each prompt "
            "together, `num_generations` consecutive rows per prompt."
        )
    check_step_rewards(step_rewards, step_ends)
    placed = placeable_ends(step_ends, mask)
    real_before = F.pad(mask.int().cumsum(dim=1), (1, 0)).tolist()
    advantages = torch.zeros(mask.shape, dtype=torch.float32)
    for first in range(0, len(mask), group_size):
        steps = [
            step
            for row in range(first, first + group_size)
            for step in _placed_steps(row, step_rewards[row], placed[row], real_before[row])
        ]
        if not steps:
            continue
        after, here, later = 0.0, 0.0, steps[-1]  # discounted rewards after a token, and rewards at it
        for step, reward in reversed(list(zip(steps, _centred(steps, baseline, scale=scale), strict=True))):
            if step.row != later.row:
                after = here = 0.0
            elif step.end < later.end:
                after, here = gamma * (here + after), 0.0
            here += reward  # steps that end on the same token are one, whose rewards add up
            advantages[step.row, step.start : step.end + 1] = here + after
            later = step
    return advantages.to(mask.device).masked_fill(~mask, 0.0)
