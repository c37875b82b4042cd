"""Requests -> rows of a reward model, and scores -> answers."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fractal_rm.data.prompts import Prompt, RenderedPrompt, is_chat
from fractal_rm.data.segmentation import Span
from fractal_rm.reward_model import StepRewardModel, StepScores
from fractal_rm.serving.schema import OpenRLHFAnswer, OpenRLHFRequest, ScoredResponse, ScoredStep, ScoreRequest

# A batch numbers the rows of several requests; the reader of an answer knows those of one.
_NUMBER = re.compile(r"\Arow \d+: ")


class Row(NamedTuple):
    """One response to score: a text, or a list of steps; `spans` None has a text cut as in training."""

    prompt: Prompt
    response: str | list[str]
    spans: list[Span] | None = None

    @property
    def characters(self) -> int:
        """How much text it is; of a message whatever a chat template may show."""
        texts = [json.dumps(message) for message in self.prompt] if is_chat(self.prompt) else [self.prompt]
        answers = [self.response] if isinstance(self.response, str) else self.response
        return sum(map(len, [*texts, *answers]))


def rows_of(request: ScoreRequest) -> list[Row]:
    """The rows of a request to `/score`."""
    prompts = [
        prompt if isinstance(prompt, str) else [message.model_dump() for message in prompt]
        for prompt in request.prompts
    ]
    responses: Sequence[str | list[str]] = (request.responses if request.steps is None else request.steps) or []
    spans = request.spans or [None] * len(prompts)
    return [Row(*row) for row in zip(prompts, responses, spans, strict=True)]


def openrlhf_rows(request: OpenRLHFRequest, ends: Sequence[str]) -> list[Row]:
    """The rows of a request of OpenRLHF: what follows the prompt in each text, without special tokens at its end.

    A text that does not hold its prompt (OpenRLHF cuts prompts that are too long) becomes a row without a response,
    which cannot be scored.

    Args:
        request: The request.
        ends: Texts to take off the end of a response, such as the end-of-text token.

    Example:
        >>> request = OpenRLHFRequest(query=["<s>2+2?\\n4.</s></s>"], prompts=["2+2?\\n"])
        >>> openrlhf_rows(request, ["</s>"])
        [Row(prompt='2+2?\\n', response='4.', spans=None)]
    """
    rows = []
    for query, prompt in zip(request.query, request.prompts, strict=True):
        response = query.partition(prompt)[2] if prompt else query
        stop = len(response)  # the text is cut once, however many of them there are
        while (end := next((end for end in ends if end and response.endswith(end, 0, stop)), None)) is not None:
            stop -= len(end)
        rows.append(Row(RenderedPrompt(prompt), response[:stop]))
    return rows


def score_rows(reward_model: StepRewardModel, rows: Sequence[Row]) -> list[StepScores]:
    """Score rows of any requests in one call."""
    return reward_model.score(
        [row.prompt for row in rows],
        [row.response for row in rows],
        spans=[row.spans for row in rows],
        batch_size=len(rows),
        progress=False,
    )


def answer(results: Sequence[StepScores | Exception]) -> list[ScoredResponse]:
    """What `/score` says of each response.

    Args:
        results: Scores, or why there are none.
    """
    said = []
    for number, result in enumerate(results):
        if isinstance(result, Exception):
            said.append(_unscored(number, result))
            continue
        error = None if result.error is None else f"row {number}: {_NUMBER.sub('', result.error)}"
        steps = [ScoredStep(text=x.text, start=x.start, end=x.end, score=x.score) for x in result.steps]
        score = None if math.isnan(result.score) else result.score
        said.append(ScoredResponse(steps=steps, score=score, truncated_steps=result.truncated_steps, error=error))
    return said


def openrlhf_answer(results: Sequence[StepScores | Exception]) -> OpenRLHFAnswer:
    """What OpenRLHF reads: a response that cannot be scored gets 0, and counts as `unscored` in what it logs."""
    scores = [math.nan if isinstance(result, Exception) else result.score for result in results]
    unscored = [float(math.isnan(score)) for score in scores]
    rewards = [0.0 if math.isnan(score) else score for score in scores]
    return OpenRLHFAnswer(rewards=rewards, scores=rewards, extra_logs={"unscored": unscored})


def _unscored(number: int, error: Any) -> ScoredResponse:
    """Our own sentences are for the reader; what a library says may hold more than he should see."""
    told = (
        str(error) if isinstance(error, ValueError | TypeError) else f"it could not be scored ({type(error).__name__})."
    )
    return ScoredResponse(steps=[], score=None, truncated_steps=0, error=f"row {number}: {_NUMBER.sub('', told)}")
