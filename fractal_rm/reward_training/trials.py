"""Chooses the configuration that suits the data: tries a small list and compares them by held-out response labels.

Step labels are never used. The benchmark of docs/disaggregation.md also chooses with [`run_trials`] and [`best`].
"""

import hashlib
import itertools
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.evaluation.intervals import Measurement, differences
from fractal_rm.evaluation.responses import pairs_of, response_labels
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import Statistic, absolute_error_of, auc_of, mean_of
from fractal_rm.objectives.aggregation import GOOD, Aggregation, Meaning, meaning
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import fingerprint

Options = dict[str, Any]
# The paper's aggregation for the plain bag loss, and the one whose gradient reaches every step.
HARD: dict[Meaning, Aggregation] = {"min": "min", "max": "max", "mean": "mean"}
SOFT: dict[Meaning, Aggregation] = {"min": "product", "max": "noisy_or", "mean": "mean"}
# Options that trials set, so a configuration must not.
_SEARCHED = ("cosine_prior_weight", "correlation_prior_weight", "likelihood_prior_weight", "pseudo_labels")
_PRIOR_WEIGHT = 0.1
# Factors of learning rates and epochs in the second half of the list, as in the benchmark.
_SLOWER, _LONGER = 0.3, 2
_PACE = ("learning_rate", "head_learning_rate", "num_train_epochs", "max_steps")
# Twice the number of responses of the rarer label (or preferences, or grades) from which validation data suffices: the
# standard error of an AUC of .75 is .05 there (Hanley and McNeil, Radiology 143, 1982).
ENOUGH = 100
FOLDS = 5
# Minimum number of responses of each label in a fold.
_IN_A_FOLD = 2
# File with the rows of trials, in the model's folder.
TRIALS_FILE = "trials.jsonl"
# Options that switch off logging and checkpoints in a trial.
QUIET: Options = {
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "disable_tqdm": True,
}
# Options that do not affect what is learned: a resumed run may change them.
_BESIDE = {*QUIET, "output_dir", "run_name", "resume_from_checkpoint", "logging_dir"}


class Attempt(NamedTuple):
    """Result of a trial: its value (higher is better), and the scores of the responses that it was evaluated on."""

    value: float
    scores: Sequence[float] = ()


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried: its number from 0, what it changes, and its result."""

    number: int
    options: Options
    value: float
    scores: Sequence[float] = ()
    seconds: float = 0.0

    @property
    def changes(self) -> str:
        """What it changes, in the syntax of a configuration file."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


# Configurations -------------------------------------------------------------------------------------------------------


def trial_options(args: FractalConfig, *, preferences: bool = False) -> list[Options]:
    """The list: the plain bag loss, its soft form, the paper's combination and ours, each at two training lengths.

    The first is the plain bag loss with the configured learning rates and epochs. The mean and grades have no soft
    form: there, the second is the bag loss with priors.

    Args:
        args: Gives the meaning of labels, learning rates and epochs. Options that trials do not set stay unchanged.
        preferences: Whether the data has preferences, which only have hard pseudo-labels.
    """
    rule = meaning(args.aggregation)
    hard, soft = {"aggregation": HARD[rule]}, {"aggregation": SOFT[rule]}
    if args.num_grades is not None:
        hard = soft = {"aggregation": "max"}
    priors: Options = {}
    if args.scorer == "embedding" or args.prior_encoder is not None:
        priors = {"cosine_prior_weight": _PRIOR_WEIGHT, "correlation_prior_weight": _PRIOR_WEIGHT}
    elif args.scorer == "likelihood" or args.reference_model is not None:
        priors = {"likelihood_prior_weight": _PRIOR_WEIGHT}
    fading = {**priors, "prior_schedule": "linear"} if priors else {}
    kind = "hard" if preferences or args.num_grades is not None else "soft"
    going_on = {"pseudo_labels": kind, "pseudo_bag_weight": 1.0, "pseudo_start": "warm"}
    variants = [
        hard,
        soft if soft != hard else {**hard, **priors},
        {**hard, **priors, "pseudo_labels": "hard"},
        {**soft, **fading, **going_on},
    ]
    rates = {"learning_rate": args.learning_rate, "head_learning_rate": args.head_learning_rate}
    slower: Options = {name: _SLOWER * rate for name, rate in rates.items() if rate is not None}
    slower["num_train_epochs"] = _LONGER * args.num_train_epochs
    if args.max_steps > 0:
        slower["max_steps"] = _LONGER * args.max_steps
    found: list[Options] = []
    for options in ({**variant, **pace} for pace in ({}, slower) for variant in variants):
        if options not in found:  # without a soft form and priors, the second equals the first
            found.append(options)
    return found


