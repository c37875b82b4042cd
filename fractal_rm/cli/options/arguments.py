"""Arguments that several commands share, as dataclasses that become flags and YAML keys, and the rows they name.

A field's `help` is its only description.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.index import FORMATS, FormatName
from fractal_rm.data.formats.table_files import TABLE_ENDINGS, is_table, open_table
from fractal_rm.data.readers import JSON_ENDINGS, naming, open_jsonl
from fractal_rm.data.rows import check_ending
from fractal_rm.data.shapes import Columns, prompt_row
from fractal_rm.errors import reason
from fractal_rm.ranges import check_ranges

# The only environment variable that commands read.
DATA_DIR_VARIABLE = "FRACTAL_RM_DATA"
_ENDINGS = (*JSON_ENDINGS, *TABLE_ENDINGS)


_COLUMNS = [one.name for one in fields(Columns) if one.name != "label_scale"]
# Options without effect in commands that read only prompts; the second set, without evaluation too.
_UNREAD = {"test_file", "dataset_test_split", "label_scale"}
_UNREAD |= {f"{name}_column" for name in _COLUMNS if name != "prompt"}
_UNREAD_WITHOUT_EVALUATION = _UNREAD | {"eval_file", "dataset_eval_split", "strict"}


# Choices of earlier versions, and what to use instead.
_REMOVED_FORMATS = dict.fromkeys(
    ("dataset_format=wikicatsum", "dataset_format=aquamuse"),
    "Its files hold good summaries only, and no longer have a reader. Give rows with `prompt`, `response` and `label`.",
)


@dataclass(kw_only=True)
class ColumnArguments:
    """Names of the columns that rows have."""

    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompt; default: `prompt`."})
    response_column: str | None = field(
        default=None, metadata={"help": "Column of the response; default: `completion` or `response`."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the label or rating of a response; default: `label`."}
    )
    label_scale: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest rating, such as `1 5`. Labels are mapped linearly to 0 to 1."},
    )
    chosen_column: str | None = field(
        default=None, metadata={"help": "Column of the better response of a preference; default: `chosen`."}
    )
    rejected_column: str | None = field(
        default=None, metadata={"help": "Column of the worse response of a preference; default: `rejected`."}
    )
    steps_column: str | None = field(
        default=None, metadata={"help": "Column of the response as a list of steps; default: `steps`."}
    )
    step_labels_column: str | None = field(
        default=None, metadata={"help": "Column of the labels of the steps; default: `step_labels`."}
    )

    def __post_init__(self) -> None:
        columns = self.columns  # raises ValueError if they are wrong
        if columns != Columns() and getattr(self, "dataset_format", None) is not None:
            raise ValueError(
                "Column names have no effect with `dataset_format`, which fixes them. Leave one of the two out."
            )

    @property
    def columns(self) -> Columns:
        """The names as readers take them."""
        scale: Any = None if self.label_scale is None else tuple(self.label_scale)
        return Columns(**{name: getattr(self, f"{name}_column") for name in _COLUMNS}, label_scale=scale)


@dataclass(kw_only=True)
class RewardModelArguments:
    """Arguments of commands that use a step reward model."""

    model: str = field(metadata={"help": "Step reward model: the folder that `fractal-rm train` wrote, or a hub id."})
    published: str | None = field(
        default=None,
        metadata={
            "help": "Format of a published process reward model, if its files do not tell: `trl` (or `trl:SEPARATOR`), "
            "`qwen-prm`, `skywork-prm`, `math-shepherd` or `rlhflow`."
        },
    )


@dataclass(kw_only=True)
class ScoringArguments(RewardModelArguments, ColumnArguments):
    """Arguments of commands that score rows with a model."""

    REMOVED = _REMOVED_FORMATS

    dataset_format: FormatName | None = field(
        default=None, metadata={"help": "Format of published rows, docs/datasets.md."}
    )
    batch_size: int = field(default=32, metadata={"help": "Responses per forward pass."})
    limit: int | None = field(default=None, metadata={"help": "Rows to read from the start of the file; default: all."})

    def __post_init__(self) -> None:
        check_ranges(self)
        super().__post_init__()


@dataclass
class DataArguments(ColumnArguments):
    """Where rows come from: files, or a data set with splits."""

    REMOVED = _REMOVED_FORMATS
    _argument_group_name = "data"

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows to train on. A file (.jsonl, .ndjson, .json, .parquet, .csv, .tsv or .arrow) or a folder "
            "that `datasets` saved; overrides `dataset_name`."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Rows for evaluation during training. Overrides `dataset_name`."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Rows for metrics at the end. Overrides `dataset_name`."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set: a folder in `data_dir`, or a hub id. The folder holds a file for each split."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub's data set."})
    dataset_format: FormatName | None = field(
        default=None,
        metadata={
            "help": "Format of published rows, docs/datasets.md. Without a file or `dataset_name` the copy on the hub "
            "is loaded."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_eval_split: str = field(default="validation", metadata={"help": "Split for evaluation, if it exists."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split for metrics at the end, if it exists."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": f"Folder that holds data sets by name; default: the environment variable {DATA_DIR_VARIABLE}."
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "Rows to read from the start of each split; default: all."}
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Reject rows that contradict each other, and prompts in both training and evaluation data."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        super().__post_init__()
        if self.dataset_config is not None and self.dataset_name is None and self.dataset_format is None:
            raise ValueError("`dataset_config` has no effect without `dataset_name`. Leave it out.")

    def check_prompts_alone(self, command: str, *, evaluates: bool) -> None:
        """Raise ValueError for an option that commands on prompts do not read."""
        unread = _UNREAD if evaluates else _UNREAD_WITHOUT_EVALUATION
        for one in fields(self):
            if one.name in unread and getattr(self, one.name) != one.default:
                raise ValueError(
                    f"`{one.name}` has no effect in `fractal-rm {command}`, which reads prompts. Leave it out."
                )

    def prompts(self, rows: Sequence[Any], source: str) -> list[Any]:
        """Rows with the prompt moved to the column `prompt`; raises ValueError if the column is missing or
        ambiguous."""
        found = []
        for number, row in enumerate(rows, 1):
            with naming(source, number):
                found.append(prompt_row(row, self.prompt_column))
        return found

    def read(self, split: Literal["train", "eval", "test"]) -> tuple[Sequence[Any], str] | None:
        """Rows of a split (bags with `dataset_format`), and the name of their source for messages; rows may be read
        lazily.

        Returns None if no data is named for the split, or the data set lacks it; without a split to train on that is an
        error.

        Raises:
            OSError: If a file is missing, or the hub cannot be reached.
            ValueError: If a file is not readable JSON, or the data set has no split to train on.
        """
        file = getattr(self, f"{split}_file")
        if file is not None:
            return read_rows(find_file(file, self.data_dir), self.dataset_format, self.limit), file
        name = getattr(self, f"dataset_{split}_split")
        if self.dataset_name is None:
            return self._official(name, split)
        found = find_split(self.dataset_name, name, self.data_dir)
        if found is not None:
            return read_rows(found, self.dataset_format, self.limit), str(found)
        folder = data_folder(self.data_dir)
        saved = Path(self.dataset_name)
        if is_table(saved):  # saved by `datasets`, with or without a folder per split
            inner = saved / name
            if split != "train" and not inner.is_dir():
                return None
            rows, places = open_table(inner if inner.is_dir() else saved, self.limit), "folders"
        elif folder is not None and (folder / self.dataset_name).is_dir():
            rows, places = None, f"files in {folder}/{self.dataset_name}"
        else:
            what = f"The data set {self.dataset_name}"
            advice = f"Check the name, or set `data_dir` (or {DATA_DIR_VARIABLE}) to the folder that holds this one."
            splits = load_from_hub(what, advice, path=self.dataset_name, name=self.dataset_config)
            rows, places = splits.get(name), f"splits {sorted(splits)}"
        if rows is None:
            if split != "train":
                return None
            raise ValueError(
                f"{self.dataset_name} has no split {name!r} among its {places}. Set `dataset_train_split`."
            )
        source = f"{self.dataset_name} ({name})"
        rows = rows if self.limit is None else list(islice(rows, self.limit))
        return (FORMATS[self.dataset_format].read(rows, source=source) if self.dataset_format else rows), source

    def _official(self, name: str, split: str) -> tuple[Sequence[Any], str] | None:
        """The hub's copy of a format's data, if no file is named; splits for evaluation are optional."""
        if self.dataset_format is None or self.train_file or self.eval_file or self.test_file:
            return None
        if self.dataset_config is not None:
            raise ValueError(f"{self.dataset_format} has no configurations on the hub. Leave `dataset_config` out.")
        hub = FORMATS[self.dataset_format].hub
        if split != "train" and hub is not None and name not in hub.splits:
            return None
        return read_official(self.dataset_format, name, self.limit)

    @property
    def name(self) -> str:
        """Name of the training data, without its folder."""
        return Path(self.train_file).name if self.train_file else str(self.dataset_name or self.dataset_format)


@dataclass
class LoraArguments:
    """Low-rank adapters, with TRL's names and defaults."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(default=False, metadata={"help": "Train low-rank adapters, not all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters: alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; default: PEFT's choice for the architecture."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.use_peft:
            return
        for one in fields(self):
            if getattr(self, one.name) != one.default:
                raise ValueError(
                    f"`{one.name}` is {getattr(self, one.name)}, but has no effect without `use_peft`. Set `use_peft` "
                    "to train adapters, or leave it out."
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


# Rows -----------------------------------------------------------------------------------------------------------------


def data_folder(data_dir: str | None) -> Path | None:
    """The folder of data sets: the argument, else the environment variable, else None.

    Raises NotADirectoryError if the folder does not exist.
    """
    named = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if named and not Path(named).is_dir():
        origin = "`data_dir`" if data_dir else f"the environment variable {DATA_DIR_VARIABLE}"
        raise NotADirectoryError(f"{named}, from {origin}, is not a folder. Give the folder that holds the data sets.")
    return Path(named) if named else None


def find_file(name: str, data_dir: str | None) -> Path:
    """A file as named, or the file of that name in the data folder."""
    folder = data_folder(data_dir)
    if folder is not None and not Path(name).exists() and (folder / name).is_file():
        return folder / name
    return Path(name)


def find_split(dataset: str, split: str, data_dir: str | None) -> Path | None:
    """The file of a split of a data set in the data folder; None if it does not exist."""
    folder = data_folder(data_dir)
    if folder is None:
        return None
    return next((path for end in _ENDINGS if (path := folder / dataset / f"{split}{end}").is_file()), None)


def load_from_hub(name: str, advice: str, /, **arguments: Any) -> Any:
    """`datasets.load_dataset`, with a ValueError that gives the reason and the advice."""
    from datasets import load_dataset

    try:
        return load_dataset(**arguments, trust_remote_code=False)
    except (OSError, ValueError) as error:  # not found, offline, another configuration
        raise ValueError(f"{name} cannot be loaded from the hub ({reason(error)}). {advice}") from error


def read_rows(path: Path, dataset_format: FormatName | None, limit: int | None) -> Sequence[Any]:
    """The first rows of a file, or its first bags if a format is named; later rows are not read, and rows may be read
    lazily.

    Raises OSError if the file is missing, ValueError if it cannot be read.
    """
    table = is_table(path) and not (dataset_format == "fira" and path.suffix == ".tsv")
    if dataset_format is None:
        if path.is_dir() and not table:
            raise IsADirectoryError(f"{path} is a folder that `datasets` did not save. Give one of its files.")
        if not table:
            check_ending(path, _ENDINGS)
        return open_table(path, limit) if table else open_jsonl(path, limit)
    return FORMATS[dataset_format].read(open_table(path) if table else path, source=str(path), limit=limit)


def load_official(dataset_format: FormatName, split: str, limit: int | None = None) -> list[Any]:
    """The first official rows of a split on the hub; raises ValueError if the hub lacks it or it cannot be loaded."""
    hub = FORMATS[dataset_format].hub
    if hub is None:
        raise ValueError(f"{dataset_format} is not on the hub. Download its files, and give them.")
    return list(islice(load_from_hub(hub.path, "Download its files, and give them.", **hub.arguments(split)), limit))


def read_official(dataset_format: FormatName, split: str, limit: int | None = None) -> tuple[list[Bag], str]:
    """Bags of the rows of [`load_official`], and their name in messages."""
    source = f"{dataset_format} ({split})"
    return FORMATS[dataset_format].read(load_official(dataset_format, split, limit), source=source), source


def benchmark_from_hub(benchmark: str) -> list[list[Any]]:
    """The official rows of a benchmark on the hub, one list per subset; raises as [`load_official`]."""
    known = FORMATS.get(benchmark)  # type: ignore[arg-type]
    if known is None or known.hub is None:
        raise ValueError(f"{benchmark} is not on the hub. Give `data`: a file with rows.")
    return [load_official(benchmark, split) for split in known.hub.splits]  # type: ignore[arg-type]
