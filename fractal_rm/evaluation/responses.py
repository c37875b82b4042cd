"""Metrics of a step reward model on labelled responses: for responses, steps, and first wrong steps."""

import math
from collections.abc import Sequence

import numpy as np

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.contradictions import prompt_key
from fractal_rm.evaluation import statistics
from fractal_rm.evaluation.intervals import Measurement
from fractal_rm.evaluation.statistics import Statistic, as_points, reliability_curve
from fractal_rm.objectives.aggregation import GOOD, Aggregation, meaning
from fractal_rm.reward_model import StepRewardModel

# Metrics of `measure_responses` that `evaluate_scores` leaves out.
_ADDED = ("bag_brier", "bag_aurc", "step_brier", "step_ece", "within_prompt_auc")


def score_bags(reward_model: StepRewardModel, bags: Sequence[Bag]) -> list[StepScores]:
    """Scores of bags, with the steps that the bags have."""
    return reward_model.score(
        [bag.prompt for bag in bags], [bag.response for bag in bags], spans=[bag.step_spans for bag in bags]
    )


def choose_threshold(scored: Sequence[StepScores], bags: Sequence[Bag], *, aggregation: Aggregation = "min") -> float:
    """Threshold on a response's lowest, or highest, step score that best separates good from bad responses.

    It needs response labels only; gold step labels are not read. Responses without a label or a score are left out; the
    threshold is NaN if none is left. If the aggregation means that a response is good if some step is, the highest step
    score decides; otherwise the lowest.
    """
    deciding = max if meaning(aggregation) == "max" else min
    rows = zip(scored, response_labels(bags), strict=True)
    known = [(deciding(result.step_scores), label) for result, label in rows if result.steps and not math.isnan(label)]
    return separating_threshold(*np.array(known).reshape(-1, 2).T)


