"""Runs that can be stopped, resumed and told apart, for both trainers.

[`Run`] comes before a `transformers.Trainer` in the base classes. Checkpoints get a manifest
([`fractal_rm.hf.manifest`]) and the state that `Trainer` does not save (losses and metrics since the last log); Ctrl-C
and SIGTERM end a run with a checkpoint; training that diverges stops ([`fractal_rm.hf.finite`]).
"""

import json
import logging
import math
import os
import shutil
import signal
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from fractal_rm.errors import reason
from fractal_rm.files import parse_json, read_json, write_atomic
from fractal_rm.hf.checkpoints import STATE, check_same_run, checkpoints, find_checkpoint, whole_or_absent
from fractal_rm.hf.finite import FiniteTraining, finite
from fractal_rm.hf.manifest import MANIFEST, Identity, identity_of, write_manifest
from fractal_rm.interrupts import Interrupted, handled
from fractal_rm.scorers.checkpoint import check_finite_weights

# Log entry of a resumed run: its times and speeds are measured since this step.
TIMED_FROM = "train_timed_from_step"
_PENDING = "pending_logs"
logger = logging.getLogger(__name__)
# Options that are objects, or paths of files with one.
_OR_FILES = {"accelerator_config", "fsdp_config", "deepspeed"}


def _object_or_file(name: str, given: str) -> Any:
    """The value of an option that is a JSON object or, for some options, a file with one."""
    if name not in _OR_FILES or given.startswith("{"):
        return parse_json(given.encode(), f"`{name}`")
    if not Path(given).is_file():
        raise ValueError(f"`{name}` is {given!r}, which is neither an object nor a file. Give one, or leave it out.")
    return read_json(given)


