"""The value model of `StepPPOTrainer` in training: its values, its loss, its optimizer group, its place on disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn

from fractal_rm.credit.advantages import gae, step_lambdas, whiten
from fractal_rm.hf.length_buckets import LengthBuckets, may_be_sorted
from fractal_rm.hf.processes import all_reduce
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.kept_forward import ROWS, KeptForward, updates_once
from fractal_rm.ppo.rewards import TokenRewards, whiten_rewards
from fractal_rm.ppo.shared_backbone import SharedBackbone
from fractal_rm.ppo.value_model import checkpoint_layers, clipped_value_loss, explained_variance

VALUE_FOLDER = "value_model"
_WEIGHTS = "model.safetensors"
# transformers would split what is larger than 50 GB, and `load` reads one file.
_ONE_FILE = "1000TB"
# One folder deeper: whatever adapter lies in a folder of a checkpoint, `Trainer` loads into the policy.
_ADAPTER_FOLDER, _ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"


def check_value_arguments(args: StepPPOConfig, value_model: Any, value_peft_config: Any) -> None:
    """Refuse what would have no effect.

    Raises:
        ValueError: Says what to leave out.
    """
    if args.advantage != "gae" and not (value_model is None and value_peft_config is None):
        name = "value_model" if value_model is not None else "value_peft_config"
        raise ValueError(f"`advantage='{args.advantage}'` uses no `{name}`. Leave it out or set `advantage='gae'`.")
    shared = isinstance(value_model, str) and value_model == "shared"
    if shared and value_peft_config is not None:
        raise ValueError(
            "`value_model='shared'` has no backbone of its own that `value_peft_config` could adapt. Leave one out."
        )
    if args.value_gradients_to_policy and not shared:
        raise ValueError(
            "`value_gradients_to_policy` is about a shared backbone. Set `value_model='shared'`, or leave it out."
        )


class ValueLearning:
    """A value model beside a policy.

    Args:
        model: The value model, or the head on a shared backbone.
        shared: The policy's backbone, for such a head.
        args: The configuration.
        accelerator: The trainer's.
        log: Takes the name and the value of a number to log.

    Attributes:
        model: The value model, or the head, as accelerate wraps it.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: SharedBackbone | None,
        args: StepPPOConfig,
        accelerator: Any,
        log: Callable[[str, float], None],
    ) -> None:
        if args.gradient_checkpointing:
            checkpoint_layers(model)
        self.model: Any = accelerator.prepare_model(model)
        self.shared, self.args, self.accelerator, self.log = shared, args, accelerator, log
        self._kept = KeptForward()

    # Values and what they are for -------------------------------------------------------------------------------------

    def values(self, inputs: dict[str, Any], *, most_rows: int | None = None) -> Tensor:
        """Value of the state before each completion token, (B, T) in float32, by a forward of their own.

        Args:
            inputs: Prompts and completions, as TRL has them in a rollout.
            most_rows: Most texts in a forward pass; None: all.
        """
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        sort = may_be_sorted(self.model if self.shared is None else self.shared.policy, self.accelerator)
        parts = LengthBuckets(attention_mask, inputs["prompt_ids"].size(1), most_rows=most_rows, sort=sort)
        values = parts.join([self._forward(*part.of(input_ids, attention_mask)) for part in parts.parts])
        return _before_completion_tokens(values, inputs)

    def _forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values at all positions (B, W)."""
        with self.accelerator.autocast():
            if self.shared is not None:
                return self.shared.values(input_ids, attention_mask)
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[..., 0]

    def _rollout_values(self, output: dict[str, Any], logprobs: Tensor | None) -> Tensor:
        if self.shared is None and updates_once(self.args, self.accelerator):
            values = self.values(output)
            self._kept.keep(values)
            return values.detach()
        known = None if self.shared is None else self.shared.values_beside(logprobs)
        if known is not None:
            return _before_completion_tokens(known, output)
        with torch.no_grad():
            return self.values(output, most_rows=self.args.per_device_train_batch_size)

    def advantages(
        self, output: dict[str, Any], rewards: TokenRewards, mask: Tensor, logprobs: Tensor | None
    ) -> dict[str, Any]:
        """GAE, with what the value model needs to learn from.

        Args:
            output: TRL's rollout.
            rewards: Of its tokens.
            mask: True where the policy wrote a token that is learned from (B, T).
            logprobs: The policy's log-probabilities of the rollout (B, T), where they were computed.

        Returns:
            What joins the rollout.
        """
        args = self.args
        learned, lam, beside = self._by_reach(rewards, mask)
        values = self._rollout_values(output, logprobs)
        advantages, returns = gae(learned, values, mask, gamma=args.gamma, lam=lam)
        self.log("value/explained_variance", explained_variance(values[mask], returns[mask]))
        self.log("value/mean", values[mask].mean().item())
        advantages = advantages + beside
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, all_reduce=all_reduce(self.accelerator))
        # The value loss is a mean over the tokens of a rollout batch, as the loss of TRL's default `loss_type` is.
        tokens = self.accelerator.reduce(mask.sum().float(), reduction="mean")
        kept = {"values": values, "returns": returns, "value_mask": mask, "value_tokens": tokens}
        return kept | {"advantages": advantages}

    def _by_reach(self, rewards: TokenRewards, mask: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        """The rewards that the value model learns (B, T), their lambda, and what is added to their advantages (B, T).

        Where there are rewards of steps and of outcomes, each kind has its own reach (`step_lam`, `lam`): the value
        model is the outcome's, and steps have the baseline of their shaping.
        """
        args = self.args
        if args.step_lam is None or not rewards.has_steps:
            return self._whitened(rewards.steps + rewards.others, mask), args.lam, 0.0
        lam = step_lambdas(rewards.step_ends, mask, args.step_lam)
        if not rewards.has_outcomes:
            return self._whitened(rewards.steps + rewards.others, mask), lam, 0.0
        steps = self._whitened(rewards.steps, mask)
        credit, _ = gae(steps, torch.zeros_like(steps), mask, gamma=args.gamma, lam=lam)
        return self._whitened(rewards.others, mask), args.lam, credit

    def _whitened(self, rewards: Tensor, mask: Tensor) -> Tensor:
        return whiten_rewards(rewards, mask, self.args, self.accelerator)

    def loss(self, inputs: dict[str, Any], *, accumulation: int, warming_up: bool) -> Tensor:
        """The weighted value loss of a minibatch, after the policy's loss of the same minibatch.

        Args:
            inputs: The minibatch.
            accumulation: Minibatches in an optimizer step.
            warming_up: Whether the policy must not learn yet.
        """
        if self.shared is None:
            (values,) = self._kept.take(inputs[ROWS]) or (self.values(inputs),)
        else:
            states = self.shared.take_states()
            learn_states = self.args.value_gradients_to_policy and not warming_up
            values = _before_completion_tokens(self.model(states if learn_states else states.detach()), inputs)
        mask = inputs["value_mask"]
        loss = clipped_value_loss(values, inputs["values"], inputs["returns"], mask, self.args.cliprange_value)
        self.log("value/loss", loss.item())
        # One batch or several with accumulation: every token of the window counts the same.
        window = inputs["value_tokens"] * accumulation / self.args.steps_per_generation
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
        model, folder = self.accelerator.unwrap_model(self.model), checkpoint / VALUE_FOLDER
        if _is_adapted(model):
            return model.save_pretrained(folder / _ADAPTER_FOLDER, save_embedding_layers=False)
        if self.shared is None:
            return model.save_pretrained(folder, max_shard_size=_ONE_FILE)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_WEIGHTS}.{os.getpid()}.tmp"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
        os.replace(temporary, folder / _WEIGHTS)

    def load(self, checkpoint: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: If the checkpoint holds no such value model.
        """
        model, folder = self.accelerator.unwrap_model(self.model), checkpoint / VALUE_FOLDER
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


def _before_completion_tokens(values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Of values at all positions (B, P + T), those one position before each completion token (B, T)."""
    return values[:, inputs["prompt_ids"].size(1) - 1 : -1].float()
