"""The value model of PPO: construction, values, loss, optimizer group, checkpoint."""

import copy
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.modeling_layers import GradientCheckpointingLayer

from fractal_rm.errors import reason
from fractal_rm.files import replacing
from fractal_rm.hf.length_buckets import LengthBuckets, may_be_sorted
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.engine import Engine, backbone
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.model_setup import add_adapter
from fractal_rm.scorers.checkpoint import check_complete, check_finite_weights, head_module, load_model
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.scorers.token import token_classifier

logger = logging.getLogger(__name__)
VALUE_FOLDER = "value_model"
# Weights, gradients and two moments of Adam.
_TRAINING_COPIES = 4
_WEIGHTS = "model.safetensors"
# transformers splits files larger than 50 GB, but `load` reads a single file.
_ONE_FILE = "1000TB"
# One folder deeper, because `Trainer` loads any adapter in a checkpoint's direct subfolder into the policy.
_ADAPTER_FOLDER, _ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"
# Minibatch key of the values from the rollout's forward pass, with their graph.
_FRESH = "rollout_values"


# Making a value model -------------------------------------------------------------------------------------------------


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
        policy: The policy, with or without a PEFT adapter: its backbone is copied by default.
        value_model: Path or instance; `"reward_model"`: the reward model's backbone with a head that starts at 0; None:
            the policy's backbone with such a head.
        reward_model: The reward model, for `"reward_model"`.
        tokenizer: The policy's tokenizer, which the reward model must share for `"reward_model"`.
        peft_config: PEFT configuration of an adapter to train, with the head, instead of all weights.

    Returns:
        The model, permanently in evaluation mode: clipping compares with the rollout's values, and dropout would make
        them differ. If both it and the policy train adapters, it shares the policy's frozen weights instead of copying
        them.

    Raises:
        ValueError: If transformers has no causal backbone of the architecture, the given model has several labels, its
            folder lacks weights, the reward model's tokenizer differs from the policy's, or the adapter adds tokens.
    """
    copied_from = None
    if value_model == "reward_model":
        value_model = _with_new_head(_reward_backbone(reward_model, tokenizer))
    elif value_model is None:
        copied_from = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        value_model = _with_new_head(copied_from)
    elif isinstance(value_model, str | Path):
        path = value_model
        value_model, missing = load_model(path, FractalSettings(scorer="token"))
        check_complete(path, missing, "a token classification model with one label, or leave `value_model` out")
    if value_model.config.num_labels != 1:
        labels = value_model.config.num_labels
        raise ValueError(f"The value model has {labels} labels. Give one with `num_labels=1`.")
    value_model.config.use_cache = False  # reads whole texts only, so a KV cache is useless
    if peft_config is not None:
        value_model = add_adapter(value_model, peft_config, FractalSettings(scorer="token"))
        if copied_from is not None:
            _share_frozen_weights(value_model.get_base_model(), copied_from)
    return value_model.eval()


def warn_of_whole_value_model(model: nn.Module) -> None:
    """Log the cost of a value model that trains all its weights while the policy trains an adapter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in trained) * _TRAINING_COPIES
    logger.warning(
        "The policy trains an adapter, but the value model trains all its %s weights: %.1f GB of weights, gradients "
        "and optimizer state. Give `value_peft_config` to train an adapter there too, or set `value_model='shared'` "
        "to train only a head.",
        f"{sum(parameter.numel() for parameter in trained):,}",
        size / 1e9,
    )


def _reward_backbone(reward_model: StepRewardModel | None, tokenizer: Any) -> PreTrainedModel:
    """The scoring transformers model, with a PEFT adapter merged into its weights."""
    if reward_model is None:
        raise ValueError("`value_model='reward_model'` needs a `reward_model`. Give one, or leave `value_model` out.")
    if reward_model.tokenizer is None or reward_model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            "`value_model='reward_model'` needs a reward model with the policy's tokenizer, but its tokenizer "
            "differs. Leave `value_model` out (the policy's backbone), or give a model or a path."
        )
    scorer = reward_model.scorer
    return copy.deepcopy(scorer.model).merge_and_unload() if scorer.is_adapted else scorer.base


