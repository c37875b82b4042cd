"""Responses that are too long: keep the first steps if the label still holds for them, else drop the response."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fractal_rm.data.bag import Bag
from fractal_rm.objectives.aggregation import meaning


def truncate_bag(bag: Bag, kept_steps: int, aggregation: str) -> Bag | None:
    """Keep the first steps of a bag that is too long, if its label still means the same.

    What the label of the whole says about the part that is kept:

    - `"min"` and what softens it ("every step is good"): the best label holds for every part. A worse one holds only
      if a gold step label of the part equals it: the step that spoilt the response is still there.
    - `"max"` and what softens it ("some step is good"): the worst label holds for every part; a better one only if a
      gold step label of the part equals it.
    - `"mean"` (share of good steps): nothing, unless every gold step label of the part is known: their mean is the
      label of the part.
    - A soft label, strictly between 0 and 1, says nothing about a part (`"mean"` apart). Nor does a preference, which
      compares whole responses. A response without a label has none to lose.

    Args:
        bag: The bag.
        kept_steps: How many whole steps fit.
        aggregation: How step labels make the response's label: one of
            [`~fractal_rm.objectives.aggregation.AGGREGATIONS`].

    Returns:
        The bag itself if all of its steps fit; a shorter one, cut where its last step ends; or None if no step fits,
        or if the label says nothing about the part.

    Raises:
        ValueError: If `kept_steps` is negative, or the aggregation is unknown.

    Example:
        >>> bag = Bag("2+3*4?", "3*4=12. 2+12=14.", ((0, 7), (8, 16)), label=1.0)
        >>> truncate_bag(bag, 1, "min").response
        '3*4=12.'
        >>> truncate_bag(bag, 1, "max")  # the good step may be the one cut off
    """
    if kept_steps < 0:
        raise ValueError(f"kept_steps is {kept_steps}; give 0 or more.")
    rule = meaning(aggregation)
    if kept_steps >= len(bag.step_spans):
        return bag
    if kept_steps == 0:
        return None
    gold = None if bag.step_labels is None else bag.step_labels[:kept_steps]
    label = bag.label
    if label is not None:
        best = 1.0 if bag.num_grades is None else bag.num_grades - 1.0
        soft = bag.num_grades is None and 0.0 < label < best
        known = [step_label for step_label in gold or () if step_label is not None]
        if bag.pair_id is not None:
            return None
        if rule == "mean":
            if len(known) < kept_steps:
                return None
            label = math.fsum(known) / kept_steps
            if bag.num_grades is not None and not label.is_integer():
                return None
        elif soft or (label != (0.0 if rule == "max" else best) and label not in known):
            return None
    spans = bag.step_spans[:kept_steps]
    teacher = None if bag.teacher_scores is None else bag.teacher_scores[:kept_steps]
    return replace(
        bag,
        response=bag.response[: spans[-1][1]],
        step_spans=spans,
        label=label,
        step_labels=gold,
        teacher_scores=teacher,
    )


@dataclass(frozen=True)
class TruncationCount:
    """What truncation did to a data set.

    Args:
        total: Responses there were.
        truncated: Responses that keep only their first steps.
        dropped: Responses that are left out.

    Example:
        >>> print(TruncationCount(total=100, truncated=3, dropped=2))
        5 of 100 responses are too long: 3 shortened to their first whole steps, 2 dropped because no step fits or the
        label would no longer hold.
    """

    total: int
    truncated: int
    dropped: int

    def __str__(self) -> str:
        return (
            f"{self.truncated + self.dropped} of {self.total} responses are too long: {self.truncated} shortened to "
            f"their first whole steps, {self.dropped} dropped because no step fits or the label would no longer hold."
        )


def truncate_bags(
    bags: Sequence[Bag], kept_steps: Sequence[int], aggregation: str
) -> tuple[list[Bag], TruncationCount]:
    """Truncate a data set by the rule of `truncate_bag`, and count.

    Args:
        bags: The bags.
        kept_steps: How many whole steps of each bag fit.
        aggregation: How step labels make a response's label.

    Returns:
        The bags that are left, in order, and the count. Of a preference, both responses stay or none.

    Raises:
        ValueError: If `kept_steps` has another length than `bags`, or for a reason of `truncate_bag`.
    """
    if len(bags) != len(kept_steps):
        raise ValueError(f"There are {len(kept_steps)} entries in kept_steps for {len(bags)} bags; give one each.")
    cut = [truncate_bag(bag, kept, aggregation) for bag, kept in zip(bags, kept_steps, strict=True)]
    broken = {bag.pair_id for bag, part in zip(bags, cut, strict=True) if part is None} - {None}
    kept = [part for part in cut if part is not None and part.pair_id not in broken]
    truncated = sum(part is not None and part is not bag for bag, part in zip(bags, cut, strict=True))
    return kept, TruncationCount(total=len(bags), truncated=truncated, dropped=len(bags) - len(kept))