# Criterion ------------------------------------------------------------------------------------------------------------


def response_statistic(scores: Sequence[float], bags: Sequence[Bag], folds: Sequence[int] | None = None) -> Statistic:
    """The criterion for choosing a configuration: how well scores fit response labels; higher is better.

    The AUC of responses, the share of preferences whose chosen response scores higher, or the negated absolute error of
    grades. With both labels and preferences, it is the mean of both, weighted by their numbers. Responses without a
    score or a label are left out. Gold step labels are not read.

    Args:
        scores: Score of each response (N,).
        bags: The responses.
        folds: Which model scored each response: scores are compared within one model. None: all by one model.
    """
    found, fold = np.array(scores, dtype=float), np.array([0] * len(bags) if folds is None else folds)
    labels = np.where(np.isnan(found), np.nan, response_labels(bags))
    if any(bag.num_grades is not None for bag in bags):
        error = absolute_error_of(found, labels)
        return Statistic(len(bags), lambda weights: -error(weights))
    paired, hits = np.array([bag.pair_id is not None for bag in bags]), np.full(len(bags), np.nan)
    for better, worse in pairs_of(bags):
        hits[better] = float(found[better] > found[worse])
    parts = [
        (auc_of(found, np.where((fold == one) & ~paired, labels, np.nan)), int(((fold == one) & ~paired).sum()))
        for one in np.unique(fold[~paired])
    ]
    if paired.any():
        parts.append((mean_of(hits), int(paired.sum())))
    counts = np.array([count for _, count in parts], dtype=float)

    def mean(weights: np.ndarray) -> np.ndarray:
        values = np.array([part(weights) for part, _ in parts])  # (parts, D)
        known = ~np.isnan(values) * counts[:, None]
        total = known.sum(axis=0)
        return np.divide(np.nansum(values * known, axis=0), total, out=np.full(len(total), np.nan), where=total > 0)

    return Statistic(len(bags), mean)


def response_score(scored: StepScores, args: FractalConfig) -> float:
    """A response's score by the plain bag loss's aggregation of the step scores, whatever a trial was trained with.

    Read by its own soft aggregation, a trial can rank responses better while it ranks their steps worse.

    Args:
        scored: Step scores of the trial's model.
        args: The trial's configuration: what labels mean.
    """
    if args.num_grades is not None or not scored.steps:
        return scored.score
    rules: dict[Meaning, Callable[[list[float]], float]] = {"min": min, "max": max, "mean": statistics.fmean}
    return rules[meaning(args.aggregation)](scored.step_scores)


def response_value(scores: Sequence[float], bags: Sequence[Bag]) -> float:
    """Value of [`response_statistic`].

    Example:
        >>> bags = [Bag("2+2?", "4", ((0, 1),), label=1.0), Bag("2+2?", "5", ((0, 1),), label=0.0)]
        >>> response_value([0.9, 0.2], bags), response_value([0.2, 0.2], bags)
        (1.0, 0.5)
    """
    return response_statistic(scores, bags).value


def _evidence(bags: Sequence[Bag]) -> int:
    """Number of responses that can compare configurations: for labels, twice the rarer label."""
    if any(bag.num_grades is not None for bag in bags):
        return len(bags)
    good, bad = _counts(bags)
    return 2 * min(good, bad) + len(pairs_of(bags))


def _counts(bags: Sequence[Bag]) -> tuple[int, int]:
    """Numbers of good and of bad responses with single labels."""
    labels = [bag.label for bag in bags if bag.pair_id is None and bag.label is not None]
    good = sum(label >= GOOD for label in labels)
    return good, len(labels) - good


@dataclass(frozen=True)
class Judge:
    """The responses that configurations are evaluated on.

    Args:
        bags: The responses, in the order of their scores.
        folds: Fold of each, if several models score them; None: one model, trained on `train`.
        train: What to train on, if there are no folds.
    """

    bags: list[Bag]
    folds: list[int] | None
    train: list[Bag]

    @property
    def splits(self) -> list[tuple[list[Bag], list[int]]]:
        """For each model its training data, and the rows of `bags` that it scores."""
        if self.folds is None:
            return [(self.train, list(range(len(self.bags))))]
        rows = [[row for row, fold in enumerate(self.folds) if fold == one] for one in range(FOLDS)]
        return [
            ([bag for bag, fold in zip(self.bags, self.folds, strict=True) if fold != one], held)
            for one, held in enumerate(rows)
        ]

    @property
    def description(self) -> str:
        """A description in words."""
        if self.folds is None:
            return f"response labels of {len(self.bags)} responses of the validation data"
        return f"response labels of {len(self.bags)} responses, {FOLDS}-fold cross-validated by prompt"


