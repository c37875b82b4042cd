"""Guards in training: what they measure on a rollout, and how training reacts to their alarms."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fractal_rm.credit.guards import Alarm, GuardInputs, Guards, measure_rollouts, most_frequent, word_places
from fractal_rm.data.bag import StepScores
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rollout import RolloutBatch, mean_outcomes

logger = logging.getLogger(__name__)
# Factor of `step_weight` at a rollback: the same weights with the same rewards would collapse the same way again.
ROLLBACK_FACTOR = 0.5


def guard_inputs(batch: RolloutBatch, ends: set[int], *, gives_probabilities: bool) -> GuardInputs:
    """A rollout as the guards see it.

    `ends` are the ids that a finished completion may end with. Without `gives_probabilities` (the watched source's
    scores are not P(step is good)), the guards see its steps without scores.
    """
    count, kl = len(batch.completion_ids), batch.kl
    checked = batch.function_weights.to(batch.function_rewards.device) * batch.is_outcome
    scored = batch.watched
    rated = [row if row.judged else StepScores(row.response) for row in scored or ()] if gives_probabilities else None
    return GuardInputs(
        token_ids=[[i for i in ids if i not in ends] for ids in batch.policy_ids],
        ended=[not ids or ids[-1] in ends for ids in batch.completion_ids],
        steps=[[step.text for step in row.steps] for row in scored] if scored else [[]] * count,
        step_scores=[row.step_scores for row in rated] if rated else [[]] * count,
        scores=[row.score for row in rated] if rated else [math.nan] * count,
        outcomes=mean_outcomes(batch.function_rewards, checked).tolist(),
        kl=kl.sum(dim=1).tolist() if kl is not None else [math.nan] * count,
        prompts=[str(prompt) for prompt in batch.prompts],
        unscored=batch.unscored,
        steps_beyond_limit=[row.truncated_steps for row in scored or ()],
    )


class Alarms(TrainerCallback):
    """Watches rollouts, remembers checkpoints, and chooses the checkpoint to roll back to.

    Attributes:
        step_weight: Weight of the step rewards: `args.step_weight`, halved by every rollback.
    """

    def __init__(self, args: StepPPOConfig) -> None:
        self.args = args
        self.guards = Guards(reference_batches=args.guard_reference_batches, patience=args.guard_patience)
        self.checkpoints: dict[int, Path] = {}
        self._scale = 1.0

    @property
    def step_weight(self) -> float:
        return self._scale * self.args.step_weight

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.checkpoints[state.global_step] = self._folder(state.global_step)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # resumed: a checkpoint does not list itself
            self.on_save(args, state, control)

    def _folder(self, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def watch(self, seen: GuardInputs, *, step: int) -> tuple[dict[str, float], list[Alarm]]:
        """Metrics of a rollout to log, and the alarms it raises: the same on every process."""
        measured = _mean_over_processes(measure_rollouts(seen))
        places = gather_object([most_frequent([word_places(seen.steps)])])
        measured["step_order"] = self.guards.order(most_frequent(places))
        alarms = self.guards.update(measured, step=step)
        for alarm in alarms:
            if self.args.process_index == 0:
                logger.warning("%s", alarm)
        raised = {f"guards/alarm/{alarm.signal}": 1.0 for alarm in alarms}
        return {f"guards/{name}": value for name, value in measured.items()} | raised, alarms

    def checkpoint_before(self, alarms: Sequence[Alarm]) -> Path | None:
        """The last checkpoint before the first sign of any of these alarms; later ones are forgotten.

        The weights of step n wrote the rollout of step n, so a checkpoint of that step is one too late.
        """
        since = min(alarm.since for alarm in alarms)
        self.checkpoints = {step: path for step, path in self.checkpoints.items() if step < since and path.is_dir()}
        return self.checkpoints[max(self.checkpoints)] if self.checkpoints else None

    def rolled_back(self, checkpoint: Path, alarms: Sequence[Alarm]) -> None:
        """Record a rollback: halve the weight of step rewards and clear the history."""
        self._scale *= ROLLBACK_FACTOR
        self.guards.forgive()
        if self.args.process_index == 0:
            names = ", ".join(f"`{alarm.signal}`" for alarm in alarms)
            logger.warning(
                "Rolled back to %s because of %s; `step_weight` is now %g.", checkpoint, names, self.step_weight
            )

    def state_dict(self) -> dict[str, Any]:
        """The state to save, for JSON."""
        return {
            "guards": self.guards.state_dict(),
            "step_weight_scale": self._scale,
            "checkpoints": sorted(self.checkpoints),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.guards.load_state_dict(state["guards"])
        self._scale = state["step_weight_scale"]
        self.checkpoints = {step: self._folder(step) for step in state["checkpoints"]}


def _mean_over_processes(measured: dict[str, float]) -> dict[str, float]:
    """The mean over processes, so that all processes see the same alarms; NaN is ignored."""
    everyone = gather_object([measured])
    return {
        name: torch.tensor([one[name] for one in everyone], dtype=torch.float64).nanmean().item() for name in measured
    }
