"""Where data sets lie: a file, a folder with a file for each split, or the Hugging Face hub; and their rows."""

import os
from pathlib import Path
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.index import FORMATS, FormatName
from fractal_rm.data.readers import read_jsonl
from fractal_rm.errors import reason

# The only variable of the environment that commands read.
DATA_DIR_VARIABLE = "FRACTAL_RM_DATA"
_ENDINGS = (".jsonl.gz", ".jsonl", ".json")


def data_folder(data_dir: str | None) -> Path | None:
    """The folder of data sets: as given, or that of the environment, or None.

    Raises:
        NotADirectoryError: If it is named and is not there.
    """
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if named and not Path(named).is_dir():
        origin = "`data_dir`" if data_dir else f"the environment's {DATA_DIR_VARIABLE}"
        raise NotADirectoryError(f"{named}, from {origin}, is no folder. Give the folder that holds the data sets.")
    return Path(named) if named else None


def find_file(name: str, data_dir: str | None) -> Path:
    """A file as named, or the file of that name in the data folder."""
    folder = data_folder(data_dir)
    if folder is not None and not Path(name).exists() and (folder / name).is_file():
        return folder / name
    return Path(name)


def find_split(dataset: str, split: str, data_dir: str | None) -> Path | None:
    """The file of a split of a data set in the data folder, None if there is none."""
    folder = data_folder(data_dir)
    if folder is None:
        return None
    return next((path for end in _ENDINGS if (path := folder / dataset / f"{split}{end}").is_file()), None)


def load_from_hub(name: str, advice: str, /, **arguments: Any) -> Any:
    """What `datasets.load_dataset` loads from the Hugging Face hub with some arguments.

    Raises:
        ValueError: If it cannot be loaded; the sentence says why and gives the advice.
    """
    from datasets import load_dataset

    try:
        return load_dataset(**arguments)
    except (OSError, ValueError) as error:  # not found, offline, another configuration
        raise ValueError(f"{name} cannot be loaded from the hub ({reason(error)}). {advice}") from error


def read_rows(path: Path, dataset_format: FormatName | None, limit: int | None) -> list[Any]:
    """The first rows of a file, or its first bags where a format is named.

    Raises:
        OSError: If the file is not there.
        ValueError: If it cannot be read.
    """
    if dataset_format is None:
        return read_jsonl(path)[:limit]
    bags = FORMATS[dataset_format].read(path)
    if limit is None or limit >= len(bags):
        return bags
    pair = bags[limit].pair_id
    return bags[: limit - (pair is not None and pair == bags[limit - 1].pair_id)]  # both of a preference, or none


def load_published(dataset_format: FormatName, split: str, limit: int | None = None) -> list[Any]:
    """The official rows of a split of a data set on the hub: the first ones.

    Raises:
        ValueError: If the hub does not have it, or it cannot be loaded.
    """
    hub = FORMATS[dataset_format].hub
    if hub is None:
        raise ValueError(f"{dataset_format} is not on the hub. Download its files, and give them.")
    return list(load_from_hub(hub.path, "Download its files, and give them.", **hub.arguments(split)))[:limit]


def read_published(dataset_format: FormatName, split: str, limit: int | None = None) -> tuple[list[Bag], str]:
    """Bags of the rows of [`load_published`], and their name in messages."""
    source = f"{dataset_format} ({split})"
    return FORMATS[dataset_format].read(load_published(dataset_format, split, limit), source=source), source


def benchmark_from_hub(benchmark: str, limit: int | None = None) -> list[Any]:
    """The official rows of a benchmark on the hub: the first `limit` of each of its subsets.

    Raises:
        ValueError: If the hub does not have it, or it cannot be loaded.
    """
    known = FORMATS.get(benchmark)  # type: ignore[arg-type]
    if known is None or known.hub is None:
        raise ValueError(f"{benchmark} is no data set of the hub. Give `data`: a file with rows.")
    return [row for split in known.hub.splits for row in load_published(benchmark, split, limit)]  # type: ignore[arg-type]
