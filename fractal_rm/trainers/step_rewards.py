"""The step rewards of `StepPPOTrainer`: scores of sampled completions, shaped, with the token where each step ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fractal_rm.advantages import group_step_advantages
from fractal_rm.reward_model import StepRewardModel, StepScores
from fractal_rm.rewards import (
    Placement,
    completion_text,
    place_outcome,
    place_step_rewards,
    step_end_tokens,
    token_end_characters,
)
from fractal_rm.shaping import RunningMoments, limit_step_rewards, shape_step_scores
from fractal_rm.trainers.processes import masks_of_all, rows_of_all
from fractal_rm.trainers.step_ppo_config import StepPPOConfig


@dataclass
class Rollout:
    """What TRL hands to reward functions, and what they gave: the completions of this process.

    Attributes:
        prompts: Their prompts.
        completion_ids: Sampled ids, without padding.
        rewards: Reward of each function (B, functions), NaN where it gave None.
        kl: KL divergence from the reference at each token (B, T), where it is part of the reward, or known anyway.
    """

    prompts: list[Any]
    completion_ids: list[list[int]]
    rewards: Tensor
    kl: Tensor | None = None

    @property
    def judged(self) -> Tensor:
        """Whether some function gave a completion a reward (B,)."""
        return ~self.rewards.isnan().all(dim=1)

    def outcome(self, weights: Tensor) -> Tensor:
        """Weighted sum of the rewards (B,); what is not there counts for nothing."""
        return (self.rewards * weights.to(self.rewards.device)).nansum(dim=1)


class StepScoreReward:
    """The reward model seen by TRL: logs P(response is good) as `rewards/step_reward_model` and keeps the step scores.

    Its weight among TRL's outcome rewards is 0: the trainer uses the step scores instead.
    """

    __name__ = "step_reward_model"

    def __init__(self, reward_model: StepRewardModel, tokenizer: Any, batch_size: int | None) -> None:
        self.reward_model, self.tokenizer, self.batch_size = reward_model, tokenizer, batch_size
        self.scored: list[StepScores] = []

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        # Not TRL's `completions`: placement counts the characters of exactly this decoding.
        texts = [completion_text(ids, self.tokenizer) for ids in completion_ids]
        self.scored = self.reward_model.score(prompts, texts, batch_size=self.batch_size, progress=False)
        for row, scored in enumerate(self.scored):
            if not all(map(math.isfinite, scored.step_scores)):
                raise ValueError(
                    f"The reward model scored the steps of completion {row} as {scored.step_scores}: "
                    f"{scored.response!r}. "
                    "Its weights or their precision are broken: check them with `StepRewardModel.score` on that text."
                )
        return [None if scored.error else scored.score for scored in self.scored]


def add_to_outcomes(step_scores: StepScoreReward, functions: list[Any], args: StepPPOConfig, kwargs: dict) -> None:
    """Show the reward model to TRL as one more reward function, of weight 0.

    Args:
        step_scores: The reward model.
        functions: The outcome rewards, of which it becomes the last.
        args: The configuration, whose `reward_weights` become one more.
        kwargs: Arguments of `GRPOTrainer`, whose `reward_processing_classes` become one more, if there are any.

    Raises:
        ValueError: If there are not as many weights as outcome rewards.
    """
    weights = args.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(
            f"`reward_weights` has {len(weights)} numbers for {len(functions)} `reward_funcs`. Give one each; "
            "the reward model's is `step_weight`."
        )
    args.reward_weights = [*weights, 0.0]
    functions.append(step_scores)
    theirs = kwargs.get("reward_processing_classes")
    if theirs is not None:
        kwargs["reward_processing_classes"] = [*(theirs if isinstance(theirs, list) else [theirs]), None]


class StepRewards:
    """Rewards of a rollout's steps and tokens, as the configuration wants them.

    Args:
        args: The configuration: form, baseline, limits, weights.
        scores: The reward model; None: outcomes only.
        log: Takes the name and the value of a number to log.

    Attributes:
        moments: Of the shaped rewards of the whole run, for `normalize_step_rewards`.
        ending_ids: Ids that a finished completion may end with.
        scale: What rollbacks have left of `step_weight`.
    """

    def __init__(self, args: StepPPOConfig, scores: StepScoreReward | None, log: Callable[[str, float], None]) -> None:
        self.args, self.scores, self.log = args, scores, log
        self.moments = RunningMoments()
        self.ending_ids: set[int] = set()
        self.scale = 1.0

    def steps(
        self, rollout: Rollout, mask: Tensor, group_size: int
    ) -> tuple[list[list[float]], list[list[int | None]], Placement]:
        """Shaped reward and end token of every step, and their placement; no steps without a reward model.

        A completion that TRL masks as a whole (`mask_truncated_completions`) has no steps, rather than unplaced ones.
        """
        rewards: list[list[float]] = [[] for _ in rollout.prompts]
        ends: list[list[int | None]] = [[] for _ in rollout.prompts]
        if self.scores is not None:
            used = mask.any(dim=1).tolist()
            scored = [
                scored if keep else StepScores(scored.response)
                for scored, keep in zip(self.scores.scored, used, strict=True)
            ]
            ends = [
                step_end_tokens(token_end_characters(ids, self.scores.tokenizer), result.spans)
                for ids, result in zip(rollout.completion_ids, scored, strict=True)
            ]
            flat = [score for result in scored for score in result.step_scores]
            rewards = self.shape([result.step_scores for result in scored], group_size)
            self.log("steps/score", sum(flat) / max(len(flat), 1))
            self.log("steps/per_response", len(flat) / max(len(scored), 1))
        placement = place_step_rewards(rewards, ends, mask)
        self.log("placement/unplaced_steps", placement.unplaced)
        return rewards, ends, placement

    def shape(self, step_scores: Sequence[Sequence[float]], group_size: int) -> list[list[float]]:
        """Rewards from scores, as many.

        Baselines and deviations are those of the batch of all processes, and groups may reach over several: every
        process shapes all rows and keeps its own.

        Args:
            step_scores: P(step is good) of every step of every completion of this process.
            group_size: Completions per prompt.
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
            self.moments.update(rewards[mask])
            rewards = rewards / self.moments.std
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

    def tokens(self, rollout: Rollout, placement: Placement, weights: Tensor, mask: Tensor, *, step: int) -> Tensor:
        """Rewards of steps, outcomes and endings on the tokens (B, T).

        Args:
            rollout: The completions.
            placement: Their step rewards.
            weights: Of the reward functions.
            mask: True where the policy wrote a token that is learned from.
            step: The optimizer step.
        """
        step_weight, outcome_weight = self.weights(step)
        rewards = step_weight * placement.rewards + outcome_weight * place_outcome(rollout.outcome(weights), mask)
        return rewards - place_outcome(self.penalties(rollout), mask) if self.args.missing_eos_penalty else rewards

    def group_advantages(
        self,
        rollout: Rollout,
        rewards: Any,
        ends: Any,
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
            rewards: Their step rewards.
            ends: Tokens where the steps end.
            outcome: Advantages of the outcomes (B,), which TRL computed.
            mask: True where the policy wrote a token.
            group_size: Completions per prompt; those of one prompt may be spread over processes.
            accelerator: Knows the other processes.
            step: The optimizer step.
        """
        (all_rewards, ours), (all_ends, _) = rows_of_all(rewards), rows_of_all(ends)
        dense = group_step_advantages(
            all_rewards,
            all_ends,
            masks_of_all(mask, accelerator),
            group_size,
            gamma=self.args.step_gamma,
            scale=self.args.scale_rewards != "none",
            baseline=self.args.group_baseline,
            leave_one_out=self.args.leave_one_out,
        )[ours, : mask.size(1)]
        step_weight, outcome_weight = self.weights(step)
        advantages = outcome_weight * (outcome.unsqueeze(1) * mask) + step_weight * dense
        if not self.args.missing_eos_penalty:
            return advantages
        everyone: Any = accelerator.gather(self.penalties(rollout))
        penalties = everyone.view(-1, group_size)
        penalties = (penalties - penalties.mean(dim=1, keepdim=True)).view(-1, 1)[ours]
        return advantages - penalties * mask
