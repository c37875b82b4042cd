"""The messages of the server: requests become responses to score, and scores become answers.

The server shows the models as a JSON schema at `/openapi.json`.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fractal_rm.data.bag import Span, StepScores
from fractal_rm.data.prompts import Prompt, RenderedPrompt, is_chat
from fractal_rm.reward_model import StepRewardModel

# A batch numbers the rows of several requests; an answer numbers the rows of its own request.
_NUMBER = re.compile(r"\Arow \d+: ")
# Spellings of special tokens in addition to the named ones: turns, starts, endings, padding.
_MARK = re.compile(
    r"<\|[^|<>\s]{1,60}\|?>|<[^|<>\s]{1,60}\|>|<\uff5c[^\uff5c<>]{1,60}\uff5c>|</?s>|<(?:pad|bos|eos|unk)>"
    r"|<(?:start|end)_of_turn>|\[(?:PAD|CLS|SEP|BOS|EOS)\]"
)
# Vowels and endings of Korean syllables in the decomposed form, and half-width voice marks of Japanese: parts of a
# character that are letters of their own.
_PARTS = frozenset(map(chr, [*range(0x1160, 0x1200), 0xFF9E, 0xFF9F]))
# Invisible characters: format characters and variation selectors.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]")
# Characters of a query and a prompt in a message.
_SHOWN = 80


class Message(BaseModel):
    """A message of a chat. Further keys are passed to the chat template unchanged."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Any = Field(default=None, description="A text, parts of text, or null with `tool_calls`.")


