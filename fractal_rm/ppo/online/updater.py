"""Continued bag-loss training of a finished step reward model: a few steps at a time, which can be rolled back."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fractal_rm.evaluation.statistics import bag_metrics
from fractal_rm.files import replacing
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.reward_model import StepRewardModel, probabilities
from fractal_rm.reward_training.data import BagCollator, BagDataset
from fractal_rm.reward_training.model_setup import move_to_group
from fractal_rm.scorers.checkpoint import head_parameters, make_inputs
from fractal_rm.scorers.published import PublishedSettings

# FractalTrainer's default for `head_learning_rate`.
_HEAD_FACTOR = 10.0


class RewardModelUpdater:
    """Trains a step reward model in place, in float32, with the bag loss of its original training.

    Aggregation and shares of wrong labels come from its settings; priors and other loss terms are left out.

    Args:
        reward_model: The model, without PEFT adapters.
        learning_rate: Learning rate of AdamW; the scorer's own parameters (weight and bias, or the head) get ten times
            that.
        batch_size: Responses per forward pass in evaluation.
        max_grad_norm: Largest norm of the gradient; 0: no limit.

    Raises:
        ValueError: If the model scores grades, is a published model, has adapters, or all its weights are frozen.
    """

    def __init__(
        self, reward_model: StepRewardModel, *, learning_rate: float, batch_size: int, max_grad_norm: float
    ) -> None:
        self.scorer, self.settings = reward_model.scorer, reward_model.settings
        if self.settings.num_grades is not None:
            raise ValueError(
                "`rm_update_every` continues training on outcomes in [0, 1], but the reward model scores grades. "
                "Set `rm_update_every=0`, or train one on labels that say good or bad."
            )
        if isinstance(self.settings, PublishedSettings):
            raise ValueError(
                "`rm_update_every` trains the reward model, but this is the published model "
                f"{self.settings.published.name}. Set `rm_update_every=0`, or train your own model."
            )
        if self.scorer.is_adapted:
            raise ValueError(
                "`rm_update_every` trains all weights of the reward model, which has PEFT adapters. Merge them: "
                "`reward_model.save_pretrained(folder)`, and give the folder."
            )
        self.scorer.float()  # in half precision, rounding would lose small updates
        self.parameters = [parameter for parameter in self.scorer.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("All weights of the reward model are frozen, but `rm_update_every` trains them.")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        move_to_group(self.optimizer, head_parameters(self.scorer, self.settings), _HEAD_FACTOR * learning_rate)
        self.inputs = make_inputs(reward_model.processor, self.settings)
        self.collate = BagCollator(self.inputs)
        self.batch_size, self.max_grad_norm = batch_size, max_grad_norm

    def encode(self, bags: Sequence[Any], source: str) -> BagDataset:
        """Encode labelled bags as this model's input; gold step labels are not read."""
        return BagDataset(bags, self.inputs, self.settings, source=source, reads_gold=False)

    def _logits(self, items: Sequence[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Step logits of items, with their batch."""
        device = self.parameters[0].device
        batch = {name: values.to(device) for name, values in self.collate(items).items()}
        return self.scorer(**{name: batch[name] for name in self.scorer.inputs}), batch

    def learn(self, batches: Sequence[Sequence[dict[str, Any]]]) -> float:
        """Take one optimizer step per batch of items; returns the mean loss, in nats per response.

        Dropout draws from torch's global generators.
        """
        self.scorer.train()
        total, count = 0.0, 0
        for items in batches:
            logits, batch = self._logits(items)
            loss = bag_loss(
                logits,
                batch["bag_labels"],
                batch["mask"],
                aggregation=self.settings.aggregation,
                sharpness=self.settings.sharpness,
                label_noise=(self.settings.missed_good, self.settings.missed_bad),
            )
            self.optimizer.zero_grad()
            loss.mean().backward()
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
            self.optimizer.step()
            total, count = total + loss.sum().item(), count + len(loss)
        self.optimizer.zero_grad()
        self.scorer.eval()
        return total / count

    @torch.no_grad()
    def bag_auc(self, data: BagDataset) -> float:
        """Probability that a good response scores above a bad one; NaN without both kinds, or if a score is NaN."""
        self.scorer.eval()
        scores: list[Tensor] = []
        for start in range(0, len(data), self.batch_size):
            logits, batch = self._logits([data[i] for i in range(start, min(start + self.batch_size, len(data)))])
            scores.append(probabilities(logits, batch["mask"], self.settings)[1].cpu())
        found = torch.cat(scores)
        if not found.isfinite().all():
            return float("nan")
        labels = [float(data.bags[row].label or 0.0) for item in data.items for row in item]
        return bag_metrics(found.double().numpy(), labels)["bag_auc"]

    def snapshot(self) -> Any:
        """Copy of the weights and optimizer state, for [`restore`]."""
        return copy.deepcopy((self.scorer.state_dict(), self.optimizer.state_dict()))

    def restore(self, snapshot: Any) -> None:
        """Undo everything learned since the snapshot."""
        weights, optimizer = snapshot
        self.scorer.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)

    def save_optimizer(self, file: Path) -> None:
        """Write the optimizer's state, by number of the parameter."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}
        with replacing(file) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)

    def load_optimizer(self, file: Path) -> None:
        """Read what [`save_optimizer`] wrote."""
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in load_file(file).items():
            number, name = key.split(".")
            state[int(number)][name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
