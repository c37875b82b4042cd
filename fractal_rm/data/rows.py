"""Rows of JSON Lines files; only the start of each line is kept in memory.

A row is parsed when it is accessed, so training data may be larger than memory, and a limit never reads the rows after
it.
"""

import gzip
import hashlib
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, overload

import numpy as np

from fractal_rm.files import parse_json

# Files of JSON, and how to write others that are packed.
LINES_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_PACKED = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz")
# Bytes of a row. No model reads a longer one; to tokenize it takes minutes and gigabytes.
LONGEST_ROW = 2**24
# Bytes of a file that is parsed whole. Parsing takes about ten times its size in memory.
_LONGEST_FILE = 2**29
# Bytes that are searched for line ends at a time.
_CHUNK = 2**20


class SupportsReadline(Protocol):
    """A file, also a packed one."""

    def readline(self, size: int, /) -> bytes: ...


def has_ending(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a file has one of these endings, in small letters or capitals."""
    return path.name.lower().endswith(endings)


def is_gzipped(path: Path) -> bool:
    """Whether a file is gzipped, by its ending."""
    return has_ending(path, (".gz",))


def check_ending(path: Path, endings: tuple[str, ...]) -> None:
    """Raise ValueError unless a file has one of these endings."""
    if has_ending(path, endings):
        return
    if has_ending(path, _PACKED):
        raise ValueError(f"{path} has an unknown ending; unpack the file, or pack it with gzip (.gz).")
    raise ValueError(f"{path} has an unknown ending; give a file that ends in one of {', '.join(endings)}.")


class JsonLines(Sequence[dict[str, Any]]):
    """Rows of a file with a JSON object on each line.

    Args:
        file: The lines; they must not change while the rows are in use.
        path: Name of the file in messages.
        limit: Most rows, the first ones. None: all of them.

    Raises:
        TypeError: When a row is accessed that is not an object.
        ValueError: If there are no rows; when a row is accessed that is blank, too long, or not JSON in UTF-8.
    """

    def __init__(self, file: IO[bytes], path: Path, limit: int | None = None) -> None:
        self._file, self._path = file, path
        weakref.finalize(self, file.close)
        self._starts = _line_starts(file, limit)
        while len(self) and not self._line(len(self) - 1).strip():
            self._starts = self._starts[:-1]  # blank lines at the end
        check_rows(self, path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        places = range(len(self))[index]  # raises IndexError
        return [self[place] for place in places] if isinstance(places, range) else self._parsed(places)

    def _parsed(self, place: int) -> dict[str, Any]:
        return parse_line(self._line(place), self._path, place + 1)

    def _line(self, place: int) -> bytes:
        start, end = self._starts[place : place + 2].tolist()
        size = min(end - start, LONGEST_ROW + 1)  # as much as shows that the line is too long
        return os.pread(self._file.fileno(), size, start)  # no position: processes share the open file

    def fingerprint(self) -> str:
        """A short name for the content."""
        digest, end = hashlib.blake2b(digest_size=8), int(self._starts[-1])
        for start in range(0, end, _CHUNK):
            digest.update(os.pread(self._file.fileno(), min(_CHUNK, end - start), start))
        return digest.hexdigest()


def open_json_lines(path: Path, limit: int | None = None) -> JsonLines:
    """Rows of a `.jsonl` file; of a gzipped one as many lines are unpacked to a temporary file as are needed.

    Raises:
        ValueError: If a gzipped file is damaged, or for a reason of [`JsonLines`].
    """
    if not is_gzipped(path):
        return JsonLines(path.open("rb"), path, limit)
    with complete_gzip(path), gzip.open(path, "rb") as packed:
        return JsonLines(spooled(islice(bounded_lines(packed, path), limit)), path, limit)


def stream_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `.jsonl` file, gzipped or not, read one by one as they are consumed.

    Raises:
        TypeError: If a row is not an object.
        ValueError: If a line cannot be read, or is blank and not at the end.
    """
    with complete_gzip(path), (gzip.open if is_gzipped(path) else open)(path, "rb") as file:
        blank = None
        for row, line in enumerate(bounded_lines(file, path), 1):
            if not line.strip():
                blank = blank or (line, row)  # an error only if another row follows
            elif blank:
                parse_line(blank[0], path, blank[1])
            else:
                yield parse_line(line, path, row)


def bounded_lines(file: SupportsReadline, path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Lines of a file that is open in binary mode, without holding more than the longest allowed one.

    A gzipped file of a few kilobytes can hold a line of gigabytes.

    Raises:
        ValueError: If a line is too long.
    """
    row = 0
    while line := file.readline(LONGEST_ROW + 1):
        row += 1
        _check_length(line, path, row)
        yield line


def read_whole(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in `.gz`, without holding more than the longest allowed one.

    Raises:
        ValueError: If it is too long, or a gzipped file that is damaged.
    """
    with complete_gzip(path), (gzip.open if is_gzipped(path) else open)(path, "rb") as file:
        parts, size = [], 0
        while part := file.read(_CHUNK):  # not all at once: Python would reserve memory for the whole limit
            parts.append(part)
            size += len(part)
            if size > _LONGEST_FILE:
                raise ValueError(
                    f"{path} has more than {_LONGEST_FILE:,} bytes, and a list is parsed as a whole; write a .jsonl "
                    "file, with an object on each line."
                )
    return b"".join(parts)


def _check_length(line: bytes, path: str | os.PathLike[str], row: int) -> None:
    if len(line) > LONGEST_ROW:
        raise ValueError(f"{path}, row {row}: the line has more than {LONGEST_ROW:,} bytes; shorten or drop the row.")


def parse_line(line: bytes, path: Path, row: int) -> dict[str, Any]:
    """The object that a line of a file holds.

    Raises:
        TypeError: If it is not an object.
        ValueError: If it is blank, too long, or not JSON in UTF-8.
    """
    _check_length(line, path, row)
    if not line.strip():
        raise ValueError(f"{path}, row {row}: the line is blank; delete it.")
    if row == 1 and line.strip() in (b"[", b"{"):
        told = "the line begins a list or an object that goes on; write an object on each line, or name the file .json."
        raise ValueError(f"{path}, row 1: {told}")
    record = parse_json(line, f"{path}, row {row}: the line")
    check_object(record, path, row)
    return record


def check_object(record: Any, path: Path, row: int) -> None:
    """Raise TypeError unless a row is an object."""
    if not isinstance(record, dict):
        raise TypeError(f"{path}, row {row}: the row is {type(record).__name__}; make it a JSON object.")


def check_rows(rows: Sequence[Any], path: Path) -> None:
    """Raise ValueError if a file has no rows."""
    if not len(rows):
        raise ValueError(f"{path} is empty; give a file with at least one row.")


@contextmanager
def complete_gzip(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged gzip file into a sentence."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path} is not a complete gzip file; write or download it again.") from None


def spooled(lines: Iterable[bytes]) -> IO[bytes]:
    """A temporary file with these lines, gone when it is closed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows
    try:
        file.writelines(lines)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _line_starts(file: IO[bytes], limit: int | None) -> np.ndarray:
    """Where lines start, and where the last one ends (rows + 1,); with a limit, those of the first lines."""
    parts, found, position = [np.zeros(1, dtype=np.int64)], 0, 0
    while (limit is None or found < limit) and (chunk := os.pread(file.fileno(), _CHUNK, position)):
        ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (position + 1)
        parts.append(ends[: None if limit is None else limit - found])
        found, position = found + len(ends), position + len(chunk)
    starts = np.concatenate(parts)
    unfinished = position > starts[-1] and (limit is None or found < limit)
    return np.append(starts, position) if unfinished else starts
