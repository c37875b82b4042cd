"""Rows in, bags out: JSON files, TRL's data set formats and lists of steps.

A bad row gets one sentence, which names the source and the row (counted from 1) and says what to do.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.prompts import (
    REASONING_KEYS,
    check_not_blank,
    check_same_kind,
    check_text,
    is_messages,
    read_completion,
)
from fractal_rm.data.rows import (
    LINES_ENDINGS,
    check_ending,
    check_object,
    check_rows,
    has_ending,
    open_json_lines,
    read_whole,
)
from fractal_rm.data.segmentation import Segmentation, join_steps, locate_steps
from fractal_rm.data.shapes import Columns, ratings_of, standard_row
from fractal_rm.files import parse_json

# TRL and transformers mark an unknown label with this number.
UNKNOWN_LABEL = -100

JSON_ENDINGS = (*LINES_ENDINGS, ".json", ".json.gz")


def open_jsonl(path: str | os.PathLike[str], limit: int | None = None) -> Sequence[dict[str, Any]]:
    """Open the rows of a JSON file, as [`read_jsonl`] does, but parse the rows of a `.jsonl` file only when accessed.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a row is not an object. For a `.jsonl` file: when the row is accessed.
        ValueError: If the file is empty, is not UTF-8, is not JSON, is too long, or has another ending. For a bad row
            of a `.jsonl` file: when the row is accessed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path.")
    check_ending(path, JSON_ENDINGS)
    if has_ending(path, LINES_ENDINGS):
        return open_json_lines(path, limit)
    content = read_whole(path)
    first, _, more = content.strip().partition(b"\n")
    if more and first.rstrip().startswith(b"{") and first.rstrip().endswith(b"}"):
        raise ValueError(f"{path} has an object on each line; name it .jsonl.")
    rows = parse_json(content, f"{path}: the file") if content.strip() else []
    if not isinstance(rows, list):
        raise TypeError(f"{path} does not hold a list; give a list of objects, or name it .jsonl if each line is one.")
    check_rows(rows, path)
    for row, record in enumerate(rows[:limit], 1):
        check_object(record, path, row)
    return rows[:limit]


def read_jsonl(path: str | os.PathLike[str], limit: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a JSON file.

    Args:
        path: A `.jsonl` or `.ndjson` file with an object on each line, or a `.json` file with one list of objects. All
            may be gzipped (`.gz`).
        limit: Read at most this many rows, from the start of the file. None: all of them.

    Returns:
        The rows. Row `n` of an error message is line `n` of a `.jsonl` file and item `n` of a `.json` file.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a row is not an object.
        ValueError: If the file is empty, is not UTF-8, is not JSON, is too long, or has another ending.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"prompt": "1+1?", "completion": "2", "label": true}')
        >>> read_jsonl(path)
        [{'prompt': '1+1?', 'completion': '2', 'label': True}]
    """
    return list(open_jsonl(path, limit))


@contextmanager
def naming(source: str, row: int) -> Iterator[None]:
    """Prefix an error message with the source and the row."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{source}, row {row}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{source}, row {row}: {error}") from None


