"""The implicit process reward, a rival of step reward models.

It needs a second, frozen copy of the language model: a step scores `beta` times the log-ratio of its likelihood under
the trained and under the reference model; a response scores as their sum, which the response label trains (Yuan et al.,
"Free Process Rewards without Process Labels", 2024; updated online in PRIME, Cui et al., 2025).
"""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fractal_rm.data.bag import Bag, Step, StepScores
from fractal_rm.scorers.checkpoint import load_model, load_tokenizer, make_scorer
from fractal_rm.scorers.inputs import TokenInputs
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.study.rivals import ScriptedRewardModel

# Responses per forward pass.
SCORED_AT_ONCE = 64


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
        super().__init__(lambda prompts, steps: [])
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
