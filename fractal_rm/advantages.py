"""Rewards and values -> advantages: plain functions on (B, T) tensors, True in a mask = a token of the policy.

Interior masked tokens (the output of a tool) are no decisions of the policy. They count for nothing: rewards and values
there are ignored, and what follows them is carried over as if they were not there.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fractal_rm.rewards import check_step_rewards, placeable_ends

# Keeps a division by a standard deviation finite: the values TRL uses for whitening (1e-8 in the root) and for
# group advantages (1e-4 beside it), so that numbers can be compared.
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
    decays. Nothing is ever divided by a power of the decay, so it is as safe for decay 1 and for long rows as the loop,
    with a few kernels per doubling instead of a few per token.
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
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimates and the returns a value model learns.

    Episodes end at their last real token: nothing is bootstrapped after it. The recursion runs over all tokens at once
    (a doubling scan over T), not in a loop over tokens.

    Args:
        rewards: Reward of each token. Values at masked positions are ignored.
        values: Value of the state before each token, as the value model predicts it. Ignored at masked positions.
        mask: True where the policy wrote the token. Masked tokens in the middle are skipped over.
        gamma: Discount per real token.
        lam: Mixes one-step errors (0) and full returns (1).

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
    # Decay 1 over a masked token hands on what comes after it unchanged.
    decay = torch.full_like(errors, gamma * lam).masked_fill(~mask, 1.0)
    advantages = _discounted_sums(errors, decay).masked_fill(~mask, 0.0)
    return advantages, advantages + values


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, shift_mean: bool = True) -> Float[Tensor, "B T"]:
    """Scale to standard deviation 1 over all real tokens of the batch, by default with mean 0.

    Args:
        x: What to whiten. Values at masked positions are ignored.
        mask: True where a token is real.
        shift_mean: Remove the mean. False keeps it, as is usual for rewards.

    Returns:
        Whitened values, 0 at masked positions, in float32 or wider. A single real token has no spread: it becomes 0,
        or stays as it is without `shift_mean`.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask, 0.0)
    count = mask.sum()
    mean = x.sum() / count.clamp(min=1)
    centred = (x - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + WHITEN_EPSILON)
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def group_step_advantages(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int | None]],
    mask: Bool[Tensor, "B T"],
    group_size: int,
    *,
    gamma: float,
    scale: bool,
) -> Float[Tensor, "B T"]:
    """Advantages of steps against the other steps of the same prompt's completions, without a value model.

    Step rewards are centred by the mean over all steps of the group (and divided by their standard deviation if
    `scale`). A step's advantage is the discounted sum of these from itself to the response's end, and every token from
    after the previous step's end to this step's end gets it. Steps that end on one token count as one step there, whose
    centred rewards add up. Steps that cannot be placed are left out of everything.

    Args:
        step_rewards: Reward of each step of each row.
        step_ends: Token at which each step ends, or None; in the order of the text.
        mask: True where the policy wrote the token.
        group_size: Completions per prompt. Rows of a group are consecutive, and groups must be whole.
        gamma: Discount per step: 0 gives a step its own reward only, 1 everything that follows.
        scale: Divide by the group's standard deviation + 1e-4; a group with one step is not divided.

    Returns:
        Advantages, float32; 0 at masked positions and on tokens after the last step.

    Raises:
        ValueError: If the rows are not whole groups, step ends decrease, or rewards and ends do not match.

    Source:
        Process supervision of GRPO (Shao et al., DeepSeekMath, 2024), which is `gamma=1, scale=True`.

    Example:
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> group_step_advantages([[1.0, 0.0], [1.0]], [[0, 1], [2]], mask, 2, gamma=0.0, scale=False)
        tensor([[ 0.3333, -0.6667,  0.0000],
                [ 0.3333,  0.3333,  0.3333]])
    """
    if group_size < 1 or len(mask) % group_size:
        raise ValueError(
            f"{len(mask)} completions are not whole groups of {group_size}. "
            "Pass all completions of each prompt together, `num_generations` consecutive rows a prompt."
        )
    check_step_rewards(step_rewards, step_ends)
    placed = placeable_ends(step_ends, mask)
    advantages = torch.zeros(mask.shape, dtype=torch.float32)
    for first in range(0, len(mask), group_size):
        rows = range(first, first + group_size)
        steps = [(row, end, i) for row in rows for i, end in enumerate(placed[row]) if end is not None]
        if not steps:
            continue
        rewards = torch.tensor([step_rewards[row][i] for row, _, i in steps], dtype=torch.float64)
        centred = rewards - rewards.mean()
        if scale and len(steps) > 1:
            centred = centred / (rewards.std() + GROUP_EPSILON)
        by_end: dict[int, dict[int, float]] = {row: {} for row in rows}
        for (row, end, _), value in zip(steps, centred.tolist(), strict=True):
            if by_end[row] and end < max(by_end[row]):
                raise ValueError(
                    f"Step ends of row {row} decrease: {list(step_ends[row])}. Pass the steps in the order of the text."
                )
            by_end[row][end] = by_end[row].get(end, 0.0) + value
        for row, rewards_at in by_end.items():
            to_go, ends = 0.0, list(rewards_at)
            for previous, end in reversed(list(zip([-1, *ends], ends, strict=False))):
                to_go = rewards_at[end] + gamma * to_go
                advantages[row, previous + 1 : end + 1] = to_go
    return advantages.to(mask.device).masked_fill(~mask, 0.0)
