"""PPO with dense step rewards, on TRL's online engine.

`trl.GRPOTrainer` generates, computes log-probabilities, clips, logs and checkpoints. This class changes what a token's
advantage is (rewards where steps end, GAE or a group baseline) and trains a value model beside the policy. It overrides
the few hooks that `trl_contract.py` lists, and copies none of them.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fractal_rm.credit.advantages import global_advantages
from fractal_rm.hf.checkpoints import WholeCheckpoints, begin_checkpoint, find_checkpoint, finish_if_complete
from fractal_rm.hf.denormals import flush_denormals
from fractal_rm.hf.finite_logs import FiniteLogs
from fractal_rm.hf.parallelism import check_online_training, check_separate_value_model, check_whole_model
from fractal_rm.hf.processes import all_reduce, share_metrics
from fractal_rm.ppo.alarms import AlarmActions, as_rollouts, ending_ids
from fractal_rm.ppo.checks import check_setup
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.contract import check_contract
from fractal_rm.ppo.dense_setup import as_list, dense_sources
from fractal_rm.ppo.finite_rewards import check_model_rewards, checked_reward_functions
from fractal_rm.ppo.kept_forward import ROWS
from fractal_rm.ppo.kl_reward import KLReward, lent_beta
from fractal_rm.ppo.lean_forwards import LeanForwards
from fractal_rm.ppo.online.online_reward import OnlineReward, check_online_arguments
from fractal_rm.ppo.rewards import Rollout, ShapedSteps, StepRewards, whiten_rewards
from fractal_rm.ppo.shared_backbone import SharedBackbone, make_value_head
from fractal_rm.ppo.sources import StepRewardSource, StepScoreReward
from fractal_rm.ppo.value_learning import ValueLearning, check_value_arguments
from fractal_rm.ppo.value_model import ValueGradients, make_value_model
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.data import Records

_STATE_FILE = "step_ppo_state.json"


class StepPPOTrainer(WholeCheckpoints, LeanForwards, FiniteLogs):
    """PPO with a reward for every step.

    A completion that no outcome function judges (all give None) is left out of what is learned, as in TRL. Without
    outcome functions, one that has no step earns nothing: as much as a usual step, where rewards are centred.

    Checkpoints hold the value model in `value_model/`, and a reward model that goes on learning (`rm_update_every`) in
    `reward_model/`; an instance that is given learns in place. A resumed run equals an uninterrupted one if the
    checkpoint was written between rollouts, when `save_steps` is a multiple of `num_iterations * steps_per_generation /
    gradient_accumulation_steps`: TRL does not save a rollout, and samples anew what was left of it.

    Args:
        model: The policy: path, hub id or instance of a causal language model.
        reward_model: A [`StepRewardModel`] or its path, or a list of them: dense rewards. Their tokenizers and
            segmentations may differ from each other and from the policy's.
        reward_funcs: TRL reward functions: outcome rewards, placed on the last token and added. Optional.
        args: The configuration.
        train_dataset: Prompts, as for `GRPOTrainer`.
        eval_dataset: As for `GRPOTrainer`.
        processing_class: The policy's tokenizer.
        value_model: For `advantage="gae"`: path or instance of a token classification model with one label that shares
            the policy's tokenizer. None: made from the policy's backbone, with a head that starts at 0;
            `"reward_model"`: from the reward model's backbone, with such a head; `"shared"`: a head alone, on the
            policy's own hidden states.
        callbacks: As for `GRPOTrainer`.
        peft_config: As for `GRPOTrainer`: the policy trains an adapter, and is the reference without it.
        value_peft_config: The value model trains an adapter and its head, in place of all its weights.
        step_reward_funcs: Dense rewards of your own, one or a list: called as TRL calls `reward_funcs`, and with
            `steps`, the texts of each completion's steps; they return one score per step for each completion.
        reward_model_dataset: For `rm_update_every`, by which the first reward model goes on learning: labelled
            responses that are mixed in, best ones that it has not seen. Records or bags, as for [`FractalTrainer`].
        kwargs: Further arguments of `GRPOTrainer`.

    Raises:
        ConnectionError: If there is no vLLM server where one should be.
        ValueError: If there is no reward, a reward model does not suit the prompts or the configuration or cannot learn
            where it should, there is no tokenizer, batches and groups do not divide, or the value model cannot be made.
        TypeError: If a function of `step_reward_funcs` cannot be called as it will be.
        RuntimeError: If the installed TRL has moved a name that this class relies on.

    Attributes:
        last_rollout: The completions of this process that were trained on last, with rewards and step scores.
    """

    _tag_names = ("trl", "fractal-rm", "step-ppo")
    args: StepPPOConfig
    model: Any
    num_generations: int

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_model: StepRewardModel | str | Path | list[StepRewardModel | str | Path] | None = None,
        reward_funcs: Any = None,
        args: StepPPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: str | Path | PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        value_peft_config: Any = None,
        step_reward_funcs: Callable[..., Any] | list[Callable[..., Any]] | None = None,
        reward_model_dataset: Records | None = None,
        **kwargs: Any,
    ) -> None:
        moved = check_contract()
        if moved:
            raise RuntimeError(" ".join(moved))
        args = copy.copy(args) if args is not None else StepPPOConfig("step-ppo")
        functions = as_list(reward_funcs)
        if not (functions or as_list(step_reward_funcs) or as_list(reward_model)):
            raise ValueError(
                "There is no reward. Give a `reward_model` or `step_reward_funcs` (dense), `reward_funcs` (outcome), "
                "or several of them."
            )
        check_value_arguments(args, value_model, value_peft_config)
        check_setup(args, model, processing_class, eval_dataset)
        self.sources = dense_sources(reward_model, step_reward_funcs, functions, args, train_dataset, kwargs)
        reward_models = [source.reward_model for source in self.sources if isinstance(source, StepScoreReward)]
        check_online_arguments(args, reward_models, reward_model_dataset)
        self._rollout: Rollout | None = None
        self.last_rollout: Rollout | None = None
        self.step_rewards, self.kl_reward = StepRewards(args, self.sources, self._log), KLReward(args)
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
        if args.advantage == "gae":
            check_separate_value_model(self)
        for scoring in reward_models:
            check_whole_model(self, scoring.scorer, "the reward model")
        for source in self.sources:
            source.prepare(self._tokenizer, self.accelerator.device)
        self._is_outcome = torch.tensor([not isinstance(function, StepRewardSource) for function in self.reward_funcs])
        self.online_reward: OnlineReward | None = None
        if args.rm_update_every:
            check_online_training(self)
            weights = self.reward_weights
            self.online_reward = OnlineReward(
                reward_models[0], args, reward_model_dataset, weights, self.accelerator, self._log
            )
        if args.advantage == "gae":
            self.value_learning = self._make_value_learning(value_model, value_peft_config)
            self.add_callback(ValueGradients(self.value_learning.model, args.value_warmup_steps))

    def _make_value_learning(self, value_model: Any, peft_config: Any) -> ValueLearning:
        policy = self.accelerator.unwrap_model(self.model)
        shared = None
        if isinstance(value_model, str) and value_model == "shared":
            model: Any = make_value_head(policy)
            shared = SharedBackbone(lambda: self.accelerator.unwrap_model(self.model), model)
        else:
            reward_model = self.step_scores.reward_model if self.step_scores else None
            tokens = {"reward_model": reward_model, "tokenizer": self._tokenizer}
            model = make_value_model(policy, value_model, **tokens, peft_config=peft_config)
        return ValueLearning(model, shared, self.args, self.accelerator, self._log)

    @property
    def value_model(self) -> Any:
        """The value model, or the value head on a shared backbone; None without one."""
        return None if self.value_learning is None else self.value_learning.model

    @property
    def step_scores(self) -> StepScoreReward | None:
        """The first reward model; None without one."""
        return next((source for source in self.sources if isinstance(source, StepScoreReward)), None)

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
        with checked_reward_functions(self):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        is_outcome = self._is_outcome.to(rewards_per_func.device)
        if self.sources and is_outcome.any():
            # TRL leaves out what no function could judge. Step scores must not make a judged outcome of 0 of it.
            unjudged = rewards_per_func[:, is_outcome].isnan().all(dim=1)
            rewards_per_func[unjudged.unsqueeze(1) & ~is_outcome] = torch.nan
        local = slice(
            self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts)
        )
        check_model_rewards(self, rewards_per_func[local], prompts, completions)
        scored = self.sources[0].scored if self.sources else None
        self._rollout = Rollout(prompts, completion_ids_list, rewards_per_func[local], is_outcome, scored)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output, rollout = self._roll_out(inputs)
        if not self.model.training:
            return output  # evaluation only logs rewards
        if self._went_back(rollout):
            output, rollout = self._roll_out(inputs)  # by the policy that there is now
        self.last_rollout = rollout
        if self.online_reward is not None and self.step_scores is not None:
            self.online_reward.take(rollout, self.step_scores.scored, self.reward_weights)
        output[ROWS] = torch.arange(len(output["prompt_ids"]), device=output["prompt_ids"].device)
        mask, step = self._policy_mask(output), self.state.global_step
        shaped = self.step_rewards.steps(rollout, mask, self.num_generations)
        if self.args.advantage == "group":
            output["advantages"] = self.step_rewards.group_advantages(
                rollout, shaped, output["advantages"], mask, self.num_generations, self.accelerator, step=step
            )
        else:
            mask = self.step_rewards.without_unjudged(mask, rollout)
            output |= self._advantages(output, rollout, shaped, mask, step=step)
        self._show_advantages(output["advantages"], mask)
        return output

    def _advantages(
        self, output: dict[str, Any], rollout: Rollout, shaped: list[ShapedSteps], mask: Tensor, *, step: int
    ) -> dict[str, Any]:
        """Advantages (B, T), and what a value model learns from, if there is one."""
        rewards = self.step_rewards.tokens(rollout, shaped, self.reward_weights, mask, step=step)
        if self.kl_reward.on and rollout.kl is not None:
            penalty = self.kl_reward.penalty(rollout.kl, self.accelerator, self._log)
            rewards = rewards._replace(others=rewards.others - penalty)
        if self.value_learning is not None:
            return self.value_learning.advantages(output, rewards, mask, rollout.logprobs)
        advantages = global_advantages(
            whiten_rewards(rewards.steps + rewards.others, mask, self.args, self.accelerator),
            mask,
            gamma=self.args.gamma,
            scale=self.args.whiten_advantages,
            all_reduce=all_reduce(self.accelerator),
        )
        return {"advantages": advantages}

    def _roll_out(self, inputs: Any) -> tuple[dict[str, Any], Rollout]:
        """TRL's rollout, with the KL divergence from the reference where it is part of the reward, or costs nothing."""
        in_reward = self.kl_reward.on and self.model.training
        with lent_beta(self, wanted=in_reward):
            output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        assert rollout is not None
        known = self.model.training and {"ref_per_token_logps", "old_per_token_logps"} <= output.keys()
        if in_reward or known:
            rollout.logprobs, rollout.kl = self.kl_reward.measure(self, output, self._policy_mask(output))
        else:
            rollout.logprobs = output.get("old_per_token_logps")
        return output, rollout

    def _went_back(self, rollout: Rollout) -> bool:
        """Show a rollout to the guards and act on their alarms; whether the policy is now that of a checkpoint."""
        watched = self.sources[0] if self.sources else None
        seen = as_rollouts(rollout, self.step_rewards.ending_ids, watched, self.reward_weights)
        measured, alarms = self.alarm_actions.watch(seen, step=self.state.global_step)
        for name, value in measured.items():
            self._log(f"guards/{name}", value)
        for alarm in alarms:
            self._log(f"guards/alarm/{alarm.signal}", 1.0)
        if not alarms or self.args.on_alarm == "warn":
            return False
        checkpoint = self.alarm_actions.checkpoint_before(alarms) if self.args.on_alarm == "rollback" else None
        if checkpoint is None:  # to stop, or nothing to go back to
            self.control.should_training_stop = True
            return False
        self._restore_weights(checkpoint)
        self.alarm_actions.rolled_back(checkpoint, alarms)
        return True

    def _restore_weights(self, checkpoint: Path) -> None:
        """Put the weights of policy and value model back, and forget what the optimizer knows of the later ones."""
        super()._load_from_checkpoint(str(checkpoint))
        if self.value_learning is not None:
            self.value_learning.load(checkpoint)
        optimizer: Any = self.optimizer
        optimizer.state.clear()
        optimizer.zero_grad()

    @staticmethod
    def _policy_mask(output: dict[str, Any]) -> Tensor:
        """True where the policy wrote a token (B, T)."""
        mask = output["completion_mask"].bool()
        return mask & output["tool_mask"].bool() if "tool_mask" in output else mask

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `GRPOTrainer`; numbers that each process measured on its own rollouts become those of all."""
        if self.accelerator.num_processes > 1:
            share_metrics(self._metrics["train" if self.model.training else "eval"])
        super().log(logs, start_time)

    def _show_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Put each completion's mean advantage into TRL's table of completions, in place of TRL's own."""
        means = (advantages.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).detach()
        gathered: Any = self.accelerator.gather(means)
        for _ in gathered:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(gathered.tolist())

    # The value model ----------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if "returns" not in inputs:
            return loss
        assert self.value_learning is not None
        warming_up = self.state.global_step < self.args.value_warmup_steps
        value_loss = self.value_learning.loss(
            inputs, accumulation=self.current_gradient_accumulation_steps, warming_up=warming_up
        )
        return (0.0 * loss if warming_up else loss) + value_loss

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The policy's optimizer with the value model as one more parameter group."""
        optimizer: Any = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.value_learning is not None:
            self.value_learning.add_to(optimizer)
        return optimizer

    # Checkpoints --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; `resume_from_checkpoint=True` is the last checkpoint that is whole."""
        checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint and self.is_deepspeed_enabled:  # it loads weights its own way, and nothing else
            self._load_state(Path(checkpoint))
        with flush_denormals(self.accelerator.device):
            return finish_if_complete(self, checkpoint) or super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _stateful(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimizer: running statistics, the KL coefficient, the guards."""
        parts = {
            "step_rewards": self.step_rewards,
            "kl_reward": self.kl_reward.adaptive,
            "alarms": self.alarm_actions,
        }
        return parts if self.online_reward is None else parts | {"online_reward": self.online_reward}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            begin_checkpoint(folder)
        super()._save(output_dir, state_dict=state_dict)
        if not self.args.should_save:
            return  # another process writes
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        (folder / _STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        if self.value_learning is not None:
            self.value_learning.save(folder)
        if self.online_reward is not None:
            self.online_reward.save(folder, resumable=folder.name.startswith(PREFIX_CHECKPOINT_DIR))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        if self.value_learning is not None:
            self.value_learning.load(Path(resume_from_checkpoint))
        if self.online_reward is not None:
            self.online_reward.load(Path(resume_from_checkpoint))
        self._load_state(Path(resume_from_checkpoint))

    def _load_state(self, checkpoint: Path) -> None:
        file = checkpoint / _STATE_FILE
        if not file.is_file():
            raise ValueError(
                f"{file} is missing, so running statistics cannot be resumed. Resume from a checkpoint that "
                "StepPPOTrainer wrote, or start again without `resume_from_checkpoint`."
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
