"""Official files of PRM800K: solutions of MATH problems, rated step by step by people."""

from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, read_each
from fractal_rm.data.segmentation import join_steps


def read_prm800k(
    data: Data, *, source: str | None = None, full_solutions: bool = False, limit: int | None = None
) -> list[Bag]:
    """Bags of PRM800K: solutions of MATH problems, rated step by step by people.

    Official files: `phase1_train.jsonl`, `phase1_test.jsonl`, `phase2_train.jsonl`, `phase2_test.jsonl`. A row has
    `question.problem` and `label.steps`. Each step has rated `completions`, the `chosen_completion` with its
    continuation, and in phase 1 sometimes a `human_completion`. The solution consists of the chosen completions; a step
    that a person wrote counts as good. Where nothing was chosen, the solution ends with the first completion (in phase
    2, the step of the rated solution).

    Label of a step: 0 iff its rating is -1; ratings 0 (no progress, but not wrong) and 1 are good. Label of a response:
    1 iff no step is rated -1. A row ends before its first step without a rating; rows without any rating are left out.

    Rows end at the first error: **the bad step is always the last one**, so position alone identifies it. Report the
    position baseline (`statistics.same_position_auc` does not depend on position), or use `full_solutions`. In phase 1
    people chose good steps, so hardly any solution is bad.

    Args:
        full_solutions: Extend the rows of phase 2 that end at an error to the end of the solution. The added steps have
            unknown labels; the response's label does not change.
        limit: As in [`read_each`].

    Returns:
        One bag for each row. Its id is the labeler and the time.

    Raises:
        ValueError: If a column is missing, or a rating is not -1, 0, 1 or null.

    Warns:
        UserWarning: If rows have no rated step; they are left out.

    Source:
        Lightman et al., Let's Verify Step by Step, 2023; github.com/openai/prm800k (MIT licence). Labels as in FRACTAL
        (Makhija et al., ACL 2025), with -1, 0, 1 mapped to 0, 1, 1. Its public code takes the first completion of each
        step, even where the solution continued from another one.

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
    """Texts and labels of the steps of the solution, up to the last rated one."""
    steps: list[str] = []
    labels: list[float] = []
    for number, step in enumerate(given, 1):
        if not isinstance(step, Mapping):
            raise TypeError(f"step {number} is {type(step).__name__}; make it an object with 'completions'.")
        completions, human = step.get("completions") or [], step.get("human_completion")
        if not isinstance(completions, list) or not all(isinstance(one, Mapping) for one in completions):
            raise TypeError(f"the completions of step {number} are not a list of objects; give the official columns.")
        written = human.get("text") if isinstance(human, Mapping) else human
        chosen = step.get("chosen_completion")
        if chosen is not None and chosen not in range(len(completions)):
            found = f"step {number} has chosen completion {chosen!r}, but {len(completions)} completions"
            raise ValueError(f"{found}; correct the index.")
        rated = [_rated(completion, number) for completion in completions]
        if chosen is None and written is not None:
            found = _rated({"text": written, "rating": 1}, number)
        else:  # if nobody chose or wrote a step, the solution ends with its own step, the first completion
            found = rated[int(chosen or 0)] if rated else None
        if found is None:
            break
        steps.append(found[0])
        labels.append(found[1])
        if chosen is None and written is None:
            break  # later steps do not continue from this one
    return steps, labels


def _rated(completion: Mapping[str, Any], number: int) -> tuple[str, float] | None:
    """Text and label of a completion; None if it has no rating."""
    rating = completion.get("rating")
    if rating is None:
        return None
    if rating not in (-1, 0, 1):
        raise ValueError(f"the rating of step {number} is {rating!r}; give -1, 0, 1 or null.")
    return column(completion, "text", str, within="completions."), float(rating != -1)
