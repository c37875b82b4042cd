"""Pages of the policy's completions and step scores during training."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from fractal_rm.files import write_atomic
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.report.viewer import write_viewer

FOLDER = "step_scores"


class StepScoresCallback(TrainerCallback):
    """Writes the last rollout with its step scores as an HTML page, every n optimizer steps and at the end.

        trainer.add_callback(StepScoresCallback(trainer))

    `output_dir/step_scores/step-000100.html` needs only a browser; `step-000100.jsonl` holds the same rows. The
    rollout is the last one that was trained on; with several processes, the main process's share of it.

    Args:
        trainer: The trainer to follow.
        every_n_steps: Optimizer steps between pages.
        keep: Number of latest pages to keep; None: all.

    Raises:
        ValueError: If the trainer has no step scores, or a number is less than 1.
    """

    def __init__(self, trainer: StepPPOTrainer, *, every_n_steps: int = 100, keep: int | None = 10) -> None:
        if trainer.step_scores is None:
            raise ValueError(
                "StepScoresCallback shows step scores, but this trainer has none. Give it a `reward_model`, or take "
                "the callback out."
            )
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` of StepScoresCallback is {value}. Give 1 or more.")
        self.trainer, self.every_n_steps, self.keep = trainer, every_n_steps, keep
        self._written: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every_n_steps == 0:
            self.write(args, state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._written != state.global_step:
            self.write(args, state)

    def write(self, args: Any, state: TrainerState) -> None:
        """Write the page and the rows of this step, and delete older pages beyond `keep`."""
        rows = rollout_rows(self.trainer)
        if not rows or not state.is_world_process_zero:
            return
        step, folder = state.global_step, Path(str(args.output_dir)) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / f"step-{step:06d}.html"
        lines = (json.dumps({"step": step} | row, allow_nan=False) for row in rows)
        write_atomic(page.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
        write_viewer(page, rows, title=f"Step scores of the rollout at step {step}")
        self._written = step
        if self.keep is not None:
            # Keep the last written pages, not the highest steps: the folder may hold pages of an earlier run.
            pages = sorted(folder.glob("step-*.html"), key=lambda path: (path.stat().st_mtime_ns, path.name))
            for old in pages[: -self.keep]:
                old.unlink()
                old.with_suffix(".jsonl").unlink(missing_ok=True)


def rollout_rows(trainer: StepPPOTrainer) -> list[dict[str, Any]]:
    """The last rollout that was trained on, as [`~fractal_rm.report.viewer.write_viewer`] takes it.

    One row per completion of this process: `id`, `prompt`, `response`, `steps`, `score`, `truncated_steps`, `error`,
    `rewards` (of each outcome function) and `label`, their weighted sum; None where a value is unknown.
    """
    rollout = trainer.last_rollout
    if rollout is None or rollout.watched is None:
        return []
    outcomes = [column for column, is_outcome in enumerate(rollout.is_outcome.tolist()) if is_outcome]
    weights = rollout.function_weights.tolist()
    rows = []
    for number, (prompt, scored, values) in enumerate(
        zip(rollout.prompts, rollout.watched, rollout.function_rewards.tolist(), strict=True), start=1
    ):
        given = {i: values[i] for i in outcomes if math.isfinite(values[i])}
        rows.append(
            {
                "id": f"completion {number}",
                "prompt": prompt,
                "response": scored.response,
                "steps": [dict(vars(step)) for step in scored.steps],
                "score": None if math.isnan(scored.score) else scored.score,
                "truncated_steps": scored.truncated_steps,
                "error": scored.error,
                "label": sum(weights[i] * value for i, value in given.items()) if given else None,
                "rewards": {trainer.reward_func_names[i]: value for i, value in given.items()},
            }
        )
    return rows
