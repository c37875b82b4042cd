"""Checkpoints that a killed run can be resumed from.

`transformers.Trainer` writes a checkpoint in place, file after file. A run that is killed meanwhile leaves a folder
that looks like the last checkpoint and is incomplete. `trainer_state.json` is written last, so a checkpoint is complete
if that file can be read and states the step that the folder is named for. Three rules keep that true:
[`begin_checkpoint`] deletes the file of an older run before a folder is written again; `_save_rng_state` of both
trainers waits until all processes wrote their share before the file appears; every search for a checkpoint goes through
this module.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

STATE = "trainer_state.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is complete; unless it is named `checkpoint-<step>`, its state may be of any step."""
    try:
        state = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut
        return False
    named = _NAME.fullmatch(Path(checkpoint).name)
    return named is None or state.get("global_step") == int(named[1])


def last_checkpoint(folder: str | Path) -> str | None:
    """The latest complete checkpoint in an output folder; None if there is none."""
    named = ((path, _NAME.fullmatch(path.name)) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    steps = sorted(((int(found[1]), path) for path, found in named if found), reverse=True)
    return next((str(path) for _, path in steps if is_complete(path)), None)


def begin_checkpoint(folder: str | Path) -> None:
    """Delete the file that makes a checkpoint look complete, before it is written again; leave other folders alone."""
    if _NAME.fullmatch(Path(folder).name):
        (Path(folder) / STATE).unlink(missing_ok=True)


def find_checkpoint(wanted: Any, output_dir: str | Path | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` of `Trainer.train` means.

    Args:
        wanted: A path; True: the last complete checkpoint; anything false: none.
        output_dir: Where the run writes its checkpoints.

    Raises:
        ValueError: If there is no complete checkpoint, or the path holds an incomplete one.
    """
    if not wanted:
        return None
    if wanted is True:
        found = last_checkpoint(str(output_dir))
        if found is None:
            raise ValueError(f"{output_dir} holds no whole checkpoint. Start without `resume_from_checkpoint`.")
        return found
    if not is_complete(wanted):
        raise ValueError(
            f"{wanted} is no whole checkpoint: its {STATE}, which is written last, is missing or cut, or of another "
            "step. Resume from an earlier one, or give `resume_from_checkpoint=True` for the last that is whole."
        )
    return str(wanted)


def finish_if_complete(trainer: Any, checkpoint: str | None) -> TrainOutput | None:
    """Load a checkpoint that was written after the last step, because `Trainer.train` would make one step more.

    Args:
        trainer: A `transformers.Trainer` whose weights are not sharded.
        checkpoint: The checkpoint, or None.

    Returns:
        What `Trainer.train` would have returned, as far as the log tells; None if steps are left.
    """
    if checkpoint is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
    if state.global_step < _last_step(state, trainer.args):
        return None
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)
    trainer.state = state
    return train_output(state)


def _last_step(state: TrainerState, args: TrainingArguments) -> float:
    """The last step by the present configuration, which may differ from the one that wrote the checkpoint."""
    if args.max_steps > 0:
        return args.max_steps
    # The state rounds `num_train_epochs` up; `epoch` says how far the run came, to a step.
    came = (state.epoch or 0.0) * (1 + 1 / max(state.global_step, 1))
    return state.max_steps if args.num_train_epochs <= came or state.global_step < state.max_steps else math.inf


def train_output(state: TrainerState) -> TrainOutput:
    """What `Trainer.train` returned for a finished run, as far as its log tells."""
    last = state.log_history[-1] if state.log_history else {}
    metrics = {name: value for name, value in last.items() if name.startswith("train_")}
    return TrainOutput(state.global_step, metrics.get("train_loss", math.nan), metrics)
