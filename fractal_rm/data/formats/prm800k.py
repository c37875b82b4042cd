"""Official files of PRM800K: solutions of MATH problems, rated step by step by people."""

from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, read_each
from fractal_rm.data.segmentation import join_steps


def read_prm800k(
    data: Data, *, source: str | None = None, full_solutions: bool = False, limit: int | None = None
) -> list[Bag]:
    """Bags of PRM800K: solutions of problems of MATH, rated step by step by people.

    Official files: `phase1_train.jsonl`, `phase1_test.jsonl`, `phase2_train.jsonl`, `phase2_test.jsonl`. A row has
    `question.problem` and `label.steps`, each step with rated `completions`, the `chosen_completion` the solution went
    on with, and in phase 1 perhaps a `human_completion`. The solution is what was chosen: a person's own step counts as
    good, and where nothing was chosen it ends with the first completion (in phase 2, that of the solution rated).

    Label of a step: 0 iff its rating is -1; 0 (no progress, but not wrong) and 1 are good. Label of a response: 1 iff
    no step is -1. A row ends before its first step without a rating; rows without any are left out.

    Rows end at the first error: **the bad step is the last one**, and position alone tells it apart. Report the
    position baseline (`statistics.same_position_auc` is blind to position), or use `full_solutions`. In phase 1 people
    chose good steps, so hardly any solution is bad.

    Args:
        full_solutions: Continue the rows of phase 2 that end at an error to the end of the solution; the labels of
            these steps are not known. The response's label stays what it is.
        limit: As in [`read_each`].

    Returns:
        One bag a row. Its id is the labeler and the time.

    Raises:
        ValueError: If a column is missing or a rating is none of -1, 0, 1 and null.

    Warns:
        UserWarning: If rows have no rated step; they are left out.

    Source:
        Lightman et al., Let's Verify Step by Step, 2023; github.com/openai/prm800k (MIT licence). Labels as in FRACTAL
        (Makhija et al., ACL 2025), with -1, 0, 1 mapped to 0, 1, 1. Its public code takes the first completion of each
        step, also where the solution went on from another one.

    Example:
        >>> step = {"completions": [{"text": "1+1=3.", "rating": -1}], "chosen_completion": None}
        >>> [bag] = read_prm800k([{"question": {"problem": "1+1?"}, "label": {"steps": [step]}}])
        >>> bag.steps, bag.step_labels, bag.label
        (['1+1=3.'], (0.0,), 0.0)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        question = column(row, "question", Mapping)
        steps, labels = _rated_steps(column(column(row, "label", Mapping), "steps", list, within="label."))
        problem = column(question, "problem", str, within="question.")
        if not steps:
            return []
        whole = question.get("pre_generated_steps") or []
        if full_solutions and min(labels) == 0 and whole[: len(steps)] == steps:
            steps = whole
        gold = (*labels, *[None] * (len(steps) - len(labels)))
        name = "/".join(row[part] for part in ("labeler", "timestamp") if isinstance(row.get(part), str))
        response, spans = join_steps(steps)
        return [Bag(problem, response, tuple(spans), min(labels), gold, id=name or None)]

    return read_each(data, source, make, left_out="have no rated step", limit=limit)


def _rated_steps(given: list[Any]) -> tuple[list[str], list[float]]:
    """Texts and labels of the steps that the solution went on with, up to the last one rated."""
    steps: list[str] = []
    labels: list[float] = []
    for number, step in enumerate(given, 1):
        if not isinstance(step, Mapping):
            raise TypeError(f"step {number} is {type(step).__name__}; make it an object with 'completions'.")
        completions, human = step.get("completions") or [], step.get("human_completion")
        if not isinstance(completions, list) or not all(isinstance(one, Mapping) for one in completions):
            raise TypeError(f"the completions of step {number} are no list of objects; give the official columns.")
        written = human.get("text") if isinstance(human, Mapping) else human
        chosen = step.get("chosen_completion")
        if chosen is not None and chosen not in range(len(completions)):
            raise ValueError(f"step {number} chose completion {chosen!r} of {len(completions)}; mend its index.")
        rated = [_rated(completion, number) for completion in completions]
        if chosen is None and written is not None:
            found = _rated({"text": written, "rating": 1}, number)
        else:  # where nobody chose or wrote a step, the solution ends with its own: the first
            found = rated[int(chosen or 0)] if rated else None
        if found is None:
            break
        steps.append(found[0])
        labels.append(found[1])
        if chosen is None and written is None:
            break  # whatever comes next does not follow this step
    return steps, labels


def _rated(completion: Mapping[str, Any], number: int) -> tuple[str, float] | None:
    """Text and label of a completion; None if it has no rating."""
    rating = completion.get("rating")
    if rating is None:
        return None
    if rating not in (-1, 0, 1):
        raise ValueError(f"the rating of step {number} is {rating!r}; give -1, 0, 1 or null.")
    return column(completion, "text", str, within="completions."), float(rating != -1)
