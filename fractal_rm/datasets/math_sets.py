"""Official files of mathematics with step labels by people: PRM800K, ProcessBench, PRMBench.

A response is good only if each of its steps is: aggregation `"min"`.
"""

from collections.abc import Mapping
from typing import Any

from fractal_rm.bags import Bag
from fractal_rm.datasets.rows import Data, column, load_rows, read_each
from fractal_rm.segmentation import join_steps


def read_prm800k(data: Data, *, source: str | None = None, full_solutions: bool = False) -> list[Bag]:
    """Bags of PRM800K: solutions of problems of MATH, rated step by step by people.

    Official files: `phase1_train.jsonl`, `phase1_test.jsonl`, `phase2_train.jsonl`, `phase2_test.jsonl`. A row has
    `question.problem` and `label.steps`, each step with rated `completions`, the `chosen_completion` the solution went
    on with, and in phase 1 perhaps a `human_completion`. The solution is what was chosen: a person's own step counts as
    good, and where nothing was chosen it ends with the first completion (in phase 2, that of the solution rated).

    Label of a step: 0 iff its rating is -1; 0 (no progress, but not wrong) and 1 are good. Label of a response: 1 iff
    no step is -1. A row ends before its first step without a rating; rows without any are left out.

    Rows end at the first error: **the bad step is the last one**, and position alone tells it apart. Report the
    position baseline (`metrics.same_position_auc` is blind to position), or use `full_solutions`.

    Args:
        data: A file, or rows.
        source: Name of the data in error messages.
        full_solutions: Continue the rows of phase 2 that end at an error to the end of the solution; the labels of
            these steps are not known. The response's label stays what it is.

    Returns:
        One bag a row. Its id is the labeler and the time.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a column is missing or a rating is none of -1, 0, 1 and null.

    Source:
        Lightman et al., Let's Verify Step by Step, 2023; github.com/openai/prm800k (MIT licence). Labels as in FRACTAL
        (Makhija et al., ACL 2025), with -1, 0, 1 mapped to 0, 1, 1.

    Example:
        >>> step = {"completions": [{"text": "1+1=3.", "rating": -1}], "chosen_completion": None}
        >>> [bag] = read_prm800k([{"question": {"problem": "1+1?"}, "label": {"steps": [step]}}])
        >>> bag.steps, bag.step_labels, bag.label
        (['1+1=3.'], (0.0,), 0.0)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        question = column(row, "question", Mapping)
        given = column(column(row, "label", Mapping), "steps", list, within="label.")
        steps, labels = _rated_steps(given)
        if not steps:
            return []
        label = min(labels)
        whole = question.get("pre_generated_steps") or []
        if full_solutions and label == 0 and whole[: len(steps)] == steps:
            steps = whole
        response, spans = join_steps(steps)
        gold = (*labels, *[None] * (len(steps) - len(labels)))
        name = "/".join(row[part] for part in ("labeler", "timestamp") if isinstance(row.get(part), str))
        problem = column(question, "problem", str, within="question.")
        return [Bag(problem, response, tuple(spans), label, gold, id=name or None)]

    rows, source = load_rows(data, source)
    return read_each(rows, source, make, left_out="have no rated step")


def _rated_steps(given: list[Any]) -> tuple[list[str], list[float]]:
    """Texts and labels of the steps that the solution went on with, up to the last one rated."""
    steps, labels = [], []
    for number, step in enumerate(given, 1):
        if not isinstance(step, Mapping):
            raise TypeError(f"step {number} is {type(step).__name__}; make it an object with 'completions'.")
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        human = step.get("human_completion")
        text = human.get("text") if isinstance(human, Mapping) else human
        if chosen is not None:
            if chosen not in range(len(completions)):
                raise ValueError(f"step {number} chose completion {chosen!r} of {len(completions)}; mend its index.")
            taken = completions[int(chosen)]
        elif text is not None:
            taken = {"text": text, "rating": 1}
        elif completions:
            taken = completions[0]
        else:
            break
        rating = taken.get("rating")
        if rating is None:
            break
        if rating not in (-1, 0, 1):
            raise ValueError(f"the rating of step {number} is {rating!r}; give -1, 0, 1 or null.")
        steps.append(column(taken, "text", str, within="completions."))
        labels.append(0.0 if rating == -1 else 1.0)
        if chosen is None and text is None:
            break  # whatever comes next does not follow this step
    return steps, labels


def read_processbench(data: Data, *, source: str | None = None, answer_labels: bool = False) -> list[Bag]:
    """Bags of ProcessBench: model solutions in which people looked for the first wrong step.

    Official files: `gsm8k.json`, `math.json`, `olympiadbench.json`, `omnimath.json`. A row has `id`, `generator`,
    `problem`, `steps`, `final_answer_correct` and `label`: the index of the first wrong step, from 0, or -1.

    Label of a step: 1 before the first wrong step, 0 at it, not known after it. Label of a response: 1 iff no step is
    wrong; with `answer_labels`, whether its final answer is right, the label one has in practice (it is right after a
    wrong step in some solutions). A test set: do not train on it.

    Args:
        data: A file, or rows.
        source: Name of the data in error messages.
        answer_labels: Take `final_answer_correct` as the response's label.

    Returns:
        One bag a row.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a column is missing, or the label is no step.

    Source:
        Zheng et al., ProcessBench, 2024 (arXiv 2412.06559); huggingface.co/datasets/Qwen/ProcessBench (Apache-2.0).

    Example:
        >>> row = {"id": "a", "problem": "1+1+1?", "steps": ["1+1=3.", "3+1=4."], "label": 0}
        >>> read_processbench([row])[0].step_labels
        (0.0, None)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        steps, first = column(row, "steps", list), column(row, "label", int)
        if first not in range(-1, len(steps)):
            raise ValueError(f"the label is {first}, no step of {len(steps)}; give -1 or an index from 0.")
        gold = [1.0] * len(steps) if first < 0 else [1.0] * first + [0.0] + [None] * (len(steps) - first - 1)
        label = column(row, "final_answer_correct", bool) if answer_labels else first < 0
        response, spans = join_steps(steps)
        return [Bag(column(row, "problem", str), response, tuple(spans), label, tuple(gold), id=_name(row, "id"))]

    rows, source = load_rows(data, source)
    return read_each(rows, source, make)


