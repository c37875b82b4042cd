"""The step rewards of `StepPPOTrainer`: scores of sampled completions, shaped, with the token where each step ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from fractal_rm.credit.advantages import group_step_advantages, whiten
from fractal_rm.credit.moments import RunningMoments
from fractal_rm.credit.placement import (
    Placement,
    place_outcome,
    place_step_rewards,
    step_end_tokens,
    token_end_characters,
)
from fractal_rm.credit.shaping import limit_step_rewards, shape_step_scores
from fractal_rm.hf.processes import all_reduce, masks_of_all, rows_of_all
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.sources import StepRewardSource
from fractal_rm.reward_model import StepScores


@dataclass
class Rollout:
    """What TRL hands to reward functions, and what they gave: the completions of this process.

    Attributes:
        prompts: Their prompts.
        completion_ids: Sampled ids, without padding.
        rewards: Reward of each function (B, functions), NaN where it gave None.
        is_outcome: Which functions are outcome rewards, and no source of step rewards (functions,).
        scored: Step scores of the first dense source; None without one.
        kl: KL divergence from the reference at each token (B, T), where it is part of the reward, or known anyway.
        logprobs: The policy's log-probabilities of the tokens (B, T), where they were computed.
    """

    prompts: list[Any]
    completion_ids: list[list[int]]
    rewards: Tensor
    is_outcome: Tensor
    scored: Sequence[StepScores] | None = None
    kl: Tensor | None = None
    logprobs: Tensor | None = None

    @property
    def judged(self) -> Tensor:
        """Whether some function gave a completion a reward (B,)."""
        return ~self.rewards.isnan().all(dim=1)

    def outcome(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rewards (B,); what is not there counts for nothing."""
        return (self.rewards * weights.to(self.rewards.device)).nansum(dim=1)


class ShapedSteps(NamedTuple):
    """Rewards of one source's steps, before its weight.

    Attributes:
        weight: Of the source.
        rewards: Of every step of every completion.
        ends: Token where each step ends, None where there is none.
        placement: The rewards on the tokens.
    """

    weight: float
    rewards: list[list[float]]
    ends: list[list[int | None]]
    placement: Placement


class TokenRewards(NamedTuple):
    """Rewards of tokens, those of steps apart.

    Attributes:
        steps: Those of steps (B, T).
        others: Those of outcomes, endings and the KL penalty (B, T).
        step_ends: Tokens at which the steps of each row end.
        has_steps: Whether anything scored steps.
        has_outcomes: Whether anything judged outcomes.
    """

    steps: Tensor
    others: Tensor
    step_ends: list[list[int | None]]
    has_steps: bool
    has_outcomes: bool


