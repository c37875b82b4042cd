"""Judging a model on labelled responses: metrics of `evaluate_scores` and calibration, as statistics."""

from collections.abc import Sequence

import numpy as np

from fractal_rm.data.bag import Bag
from fractal_rm.evaluation import metrics
from fractal_rm.evaluation.evaluate import evaluate_scores, gold_labels, padded_scores, response_labels
from fractal_rm.evaluation.intervals import Judgement, Statistic, auc_of, harmonic_mean_of, mean_of, ratio_of
from fractal_rm.evaluation.reliability import (
    as_points,
    aurc_of,
    brier_of,
    ece_of,
    reliability_curve,
    risk_coverage_curve,
)
from fractal_rm.objectives.aggregation import GOOD
from fractal_rm.reward_model import StepScores

_COUNTS = ("responses", "unscored", "truncated", "threshold")


def judge_responses(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> Judgement:
    """What scores are worth on labelled responses.

    Args:
        scored: Scores of each bag.
        bags: The bags: labels, and gold step labels where they are known.
        threshold: A step that scores below it is called wrong.

    Returns:
        The metrics of [`~fractal_rm.evaluation.evaluate.evaluate_scores`] by the same names and rules; `bag_brier`,
        and `bag_aurc` (area under risk against coverage); where gold step labels are known also `step_brier` and
        `step_ece`. Curves: `reliability`, `risk_coverage` and, of steps, `step_reliability`.
    """
    found = evaluate_scores(scored, bags, threshold)
    counts = {name: found[name] for name in _COUNTS if name in found}
    probs, labels = np.array([result.score for result in scored], dtype=float), np.array(response_labels(bags))
    hits = np.where(np.isnan(probs) | np.isnan(labels), np.nan, (probs >= GOOD) == (labels >= GOOD))
    statistics: dict[str, Statistic] = {
        "bag_auc": auc_of(list(probs), list(np.where(np.isnan(probs), np.nan, labels))),
        "bag_accuracy": mean_of(hits),
        "bag_ece": ece_of(probs, labels),
        "bag_brier": brier_of(probs, labels),
        "bag_aurc": aurc_of(probs, labels),
    }
    curves = {
        "reliability": as_points(reliability_curve(probs, labels)),
        "risk_coverage": as_points(risk_coverage_curve(probs, labels)),
    }
    if "bag_mae" in found:
        statistics["bag_mae"] = mean_of(_highest(bags) * np.abs(probs - labels))
    if "pair_accuracy" in found:
        counts["pair_accuracy"] = found["pair_accuracy"]
    if "step_auc" in found:
        statistics |= step_statistics(scored, bags) | _first_errors(scored, bags, threshold)
        scores, gold = (np.concatenate(rows) for rows in known_steps(scored, bags))
        curves["step_reliability"] = as_points(reliability_curve(scores, gold))
    return Judgement(len(bags), statistics, counts, curves)


def known_steps(scored: Sequence[StepScores], bags: Sequence[Bag]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores and gold labels of the steps that were scored, for each response."""
    scores = [np.array(result.step_scores, dtype=float) for result in scored]
    return scores, [gold_labels(bag)[: len(row)] for bag, row in zip(bags, scores, strict=True)]


def step_statistics(scored: Sequence[StepScores], bags: Sequence[Bag]) -> dict[str, Statistic]:
    """How well steps are ranked and how honest their probabilities are; steps that were not scored stay out."""
    scores, gold = known_steps(scored, bags)
    owners = np.repeat(np.arange(len(bags)), [len(row) for row in scores])
    # A response counts in means over steps as its sum and its number of steps.
    squares = [float(np.nansum((row - labels) ** 2)) for row, labels in zip(scores, gold, strict=True)]
    errors = [_highest(bags) * float(np.nansum(np.abs(row - of))) for row, of in zip(scores, gold, strict=True)]
    sizes = [float(np.count_nonzero(~np.isnan(labels))) for labels in gold]
    graded = {"step_mae": ratio_of(errors, sizes)} if any(bag.num_grades for bag in bags) else {}
    return graded | {
        "step_auc": auc_of(scores, gold),
        "within_bag_auc": mean_of(metrics.bag_aucs(scores, gold)),
        "step_brier": ratio_of(squares, sizes),
        "step_ece": ece_of(np.concatenate(scores), np.concatenate(gold), owners),
    }


def _highest(bags: Sequence[Bag]) -> int:
    """The highest grade that labels can have."""
    return max(bag.num_grades or 2 for bag in bags) - 1


def _first_errors(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> dict[str, Statistic]:
    wrong, right = [], []
    for result, bag in zip(scored, bags, strict=True):
        gold = gold_labels(bag)
        hit = metrics.first_error_accuracy([padded_scores(result, gold)], [gold], threshold)
        wrong.append(hit["first_error_accuracy"])
        right.append(hit["all_correct_accuracy"])
    first, all_correct = mean_of(wrong), mean_of(right)
    return {
        "first_error_accuracy": first,
        "all_correct_accuracy": all_correct,
        "f1": harmonic_mean_of(first, all_correct),
    }