def read_bags(
    records: Iterable[Mapping[str, Any]],
    segmentation: Segmentation,
    *,
    source: str = "data",
    columns: Columns | None = None,
    require_label: bool = True,
    num_grades: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> list[Bag]:
    """Make bags from the rows of a data set; see [`read_row`] for the formats.

    Args:
        records: The rows: a list, a `datasets.Dataset`, or what [`read_jsonl`] returns.
        segmentation: How to cut a response into steps, if the row does not.
        source: Name of the data in error messages, such as the file.
        columns: Names of columns, and the scale of ratings.
        require_label: Refuse a row without a label. If False, its bag has the label None.
        num_grades: Number of grades, for ordinal labels.
        on_bad_row: `stop` raises at the first row that cannot be read; `skip` leaves such rows out and counts them.

    Returns:
        One bag for each row, and two for a preference: the chosen response first.

    Warns:
        UserWarning: If rows were skipped: how many, and why the first one was.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If there are no rows, a column is missing, a value is out of range, or some prompts are texts and
            others are chats.

    Example:
        >>> row = {"prompt": "2+3*4?", "completion": "3*4=12.\\n2+12=14.", "label": True}
        >>> [bag.steps for bag in read_bags([row], Segmentation("lines"))]
        [['3*4=12.', '2+12=14.']]
    """
    bags: list[Bag] = []
    bad: list[str] = []
    total = 0
    for row, record in enumerate(records, 1):
        total = row
        try:
            new = read_row(
                record,
                segmentation,
                source=source,
                row=row,
                columns=columns,
                require_label=require_label,
                num_grades=num_grades,
            )
            with naming(source, row):
                check_same_kind(new[0].prompt, (bags or new)[0].prompt)
        except (TypeError, ValueError) as error:
            if on_bad_row == "stop":
                raise
            bad.append(str(error))
            continue
        bags += new
    if not bags:
        raise ValueError(bad[0] if bad else f"{source} has no rows; give at least one.")
    if bad:
        warnings.warn(f"{len(bad)} of {total} rows of {source} are left out. First: {bad[0]}", stacklevel=2)
    return bags


def read_row(
    record: Mapping[str, Any],
    segmentation: Segmentation,
    *,
    source: str = "data",
    row: int = 1,
    columns: Columns | None = None,
    require_label: bool = True,
    num_grades: int | None = None,
) -> list[Bag]:
    """Make bags from one row in one of the formats below. A column that is null counts as missing.

    - Preference: `chosen` and `rejected`, each a text, a chat that begins with the assistant, or a list of steps. (If
      the row has `steps` too, they count only if its `aggregation` is `"native"` or `"preference"`.)
    - Steps: `steps`, `label`, and optionally `step_labels` and `teacher_scores`. The response is the column `response`
      or `completion` if there is one, and otherwise the steps joined by line breaks.
    - Stepwise supervision: `completions` (a list of steps) and `labels` (one for each step). A column `label` is the
      response's label. Without it, the response's label is the minimum of its step labels, if that is known.
    - Unpaired preference: `completion` or `response` (a text, or a chat that begins with the assistant) and `label`.

    Other shapes are converted to these first ([`~fractal_rm.data.shapes.standard_row`]): preferences that contain their
    prompt, `messages`, `question` and `answer`, step labels as turns of a conversation, and columns with other names.

    In a chat of several messages, steps are cut from the assistant's turns only; the other turns are context.

    Labels are booleans or numbers in [0, 1], and are never rounded. A step label may also be null or -100: unknown.

    Args:
        record: The row.
        segmentation: As in [`read_bags`], like all other arguments except `row`.
        row: Number of the row in error messages, from 1.

    Returns:
        One bag, or for a preference two: the chosen response and the rejected one.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a column is missing or a value is out of range.
    """
    with naming(source, row):
        if not isinstance(record, Mapping):
            raise TypeError(f"the row is {type(record).__name__}; make it an object with named columns.")
        found = standard_row(record, columns)
        prompt = _prompt(_column(found, "prompt", record))
        name = str(found["id"]) if "id" in found else None
        compared = "steps" not in found or found.get("aggregation") in ("native", "preference")
        if compared and ("chosen" in found or "rejected" in found):
            return [
                Bag(
                    prompt,
                    *_answer(_column(found, side, record), side, segmentation),
                    label=label,
                    id=name and f"{name}-{side}",
                    pair_id=f"{source}:{row}",
                )
                for side, label in (("chosen", 1.0), ("rejected", 0.0))
            ]
        response, spans, step_labels = _steps(found, record, segmentation)
        teacher = _list(found["teacher_scores"], "teacher_scores") if "teacher_scores" in found else None
        bag = Bag(
            prompt,
            response,
            spans,
            found.get("label"),
            step_labels,
            teacher_scores=tuple(teacher) if teacher is not None else None,
            num_grades=num_grades,
            id=name,
        )
        if bag.label is None and "completions" in found and bag.step_labels is not None:
            bag = replace(bag, label=_minimum(bag.step_labels))
            if bag.label is None and require_label:
                raise ValueError("some step labels are unknown, so the label cannot be derived; add 'label'.")
        if bag.label is None and require_label:
            _column(found, "labels" if "completions" in found else "label", record)
        return [bag]


def _column(columns: Mapping[str, Any], name: str, record: Mapping[str, Any]) -> Any:
    """Return a column, or raise a sentence if it is missing or null."""
    if name in record and name not in columns:
        raise ValueError(f"column {name!r} is null; fill it in or drop the row.")
    if name not in columns:
        found = ", ".join(map(repr, record)) or "no columns"
        hint = f", or name the column with --{name}_column" if name in ("prompt", "label") else ""
        if name == "label" and (ratings := ratings_of(record)):
            hint += f" and its lowest and highest value with --label_scale (numbers: {', '.join(map(repr, ratings))})"
        raise ValueError(f"column {name!r} is missing (found: {found}); add it or rename one{hint}.")
    return columns[name]


def _prompt(value: Any) -> Any:
    """Drop the keys of a chat that `datasets` filled with None because only other rows have them.

    Null content stays: a message of tool calls alone has it, and that is not the same as a missing key.

    Raises:
        ValueError: If the prompt is blank.
    """
    check_not_blank(value)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return value
    return [{key: text for key, text in message.items() if text is not None or key == "content"} for message in value]


def _steps(
    columns: Mapping[str, Any], record: Mapping[str, Any], segmentation: Segmentation
) -> tuple[str, tuple[Span, ...], Any]:
    """Response, step spans and step labels of a row that is not a preference."""
    names = [name for name in ("completion", "response") if name in columns]
    if len(names) > 1:
        raise ValueError("there are both a 'completion' and a 'response'; drop one of the columns.")
    if "steps" in columns and "completions" in columns:
        raise ValueError("there are both 'steps' and 'completions'; drop one of the columns.")
    listed = next((name for name in ("steps", "completions") if name in columns), None)
    if listed is not None and is_messages(columns[listed]) and "role" not in columns[listed][0]:
        raise TypeError(
            f"{listed!r} holds objects, not the texts of steps; make it a list of texts, or give each response a "
            "separate row."
        )
    if "steps" in columns and names:
        response = _text(columns[names[0]], names[0])
        spans = tuple(locate_steps(response, _list(columns["steps"], "steps")))
    elif listed is not None:
        response, spans = _answer(_list(columns[listed], listed), listed, segmentation)
    elif names:
        texts = columns[names[0]]
        if isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts):
            raise TypeError(
                f"{names[0]!r} is a list of texts: if they are the steps of one response, name the column 'steps'; if "
                "they are several responses, give each a separate row."
            )
        response, spans = _answer(texts, names[0], segmentation)
    else:
        raise ValueError(
            f"there is no response (found: {', '.join(map(repr, record))}); add a column 'completion' or 'response', "
            "'steps', 'completions' and 'labels', 'messages', or 'chosen' and 'rejected', or name them with "
            "--response_column, or --chosen_column and --rejected_column."
        )
    labels_name = "labels" if "completions" in columns else "step_labels"
    if labels_name not in columns:
        return response, spans, None
    labels = _list(columns[labels_name], labels_name)
    return response, spans, tuple(None if label == UNKNOWN_LABEL else label for label in labels)


