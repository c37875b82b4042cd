"""Question: what does a reward model trained on answers only know about the steps of a real language model?

It is evaluated on samples of its policy (`fractal-rm sample --gold_steps true`): within-bag AUC and the first wrong
step against the floors, best-of-n against the majority. The first floor is the policy's log-likelihood: a reward model
has to know more than the policy.

    python -m benchmarks.evidence.words_reward_models --validation runs/words/solutions/validation.jsonl \
        --data gsm_symbolic=runs/words/held_out.jsonl gsm_symbolic_unseen=runs/words/held_out_unseen.jsonl \
        --policy runs/words/policy/model --models fractal=runs/words/reward_model

One row per arm and data set goes to `benchmarks/results/words.jsonl`. Thresholds are chosen on the validation responses
by their labels; `..._over_majority` and `..._over_likelihood` are paired differences. Intervals are bootstraps over
prompts.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.floors import Rule, at_random, few_new_words, position, score_by, short
from benchmarks.common.places import RESULTS
from fractal_rm.cli.sample import read_rows_of
from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import Questions, measure_best_of_n, read_questions
from fractal_rm.evaluation.intervals import Measurement, as_columns, differences, estimates
from fractal_rm.evaluation.responses import choose_threshold, known_steps, score_bags
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import (
    Statistic,
    auc_of,
    bag_aucs,
    first_error_hits,
    mean_of,
    ratio_of,
    same_position_auc,
)
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import load_model, load_tokenizer, make_scorer
from fractal_rm.scorers.settings import FractalSettings

SAMPLES = 8
LIKELIHOOD, MAJORITY = "untrained_likelihood", "majority"
# Rules that learn nothing. Labels end at the first wrong line, so "early is good" ranks every bag correctly: compare
# with this rule only by the first error and by pairs at the same position.
FLOORS: dict[str, Rule] = {
    "floor_random": at_random(0),
    "floor_position": position,
    "floor_length": short,
    "floor_few_new_words": few_new_words,
}


def untrained(policy: Path) -> StepRewardModel:
    """The policy's own log-likelihood of each step: weight 1 and offset 0, aggregated as a product."""
    settings = FractalSettings(aggregation="product", segmentation=Segmentation("lines"), max_length=320)
    model, _ = load_model(policy, settings, dtype=torch.bfloat16)
    return StepRewardModel(make_scorer(model, settings).eval(), load_tokenizer(policy), settings)


def judge(scored: Sequence[StepScores], questions: Questions, threshold: float) -> Measurement:
    """Metrics of one arm; the items are prompts.

    Args:
        scored: Scores of each solution.
        questions: The solutions, with gold step labels.
        threshold: A step that scores below it is called wrong.

    Returns:
        `within_bag_auc`, `step_auc`, `bag_auc`, `within_prompt_auc` (the same among responses to one prompt: knowing
        which prompts are easy does not help), `first_error_accuracy`, and `best_of_8` by the model's own aggregation;
        `best_of_8_min`, `_product`, `_mean`, `_last` by other readings of the steps. In the counts
        `same_position_auc`, which has no interval over prompts.
    """
    groups, right = questions.groups, questions.right
    steps, gold = known_steps(scored, questions.bags)
    hits, wrong = first_error_hits(steps, gold, threshold)
    best = measure_best_of_n(scored, questions).statistics
    responses = np.array([0.0 if np.isnan(one.score) else one.score for one in scored])
    statistics = {
        "within_bag_auc": _mean_over_bags(bag_aucs(steps, gold), groups),
        "step_auc": auc_of(_joined(steps, groups), _joined(gold, groups)),
        "bag_auc": auc_of([responses[group] for group in groups], [right[group] for group in groups]),
        "within_prompt_auc": mean_of(
            bag_aucs([responses[group] for group in groups], [right[group] for group in groups])
        ),
        "first_error_accuracy": _mean_over_bags(np.where(wrong, hits, np.nan), groups),
        "best_of_8": best[f"own@{SAMPLES}"],
        **{f"best_of_8_{name}": best[f"{name}@{SAMPLES}"] for name in ("min", "product", "mean", "last")},
    }
    counts = {
        "prompts": len(groups),
        "responses": len(scored),
        "unscored": sum(np.isnan(one.score) for one in scored),
        "mixed_bags": int((~np.isnan(bag_aucs(steps, gold))).sum()),
        "same_position_auc": same_position_auc(steps, gold),
        "threshold": threshold,
    }
    return Measurement(len(groups), statistics, counts)


