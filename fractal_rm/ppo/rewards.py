"""Step scores -> token rewards: the two middle stages of a rollout."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fractal_rm.credit.advantages import whiten
from fractal_rm.credit.kl import AdaptiveKL
from fractal_rm.credit.moments import RunningMoments
from fractal_rm.credit.placement import place_outcome, place_step_rewards, step_end_tokens, token_end_characters
from fractal_rm.credit.shaping import limit_step_rewards, shape_step_scores
from fractal_rm.data.bag import StepScores
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rollout import RolloutBatch, ShapedSteps, TokenRewards, all_reduce, rows_of_all

logger = logging.getLogger(__name__)


def step_rewards(
    step_scores: Sequence[Sequence[float]],
    args: StepPPOConfig,
    *,
    group_size: int = 1,
    moments: RunningMoments | None = None,
) -> list[list[float]]:
    """Step rewards from step scores, as training computes them for a rollout batch.

    Args:
        step_scores: Score of every step of every completion of the batch, over all processes.
        args: The configuration: shaping, baseline, limits.
        group_size: Completions per prompt; those of one prompt are consecutive.
        moments: Moments of the run's rewards so far, updated if `normalize_step_rewards` is set; None: only this batch.

    Returns:
        Rewards in the same layout, before the weights of source and steps.

    Raises:
        ValueError: If the baseline is the group's and the completions are not whole groups.

    Example:
        >>> args = StepPPOConfig("out", use_cpu=True, bf16=False)
        >>> step_rewards([[0.75, 0.25], [0.5]], args)  # against the mean of the completion's own steps
        [[0.25, -0.25], [0.0]]
    """
    width = max(map(len, step_scores), default=0)
    rows = [[*row, *[0.0] * (width - len(row))] for row in step_scores]
    scores = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)
    mask = torch.arange(width) < torch.tensor([len(row) for row in step_scores])[:, None]
    rewards = shape_step_scores(
        scores,
        mask,
        shaping=args.shaping,
        center=args.center,
        threshold=args.score_threshold,
        group_size=group_size,
    )
    if args.normalize_step_rewards:
        moments = RunningMoments() if moments is None else moments
        moments.update(rewards[mask])
        rewards = rewards / moments.std
    rewards = limit_step_rewards(rewards, mask, clip=args.step_reward_clip, length_neutral=args.length_neutral)
    return [values[: len(row)] for values, row in zip(rewards.tolist(), step_scores, strict=True)]


class StepShaper:
    """Step scores -> step rewards, for each source separately; `weights` has each source's weight by name.

    Attributes:
        moments: Moments of each source's shaped rewards in the whole run, for `normalize_step_rewards`.
    """

    def __init__(self, args: StepPPOConfig, weights: Mapping[str, float]) -> None:
        self.args, self.weights = args, weights
        self.moments = {name: RunningMoments() for name in weights}
        self._pieces: dict[int, str] = {}  # texts of the tokens seen so far
        self._has_warned = False

    def shape(self, batch: RolloutBatch, *, group_size: int, tokenizer: Any, endings: set[int]) -> RolloutBatch:
        """Add `steps`: reward and last token of every step, for each source.

        A completion that TRL masks entirely (`mask_truncated_completions`) gets no steps, rather than unplaced ones. So
        does a completion that the source could not read to its end: it counts as not judged. `endings` are the ids that
        a finished completion may end with.
        """
        if not batch.scores:
            return batch.plus({"placement/unplaced_steps": 0.0})
        used = batch.mask.any(dim=1).tolist()
        token_ends = [token_end_characters(ids, tokenizer, self._pieces, endings) for ids in batch.completion_ids]
        steps, metrics = [], judgement_metrics(batch)
        for name, found in batch.scores.items():
            judged = [one.judged for one in found]
            scored = [
                one if keep and one.judged else StepScores(one.response) for one, keep in zip(found, used, strict=True)
            ]
            ends = [step_end_tokens(at, result.spans) for at, result in zip(token_ends, scored, strict=True)]
            scores = [result.step_scores for result in scored]
            self._check_baseline(scores, batch)
            # Baselines and deviations are over the batch, and a group may span processes: each process shapes all rows.
            everyone, ours = rows_of_all([list(row) for row in scores])
            rewards = step_rewards(everyone, self.args, group_size=group_size, moments=self.moments[name])[ours]
            placement = place_step_rewards(rewards, ends, batch.mask)
            steps.append(ShapedSteps(self.weights[name], rewards, ends, placement, judged))
            if len(steps) == 1:  # the watched source
                metrics |= _score_metrics([row for row, known in zip(scores, judged, strict=True) if known])
            metrics |= _reward_metrics(name, rewards)
        metrics["placement/unplaced_steps"] = float(sum(one.placement.unplaced for one in steps))
        return batch.plus(metrics, steps=tuple(steps))

    def _check_baseline(self, step_scores: Sequence[Sequence[float]], batch: RolloutBatch) -> None:
        """Warn once about the blind spots of `center='response'`: single-step completions, and missing outcomes."""
        args, most = self.args, max(map(len, step_scores), default=0)
        if self._has_warned or not most or (args.shaping, args.center) != ("centered", "response"):
            return
        if most == 1:
            self._has_warned = True
            logger.warning(
                "No completion of this rollout has more than one step, and with `center='response'` a step earns its "
                "score minus the mean of its completion's steps: nothing. Cut completions into more steps, or set "
                "`center='batch'`."
            )
        elif not has_outcomes(batch, args):
            self._has_warned = True
            logger.warning(
                "There is no outcome reward, and with `center='response'` the step rewards of a completion sum to 0: "
                "nothing says which completions are better. Give `reward_funcs`, or set `center='batch'` or "
                "`shaping='min_form'`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of each source, for JSON."""
        return {name: moments.state_dict() for name, moments in self.moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; raises ValueError if it belongs to other sources."""
        if sorted(state) != sorted(self.moments):
            raise ValueError(
                f"The checkpoint has running statistics of the step rewards {sorted(state)}, but there are "
                f"{sorted(self.moments)}. Resume with the reward models and `step_reward_funcs` of that run, or start "
                "again."
            )
        for name, moments in self.moments.items():
            moments.load_state_dict(state[name])


def judgement_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Share of completions that a reward model could not judge, and of steps beyond its limit; 0 without any."""
    beyond = sum(one.truncated_steps for rows in batch.scores.values() for one in rows)
    steps = beyond + sum(len(one.steps) for rows in batch.scores.values() for one in rows)
    shares = {"steps/unscored": (sum(batch.unscored), len(batch.unscored)), "steps/beyond_limit": (beyond, steps)}
    return {name: part / whole if whole else math.nan for name, (part, whole) in shares.items()}


def _score_metrics(step_scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over known values; NaN, which is not logged, without any."""
    flat = [score for row in step_scores for score in row]
    return {
        "steps/score": sum(flat) / len(flat) if flat else math.nan,
        "steps/per_response": len(flat) / len(step_scores) if step_scores else math.nan,
    }


def _reward_metrics(source: str, rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    earned = torch.tensor([reward for row in rewards for reward in row], dtype=torch.float64)
    if not len(earned):
        return {}
    std = earned.std(correction=0).item()
    return {f"step_rewards/{source}/mean": earned.mean().item(), f"step_rewards/{source}/std": std}


def place_rewards(
    batch: RolloutBatch, args: StepPPOConfig, *, ending_ids: set[int], step_weight: float
) -> RolloutBatch:
    """Add `rewards` (steps at their last tokens, outcomes and the missing-EOS penalty at the last token) and `learned`.

    `ending_ids` are the ids that a finished completion may end with; rollbacks lower `step_weight`.
    """
    mask = learned_mask(batch, args)
    steps = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    marking = [one for one in batch.steps if one.weight]
    for one in marking:
        steps = steps + one.weight * one.placement.rewards
    ends = [[end for row in rows for end in row] for rows in zip(*(one.ends for one in marking), strict=True)]
    others = args.outcome_weight * place_outcome(batch.outcomes, mask)
    cut = [bool(ids) and ids[-1] not in ending_ids for ids in batch.completion_ids]
    penalties = args.missing_eos_penalty * torch.tensor(cut, dtype=torch.float32, device=mask.device)
    if args.missing_eos_penalty:
        others = others - place_outcome(penalties, mask)
    return batch.plus(learned=mask, rewards=TokenRewards(step_weight * steps, others, ends, penalties, step_weight))


def check_earning(batch: RolloutBatch, args: StepPPOConfig, *, step: int) -> None:
    """Raise ValueError if a run learns nothing: no step has a reward on any process, and no outcome function judged
    anything.

    Guards (`on_alarm`) handle a policy that stops writing later; one that writes nothing in its first rollout is
    rejected here. Completions that TRL masks (`mask_truncated_completions`) are ignored.
    """
    weights = (batch.function_weights * batch.is_outcome).to(batch.function_rewards.device)
    judged = bool(args.outcome_weight) and bool((~batch.function_rewards.isnan() & (weights != 0)).any())
    marking = [one for one in batch.steps if one.weight and args.step_weight]
    paid = any(end is not None for one in marking for row in one.ends for end in row)
    used = batch.mask.any(dim=1).tolist()
    written = [bool(text.strip()) for text, keep in zip(batch.texts, used, strict=True) if keep]
    failed = [one for rows in batch.scores.values() for one in rows if not one.judged]
    reasons = [one.error or f"{one.truncated_steps} steps are beyond `max_length`" for one in failed[:1]]
    charged = bool(args.kl_coef) and not args.step_weight  # training on the KL penalty alone was requested
    everyone = gather_object([(judged or paid or charged, sum(used), sum(written), sum(batch.unscored), reasons)])
    earned, count, texts, unscored = (sum(one[place] for one in everyone) for place in range(4))
    if earned or not count or (not texts and step):
        return
    first = next((f" (first: {one[4][0].rstrip('.')})" for one in everyone if one[4]), "")
    raise ValueError(
        f"The rollout of step {step} has no reward, so nothing would be learned: of {count} completions "
        f"{count - texts} are empty, {unscored} could not be scored to their end{first}, no other has a step with a "
        "reward, and no outcome function judged one. Check what the policy writes, `max_length` of the reward model, "
        "and the weights of the rewards."
    )


def has_outcomes(batch: RolloutBatch, args: StepPPOConfig) -> bool:
    """Whether there is an outcome reward."""
    return bool(args.outcome_weight and batch.is_outcome.any())


def learned_mask(batch: RolloutBatch, args: StepPPOConfig) -> Tensor:
    """True where a token is trained on (B, T).

    `gae` and `global` leave out a completion that no outcome function judged: a missing outcome is not an outcome of 0.
    `group` builds on TRL's group advantages, which already leave it out. A completion that a weighted source could not
    read to its end is always left out, so that unjudged steps gain no advantage.
    """
    mask = batch.mask
    if args.advantage != "group" and has_outcomes(batch, args):
        mask = mask & batch.judged.unsqueeze(1)
    for one in batch.steps if args.step_weight else ():
        if one.weight and not all(one.judged):
            mask = mask & torch.tensor(one.judged, device=mask.device).unsqueeze(1)
    return mask


def charge_kl(batch: RolloutBatch, coefficient: AdaptiveKL, accelerator: Accelerator) -> RolloutBatch:
    """Subtract the KL divergence from the reference from each token's reward, then adapt the coefficient to its
    target."""
    assert batch.kl is not None
    assert batch.rewards is not None
    mean: Any = accelerator.reduce(batch.kl.sum(dim=1).mean(), reduction="mean")
    metrics = {"kl_reward/per_completion": mean.item(), "kl_reward/coef": coefficient.coef}
    others = batch.rewards.others - coefficient.coef * batch.kl
    coefficient.update(mean.item())
    return batch.plus(metrics, rewards=batch.rewards._replace(others=others))


def whitened_rewards(rewards: Tensor, mask: Tensor, args: StepPPOConfig, accelerator: Accelerator) -> Tensor:
    """Token rewards (B, T), whitened over the batch of all processes if configured."""
    if not args.whiten_rewards:
        return rewards
    return whiten(rewards, mask, shift_mean=False, all_reduce=all_reduce(accelerator))
