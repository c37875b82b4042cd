"""Official file of PRMBench: solutions into which a model wrote errors of nine kinds."""

from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, read_each, texts
from fractal_rm.data.segmentation import join_steps


def read_prmbench(data: Data, *, source: str | None = None, limit: int | None = None) -> list[Bag]:
    """Bags of PRMBench: solutions from PRM800K into which a model wrote errors of nine kinds.

    Official file: `prmbench_preview.jsonl`. A row has `idx`, `classification` (the kind of error), `modified_question`,
    `modified_process` (the steps) and `error_steps` (from 1), and the same solution without errors in
    `original_question` and `original_process`.

    Label of a step: 0 iff it is in `error_steps`. Label of a response: 1 iff no step is. Steps of the kinds
    `redundency` and `circular` are not strictly wrong. A model wrote the errors on purpose; they are not natural ones.

    Returns:
        One bag for each row. A row of the kind `redundency` is preceded by its original solution as a good response,
        because the official evaluation takes its good responses from there. The id of a bag is its kind (or `correct`)
        and `idx`.

    Raises:
        ValueError: If a column is missing.

    Warns:
        UserWarning: If rows name an error step that the solution does not have; they are left out.

    Source:
        Song et al., PRMBench, 2025 (arXiv 2501.03124); github.com/ssmisya/PRMBench (Apache-2.0).

    Example:
        >>> row = {"idx": "7", "classification": "deception", "modified_question": "1+1?"}
        >>> read_prmbench([row | {"modified_process": ["1+1=3.", "So 3."], "error_steps": [1]}])[0].step_labels
        (0.0, 1.0)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        steps, errors = texts(row, "modified_process"), column(row, "error_steps", list)
        kind, name = column(row, "classification", str), str(column(row, "idx", (str, int)))
        if not all(type(error) is int for error in errors):
            raise TypeError(f"error_steps is {errors}; make it a list of whole numbers from 1.")
        if not set(errors) <= set(range(1, len(steps) + 1)):
            return []
        bags = [_prmbench_bag(column(row, "modified_question", str), steps, errors, f"{kind}_{name}")]
        if kind == "redundency":
            solution = texts(row, "original_process")
            bags.insert(0, _prmbench_bag(column(row, "original_question", str), solution, [], f"correct_{name}"))
        return bags

    return read_each(data, source, make, left_out="name an error step that their solution does not have", limit=limit)


def _prmbench_bag(prompt: str, steps: list[Any], errors: list[int], name: str) -> Bag:
    response, spans = join_steps(steps)
    gold = tuple(float(number not in errors) for number in range(1, len(steps) + 1))
    return Bag(prompt, response, tuple(spans), min(gold), gold, id=name)