def _mean_over_bags(values: np.ndarray, groups: Sequence[Sequence[int]]) -> Statistic:
    """Mean of the known values of bags (N,), weighted by prompts."""
    known = [values[group][~np.isnan(values[group])] for group in groups]
    return ratio_of([one.sum() for one in known], [len(one) for one in known])


def _joined(rows: Sequence[np.ndarray], groups: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The steps of all bags of a prompt in one row."""
    return [np.concatenate([rows[i] for i in group]) for group in groups]


def policy_level(questions: Questions) -> Measurement:
    """What needs no scores: `accuracy`, `majority_8`, `pass_8`."""
    best = measure_best_of_n(score_by(lambda bag: [0.5] * len(bag.steps), questions.bags), questions).statistics
    names = {"accuracy": f"own@{SAMPLES}", "majority_8": f"majority@{SAMPLES}", "pass_8": f"pass@{SAMPLES}"}
    return Measurement(len(questions.groups), {name: best[found] for name, found in names.items()})


def comparisons(measured: Measurement, policy: Measurement, rival: Measurement | None) -> dict[str, float]:
    """Paired differences: of best-of-n to the majority, and of all metrics to the untrained likelihood."""
    vote = Measurement(policy.items, {"gain": policy.statistics["majority_8"]})
    best = Measurement(measured.items, {"gain": measured.statistics["best_of_8"]})
    found = {"best_of_8_over_majority": differences(best, vote)["gain"]}
    if rival is not None:
        compared = ("within_bag_auc", "bag_auc", "within_prompt_auc", "first_error_accuracy", "best_of_8")
        statistics = {name: measured.statistics[name] for name in compared}
        gains = differences(replace(measured, statistics=statistics), rival)
        found |= {f"{name}_over_likelihood": gain for name, gain in gains.items()}
    return as_columns(found)


def read(path: Path) -> Questions:
    """Questions of a file of `fractal-rm sample`.

    Raises:
        ValueError: If a prompt has too few responses, or there are no step labels.
    """
    rows = read_rows_of(path)
    if not rows or not all("step_labels" in row for row in rows):
        raise ValueError(f"{path} has no step labels. Sample with `--gold_steps true`.")
    found = read_questions(rows, Segmentation("lines"), source=str(path))
    return replace(found, answers=[row["answer"] for row in rows])  # also if no response states one


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--validation", type=Path, required=True, help="responses that thresholds are chosen on")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE", help="responses with step labels")
    parser.add_argument("--policy", type=Path, required=True, help="whose likelihood is the floor")
    parser.add_argument("--models", nargs="*", default=[], metavar="ARM=FOLDER", help="reward models")
    parser.add_argument("--split", default="held_out", help="what the rows say of the data")
    parser.add_argument("--results", type=Path, default=RESULTS / "words.jsonl")
    arguments = parser.parse_args(argv)
    results, validation = ResultsFile(arguments.results), read(arguments.validation)
    data = {name: read(Path(path)) for name, _, path in (one.partition("=") for one in arguments.data)}
    rivals: dict[str, Measurement] = {}

    def report(arm: str, score: Callable[[Sequence[Bag]], list[StepScores]], config: Mapping[str, Any]) -> None:
        threshold = choose_threshold(score(validation.bags), validation.bags, aggregation="product")
        for name, questions in data.items():
            start = time.monotonic()
            measured, policy = judge(score(questions.bags), questions, threshold), policy_level(questions)
            rival = rivals.get(name)
            if arm == LIKELIHOOD:
                rivals[name] = measured
            found = {**as_columns(estimates(measured)), **comparisons(measured, policy, rival), **measured.counts}
            found |= as_columns(estimates(policy))
            results.append(
                benchmark="words", arm=arm, dataset=name, seed=0, split=arguments.split, metrics=found, config=config,
                seconds=time.monotonic() - start,
            )  # fmt: skip
            shown = ("within_bag_auc", "first_error_accuracy", "bag_auc", "best_of_8", "majority_8")
            print(f"{name} {arm}: " + ", ".join(f"{metric} {found[metric]:.3f}" for metric in shown), flush=True)

    floor = untrained(arguments.policy)
    report(LIKELIHOOD, lambda bags: score_bags(floor, bags), {"policy": arguments.policy})
    for name, rule in FLOORS.items():
        report(name, lambda bags, rule=rule: score_by(rule, bags), {})
    for arm, _, folder in (one.partition("=") for one in arguments.models):
        model = StepRewardModel.from_pretrained(folder, dtype=torch.bfloat16)
        settings = model.settings
        config = {"scorer": settings.scorer, "aggregation": settings.aggregation, "folder": Path(folder)}
        report(arm, lambda bags, model=model: score_bags(model, bags), config)


if __name__ == "__main__":
    main()
