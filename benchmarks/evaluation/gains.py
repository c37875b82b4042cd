"""Gains of a scorer over a rival and over chance on the same responses, with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.evaluation.intervals import DRAWS, Estimate, Measurement, as_columns, differences, estimates
from fractal_rm.evaluation.responses import gold_labels, known_steps, measure_responses
from fractal_rm.evaluation.statistics import Statistic, bag_aucs, mean_of, same_position_auc_of

CHANCE = 0.5


def intervals(
    scored: Sequence[StepScores], rival: Sequence[StepScores], bags: Sequence[Bag], thresholds: tuple[float, float]
) -> dict[str, float]:
    """Gains with paired bootstrap intervals over responses.

    Gains in `bag_auc` and `f1` are over a rival, gains in `within_bag_auc` and `same_position_auc` over chance.
    """
    pair = [measure_responses(part, bags, at).statistics for part, at in zip((scored, rival), thresholds, strict=True)]
    shared = ("bag_auc", "f1") if has_gold(bags) else ("bag_auc",)
    found = differences(*(Measurement(len(bags), {name: one[name] for name in shared}) for one in pair), draws=DRAWS)
    if has_gold(bags):
        steps = known_steps(scored, bags)
        found |= _over_chance(len(bags), {"same_position_auc": same_position_auc_of(*steps)})
        aucs = bag_aucs(*steps)
        aucs = aucs[~np.isnan(aucs)]
        found |= _over_chance(len(aucs), {"within_bag_auc": mean_of(aucs)})
    return as_columns({f"{name}_gain": estimate for name, estimate in found.items()})


def _over_chance(items: int, statistics: Mapping[str, Statistic]) -> dict[str, Estimate]:
    found = estimates(Measurement(items, statistics), draws=DRAWS)
    return {name: Estimate(*(value - CHANCE for value in estimate)) for name, estimate in found.items()}


def gain_columns(*names: str) -> tuple[str, ...]:
    """What [`intervals`] calls the gain in a metric and the ends of its interval."""
    return tuple(f"{name}_gain{end}" for name in names for end in ("", "_low", "_high"))


def has_gold(bags: Sequence[Bag]) -> bool:
    """Whether people marked steps."""
    return any(not np.isnan(gold_labels(bag)).all() for bag in bags)
