"""Bags: a response with one label, cut into steps; truncation of responses that are too long; scores of a response.

Everything is checked when a `Bag` is made, so no later stage checks it again. If a bag comes from a file, the reader
adds the file and the row to the message.
"""

import itertools
import math
import reprlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fractal_rm.data.prompts import Conversation, Prompt, RenderedPrompt, check_text, read_prompt, shortened
from fractal_rm.objectives.aggregation import meaning

# A step: the offset of its first character in the response, and the offset after its last.
Span = tuple[int, int]


@dataclass(frozen=True)
class Bag:
    """A response, its steps and its label.

    Args:
        prompt: Text, or a chat: a list of messages with the keys `role` and `content`, read by [`read_prompt`].
        response: The response, exactly as written; a [`~fractal_rm.data.prompts.Conversation`] if tools or users wrote
            in between.
        step_spans: Start and end characters of the steps in the response: in order, without overlap, at least one.
        label: Probability that the response is good, in [0, 1]; with `num_grades`, a grade. None if unknown.
        step_labels: Gold labels of the steps, on the scale of `label`; None where unknown. Only evaluation, and arms
            named for it, may read them.
        teacher_scores: Step scores from another source (a language model as judge, an NLI model, a rule): probabilities
            that steps are good, None where unknown. Unlike gold labels, training may read them.
        num_grades: For ordinal labels: number of grades, 0 to `num_grades - 1`.
        id: The caller's name for the response.
        pair_id: Shared by the two responses of a preference: the chosen one has label 1, the rejected one 0.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is empty, out of range, or does not fit the others.

    Example:
        >>> bag = Bag("2+3*4?", "3*4=12. 2+12=14.", step_spans=((0, 7), (8, 16)), label=1.0)
        >>> bag.steps
        ['3*4=12.', '2+12=14.']
    """

    prompt: Prompt
    response: str
    step_spans: tuple[Span, ...]
    label: float | None
    step_labels: tuple[float | None, ...] | None = None
    teacher_scores: tuple[float | None, ...] | None = None
    num_grades: int | None = None
    id: str | None = None
    pair_id: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", read_prompt(self.prompt))
        check_text(self.response, "the response")
        if not self.response.strip():
            raise ValueError("the response is empty; drop the row or write the response.")
        _check_spans(self.step_spans, self.response)
        if isinstance(self.response, Conversation):
            _check_turns(self.prompt, self.response, self.step_spans)
        if self.num_grades is not None and (not isinstance(self.num_grades, int) or self.num_grades < 2):
            raise ValueError(f"num_grades is {self.num_grades!r}; give an integer of 2 or more, or None.")
        # The checks below also convert values from readers and JSON (lists, booleans) into the types of the fields.
        object.__setattr__(self, "step_spans", tuple((start, end) for start, end in self.step_spans))
        object.__setattr__(self, "label", _check_label(self.label, "the label", self.num_grades))
        for name, what, num_grades in (
            ("step_labels", "label", self.num_grades),
            ("teacher_scores", "teacher score", None),
        ):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != len(self.step_spans):
                kind = name.replace("_", " ")
                raise ValueError(
                    f"there are {len(values)} {kind} for {len(self.step_spans)} steps; give one {what} for each step, "
                    "null where unknown."
                )
            checked = [
                _check_label(value, f"the {what} of step {number}", num_grades)
                for number, value in enumerate(values, 1)
            ]
            object.__setattr__(self, name, tuple(checked))

    @property
    def steps(self) -> list[str]:
        """Texts of the steps."""
        return [self.response[start:end] for start, end in self.step_spans]


