"""Question: how much of the benefit of step labels does each method recover from labels on whole responses?

Rivals of FRACTAL: scores that need no learning, a response-level model applied to steps, plain bag losses, LCA pooling,
the implicit process reward, EasyLLP; ceilings: gold fractions and full supervision. Data: ten real sets in this
package's schema (one of them twice, the second time with realistic noisy labels) and the arithmetic task.

    python -m benchmarks.disaggregation.run --data-dir DATA --jobs 2

Each arm has the same number of trials, chosen on response labels of the validation split (the supervised ceiling: on
its step labels); then five seeds of the chosen configuration, whose test scores are read once. The arm `chosen` is the
result of `fractal-rm train --trials 8`: its own list, evaluation and rule. Rows go to
`benchmarks/results/disaggregation.jsonl` as they are made; a killed run continues where it stopped. Step scores of the
test splits stay in the work folder, from which `--gains` compares arms, paired over responses.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.floors import (
    Rule,
    at_random,
    constant,
    copied,
    cosine,
    few_new_words,
    of_grades,
    position,
    score_by,
    short,
)
from benchmarks.common.places import RESULTS, default_encoder
from benchmarks.disaggregation.arms import HARD, PACES, Options, arms, derived_arms
from benchmarks.disaggregation.data import LOADERS, Data, whole_responses
from benchmarks.disaggregation.gains import write_gains
from benchmarks.disaggregation.implicit import implicit_scores
from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.evaluation import statistics as metrics
from fractal_rm.evaluation.intervals import Measurement, estimates
from fractal_rm.evaluation.responses import choose_threshold, evaluate_scores, score_bags
from fractal_rm.evaluation.responses import gold_labels as gold
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.reward_training.trials import Attempt, best, response_value, run_trials, trial_options
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.study.study import run_units
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

SEEDS = range(5)
# The seed of trials is never reported.
TUNING_SEED = 1000
TRAINING: Options = {
    "segmentation": "given",
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
SMOKE: Options = {"max_steps": 2, "pseudo_rounds": 1}
SMOKE_BAGS = 24
DRAWS = 1000


class Unit(NamedTuple):
    """What one process works on at a time."""

    dataset: str
    arm: str


@functools.lru_cache(maxsize=1)  # units come data set by data set
def load_data(name: str, data_dir: Path, work_dir: Path, most: int | None) -> Data:
    """A data set."""
    return LOADERS[name](data_dir, work_dir, most)


@functools.lru_cache(maxsize=1)
def load_encoder(path: str, cache_dir: Path) -> SentenceEncoder:
    """A frozen sentence encoder, with its embeddings on disk."""
    return SentenceEncoder(path, cache_dir=cache_dir, dtype="bfloat16")


class Disaggregation:
    """Trains and measures arms on data sets and appends their rows.

    Args:
        arguments: Those of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results = ResultsFile(arguments.results)
        self.seeds = [0] if arguments.smoke else list(SEEDS)

    # Data and models --------------------------------------------------------------------------------------------

    def data(self, name: str) -> Data:
        """A data set, cut to a few responses in a smoke run."""
        most = SMOKE_BAGS if self.arguments.smoke else None
        return load_data(name, self.arguments.data_dir, self.arguments.work_dir, most)

    @property
    def encoder(self) -> SentenceEncoder:
        """The sentence encoder, with its embeddings on disk."""
        return load_encoder(self.arguments.encoder, self.arguments.work_dir / "cache")

    def config(self, data: Data, options: Options, seed: int, folder: str | Path) -> FractalConfig:
        """The configuration of a training."""
        extra = SMOKE if self.arguments.smoke else {}
        return FractalConfig(output_dir=str(folder), scorer=data.scorer, seed=seed, **{**TRAINING, **options, **extra})

    def start(self, data: Data) -> Any:
        """What a training starts from."""
        return self.encoder if data.scorer == "embedding" else SHIPPED_POLICY

    def train(self, data: Data, bags: list[Bag], options: Options, seed: int) -> Any:
        """A step reward model, trained on response labels (and on gold ones where the options say so)."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(data, options, seed, folder)
            trainer = FractalTrainer(
                self.start(data), config, train_dataset=bags, eval_dataset=data.splits["validation"]
            )
            trainer.train()
            trainer.calibrate()
        return trainer.reward_model()

    # One arm ----------------------------------------------------------------------------------------------------

    def run(self, unit: Unit) -> None:
        """Trials, then the seeds of the chosen configuration; rows that are there already are not made again."""
        data = self.data(unit.dataset)
        if unit.arm.startswith("floor_"):
            return self.run_floor(data, unit.arm)
        if unit.arm == "implicit":
            return self.run_implicit(data)
        if unit.arm == "chosen":
            return self.run_chosen(data)
        bags = data.splits["train"]
        if unit.arm == "response_level":
            bags = whole_responses(bags)
        candidates = arms(data)[unit.arm][: 1 if self.arguments.smoke else None]
        trials = run_trials(
            candidates,
            lambda options: Attempt(self.value(data, bags, unit.arm, options)),
            self.results, benchmark="disaggregation", arm=unit.arm, dataset=data.name, seed=TUNING_SEED,
        )  # fmt: skip
        chosen = best(trials).options
        derived = {} if self.arguments.skip_derived else derived_arms(data, unit.arm, chosen)
        for arm, options in {unit.arm: chosen, **derived}.items():
            self.measure_seeds(data, bags, arm, options)

    def measure_seeds(self, data: Data, bags: list[Bag], arm: str, options: Options) -> None:
        """A row for each seed of a configuration; rows that are there already are not made again."""
        for seed in self.seeds:
            if self.is_missing(data.name, arm, seed, "test"):
                start = time.monotonic()
                model = self.train(data, bags, options, seed)
                scored = {split: score_bags(model, data.splits[split]) for split in ("validation", "test")}
                self.append(data, arm, seed, scored, options, time.monotonic() - start)

    def value(self, data: Data, bags: list[Bag], arm: str, options: Options) -> float:
        """What validation says of a configuration."""
        scored = score_bags(self.train(data, bags, options, TUNING_SEED), data.splits["validation"])
        return selection(data, scored, by_steps=arm == "supervised")

    def run_chosen(self, data: Data) -> None:
        """The configuration that `FractalTrainer.choose` finds, at the first pace of the other arms and at its own."""
        given: Options = {**PACES[data.scorer][0], "aggregation": HARD[data.rule]}
        if data.scorer != "embedding":
            given["reference_model"] = str(SHIPPED_POLICY)
        if data.num_grades is not None:
            given["num_grades"] = data.num_grades
        config = self.config(data, given, TUNING_SEED, self.arguments.work_dir / "chosen" / data.name)
        count = 1 if self.arguments.smoke else len(trial_options(config, preferences=data.preferences))
        bags = data.splits["train"]
        found = FractalTrainer.choose(count, self.start(data), config, bags, data.splits["validation"])
        assert found.choice is not None
        self.measure_seeds(data, bags, "chosen", {**given, **found.choice.chosen.options})

    def run_floor(self, data: Data, arm: str) -> None:
        """A rule that learns nothing."""
        rules: dict[str, Rule] = {
            "floor_overlap": few_new_words,
            "floor_position": position,
            "floor_length": short,
            "floor_copy": copied(),
            "floor_constant": constant,
        }
        for seed in self.seeds if arm == "floor_random" else [0]:
            if self.is_missing(data.name, arm, seed, "test"):
                start = time.monotonic()
                rule = rules.get(arm) or (at_random(seed) if arm == "floor_random" else cosine(self.encoder))
                if data.num_grades is not None:
                    rule = of_grades(rule, data.num_grades, is_grade=arm == "floor_copy")
                scored = {split: score_by(rule, data.splits[split]) for split in ("validation", "test")}
                self.append(data, arm, seed, scored, {}, time.monotonic() - start)

    def run_implicit(self, data: Data) -> None:
        """The implicit process reward of causal language models."""
        steps = SMOKE["max_steps"] if self.arguments.smoke else None
        for seed in self.seeds:
            if self.is_missing(data.name, "implicit", seed, "test"):
                start = time.monotonic()
                scored, config = implicit_scores(SHIPPED_POLICY, data.splits, seed=seed, max_steps=steps)
                self.append(data, "implicit", seed, scored, config, time.monotonic() - start)

    # Rows -------------------------------------------------------------------------------------------------------

    def is_missing(self, dataset: str, arm: str, seed: int, split: str) -> bool:
        """Whether a measurement has no row yet, or its scores are gone."""
        done = self.results.has(dataset=dataset, arm=arm, seed=seed, split=split)
        return not done or not self.scores_file(dataset, arm, seed).is_file()

    def scores_file(self, dataset: str, arm: str, seed: int) -> Path:
        """Where the test scores of a run are kept."""
        return self.arguments.work_dir / "scores" / dataset / f"{arm}-{seed}.npz"

    def append(
        self, data: Data, arm: str, seed: int, scored: dict[str, list[StepScores]], config: Options, seconds: float
    ) -> None:
        """Measure test scores, keep them, and write the row."""
        threshold = choose_threshold(scored["validation"], data.splits["validation"], aggregation=HARD[data.rule])
        test = data.splits["test"]
        found = measure(scored["test"], test, threshold)
        file = self.scores_file(data.name, arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        lengths = [len(bag.step_spans) for bag in test]
        np.savez(file, scores=np.concatenate([result.step_scores for result in scored["test"]]), lengths=lengths)
        counts: Options = {"train_bags": len(data.splits["train"]), "test_bags": len(test)}
        if "reference_model" in config:  # a path, which is another one on every machine
            counts["reference_model"] = "shipped policy"
        self.results.append(
            benchmark="disaggregation", arm=arm, dataset=data.name, seed=seed, split="test", metrics=found,
            config={"scorer": data.scorer, **config, **counts}, seconds=seconds,
        )  # fmt: skip
        print(f"{data.name} {arm} {seed}: within-bag AUC {found['within_bag_auc']:.3f} ({seconds:.0f} s)", flush=True)


def selection(data: Data, scored: Sequence[StepScores], *, by_steps: bool) -> float:
    """What configurations are chosen by: response labels, or step labels for the ceiling; more is better."""
    bags = data.splits["validation"]
    if by_steps:
        steps, labels = [result.step_scores for result in scored], [gold(bag) for bag in bags]
        if data.num_grades is not None:
            return -metrics.absolute_error_of(np.concatenate(steps), np.concatenate(labels)).value
        return metrics.step_auc(steps, labels)
    return response_value([result.score for result in scored], bags)


def measure(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> dict[str, float]:
    """Metrics of test scores, with the bootstrap interval of the headline."""
    found = evaluate_scores(scored, bags, threshold)
    steps, labels = [result.step_scores for result in scored], [gold(bag) for bag in bags]
    if "step_mae" in found:
        # A share of the highest grade is not a probability, and these grades go from right to wrong.
        for name in ("first_error_accuracy", "all_correct_accuracy", "f1", "bag_ece", "bag_accuracy"):
            del found[name]
    else:
        known = np.concatenate(labels)
        flat = np.concatenate(steps)[~np.isnan(known)]
        found["ece"] = metrics.expected_calibration_error(flat, known[~np.isnan(known)])
    found["same_position_auc"] = metrics.same_position_auc(steps, labels)
    aucs = metrics.bag_aucs(steps, labels)
    aucs = aucs[~np.isnan(aucs)]
    mean = Measurement(len(aucs), {"auc": metrics.mean_of(aucs)})
    interval = estimates(mean, draws=DRAWS)["auc"]
    return found | {
        "mixed_bags": len(aucs),
        "within_bag_auc_low": interval.low,
        "within_bag_auc_high": interval.high,
    }


def units(bench: Disaggregation, datasets: Sequence[str], wanted: Sequence[str] | None) -> list[Unit]:
    """All units of data sets, in an order in which a process keeps its data set for a while."""
    found = []
    for name in datasets:
        data = bench.data(name)
        names = ["floor_copy", "floor_overlap", "floor_position", "floor_length", "floor_random", "floor_cosine"]
        if data.num_grades is not None:
            names.append("floor_constant")  # an error needs a constant as reference, as an AUC has 0.5
        names += [*arms(data), "chosen", *(["implicit"] if data.scorer == "likelihood" else [])]
        found += [Unit(name, arm) for arm in names if wanted is None or arm in wanted]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-dir", default=os.environ.get("FRACTAL_RM_DATA"), type=Path, help="folder of the sets")
    parser.add_argument("--work-dir", default="runs/disaggregation", type=Path, help="embeddings and test scores")
    parser.add_argument("--results", default=RESULTS / "disaggregation.jsonl", type=Path)
    parser.add_argument("--encoder", default=default_encoder(), help="a sentence-transformers model")
    parser.add_argument("--datasets", nargs="+", default=list(LOADERS), choices=list(LOADERS))
    parser.add_argument("--arms", nargs="+", default=None, help="default: all")
    parser.add_argument("--skip-derived", action="store_true", help="leave out arms that have no trials of their own")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--smoke", action="store_true", help="one trial, one seed, two steps on a few responses")
    parser.add_argument("--gains", action="store_true", help="only compare the scores that are there")
    arguments = parser.parse_args(argv)
    if arguments.data_dir is None and arguments.datasets != ["arithmetic"]:
        parser.error("where is the data? Give --data-dir, set FRACTAL_RM_DATA, or choose --datasets arithmetic")
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Disaggregation(arguments)
    if not arguments.gains:
        waiting = units(bench, arguments.datasets, arguments.arms)
        run_units(bench.run, waiting, arguments.jobs)
    write_gains(bench.data, arguments.datasets, arguments.work_dir / "scores", arguments.results)


if __name__ == "__main__":
    sys.exit(main())
