"""PPO with dense step rewards, on TRL's online engine.

`trl.GRPOTrainer` generates, computes log-probabilities, clips, logs and checkpoints. This class changes what a token's
advantage is (rewards where steps end, GAE or a group baseline) and trains a value model beside the policy. It overrides
the few hooks that `trl_contract.py` lists, and copies none of them.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.grpo_trainer import GRPOTrainer

from fractal_rm.advantages import gae, global_advantages, whiten
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.trainers.bag_data import Records
from fractal_rm.trainers.kl_reward import KLReward, lent_beta
from fractal_rm.trainers.online_reward import OnlineReward
from fractal_rm.trainers.rollout_guards import AlarmActions, as_rollouts, ending_ids
from fractal_rm.trainers.step_ppo_config import StepPPOConfig
from fractal_rm.trainers.step_rewards import Rollout, StepRewards, StepScoreReward, add_to_outcomes
from fractal_rm.trainers.trl_contract import check_contract
from fractal_rm.trainers.value_model import ValueGradients, clipped_value_loss, explained_variance, make_value_model

_VALUE_FOLDER = "value_model"
_STATE_FILE = "step_ppo_state.json"


class StepPPOTrainer(GRPOTrainer):
    """PPO with a reward for every step.

    A completion that no reward function judges (all give None) is left out of what is learned, as in TRL.

    Checkpoints hold the value model in `value_model/`, and a reward model that goes on learning (`rm_update_every`) in
    `reward_model/`; an instance that is given learns in place. A resumed run equals an uninterrupted one if the
    checkpoint was written between rollouts, when `save_steps` is a multiple of `num_iterations * steps_per_generation /
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
            the policy's tokenizer. None: made from the policy's backbone, with a head that starts at 0;
            `"reward_model"`: from the reward model's backbone, with such a head.
        callbacks: As for `GRPOTrainer`.
        peft_config: As for `GRPOTrainer`.
        reward_model_dataset: For `rm_update_every`: labelled responses that the reward model was trained on, mixed in
            so that it does not forget them. Records or bags, as for [`FractalTrainer`].
        kwargs: Further arguments of `GRPOTrainer`.

    Raises:
        ValueError: If there is no reward, the reward model cannot learn where it should (`rm_update_every`), the
            prompts are chats and the reward model was trained on texts (or the other way round), or the value model
            cannot be made.
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
        reward_model_dataset: Records | None = None,
        **kwargs: Any,
    ) -> None:
        moved = check_contract()
        if moved:
            raise RuntimeError(" ".join(moved))
        args = copy.copy(args) if args is not None else StepPPOConfig("step-ppo")
        functions = [*reward_funcs] if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        if reward_model is None and not functions:
            raise ValueError("There is no reward. Give a `reward_model` (dense), `reward_funcs` (outcome), or both.")
        if value_model is not None and args.advantage != "gae":
            raise ValueError(
                f"`advantage='{args.advantage}'` uses no `value_model`. Leave it out or set `advantage='gae'`."
            )
        if reward_model_dataset is not None and not args.rm_update_every:
            raise ValueError(
                "`reward_model_dataset` is for `rm_update_every`, which is 0. Set it, or leave the data out."
            )
        if reward_model is None and args.rm_update_every:
            raise ValueError("`rm_update_every` needs a `reward_model` to update. Give one, or set it to 0.")
        self.step_scores: StepScoreReward | None = None
        if reward_model is not None:
            if not isinstance(reward_model, StepRewardModel):
                reward_model = StepRewardModel.from_pretrained(reward_model)
            if isinstance(train_dataset, Dataset) and len(train_dataset) and "prompt" in train_dataset.column_names:
                reward_model.check_prompts([train_dataset[0]["prompt"]])  # a column holds one kind; before any rollout
            # The tokenizer is set once TRL has loaded it.
            self.step_scores = StepScoreReward(reward_model, processing_class, args.reward_model_batch_size)
            add_to_outcomes(self.step_scores, functions, args, kwargs)
        self.value_model: Any = None
        self._rollout: Rollout | None = None
        self.step_rewards, self.kl_reward = StepRewards(args, self.step_scores, self._log), KLReward(args)
        self.alarm_actions = AlarmActions(args, self.step_rewards)
        with lent_beta(args, wanted=self.kl_reward.on):
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
        self.beta = args.beta
        self.add_callback(self.alarm_actions)
        self.step_rewards.ending_ids = ending_ids(self._tokenizer, self.accelerator.unwrap_model(self.model))
        if args.on_alarm == "rollback" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("`on_alarm='rollback'` cannot put sharded weights back. Use `on_alarm='stop'`.")
        if self.step_scores is not None:
            self.step_scores.tokenizer = self._tokenizer
            self.step_scores.reward_model.scorer.to(self.accelerator.device)
        self.online_reward: OnlineReward | None = None
        if isinstance(reward_model, StepRewardModel) and args.rm_update_every:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "`rm_update_every` does not work with FSDP and DeepSpeed yet. Use DDP, or set it to 0."
                )
            self.online_reward = OnlineReward(
                reward_model, args, reward_model_dataset, self.reward_weights, self.accelerator, self._log
            )
        if args.advantage == "gae":
            self.value_model = self.accelerator.prepare_model(
                make_value_model(
                    self.accelerator.unwrap_model(self.model),
                    value_model,
                    reward_model=reward_model,
                    tokenizer=self._tokenizer,
                )
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
        local = slice(
            self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts)
        )
        self._rollout = Rollout(prompts, completion_ids_list, rewards_per_func[local])
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output, rollout = self._roll_out(inputs)
        if not self.model.training or (self.args.advantage == "group" and self.step_scores is None):
            return output  # evaluation only logs rewards; without step scores the group baseline is TRL's own
        if self._went_back(rollout):
            output, rollout = self._roll_out(inputs)  # by the policy that there is now
        if self.online_reward is not None and self.step_scores is not None:
            self.online_reward.take(rollout, self.step_scores.scored, self.reward_weights)
        mask, step = self._policy_mask(output), self.state.global_step
        rewards, ends, placement = self.step_rewards.steps(rollout, mask, self.num_generations)
        if self.args.advantage == "group":
            output["advantages"] = self.step_rewards.group_advantages(
                rollout, rewards, ends, output["advantages"], mask, self.num_generations, step=step
            )
            self._show_advantages(output["advantages"], mask)
            return output
        if self.args.outcome_weight and len(self.reward_funcs) > (self.step_scores is not None):
            mask = mask & rollout.judged.unsqueeze(1)  # no outcome is not an outcome of 0
        token_rewards = self.step_rewards.tokens(rollout, placement, self.reward_weights, mask, step=step)
        if self.kl_reward.on and rollout.kl is not None:
            token_rewards = token_rewards - self.kl_reward.penalty(rollout.kl, self.accelerator, self._log)
        if self.args.whiten_rewards:
            token_rewards = whiten(token_rewards, mask, shift_mean=False)
        if self.args.advantage == "gae":
            output |= self._value_advantages(output, token_rewards, mask)
        else:
            output["advantages"] = global_advantages(
                token_rewards, mask, gamma=self.args.gamma, scale=self.args.whiten_advantages
            )
        self._show_advantages(output["advantages"], mask)
        return output

    def _roll_out(self, inputs: Any) -> tuple[dict[str, Any], Rollout]:
        """TRL's rollout, with the KL divergence from the reference where it is part of the reward, or costs nothing."""
        in_reward = self.kl_reward.on and self.model.training
        with lent_beta(self, wanted=in_reward):
            output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        assert rollout is not None
        known = self.model.training and {"ref_per_token_logps", "old_per_token_logps"} <= output.keys()
        if in_reward or known:
            rollout.kl = self.kl_reward.measure(self, output, self._policy_mask(output))
        return output, rollout

    def _went_back(self, rollout: Rollout) -> bool:
        """Show a rollout to the guards and act on their alarms; whether the policy is now that of a checkpoint."""
        scored = None if self.step_scores is None else self.step_scores.scored
        seen = as_rollouts(rollout, self.step_rewards.ending_ids, scored, self.reward_weights)
        measured, alarms = self.alarm_actions.watch(seen, step=self.state.global_step)
        for name, value in measured.items():
            self._log(f"guards/{name}", value)
        if not alarms or self.args.on_alarm == "warn":
            return False
        checkpoint = self.alarm_actions.checkpoint_before(alarms) if self.args.on_alarm == "rollback" else None
        if checkpoint is None:  # to stop, or nothing to go back to
            self.control.should_training_stop = True
            return False
        super()._load_from_checkpoint(str(checkpoint))
        self._load_value_model(checkpoint)
        optimizer: Any = self.optimizer
        optimizer.state.clear()  # its moments are those of the weights that strayed
        self.alarm_actions.rolled_back(checkpoint, alarms)
        return True

    @staticmethod
    def _policy_mask(output: dict[str, Any]) -> Tensor:
        """True where the policy wrote a token (B, T)."""
        mask = output["completion_mask"].bool()
        return mask & output["tool_mask"].bool() if "tool_mask" in output else mask

    def _value_advantages(self, output: dict[str, Any], token_rewards: Tensor, mask: Tensor) -> dict[str, Any]:
        """GAE, with what the value model needs to learn from."""
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
        advantages = whiten(advantages, mask) if self.args.whiten_advantages else advantages
        # The value loss is a mean over the tokens of a rollout batch, as the loss of TRL's default `loss_type` is.
        tokens = self.accelerator.reduce(mask.sum().float(), reduction="mean")
        learned = {"values": values, "returns": returns, "value_mask": mask, "value_tokens": tokens}
        return learned | {"advantages": advantages}

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
        if self.state.global_step < self.args.value_warmup_steps:
            loss = 0.0 * loss
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

    def _stateful(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimizer: running statistics, the KL coefficient, the guards."""
        parts = {
            "step_rewards": self.step_rewards.moments,
            "kl_reward": self.kl_reward.adaptive,
            "alarms": self.alarm_actions,
        }
        return parts if self.online_reward is None else parts | {"online_reward": self.online_reward}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:  # transformers calls this on every process
            state = {name: part.state_dict() for name, part in self._stateful().items()}
            (folder / _STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        if self.value_model is not None:
            self.accelerator.unwrap_model(self.value_model).save_pretrained(folder / _VALUE_FOLDER)
        if self.online_reward is not None and self.args.should_save:
            self.online_reward.save(folder, resumable=folder.name.startswith(PREFIX_CHECKPOINT_DIR))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        self._load_value_model(Path(resume_from_checkpoint))
        if self.online_reward is not None:
            self.online_reward.load(Path(resume_from_checkpoint))
        file = Path(resume_from_checkpoint) / _STATE_FILE
        if not file.is_file():
            raise ValueError(
                f"{file} is missing, so running statistics cannot be resumed. Resume from a checkpoint that "
                "StepPPOTrainer wrote, or start again without `resume_from_checkpoint`."
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _load_value_model(self, checkpoint: Path) -> None:
        if self.value_model is None:
            return
        file = checkpoint / _VALUE_FOLDER / "model.safetensors"
        if not file.is_file():
            raise ValueError(
                f"{file} is missing, so the value model cannot be resumed. Resume from a checkpoint of "
                "`advantage='gae'`, or start again without `resume_from_checkpoint`."
            )
        load_weights(self.accelerator.unwrap_model(self.value_model), file)


_VALUE_INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