@dataclass(frozen=True)
class Step:
    """One step of a response: its text, its characters `start:end` of the response, and P(step is good)."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class StepScores:
    """Scores of one response.

    Args:
        response: The response as scored.
        steps: Its steps with scores in [0, 1].
        score: Aggregated P(response is good); NaN if the response could not be scored.
        truncated_steps: Steps beyond `max_length`, left out of `steps` and `score`.
        error: Why the response could not be scored, else None.
        empty: Whether the response has no step, so there was nothing to score.
    """

    response: str
    steps: list[Step] = field(default_factory=list)
    score: float = math.nan
    truncated_steps: int = 0
    error: str | None = None
    empty: bool = False

    @property
    def judged(self) -> bool:
        """Whether every step has a score. The unscored rest of a truncated response is of unknown quality."""
        if self.empty or not self.response.strip():
            return True
        return self.error is None and not self.truncated_steps

    @property
    def step_scores(self) -> list[float]:
        """Scores of the steps."""
        return [step.score for step in self.steps]

    @property
    def spans(self) -> list[Span]:
        """Characters of the steps."""
        return [(step.start, step.end) for step in self.steps]


def warn_of_equal_labels(bags: Sequence[Bag]) -> None:
    """Warn if all labels of a data set are equal: there is nothing to learn from them."""
    labels = {bag.label for bag in bags}
    if len(labels) == 1:
        warnings.warn(
            f"All {len(bags)} responses have the label {labels.pop():g}: the reward model can only learn to give every "
            "step the same score; add responses with other labels.",
            stacklevel=2,
        )


def _check_spans(spans: Sequence[Span], response: str) -> None:
    if not spans:
        raise ValueError("the response has no steps; drop the row or choose a segmentation that finds some.")
    edges = [edge for span in spans for edge in span]
    if any(len(span) != 2 for span in spans) or not all(type(edge) is int for edge in edges):
        raise TypeError("a step span is not a pair of integers; give the start and the end character of each step.")
    ordered = all(start <= end for start, end in itertools.pairwise(edges))
    if not ordered or edges[0] < 0 or edges[-1] > len(response) or any(start == end for start, end in spans):
        raise ValueError(
            f"the step spans {reprlib.repr(list(spans))} are empty, overlap or leave the response of {len(response)} "
            "characters; give start and end of each step, in order."
        )


def _check_turns(prompt: Prompt, response: Conversation, spans: Sequence[Span]) -> None:
    outside = next((n for n, (start, end) in enumerate(spans, 1) if response.turn_of(start, end) is None), None)
    if outside is not None:
        raise ValueError(f"step {outside} is not inside a turn of the assistant; only what the policy wrote has steps.")
    if (
        isinstance(prompt, str)
        and not isinstance(prompt, RenderedPrompt)
        and any(one is not None for one in response.context)
    ):
        raise ValueError(
            f"the response is a chat of {len(response.turns)} turns, but the prompt is a text; give the prompt as a "
            "list of messages."
        )


def _check_label(label: Any, what: str, num_grades: int | None) -> float | None:
    """Return a label as a float, or raise an error that says what is wrong with it."""
    if label is None:
        return None
    if hasattr(label, "item"):  # numpy, torch
        label = label.item()
    if not isinstance(label, int | float):
        raise TypeError(f"{what} is {reprlib.repr(label)} ({type(label).__name__}); make it a number or null.")
    if label != label:
        raise ValueError(f"{what} is NaN; give a number, or drop the row.")
    if num_grades is None and not 0 <= label <= 1:
        how = " (--label_scale 1 5 maps 1 to 0 and 5 to 1)" if what == "the label" else ""
        raise ValueError(
            f"{what} is {reprlib.repr(label)}, outside [0, 1]; rescale it{how}, or set num_grades for grades."
        )
    if num_grades is not None and not (0 <= label < num_grades and label == int(label)):
        raise ValueError(
            f"{what} is {reprlib.repr(label)}; give a whole number from 0 to {num_grades - 1}, or another num_grades."
        )
    return float(label)


def trim(text: str, spans: Iterable[Span]) -> list[Span]:
    """Strip white space from both ends of every span, and drop blank spans.

    Example:
        >>> trim("one  two", [(0, 4), (4, 5), (5, 8)])
        [(0, 3), (5, 8)]
    """
    trimmed = []
    for start, end in spans:
        piece = text[start:end].lstrip()
        start = end - len(piece)
        end = start + len(piece.rstrip())
        if start < end:
            trimmed.append((start, end))
    return trimmed


def truncate_bag(bag: Bag, kept_steps: int, aggregation: str, *, reads_gold: bool = True) -> Bag | None:
    """Keep the first steps of a bag that is too long, if its label still means the same.

    What the label of the whole response implies for the kept part:

    - `"min"` and its soft forms ("every step is good"): the best label holds for every part. A worse one holds only
      if a gold step label of the part equals it: the step that spoilt the response is still there.
    - `"max"` and its soft forms ("some step is good"): the worst label holds for every part; a better one only if a
      gold step label of the part equals it.
    - `"mean"` (share of good steps): nothing, unless every gold step label of the part is known: their mean is the
      label of the part.
    - A soft label, strictly between 0 and 1, implies nothing for a part (except with `"mean"`). Nor does a preference,
      which compares whole responses. A response without a label can always be cut.

    Args:
        bag: The bag.
        kept_steps: How many whole steps fit.
        aggregation: How step labels determine the response's label: one of
            [`~fractal_rm.objectives.aggregation.AGGREGATIONS`].
        reads_gold: Whether gold step labels may be used to decide if the label still holds.

    Returns:
        The bag itself if all of its steps fit; a shorter one, cut where its last step ends; or None if no step fits,
        or if the label implies nothing for the part.

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
        known = [step_label for step_label in gold or () if step_label is not None and reads_gold]
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
        response=shortened(bag.response, spans[-1][1]),
        step_spans=spans,
        label=label,
        step_labels=gold,
        teacher_scores=teacher,
    )


@dataclass(frozen=True)
class TruncationCount:
    """Counts of truncation in a data set.

    Args:
        total: All responses.
        truncated: Responses cut to their first steps.
        dropped: Responses left out.

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
    bags: Sequence[Bag], kept_steps: Sequence[int], aggregation: str, *, reads_gold: bool = True
) -> tuple[list[Bag], TruncationCount]:
    """Truncate a data set by the rule of `truncate_bag`, with counts.

    Returns:
        The remaining bags in order, and the counts. Both responses of a preference stay, or neither.

    Raises:
        ValueError: If `kept_steps` and `bags` differ in length, or as in `truncate_bag`.
    """
    if len(bags) != len(kept_steps):
        raise ValueError(f"There are {len(kept_steps)} entries in kept_steps for {len(bags)} bags; give one each.")
    cut = [
        truncate_bag(bag, kept, aggregation, reads_gold=reads_gold) for bag, kept in zip(bags, kept_steps, strict=True)
    ]
    broken = {bag.pair_id for bag, part in zip(bags, cut, strict=True) if part is None} - {None}
    kept = [part for part in cut if part is not None and part.pair_id not in broken]
    truncated = sum(part is not None and part is not bag for bag, part in zip(bags, cut, strict=True))
    return kept, TruncationCount(total=len(bags), truncated=truncated, dropped=len(bags) - len(kept))