@dataclass
class RunConfig:
    """Options that both trainers share; comes before `TrainingArguments` in the base classes."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Replace a model or run in `output_dir`; otherwise a folder with a finished model or another run "
            "is refused."
        },
    )

    def check_amounts(self) -> None:
        """Raise ValueError for amounts that would train nothing; `Trainer` accepts some and reports success."""
        args: Any = self
        if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
            name = "num_train_epochs" if args.max_steps else "max_steps"
            raise ValueError(
                f"`{name}` is {getattr(self, name)}: nothing would be trained. Give `max_steps` of 1 or more, or "
                "`num_train_epochs` above 0."
            )
        for name in ("gradient_accumulation_steps", "num_iterations"):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: nothing would be trained. Give 1 or more.")

    def check_objects(self) -> None:
        """Raise ValueError for an option that should be an object with named values but is not."""
        args: Any = self
        for name in args._VALID_DICT_FIELDS:
            value = getattr(args, name)
            if isinstance(value, str):
                value = value.strip()
                setattr(args, name, value)  # transformers parses it
                if name == "deepspeed" and not value.startswith("{"):
                    continue  # a file, or an encoded text
                value = _object_or_file(name, value)
            elif name in _OR_FILES and not isinstance(value, Mapping):
                continue
            if not (value is None or (isinstance(value, Mapping) and all(isinstance(key, str) for key in value))):
                raise ValueError(f"`{name}` is {value!r}. Give an object with named values, or leave it out.")
            known = [one.name for one in fields(AcceleratorConfig)]
            unknown = [key for key in value or () if name == "accelerator_config" and key not in known]
            if unknown:
                raise ValueError(f"`{name}` has no option {unknown[0]!r}. Choose among {', '.join(known)}.")

    def check_compilation(self) -> None:
        """Raise ValueError for an unknown backend or mode of `torch.compile`."""
        args: Any = self
        if args.torch_compile_backend is not None:
            backends = [one.value.lower() for one in DynamoBackend]
            if args.torch_compile_backend.lower() not in backends:
                raise ValueError(
                    f"`torch_compile_backend` is {args.torch_compile_backend!r}. Choose one of {', '.join(backends)}."
                )
        if args.torch_compile_mode is not None:
            from torch._inductor import list_mode_options  # takes a second to import

            modes = list(list_mode_options())
            if args.torch_compile_mode not in modes:
                raise ValueError(
                    f"`torch_compile_mode` is {args.torch_compile_mode!r}. Choose one of {', '.join(modes)}."
                )

    def check_evaluation(self, dataset: Any) -> None:
        """Raise ValueError if evaluation is requested without data."""
        strategy = getattr(self, "eval_strategy", "no")
        if strategy != "no" and dataset is None:
            raise ValueError(
                f"`eval_strategy` is {str(getattr(strategy, 'value', strategy))!r}, but there is no data to evaluate "
                "on. Give `eval_dataset` (a command: `eval_file`), or leave it out."
            )


class Run(Trainer):
    """Mixin for a trainer whose runs can be stopped and resumed; subclasses define `materials`."""

    args: Any

    @abstractmethod
    def materials(self) -> Mapping[str, Any]:
        """Fingerprints of the data and models of the run by name, before training changes them."""

    def pending_logs(self) -> Any:
        """Metrics that are measured but not yet logged, as JSON values."""

    def restore_pending_logs(self, pending: Any) -> None:
        """Restore what `pending_logs` returned."""

    def may_stop(self) -> bool:
        """Whether stopping after this step and resuming gives the same result as not stopping."""
        return True

    @cached_property
    def identity(self) -> Identity:
        """The identity of the run; read before training."""
        return identity_of(self.args, {**self.materials(), "processes": self.args.world_size})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finite = FiniteTraining(self)
        self.stopping = _Stopping(self)
        self.timed_from = 0
        for callback in (self.finite, self.stopping, _Restoring(self)):
            self.add_callback(callback)
        self.resumes: Path | None = None

    # Beginning --------------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: Any) -> None:
        """Check the output folder before training; raises ValueError if it belongs to another run."""
        output, identity = Path(str(self.args.output_dir)), self.identity
        held = [output, *output.glob("stage-*")]
        if self.args.overwrite_output_dir:
            if resume_from_checkpoint:
                raise ValueError(
                    "`overwrite_output_dir` removes the checkpoints that `resume_from_checkpoint` needs. "
                    "Leave one of them out."
                )
            if self.is_world_process_zero():
                for folder in (*held[1:], *output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
                    shutil.rmtree(folder, ignore_errors=True)
                (output / MANIFEST).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
        else:
            for folder in held:
                for path in (folder, *checkpoints(folder)):
                    check_same_run(path, identity)

    def go_on(self, wanted: Any, folder: str | Path, **kwargs: Any) -> TrainOutput:
        """Train to the end, from the requested checkpoint if there is one; a finished run takes no further step."""
        checkpoint = find_checkpoint(wanted, folder, self.identity)
        self.resumes = None if checkpoint is None else Path(checkpoint)
        if self.resumes is not None and not self._pending_file(self.resumes).is_file():
            raise ValueError(
                f"{checkpoint} holds only a model (`save_only_model`), so no run can resume from it. Use it as `model` "
                "with another `output_dir`, or train again without `save_only_model`."
            )
        done = self._finished(checkpoint)
        if done is not None:
            return done
        parent: Any = super()
        with self.stopping.listening():
            result = parent.train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.state.global_step == 0:
            raise ValueError(
                "Training took no optimizer step, so nothing was learned. Give more data, or smaller batches."
            )
        check_finite_weights(self.accelerator.unwrap_model(self.model), "the model")
        return TrainOutput(result.global_step, result.metrics.get("train_loss", result.training_loss), result.metrics)

    def _finished(self, checkpoint: str | None) -> TrainOutput | None:
        """Load a checkpoint of the last step, because `Trainer.train` would take one step more.

        Returns the result of `Trainer.train` without times; None if steps are left.
        """
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        if state.global_step < self._last_step():
            return None
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)
        self._load_rng_state(checkpoint)  # an evaluation that samples then draws the same
        self.state, self.timed_from = state, state.global_step
        sums = self._read_pending(Path(checkpoint))
        self.restore_pending_logs(sums["metrics"])
        loss = (sums["logged"] + sums["since"]) / state.global_step
        metrics = {"total_flos": state.total_flos, "train_loss": loss, TIMED_FROM: state.global_step}
        self.log(metrics)
        return TrainOutput(state.global_step, loss, metrics)

    def _last_step(self) -> float:
        """The last step by the current configuration, which may differ from the one that wrote a checkpoint."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        last = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return math.inf if last is None else last

    # Options that libraries read late ---------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; errors name `optim_args`."""
        with naming_option("optim_args", self.args.optim_args):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; errors name `lr_scheduler_kwargs`."""
        with naming_option("lr_scheduler_kwargs", self.args.lr_scheduler_kwargs):
            return super().create_scheduler(*args, **kwargs)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # Older checkpoints are removed only once this one is complete.
        with lent(self.args, save_total_limit=None), whole_or_absent(folder, writes=self.args.should_save):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                write_manifest(folder, self.identity, (path for path in folder.rglob("*") if path.is_file()))
        if self.args.should_save:
            rotate_checkpoints(
                str(self.args.output_dir),
                self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        sums = {
            "logged": self._total_loss_scalar,
            "since": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": self.pending_logs(),
        }
        write_atomic(self._pending_file(Path(output_dir)), json.dumps(sums))
        # State and manifest, which mark a checkpoint as complete, come after the files of every process.
        self.accelerator.wait_for_everyone()

    def _pending_file(self, folder: Path) -> Path:
        many = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return folder / f"{_PENDING}{many}.json"

    def _read_pending(self, folder: Path) -> dict[str, Any]:
        return json.loads(self._pending_file(folder).read_text(encoding="utf-8"))

    def restore_sums(self) -> None:
        """Restore losses and metrics since the last log, after `Trainer` has reset them."""
        self.timed_from = self.state.global_step
        if self.resumes is None:
            return
        sums = self._read_pending(self.resumes)
        self._total_loss_scalar, self._globalstep_last_logged = sums["logged"], sums["last_logged"]
        self._tr_loss = torch.tensor(sums["since"], device=self.args.device)
        self._initial_global_step = 0  # the mean loss covers all steps
        self.restore_pending_logs(sums["metrics"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, but only finite numbers, with a warning about a NaN or infinite loss.

        TRL logs None for unknown numbers, undefined metrics are NaN, and diverging training logs NaN. Each tracker
        drops these or fails in its own way, and strict JSON does not allow them. `logs`, which `evaluate` returns,
        keeps its NaN and gets what the parent class's `log` adds.
        """
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(norm) and getattr(self.accelerator, "scaler", None) is None:
            self.finite.stop("gradient norm", norm)
        self._mark_times(logs)
        kept = finite(logs)
        for name in ("loss", "grad_norm"):  # other undefined metrics are harmless
            if name in logs and name not in kept:
                logger.warning(
                    "`%s` is %s at step %d: training diverges. Lower `learning_rate`, or go back to a checkpoint.",
                    name,
                    logs[name],
                    self.state.global_step,
                )
        super().log(kept, start_time)
        logs.update(kept)

    def _mark_times(self, logs: dict[str, Any]) -> None:
        """Correct the speeds of a resumed run, which measure only its last part, and log the step where that part
        began."""
        if self.timed_from and "train_runtime" in logs:
            share = 1 - self.timed_from / max(self.state.global_step, 1)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs:
                    logs[name] = round(logs[name] * share, 3)
            logs[TIMED_FROM] = self.timed_from


