"""Where data sets lie: a file, a folder with a file for each split, or the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

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


def load_from_hub(name: str, config: str | None) -> Any:
    """All splits of a data set of the Hugging Face hub.

    Raises:
        ValueError: If it cannot be loaded; the sentence says why and where else a name is looked for.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config)
    except (OSError, ValueError) as error:  # not found, offline, another configuration
        raise ValueError(
            f"The data set {name} cannot be loaded from the hub ({reason(error)}). Check the name, or set `data_dir` "
            f"(or {DATA_DIR_VARIABLE}) to the folder that holds a folder of this name."
        ) from error
