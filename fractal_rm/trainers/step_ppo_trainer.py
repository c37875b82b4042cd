"""PPO with dense step rewards, on TRL's online engine.

`trl.GRPOTrainer` generates, computes log-probabilities, clips, logs and checkpoints. This class changes what a token's
advantage is (rewards where steps end, GAE or a group baseline) and trains a value model beside the policy. It overrides
the few hooks that `trl_contract.py` lists, and copies none of them.
"""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.trainer.grpo_trainer import GRPOTrainer

from fractal_rm.advantages import gae, group_step_advantages, whiten
from fractal_rm.reward_model import StepRewardModel, StepScores
from fractal_rm.rewards import completion_text, place_outcome, place_step_rewards, step_end_tokens, token_end_characters
from fractal_rm.trainers.step_ppo_config import StepPPOConfig
from fractal_rm.trainers.trl_contract import check_contract
from fractal_rm.trainers.value_model import ValueGradients, clipped_value_loss, explained_variance, make_value_model

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

    def __init__(self, reward_model: StepRewardModel, tokenizer: Any, batch_size: int | None) -> None:
        self.reward_model, self.tokenizer, self.batch_size = reward_model, tokenizer, batch_size
        self.scored: list[StepScores] = []

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        # Not TRL's `completions`: placement counts the characters of exactly this decoding.
        texts = [completion_text(ids, self.tokenizer) for ids in completion_ids]
        self.scored = self.reward_model.score(prompts, texts, batch_size=self.batch_size, progress=False)
        for row, scored in enumerate(self.scored):
            if not all(map(math.isfinite, scored.step_scores)):
                raise ValueError(
                    f"The reward model scored the steps of completion {row} as {scored.step_scores}: "
                    f"{scored.response!r}. "
                    "Its weights or their precision are broken: check them with `StepRewardModel.score` on that text."
                )
        return [None if scored.error else scored.score for scored in self.scored]


