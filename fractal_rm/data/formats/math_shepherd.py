"""Official file of Math-Shepherd: solutions whose steps are labelled by sampled continuations."""

import re
from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, read_each
from fractal_rm.data.segmentation import join_steps

# Ends each step of the input. In the label, the sign of the step (+ or -) replaces it.
_MARK = "ки"
_FIRST_STEP = re.compile(r"\bStep 1\s*:")


def read_math_shepherd(data: Data, *, source: str | None = None, limit: int | None = None) -> list[Bag]:
    """Bags of Math-Shepherd: solutions of GSM8K and MATH, with step labels from sampled continuations.

    Official file: `math-shepherd.jsonl`. A row has `input` (the problem, then steps that each end with "ки"), `label`
    (the same text with "+" or "-" in place of each "ки") and `task`. The first step begins at "Step 1:".

    Label of a step: 1 iff at least one continuation sampled from it reached the right answer; no person checked it.
    Label of a response: 1 iff all steps are +. Aggregation `"min"`.

    Returns:
        One bag for each row. The response is the text from "Step 1:" on, without the marks.

    Raises:
        ValueError: If a column is missing, or the label does not repeat the input.

    Warns:
        UserWarning: If rows have no "Step 1:", so that the end of the problem is unknown; they are left out.

    Source:
        Wang et al., Math-Shepherd, ACL 2024 (arXiv 2312.08935); huggingface.co/datasets/peiyi9979/Math-Shepherd, which
        states no licence.

    Example:
        >>> row = {"input": "1+1? Step 1: 1+1=3. ки\\nStep 2: So 3. ки"}
        >>> [bag] = read_math_shepherd([row | {"label": "1+1? Step 1: 1+1=3. +\\nStep 2: So 3. -"}])
        >>> bag.prompt, bag.response, bag.step_labels
        ('1+1?', 'Step 1: 1+1=3.\\nStep 2: So 3.', (1.0, 0.0))
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        pieces, gold = _signed_pieces(column(row, "input", str), column(row, "label", str))
        if not pieces:
            raise ValueError(f"the input has no {_MARK!r} at the end of a step; give the official file.")
        begin = _FIRST_STEP.search(pieces[0])
        if begin is None or not pieces[0][: begin.start()].strip():
            return []
        problem, pieces[0] = pieces[0][: begin.start()].strip(), pieces[0][begin.start() :]
        response, spans = join_steps([piece.strip() for piece in pieces])
        return [Bag(problem, response, tuple(spans), min(gold), tuple(gold))]

    return read_each(data, source, make, left_out="have no problem before a 'Step 1:'", limit=limit)


def _signed_pieces(text: str, signed: str) -> tuple[list[str], list[float]]:
    """The pieces between the marks, and the label of each, read at the same position of the signed text."""
    pieces, gold, position = text.split(_MARK)[:-1], [], 0
    for number, piece in enumerate(pieces, 1):
        sign = signed[position + len(piece) : position + len(piece) + 1]
        if not signed.startswith(piece, position) or sign not in ("+", "-"):
            raise ValueError(f"the label does not repeat the input with a + or - after step {number}; fix the row.")
        gold.append(float(sign == "+"))
        position += len(piece) + 1
    return pieces, gold
