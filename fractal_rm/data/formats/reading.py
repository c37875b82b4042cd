"""Shared parts of the readers of official files: rows from a file or a list, and errors that name file and row.

Every reader takes the data (a file or rows) and `source`, the name of the data in messages. A value of the wrong type
raises TypeError.
"""

import csv
import gzip
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fractal_rm.data.bag import Bag
from fractal_rm.data.readers import naming, open_jsonl
from fractal_rm.data.rows import (
    LINES_ENDINGS,
    LONGEST_ROW,
    complete_gzip,
    has_ending,
    is_gzipped,
    read_whole,
    stream_json_lines,
)
from fractal_rm.data.sentences import Span
from fractal_rm.files import parse_json

PathLike = str | os.PathLike[str]
Data = PathLike | Iterable[Mapping[str, Any]]

_LFS_POINTER = b"version https://git-lfs.github.com/"


def stream_rows(data: Data, source: str | None, *, key: str | None = None) -> tuple[Iterable[Mapping[str, Any]], str]:
    """Rows of a data set, read lazily, and its name in error messages.

    Args:
        data: A `.jsonl` or `.json` file (gzipped or not), or the rows themselves.
        source: The name. None: the path of the file, or "data" for rows.
        key: Key of the list of rows, if a `.json` file holds one object around the list.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the file does not hold rows.
        ValueError: If a file cannot be read.

    Example:
        >>> stream_rows([{"question": "1+1?"}], None)
        ([{'question': '1+1?'}], 'data')
    """
    if not isinstance(data, str | os.PathLike):
        return data, source or "data"
    path = Path(data)
    source = source or str(path)
    check_file(path)
    if key is not None and has_ending(path, (".json", ".json.gz")):
        return _wrapped_rows(path, key), source
    return stream_json_lines(path) if has_ending(path, LINES_ENDINGS) else open_jsonl(path), source


def check_file(path: Path) -> None:
    """Raise if a path is not a file, or is a Git LFS pointer, which `git clone` without Git LFS leaves in its place.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a Git LFS pointer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path.")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the data; fetch the data with `git lfs pull`.")


def csv_rows(path: Path, delimiter: str = "\t", limit: int | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV or TSV file, gzipped or not, as dictionaries, keyed by the header, each with its row number.

    The header is row 1. Cells are text: a response `2` or `NA` is not converted. Rows are read lazily; with a limit,
    only the first ones are read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8, a row is too long, or does not have as many cells as the header.
    """
    check_file(path)
    csv.field_size_limit(LONGEST_ROW)  # responses may be longer than Python's default limit of 131,072 characters
    kind = "tab-separated" if delimiter == "\t" else "comma-separated"
    try:
        opened: Any = gzip.open if is_gzipped(path) else open
        with complete_gzip(path), opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            lines = _RowLines(file, path)
            rows = csv.DictReader(lines, delimiter=delimiter)
            _check_header(list(rows.fieldnames or ()), path, kind)
            for number, row in enumerate(islice(rows, limit), 2):
                lines.row, lines.length = number + 1, 0
                if None in row or None in row.values():
                    told = "the row does not have as many cells as the header; quote its cells, or correct it."
                    raise ValueError(f"{path}, row {number}: {told}")
                yield number, row
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is not a {kind} file in UTF-8; write or download it again.") from None


class _RowLines:
    """Lines of a CSV file, of which one row may take several: quoted cells hold line breaks. Bounds the row's length.

    Attributes:
        row: Number of the row that the lines belong to.
        length: Its characters so far.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self.row, self.length = 1, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(LONGEST_ROW + 1):
            self.length += len(line)
            if self.length > LONGEST_ROW:
                told = f"the row has more than {LONGEST_ROW:,} characters; shorten or drop it, or close its quotes."
                raise ValueError(f"{self._path}, row {self.row}: {told}")
            yield line


def _check_header(names: Sequence[str], path: Path, kind: str) -> None:
    """Raise ValueError if a name comes twice, or if another separator makes all names one cell."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}, row 1: the header has the name {twice!r} twice; rename one column.")
    if len(names) == 1 and any(sign in names[0] for sign in ",;|\t"):
        told = f"the header is one cell, {names[0]!r}; give a {kind} file (.csv has commas, .tsv tabs)."
        raise ValueError(f"{path}, row 1: {told}")


