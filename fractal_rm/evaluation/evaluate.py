"""Metrics of a step reward model on labelled responses: of the response, of its steps, of the first wrong step."""

import math
from collections.abc import Sequence

import numpy as np

from fractal_rm.data.bag import Bag
from fractal_rm.evaluation import metrics
from fractal_rm.objectives.aggregation import GOOD, Aggregation, meaning
from fractal_rm.reward_model import StepRewardModel, StepScores

# A step that was not scored is a step that was not called wrong.
NOT_SCORED = 1.0


def score_bags(
    reward_model: StepRewardModel, bags: Sequence[Bag], *, batch_size: int | None = None
) -> list[StepScores]:
    """Scores of bags, with the steps that the bags have.

    Args:
        reward_model: The model.
        bags: Responses with their steps.
        batch_size: Responses in a forward; default: that of the model.
    """
    return reward_model.score(
        [bag.prompt for bag in bags],
        [bag.response for bag in bags],
        spans=[bag.step_spans for bag in bags],
        batch_size=batch_size,
    )


def evaluate_scores(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> dict[str, float]:
    """Metrics of scores against labels.

    Steps beyond the model's `max_length` have no score. They stay out of the AUCs; for the first error they count as
    not called wrong, so that a response does not get easier by being cut. Responses without any score stay out of the
    response metrics and are counted as `unscored`. Grades count as shares of the highest, as the scores of a model of
    grades do.

    Args:
        scored: Scores of each bag.
        bags: The bags: labels, and gold step labels where they are known.
        threshold: A step that scores below it is called wrong.

    Returns:
        Counts (`responses`, `unscored`, `truncated`), those of [`~fractal_rm.evaluation.metrics.bag_metrics`],
        `pair_accuracy` if there are preferences (the share whose chosen response scores higher), `bag_mae` if there are
        grades and, if any gold step label is known, `step_auc`, `within_bag_auc`, those of
        [`~fractal_rm.evaluation.metrics.first_error_accuracy`], the `threshold`, and `step_mae` if there are grades.
        The two errors are in grades.
    """
    labels = response_labels(bags)
    have = [not math.isnan(result.score) for result in scored]
    results: dict[str, float] = {
        "responses": len(bags),
        "unscored": len(bags) - sum(have),
        "truncated": sum(result.truncated_steps > 0 for result in scored),
        **metrics.bag_metrics(
            [result.score for result, ok in zip(scored, have, strict=True) if ok],
            [label for label, ok in zip(labels, have, strict=True) if ok],
        ),
    }
    grades = max(bag.num_grades or 0 for bag in bags) if bags else 0
    if grades:
        results["bag_mae"] = (grades - 1) * metrics.mean_absolute_error(
            [result.score for result, ok in zip(scored, have, strict=True) if ok],
            [label for label, ok in zip(labels, have, strict=True) if ok],
        )
    pairs = _pairs(scored, bags)
    if pairs:
        results["pair_accuracy"] = sum(better > worse for better, worse in pairs) / len(pairs)
    gold = [gold_labels(bag) for bag in bags]
    if all(np.isnan(row).all() for row in gold):
        return results
    scores = [np.array(result.step_scores) for result in scored]
    known = [row[: len(found)] for row, found in zip(gold, scores, strict=True)]
    whole = [padded_scores(result, row) for result, row in zip(scored, gold, strict=True)]
    if grades:
        results["step_mae"] = (grades - 1) * metrics.mean_absolute_error(np.concatenate(scores), np.concatenate(known))
    return {
        **results,
        "step_auc": metrics.step_auc(scores, known),
        "within_bag_auc": metrics.within_bag_auc(scores, known),
        **metrics.first_error_accuracy(whole, gold, threshold),
        "threshold": threshold,
    }


def evaluate(
    reward_model: StepRewardModel,
    bags: Sequence[Bag],
    *,
    validation: Sequence[Bag] | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Metrics of a reward model on bags.

    Args:
        reward_model: The model.
        bags: Labelled responses.
        validation: Other labelled responses, to choose the threshold on by their response labels. None: the threshold
            that the model remembers.
        batch_size: Responses in a forward; default: that of the model.

    Returns:
        As [`evaluate_scores`].

    Raises:
        ValueError: If no validation response could be scored.
    """
    threshold = reward_model.settings.threshold
    if validation is not None:
        scored = score_bags(reward_model, validation, batch_size=batch_size)
        threshold = choose_threshold(scored, validation, aggregation=reward_model.settings.aggregation)
        if math.isnan(threshold):
            raise ValueError(f"None of {len(validation)} validation responses could be scored. Give others.")
    return evaluate_scores(score_bags(reward_model, bags, batch_size=batch_size), bags, threshold)


def choose_threshold(scored: Sequence[StepScores], bags: Sequence[Bag], *, aggregation: Aggregation = "min") -> float:
    """[`~fractal_rm.evaluation.metrics.choose_threshold`] on scores and response labels; gold step labels are not read.

    Args:
        scored: Scores of each bag.
        bags: The bags.
        aggregation: That of the model. Where it means that a response is good if some step is, the highest step score
            decides; otherwise the lowest.
    """
    rule = "max" if meaning(aggregation) == "max" else "min"
    return metrics.choose_threshold([result.step_scores for result in scored], response_labels(bags), rule=rule)


def response_labels(bags: Sequence[Bag]) -> list[float]:
    """Label of each response on the scale of scores, NaN where it is not known."""
    return [_share(bag.label, bag) for bag in bags]


def _pairs(scored: Sequence[StepScores], bags: Sequence[Bag]) -> list[tuple[float, float]]:
    """Scores of the chosen and of the rejected response of each preference; one that was not scored is never better."""
    sides: dict[str, dict[float | None, float]] = {}
    for result, bag in zip(scored, bags, strict=True):
        if bag.pair_id is not None:
            sides.setdefault(bag.pair_id, {})[bag.label] = result.score
    return [(found[1.0], found[0.0]) for found in sides.values() if found.keys() >= {0.0, 1.0}]


def padded_scores(result: StepScores, gold: np.ndarray) -> np.ndarray:
    """Step scores (S,), as many as gold labels: steps that were not scored count as right.

    Of a right response without any score they count as wrong: it is no hit of who called all of its steps right.

    Args:
        result: Scores of the first steps.
        gold: Labels (S,), NaN where unknown.
    """
    fill = NOT_SCORED if result.steps or (gold < GOOD).any() else 0.0
    return np.append(result.step_scores, [fill] * (len(gold) - len(result.steps)))


def gold_labels(bag: Bag) -> np.ndarray:
    """Gold label of each step on the scale of scores, NaN where it is not known."""
    known = bag.step_labels or [None] * len(bag.step_spans)
    return np.array([_share(label, bag) for label in known])


def _share(label: float | None, bag: Bag) -> float:
    """A label on the scale of scores: NaN where it is not known, a grade as its share of the highest."""
    return math.nan if label is None else label / ((bag.num_grades or 2) - 1)