def read_prmbench(data: Data, *, source: str | None = None, originals: bool = True) -> list[Bag]:
    """Bags of PRMBench: solutions from PRM800K into which a model wrote errors of nine kinds.

    Official file: `prmbench_preview.jsonl`. A row has `idx`, `classification` (the kind of error), `modified_question`,
    `modified_process` (the steps) and `error_steps` (from 1), and the same solution without errors in
    `original_question` and `original_process`.

    Label of a step: 0 iff it is in `error_steps`. Label of a response: 1 iff none is. Steps of the kinds `redundency`
    and `circular` are not strictly wrong. The errors are a model's, not natural ones.

    Args:
        data: A file, or rows.
        source: Name of the data in error messages.
        originals: Also give the original solution of each `redundency` row, as a good response: the official
            evaluation takes its good responses from there.

    Returns:
        A bag a row, in front of it the original if it is taken. The id of a bag is its kind (or `correct`) and `idx`.

    Raises:
        TypeError: If a value has the wrong type.
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
        steps, errors = column(row, "modified_process", list), column(row, "error_steps", list)
        kind, name = column(row, "classification", str), _name(row, "idx")
        if not all(type(error) is int for error in errors):
            raise TypeError(f"error_steps is {errors}; make it a list of whole numbers from 1.")
        if not set(errors) <= set(range(1, len(steps) + 1)):
            return []
        bags = [_prmbench_bag(column(row, "modified_question", str), steps, errors, f"{kind}_{name}")]
        if originals and kind == "redundency":
            solution = column(row, "original_process", list)
            bags.insert(0, _prmbench_bag(column(row, "original_question", str), solution, [], f"correct_{name}"))
        return bags

    rows, source = load_rows(data, source)
    return read_each(rows, source, make, left_out="name an error step that their solution does not have")


def _prmbench_bag(prompt: str, steps: list[Any], errors: list[int], name: str) -> Bag:
    response, spans = join_steps(steps)
    gold = tuple(float(number not in errors) for number in range(1, len(steps) + 1))
    return Bag(prompt, response, tuple(spans), min(gold), gold, id=name)


def _name(row: Mapping[str, Any], name: str) -> str:
    return str(column(row, name, (str, int)))
