"""Scores of the steps of a response, from whatever scores them; readable without a model library."""

import math
from dataclasses import dataclass, field

from fractal_rm.data.bag import Span


@dataclass(frozen=True)
class Step:
    """One step of a response: its text, its characters `start:end` of the response, and P(step is good)."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class StepScores:
    """Scores of one response.

    Args:
        response: The response as scored.
        steps: Its steps with scores in [0, 1].
        score: Aggregated P(response is good); NaN if the response could not be scored.
        truncated_steps: Steps beyond `max_length`, left out of `steps` and `score`.
        error: Why the response could not be scored, else None.
        empty: Whether the response has no step, so there was nothing to score.
    """

    response: str
    steps: list[Step] = field(default_factory=list)
    score: float = math.nan
    truncated_steps: int = 0
    error: str | None = None
    empty: bool = False

    @property
    def judged(self) -> bool:
        """Whether every step has a score. The unscored rest of a truncated response is of unknown quality."""
        if self.empty or not self.response.strip():
            return True
        return self.error is None and not self.truncated_steps

    @property
    def step_scores(self) -> list[float]:
        """The scores alone."""
        return [step.score for step in self.steps]

    @property
    def spans(self) -> list[Span]:
        """The characters alone."""
        return [(step.start, step.end) for step in self.steps]