def _wrapped_rows(path: Path, key: str | None) -> list[Mapping[str, Any]]:
    found = parse_json(read_whole(path), str(path))
    rows = found.get(key) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise TypeError(f"{path} does not hold a list under {key!r}; give the official file.")
    return rows


def read_each(
    data: Data,
    source: str | None,
    make: Callable[[Mapping[str, Any], int], list[Bag]],
    *,
    left_out: str | None = None,
    limit: int | None = None,
) -> list[Bag]:
    """Bags of all rows, in order: the last call of most readers of official files.

    Args:
        data: A file, or rows, as in [`stream_rows`].
        source: Name of the data in error messages, as in [`stream_rows`].
        make: Makes bags from a row and its number, counted from 1. An empty list leaves the row out.
        left_out: Why rows give no bag, as part of a warning. None: rows without a bag are normal.
        limit: Return at most this many bags and read no further. A preference gives both of its bags or none.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a value has the wrong type.
        ValueError: If a value is missing or wrong, there are no rows, or no row gives a bag.

    Warns:
        UserWarning: If rows are left out and `left_out` says why.
    """
    rows, source = stream_rows(data, source)
    bags: list[Bag] = []
    missing, number = [], 0
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            if not isinstance(row, Mapping):
                raise TypeError(f"the row is {type(row).__name__}; make it an object with named columns.")
            new = make(row, number)
        bags += new
        missing += [] if new else [number]
        if limit is not None and len(bags) > limit:  # one bag more shows whether a preference is cut in two
            break
    if number == 0:
        raise ValueError(f"{source} has no rows; give at least one.")
    if not bags:
        raise ValueError(f"None of the {number} rows of {source} can be used; check that it is the official file.")
    if missing and left_out:
        warnings.warn(
            f"{source}: {len(missing)} of {number} rows {left_out} (first: row {missing[0]}); they are left out.",
            stacklevel=3,
        )
    return first_bags(bags, limit)


def first_bags(bags: list[Bag], limit: int | None) -> list[Bag]:
    """The first bags. A preference keeps both of its bags or none."""
    if limit is None or limit >= len(bags):
        return bags
    pair = bags[limit].pair_id
    return bags[: limit - (pair is not None and pair == bags[limit - 1].pair_id)]


def column(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], *, within: str = "") -> Any:
    """A column of a row, checked; arrays become lists.

    Args:
        row: The row, or an object in it.
        name: Name of the column.
        kind: Type that the value must have.
        within: Path of the object in the row, for error messages: `"question."`.

    Raises:
        TypeError: If the value has another type, or the row is not an object.
        ValueError: If the column is missing or null.

    Example:
        >>> column({"label": -1}, "label", int)
        -1
    """
    if not isinstance(row, Mapping):
        where = f"'{within.rstrip('.')}' holds" if within else "the row is"
        raise TypeError(f"{where} {type(row).__name__} instead of an object; give the official columns.")
    value = row.get(name)
    if value is None:
        found = ", ".join(map(repr, row)) or "no columns"
        raise ValueError(f"column '{within}{name}' is missing or null (found: {found}); give the official columns.")
    if hasattr(value, "tolist"):  # arrays, where rows come from Parquet files
        value = value.tolist()
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"column '{within}{name}' is {type(value).__name__}, not {names}; give the official columns.")
    return value


def texts(row: Mapping[str, Any], name: str) -> list[str]:
    """A column that is a list of texts, checked as in [`column`].

    Example:
        >>> texts({"context": ["a", "b"]}, "context")
        ['a', 'b']
    """
    values = column(row, name, list)
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            found = type(value).__name__
            raise TypeError(f"entry {number} of '{name}' is {found}, not text; give the official columns.")
    return values


def touches(step: Span, ranges: Sequence[Span]) -> bool:
    """Whether a step overlaps one of the ranges.

    Example:
        >>> touches((0, 4), [(4, 9)]), touches((0, 5), [(4, 9)])
        (False, True)
    """
    return any(start < step[1] and end > step[0] for start, end in ranges)
