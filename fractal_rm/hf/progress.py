"""Progress of a training run on the screen: a bar, and a short line for each log."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

# A rollout logs some forty numbers; these say whether the model learns. `report_to` gets all of them.
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


class RichProgress(TrainerCallback):
    """A bar and one line per log, in place of the bars and dictionaries that `transformers.Trainer` prints.

    Use it in a `with` statement around `trainer.train()`: it restores the screen after an error.

    Args:
        trainer: The trainer to follow; its own screen callbacks are removed.
        description: Text before the bar.
    """

    def __init__(self, trainer: Trainer, description: str) -> None:
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
            disable=bool(trainer.args.disable_tqdm) or not trainer.is_world_process_zero(),
        )
        self.task = self.progress.add_task(description, total=None)

    def __enter__(self) -> "RichProgress":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
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
