"""Preparing a model for training: source, dropout, adapters, learning rates."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.scorers.base import StepScorer
from fractal_rm.scorers.checkpoint import (
    head_module,
    load_model,
    load_tokenizer,
    longest_input,
    make_scorer,
    with_padding,
)
from fractal_rm.scorers.embedding import make_head
from fractal_rm.scorers.inputs import Processor
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

# Attributes of transformers layers that call dropout as a function.
_DROPOUT_SHARES = ("attention_dropout", "activation_dropout", "dropout", "dropout_prob", "layerdrop")


def make_trainable(
    model: str | Path | PreTrainedModel | SentenceEncoder,
    args: FractalConfig,
    settings: FractalSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any | None,
) -> tuple[StepScorer, Processor, FractalSettings]:
    """The scorer at the start of its training, its tokenizer or sentence encoder, and its complete settings.

    Args:
        model: Path, hub id or instance.
        args: Says where embeddings are cached, and whether dropout is off.
        settings: Names the scorer. Without a `max_length`, the returned ones have that of the model.
        tokenizer: The caller's tokenizer; None: the model's own.
        peft_config: The caller's configuration of adapters; None: the whole model is trained.

    Raises:
        ValueError: If the model cannot be used; the message says why.
    """
    if settings.scorer == "embedding":
        if isinstance(model, PreTrainedModel) or peft_config is not None or args.gradient_checkpointing:
            raise ValueError(
                "The embedding scorer trains a small head on a frozen encoder: give `model` as path or hub id of a "
                "sentence-transformers model, without `peft_config` and gradient checkpointing."
            )
        encoder = model
        if not isinstance(encoder, SentenceEncoder):
            encoder = SentenceEncoder(encoder, cache_dir=args.embedding_cache, dtype=args.encoder_dtype)
        return make_head(settings.head_type, encoder.size, settings.num_grades or 1), encoder, settings
    if isinstance(model, SentenceEncoder):
        raise ValueError(
            f"The {settings.scorer} scorer got a sentence encoder. Set `scorer=embedding`, or give another model."
        )
    source = model_name(model)
    if tokenizer is None and source is None:
        raise ValueError("The model does not come from a folder, so its tokenizer is unknown. Give `processing_class`.")
    tokenizer = with_padding(tokenizer) if tokenizer else load_tokenizer(str(source))
    if isinstance(model, str | Path):
        # As in TRL: transformers would keep half precision, and rounding would lose small updates.
        model, _ = load_model(model, settings, dtype=torch.float32)
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model has {known}. Use the model's own tokenizer, or "
            "call `model.resize_token_embeddings(len(tokenizer))`."
        )
    padding: Any = tokenizer.pad_token_id
    model.config.pad_token_id = padding
    if settings.max_length is None:
        settings = replace(settings, max_length=longest_input(model, tokenizer))
    if args.disable_dropout:
        disable_dropout(model)  # before adapters, whose dropout was requested
    wrapped = model if peft_config is None else add_adapter(model, peft_config, settings)
    return make_scorer(wrapped, settings), tokenizer, settings


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off in a model permanently: its modules, and the rates that layers pass to attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_SHARES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def model_name(model: Any) -> str | None:
    """Path or hub id of a model or of a sentence encoder; None if it was built in code."""
    if isinstance(model, str | Path):
        return str(model)
    source = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return source or None


def add_adapter(model: PreTrainedModel, peft_config: Any, settings: FractalSettings) -> nn.Module:
    """A PEFT model that trains adapters, and the classification head if there is one; `peft_config` is not changed.

    Raises:
        ValueError: If the adapter cannot be merged into the model.
    """
    from peft import get_peft_model

    if peft_config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}, which adds tokens before the text and cannot be merged "
            "into the saved model. Use one that adapts weights, such as `LoraConfig`."
        )
    peft_config = copy.copy(peft_config)
    # If the task type is set, PEFT trains the classification head too.
    peft_config.task_type = "TOKEN_CLS" if settings.scorer == "token" else "CAUSAL_LM"
    if settings.scorer == "token" and getattr(peft_config, "target_modules", None) == "all-linear":
        # All layers except the head, which is trained fully: PEFT excludes it by itself only for causal models.
        head = head_module(model, settings)
        peft_config.exclude_modules = [name for name, module in model.named_modules() if module is head]
    adapted: Any = get_peft_model(model, peft_config)
    return adapted


def move_to_group(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float) -> None:
    """Put parameters into a separate group of a fresh optimizer, with a learning rate and without weight decay."""
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    chosen = {id(parameter) for parameter in moved}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    if moved:
        optimizer.add_param_group({"params": moved, "lr": learning_rate, "weight_decay": 0.0})
