"""Configuration of [`StepPPOTrainer`]."""

from dataclasses import dataclass, field
from typing import Literal

from trl.trainer.grpo_config import GRPOConfig


@dataclass
class StepPPOConfig(GRPOConfig):
    """Configuration of [`StepPPOTrainer`]: only what it adds to [`~trl.GRPOConfig`].

    Clipping (`epsilon`), PPO epochs (`num_iterations`), minibatches (`steps_per_generation`) and the KL penalty
    (`beta`) are TRL's. With `advantage="gae"`, `num_generations=1` is allowed.
    """

    advantage: Literal["gae", "group"] = field(
        default="gae",
        metadata={
            "help": "Where the baseline comes from: `gae` trains a value model (PPO); `group` compares a step with the "
            "steps of the other completions of its prompt (GRPO)."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token, for `advantage=gae`."})
    lam: float = field(
        default=0.95, metadata={"help": "Mixes one-step errors (0) and full returns (1), for `advantage=gae`."}
    )
    step_gamma: float = field(
        default=0.0,
        metadata={
            "help": "Discount per step, for `advantage=group`: 0 gives a step the credit of its own score, 1 that of "
            "every later score as well, which favours short or long responses."
        },
    )
    shaping: Literal["raw", "centered"] = field(
        default="centered",
        metadata={
            "help": "Step score -> step reward: `raw` is P(step is good); `centered` is that minus the mean over the "
            "rollout batch, so that a step earns what it is better than usual, writing more steps earns nothing, and "
            "a value model that starts at 0 starts right."
        },
    )
    step_weight: float = field(default=1.0, metadata={"help": "Weight of the step rewards."})
    outcome_weight: float = field(default=1.0, metadata={"help": "Weight of the outcome rewards (`reward_funcs`)."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far a value may move from the rollout's before its loss is clipped."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value model; None: that of the policy."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Divide token rewards by their standard deviation over the rollout batch."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Give GAE advantages mean 0 and variance 1 over the rollout batch."}
    )
    reward_model_batch_size: int | None = field(
        default=None, metadata={"help": "Responses in a forward of the reward model; None: the model's own setting."}
    )

    def __post_init__(self) -> None:
        one_each = self.num_generations == 1
        if one_each and self.advantage == "group":
            raise ValueError(
                "`advantage='group'` compares completions of one prompt, but `num_generations` is 1. "
                "Set `num_generations` to 2 or more, or use `advantage='gae'`."
            )
        for name in ("gamma", "lam", "step_gamma"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, outside [0, 1].")
        for name in ("step_weight", "outcome_weight", "vf_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}. A weight is 0 (off) or more.")
        if not one_each:
            super().__post_init__()
            return
        # GRPO refuses one completion a prompt because its baseline would be the completion itself; GAE has another.
        # Every batch is a whole number of groups of one, so the check runs with a size that divides the batch.
        size = self.generation_batch_size or self.per_device_train_batch_size * (
            self.steps_per_generation or self.gradient_accumulation_steps
        )
        if size < 2:
            raise ValueError("The rollout batch holds one completion. Raise `per_device_train_batch_size`.")
        evaluated = self.num_generations_eval
        self.num_generations, self.num_generations_eval = size, evaluated or 1
        super().__post_init__()
        self.num_generations, self.num_generations_eval = 1, evaluated