class StepRewards:
    """Rewards of a rollout's steps and tokens, as the configuration wants them.

    Every source is shaped, normalised and placed by itself, with its own steps; what adds up is token rewards, or
    advantages of a group.

    Args:
        args: The configuration: form, baseline, limits, weights.
        sources: What scores steps; none: outcomes only.
        log: Takes the name and the value of a number to log.

    Attributes:
        ending_ids: Ids that a finished completion may end with.
        scale: What rollbacks have left of `step_weight`.
    """

    def __init__(
        self, args: StepPPOConfig, sources: Sequence[StepRewardSource], log: Callable[[str, float], None]
    ) -> None:
        self.args, self.sources, self.log = args, sources, log
        self.ending_ids: set[int] = set()
        self.scale = 1.0
        self._pieces: dict[int, str] = {}  # texts of the tokens seen so far

    def steps(self, rollout: Rollout, mask: Tensor, group_size: int) -> list[ShapedSteps]:
        """Shaped reward and end token of every step, and their placement, for each source.

        A completion that TRL masks as a whole (`mask_truncated_completions`) has no steps, rather than unplaced ones.
        """
        used = mask.any(dim=1).tolist()
        found: list[ShapedSteps] = []
        token_ends: list[list[int]] = []
        for number, source in enumerate(self.sources):
            token_ends = token_ends or [
                token_end_characters(ids, source.tokenizer, self._pieces) for ids in rollout.completion_ids
            ]
            scored = [
                scored if keep else StepScores(scored.response)
                for scored, keep in zip(source.scored, used, strict=True)
            ]
            ends = [step_end_tokens(at, result.spans) for at, result in zip(token_ends, scored, strict=True)]
            scores = [result.step_scores for result in scored]
            rewards = self.shape(scores, group_size, source.moments)
            found.append(ShapedSteps(source.weight, rewards, ends, place_step_rewards(rewards, ends, mask)))
            if number == 0:
                self._log_scores(scores)
            self._log_rewards(source.__name__, rewards)
        self.log("placement/unplaced_steps", sum(one.placement.unplaced for one in found))
        return found

    def _log_scores(self, step_scores: Sequence[Sequence[float]]) -> None:
        flat = [score for row in step_scores for score in row]
        self.log("steps/score", sum(flat) / max(len(flat), 1))
        self.log("steps/per_response", len(flat) / max(len(step_scores), 1))

    def _log_rewards(self, source: str, rewards: Sequence[Sequence[float]]) -> None:
        earned = torch.tensor([reward for row in rewards for reward in row], dtype=torch.float64)
        if len(earned):
            self.log(f"step_rewards/{source}/mean", earned.mean().item())
            self.log(f"step_rewards/{source}/std", earned.std(correction=0).item())

    def shape(
        self, step_scores: Sequence[Sequence[float]], group_size: int, moments: RunningMoments
    ) -> list[list[float]]:
        """Rewards from a source's scores, as many.

        Baselines and deviations are those of the batch of all processes, and groups may reach over several: every
        process shapes all rows and keeps its own.

        Args:
            step_scores: Score of every step of every completion of this process.
            group_size: Completions per prompt.
            moments: Of the source's shaped rewards of the whole run, for `normalize_step_rewards`.
        """
        everyone, ours = rows_of_all([list(row) for row in step_scores])
        args, width = self.args, max(map(len, everyone), default=0)
        rows = [[*row, *[0.0] * (width - len(row))] for row in everyone]
        scores = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)
        mask = torch.arange(width) < torch.tensor([len(row) for row in everyone])[:, None]
        rewards = shape_step_scores(
            scores,
            mask,
            shaping=args.shaping,
            center=args.center,
            threshold=args.score_threshold,
            group_size=group_size,
        )
        if args.normalize_step_rewards:
            moments.update(rewards[mask])
            rewards = rewards / moments.std
        rewards = limit_step_rewards(rewards, mask, clip=args.step_reward_clip, length_neutral=args.length_neutral)
        return [values[: len(row)] for values, row in zip(rewards[ours].tolist(), step_scores, strict=True)]

    def weights(self, step: int) -> tuple[float, float]:
        """Weights of step and outcome rewards at an optimizer step: each rises from 0 in a straight line."""
        args = self.args
        weighted = (
            (self.scale * args.step_weight, args.step_weight_warmup),
            (args.outcome_weight, args.outcome_weight_warmup),
        )
        first, second = (weight * min(step / warmup, 1.0) if warmup else weight for weight, warmup in weighted)
        return first, second

    def penalties(self, rollout: Rollout) -> Tensor:
        """What is taken from each completion (B,) that did not end."""
        cut = [bool(ids) and ids[-1] not in self.ending_ids for ids in rollout.completion_ids]
        return self.args.missing_eos_penalty * torch.tensor(cut, dtype=torch.float32, device=rollout.rewards.device)

    def has_outcomes(self, rollout: Rollout) -> bool:
        """Whether outcomes are a reward."""
        return bool(self.args.outcome_weight and rollout.is_outcome.any())

    def without_unjudged(self, mask: Tensor, rollout: Rollout) -> Tensor:
        """The mask (B, T) without completions that no outcome function judged: no outcome is not an outcome of 0."""
        return mask & rollout.judged.unsqueeze(1) if self.has_outcomes(rollout) else mask

    def tokens(
        self, rollout: Rollout, shaped: Sequence[ShapedSteps], weights: Tensor, mask: Tensor, *, step: int
    ) -> TokenRewards:
        """Rewards of steps, outcomes and endings on the tokens.

        Args:
            rollout: The completions.
            shaped: Their step rewards, of each source.
            weights: Of the reward functions.
            mask: True where the policy wrote a token that is learned from.
            step: The optimizer step.
        """
        step_weight, outcome_weight = self.weights(step)
        dense = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        marking = [one for one in shaped if one.weight]
        for one in marking:
            dense = dense + one.weight * one.placement.rewards
        ends = [[end for row in rows for end in row] for rows in zip(*(one.ends for one in marking), strict=True)]
        others = outcome_weight * place_outcome(rollout.outcome(weights), mask)
        if self.args.missing_eos_penalty:
            others = others - place_outcome(self.penalties(rollout), mask)
        return TokenRewards(step_weight * dense, others, ends, bool(marking), self.has_outcomes(rollout))

    def group_advantages(
        self,
        rollout: Rollout,
        shaped: Sequence[ShapedSteps],
        outcome: Tensor,
        mask: Tensor,
        group_size: int,
        accelerator: Accelerator,
        *,
        step: int,
    ) -> Tensor:
        """Steps against those of the prompt's other completions (B, T), beside the advantages of outcomes.

        Args:
            rollout: The completions.
            shaped: Their step rewards, of each source.
            outcome: Advantages of the outcomes (B,), which TRL computed.
            mask: True where the policy wrote a token.
            group_size: Completions per prompt; those of one prompt may be spread over processes.
            accelerator: Knows the other processes.
            step: The optimizer step.
        """
        _, ours = rows_of_all([None] * len(mask))
        masks, dense = masks_of_all(mask, accelerator), torch.zeros(mask.shape, device=mask.device)
        for one in shaped:
            advantages = group_step_advantages(
                rows_of_all(one.rewards)[0],
                rows_of_all(one.ends)[0],
                masks,
                group_size,
                gamma=self.args.step_gamma,
                scale=self.args.scale_rewards != "none",
                baseline=self.args.group_baseline,
                leave_one_out=self.args.leave_one_out,
            )
            dense = dense + one.weight * advantages[ours, : mask.size(1)]
        step_weight, outcome_weight = self.weights(step)
        advantages = outcome_weight * (outcome.unsqueeze(1) * mask) + step_weight * dense
        if not self.args.missing_eos_penalty:
            return advantages
        everyone: Any = accelerator.gather(self.penalties(rollout))
        penalties = everyone.view(-1, group_size)
        penalties = (penalties - penalties.mean(dim=1, keepdim=True)).view(-1, 1)[ours]
        return advantages - penalties * mask

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of each source, for JSON."""
        return {source.__name__: source.moments.state_dict() for source in self.sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: If it belongs to other sources.
        """
        names = [source.__name__ for source in self.sources]
        if sorted(state) != sorted(names):
            raise ValueError(
                f"The checkpoint holds running statistics of the step rewards {sorted(state)}, but there are "
                f"{sorted(names)}. Resume with the reward models and `step_reward_funcs` of that run, or start again."
            )
        for source in self.sources:
            source.moments.load_state_dict(state[source.__name__])


def whiten_rewards(rewards: Tensor, mask: Tensor, args: StepPPOConfig, accelerator: Accelerator) -> Tensor:
    """Token rewards (B, T), whitened over the batch of all processes where the configuration wants it."""
    if not args.whiten_rewards:
        return rewards
    return whiten(rewards, mask, shift_mean=False, all_reduce=all_reduce(accelerator))
