"""Checks before any work starts, and the writing of results.

Libraries that take seconds to import are imported inside functions.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fractal_rm.files import locked
from fractal_rm.interrupts import Interrupted
from fractal_rm.scorers.folder import check_model_folder

# What to do if a model of the quickstart is missing.
_MAKE_QUICKSTART = "Run `make quickstart` first: it makes this folder."
# A row of transformers' load report: the weight and its status.
_REPORT_ROW = re.compile(r"^(\S.*?) *\| (?:\x1b\[[\d;]*m)?([A-Z]{4,})\b", re.MULTILINE)
_TOKEN_HEADS = ("classifier.", "score.")
# A weight of a numbered layer, or several layers shown in one row: heads have neither.
_OF_A_LAYER = re.compile(r"\.(\d|\{)")


def check_writable_folder(folder: str | Path) -> None:
    """Raise OSError unless files can be written to a folder; folders created by the check are removed."""
    folder, made = Path(folder), []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"The output folder {folder} cannot be written ({reason}). Choose another one.") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not made, or in use by another process
                path.rmdir()


def check_writable_files(*paths: str | None) -> None:
    """Raise OSError unless a file can be written at each path; None is skipped."""
    for path in paths:
        if path is None:
            continue
        if Path(path).is_dir():
            raise IsADirectoryError(f"The output {path} is a folder. Give the name of a file.")
        check_writable_folder(Path(path).parent)


def check_own_files(**paths: str | None) -> None:
    """Raise ValueError if two arguments name the same file: the command would write one over the other."""
    found = [os.path.realpath(path) for path in paths.values() if path is not None]
    if len(set(found)) < len(found):
        *first, last = (f"`{name}`" for name in paths)
        raise ValueError(f"{', '.join(first)} and {last} name one file twice. Give each its own file.")


@contextlib.contextmanager
def writing_folder(folder: str | Path) -> Iterator[None]:
    """Lock a writable folder while a command works: two commands at once would corrupt each other's files.

    Raises OSError if the folder cannot be written, or another process holds it.
    """
    check_writable_folder(folder)
    with locked(Path(folder) / ".lock", f"into {folder}"):
        yield


@contextlib.contextmanager
def writing_files(*paths: str | None) -> Iterator[None]:
    """The same for files; None and special files are skipped."""
    check_writable_files(*paths)
    with contextlib.ExitStack() as stack:
        for path in (Path(path) for path in paths if path is not None):
            if path.is_file() or not path.exists():
                stack.enter_context(locked(path.with_name(f".{path.name}.lock"), str(path)))
        yield


def refuse_finished_output(folder: str | Path, overwrite: bool) -> None:
    """Raise FileExistsError if a folder holds a finished model, unless it may be overwritten."""
    if not overwrite and _holds_model(folder):
        raise FileExistsError(
            f"{folder} already holds a finished model. Give another `output_dir`, or `--overwrite_output_dir true`."
        )


def _holds_model(folder: str | Path) -> bool:
    return any(Path(folder).glob("*.safetensors"))


def check_matplotlib() -> None:
    """Raise ImportError if matplotlib is not installed; call it before long work that ends with plots."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('Plots need matplotlib, which is not installed: pip install "fractal-rm[plots]".')


def check_models(*paths: str | None) -> None:
    """Raise FileNotFoundError if a model folder is missing, ValueError if it holds no model; hub ids pass, None is
    skipped."""
    for path in paths:
        if path is None or _is_hub_id(path):
            continue
        folder = Path(path)
        if not folder.is_dir():
            advice = _MAKE_QUICKSTART if "quickstart" in folder.parts else "Check the path, or give a hub id."
            raise FileNotFoundError(f"There is no model folder {path}. {advice}")
        check_model_folder(path, "Give a model's folder or hub id.")


def _is_hub_id(path: str) -> bool:
    """Whether a path reads `name` or `owner/name` and does not exist locally."""
    place = Path(path)
    if place.exists() or place.is_absolute() or len(place.parts) != 1 + ("/" in path):
        return False
    first = place.parts[0]
    return first not in (".", "..", "~", "runs") and not (len(place.parts) > 1 and Path(first).is_dir())