def _with_new_head(source: Any) -> PreTrainedModel:
    """A token classification model on a copy of the source's backbone, with one output that is 0 everywhere."""
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    try:
        model: Any = token_classifier(config)._from_config(config)
    except ValueError as error:
        raise ValueError(
            f"No value model can be made from {type(source).__name__} ({reason(error)}). Set `value_model='shared'` "
            "for a head on the policy's own states, give a `value_model`, or set `advantage='group'`."
        ) from error
    # A fresh PEFT adapter changes nothing yet, so the weights under it are still the policy's.
    weights = {_without_peft(name): value for name, value in source.base_model.state_dict().items()}
    model.base_model.load_state_dict({name: weights[name] for name in model.base_model.state_dict() if name in weights})
    for parameter in head_module(model, FractalSettings(scorer="token")).parameters():
        nn.init.zeros_(parameter)
    return model


def _without_peft(name: str) -> str:
    """The name of a weight without the PEFT layer around it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _share_frozen_weights(model: nn.Module, source: Any) -> None:
    """Share the frozen weights of a copied backbone with its source, if they are frozen there too."""
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
    """Hidden states (..., H) -> values (...), in float32 whatever the type of the states; 0 everywhere at the start.

    Example:
        >>> ValueHead(8)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        # Half precision would round every value to three digits.
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).squeeze(-1)


def make_value_head(policy: Any) -> ValueHead:
    """A head for the last hidden states of a causal language model, with or without a PEFT adapter.

    Raises ValueError if the model has no output embeddings, which give the width of those states.
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

    Transformers does so in training mode only, but a value model is always in evaluation mode.
    """
    for layer in model.modules():
        wrapped = isinstance(layer.forward, partial)  # by an earlier trainer
        if isinstance(layer, GradientCheckpointingLayer) and not wrapped:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Half the squared error of values (B, T), at least the error after a move of at most `cliprange` from the old
    values.

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
    """Share of the variance of returns (N,) that values explain: 1 is perfect, below 0 is worse than the mean.

    NaN, which TRL leaves out of its logs, if returns do not vary.
    """
    if len(returns) < 2 or returns.var() < 1e-8:
        return math.nan
    return 1.0 - ((returns - values).var() / returns.var()).item()


# Training it ----------------------------------------------------------------------------------------------------------


