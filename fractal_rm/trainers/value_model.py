"""The value model of PPO: how it is made, what it learns, and the care that `Trainer` gives to the policy only."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def make_value_model(policy: Any, value_model: Any = None) -> PreTrainedModel:
    """A token classification model with one label, whose output before a token is the value of that state.

    Args:
        policy: The policy, with or without a PEFT adapter: its backbone is copied if there is nothing else.
        value_model: Path or instance; None: the policy's backbone with a head that starts at 0.

    Returns:
        The model, in evaluation mode for good: clipping compares with the rollout's values, and with dropout both would
        not see the same network.

    Raises:
        ValueError: If the policy's architecture has no token classification model, or the given one has several labels.
    """
    if isinstance(value_model, str | Path):
        value_model = AutoModelForTokenClassification.from_pretrained(value_model, num_labels=1)
    elif value_model is None:
        policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        try:
            value_model = AutoModelForTokenClassification.from_config(config)
        except ValueError as error:
            raise ValueError(
                f"No value model can be made from {type(policy).__name__}: transformers has no token "
                "classification model for it. Give `value_model`, or set `advantage='group'`."
            ) from error
        # A fresh PEFT adapter changes nothing yet, so the weights under it are the policy's.
        weights = {
            name.replace(".base_layer", "").replace(".original_module", ""): value
            for name, value in policy.base_model.state_dict().items()
        }
        value_model.base_model.load_state_dict(
            {name: weights[name] for name in value_model.base_model.state_dict() if name in weights}
        )
        for module in value_model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 1:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias) if module.bias is not None else None
    if value_model.config.num_labels != 1:
        labels = value_model.config.num_labels
        raise ValueError(f"The value model has {labels} labels. Give one with `num_labels=1`.")
    return value_model.eval()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Half the squared error of values (B, T), no better than what a move of `cliprange` from the old values earns.

    Source:
        Value clipping of PPO2 (OpenAI baselines), as in TRL's former PPOTrainer.

    Example:
        >>> one = torch.ones(1, 1)
        >>> clipped_value_loss(one, 0 * one, one, one.bool(), 0.2)  # moved by 1, only 0.2 counts
        tensor(0.3200)
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the variance of returns (N,) that values explain: 1 is perfect, below 0 worse than their mean.

    NaN, which TRL leaves out of its logs, where returns do not vary.
    """
    if len(returns) < 2 or returns.var() < 1e-8:
        return math.nan
    return 1.0 - ((returns - values).var() / returns.var()).item()


class ValueGradients(TrainerCallback):
    """Clips the value model's gradients by their own norm and clears them: Trainer does both to the policy's only."""

    def __init__(self, value_model: nn.Module) -> None:
        self.value_model = value_model

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.value_model.parameters(), args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.value_model.zero_grad()