def make_judge(train: Sequence[Bag], validation: Sequence[Bag] | None, *, seed: int) -> Judge:
    """Evaluate on validation data or, if there is little, by cross-validation on all data.

    Raises:
        ValueError: If all labels are equal, or there are too few responses for folds.
    """
    held_out = list(validation or [])
    if _evidence(held_out) >= ENOUGH:
        return Judge(held_out, None, list(train))
    bags = [*train, *held_out]
    good, bad = _counts(bags)
    graded, pairs = any(bag.num_grades is not None for bag in bags), len(pairs_of(bags))
    if graded and len({bag.label for bag in bags}) == 1:
        raise ValueError(
            f"All {len(bags)} responses have the same grade, so configurations cannot be compared. Add responses with "
            "other grades."
        )
    if not graded and not pairs and not (good and bad):
        kind = "good" if good else "bad"
        raise ValueError(
            f"All {len(bags)} responses are {kind}, so configurations cannot be compared. Add responses with the "
            "other label, or leave `trials` out."
        )
    folds = make_folds(bags, seed=seed)
    for one in range(FOLDS):
        part = [bag for bag, fold in zip(bags, folds, strict=True) if fold == one]
        if _evidence(part) < 2 * _IN_A_FOLD:
            prompts = len({str(bag.prompt) for bag in bags})
            raise ValueError(
                f"Too few labels to choose by: {len(bags)} responses to {prompts} prompts ({good} good, {bad} bad, "
                f"{pairs} preferences) do not fill {FOLDS} folds with {_IN_A_FOLD} of each label. Give validation data "
                f"with {ENOUGH // 2} good and {ENOUGH // 2} bad responses, more rows, or leave `trials` out."
            )
    return Judge(bags, folds, list(train))


