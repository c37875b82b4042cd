"""Reward models that `processbench.py` and `best_of_n.py` evaluate: trained here in seconds to minutes, or existing."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.disaggregation.data import whole_responses
from fractal_rm.data.bag import Bag
from fractal_rm.data.readers import read_bags, read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.study.arms import label_responses
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.conditions import ShippedArithmetic
from fractal_rm.tasks.arithmetic.problems import make_problems

TRAINING: dict[str, Any] = {
    "aggregation": "product",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
EMBEDDING: dict[str, Any] = {**TRAINING, "scorer": "embedding", "segmentation": "given", "head_learning_rate": 1e-3}
LIKELIHOOD: dict[str, Any] = {**TRAINING, "scorer": "likelihood", "learning_rate": 1e-3}
# Problems of the arithmetic task in each split and the seed of each.
ARITHMETIC = {"train": (1500, 11), "validation": (400, 12)}


def train(
    start: Any,
    bags: Sequence[Bag],
    validation: Sequence[Bag],
    options: dict[str, Any],
    seed: int,
    *,
    whole: bool = False,
) -> StepRewardModel:
    """A reward model from response labels, its threshold from those of the validation split.

    Args:
        start: What training starts from: an encoder, or the folder of a language model.
        bags: Labelled responses; gold step labels, if there are any, are taken away.
        validation: Others, for temperature and threshold.
        options: Of `FractalConfig`.
        seed: Seed of the training.
        whole: Make an outcome model: every response counts as one step.
    """
    splits = [without_gold(part) for part in (bags, validation)]
    if whole:
        splits, options = [whole_responses(part) for part in splits], options | {"segmentation": "given"}
    with tempfile.TemporaryDirectory() as folder:
        config = FractalConfig(output_dir=folder, seed=seed, **options)
        trainer = FractalTrainer(start, config, train_dataset=splits[0], eval_dataset=splits[1])
        trainer.train()
        trainer.calibrate()
    return trainer.reward_model()


def without_gold(bags: Sequence[Bag]) -> list[Bag]:
    """The same responses without gold step labels."""
    return [replace(bag, step_labels=None) for bag in bags]


def encoder(path: str, cache_dir: Path) -> SentenceEncoder:
    """A frozen sentence encoder, with its embeddings on disk."""
    return SentenceEncoder(path, cache_dir=cache_dir, dtype="bfloat16")


def solutions(data_dir: Path, split: str, most: int | None = None) -> list[Bag]:
    """Bags of a split of `gsm8k_solutions`: sampled solutions, labelled by whether the final answer is right."""
    rows = read_jsonl(data_dir / "gsm8k_solutions" / f"{split}.jsonl.gz")[:most]
    return read_bags(rows, Segmentation("given"), source=f"gsm8k_solutions {split}")


def arithmetic_rows(problems: int, seed: int, *, samples: int = 1) -> list[dict[str, Any]]:
    """Rows of responses of the shipped policy to the arithmetic task, labelled by outcome, several a problem."""
    asked = [problem for problem in make_problems(problems, seed=seed) for _ in range(samples)]
    found = label_responses(ShippedArithmetic(), SHIPPED_POLICY, asked, seed)
    return [{"prompt": problem.prompt, "response": response, "label": label} for problem, response, label in found]


def arithmetic_bags(split: str, most: int | None = None) -> list[Bag]:
    """Bags of a split of the arithmetic task."""
    count, seed = ARITHMETIC[split]
    rows = arithmetic_rows(min(count, most or count), seed)
    return read_bags(rows, Segmentation(), source=f"arithmetic {split}")


def models_at_hand(named: Sequence[str]) -> Iterator[tuple[str, int | None, StepRewardModel]]:
    """Models from `NAME=FOLDER`: name, seed (the number that the folder's name ends with) and model.

    Raises:
        ValueError: If there is no `=`.
    """
    for pair in named:
        name, equals, folder = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} names no folder. Write it as NAME=FOLDER.")
        number = folder.rstrip("/").rpartition("-")[2]
        yield name, int(number) if number.isdigit() else None, StepRewardModel.from_pretrained(folder)


def data_dir_of(given: str | None) -> Path | None:
    """The folder of the data sets: as given, or that of the environment."""
    named = given or os.environ.get("FRACTAL_RM_DATA")
    return Path(named) if named else None