def _answer(value: Any, what: str, segmentation: Segmentation) -> tuple[str, tuple[Span, ...]]:
    """Response and step spans of a text, a chat, or a list of steps."""
    if isinstance(value, list) and value and not is_messages(value):
        response, spans = join_steps(value, segmentation.joint)
        return response, tuple(spans)
    response = _text(value, what)
    return response, tuple(segmentation(response))


def _text(value: Any, what: str) -> str:
    """The text of a response: itself, the content of a chat's only message, or a conversation."""
    text: Any = value
    if not is_messages(value):
        if isinstance(value, list) and not value:
            raise ValueError(f"{what!r} is a chat of 0 messages; add the message of the assistant, or drop the row.")
        check_text(value, repr(what))
        return text
    for message in value:
        if message.get("role") == "assistant":
            _check_message(message, what)
    return read_completion(value)


def _check_message(message: Mapping[str, Any], what: str) -> None:
    """Raise if a response's message is empty, or has reasoning outside its content, which would be lost."""
    thought = next((key for key in REASONING_KEYS if str(message.get(key) or "").strip()), None)
    if thought is not None:
        raise ValueError(
            f"the message of {what!r} has {thought!r}, which is not part of its text; move it into the content, as "
            "the chat template does (<think>...</think>), or remove it."
        )
    if message.get("content") is None and not message.get("tool_calls"):
        raise ValueError(
            f"the content of the message of {what!r} is null, and it has no tool calls; write it or drop it."
        )


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{what!r} is {type(value).__name__}; make it a list with one entry for each step.")
    if not value:
        raise ValueError(f"{what!r} is empty; drop the row or fill it in.")
    return list(value)


def _minimum(step_labels: tuple[float | None, ...]) -> float | None:
    """The smallest step label; None if an unknown one could be smaller."""
    known = [label for label in step_labels if label is not None]
    return min(known) if len(known) == len(step_labels) or 0.0 in known else None
