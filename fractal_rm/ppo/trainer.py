"""PPO with a reward for every step: the algorithm, from top to bottom.

The class reads in the order in which a batch is made: sample, score steps, shape, place, advantages, loss. Each stage
takes a [`RolloutBatch`] and returns one with more fields set. `engine.py` adapts TRL to this.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fractal_rm.credit.kl import AdaptiveKL
from fractal_rm.hf.manifest import adapter_settings, function_fingerprint, model_fingerprint, rows_fingerprint
from fractal_rm.ppo.advantage import ESTIMATORS, Given
from fractal_rm.ppo.alarms import Alarms, guard_inputs
from fractal_rm.ppo.checks import check_engine, load_checked
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.engine import Engine
from fractal_rm.ppo.online.online_reward import OnlineReward
from fractal_rm.ppo.rewards import StepShaper, charge_kl, check_earning, judgement_metrics, place_rewards
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.ppo.sources import FunctionSource, ModelSource, as_list, make_sources, warn_of_uncut_completions
from fractal_rm.ppo.value_model import (
    ValueGradients,
    ValueLearning,
    make_value_head,
    make_value_model,
    warn_of_whole_value_model,
)
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.data import Records
from fractal_rm.scorers.settings import tokenizer_fingerprint

_STATE_FILE = "step_ppo_state.json"


class StepPPOTrainer(Engine):
    """PPO with dense step rewards, on TRL's online engine.

    A completion that no outcome function judges (all return None) is not trained on, as in TRL; nor is one that a
    reward model cannot read to its end. Without outcome functions, a completion without steps earns nothing, as much as
    an average step if rewards are centred. A rollout without any reward stops the run.

    Checkpoints hold the value model in `value_model/`, and a reward model that keeps learning (`rm_update_every`) in
    `reward_model/`; a given instance learns in place. A resumed run equals an uninterrupted one if the checkpoint was
    written between rollouts, that is, if `save_steps` is a multiple of `num_iterations * steps_per_generation /
    gradient_accumulation_steps`: TRL does not save a rollout, and samples the rest of it again.

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
        peft_config: As for `GRPOTrainer`: the policy trains an adapter; without it, it is the reference.
        value_peft_config: The value model trains an adapter and its head instead of all its weights. Without it, the
            value model trains all its weights even if the policy trains an adapter, and a warning says what that costs.
        step_reward_funcs: Functions that score steps, one or a list: called as TRL calls `reward_funcs`, and with
            `steps`, the texts of each completion's steps; they return one score per step for each completion.
        reward_model_dataset: For `rm_update_every`, which updates the first reward model: labelled responses that are
            mixed in, ideally ones it was not trained on. Records or bags, as for [`FractalTrainer`].
        kwargs: Further arguments of `GRPOTrainer`.

    Raises:
        ConnectionError: If the vLLM server does not answer.
        ValueError: If there is no reward; a reward model does not suit the prompts or the configuration, cannot be
            trained although it should, or cannot read one of the first prompts; there is no tokenizer; batches are not
            whole groups; or the value model cannot be made.
        TypeError: If `args` is another configuration, or a function of `step_reward_funcs` does not accept the
            arguments it will get.
        RuntimeError: If the installed TRL has moved a name that this class relies on.

    Attributes:
        sources: The sources of step rewards, reward models first.
        last_rollout: The latest completions of this process, with all results of the stages.
    """

    _tag_names = ("trl", "fractal-rm", "step-ppo")

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
        args = args if args is not None else StepPPOConfig("step-ppo")
        if not isinstance(args, StepPPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}, which lacks the options of step rewards. Give "
                "`StepPPOConfig(...)`, which has the options of `GRPOConfig` under the same names."
            )
        outcomes, step_functions = as_list(reward_funcs), as_list(step_reward_funcs)
        models = load_checked(
            args,
            policy=model,
            tokenizer=processing_class,
            reward_models=as_list(reward_model),
            outcomes=outcomes,
            step_functions=step_functions,
            value_model=value_model,
            value_peft_config=value_peft_config,
            reward_model_dataset=reward_model_dataset,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tools=kwargs.get("tools"),
            environments=kwargs.get("environment_factory"),
        )
        self.sources = make_sources(models, step_functions, args, outcomes)
        self.value_learning: ValueLearning | None = None
        self.online_reward: OnlineReward | None = None
        super().__init__(
            model=model,
            reward_funcs=outcomes,
            sources=self.sources,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        check_engine(self, models)
        self.last_rollout: RolloutBatch | None = None
        self.shaper = StepShaper(self.args, {source.name: source.weight for source in self.sources})
        self.kl_coefficient = AdaptiveKL(self.args.kl_coef, target=self.args.kl_target)
        self.alarms = Alarms(self.args)
        self.add_callback(self.alarms)
        for scoring in models:
            scoring.scorer.to(self.accelerator.device)
        if self.args.rm_update_every:
            self.online_reward = OnlineReward(
                models[0], self.args, reward_model_dataset, self.reward_weights, self.accelerator
            )
        if self.args.advantage == "gae":
            self.value_learning = self._make_value_learning(value_model, value_peft_config)
            self.add_callback(ValueGradients(self.value_learning.model, self.args.value_warmup_steps))

    def _make_value_learning(self, value_model: Any, peft_config: Any) -> ValueLearning:
        if isinstance(value_model, str) and value_model == "shared":
            return ValueLearning(self, make_value_head(self.policy), shared=True)
        reward_model = self.step_scores.reward_model if self.step_scores else None
        tokens = {"reward_model": reward_model, "tokenizer": self.tokenizer}
        model = make_value_model(self.policy, value_model, **tokens, peft_config=peft_config)
        if peft_config is None and hasattr(self.policy, "peft_config"):
            warn_of_whole_value_model(model)
        return ValueLearning(self, model, shared=False)

    @property
    def value_model(self) -> Any:
        """The value model, or the value head on a shared backbone; None without one."""
        return None if self.value_learning is None else self.value_learning.model

    @property
    def step_scores(self) -> ModelSource | None:
        """The first reward model; None without one."""
        return next((source for source in self.sources if isinstance(source, ModelSource)), None)

    @property
    def state_reader(self) -> nn.Module | None:
        return self.value_model if self.value_learning is not None and self.value_learning.shared else None

    # The algorithm ----------------------------------------------------------------------------------------------------

    def rollout(self, inputs: Any) -> RolloutBatch:
        """Sample completions, score their steps, and turn scores into advantages."""
        batch = self.sample(inputs)  # completions, with outcomes and step scores
        if not self.model.training:  # evaluation only logs rewards
            self.record(judgement_metrics(batch))
            return batch
        if self._went_back(batch):
            batch = self.sample(inputs)  # by the current policy
        if self.last_rollout is None:
            warn_of_uncut_completions(batch, self.sources)
        self._keep_learning(batch)
        group_size = self.num_generations
        endings = self.ending_ids
        batch = self.shaper.shape(batch, group_size=group_size, tokenizer=self.tokenizer, endings=endings)
        batch = place_rewards(batch, self.args, ending_ids=endings, step_weight=self.alarms.step_weight)
        check_earning(batch, self.args, step=self.state.global_step)
        if self.args.kl_coef:
            batch = charge_kl(batch, self.kl_coefficient, self.accelerator)
        given = Given(self.args, self.accelerator, group_size, self.value_learning)
        batch = ESTIMATORS[self.args.advantage](batch, given)  # token rewards -> advantages
        self.record(batch.metrics)
        self.last_rollout = batch
        return batch

    def loss(self, policy_loss: Tensor, minibatch: dict[str, Any], states: Tensor | None) -> Tensor:
        """TRL's clipped policy loss plus the value loss; in the value model's warm-up the policy loss is dropped."""
        if self.value_learning is None or "returns" not in minibatch:
            return policy_loss
        if self.state.global_step < self.args.value_warmup_steps:
            policy_loss = 0.0 * policy_loss
        accumulation = self.current_gradient_accumulation_steps
        return policy_loss + self.value_learning.loss(minibatch, states, accumulation=accumulation)

    def _went_back(self, batch: RolloutBatch) -> bool:
        """Pass a rollout to the guards and act on their alarms; returns whether the policy was rolled back."""
        trusted = bool(self.sources) and self.sources[0].gives_probabilities
        seen = guard_inputs(batch, self.ending_ids, gives_probabilities=trusted)
        metrics, alarms = self.alarms.watch(seen, step=self.state.global_step)
        self.record(metrics)
        if not alarms or self.args.on_alarm == "warn":
            return False
        checkpoint = self.alarms.checkpoint_before(alarms) if self.args.on_alarm == "rollback" else None
        if checkpoint is None:  # to stop, or nothing to roll back to
            self.control.should_training_stop = True
            return False
        self.restore_weights(checkpoint)
        if self.value_learning is not None:
            self.value_learning.load(checkpoint)
        self.alarms.rolled_back(checkpoint, alarms)
        return True

    def _keep_learning(self, batch: RolloutBatch) -> None:
        """Pass the rollout to a reward model that keeps learning; its scores of this batch do not change."""
        if self.online_reward is not None and self.step_scores is not None:
            self.record(self.online_reward.take(batch, batch.scores[self.step_scores.name]))

    # Optimizer and checkpoints ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The policy's optimizer with the value model as one more parameter group."""
        optimizer: Any = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.value_learning is not None:
            self.value_learning.add_to(optimizer)
        return optimizer

    def materials(self) -> dict[str, Any]:
        scored = [source.reward_model for source in self.sources if isinstance(source, ModelSource)]
        judges = [[model_fingerprint(model.scorer), repr(model.settings)] for model in scored]
        if self.args.rm_update_every:  # it learns in place, and checkpoints store it
            judges = judges[1:]
        outcomes = [
            function for function, ours in zip(self.reward_funcs, self.is_outcome.tolist(), strict=True) if ours
        ]
        scoring = [source.function for source in self.sources if isinstance(source, FunctionSource)]
        return {
            "train_data": rows_fingerprint(self.train_dataset),
            "model": model_fingerprint(self.policy),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "adapter": adapter_settings(self.policy),
            "rewards": self.reward_func_names,
            "reward_sources": [function_fingerprint(function) for function in (*outcomes, *scoring)],
            "reward_models": judges,
            "value_model": None if self.value_learning is None else model_fingerprint(self.value_model),
            "value_adapter": adapter_settings(self.value_model),
            # Only if they decide what is learned, or which weights are kept.
            **({} if self.online_reward is None else {"reward_model_data": self.online_reward.original_data}),
            **({"eval_data": rows_fingerprint(self.eval_dataset)} if self.args.load_best_model_at_end else {}),
        }

    def _statistics(self) -> dict[str, Any]:
        """What a resumed run needs beyond weights and optimizer: running statistics, the KL coefficient, the guards."""
        parts = {"step_rewards": self.shaper, "kl_reward": self.kl_coefficient, "alarms": self.alarms}
        return parts if self.online_reward is None else parts | {"online_reward": self.online_reward}

    def save_state(self, folder: Path, *, resumable: bool) -> None:
        state = {name: part.state_dict() for name, part in self._statistics().items()}
        (folder / _STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        if self.value_learning is not None:
            self.value_learning.save(folder)
        if self.online_reward is not None:
            self.online_reward.save(folder, resumable=resumable)

    def load_state(self, folder: Path, *, weights: bool) -> None:
        if weights and self.value_learning is not None:
            self.value_learning.load(folder)
        if weights and self.online_reward is not None:
            self.online_reward.load(folder)
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        for name, part in self._statistics().items():
            part.load_state_dict(state[name])