class ScoreRequest(BaseModel):
    """Responses to score: texts (optionally with the characters of their steps), or lists of steps.

    Exactly one of `responses` and `steps` is given; every list has one entry for each response.
    """

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | list[Message]] = Field(description="Texts or chats, one for each response.")
    responses: list[str | list[Message]] | None = Field(
        default=None,
        description="Texts, or chats that begin with the assistant, cut into steps as in training; what others say in "
        "a chat is context.",
    )
    spans: list[list[tuple[StrictInt, StrictInt]] | None] | None = Field(
        default=None, description="For each text the characters `[start, end]` of its steps, null to have it cut."
    )
    steps: list[list[str]] | None = Field(
        default=None,
        description="In place of `responses`: the texts of the steps of each, joined as they stood in training.",
    )

    rendered: StrictBool = Field(
        default=False, description="The prompts are texts as the policy reads them: no template is applied to them."
    )

    @field_validator("responses", "steps", mode="before")
    @classmethod
    def _of_one_kind(cls, given: Any, info: ValidationInfo) -> Any:
        """Lists of steps belong in `steps`, texts and chats in `responses`; a request has one of these."""
        if not isinstance(given, list):
            return given
        listed = [isinstance(one, list) and any(isinstance(part, str) for part in one) for one in given]
        if info.field_name == "responses" and any(listed):
            raise ValueError(
                f"entry {listed.index(True)} is a list of steps; send lists of steps as `steps` in a request of their "
                "own, or join them to a text"
            )
        text = next((row for row, one in enumerate(given) if isinstance(one, str)), None)
        if info.field_name == "steps" and text is not None:
            raise ValueError(f"entry {text} is a text; send texts as `responses` in a request of their own")
        return given

    @model_validator(mode="after")
    def _one_of_each(self) -> "ScoreRequest":
        given = self.responses if self.steps is None else self.steps
        if given is None or (self.responses is not None and self.steps is not None):
            raise ValueError("give one of `responses` and `steps`")
        if self.spans is not None and self.responses is None:
            raise ValueError("`spans` belong to `responses`; leave them out, or give `responses` in place of `steps`")
        lengths = {"prompts": len(self.prompts), "responses" if self.steps is None else "steps": len(given)}
        lengths |= {} if self.spans is None else {"spans": len(self.spans)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{', '.join(f'{count} {name}' for name, count in lengths.items())}: give as many of each")
        return self


class ScoredStep(BaseModel):
    """A step: characters `start:end` of the response, and P(step is good)."""

    text: str
    start: int
    end: int
    score: float


class ScoredResponse(BaseModel):
    """The scores of one response. If it cannot be scored, `error` has the reason and `score` is null."""

    response: str | None = Field(
        description="Of steps, or a chat of several messages: the text that they were joined to, in which spans count."
    )
    steps: list[ScoredStep]
    score: float | None = Field(description="Aggregated P(response is good).")
    truncated_steps: int = Field(description="Steps beyond the model's `max_length`: neither scored nor listed.")
    error: str | None = None


class ScoreAnswer(BaseModel):
    """One result for each response, in order."""

    results: list[ScoredResponse]


class Health(BaseModel):
    """Which model answers."""

    status: Literal["ok"] = "ok"
    model: str
    scorer: str
    aggregation: str
    threshold: float = Field(description="A step scoring below it is called wrong.")
    version: str


class Refusal(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


class OpenRLHFRequest(BaseModel):
    """What OpenRLHF posts to `remote_rm_url`: complete texts, and the prompts that they start with."""

    query: list[str] = Field(description="Prompt and response as one text, special tokens included.")
    prompts: list[str] = Field(description="The prompts alone, as the policy sees them.")
    labels: Any = Field(default=None, description="Reference answers; not read.")

    @model_validator(mode="after")
    def _as_many(self) -> "OpenRLHFRequest":
        if len(self.query) != len(self.prompts):
            raise ValueError(f"{len(self.query)} query, {len(self.prompts)} prompts: give as many of each")
        return self


class OpenRLHFAnswer(BaseModel):
    """What OpenRLHF reads: rewards for learning, scores in [0, 1] for filtering, numbers to log."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class PromptedResponse(NamedTuple):
    """One response to score: a text, a chat or a list of steps; without `spans`, a text is cut as in training."""

    prompt: Prompt
    response: str | list[Any]
    spans: list[Span] | None = None

    @property
    def characters(self) -> int:
        """Number of characters, counting all that a chat template may show of a message."""
        texts: list[Any] = [*self.prompt] if is_chat(self.prompt) else [self.prompt]
        texts += [self.response] if isinstance(self.response, str) else self.response
        return sum(len(text if isinstance(text, str) else json.dumps(text)) for text in texts)


def read_request(request: ScoreRequest) -> list[PromptedResponse]:
    """The responses of a request to `/score`."""
    prompts = [
        RenderedPrompt(prompt) if request.rendered and isinstance(prompt, str) else _plain(prompt)
        for prompt in request.prompts
    ]
    responses = request.steps or [_plain(response) for response in request.responses or []]
    spans = request.spans or [None] * len(prompts)
    return [PromptedResponse(*row) for row in zip(prompts, responses, spans, strict=True)]


def _plain(said: str | list[Message]) -> Any:
    """A text as it is; a chat as messages without the keys that were not sent."""
    return said if isinstance(said, str) else [message.model_dump(exclude_unset=True) for message in said]


def read_openrlhf(request: OpenRLHFRequest, ends: Sequence[str]) -> list[PromptedResponse]:
    """The responses of an OpenRLHF request: what follows each prompt, without the special tokens `ends` at its end.

    OpenRLHF decodes a query from token ids, so it may differ from the prompt that was encoded: in white space, in
    special tokens, in invisible characters, in the Unicode form. If only these differ, the prompt is still found.

    Raises:
        ValueError: If a query does not begin with its prompt, so that the start of the response is unknown; names the
            row.

    Example:
        >>> request = OpenRLHFRequest(query=["<s>2+2?\\n4.</s></s>"], prompts=["2+2?\\n"])
        >>> read_openrlhf(request, ["</s>"])
        [PromptedResponse(prompt='2+2?\\n', response='4.', spans=None)]
    """
    found = []
    for row, (query, prompt) in enumerate(zip(request.query, request.prompts, strict=True)):
        start = _prompt_end(query, prompt, ends)
        if start is None:
            raise ValueError(
                f"`query[{row}]` does not begin with `prompts[{row}]`, also when white space, special tokens and the "
                f"Unicode form are left aside (query {query[:_SHOWN]!r}, prompt {prompt[:_SHOWN]!r}). Send prompts as "
                "the policy reads them, and shorter ones if OpenRLHF cuts them; name the policy's special tokens by "
                "`--ends`."
            )
        response = query[start:]
        stop = len(response)  # the text is cut once, however many endings it has
        while (end := next((end for end in ends if end and response.endswith(end, 0, stop)), None)) is not None:
            stop -= len(end)
        found.append(PromptedResponse(RenderedPrompt(prompt), response[:stop]))
    return found


def _prompt_end(query: str, prompt: str, marks: Sequence[str]) -> int | None:
    """Where in a query its prompt ends; None if the query does not begin with it."""
    before, exact, _ = query.partition(prompt) if prompt else ("", "", query)
    mark = re.compile("|".join([*map(re.escape, filter(None, marks)), _MARK.pattern]))
    if (exact or not prompt) and not mark.sub("", before).strip():
        return len(before) + len(exact)
    given, position = _letters(query, mark), 0
    for letter, _ in _letters(prompt, mark):
        found, position = next(given, ("", 0))
        if found != letter:
            return None
    return _behind_ending(query, position, prompt, mark)


def _letters(text: str, mark: re.Pattern[str]) -> Iterator[tuple[str, int]]:
    """The visible characters of a text outside special tokens, in one Unicode form, each with the place after it."""
    place = 0
    for between in [*mark.finditer(text), None]:
        stop = len(text) if between is None else between.start()
        while place < stop:
            start = place
            place += 1
            while place < stop and (unicodedata.combining(text[place]) or text[place] in _PARTS):
                place += 1  # an accent or a part of a syllable: one character in the composed form
            for letter in unicodedata.normalize("NFKC", text[start:place]):
                if not letter.isspace() and not _UNSEEN.match(letter):
                    yield letter, place
        place = len(text) if between is None else between.end()


def _behind_ending(query: str, place: int, prompt: str, mark: re.Pattern[str]) -> int:
    """The place in a query after the white space and special tokens that end its prompt, if the query has them."""
    *_, last = [0, *(end for _, end in _letters(prompt, mark))]
    for part in re.findall(rf"{mark.pattern}|\s+", prompt[last:]):
        if part.isspace():
            space = len(query) - len(query[place:].lstrip()) - place
            place += min(space, len(part))
        elif query[place:].lstrip().startswith(part):
            place = query.index(part, place) + len(part)
    return place


def score_responses(reward_model: StepRewardModel, given: Sequence[PromptedResponse]) -> list[StepScores]:
    """Score responses of several requests in one call."""
    return reward_model.score(
        [one.prompt for one in given],
        [one.response for one in given],
        spans=[one.spans for one in given],
        batch_size=len(given),
        progress=False,
    )


def write_results(given: Sequence[PromptedResponse], results: Sequence[StepScores | Exception]) -> list[ScoredResponse]:
    """What `/score` says of each response that was given."""
    said = []
    for number, (one, result) in enumerate(zip(given, results, strict=True)):
        if isinstance(result, StepScores):
            error = result.error
        else:  # a library's message may reveal too much
            ours = isinstance(result, ValueError | TypeError)
            error = str(result) if ours else f"it could not be scored ({type(result).__name__})."
            result = StepScores("")
        said.append(
            ScoredResponse(
                response=None if isinstance(one.response, str) else result.response,
                steps=[ScoredStep(**vars(step)) for step in result.steps],
                score=None if math.isnan(result.score) else result.score,
                truncated_steps=result.truncated_steps,
                error=None if error is None else f"row {number}: {_NUMBER.sub('', error)}",
            )
        )
    return said


def write_openrlhf(given: Sequence[PromptedResponse], results: Sequence[StepScores | Exception]) -> OpenRLHFAnswer:
    """OpenRLHF's answer: a response that is empty, or cannot be scored while others can, gets 0 and counts as unscored.

    Raises:
        ValueError: If no response is scored although some have text: training would continue with the worst score for
            all.
    """
    scores = [math.nan if isinstance(result, Exception) else result.score for result in results]
    unscored = [float(math.isnan(score)) for score in scores]
    written = [row for row, one in enumerate(given) if str(one.response).strip()]
    if written and all(unscored):
        error = write_results([given[written[0]]], [results[written[0]]])[0].error or ""
        raise ValueError(f"None of {len(given)} responses could be scored. First: {_NUMBER.sub('', error)}")
    rewards = [0.0 if math.isnan(score) else score for score in scores]
    return OpenRLHFAnswer(rewards=rewards, scores=rewards, extra_logs={"unscored": unscored})
