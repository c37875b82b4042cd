"""The value model of PPO: how it is made, and the loss that it learns by."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.model_setup import add_adapter
from fractal_rm.scorers.checkpoint import head_module
from fractal_rm.scorers.settings import FractalSettings


def make_value_model(
    policy: Any,
    value_model: Any = None,
    *,
    reward_model: StepRewardModel | None = None,
    tokenizer: Any = None,
    peft_config: Any = None,
) -> Any:
    """A token classification model with one label, whose output before a token is the value of that state.

    Args:
        policy: The policy, with or without a PEFT adapter: its backbone is copied if there is nothing else.
        value_model: Path or instance; `"reward_model"`: the reward model's backbone with a head that starts at 0; None:
            the policy's backbone with such a head.
        reward_model: The reward model, for `"reward_model"`.
        tokenizer: The policy's tokenizer, which the reward model must share for `"reward_model"`.
        peft_config: PEFT configuration of an adapter to train, and the head, in place of all weights.

    Returns:
        The model, in evaluation mode for good: clipping compares with the rollout's values, and with dropout both would
        not see the same network. Made from a policy that trains an adapter, and with one itself, it holds the policy's
        own frozen weights and no copy of them.

    Raises:
        ValueError: If the architecture has no token classification model, the given model has several labels, the
            reward model reads other tokens than the policy writes, or the adapter is one that adds tokens.
    """
    copied_from = None
    if value_model == "reward_model":
        value_model = _with_new_head(_reward_backbone(reward_model, tokenizer))
    elif value_model is None:
        copied_from = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        value_model = _with_new_head(copied_from)
    elif isinstance(value_model, str | Path):
        value_model = AutoModelForTokenClassification.from_pretrained(value_model, num_labels=1)
    if value_model.config.num_labels != 1:
        labels = value_model.config.num_labels
        raise ValueError(f"The value model has {labels} labels. Give one with `num_labels=1`.")
    value_model.config.use_cache = False  # whole texts only: keys and values of the past would be kept for nothing
    if peft_config is not None:
        value_model = add_adapter(value_model, peft_config, FractalSettings(scorer="token"))
        if copied_from is not None:
            _share_frozen_weights(value_model.get_base_model(), copied_from)
    return value_model.eval()


def _reward_backbone(reward_model: StepRewardModel | None, tokenizer: Any) -> PreTrainedModel:
    """The transformers model that scores, with what a PEFT adapter learned merged into its weights."""
    if reward_model is None:
        raise ValueError("`value_model='reward_model'` needs a `reward_model`. Give one, or leave `value_model` out.")
    if reward_model.tokenizer is None or reward_model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            "`value_model='reward_model'` needs a reward model that reads the tokens the policy writes, and its "
            "tokenizer is another one. Leave `value_model` out (the policy's backbone), or give a model or a path."
        )
    scorer = reward_model.scorer
    return copy.deepcopy(scorer.model).merge_and_unload() if scorer.is_adapted else scorer.base


def _with_new_head(source: Any) -> PreTrainedModel:
    """A token classification model on a copy of the source's backbone, whose one output is 0 everywhere."""
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    try:
        model = AutoModelForTokenClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"No value model can be made from {type(source).__name__}: transformers has no token "
            "classification model for it. Give `value_model`, or set `advantage='group'`."
        ) from error
    # A fresh PEFT adapter changes nothing yet, so the weights under it are the policy's.
    weights = {_without_peft(name): value for name, value in source.base_model.state_dict().items()}
    model.base_model.load_state_dict({name: weights[name] for name in model.base_model.state_dict() if name in weights})
    for parameter in head_module(model, FractalSettings(scorer="token")).parameters():
        nn.init.zeros_(parameter)
    return model


def _without_peft(name: str) -> str:
    """The name that a weight has without the PEFT layer around it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _share_frozen_weights(model: nn.Module, source: Any) -> None:
    """Let frozen weights of a copied backbone be those that it was copied from, where they are frozen there too."""
    frozen = {
        _without_peft(name): parameter
        for name, parameter in source.base_model.named_parameters()
        if not parameter.requires_grad
    }
    backbone: Any = model.base_model
    for name, parameter in backbone.named_parameters():
        twin = None if parameter.requires_grad else frozen.get(_without_peft(name))
        if twin is not None and twin.dtype == parameter.dtype:
            parameter.data = twin.data


class ValueHead(nn.Linear):
    """Hidden states (..., H) -> values (...), in float32 whatever the states are in; 0 everywhere at the start.

    Args:
        width: Size H of a hidden state.

    Example:
        >>> ValueHead(8)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        # One output in half precision would round every value to three digits.
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).squeeze(-1)


def make_value_head(policy: Any) -> ValueHead:
    """A head for the last hidden states of a causal language model, with or without a PEFT adapter.

    Raises:
        ValueError: If the model has no output embeddings, which say how wide those states are.
    """
    embeddings = policy.get_output_embeddings()
    if embeddings is None:
        raise ValueError(
            f"{type(policy).__name__} has no output embeddings, so no value head fits it. Leave out "
            "`value_model='shared'`."
        )
    return ValueHead(embeddings.in_features)


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute the activations of each layer in the backward pass, to save memory: `gradient_checkpointing`.

    Transformers does so in training mode only, which a value model is never in.
    """
    for layer in model.modules():
        wrapped = isinstance(layer.forward, partial)  # by an earlier trainer
        if isinstance(layer, GradientCheckpointingLayer) and not wrapped:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


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