def separating_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The most accurate threshold for predicting "bad" below it (N,); NaN without scores.

    Candidates lie halfway between neighbouring scores and at both ends; in a tie the one nearest to 0.5 is chosen.

    Example:
        >>> separating_threshold(np.array([0.75, 0.25, 0.75]), np.array([1, 0, 1]))
        0.5
    """
    if not len(scores):
        return math.nan
    if not np.isfinite(scores).all():
        raise ValueError("A step has a NaN or infinite score. Leave out responses that were not scored.")
    order = np.argsort(scores)
    scores, good = scores[order], labels[order] >= GOOD
    distinct = np.unique(scores)
    halfway = distinct[:-1] / 2 + distinct[1:] / 2
    candidates = np.concatenate([distinct[:1], halfway, np.nextafter(distinct[-1:], np.inf)])
    below = np.searchsorted(scores, candidates, side="left")
    good_below = np.concatenate([[0], np.cumsum(good)])[below]
    hits = (below - good_below) + (good.sum() - good_below)
    best = candidates[hits == hits.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def evaluate_scores(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> dict[str, float]:
    """Values of [`measure_responses`] for `metrics.json` and model cards; the arguments are the same."""
    values = measure_responses(scored, bags, threshold).values
    return {name: value for name, value in values.items() if name not in _ADDED}


def measure_responses(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> Measurement:
    """Metrics of scores against labels.

    Steps beyond the model's `max_length` have no score. Step metrics leave them out; for the first error they count as
    predicted right, so that truncation does not make a response easier. Response metrics leave out responses without
    any score and count them as `unscored`. Grades count as shares of the highest, as the scores of a model of grades
    do.

    Args:
        scored: Scores of each bag.
        bags: The bags: labels, and gold step labels where known.
        threshold: A step that scores below it is predicted wrong.

    Returns:
        The metrics of [`~fractal_rm.evaluation.statistics.bag_statistics`], `bag_brier`, `bag_aurc` (area under risk
        against coverage) and, of grades, `bag_mae`. If any gold step label is known also the metrics of
        [`~fractal_rm.evaluation.statistics.step_statistics`] and
        [`~fractal_rm.evaluation.statistics.first_error_statistics`], `step_brier`, `step_ece` and, of grades,
        `step_mae`. The two absolute errors are in grades. Counts: `responses`, `unscored`, `truncated`, `threshold`,
        `within_prompt_auc` (AUC of responses to the same prompt, averaged over the prompts that have good and bad ones)
        and `pair_accuracy` of preferences (the share whose chosen response scores higher). Curves: `reliability`,
        `risk_coverage` and, of steps, `step_reliability`.
    """
    probs = np.array([result.score for result in scored], dtype=float)
    unscored = np.isnan(probs)
    labels = np.where(unscored, np.nan, response_labels(bags))
    highest = max((bag.num_grades or 0 for bag in bags), default=0) - 1
    counts: dict[str, float] = {
        "responses": len(bags),
        "unscored": int(unscored.sum()),
        "truncated": sum(result.truncated_steps > 0 for result in scored),
    }
    metrics: dict[str, Statistic] = {
        **statistics.bag_statistics(probs, labels),
        "bag_brier": statistics.brier_of(probs, labels),
        "bag_aurc": statistics.aurc_of(probs, labels),
    }
    curves = {
        "reliability": as_points(reliability_curve(probs, labels)),
        "risk_coverage": as_points(statistics.risk_coverage_curve(probs, labels)),
    }
    if highest > 0:
        metrics["bag_mae"] = statistics.absolute_error_of(highest * probs, highest * labels)
    pairs = pairs_of(bags)
    if pairs:  # an unscored response is never better
        counts["pair_accuracy"] = sum(scored[a].score > scored[b].score for a, b in pairs) / len(pairs)
    within = _within_prompts(probs, labels, bags)
    if within is not None and not pairs:
        counts["within_prompt_auc"] = within
    gold = [gold_labels(bag) for bag in bags]
    if any(not np.isnan(row).all() for row in gold):
        counts["threshold"] = threshold
        scores, known = known_steps(scored, bags)
        if highest > 0:
            graded = ([highest * row for row in rows] for rows in (scores, known))
            metrics["step_mae"] = statistics.absolute_error_of(*graded)
        metrics |= {
            **statistics.step_statistics(scores, known),
            "step_brier": statistics.brier_of(scores, known),
            "step_ece": statistics.ece_of(scores, known),
            **statistics.first_error_statistics(scores, gold, threshold),
        }
        curves["step_reliability"] = as_points(reliability_curve(scores, known))
    return Measurement(len(bags), metrics, counts, curves)


def ranking_of(measured: Measurement) -> dict[str, Statistic]:
    """The metrics of [`measure_responses`] that need no threshold: how well responses and steps are ranked."""
    wanted = ("bag_auc", "step_auc", "within_bag_auc")
    return {name: measured.statistics[name] for name in wanted if name in measured.statistics}


def known_steps(scored: Sequence[StepScores], bags: Sequence[Bag]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores and gold labels of the steps that were scored, for each response."""
    scores = [np.array(result.step_scores, dtype=float) for result in scored]
    return scores, [gold_labels(bag)[: len(row)] for bag, row in zip(bags, scores, strict=True)]


def response_labels(bags: Sequence[Bag]) -> list[float]:
    """Label of each response on the scale of scores, NaN where unknown."""
    return [_share(bag.label, bag) for bag in bags]


def gold_labels(bag: Bag) -> np.ndarray:
    """Gold label of each step on the scale of scores, NaN where unknown."""
    known = bag.step_labels or [None] * len(bag.step_spans)
    return np.array([_share(label, bag) for label in known])


def _share(label: float | None, bag: Bag) -> float:
    """A label on the scale of scores: NaN where unknown, a grade as its share of the highest."""
    return math.nan if label is None else label / ((bag.num_grades or 2) - 1)


def _within_prompts(probs: np.ndarray, labels: np.ndarray, bags: Sequence[Bag]) -> float | None:
    """AUC of the responses to a prompt, averaged; None if no prompt has good and bad responses."""
    groups: dict[str, list[int]] = {}
    for place, bag in enumerate(bags):
        groups.setdefault(prompt_key(bag.prompt), []).append(place)
    several = [group for group in groups.values() if len(group) > 1]
    areas = statistics.bag_aucs([probs[group] for group in several], [labels[group] for group in several])
    known = areas[~np.isnan(areas)]
    return float(known.mean()) if len(known) else None


def pairs_of(bags: Sequence[Bag]) -> list[tuple[int, int]]:
    """Rows of the chosen and the rejected response of each preference that has both."""
    sides: dict[str, dict[float | None, int]] = {}
    for row, bag in enumerate(bags):
        if bag.pair_id is not None:
            sides.setdefault(bag.pair_id, {})[bag.label] = row
    return [(found[1.0], found[0.0]) for found in sides.values() if found.keys() >= {0.0, 1.0}]