@contextmanager
def lent(args: TrainingArguments, **values: Any) -> Iterator[None]:
    """Change options inside the `with` block: `Trainer` reads these from its configuration only."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


@contextmanager
def naming_option(
    name: str, value: Any, *, kinds: tuple[type[Exception], ...] = (TypeError, ValueError)
) -> Iterator[None]:
    """Turn a library's error into a ValueError that names the option and its value, if one was given."""
    try:
        yield
    except kinds as error:
        if not value:
            raise
        raise ValueError(
            f"`{name}` is {value!r}, which cannot be used ({reason(error)}). Correct it, or leave it out."
        ) from error


def train_output(state: TrainerState) -> TrainOutput:
    """The result of `Trainer.train` for a finished run, from its log."""
    last = state.log_history[-1] if state.log_history else {}
    metrics = {name: value for name, value in last.items() if name.startswith("train_")}
    return TrainOutput(state.global_step, metrics.get("train_loss", math.nan), metrics)


class _Restoring(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.run.restore_sums()


class _Stopping(TrainerCallback):
    """Ends training with a checkpoint after Ctrl-C or SIGTERM, and at once after a second signal.

    Without checkpoints (`save_strategy="no"`) signals keep their usual effect.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.asked, self.process = run, 0, os.getpid()

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a data loader process, which its parent ends by SIGTERM
            if number == signal.SIGTERM:
                raise Interrupted(number)
            return
        if self.asked:
            raise Interrupted(number, "Interrupted twice: training ended at once.", self._then())
        self.asked = number
        os.write(2, b"Interrupted: a checkpoint is written after this step. Interrupt again to stop at once.\n")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the `with` block; raises Interrupted at its end if there was one."""
        if self.run.args.save_strategy == "no":
            try:
                yield
            except Interrupted as end:
                told = f"Interrupted after step {self.run.state.global_step}."
                then = "Nothing was saved, because `save_strategy` is `no`: the same command starts again."
                raise Interrupted.by(end, told, then) from None
            return
        self.asked = 0
        with handled(self._ask):
            yield
        if self.asked:
            raise Interrupted(
                self.asked,
                f"Interrupted after step {self.run.state.global_step}: {self.run.args.output_dir} holds a checkpoint.",
                "The same command continues with --resume_from_checkpoint true.",
            )

    def _then(self) -> str:
        last = next(iter(checkpoints(str(self.run.args.output_dir))), None)
        if last is None:
            return "There is no checkpoint: the same command starts again."
        return f"{last} is the last checkpoint: the same command continues from it with --resume_from_checkpoint true."

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        asked: Any = torch.tensor(float(bool(self.asked)), device=args.device)
        if args.world_size > 1:  # all processes, or none
            asked = self.run.accelerator.reduce(asked, reduction="sum")
        if asked and self.run.may_stop():
            control.should_save = control.should_training_stop = True
