"""Checkpoints that a killed run can be resumed from: complete ones of the same run.

`transformers.Trainer` writes a checkpoint in place, file after file. A run that is killed meanwhile leaves a folder
that looks like the last checkpoint and is incomplete. [`fractal_rm.hf.manifest`] says which ones are complete; every
search for a checkpoint uses this module.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fractal_rm.errors import reason
from fractal_rm.hf.manifest import MANIFEST, Identity, changes, damage, read_manifest, unknown_version

STATE = "trainer_state.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
logger = logging.getLogger(__name__)


def fault(checkpoint: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed, as part of a sentence; None if it is complete."""
    folder = Path(checkpoint)
    found = damage(folder)
    if found is not None:
        return found
    try:
        step = json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {STATE}"
    named = _NAME.fullmatch(folder.name)
    return None if named is None or step == int(named[1]) else f"it was written at step {step}"


def checkpoints(folder: str | Path) -> list[Path]:
    """The finished checkpoints of an output folder, including damaged ones, latest first."""
    named = ((path, _NAME.fullmatch(path.name)) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    steps = [(int(found[1]), path) for path, found in named if found and (path / MANIFEST).is_file()]
    return [path for _, path in sorted(steps, reverse=True)]


def last_checkpoint(folder: str | Path) -> str | None:
    """The latest complete checkpoint in an output folder, None if there is none; warns about damaged ones."""
    for path in checkpoints(folder):
        found = fault(path)
        if found is None:
            return str(path)
        logger.warning("%s is damaged (%s): the previous checkpoint is used.", path, found)
    return None


def can_resume(folder: str | Path) -> bool:
    """Whether an output folder has a finished checkpoint. A run killed before its first one starts again."""
    return bool(checkpoints(folder))


def resume_or_clear(folder: Path) -> bool:
    """Whether a part of a larger run can resume from a checkpoint; if not, its leftovers are removed."""
    if last_checkpoint(folder) is not None:
        return True
    if can_resume(folder):
        logger.warning("%s holds no complete checkpoint: that run starts again.", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return False


def find_checkpoint(wanted: Any, output_dir: str | Path | None, identity: Identity) -> str | None:
    """The checkpoint that `resume_from_checkpoint` of `Trainer.train` means: a path, True for the last complete one, or
    none.

    Raises ValueError if there is no complete checkpoint, or the given one is incomplete or belongs to another run.
    """
    if not wanted:
        return None
    if wanted is True:
        found = last_checkpoint(str(output_dir))
        if found is None:
            damaged = checkpoints(str(output_dir))
            why = f": {damaged[0].name} is damaged ({fault(damaged[0])})" if damaged else ""
            raise ValueError(f"{output_dir} holds no complete checkpoint{why}. Start without `resume_from_checkpoint`.")
    else:
        found, broken = str(wanted), fault(wanted)
        if broken is not None:
            raise ValueError(
                f"{wanted} is not a complete checkpoint: {broken}. Resume from an earlier one, or give "
                "`resume_from_checkpoint=True` for the last complete one."
            )
    check_same_run(Path(found), identity)
    return found


def check_same_run(folder: Path, identity: Identity) -> None:
    """Raise ValueError if a folder has the manifest of another run or of an unknown version; the message says which."""
    manifest = read_manifest(folder)
    unknown = None if manifest is None else unknown_version(manifest)
    if unknown is not None:
        raise ValueError(f"{folder}: {unknown}. Install the fractal-rm version that wrote it, or give another folder.")
    differ = [] if manifest is None else changes(manifest["run"], identity)
    if differ:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(differ)}. Set these as they were to resume that run, give "
            "another `output_dir`, or set `overwrite_output_dir` without `resume_from_checkpoint` to remove it."
        )


@contextmanager
def whole_or_absent(folder: Path, *, writes: bool) -> Iterator[None]:
    """Write a checkpoint inside the `with` block, or leave none: a half-written checkpoint is removed after any error.

    `writes` says whether this process writes it. Raises OSError if the disk is full; the message says what is left.
    """
    if writes:  # a checkpoint of the same name is incomplete while it is rewritten
        (folder / MANIFEST).unlink(missing_ok=True)
    try:
        with named_write_errors(f"The checkpoint {folder}", "It is removed; the previous checkpoint stays."):
            yield
    except BaseException:
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
        raise


class WriteError(OSError):
    """Something could not be written; the message is for the user."""


@contextmanager
def named_write_errors(what: str, then: str = "") -> Iterator[None]:
    """Turn errors of torch, safetensors or the operating system about a full disk into a [`WriteError`] of one
    sentence."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        cause: Any = error.__cause__ if isinstance(error, WriteError) else error
        why = getattr(cause, "strerror", None) or reason(cause)
        sentences = (f"{what} could not be written ({why}).", then, "Free space, and resume.")
        raise WriteError(" ".join(filter(None, sentences))) from cause
