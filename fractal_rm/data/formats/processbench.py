"""Official files of ProcessBench: solutions whose first wrong step people looked for."""

from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, read_each, texts
from fractal_rm.data.segmentation import join_steps


def read_processbench(
    data: Data, *, source: str | None = None, answer_labels: bool = False, limit: int | None = None
) -> list[Bag]:
    """Bags of ProcessBench: model solutions in which people looked for the first wrong step.

    Official files: `gsm8k.json`, `math.json`, `olympiadbench.json`, `omnimath.json`. A row has `id`, `generator`,
    `problem`, `steps`, `final_answer_correct` and `label`: the index of the first wrong step, from 0, or -1.

    Label of a step: 1 before the first wrong step, 0 at it, unknown after it. Label of a response: 1 iff no step is
    wrong. With `answer_labels`: 1 iff the final answer is right, which is the label available in practice (some
    solutions with a wrong step still reach the right answer). This is a test set: do not train on it.

    Args:
        answer_labels: Use `final_answer_correct` as the response's label.
        limit: As in [`read_each`].

    Raises:
        ValueError: If a column is missing, or the label is not the index of a step.

    Source:
        Zheng et al., ProcessBench, 2024 (arXiv 2412.06559); huggingface.co/datasets/Qwen/ProcessBench (Apache-2.0).

    Example:
        >>> row = {"id": "a", "problem": "1+1+1?", "steps": ["1+1=3.", "3+1=4."], "label": 0}
        >>> read_processbench([row])[0].step_labels
        (0.0, None)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        steps, first = texts(row, "steps"), column(row, "label", int)
        if first not in range(-1, len(steps)):
            raise ValueError(f"the label is {first}, but there are {len(steps)} steps; give -1 or an index from 0.")
        gold = [1.0] * len(steps) if first < 0 else [1.0] * first + [0.0] + [None] * (len(steps) - first - 1)
        label = column(row, "final_answer_correct", bool) if answer_labels else first < 0
        response, spans = join_steps(steps)
        name = str(column(row, "id", (str, int)))
        return [Bag(column(row, "problem", str), response, tuple(spans), label, tuple(gold), id=name)]

    return read_each(data, source, make, limit=limit)
