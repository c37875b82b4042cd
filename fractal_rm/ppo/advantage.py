"""Token rewards -> advantages: three estimators with one signature; their mathematics is in `credit`.

Each takes a rollout with `steps` and `rewards`, and returns it with `advantages`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from fractal_rm.credit.advantages import gae, global_advantages, group_step_advantages, step_lambdas, whiten
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rewards import has_outcomes, whitened_rewards
from fractal_rm.ppo.rollout import RolloutBatch, all_reduce, masks_of_all, rows_of_all
from fractal_rm.ppo.value_model import ValueLearning, explained_variance


class Given(NamedTuple):
    """What an estimator needs in addition to the rollout."""

    args: StepPPOConfig
    accelerator: Accelerator  # for reductions over all processes
    group_size: int  # completions per prompt; they may be spread over processes
    value_learning: ValueLearning | None  # for the estimator with a value model


def by_gae(batch: RolloutBatch, given: Given) -> RolloutBatch:
    """Generalised advantage estimates with a value model (PPO), and the returns that the value model learns.

    If there are both step and outcome rewards, each kind has its own lambda (`step_lam`, `lam`): the value model is the
    baseline of outcomes, and shaping provides the baseline of steps.
    """
    args, accelerator = given.args, given.accelerator
    assert given.value_learning is not None
    assert batch.rewards is not None
    assert batch.learned is not None
    rewards, mask = batch.rewards, batch.learned
    both = rewards.steps + rewards.others
    lam: float | Tensor = args.lam
    credit: float | Tensor = 0.0
    if args.step_lam is not None and any(one.weight for one in batch.steps):
        lam = step_lambdas(rewards.step_ends, mask, args.step_lam)
        if has_outcomes(batch, args):
            steps = whitened_rewards(rewards.steps, mask, args, accelerator)
            credit, _ = gae(steps, torch.zeros_like(steps), mask, gamma=args.gamma, lam=lam)
            both, lam = rewards.others, args.lam
    batch = given.value_learning.with_values(batch)
    assert batch.values is not None
    learned = whitened_rewards(both, mask, args, accelerator)
    advantages, returns = gae(learned, batch.values, mask, gamma=args.gamma, lam=lam)
    metrics = {
        "value/explained_variance": explained_variance(batch.values[mask], returns[mask]),
        "value/mean": batch.values[mask].mean().item(),
    }
    advantages = advantages + credit
    if args.whiten_advantages:
        advantages = whiten(advantages, mask, all_reduce=all_reduce(accelerator))
    # The value loss is a mean over the tokens of a rollout batch, like the policy loss of TRL's default `loss_type`.
    tokens: Any = accelerator.reduce(mask.sum().float(), reduction="mean")
    for_update = {"values": batch.values, "returns": returns, "value_mask": mask, "value_tokens": tokens}
    return batch.plus(metrics, for_update, advantages=advantages, returns=returns)


def by_group(batch: RolloutBatch, given: Given) -> RolloutBatch:
    """Steps compared with the steps of the prompt's other completions, plus TRL's advantages of the outcomes (GRPO)."""
    args, accelerator = given.args, given.accelerator
    assert batch.rewards is not None
    assert batch.learned is not None
    mask = batch.learned
    _, ours = rows_of_all([None] * len(mask))
    masks, steps = masks_of_all(mask, accelerator), torch.zeros(mask.shape, device=mask.device)
    for one in batch.steps:
        found = group_step_advantages(
            rows_of_all(one.rewards)[0],
            rows_of_all(one.ends)[0],
            masks,
            given.group_size,
            gamma=args.step_gamma,
            scale=args.scale_rewards != "none",
            baseline=args.group_baseline,
        )
        steps = steps + one.weight * found[ours, : mask.size(1)]
    outcomes = args.outcome_weight * (batch.outcome_advantages.unsqueeze(1) * mask)
    advantages = outcomes + batch.rewards.step_weight * steps
    if args.missing_eos_penalty:
        everyone: Any = accelerator.gather(batch.rewards.penalties)
        penalties = everyone.view(-1, given.group_size)
        penalties = (penalties - penalties.mean(dim=1, keepdim=True)).view(-1, 1)[ours]
        advantages = advantages - penalties * mask
    return batch.plus(advantages=advantages)


def by_batch(batch: RolloutBatch, given: Given) -> RolloutBatch:
    """Rewards to go minus their mean over all tokens of the rollout batch (REINFORCE++)."""
    args, accelerator = given.args, given.accelerator
    assert batch.rewards is not None
    assert batch.learned is not None
    rewards, mask = batch.rewards, batch.learned
    advantages = global_advantages(
        whitened_rewards(rewards.steps + rewards.others, mask, args, accelerator),
        mask,
        gamma=args.gamma,
        scale=args.whiten_advantages,
        all_reduce=all_reduce(accelerator),
    )
    return batch.plus(advantages=advantages)


ESTIMATORS: dict[str, Callable[[RolloutBatch, Given], RolloutBatch]] = {
    "gae": by_gae,
    "group": by_group,
    "global": by_batch,
}
