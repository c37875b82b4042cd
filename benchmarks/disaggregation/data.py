"""Data sets of the benchmark `disaggregation`: bags of each split, and the meaning of their labels."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common.floors import few_new_words
from fractal_rm.data.bag import Bag
from fractal_rm.data.readers import read_bags, read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.files import write_atomic
from fractal_rm.objectives.aggregation import Meaning
from fractal_rm.study.arms import label_responses
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.conditions import ShippedArithmetic
from fractal_rm.tasks.arithmetic.problems import make_problems

# Larger training splits are cut to their first rows, so a run takes seconds and the sets can be compared.
MOST_TRAINING_BAGS = 1500
SPLITS = ("train", "validation", "test")
# From the folder of the sets, the work folder, and the most responses a split may have.
Loader = Callable[[Path, Path, int | None], "Data"]
# Problems of the arithmetic task in each split, and the seed of each.
ARITHMETIC = {"train": (1500, 11), "validation": (400, 12), "test": (800, 13)}


@dataclass(frozen=True)
class Data:
    """One data set.

    Args:
        name: Its name in the rows.
        rule: How step labels make the response label: `"min"`, `"max"` or `"mean"`.
        splits: Bags by split; those of `test` have gold step labels.
        preferences: Whether training and validation labels are preferences.
        proportions: Whether labels are shares of good steps.
        noisy: Whether a good label may stand on a bad response.
        scorer: What reads it; on the arithmetic task each of the three.
        num_grades: For grades in place of good and bad: how many there are.
    """

    name: str
    rule: Meaning
    splits: dict[str, list[Bag]]
    preferences: bool = False
    proportions: bool = False
    noisy: bool = False
    scorer: str = "embedding"
    num_grades: int | None = None

    @property
    def has_gold(self) -> bool:
        """Whether training responses have gold step labels, for the arms that are named for them."""
        return any(bag.step_labels for bag in self.splits["train"])


def _rows(data_dir: Path, name: str, split: str, most: int | None) -> list[dict[str, Any]]:
    rows = read_jsonl(data_dir / name / f"{split}.jsonl.gz")
    return rows[: MOST_TRAINING_BAGS if split == "train" else None][:most]


def _bags(rows: list[dict[str, Any]], source: str) -> list[Bag]:
    """Bags whose teacher is a rule: the share of a step's words that the prompt has."""
    bags = read_bags(rows, Segmentation("given"), source=source)
    return [replace(bag, teacher_scores=tuple(few_new_words(bag))) for bag in bags]


def _plain(name: str, rule: Meaning, **options: Any) -> Loader:
    def load(data_dir: Path, work_dir: Path, most: int | None) -> Data:
        splits = {split: _bags(_rows(data_dir, name, split, most), f"{name} {split}") for split in SPLITS}
        return Data(name, rule, splits, **options)

    return load


def _outcomes(data_dir: Path, work_dir: Path, most: int | None) -> Data:
    """ProcessBench with the label that people have: is the final answer right."""
    name = "processbench_resplit"
    splits = {}
    for split in SPLITS:
        rows = [row | {"label": float(row["meta"]["answer_correct"])} for row in _rows(data_dir, name, split, most)]
        splits[split] = _bags(rows, f"{name} {split}")
    return Data("processbench_outcome", "min", splits, noisy=True)


def _grades(data_dir: Path, work_dir: Path, most: int | None) -> Data:
    """PRM800K's three ratings as grades of being wrong, 0 (right), 1 (neutral) and 2; a response has its worst."""
    splits = {}
    for split in SPLITS:
        rows = _rows(data_dir, "prm800k", split, most)
        wrong = [[1 - rating for rating in row["meta"]["ratings"]] for row in rows]
        rows = [row | {"step_labels": grades, "label": max(grades)} for row, grades in zip(rows, wrong, strict=True)]
        splits[split] = read_bags(rows, Segmentation("given"), source=f"prm800k {split}", num_grades=3)
    return Data("prm800k_grades", "max", splits, num_grades=3)


def _preferences(data_dir: Path, work_dir: Path, most: int | None) -> Data:
    """Preferences to learn from; the steps of `qa_feedback`, whose prompts are others, to be judged on."""
    name = "qa_feedback_preferences"
    splits = {split: _bags(_rows(data_dir, name, split, most), f"{name} {split}") for split in SPLITS[:2]}
    splits["test"] = _bags(_rows(data_dir, "qa_feedback", "test", most), "qa_feedback test")
    prompts = {str(bag.prompt) for bag in splits["test"]}
    if any(str(bag.prompt) in prompts for split in SPLITS[:2] for bag in splits[split]):
        raise ValueError("qa_feedback_preferences holds prompts of the test split of qa_feedback. Drop them.")
    return Data(name, "mean", splits, preferences=True)


def _arithmetic(scorer: str) -> Loader:
    """Responses of the shipped policy to the arithmetic task, labelled by outcome; gold steps by its checker."""

    def load(data_dir: Path, work_dir: Path, most: int | None) -> Data:
        rows = _arithmetic_rows(work_dir, most)
        name = "arithmetic" if scorer == "likelihood" else f"arithmetic_{scorer}"
        return Data(name, "min", {split: _bags(rows[split], split) for split in SPLITS}, scorer=scorer)

    return load


def _arithmetic_rows(work_dir: Path, most: int | None) -> dict[str, list[dict[str, Any]]]:
    file = work_dir / ("arithmetic.json" if most is None else f"arithmetic-{most}.json")
    if not file.is_file():
        found: dict[str, list[dict[str, Any]]] = {}
        for split, (count, seed) in ARITHMETIC.items():
            problems = make_problems(min(count, most or count), seed=seed)
            found[split] = [
                {
                    "prompt": problem.prompt,
                    "steps": [line.strip() for line in response.split("\n") if line.strip()],
                    "step_labels": [float(good) for good in problem.check_steps(response)],
                    "label": label,
                }
                for problem, response, label in label_responses(ShippedArithmetic(), SHIPPED_POLICY, problems, seed)
            ]
        write_atomic(file, json.dumps(found))
    rows: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    return rows


LOADERS: dict[str, Loader] = {
    "multispanqa": _plain("multispanqa", "max"),
    "wice_windows": _plain("wice_windows", "max"),
    "qa_feedback": _plain("qa_feedback", "mean", proportions=True),
    "qa_feedback_preferences": _preferences,
    "summedits": _plain("summedits", "min"),
    "aquamuse_swap": _plain("aquamuse_swap", "min"),
    "prm800k": _plain("prm800k", "min"),
    "prm800k_grades": _grades,
    "processbench_resplit": _plain("processbench_resplit", "min"),
    "processbench_outcome": _outcomes,
    "prmbench": _plain("prmbench", "min"),
    "arithmetic": _arithmetic("likelihood"),
    "arithmetic_token": _arithmetic("token"),
    "arithmetic_embedding": _arithmetic("embedding"),
}


def whole_responses(bags: list[Bag]) -> list[Bag]:
    """The same responses as one step each: what a response-level model is trained on."""
    return [
        replace(bag, step_spans=((bag.step_spans[0][0], bag.step_spans[-1][1]),), step_labels=None, teacher_scores=None)
        for bag in bags
    ]
