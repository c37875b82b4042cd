"""Formats by name: what `--dataset_format` takes, and where the Hugging Face Hub has the data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.aquamuse import read_aquamuse
from fractal_rm.data.formats.fira import read_fira
from fractal_rm.data.formats.math_shepherd import read_math_shepherd
from fractal_rm.data.formats.multispanqa import read_multispanqa
from fractal_rm.data.formats.prm800k import read_prm800k
from fractal_rm.data.formats.prmbench import read_prmbench
from fractal_rm.data.formats.processbench import read_processbench
from fractal_rm.data.formats.qa_feedback import read_qa_feedback, read_qa_preferences
from fractal_rm.data.formats.wikicatsum import read_wikicatsum
from fractal_rm.objectives.aggregation import Meaning, meaning

FormatName = Literal[
    "prm800k",
    "processbench",
    "prmbench",
    "math_shepherd",
    "fira",
    "multispanqa",
    "qa_feedback",
    "qa_preferences",
    "wikicatsum",
    "aquamuse",
]


@dataclass(frozen=True)
class HubFiles:
    """Where the Hub has a data set.

    Args:
        path: Its id.
        splits: Its splits.
        configs: Its configurations, the default one first; empty if it needs no name.
        revision: Branch of the files, if not the main one.
        data_files: The files of a split, with `{split}` and `{config}` in their name, if they are loaded by name.
        field: Where the rows are in a `.json` file, if it is one object.
    """

    path: str
    splits: tuple[str, ...]
    configs: tuple[str, ...] = ()
    revision: str | None = None
    data_files: str | None = None
    field: str | None = None

    def arguments(self, split: str, config: str | None = None) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset` for one split: the columns of the others need not be alike.

        Args:
            split: One of its splits.
            config: One of its configurations; None takes the first.

        Raises:
            ValueError: If there is no such split or configuration.
        """
        if split not in self.splits:
            raise ValueError(f"{self.path} has no split {split!r}; use one of {', '.join(self.splits)}.")
        if config is not None and config not in self.configs:
            found = f"use one of {', '.join(self.configs)}" if self.configs else "leave it out"
            raise ValueError(f"{self.path} has no configuration {config!r}; {found}.")
        config = config or next(iter(self.configs), None)
        if self.data_files is None:
            return {"path": self.path, "name": config, "split": split}
        branch = f"@{self.revision}" if self.revision else ""
        files = f"hf://datasets/{self.path}{branch}/{self.data_files.format(split=split, config=config)}"
        if files.endswith(".parquet"):
            return {"path": "parquet", "data_files": files, "split": "train"}
        return {"path": "json", "data_files": files, "field": self.field, "split": "train"}


@dataclass(frozen=True)
class Format:
    """A format of official files.

    Args:
        read: Makes bags of a file, or of rows: `read(data, source=...)`.
        meaning: How a response's label follows from the labels of its steps.
        hub: Where the Hub has the data; None if it comes from elsewhere.
    """

    read: Callable[..., list[Bag]]
    meaning: Meaning
    hub: HubFiles | None = None


# Ids that are not the authors' own are mirrors of the official files.
FORMATS: dict[FormatName, Format] = {
    "prm800k": Format(
        read_prm800k,
        "min",
        HubFiles(  # mirror of github.com/openai/prm800k
            "tasksource/PRM800K",
            ("phase1_train", "phase1_test", "phase2_train", "phase2_test"),
            data_files="{split}.jsonl",
        ),
    ),
    "processbench": Format(
        read_processbench, "min", HubFiles("Qwen/ProcessBench", ("gsm8k", "math", "olympiadbench", "omnimath"))
    ),
    "prmbench": Format(read_prmbench, "min", HubFiles("hitsmy/PRMBench_Preview", ("train",))),
    "math_shepherd": Format(read_math_shepherd, "min", HubFiles("peiyi9979/Math-Shepherd", ("train",))),
    "fira": Format(read_fira, "max"),
    "multispanqa": Format(
        read_multispanqa,
        "max",
        HubFiles(  # mirror of github.com/haonan-li/MultiSpanQA
            "Tugay/multispanqa", ("train", "validation"), data_files="{split}.json", field="data"
        ),
    ),
    "qa_feedback": Format(read_qa_feedback, "mean"),
    "qa_preferences": Format(read_qa_preferences, "mean"),
    # A script on the main branch, which `datasets` no longer runs; Parquet files on this one.
    "wikicatsum": Format(
        read_wikicatsum,
        "min",
        HubFiles(
            "GEM/wiki_cat_sum",
            ("train", "validation", "test"),
            configs=("animal", "company", "film"),
            revision="refs/convert/parquet",
            data_files="{config}/{split}/*.parquet",
        ),
    ),
    "aquamuse": Format(
        read_aquamuse,
        "min",
        HubFiles(
            "google-research-datasets/aquamuse",
            ("train", "validation", "test"),
            configs=("abstractive", "extractive"),
        ),
    ),
}


def check_meaning(name: FormatName, aggregation: str) -> None:
    """Raise unless an aggregation fits the labels of a format.

    Args:
        name: The format.
        aggregation: How step probabilities become a response probability.

    Raises:
        ValueError: If the labels mean something else.
    """
    found = FORMATS[name].meaning
    if meaning(aggregation) != found:
        raise ValueError(
            f"A label of {name} is the {found} of its steps' labels, but `aggregation` is {aggregation!r}. "
            f"Set `aggregation={found}`, or use other data."
        )
