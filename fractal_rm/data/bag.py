"""Bags: a response with one label, cut into steps.

Everything is checked when a `Bag` is made, so no later stage checks it again. Where a bag comes from a file, the reader
puts the file and the row before the sentence.
"""

import itertools
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fractal_rm.data.prompts import Prompt, check_prompt, check_text
from fractal_rm.data.segmentation import Span


@dataclass(frozen=True)
class Bag:
    """A response, its steps and its label.

    Args:
        prompt: Text, or a chat: a list of messages with the keys `role` and `content`.
        response: What was answered, exactly as it was written.
        step_spans: Where the steps are in the response: start and end characters, in order, apart, at least one.
        label: Probability that the response is good, in [0, 1]; with `num_grades`, a grade. None if it is not known.
        step_labels: Gold labels of the steps, on the scale of `label`; None where not known. Only evaluation, and arms
            that are named for it, may read them.
        teacher_scores: What someone or something else thinks of the steps (a language model as judge, an NLI model, a
            rule): probabilities that they are good, None where not known. Unlike gold labels, training may read them.
        num_grades: For ordinal labels: how many grades there are, 0 to `num_grades - 1`.
        id: The caller's name of the response.
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
        check_prompt(self.prompt)
        check_text(self.response, "the response")
        if not self.response.strip():
            raise ValueError("the response is empty; drop the row or write the response.")
        _check_spans(self.step_spans, self.response)
        if self.num_grades is not None and (not isinstance(self.num_grades, int) or self.num_grades < 2):
            raise ValueError(f"num_grades is {self.num_grades!r}; give an integer of 2 or more, or None.")
        # The checks below also turn what readers and JSON bring (lists, booleans) into the types of the fields.
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
                    "null where it is not known."
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


def check_labels(bags: Sequence[Bag]) -> None:
    """Check that there is something to learn from the labels of a data set.

    Args:
        bags: The bags to train on.

    Raises:
        ValueError: If there is no bag, or a bag has no label.

    Warns:
        UserWarning: If all labels are equal.
    """
    unlabelled = [row for row, bag in enumerate(bags, 1) if bag.label is None]
    if len(unlabelled) == len(bags):
        raise ValueError(f"None of {len(bags)} responses has a label; add a 'label' column before training.")
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(bags)} responses have no label (first: response {unlabelled[0]}); label or "
            "drop them before training."
        )
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
        raise TypeError("a step span is no pair of integers; give the start and the end character of each step.")
    ordered = all(start <= end for start, end in itertools.pairwise(edges))
    if not ordered or edges[0] < 0 or edges[-1] > len(response) or any(start == end for start, end in spans):
        raise ValueError(
            f"the step spans {reprlib.repr(list(spans))} are empty, overlap or leave the response of {len(response)} "
            "characters; give start and end of each step, in order."
        )


def _check_label(label: Any, what: str, num_grades: int | None) -> float | None:
    """Return a label as a float, or raise a sentence that says what is wrong with it."""
    if label is None:
        return None
    if hasattr(label, "item"):  # numpy, torch
        label = label.item()
    if not isinstance(label, int | float):
        raise TypeError(f"{what} is {reprlib.repr(label)} ({type(label).__name__}); make it a number or null.")
    if label != label:
        raise ValueError(f"{what} is NaN; give a number, or drop the row.")
    if num_grades is None and not 0 <= label <= 1:
        raise ValueError(f"{what} is {reprlib.repr(label)}, outside [0, 1]; rescale it, or set num_grades for grades.")
    if num_grades is not None and not (0 <= label < num_grades and label == int(label)):
        raise ValueError(
            f"{what} is {reprlib.repr(label)}; give a whole number from 0 to {num_grades - 1}, or another num_grades."
        )
    return float(label)
