"""Rows of Parquet, CSV and Arrow files and of folders saved by `datasets`, in the form of rows of a JSON file."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fractal_rm.data.formats.reading import check_file, csv_rows
from fractal_rm.data.rows import LONGEST_ROW, JsonLines, check_rows, has_ending, spooled
from fractal_rm.data.shapes import LISTS
from fractal_rm.errors import reason
from fractal_rm.files import parse_json

# Builder of `datasets.load_dataset` by file ending, and separator of cells by file ending.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}
TABLE_ENDINGS = (*_BUILDERS, *_DELIMITERS)
# Rows whose length is checked together.
_AT_A_TIME = 1000


def open_table(path: Path, limit: int | None = None) -> Sequence[dict[str, Any]]:
    """Open the rows of a table ([`is_table`]): all of them, or the first ones.

    Cells of CSV files are text; lists and chats are written as JSON. Rows stay on disk: `datasets` maps them into
    memory, and rows of a CSV file go to a temporary file.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it cannot be read, has no rows or one that is too long, or a folder holds several splits.
    """
    delimiter = next((sign for ending, sign in _DELIMITERS.items() if has_ending(path, (ending,))), None)
    if delimiter is None:
        rows = _from_datasets(path, limit)
        check_rows(rows, path)
        _check_lengths(rows, path)
        return rows
    cells = csv_rows(path, delimiter, limit)
    found = ({name: _cell(name, text) for name, text in row.items()} for _, row in cells)
    return JsonLines(spooled(json.dumps(row).encode() + b"\n" for row in found), path)


class MappedRows(Sequence[dict[str, Any]]):
    """Rows of a memory-mapped data set.

    Args:
        dataset: The data set.
        folder: Temporary folder of its files, deleted together with this object.
    """

    def __init__(self, dataset: Any, folder: str | None = None) -> None:
        self.dataset = dataset
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return self.dataset.select(places).to_list() if isinstance(places, range) else self.dataset[places]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)


def _from_datasets(path: Path, limit: int | None) -> Sequence[dict[str, Any]]:
    import datasets
    import pyarrow.parquet
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if not path.is_dir():
        check_file(path)
    hidden, cache = datasets.are_progress_bars_disabled(), None
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            found = load_from_disk(str(path))
        else:
            if path.suffix.lower() == ".parquet":
                groups = pyarrow.parquet.read_metadata(path)
                if not groups.num_rows:
                    return []
                for number in range(groups.num_row_groups):  # before it is unpacked
                    group = groups.row_group(number)
                    if group.total_byte_size > LONGEST_ROW * group.num_rows:
                        raise _TooLongError
            named: Any = {"path": _BUILDERS[path.suffix.lower()], "data_files": str(path), "split": "train"}
            if limit is not None:  # reads only these rows
                return list(load_dataset(**named, streaming=True, trust_remote_code=False).take(limit))
            cache = tempfile.mkdtemp()
            found = load_dataset(**named, cache_dir=cache, trust_remote_code=False)
    except _TooLongError:
        raise _too_long(path) from None
    except (OSError, ValueError, DatasetsError) as error:
        if cache is not None:
            shutil.rmtree(cache, ignore_errors=True)
        cause = reason(error.__cause__ or error)  # `datasets` wraps the error of the file
        raise ValueError(f"{path} cannot be read ({cause}); write or download it again.") from None
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    if isinstance(found, DatasetDict):
        raise ValueError(f"{path} holds the splits {', '.join(map(str, found))}; give the folder of one of them.")
    rows: Any = found if limit is None or limit >= len(found) else found.select(range(limit))  # type: ignore[union-attr]
    return MappedRows(rows, cache)


class _TooLongError(Exception):
    """A row is longer than any model reads."""


def _too_long(path: Path, row: int | None = None) -> ValueError:
    where = path if row is None else f"{path}, row {row}"
    return ValueError(f"{where}: a row has more than {LONGEST_ROW:,} bytes; shorten or drop it.")


def _check_lengths(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Raise ValueError if a row is too long; only offsets of memory-mapped rows are read."""
    if not isinstance(rows, MappedRows):
        for number, row in enumerate(rows, 1):
            if _length(row) > LONGEST_ROW:
                raise _too_long(path, number)
        return
    number = 0
    for batch in rows.dataset.with_format("arrow").iter(_AT_A_TIME):
        if batch.nbytes > LONGEST_ROW:
            for place in range(len(batch)):
                if batch.slice(place, 1).nbytes > LONGEST_ROW:
                    raise _too_long(path, number + place + 1)
        number += len(batch)


def _length(value: Any) -> int:
    """Characters in a row, or a part of one."""
    if isinstance(value, str | bytes):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_length, inner))


def _cell(name: str, text: str) -> Any:
    """Value of a CSV cell: None if empty, a list or a chat if it holds one as JSON, and otherwise the text."""
    if not text:
        return None
    if text.startswith("["):
        with suppress(ValueError):
            found = parse_json(text.encode(), "the cell")
            if name in LISTS or all(isinstance(one, dict) for one in found):
                return found
    return text


def is_table(path: Path) -> bool:
    """Whether [`open_table`] reads a path: by its ending, or because it is a folder that `datasets` saved."""
    return has_ending(path, TABLE_ENDINGS) or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
