"""Scores for the rows of a file: one record per response; a bad row does not affect others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.prompts import is_chat
from fractal_rm.data.readers import read_row
from fractal_rm.data.segmentation import warn_of_uncut_responses
from fractal_rm.data.shapes import Columns
from fractal_rm.evaluation.responses import score_bags
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.inputs import prompt_text
from fractal_rm.scorers.published import PublishedSettings


def score_rows(
    reward_model: StepRewardModel,
    rows: Sequence[Mapping[str, Any] | Bag],
    *,
    source: str,
    columns: Columns | None = None,
) -> list[dict[str, Any]]:
    """Score the responses of rows in any format that `read_row` knows, labelled or not.

    Returns:
        One record per response (two for a preference), ready for JSON and for `write_viewer`: `row`, `id`, `prompt`,
        `response`, `label`, `score`, `steps` (each with `text`, `start`, `end`, `score`, `gold`), `truncated_steps`,
        and `error`, which is None unless the response could not be scored; then `steps` is empty and `score` None.
    """
    records: list[dict[str, Any]] = []
    bags: dict[int, Bag] = {}
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, Bag):
                found = [row]
            else:
                found = read_row(
                    row,
                    reward_model.segmentation,
                    source=source,
                    row=number,
                    columns=columns,
                    require_label=False,
                )
            _check_prompt(found[0], reward_model, f"{source}, row {number}")
        except (TypeError, ValueError) as error:
            row = vars(row) if isinstance(row, Bag) else row
            given = {name: _writable(row.get(name)) for name in ("id", "prompt")}
            response = next((row[name] for name in ("response", "completion") if isinstance(row.get(name), str)), None)
            records.append(_record(number, given, _writable(response)) | {"error": str(error)})
            continue
        for bag in found:
            bags[len(records)] = bag
            records.append(_record(number, vars(bag), bag.response))
    warn_of_uncut_responses([(bag.response, bag.step_spans) for bag in bags.values()], reward_model.segmentation)
    scored = score_bags(reward_model, list(bags.values())) if bags else []
    for (place, bag), result in zip(bags.items(), scored, strict=True):
        records[place] |= _found(bag, result, f"{source}, row {records[place]['row']}")
    return records


def add_second_model(records: Sequence[dict[str, Any]], reward_model: StepRewardModel) -> None:
    """Add `other_score` to records of `score_rows` and to their steps: another model's scores of the same steps.

    Steps keep their spans, whatever this model's segmentation.

    Raises:
        ValueError: If the other model cannot read the prompts.
    """
    scored = [record for record in records if record["error"] is None]
    results = reward_model.score(
        [record["prompt"] for record in scored],
        [record["response"] for record in scored],
        spans=[[(step["start"], step["end"]) for step in record["steps"]] for record in scored],
    )
    for record in records:
        record["other_score"] = None
    for record, result in zip(scored, results, strict=True):
        record["other_score"] = None if result.error is not None else _finite(result.score)
        others = [*result.step_scores, *[None] * len(record["steps"])]
        for step, other in zip(record["steps"], others, strict=False):
            step["other_score"] = other


def _check_prompt(bag: Bag, reward_model: StepRewardModel, where: str) -> None:
    try:
        reward_model.check_prompts([bag.prompt])
    except ValueError as error:
        # The model's message counts prompts from 0; name the row of the file instead.
        raise ValueError(f"{where}: {str(error).partition(': ')[2]}") from None
    if not is_chat(bag.prompt) or reward_model.tokenizer is None:
        return  # an embedding scorer needs no template: it reads the messages in sequence
    if isinstance(reward_model.settings, PublishedSettings):
        return  # its description says how messages are read
    try:
        prompt_text(bag.prompt, reward_model.tokenizer, reward_model.settings.prompt_template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _writable(value: Any) -> Any:
    """The same, with `?` for characters that no file can hold (lone surrogates)."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_writable(key): _writable(one) for key, one in value.items()}
    return [_writable(one) for one in value] if isinstance(value, list) else value


def _record(row: int, given: Mapping[str, Any], response: str | None) -> dict[str, Any]:
    """A record without scores."""
    known = {"row": row, "id": given.get("id"), "prompt": given.get("prompt"), "response": response}
    return known | {"label": given.get("label"), "score": None, "steps": [], "truncated_steps": 0, "error": None}


def _found(bag: Bag, result: StepScores, where: str) -> dict[str, Any]:
    """The fields that scores add to a record."""
    if result.error is not None:
        # The model's message counts rows of its batch from 0; name the row of the file instead.
        return {"error": f"{where}: {result.error.partition(': ')[2]}"}
    if not all(map(math.isfinite, result.step_scores)):
        return {"error": f"{where}: the model gives scores that are NaN; load it in float32, or restore its files."}
    gold = bag.step_labels or [None] * len(bag.step_spans)
    steps = [
        vars(step) | {"score": _finite(step.score), "gold": label}
        for step, label in zip(result.steps, gold, strict=False)
    ]
    return {"score": _finite(result.score), "steps": steps, "truncated_steps": result.truncated_steps}


def _finite(score: float) -> float | None:
    return score if math.isfinite(score) else None
