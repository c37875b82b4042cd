"""What goes over the wire. The server shows these models as a JSON schema at `/openapi.json`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Message(BaseModel):
    """A message of a chat. Further keys go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str


class ScoreRequest(BaseModel):
    """Responses to score: texts (optionally with the characters of their steps), or lists of steps."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | list[Message]] = Field(description="Texts or chats, one for each response.")
    responses: list[str] | None = Field(default=None, description="Texts, cut into steps as in training.")
    spans: list[list[tuple[int, int]] | None] | None = Field(
        default=None, description="For each text the characters `[start, end]` of its steps, null to have it cut."
    )
    steps: list[list[str]] | None = Field(
        default=None, description="In place of `responses`: the texts of the steps of each; a newline joins them."
    )

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
    """What was found of one response. One that cannot be scored has a reason in `error`, and `score` null."""

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
    """What OpenRLHF posts to `remote_rm_url`: whole texts, and the prompts that they start with."""

    query: list[str] = Field(description="Prompt and response as one text, special tokens included.")
    prompts: list[str] = Field(description="The prompts alone, as the policy sees them.")
    labels: Any = Field(default=None, description="Reference answers; not read.")

    @model_validator(mode="after")
    def _as_many(self) -> "OpenRLHFRequest":
        if len(self.query) != len(self.prompts):
            raise ValueError(f"{len(self.query)} query, {len(self.prompts)} prompts: give as many of each")
        return self


class OpenRLHFAnswer(BaseModel):
    """What OpenRLHF reads: rewards to learn from, scores in [0, 1] to filter by, numbers to log."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
