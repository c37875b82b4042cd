"""The value model of `StepPPOTrainer` in training: its values, its loss, its optimizer group, its place on disk."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fractal_rm.files import replacing
from fractal_rm.hf.length_buckets import LengthBuckets, may_be_sorted
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.engine import Engine, backbone
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.ppo.value_model import checkpoint_layers, clipped_value_loss

VALUE_FOLDER = "value_model"
_WEIGHTS = "model.safetensors"
# transformers would split what is larger than 50 GB, and `load` reads one file.
_ONE_FILE = "1000TB"
# One folder deeper: whatever adapter lies in a folder of a checkpoint, `Trainer` loads into the policy.
_ADAPTER_FOLDER, _ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"
# Name in a minibatch of the values that the rollout's own forward gave, with their graph.
_FRESH = "rollout_values"


class ValueLearning:
    """A value model beside a policy, or a head on the policy's own hidden states.

    Args:
        engine: The trainer: its accelerator, its policy, its configuration.
        model: The value model, or the head.
        shared: Whether it is such a head. It reads the states that log-probabilities are computed from, so there is no
            second backbone, and no forward where TRL runs one anyway.

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
        """Value of the state before each completion token, (B, T) in float32, by a forward for nothing else.

        Args:
            tokens: Prompts and completions, as TRL has them in a rollout.
            most_rows: Most texts in a forward pass; None: all.
        """
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
        """Add `values`: from a forward that TRL ran, or one that the update takes over, or one for nothing else."""
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

        Args:
            minibatch: A part of the rollout.
            states: Last hidden states of the policy (B, P + T, H), from the forward of its own loss; read by a head on
                them, which does not train them.
            accumulation: Minibatches in an optimizer step.

        Raises:
            RuntimeError: If there are no states to read: TRL computes log-probabilities in another way than it used to.
        """
        if not self.shared:
            fresh = minibatch.pop(_FRESH, None)  # once: after the backward pass the graph is gone
            values = self.values(minibatch) if fresh is None else fresh
        elif states is None:
            raise RuntimeError(
                "The loss was computed without a forward of the policy's backbone, so `value_model='shared'` has no "
                "states to read. Use `value_model=None`, or the TRL versions that fractal_rm is tested with."
            )
        else:
            values = _before_completion_tokens(self.model(states.detach()), minibatch)
        mask = minibatch["value_mask"]
        loss = clipped_value_loss(values, minibatch["values"], minibatch["returns"], mask, self.args.cliprange_value)
        self.engine.record({"value/loss": loss.item()})
        # One batch or several with accumulation: every token of the window counts the same.
        window = minibatch["value_tokens"] * accumulation / self.args.steps_per_generation
        return self.args.vf_coef * loss * mask.sum() / window.clamp(min=1.0)

    # Optimizer and checkpoints ----------------------------------------------------------------------------------------

    def add_to(self, optimizer: Any) -> None:
        """Give what the value model learns a parameter group of its own in the policy's optimizer."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        if new:
            rate = self.args.value_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": new, "lr": rate, "weight_decay": self.args.weight_decay})

    def save(self, checkpoint: Path) -> None:
        """Write `value_model/`: an ordinary folder of a model, or of its PEFT adapter, or the weights of a head."""
        model, folder = self.engine.accelerator.unwrap_model(self.model), checkpoint / VALUE_FOLDER
        if _is_adapted(model):
            return model.save_pretrained(folder / _ADAPTER_FOLDER, save_embedding_layers=False)
        if not self.shared:
            return model.save_pretrained(folder, max_shard_size=_ONE_FILE)
        with replacing(folder / _WEIGHTS) as file:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)

    def load(self, checkpoint: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: If the checkpoint holds no such value model.
        """
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
    """Of values at all positions (B, P + T), those one position before each completion token (B, T)."""
    return values[:, tokens["prompt_ids"].size(1) - 1 : -1].float()


class ValueGradients(TrainerCallback):
    """Clips the value model's gradients by their own norm and clears them: Trainer does both to the policy's only.

    In the value model's warm-up it takes the policy's gradients away: with gradients of 0, weight decay would move it.
    """

    def __init__(self, value_model: nn.Module, warmup_steps: int = 0) -> None:
        self.value_model, self.warmup_steps = value_model, warmup_steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < self.warmup_steps:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.value_model.parameters(), args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.value_model.zero_grad()
