"""Official data sets from the Hugging Face Hub, through the readers of the files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.math_sets import read_prm800k, read_prmbench, read_processbench
from fractal_rm.data.formats.retrieval_sets import read_multispanqa
from fractal_rm.data.formats.stepwise_sets import read_math_shepherd, read_stepwise
from fractal_rm.data.formats.summary_sets import read_aquamuse, read_wikicatsum
from fractal_rm.errors import reason


@dataclass(frozen=True)
class HubSet:
    """Where a data set is on the Hub.

    Args:
        path: Its id.
        reader: What makes bags of its rows.
        splits: Its splits.
        configs: Its configurations, the default one first; none if it needs no name.
        revision: Branch of the files, if not the main one.
        data_files: The files of a split, with `{split}` and `{config}` in their name, if they are loaded by name.
        field: Where the rows are in a `.json` file, if it is one object.
    """

    path: str
    reader: Callable[..., list[Bag]]
    splits: tuple[str, ...]
    configs: tuple[str, ...] = ()
    revision: str | None = None
    data_files: str | None = None
    field: str | None = None


# FiRA and QA-Feedback are not here: their files come from GitHub only. Ids that are not the authors' own are mirrors
# of the official files.
HUB = {
    "prm800k": HubSet(  # mirror of github.com/openai/prm800k
        "tasksource/PRM800K",
        read_prm800k,
        ("phase1_train", "phase1_test", "phase2_train", "phase2_test"),
        data_files="{split}.jsonl",
    ),
    "processbench": HubSet("Qwen/ProcessBench", read_processbench, ("gsm8k", "math", "olympiadbench", "omnimath")),
    "prmbench": HubSet("hitsmy/PRMBench_Preview", read_prmbench, ("train",)),
    "math_shepherd": HubSet("peiyi9979/Math-Shepherd", read_math_shepherd, ("train",)),
    "trl_math_shepherd": HubSet("trl-lib/math_shepherd", read_stepwise, ("train", "test")),
    "trl_prm800k": HubSet("trl-lib/prm800k", read_stepwise, ("train", "test")),
    "multispanqa": HubSet(  # mirror of github.com/haonan-li/MultiSpanQA
        "Tugay/multispanqa", read_multispanqa, ("train", "validation"), data_files="{split}.json", field="data"
    ),
    # A script on the main branch, which `datasets` no longer runs; Parquet files on this one.
    "wikicatsum": HubSet(
        "GEM/wiki_cat_sum",
        read_wikicatsum,
        ("train", "validation", "test"),
        configs=("animal", "company", "film"),
        revision="refs/convert/parquet",
        data_files="{config}/{split}/*.parquet",
    ),
    "aquamuse": HubSet(
        "google-research-datasets/aquamuse",
        read_aquamuse,
        ("train", "validation", "test"),
        configs=("abstractive", "extractive"),
    ),
}


def load_hub(name: str, split: str, *, config: str | None = None, **options: Any) -> list[Bag]:
    """Bags of a data set on the Hugging Face Hub.

    Args:
        name: A key of `HUB`.
        split: One of its splits.
        config: One of its configurations; None takes the first.
        options: Options of its reader, such as `negative_share`.

    Returns:
        What the reader makes of the rows.

    Raises:
        TypeError: If the reader does not know an option, or a value has the wrong type.
        ValueError: If the name, the split or the configuration is unknown, the data cannot be loaded, or a row is
            wrong.

    Example:
        >>> load_hub("processbench", "train")
        Traceback (most recent call last):
            ...
        ValueError: Qwen/ProcessBench has no split 'train'; use one of gsm8k, math, olympiadbench, omnimath.
    """
    rows = load_hub_rows(name, split, config=config)
    known = HUB[name]
    return known.reader(rows, source=f"{known.path} ({split})", **options)


def load_hub_rows(name: str, split: str, *, config: str | None = None) -> Any:
    """Rows of a data set on the Hugging Face Hub, as its authors published them.

    Args:
        name: A key of `HUB`.
        split: One of its splits.
        config: One of its configurations; None takes the first.

    Raises:
        ValueError: If the name, the split or the configuration is unknown, or the data cannot be loaded.
    """
    if name not in HUB:
        raise ValueError(f"Unknown data set {name!r}; use one of {', '.join(HUB)}, or read its files.")
    known = HUB[name]
    if split not in known.splits:
        raise ValueError(f"{known.path} has no split {split!r}; use one of {', '.join(known.splits)}.")
    if config is not None and config not in known.configs:
        found = f"use one of {', '.join(known.configs)}" if known.configs else "leave it out"
        raise ValueError(f"{known.path} has no configuration {config!r}; {found}.")
    return _load(known, split, config or next(iter(known.configs), None))


def _load(known: HubSet, split: str, config: str | None) -> Any:
    from datasets import load_dataset

    try:
        if known.data_files is None:
            return load_dataset(known.path, config, split=split)
        # One split at a time: the columns of the others need not be alike.
        branch = f"@{known.revision}" if known.revision else ""
        files = f"hf://datasets/{known.path}{branch}/{known.data_files.format(split=split, config=config)}"
        if files.endswith(".parquet"):
            return load_dataset("parquet", data_files=files, split="train")
        return load_dataset("json", data_files=files, field=known.field, split="train")
    except (OSError, ValueError) as error:  # not found, offline
        raise ValueError(
            f"{known.path} cannot be loaded from the Hub ({reason(error)}); download and read its files."
        ) from None