def make_folds(bags: Sequence[Bag], *, seed: int) -> list[int]:
    """Fold of each response: responses to one prompt share a fold, and every fold gets its share of each label."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, bag in enumerate(bags):
        groups[json.dumps(bag.prompt)].append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)  # large groups first; small ones balance the folds
    kinds = sorted({(bag.pair_id is not None, (bag.label or 0.0) >= GOOD) for bag in bags})
    filled, folds = np.zeros((FOLDS, len(kinds))), [0] * len(bags)
    for rows in order:
        keys = [(bags[row].pair_id is not None, (bags[row].label or 0.0) >= GOOD) for row in rows]
        counts = np.array([keys.count(kind) for kind in kinds], dtype=float)
        # The fold with the least of the group's labels.
        one = min(range(FOLDS), key=lambda fold: (filled[fold] @ counts, filled[fold].sum(), fold))
        filled[one] += counts
        for row in rows:
            folds[row] = one
    return folds


# Trying and choosing --------------------------------------------------------------------------------------------------


def run_trials(
    candidates: Sequence[Options],
    attempt: Callable[[Options], Attempt],
    results: ResultsFile,
    *,
    benchmark: str,
    arm: str,
    dataset: str,
    seed: int,
    of: str | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Try candidates in sequence; candidates that already have a row are not repeated.

    Args:
        candidates: What each candidate changes in a configuration.
        attempt: Trains with these options, and evaluates.
        results: Gets one row per candidate, with the split `validation`.
        benchmark: Field of the row.
        arm: Field of the row.
        dataset: Field of the row.
        seed: Field of the row.
        of: Fingerprint of what candidates have in common; rows with another fingerprint are ignored.
        on_trial: Called after each trial, also for one that already had a row.
    """
    place: Options = {"benchmark": benchmark, "arm": arm, "dataset": dataset, "split": "validation"}
    known: dict[Any, Mapping[str, Any]] = {}
    for row in results.rows():
        if all(row[name] == value for name, value in place.items()) and row["config"].get("of") == of:
            known.setdefault(row["config"]["trial"], row)
    trials = []
    for number, options in enumerate(candidates):
        row = known.get(number)
        if row is None:
            start = time.monotonic()
            value, scores = attempt(options)
            metrics = {"selection": value} | ({"scores": list(scores)} if scores else {})
            config = {"trial": number, **options} | ({} if of is None else {"of": of})
            seconds = time.monotonic() - start
            row = results.append(**place, seed=seed, metrics=metrics, config=config, seconds=seconds)
        value, scores = row["metrics"]["selection"], row["metrics"].get("scores", [])
        scores = [math.nan if score is None else score for score in scores]
        trials.append(Trial(number, options, -math.inf if value is None else value, scores, row["seconds"]))
        if on_trial is not None:
            on_trial(trials[-1])
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest value; the first one in a tie."""
    return max(trials, key=lambda trial: trial.value)


@dataclass(frozen=True)
class Choice:
    """The configurations that were tried, the chosen one, and the responses they were evaluated on."""

    trials: Sequence[Trial]
    chosen: Trial
    judge: Judge

    @property
    def text(self) -> str:
        """Text for the model card."""
        lines = "\n".join(
            f"| {trial.number + 1} | {trial.changes} | {trial.value:.4g} | {'yes' if trial is self.chosen else ''} |"
            for trial in self.trials
        )
        return (
            f"Trial {self.chosen.number + 1} of {len(self.trials)}, by {self.judge.description}. The best trial of the "
            "plain bag loss stays, unless the 95 % interval of another trial's gain over it is above 0.\n\n"
            f"| trial | configuration | value | chosen |\n|---:|---|---:|---|\n{lines}\n"
        )


def best_beyond_noise(trials: Sequence[Trial], judge: Judge) -> Choice:
    """The best trial, if it is better beyond noise than the best one of the plain bag loss; else that one.

    Beyond noise: the 95 % interval of the difference on the same resampled responses (bootstrap) is above 0.
    """
    plain = best([trial for trial in trials if _method(trial) == _method(trials[0])])
    other = best(trials)
    if other is not plain:
        other_one, plain_one = (
            Measurement(len(judge.bags), {"value": response_statistic(trial.scores, judge.bags, judge.folds)})
            for trial in (other, plain)
        )
        if differences(other_one, plain_one)["value"].low > 0:
            return Choice(trials, other, judge)
    return Choice(trials, plain, judge)


def _method(trial: Trial) -> Options:
    """What a trial changes, apart from learning rates and the length of the training."""
    return {name: value for name, value in trial.options.items() if name not in _PACE}


def check_trials(count: int, args: FractalConfig, train: Sequence[Bag], validation: Sequence[Bag] | None) -> Judge:
    """Check the requirements of trials before the first one, and return the responses to evaluate them on.

    Raises:
        ValueError: If there are fewer configurations, the configuration sets what trials vary, or the data cannot
            compare them.
    """
    taken = next((name for name in _SEARCHED if getattr(args, name) not in (0.0, "none")), None)
    if taken is not None:
        raise ValueError(
            f"`{taken}` is {getattr(args, taken)}, but `trials` vary priors and pseudo-labels. Leave one out."
        )
    if args.world_size > 1:
        raise ValueError(
            f"`trials` need a single process, but there are {args.world_size}. Choose in one process, then train the "
            "winner."
        )
    listed = _listed(args, train)
    if not 1 <= count <= len(listed):
        raise ValueError(f"`trials` is {count}, but there are {len(listed)} configurations. Give 1 to {len(listed)}.")
    for options in listed[:count]:
        replace(args, **options)  # raises its own errors
    return make_judge(train, validation, seed=args.seed)


def _listed(args: FractalConfig, train: Sequence[Bag]) -> list[Options]:
    return trial_options(args, preferences=any(bag.pair_id is not None for bag in train))


def try_configurations(
    count: int,
    args: FractalConfig,
    judge: Judge,
    score: Callable[[FractalConfig, list[Bag], list[Bag]], list[float]],
    results: ResultsFile,
    *,
    model: str,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Try the first configurations of the list.

    Args:
        count: How many configurations to try.
        args: The configuration that they change.
        judge: From [`check_trials`].
        score: Trains a model on bags and returns its scores of other bags.
        results: Gets one row per configuration.
        model: Name of the model that training starts from.
        on_trial: Called after each.
    """

    def attempt(options: Options) -> Attempt:
        config, scores = replace(args, **options), [math.nan] * len(judge.bags)
        for train, rows in judge.splits:
            found = score(config, train, [judge.bags[row] for row in rows])
            for row, value in zip(rows, found, strict=True):
                scores[row] = value
        return Attempt(response_statistic(scores, judge.bags, judge.folds).value, scores)

    given = {name: str(value) for name, value in args.to_dict().items() if name not in _BESIDE}
    # Rows of earlier versions do not count: each trial read its scores by its own aggregation.
    reading = "plain aggregation"
    same = [given, model, judge.folds, fingerprint(judge.bags), fingerprint(judge.train), reading]
    of = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    return run_trials(
        list(itertools.islice(_listed(args, judge.train), count)), attempt, results,
        benchmark="trials", arm="trials", dataset=fingerprint(judge.train), seed=args.seed, of=of, on_trial=on_trial,
    )  # fmt: skip