def checkpoint_to_resume(config: Any) -> str | bool:
    """The checkpoint to resume: a path, True for the last one, or False; raises FileNotFoundError if a given path is
    missing."""
    from fractal_rm.hf.checkpoints import can_resume

    wanted, folder = config.resume_from_checkpoint, config.output_dir
    if wanted is None and not config.overwrite_output_dir and can_resume(folder) and not _holds_model(folder):
        print(
            f"{folder} has a checkpoint, but training starts from the beginning: stop it and add "
            "`--resume_from_checkpoint true` to continue.",
            file=sys.stderr,
        )
    if wanted is None or str(wanted).lower() in ("false", "none", "no"):
        return False
    if str(wanted).lower() in ("true", "yes"):
        found = can_resume(folder)
        if not found and not any(Path(folder).glob("stage-*")):
            print(f"{folder} has no checkpoint: training starts from the beginning.", file=sys.stderr)
        return found
    if not Path(wanted).is_dir():
        raise FileNotFoundError(f"There is no checkpoint {wanted}. Give `resume_from_checkpoint` a folder, or `true`.")
    return wanted


@contextlib.contextmanager
def saving_trained(trainer: Any, what: str) -> Iterator[None]:
    """Save a trained model if its evaluation, in the `with` block, is interrupted; the Interrupted then raised says
    what was saved."""
    from fractal_rm.hf.checkpoints import can_resume

    try:
        yield
    except KeyboardInterrupt as end:
        trainer.save_model()
        folder = trainer.args.output_dir
        then = "The same command evaluates it with --resume_from_checkpoint true."
        if not can_resume(folder):
            then = "The same command trains again with --overwrite_output_dir true."
        told = f"Interrupted while evaluating: {folder} holds the trained {what}, but no metrics.json."
        raise Interrupted.by(end, told, then) from None


def report_contradictions(sentences: Sequence[str], *, strict: bool) -> None:
    """Print contradictions between rows as warnings; with `strict`, raise ValueError instead."""
    if strict and sentences:
        raise ValueError(f"{' '.join(sentences)} Fix the rows, or leave `strict` out.")
    for sentence in sentences:
        print(f"Warning: {sentence} `--strict true` refuses such rows.", file=sys.stderr)


def hide_loading_bars() -> None:
    """Hide transformers' progress bars over weights, and its load report if only a new head is missing."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the load report of a token classification model that lacks only its head, which training creates."""
    message = record.getMessage()
    if "ForTokenClassification LOAD REPORT" not in message:
        return True
    rows = _REPORT_ROW.findall(message)
    missing = [weight for weight, status in rows if status == "MISSING"]
    # Weights of another head may also be left over; leftover layers mean that the body was truncated.
    harmless = all(
        status == "MISSING" or (status == "UNEXPECTED" and not _OF_A_LAYER.search(weight)) for weight, status in rows
    )
    return not (missing and harmless and all(weight.startswith(_TOKEN_HEADS) for weight in missing))


def load_reward_model(
    path: str, batch_size: int = 32, published: str | None = None, *, keep: Path | None = None
) -> Any:
    """A `StepRewardModel`, without progress bars; with `keep`, its scores are stored in that file."""
    from fractal_rm.evaluation.kept_scores import KeptScores
    from fractal_rm.reward_model import StepRewardModel

    hide_loading_bars()
    model = StepRewardModel.from_pretrained(path, batch_size=batch_size, published=published)
    return model if keep is None else KeptScores(model, keep, path)


def kept_beside(output: str) -> Path | None:
    """The file that stores a command's scores until its output is written; None for a device or a pipe."""
    return Path(f"{output}.part") if Path(output).is_file() or not Path(output).exists() else None


def to_json(values: Any) -> str:
    """Indented JSON; NaN and infinite numbers, which JSON cannot represent, become null."""
    from fractal_rm.evaluation.results import plain

    return json.dumps(plain(values, "metrics"), indent=2, ensure_ascii=False) + "\n"


def print_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table with a column for each split."""
    from fractal_rm.hf.cards import counted

    numbers = [
        {name: x for name, x in counted(values).items() if isinstance(x, int | float)} for values in metrics.values()
    ]
    names = dict.fromkeys(name for values in numbers for name in values)
    print_table(metrics, {name: [number_cell(values.get(name)) for values in numbers] for name in names})


def print_table(columns: Iterable[str], rows: Mapping[str, Iterable[str]], *, of: str = "metric") -> None:
    """Print a table: names of the columns, cells by line, and the heading `of` of the lines."""
    table, console = Table(), Console()
    # Unbroken if there is room, otherwise folded, not cut: names with the same beginning stay distinguishable.
    short = max(map(len, rows), default=0) <= console.width // 3
    table.add_column(of, overflow="fold", no_wrap=short)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table, markup=False)


def number_cell(value: float | None) -> str:
    """A number as tables show it; a dash if it is unknown."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
