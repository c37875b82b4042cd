"""What commands check before any work starts, and how they write what they found.

Libraries that take seconds to import are imported inside functions: `--help` and a wrong path need none of them.
"""

import contextlib
import importlib.util
import json
import logging
import math
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fractal_rm.scorers.folder import check_model_folder

# Recipes that start from the models of the quickstart say how to get them.
_MAKE_QUICKSTART = "Run `make quickstart` first: it makes this folder."
# A row of transformers' table of weights that a folder lacks or has too many of: the weight and what is wrong with it.
_REPORT_ROW = re.compile(r"^(\S.*?) *\| (?:\x1b\[[\d;]*m)?([A-Z]{4,})\b", re.MULTILINE)
_TOKEN_HEADS = ("classifier.", "score.")
# A weight of a numbered layer, or of several that are shown in one row: no head has one.
_OF_A_LAYER = re.compile(r"\.(\d|\{)")


def check_writable_folder(folder: str | Path) -> None:
    """Raise unless files can be written into a folder; folders made for the test are removed again.

    Raises:
        OSError: Names the folder and what to do.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"The output folder {folder} cannot be written ({reason}). Choose another one.") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not made, or another process has put something into it
                path.rmdir()


def check_writable_files(*paths: str | None) -> None:
    """Raise unless a file can be written at each path; None is passed over."""
    for path in filter(None, paths):
        if Path(path).is_dir():
            raise IsADirectoryError(f"The output {path} is a folder. Give the name of a file.")
        check_writable_folder(Path(path).parent)


def check_matplotlib() -> None:
    """Raise unless plots can be drawn: worth calling before long work that ends with some.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('Plots need matplotlib, which is not installed: pip install "fractal-rm[plots]".')


def check_models(*paths: str | None) -> None:
    """Raise if a path means a local folder that holds no model; hub ids pass, None is passed over.

    Raises:
        FileNotFoundError: If the folder is missing; for a folder of the quickstart the message says how to make it.
        ValueError: If the folder holds no model.
    """
    for path in paths:
        if path is None or _is_hub_id(path):
            continue
        folder = Path(path)
        if not folder.is_dir():
            advice = _MAKE_QUICKSTART if "quickstart" in folder.parts else "Check the path, or give a hub id."
            raise FileNotFoundError(f"There is no model folder {path}. {advice}")
        check_model_folder(path, "Give a model's folder or hub id.")


def _is_hub_id(path: str) -> bool:
    """Whether a path is `name` or `owner/name`, and nothing here."""
    place = Path(path)
    if place.exists() or place.is_absolute() or len(place.parts) != 1 + ("/" in path):
        return False
    first = place.parts[0]
    return first not in (".", "..", "~", "runs") and not (len(place.parts) > 1 and Path(first).is_dir())


def checkpoint_to_resume(config: Any) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: a path, or with `true` the last complete one, if any.

    Raises:
        FileNotFoundError: If a path is given and missing.
        ValueError: If its checkpoint is incomplete.
    """
    from fractal_rm.hf.checkpoints import find_checkpoint, last_checkpoint

    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", "no"):
        return None
    if str(wanted).lower() in ("true", "yes"):
        return last_checkpoint(config.output_dir)
    if not Path(wanted).is_dir():
        raise FileNotFoundError(f"There is no checkpoint {wanted}. Give `resume_from_checkpoint` a folder, or `true`.")
    return find_checkpoint(wanted, config.output_dir)


def report_contradictions(sentences: Sequence[str], *, strict: bool) -> None:
    """Print what rows say against each other as warnings.

    Raises:
        ValueError: With `strict`, if there is anything.
    """
    if strict and sentences:
        raise ValueError(f"{' '.join(sentences)} Mend the rows, or leave `strict` out.")
    for sentence in sentences:
        print(f"Warning: {sentence} `--strict true` refuses such rows.", file=sys.stderr)


def hide_loading_bars() -> None:
    """Hide transformers' bars over weights, and its table of weights where only a new head is missing.

    What remains on standard error matters.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the table of a token classification model that lacks only its head, which training makes."""
    message = record.getMessage()
    if "ForTokenClassification LOAD REPORT" not in message:
        return True
    rows = _REPORT_ROW.findall(message)
    missing = [weight for weight, status in rows if status == "MISSING"]
    # Weights of another head may be left over too; left-over layers mean that the body was cut short.
    harmless = all(
        status == "MISSING" or (status == "UNEXPECTED" and not _OF_A_LAYER.search(weight)) for weight, status in rows
    )
    return not (missing and harmless and all(weight.startswith(_TOKEN_HEADS) for weight in missing))


def load_reward_model(path: str, batch_size: int = 32, published: str | None = None) -> Any:
    """A `StepRewardModel`, without bars."""
    from fractal_rm.reward_model import StepRewardModel

    hide_loading_bars()
    return StepRewardModel.from_pretrained(path, batch_size=batch_size, published=published)


def to_json(values: Any) -> str:
    """Indented JSON; NaN and infinite numbers, which JSON cannot hold, become null."""
    from fractal_rm.evaluation.results import plain

    return json.dumps(plain(values, "metrics"), indent=2, ensure_ascii=False) + "\n"


def print_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table with a column for each split."""
    numbers = [{name: x for name, x in values.items() if isinstance(x, int | float)} for values in metrics.values()]
    names = dict.fromkeys(name for values in numbers for name in values)
    print_table(metrics, {name: [number_cell(values.get(name)) for values in numbers] for name in names})


def print_table(columns: Iterable[str], rows: Mapping[str, Iterable[str]], *, of: str = "metric") -> None:
    """Print a table: what the columns are of, the cells by the name of their line, and what the lines are."""
    table = Table()
    table.add_column(of)
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table, markup=False)


def number_cell(value: float | None) -> str:
    """A number as a table shows it; a dash for one that is not known."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
