"""Progress of a training run on the terminal: a bar, and a short line for each log."""

import multiprocessing
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

# A rollout logs about forty numbers; these show whether the model learns. `report_to` gets all of them.
_SHOWN = ("loss", "reward", "kl", "completions/mean_length", "steps/score", "value/explained_variance")
_SHOWN_PREFIXES = (
    "loss/",
    "rewards/",
    "eval_bag",
    "eval_loss",
    "eval_pair",
    "eval_reward",
    "eval_step_",
    "eval_within",
)
# The first number is logged after this many steps or seconds, whatever `logging_steps` is.
FIRST_STEPS, FIRST_SECONDS = 10, 30.0


def bar_on_terminal(trainer: Trainer, description: str) -> AbstractContextManager[Any]:
    """A bar for one of many trainings, if this is a terminal and the process that the user started; otherwise
    nothing."""
    if sys.stderr.isatty() and multiprocessing.parent_process() is None:
        return RichProgress(trainer, description, disable=False)
    return nullcontext()


class RichProgress(TrainerCallback):
    """Bars of training and evaluation and one line per log, instead of the output of `transformers.Trainer`.

    The first loss is logged after at most ten steps; with a single process, also after the first step that ends thirty
    seconds or more after the start.

    Use it in a `with` statement around `trainer.train()`: it restores the terminal after an error. `disable` hides the
    bars; None: as the trainer's `disable_tqdm`.
    """

    def __init__(self, trainer: Trainer, description: str, *, disable: bool | None = None) -> None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=bool(trainer.args.disable_tqdm if disable is None else disable)
            or not trainer.is_world_process_zero(),
        )
        self.task = self.progress.add_task(description, total=None)
        self._evaluation: TaskID | None = None
        self._start, self._silent = time.monotonic(), False

    def __enter__(self) -> "RichProgress":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self._start, self._silent = time.monotonic(), state.global_step == 0 and args.logging_strategy != "no"

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        # Logging gathers the loss of all processes, and their clocks differ.
        waited = args.world_size == 1 and time.monotonic() - self._start >= FIRST_SECONDS
        if self._silent and (state.global_step >= FIRST_STEPS or waited):
            control.should_log = True

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._evaluation is None:
            batches = kwargs["eval_dataloader"]
            total = len(batches) if has_length(batches) else None
            self._evaluation = self.progress.add_task("Evaluation", total=total)
        self.progress.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self.progress.remove_task(self._evaluation)
            self._evaluation = None

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._silent = self._silent and "loss" not in (logs or {})
        shown = {
            name: float(value)
            for name, value in (logs or {}).items()
            if (name in _SHOWN or name.startswith(_SHOWN_PREFIXES)) and isinstance(value, int | float | str)
            if not name.endswith(("/std", "_std"))
        }
        if shown and state.is_world_process_zero:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.progress.console.print(
                f"step {state.global_step}: {numbers}", markup=False, highlight=False, soft_wrap=True
            )
