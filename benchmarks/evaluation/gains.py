"""What benchmarks measure beyond `fractal_rm.evaluation.statistics`: gains with their intervals."""

import math
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from fractal_rm.data.bag import Bag
from fractal_rm.evaluation import statistics as metrics
from fractal_rm.reward_model import StepScores

DRAWS = 1000


def gold(bag: Bag) -> np.ndarray:
    """Gold step labels, NaN where unknown."""
    return np.array([math.nan if label is None else label for label in bag.step_labels or [None] * len(bag.steps)])


def same_position_auc(rows: np.ndarray) -> float:
    """`same_position_auc` of rows of step scores, then gold labels, each half padded with NaN."""
    scores, labels = np.split(rows, 2, axis=1)
    real = ~np.isnan(scores)
    return metrics.same_position_auc(
        [row[kept] for row, kept in zip(scores, real, strict=True)],
        [row[kept] for row, kept in zip(labels, real, strict=True)],
    )


def response_auc(rows: np.ndarray) -> float:
    """AUC of rows of response score and response label."""
    return float(roc_auc_score(rows[:, 1] >= metrics.GOOD, rows[:, 0]))


def f1(rows: np.ndarray) -> float:
    """F1 of rows of hits: on responses with an error, on responses without one."""
    wrong, right = np.nanmean(rows, axis=0)
    return float(2 * wrong * right / (wrong + right)) if wrong + right else 0.0


def step_rows(scored: Sequence[StepScores], bags: Sequence[Bag]) -> np.ndarray:
    """Rows for [`same_position_auc`]."""
    width = max(len(bag.steps) for bag in bags)
    rows = np.full((len(bags), 2 * width), np.nan)
    for row, result, bag in zip(rows, scored, bags, strict=True):
        row[: len(result.steps)] = result.step_scores
        row[width : width + len(result.steps)] = gold(bag)[: len(result.steps)]
    return rows


def intervals(
    scored: Sequence[StepScores], rival: Sequence[StepScores], bags: Sequence[Bag], thresholds: tuple[float, float]
) -> dict[str, float]:
    """Gains with paired bootstrap intervals over responses.

    Those of `bag_auc` and `f1` are over a rival, those of `within_bag_auc` and `same_position_auc` over chance.
    """
    kept = [i for i, result in enumerate(scored) if result.error is None]
    pairs = [np.array([[part[i].score, bags[i].label] for i in kept], dtype=float) for part in (scored, rival)]
    found = {"bag_auc": metrics.paired_bootstrap(*pairs, statistic=response_auc, n=DRAWS)}
    if has_gold(bags):
        rows = step_rows(scored, bags)
        chance = np.where(np.arange(rows.shape[1]) < rows.shape[1] // 2, 0 * rows, rows)
        found["same_position_auc"] = metrics.paired_bootstrap(rows, chance, statistic=same_position_auc, n=DRAWS)
        aucs = [
            metrics.within_bag_auc([s.step_scores], [gold(b)[: len(s.steps)]])
            for s, b in zip(scored, bags, strict=True)
        ]
        known = np.array([auc for auc in aucs if not math.isnan(auc)])
        found["within_bag_auc"] = metrics.paired_bootstrap(known, np.full(len(known), 0.5), n=DRAWS)
        hits = [hit_rows(part, bags, threshold) for part, threshold in zip((scored, rival), thresholds, strict=True)]
        found["f1"] = metrics.paired_bootstrap(*hits, statistic=f1, n=DRAWS)
    values = [value for result in found.values() for value in (result.difference, result.low, result.high)]
    return dict(zip(gain_columns(*found), values, strict=True))


def gain_columns(*names: str) -> tuple[str, ...]:
    """What [`intervals`] calls the gain in a metric and the ends of its interval."""
    return tuple(f"{name}_gain{end}" for name in names for end in ("", "_low", "_high"))


def hit_rows(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> np.ndarray:
    """Rows for [`f1`]; a step that was not scored counts as not called wrong, as in `evaluate_scores`."""
    rows = []
    for result, bag in zip(scored, bags, strict=True):
        values = [*result.step_scores, *[1.0] * (len(bag.steps) - len(result.steps))]
        found = metrics.values_of(metrics.first_error_statistics([values], [gold(bag)], threshold))
        rows.append([found["first_error_accuracy"], found["all_correct_accuracy"]])
    return np.array(rows)


def has_gold(bags: Sequence[Bag]) -> bool:
    """Whether people marked steps."""
    return any(label is not None for bag in bags for label in bag.step_labels or ())