class ValueLearning:
    """A value model next to a policy, or a head on the policy's own hidden states.

    Args:
        engine: The trainer: its accelerator, its policy, its configuration.
        model: The value model, or the head.
        shared: Whether it is such a head. It reads the states that log-probabilities are computed from, so there is no
            second backbone, and no extra forward pass if TRL runs one anyway.

    Attributes:
        model: The value model, or the head, as accelerate wraps it.
    """

    def __init__(self, engine: Engine, model: nn.Module, *, shared: bool) -> None:
        if engine.args.gradient_checkpointing:
            checkpoint_layers(model)
        self.engine, self.shared = engine, shared
        self.model: Any = engine.accelerator.prepare_model(model)

    @property
    def args(self) -> StepPPOConfig:
        """The configuration."""
        return self.engine.args

    # Values -----------------------------------------------------------------------------------------------------------

    def values(self, tokens: dict[str, Any], *, most_rows: int | None = None) -> Tensor:
        """Value of the state before each completion token (B, T) in float32, with at most `most_rows` texts per forward
        pass."""
        input_ids = torch.cat([tokens["prompt_ids"], tokens["completion_ids"]], dim=1)
        attention_mask = torch.cat([tokens["prompt_mask"], tokens["completion_mask"]], dim=1)
        sort = may_be_sorted(self.engine.policy if self.shared else self.model, self.engine.accelerator)
        buckets = LengthBuckets(attention_mask, tokens["prompt_ids"].size(1), most_rows=most_rows, sort=sort)
        values = buckets.join([self._forward(*part.of(input_ids, attention_mask)) for part in buckets.parts])
        return _before_completion_tokens(values, tokens)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values at all positions (B, W)."""
        texts = {"input_ids": input_ids, "attention_mask": attention_mask}
        with self.engine.accelerator.autocast():
            if self.shared:
                return self.model(backbone(self.engine.policy)(**texts, use_cache=False)[0])
            return self.model(**texts).logits[..., 0]

    def with_values(self, batch: RolloutBatch) -> RolloutBatch:
        """Add `values`: from a forward pass that TRL ran, one that the update will reuse, or a separate one."""
        if batch.state_values is not None:
            return batch.plus(values=_before_completion_tokens(batch.state_values, batch.tokens))
        if not self.shared and self.engine.updates_once():
            fresh = self.values(batch.tokens)
            return batch.plus(for_update={_FRESH: fresh}, values=fresh.detach())
        with torch.no_grad():
            rows = self.args.per_device_train_batch_size
            return batch.plus(values=self.values(batch.tokens, most_rows=rows))

    # Loss -------------------------------------------------------------------------------------------------------------

    def loss(self, minibatch: dict[str, Any], states: Tensor | None, *, accumulation: int) -> Tensor:
        """The weighted value loss of a minibatch.

        `states` are the policy's last hidden states (B, P + T, H) from the forward pass of its loss, which a shared
        head reads and does not train; `accumulation` is the number of minibatches per optimizer step.

        Raises:
            RuntimeError: If there are no states to read, because TRL computes log-probabilities differently than in
                tested versions.
        """
        if not self.shared:
            fresh = minibatch.pop(_FRESH, None)  # once: after the backward pass the graph is gone
            values = self.values(minibatch) if fresh is None else fresh
        elif states is None:
            raise RuntimeError(
                "The loss was computed without a forward pass of the policy's backbone, so `value_model='shared'` has "
                "no states to read. Use `value_model=None`, or the TRL versions that fractal_rm is tested with."
            )
        else:
            values = _before_completion_tokens(self.model(states.detach()), minibatch)
        mask = minibatch["value_mask"]
        loss = clipped_value_loss(values, minibatch["values"], minibatch["returns"], mask, self.args.cliprange_value)
        self.engine.record({"value/loss": loss.item()})
        # With and without accumulation, every token of the window counts the same.
        window = minibatch["value_tokens"] * accumulation / self.args.steps_per_generation
        return self.args.vf_coef * loss * mask.sum() / window.clamp(min=1.0)

    # Optimizer and checkpoints ----------------------------------------------------------------------------------------

    def add_to(self, optimizer: Any) -> None:
        """Add the value model's weights to the policy's optimizer as a separate parameter group."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        if new:
            rate = self.args.value_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": new, "lr": rate, "weight_decay": self.args.weight_decay})

    def save(self, checkpoint: Path) -> None:
        """Write `value_model/`: an ordinary folder of a model, or of its PEFT adapter, or the weights of a head."""
        model, folder = self.engine.accelerator.unwrap_model(self.model), checkpoint / VALUE_FOLDER
        check_finite_weights(model, "the value model")
        if _is_adapted(model):
            return model.save_pretrained(folder / _ADAPTER_FOLDER, save_embedding_layers=False)
        if not self.shared:
            return model.save_pretrained(folder, max_shard_size=_ONE_FILE)
        with replacing(folder / _WEIGHTS) as file:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)

    def load(self, checkpoint: Path) -> None:
        """Restore what `save` wrote; raises ValueError if the checkpoint has no such value model."""
        model, folder = self.engine.accelerator.unwrap_model(self.model), checkpoint / VALUE_FOLDER
        file = folder / _ADAPTER_FOLDER / _ADAPTER_WEIGHTS if _is_adapted(model) else folder / _WEIGHTS
        if not file.is_file():
            raise ValueError(
                f"{file} is missing, so the value model cannot be resumed. Resume from a checkpoint of "
                "`advantage='gae'` with the same kind of value model, or start again without `resume_from_checkpoint`."
            )
        if _is_adapted(model):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(file))
        else:
            load_weights(model, file)


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _before_completion_tokens(values: Tensor, tokens: dict[str, Tensor]) -> Tensor:
    """From values at all positions (B, P + T), the values one position before each completion token (B, T)."""
    return values[:, tokens["prompt_ids"].size(1) - 1 : -1].float()


class ValueGradients(TrainerCallback):
    """Clips the value model's gradients by their own norm and clears them: Trainer does both for the policy only.

    In the value model's warm-up it removes the policy's gradients: with zero gradients, weight decay would still change
    the policy.
    """

    def __init__(self, value_model: nn.Module, warmup_steps: int = 0) -> None:
        self.value_model, self.warmup_steps = value_model, warmup_steps

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.warmup_steps:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.value_model.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.value_model.zero_grad()
