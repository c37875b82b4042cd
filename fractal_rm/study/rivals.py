"""Replacements of a step reward model: rules (upper bound and control), and scores of whole responses."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.tasks.task import Task

# Prompt and the texts of the steps -> a score in [0, 1] for each step.
Rule = Callable[[str, list[str]], list[float]]
# The same for many responses at once, which may be compared with each other.
GroupRule = Callable[[Sequence[str], Sequence[list[str]]], list[list[float]]]


class ScriptedRewardModel(StepRewardModel):
    """Scores steps, one per line, by a rule."""

    def __init__(self, rule: GroupRule) -> None:
        self.rule, self.settings, self.processor = rule, FractalSettings(segmentation=Segmentation("lines")), None
        self.scorer: Any = nn.Identity()

    @property
    def tokenizer(self) -> None:
        """A rule reads text."""
        return None

    def score(self, prompts: Sequence[Any], responses: Sequence[Any], **kwargs: Any) -> list[StepScores]:
        """Scores like a reward model's; a response scores as its worst step."""
        spans = [self.settings.segmentation(text) if text.strip() else [] for text in responses]
        rows = [row for row, cut in enumerate(spans) if cut]
        steps = [[responses[row][a:b] for a, b in spans[row]] for row in rows]
        found = [StepScores(text, error="The response is empty.") for text in responses]
        for row, cut, scores in zip(rows, steps, self.rule([prompts[row] for row in rows], steps), strict=True):
            scored = zip(cut, spans[row], scores, strict=True)
            found[row] = StepScores(responses[row], [Step(text, *span, one) for text, span, one in scored], min(scores))
        return found


def one_by_one(rule: Rule) -> GroupRule:
    """Apply a rule to one response at a time."""
    return lambda prompts, steps: [rule(prompt, cut) for prompt, cut in zip(prompts, steps, strict=True)]


def oracle(task: Task) -> Rule:
    """The checker's own step labels; the rule raises ValueError if the task cannot check steps."""

    def rule(prompt: str, steps: list[str]) -> list[float]:
        flags = task.read(prompt).check_steps("\n".join(" ".join(step.splitlines()) for step in steps))
        if flags is None:
            raise ValueError(
                f"The task {task.name!r} cannot check steps. Leave out the arms that need gold step labels."
            )
        return [float(good) for good in flags]

    return rule


def random_steps(prompt: str, steps: list[str]) -> list[float]:
    """Uniform noise that depends only on the step and its response."""
    keys = [f"{prompt}\0{steps}\0{number}".encode() for number in range(len(steps))]
    return [int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32 for key in keys]


class WholeResponseReward:
    """A reward model of one-step responses as a TRL reward function: one score for each completion."""

    __name__ = "response_reward_model"

    def __init__(self, reward_model: StepRewardModel) -> None:
        self.reward_model = reward_model

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """P(response is good); 0 for an empty completion."""
        rows = [i for i, text in enumerate(completions) if text.strip()]
        scored = self.reward_model.score(
            [prompts[i] for i in rows],
            [completions[i] for i in rows],
            spans=[[(0, len(completions[i].rstrip()))] for i in rows],
            progress=False,
        )
        found = {i: result.score for i, result in zip(rows, scored, strict=True)}
        return [found.get(i, 0.0) for i in range(len(completions))]
