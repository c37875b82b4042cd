"""Arguments that several commands take, and where the rows they name lie: a file, a folder of data sets, or the hub.

A field's `help` is its only description.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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


def check_counts(batch_size: int, limit: int | None) -> None:
    """Raise unless both leave something to do."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}. Give 1 or more.")
    check_limit(limit)


def check_limit(limit: int | None) -> None:
    """Raise if no row would be read."""
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}: no row would be left. Give 1 or more, or leave it out.")


@dataclass
class DataArguments:
    """Where rows come from: files, or a data set with splits."""

    _argument_group_name = "data"

    train_file: str | None = field(
        default=None, metadata={"help": "Rows to train on: .jsonl, .jsonl.gz or .json. Beats `dataset_name`."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Rows for evaluation during training. Beats `dataset_name`."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows for metrics at the end. Beats `dataset_name`."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A folder in `data_dir` that holds a file for each split, or else a data set of the hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub's data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_eval_split: str = field(default="validation", metadata={"help": "Split for evaluation, if there is one."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split for metrics at the end, if there is one."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": f"Folder of data sets by name; default: that of the environment's {DATA_DIR_VARIABLE}."},
    )
    limit: int | None = field(default=None, metadata={"help": "Most rows read of each split: the first ones."})

    def __post_init__(self) -> None:
        check_limit(self.limit)

    def read(self, split: Literal["train", "eval", "test"]) -> tuple[list[dict[str, Any]], str] | None:
        """Rows of a split, and the name of their source for messages.

        Returns:
            None if nothing is named for the split, or the named data set has no such split (for training: an error).

        Raises:
            OSError: If a file is not there, or the hub cannot be reached.
            ValueError: If a file is no readable JSON, or the data set has no split to train on.
        """
        file = getattr(self, f"{split}_file")
        if file is not None:
            return read_jsonl(find_file(file, self.data_dir))[: self.limit], file
        if self.dataset_name is None:
            return None
        name = getattr(self, f"dataset_{split}_split")
        found = find_split(self.dataset_name, name, self.data_dir)
        if found is not None:
            return read_jsonl(found)[: self.limit], str(found)
        if self.is_local:
            rows, places = None, f"files in {data_folder(self.data_dir)}/{self.dataset_name}"
        else:
            splits = load_from_hub(self.dataset_name, self.dataset_config)
            rows, places = splits.get(name), f"splits {sorted(splits)}"
        if rows is None and split == "train":
            raise ValueError(
                f"{self.dataset_name} has no split {name!r} among its {places}. Set `dataset_train_split`."
            )
        return None if rows is None else (list(rows)[: self.limit], f"{self.dataset_name} ({name})")

    @property
    def name(self) -> str:
        """What is trained on, without its folder."""
        return Path(self.train_file).name if self.train_file else str(self.dataset_name)

    @property
    def is_local(self) -> bool:
        """Whether `dataset_name` is a folder of the data folder."""
        folder = data_folder(self.data_dir)
        return folder is not None and self.dataset_name is not None and (folder / self.dataset_name).is_dir()


@dataclass
class LoraArguments:
    """Low-rank adapters; names and defaults are TRL's."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(default=False, metadata={"help": "Train low-rank adapters instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters: alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; default: PEFT's choice for the architecture."}
    )

    def config(self) -> Any | None:
        """The `peft` configuration, None without `use_peft`. The trainer sets the task."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )
