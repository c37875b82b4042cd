"""Formats by name: the values of `--dataset_format`, and where the Hugging Face Hub has the data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.fira import read_fira
from fractal_rm.data.formats.math_shepherd import read_math_shepherd
from fractal_rm.data.formats.multispanqa import read_multispanqa
from fractal_rm.data.formats.prm800k import read_prm800k
from fractal_rm.data.formats.prmbench import read_prmbench
from fractal_rm.data.formats.processbench import read_processbench
from fractal_rm.data.formats.qa_feedback import read_qa_feedback, read_qa_preferences
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
]


@dataclass(frozen=True)
class HubFiles:
    """Location of a data set on the Hub.

    Args:
        path: Id of the data set.
        splits: Names of its splits.
        data_file: File of a split, with `{split}` in its name, if files are loaded by name.
        field: Key of the list of rows, if the file is one object.
    """

    path: str
    splits: tuple[str, ...]
    data_file: str | None = None
    field: str | None = None

    def arguments(self, split: str) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset` that load one split only: other splits may have other columns.

        Raises:
            ValueError: If there is no such split.
        """
        if split not in self.splits:
            raise ValueError(f"{self.path} has no split {split!r}; use one of {', '.join(self.splits)}.")
        if self.data_file is None:
            return {"path": self.path, "split": split}
        file = f"hf://datasets/{self.path}/{self.data_file.format(split=split)}"
        return {"path": "json", "data_files": file, "field": self.field, "split": "train"}


@dataclass(frozen=True)
class Format:
    """A format of official files.

    Args:
        read: Makes bags from a file or from rows: `read(data, source=..., limit=...)`.
        meaning: How a response's label follows from its step labels.
        hub: Location of the data on the Hub; None if it is published elsewhere.
    """

    read: Callable[..., list[Bag]]
    meaning: Meaning
    hub: HubFiles | None = None


_PROCESSBENCH = HubFiles("Qwen/ProcessBench", ("gsm8k", "math", "olympiadbench", "omnimath"))
# Mirrors of the official files, github.com/openai/prm800k and github.com/haonan-li/MultiSpanQA.
_PRM800K = HubFiles(
    "tasksource/PRM800K", ("phase1_train", "phase1_test", "phase2_train", "phase2_test"), data_file="{split}.jsonl"
)
_MULTISPANQA = HubFiles("Tugay/multispanqa", ("train", "validation"), data_file="{split}.json", field="data")
FORMATS: dict[FormatName, Format] = {
    "prm800k": Format(read_prm800k, "min", _PRM800K),
    "processbench": Format(read_processbench, "min", _PROCESSBENCH),
    "prmbench": Format(read_prmbench, "min", HubFiles("hitsmy/PRMBench_Preview", ("train",))),
    "math_shepherd": Format(read_math_shepherd, "min", HubFiles("peiyi9979/Math-Shepherd", ("train",))),
    "fira": Format(read_fira, "max"),
    "multispanqa": Format(read_multispanqa, "max", _MULTISPANQA),
    "qa_feedback": Format(read_qa_feedback, "mean"),
    "qa_preferences": Format(read_qa_preferences, "mean"),
}


def check_meaning(name: FormatName, aggregation: str) -> None:
    """Raise unless an aggregation fits the labels of a format.

    Raises:
        ValueError: If the aggregation does not fit.
    """
    found = FORMATS[name].meaning
    if meaning(aggregation) != found:
        raise ValueError(
            f"In {name}, a response's label is the {found} of its step labels, but `aggregation` is {aggregation!r}. "
            f"Set `aggregation={found}`, or use other data."
        )
