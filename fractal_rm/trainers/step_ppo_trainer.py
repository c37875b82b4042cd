"""PPO with dense step rewards, on TRL's online engine.

`trl.GRPOTrainer` generates, computes log-probabilities, clips, logs and checkpoints. This class changes what a token's
advantage is (rewards where steps end, GAE or a group baseline) and trains a value model beside the policy. It overrides
the few hooks that `trl_contract.py` lists, and copies none of them.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOTrainer

from fractal_rm.advantages import gae, group_step_advantages, whiten
from fractal_rm.reward_model import StepRewardModel, StepScores
from fractal_rm.rewards import completion_text, place_outcome, place_step_rewards, step_end_tokens, token_end_characters
from fractal_rm.trainers.step_ppo_config import StepPPOConfig
from fractal_rm.trainers.trl_contract import check_contract

_VALUE_FOLDER = "value_model"


class _Rollout(NamedTuple):
    """What TRL hands to reward functions, with the rewards of every process (NaN where a function gave None)."""

    prompts: list[Any]
    completion_ids: list[list[int]]
    rewards_per_func: Tensor


class StepScoreReward:
    """The reward model seen by TRL: logs P(response is good) as `rewards/step_reward_model` and keeps the step scores.

    Its weight among TRL's outcome rewards is 0: the trainer uses the step scores instead.
    """

    __name__ = "step_reward_model"

    def __init__(self, reward_model: StepRewardModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> None:
        self.reward_model, self.tokenizer, self.batch_size = reward_model, tokenizer, batch_size
        self.scored: list[StepScores] = []

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        # Not TRL's `completions`: placement counts the characters of exactly this decoding.
        texts = [completion_text(ids, self.tokenizer) for ids in completion_ids]
        self.scored = self.reward_model.score(prompts, texts, batch_size=self.batch_size, progress=False)
        return [None if scored.error else scored.score for scored in self.scored]


class StepPPOTrainer(GRPOTrainer):
    """PPO with a reward for every step.

    Args:
        model: The policy: path, hub id or instance of a causal language model.
        reward_model: A [`StepRewardModel`] or its path: dense rewards. Its tokenizer may differ from the policy's.
        reward_funcs: TRL reward functions: outcome rewards, placed on the last token and added. Optional.
        args: The configuration.
        train_dataset: Prompts, as for `GRPOTrainer`.
        eval_dataset: As for `GRPOTrainer`.
        processing_class: The policy's tokenizer.
        value_model: For `advantage="gae"`: path or instance of a token classification model with one label that shares
            the policy's tokenizer. None: made from the policy's backbone, with a head that starts at 0.
        callbacks: As for `GRPOTrainer`.
        peft_config: As for `GRPOTrainer`.
        kwargs: Further arguments of `GRPOTrainer`.

    Raises:
        ValueError: If there is no reward, or the value model cannot be made.
        RuntimeError: If the installed TRL has moved a name that this class relies on.
    """

    _tag_names = ("trl", "fractal-rm", "step-ppo")
    args: StepPPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_model: StepRewardModel | str | Path | None = None,
        reward_funcs: Any = None,
        args: StepPPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: str | Path | PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        moved = check_contract()
        if moved:
            raise RuntimeError(" ".join(moved))
        args = copy.copy(args) if args is not None else StepPPOConfig("step-ppo")
        functions = [] if reward_funcs is None else list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        if reward_model is None and not functions:
            raise ValueError("There is no reward. Give a `reward_model` (dense), `reward_funcs` (outcome), or both.")
        if value_model is not None and args.advantage == "group":
            raise ValueError("`advantage='group'` uses no value model. Leave `value_model` out or set `advantage='gae'`.")
        self.step_scores: StepScoreReward | None = None
        if reward_model is not None:
            if not isinstance(reward_model, StepRewardModel):
                reward_model = StepRewardModel.from_pretrained(reward_model)
            # The tokenizer is set once TRL has loaded it.
            self.step_scores = StepScoreReward(reward_model, processing_class, args.reward_model_batch_size)  # type: ignore[arg-type]
            args.reward_weights = [*(args.reward_weights or [1.0] * len(functions)), 0.0]
            functions.append(self.step_scores)
        self.value_model: Any = None
        self._rollout: _Rollout | None = None
        super().__init__(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        if self.step_scores is not None:
            self.step_scores.tokenizer = self._tokenizer
            self.step_scores.reward_model.scorer.to(self.accelerator.device)
        if args.advantage == "gae":
            self.value_model = self.accelerator.prepare_model(self._make_value_model(value_model))
            self.add_callback(_ClipValueGradients(self.value_model))

    # Rollouts: rewards and advantages -----------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rollout = _Rollout(prompts, completion_ids_list, rewards_per_func)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        if not self.model.training or (self.args.advantage == "group" and self.step_scores is None):
            return output  # evaluation only logs rewards; without step scores the group baseline is TRL's own
        assert rollout is not None
        mask = output["completion_mask"].bool()
        if "tool_mask" in output:
            mask = mask & output["tool_mask"].bool()
        rewards, ends = self._step_rewards(rollout)
        if self.args.advantage == "group":
            dense = group_step_advantages(
                rewards,
                ends,
                mask,
                self.num_generations,
                gamma=self.args.step_gamma,
                scale=self.args.scale_rewards != "none",
            )
            outcome = output["advantages"].unsqueeze(1) * mask
            output["advantages"] = self.args.outcome_weight * outcome + self.args.step_weight * dense
            return output
        placement = place_step_rewards(rewards, ends, mask)
        self._log("placement/unplaced_steps", placement.unplaced)
        local = slice(
            self.accelerator.process_index * len(rewards), (self.accelerator.process_index + 1) * len(rewards)
        )
        weights = self.reward_weights.to(rollout.rewards_per_func.device)
        outcome = (rollout.rewards_per_func[local] * weights).nansum(dim=1)
        token_rewards = self.args.step_weight * placement.rewards + self.args.outcome_weight * place_outcome(outcome, mask)
        if self.args.whiten_rewards:
            token_rewards = whiten(token_rewards, mask, shift_mean=False)
        with torch.no_grad():
            values = torch.cat(
                [
                    self._values({name: output[name][rows] for name in _VALUE_INPUTS})
                    for rows in torch.arange(len(mask)).split(self.args.per_device_train_batch_size)
                ]
            )
        advantages, returns = gae(token_rewards, values, mask, gamma=self.args.gamma, lam=self.args.lam)
        unexplained = (returns - values)[mask].var() / returns[mask].var().clamp(min=1e-8)
        self._log("value/explained_variance", 1.0 - unexplained.item())
        self._log("value/mean", values[mask].mean().item())
        output["advantages"] = whiten(advantages, mask) if self.args.whiten_advantages else advantages
        return output | {"values": values, "returns": returns}

    def _step_rewards(self, rollout: _Rollout) -> tuple[list[list[float]], list[list[int | None]]]:
        """Shaped reward and end token of every step of every local completion; empty lists without a reward model."""
        if self.step_scores is None:
            return [[] for _ in rollout.prompts], [[] for _ in rollout.prompts]
        scored = self.step_scores.scored
        ends = [
            step_end_tokens(token_end_characters(ids, self._tokenizer), result.spans)
            for ids, result in zip(rollout.completion_ids, scored, strict=True)
        ]
        shift = self.step_scores.reward_model.settings.threshold if self.args.shaping == "centered" else 0.0
        rewards = [[score - shift for score in result.step_scores] for result in scored]
        flat = [score for result in scored for score in result.step_scores]
        self._log("steps/score", sum(flat) / max(len(flat), 1))
        self._log("steps/per_response", len(flat) / max(len(scored), 1))
        return rewards, ends

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    # The value model ----------------------------------------------------------------------------------------------

    def _make_value_model(self, value_model: str | Path | PreTrainedModel | None) -> PreTrainedModel:
        if isinstance(value_model, str | Path):
            value_model = AutoModelForTokenClassification.from_pretrained(value_model, num_labels=1)
        if value_model is None:
            policy: Any = self.accelerator.unwrap_model(self.model)
            policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy
            config = copy.deepcopy(policy.config)
            config.num_labels = 1
            try:
                value_model = AutoModelForTokenClassification.from_config(config)
            except ValueError as error:
                raise ValueError(
                    f"No value model can be made from {type(policy).__name__}: transformers has no token classification "
                    "model for it. Give `value_model`, or set `advantage='group'`."
                ) from error
            # A fresh PEFT adapter changes nothing yet, so the weights under it are the policy's.
            weights = {
                name.replace(".base_layer", ""): value
                for name, value in policy.base_model.state_dict().items()
                if "lora_" not in name
            }
            value_model.base_model.load_state_dict(weights)
            for module in value_model.modules():
                if isinstance(module, nn.Linear) and module.out_features == 1:
                    nn.init.zeros_(module.weight)
                    nn.init.zeros_(module.bias) if module.bias is not None else None
        if value_model.config.num_labels != 1:
            raise ValueError(f"The value model has {value_model.config.num_labels} labels. Give one with `num_labels=1`.")
        for module in value_model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # clipping compares with the rollout's values: both must see the same network
        return value_model

    def _values(self, inputs: dict[str, Tensor]) -> Tensor:
        """Value of the state before each completion token, (B, T) in float32."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            logits = self.value_model(input_ids=input_ids, attention_mask=attention_mask).logits[..., 0]
        return logits[:, inputs["prompt_ids"].size(1) - 1 : -1].float()

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if "returns" not in inputs:
            return loss
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        value_loss = clipped_value_loss(
            self._values(inputs), inputs["values"], inputs["returns"], mask, self.args.cliprange_value
        )
        self._log("value/loss", value_loss.item())
        return loss + self.args.vf_coef * value_loss / self.current_gradient_accumulation_steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The policy's optimizer with the value model as one more parameter group."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
            if self.value_model is not None:
                rate = self.args.value_learning_rate
                optimizer.add_param_group(
                    {
                        "params": [p for p in self.value_model.parameters() if p.requires_grad],
                        "lr": self.args.learning_rate if rate is None else rate,
                        "weight_decay": self.args.weight_decay,
                    }
                )
        return self.optimizer

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.value_model is not None:
            folder = Path(output_dir or self.args.output_dir) / _VALUE_FOLDER  # type: ignore[arg-type]
            self.accelerator.unwrap_model(self.value_model).save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        if self.value_model is not None:
            file = Path(resume_from_checkpoint) / _VALUE_FOLDER / "model.safetensors"
            if not file.is_file():
                raise ValueError(
                    f"{file} is missing, so the value model cannot be resumed. Resume from a checkpoint of "
                    "`advantage='gae'`, or start again without `resume_from_checkpoint`."
                )
            load_weights(self.accelerator.unwrap_model(self.value_model), file)


_VALUE_INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


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


class _ClipValueGradients(TrainerCallback):
    """Clips the value model's gradients by their own norm: Trainer clips the policy's only."""

    def __init__(self, value_model: nn.Module) -> None:
        self.value_model = value_model

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.value_model.parameters(), args.max_grad_norm)
