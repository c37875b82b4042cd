"""Step scores that no model gives: upper bound and controls, in the place of a reward model."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import Step, StepRewardModel, StepScores
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.tasks.arithmetic.variants import read_problem

# Prompt and the texts of the steps -> a score in [0, 1] for each step.
Rule = Callable[[str, list[str]], list[float]]


class ScriptedRewardModel(StepRewardModel):
    """Scores steps, one a line, by a rule.

    Args:
        rule: Gives the scores of a response.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule, self.settings, self.processor = rule, FractalSettings(segmentation=Segmentation("lines")), None
        self.scorer: Any = nn.Identity()

    @property
    def tokenizer(self) -> None:
        """A rule reads text."""
        return None

    def score(self, prompts: Sequence[Any], responses: Sequence[Any], **kwargs: Any) -> list[StepScores]:
        """Scores as those of a reward model; a response scores as its worst step."""
        return [self._score(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]

    def _score(self, prompt: str, text: str) -> StepScores:
        spans = self.settings.segmentation(text) if text.strip() else []
        if not spans:
            return StepScores(text, error="The response is empty.")
        scores = self.rule(prompt, [text[a:b] for a, b in spans])
        steps = [Step(text[a:b], a, b, score) for (a, b), score in zip(spans, scores, strict=True)]
        return StepScores(text, steps, min(scores))


def oracle(prompt: str, steps: list[str]) -> list[float]:
    """The checker's own step labels."""
    return [float(good) for good in read_problem(prompt).check_steps("\n".join(steps))]


def random_steps(prompt: str, steps: list[str]) -> list[float]:
    """Uniform noise, the same for the same step of the same response."""
    keys = [f"{prompt}\0{steps}\0{number}".encode() for number in range(len(steps))]
    return [int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32 for key in keys]


def copy_label(label: Callable[[str, str], float]) -> Rule:
    """The response's label at every step.

    Args:
        label: Gives the outcome label of a prompt and a response.
    """
    return lambda prompt, steps: [label(prompt, "\n".join(steps))] * len(steps)
