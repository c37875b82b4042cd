"""Rivals of a step reward model that stand in its place: rules, other readings of a reward model, other rewards.

Rules are upper bound and controls. The implicit process reward needs a second, frozen copy of the language model: a
step scores `beta` times the log-ratio of its likelihood under the trained and under the reference model; a response
scores as their sum, which the response label trains (Yuan et al., "Free Process Rewards without Process Labels", 2024;
updated online in PRIME, Cui et al., 2025).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import Step, StepRewardModel, StepScores
from fractal_rm.scorers.checkpoint import load_model, load_tokenizer, make_scorer
from fractal_rm.scorers.inputs import TokenInputs
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.tasks.task import Task

# Prompt and the texts of the steps -> a score in [0, 1] for each step.
Rule = Callable[[str, list[str]], list[float]]
# Responses that the implicit reward scores at once.
SCORED_AT_ONCE = 64
RESULT = re.compile(r"(?:->|:)( \d)$", re.MULTILINE)


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


def oracle(task: Task) -> Rule:
    """The checker's own step labels.

    Args:
        task: The task, whose steps can be checked.

    Raises:
        ValueError: By the rule, if the task has no checker of steps.
    """

    def rule(prompt: str, steps: list[str]) -> list[float]:
        flags = task.read(prompt).check_steps("\n".join(steps))
        if flags is None:
            raise ValueError(
                f"The task {task.name!r} cannot check steps. Leave out the arms that need gold step labels."
            )
        return [float(good) for good in flags]

    return rule


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


def result_spans(response: str) -> tuple[Span, ...]:
    """The results that a response states, one a line; its lines where it states none.

    Example:
        >>> text = "1: add 4 -> 7\\nAnswer: 7"
        >>> [text[a:b] for a, b in result_spans(text)]
        [' 7', ' 7']
    """
    return tuple(match.span(1) for match in RESULT.finditer(response)) or tuple(Segmentation("lines")(response))


class ResultTokenModel(StepRewardModel):
    """A reward model that reads of each step its result only: what a policy does to get there is not scored."""

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        """Scores of the results."""
        spans = [result_spans(text) if text.strip() else None for text in responses]
        return super().score(prompts, responses, spans=spans, **kwargs)


class WholeResponseReward:
    """A response-level reward model as TRL reward function: one score for each completion.

    Args:
        reward_model: One that was trained on responses of one step.
    """

    __name__ = "response_reward_model"

    def __init__(self, reward_model: StepRewardModel) -> None:
        self.reward_model = reward_model

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """P(response is good); an empty completion is not."""
        rows = [i for i, text in enumerate(completions) if text.strip()]
        scored = self.reward_model.score(
            [prompts[i] for i in rows],
            [completions[i] for i in rows],
            spans=[[(0, len(completions[i].rstrip()))] for i in rows],
            progress=False,
        )
        found = {i: result.score for i, result in zip(rows, scored, strict=True)}
        return [found.get(i, 0.0) for i in range(len(completions))]


class ImplicitReward:
    """Trains a causal language model so that its log-ratio to the reference tells good responses from bad ones.

    Args:
        path: The language model, which is also the reference.
        beta: Weight of the log-ratio.
        seed: Seed of the order of the data.
        trained: A folder that [`ImplicitReward.save`] wrote; None: not trained yet.
    """

    def __init__(self, path: Path, beta: float, seed: int, *, trained: Path | None = None) -> None:
        torch.manual_seed(seed)
        self.settings = FractalSettings(scorer="likelihood", reduction="sum")
        self.inputs = TokenInputs(load_tokenizer(path), self.settings)
        models = [load_model(path, self.settings, dtype=torch.float32)[0] for path in (trained or path, path)]
        # Weight 1 and offset 0: the log-likelihood itself.
        self.scorer, self.reference = (make_scorer(model, self.settings).eval() for model in models)
        self.beta = beta
        self.optimizer: torch.optim.Optimizer | None = None

    def save(self, folder: Path) -> None:
        """Write the trained language model as an ordinary folder."""
        self.scorer.model.save_pretrained(folder)
        self.inputs.tokenizer.save_pretrained(folder)

    def ratios(self, batch: dict[str, Tensor]) -> Tensor:
        """Step scores (B, S), 0 at padding."""
        with torch.no_grad():
            reference = self.reference(**batch)
        return (self.beta * (self.scorer(**batch) - reference)).masked_fill(~batch["mask"], 0.0)

    def encode(self, bags: Sequence[Bag]) -> list[Any]:
        """Token ids of bags."""
        return self.inputs.encode(bags)

    def train(
        self, bags: Sequence[Bag], *, learning_rate: float, epochs: int, batch_size: int, max_steps: int | None = None
    ) -> None:
        """Cross entropy of the summed log-ratio and the response label.

        Args:
            bags: Responses with labels.
            learning_rate: Of AdamW; it falls to 0 on a line.
            epochs: Passes over the responses.
            batch_size: Responses in a step.
            max_steps: Stop after so many steps; None: after the epochs.
        """
        optimizer = self._make_optimizer(learning_rate)
        encoded, labels = self.encode(bags), torch.tensor([float(bag.label or 0.0) for bag in bags])
        order = torch.cat([torch.randperm(len(bags)) for _ in range(epochs)]).split(batch_size)[:max_steps]
        for number, rows in enumerate(order):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - number / len(order))
            self._learn(optimizer, [encoded[i] for i in rows], labels[rows])

    def learn_on(self, bags: Sequence[Bag], *, learning_rate: float, batch_size: int) -> None:
        """One pass over new responses, by an optimizer that lives as long as this object.

        Args:
            bags: Responses with labels.
            learning_rate: Of AdamW; it stays as it is at the first call.
            batch_size: Responses in a step.
        """
        self.optimizer = self.optimizer or self._make_optimizer(learning_rate)
        encoded, labels = self.encode(bags), torch.tensor([float(bag.label or 0.0) for bag in bags])
        for rows in torch.randperm(len(bags)).split(batch_size):
            self._learn(self.optimizer, [encoded[i] for i in rows], labels[rows])

    def _make_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.scorer.model.parameters(), lr=learning_rate, weight_decay=0.01)

    def _learn(self, optimizer: torch.optim.Optimizer, encoded: list[Any], labels: Tensor) -> None:
        loss = F.binary_cross_entropy_with_logits(self.ratios(self.inputs.pad(encoded)).sum(dim=1), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.scorer.model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def score(self, bags: Sequence[Bag]) -> list[StepScores]:
        """Scores in (0, 1): the sigmoid of log-ratios."""
        encoded, scored = self.encode(bags), []
        for start in range(0, len(bags), SCORED_AT_ONCE):
            part = bags[start : start + SCORED_AT_ONCE]
            ratios = self.ratios(self.inputs.pad(encoded[start : start + SCORED_AT_ONCE]))
            for bag, row in zip(part, ratios, strict=True):
                values = row[: len(bag.steps)]
                steps = [
                    Step(text, *span, score)
                    for text, span, score in zip(bag.steps, bag.step_spans, values.sigmoid().tolist(), strict=True)
                ]
                scored.append(StepScores(bag.response, steps, values.sum().sigmoid().item()))
        return scored


class ImplicitRewardModel(ScriptedRewardModel):
    """The implicit process reward in the place of a step reward model.

    Args:
        model: The trained language model and its reference.
        learning_rate: At which it learns on, where it does.
        batch_size: Responses in a step of that.
    """

    def __init__(self, model: ImplicitReward, learning_rate: float, batch_size: int) -> None:
        super().__init__(lambda prompt, response: [])
        self.model, self.learning_rate, self.batch_size = model, learning_rate, batch_size

    def learning_from(self, outcome: Callable[..., list[float]]) -> Callable[..., list[float]]:
        """The same outcome reward, from whose labels the model learns before it scores the rollout (PRIME).

        Args:
            outcome: A TRL reward function.
        """

        @wraps(outcome)
        def learn(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
            labels = outcome(prompts, completions, **kwargs)
            rows, bags = self._bags(prompts, completions, labels)
            if rows:
                self.model.learn_on(bags, learning_rate=self.learning_rate, batch_size=self.batch_size)
            return labels

        return learn

    def _bags(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[float | None]
    ) -> tuple[list[int], list[Bag]]:
        """Responses that are not empty: their rows, and their bags of lines."""
        cut = self.settings.segmentation
        rows = [i for i, text in enumerate(responses) if text.strip()]
        return rows, [Bag(prompts[i], responses[i], tuple(cut(responses[i])), labels[i]) for i in rows]

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        """Sigmoid of log-ratios, for steps and for the response."""
        rows, bags = self._bags(prompts, responses, [None] * len(responses))
        found = dict(zip(rows, self.model.score(bags), strict=True))
        return [found.get(i) or StepScores(text, error="The response is empty.") for i, text in enumerate(responses)]