class StepPPOTrainer(GRPOTrainer):
    """PPO with a reward for every step.

    A completion that no reward function judges (all give None) is left out of what is learned, as in TRL.

    Checkpoints hold the value model in `value_model/`. A resumed run equals an uninterrupted one if the checkpoint was
    written between rollouts, when `save_steps` is a multiple of `num_iterations * steps_per_generation /
    gradient_accumulation_steps`: TRL does not save a rollout, and samples anew what was left of it.

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
        ValueError: If there is no reward, the prompts are chats and the reward model was trained on texts (or the
            other way round), or the value model cannot be made.
        RuntimeError: If the installed TRL has moved a name that this class relies on.
    """

    _tag_names = ("trl", "fractal-rm", "step-ppo")
    args: StepPPOConfig
    model: Any
    num_generations: int

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
        functions = [*reward_funcs] if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        if reward_model is None and not functions:
            raise ValueError("There is no reward. Give a `reward_model` (dense), `reward_funcs` (outcome), or both.")
        if value_model is not None and args.advantage == "group":
            raise ValueError("`advantage='group'` uses no `value_model`. Leave it out or set `advantage='gae'`.")
        self.step_scores: StepScoreReward | None = None
        if reward_model is not None:
            if not isinstance(reward_model, StepRewardModel):
                reward_model = StepRewardModel.from_pretrained(reward_model)
            if isinstance(train_dataset, Dataset) and len(train_dataset) and "prompt" in train_dataset.column_names:
                reward_model.check_prompts([train_dataset[0]["prompt"]])  # a column holds one kind; before any rollout
            # The tokenizer is set once TRL has loaded it.
            self.step_scores = StepScoreReward(reward_model, processing_class, args.reward_model_batch_size)
            weights = args.reward_weights or [1.0] * len(functions)
            if len(weights) != len(functions):
                raise ValueError(
                    f"`reward_weights` has {len(weights)} numbers for {len(functions)} `reward_funcs`. Give one each; "
                    "the reward model's is `step_weight`."
                )
            args.reward_weights = [*weights, 0.0]
            functions.append(self.step_scores)
            if kwargs.get("reward_processing_classes") is not None:
                theirs = kwargs["reward_processing_classes"]
                kwargs["reward_processing_classes"] = [*(theirs if isinstance(theirs, list) else [theirs]), None]
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
            self.value_model = self.accelerator.prepare_model(
                make_value_model(self.accelerator.unwrap_model(self.model), value_model)
            )
            self.add_callback(ValueGradients(self.value_model))

    # Rollouts: rewards and advantages -----------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        prompts: Any = self.train_dataset
        needed = self.args.generation_batch_size // self.num_generations  # type: ignore[operator]
        if hasattr(prompts, "__len__") and len(prompts) < needed:  # TRL would end without a step
            raise ValueError(
                f"The training set has {len(prompts)} prompts, but a rollout takes {needed}. Give more prompts, raise "
                "`num_generations`, or lower `per_device_train_batch_size` or `steps_per_generation`."
            )
        return super().get_train_dataloader()

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.step_scores is not None and len(self.reward_funcs) > 1:
            # TRL leaves out what no function could judge. Step scores must not make a judged outcome of 0 of it.
            rewards_per_func[rewards_per_func[:, :-1].isnan().all(dim=1), -1] = torch.nan
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
        rewards, ends = self._step_rewards(rollout, mask)
        placement = place_step_rewards(rewards, ends, mask)
        self._log("placement/unplaced_steps", placement.unplaced)
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
            self._show_advantages(output["advantages"], mask)
            return output
        local = slice(
            self.accelerator.process_index * len(rewards), (self.accelerator.process_index + 1) * len(rewards)
        )
        outcomes = rollout.rewards_per_func[local]
        outcome = (outcomes * self.reward_weights.to(outcomes.device)).nansum(dim=1)
        if self.args.outcome_weight and len(self.reward_funcs) > (self.step_scores is not None):
            mask = mask & ~outcomes.isnan().all(dim=1, keepdim=True)  # no outcome is not an outcome of 0
        token_rewards = self.args.step_weight * placement.rewards
        token_rewards = token_rewards + self.args.outcome_weight * place_outcome(outcome, mask)
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
        self._log("value/explained_variance", explained_variance(values[mask], returns[mask]))
        self._log("value/mean", values[mask].mean().item())
        output["advantages"] = whiten(advantages, mask) if self.args.whiten_advantages else advantages
        self._show_advantages(output["advantages"], mask)
        # The value loss is a mean over the tokens of a rollout batch, as the loss of TRL's default `loss_type` is.
        tokens = self.accelerator.reduce(mask.sum().float(), reduction="mean")
        return output | {"values": values, "returns": returns, "value_mask": mask, "value_tokens": tokens}

    def _step_rewards(self, rollout: _Rollout, mask: Tensor) -> tuple[list[list[float]], list[list[int | None]]]:
        """Shaped reward and end token of every step of every local completion; empty lists without a reward model."""
        if self.step_scores is None:
            return [[] for _ in rollout.prompts], [[] for _ in rollout.prompts]
        # A completion that TRL masks as a whole (`mask_truncated_completions`) has no steps, rather than unplaced ones.
        used = mask.any(dim=1).tolist()
        scored = [
            scored if keep else StepScores(scored.response)
            for scored, keep in zip(self.step_scores.scored, used, strict=True)
        ]
        ends = [
            step_end_tokens(token_end_characters(ids, self._tokenizer), result.spans)
            for ids, result in zip(rollout.completion_ids, scored, strict=True)
        ]
        flat = [score for result in scored for score in result.step_scores]
        # Every process centres by its own rollouts: a constant, which no step can change by much.
        shift = sum(flat) / max(len(flat), 1) if self.args.shaping == "centered" else 0.0
        rewards = [[score - shift for score in result.step_scores] for result in scored]
        self._log("steps/score", sum(flat) / max(len(flat), 1))
        self._log("steps/per_response", len(flat) / max(len(scored), 1))
        return rewards, ends

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def _show_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Put each completion's mean advantage into TRL's table of completions, in place of TRL's own."""
        means = (advantages.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).detach()
        gathered: Any = self.accelerator.gather(means)
        for _ in gathered:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(gathered.tolist())

    # The value model ----------------------------------------------------------------------------------------------

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
        mask = inputs["value_mask"]
        value_loss = clipped_value_loss(
            self._values(inputs), inputs["values"], inputs["returns"], mask, self.args.cliprange_value
        )
        self._log("value/loss", value_loss.item())
        # One batch or several with accumulation: every token of the window counts the same.
        window = inputs["value_tokens"] * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return loss + self.args.vf_coef * value_loss * mask.sum() / window.clamp(min=1.0)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The policy's optimizer with the value model as one more parameter group."""
        optimizer: Any = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.value_model is not None:
            known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            new = [p for p in self.value_model.parameters() if p.requires_grad and id(p) not in known]
            if new:
                rate = self.args.value_learning_rate
                rate = self.args.learning_rate if rate is None else rate
                optimizer.add_param_group({"params": new, "lr": rate, "weight_decay": self.args.weight_decay})
        return optimizer

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.value_model is not None:
            folder = Path(output_dir or self.args.output_dir or ".") / _VALUE_FOLDER
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
