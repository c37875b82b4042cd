"""Configuration of [`StepPPOTrainer`]."""

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl.trainer.grpo_config import GRPOConfig

from fractal_rm.credit.advantages import Baseline
from fractal_rm.credit.kl import KLEstimator
from fractal_rm.credit.shaping import Center, LengthNeutral, Shaping
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.hf.runs import RunConfig
from fractal_rm.ranges import check_ranges
from fractal_rm.scorers.templates import check_template_options

# Removed options, and what to use instead.
_REMOVED = {
    "leave_one_out": "Leave it out: it multiplied advantages by about num_generations / (num_generations - 1).",
    "step_weight_warmup": "Set `step_weight`.",
    "outcome_weight_warmup": "Set `outcome_weight`.",
    "aggregation": "The reward model's own aggregation is used.",
    "value_gradients_to_policy": "A shared head trains alone; with `value_model=None` all layers train.",
}


@dataclass
class StepPPOConfig(RunConfig, GRPOConfig):
    """Configuration of [`StepPPOTrainer`]: only what it adds to [`~trl.GRPOConfig`].

    Clipping (`epsilon`), PPO epochs (`num_iterations`), minibatches (`steps_per_generation`) and the KL penalty
    in the loss (`beta`) are TRL's. With `advantage="gae"` or `"global"`, `num_generations=1` is allowed.
    """

    REMOVED = _REMOVED

    def __new__(cls, *args: Any, **kwargs: Any) -> "StepPPOConfig":
        for name in cls.REMOVED.keys() & kwargs.keys():
            raise TypeError(f"`{name}` is no longer an option. {cls.REMOVED[name]}")
        return super().__new__(cls)

    advantage: Literal["gae", "group", "global"] = field(
        default="gae",
        metadata={
            "help": "Where the baseline comes from: `gae` trains a value model (PPO); `group` compares a step with "
            "the steps of the prompt's other completions (GRPO); `global` subtracts the mean over all tokens of the "
            "rollout batch from the rewards to go (REINFORCE++)."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token, for `advantage=gae` and `global`."})
    lam: float = field(
        default=0.95,
        metadata={
            "help": "GAE's lambda per token, from one-step errors (0) to full returns (1), for `advantage=gae`; step "
            "rewards use `step_lam`."
        },
    )
    step_lam: float | None = field(
        default=0.2,
        metadata={
            "help": "Lambda of step rewards, from step to step, for `advantage=gae`: all tokens of a step, however "
            "long, are credited with what it earns, plus this share of the next step's credit. Outcomes keep `lam`, "
            "and the value model predicts outcomes only. None: `lam` for all rewards."
        },
    )
    step_gamma: float = field(
        default=0.0,
        metadata={
            "help": "Discount per step, for `advantage=group`: with 0 a step is credited with its own score only, "
            "with 1 also with every later score, which favours short or long responses."
        },
    )
    group_baseline: Baseline = field(
        default="step",
        metadata={
            "help": "Baseline of `advantage=group`: `step` is the group's mean reward per step, subtracted once per "
            "step; `token` is its mean reward per token times the step's tokens, so that splitting text into more "
            "steps changes nothing."
        },
    )
    shaping: Shaping = field(
        default="centered",
        metadata={
            "help": "How step scores become rewards: `raw` is P(step is good); `centered` subtracts a baseline "
            "(`center`), which suits a value model that starts at 0; `log_odds` is the logit of the score; `delta` is "
            "the score minus the previous step's score, so a response earns the score of its last step; `min_form` "
            "makes the return of a step the lowest score from there on (PURE), exactly so without a discount; "
            "`first_mistake` charges a step with the probability that it is the first mistake, so steps after a "
            "mistake cost nothing."
        },
    )
    center: Center = field(
        default="response",
        metadata={
            "help": "Baseline of `shaping=centered`: `response` is the mean over the completion's own steps, so its "
            "step rewards sum to 0 however it is split; `batch` is the mean over the rollout batch, `group` over the "
            "prompt's completions, `threshold` is `score_threshold`: with these, more steps above the baseline earn "
            "more."
        },
    )
    score_threshold: float = field(
        default=0.5,
        metadata={
            "help": "Score that counts as neither good nor bad, for `center=threshold` and the start of `delta`."
        },
    )
    normalize_step_rewards: bool = field(
        default=False,
        metadata={"help": "Divide step rewards by their standard deviation over the whole run so far."},
    )
    step_reward_clip: float | None = field(
        default=None, metadata={"help": "Largest absolute reward of a step, before `step_weight`; None: no limit."}
    )
    length_neutral: LengthNeutral = field(
        default="none",
        metadata={
            "help": "What more steps earn: `mean` divides a step's reward by the number of steps; `cap` makes every "
            "step reward 0 or less, so appending good steps earns nothing."
        },
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted at the last token of a completion that the length limit cut."}
    )
    step_weight: float = field(default=1.0, metadata={"help": "Weight of the step rewards."})
    outcome_weight: float = field(
        default=1.0, metadata={"help": "Weight of the outcome rewards; they are the `reward_funcs`."}
    )
    step_reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight of each source of step rewards: the reward models in order, then `step_reward_funcs`; "
            "None: 1 each. `step_weight` multiplies their sum."
        },
    )
    step_segmentation: Literal["lines", "sentences", "turns", "separator", "pattern"] | None = field(
        default=None,
        metadata={
            "help": "How completions are cut into steps for `step_reward_funcs`; None: as for the first reward model, "
            "or by lines."
        },
    )
    step_separator: str | None = field(
        default=None, metadata={"help": "Text between steps, for `step_segmentation=separator`."}
    )
    step_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression between steps, for `step_segmentation=pattern`."}
    )
    kl_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence from the reference in the reward of each token, for `advantage=gae` "
            "and `global`; 0: none. `beta` adds it to the loss instead."
        },
    )
    kl_estimator: KLEstimator = field(
        default="k1", metadata={"help": "`k1`: the log-ratio; `k3`: never negative, lower variance."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Target KL per completion, in nats, that `kl_coef` adapts to; None: `kl_coef` is constant."},
    )
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "How far a value may move from the rollout's value before its loss is clipped."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value model; None: the policy's learning rate."}
    )
    value_warmup_steps: int = field(
        default=0, metadata={"help": "First optimizer steps, in which only the value model learns."}
    )
    whiten_rewards: bool = field(
        default=False,
        metadata={
            "help": "As in TRL's PPOTrainer: scale token rewards to variance 1 over the rollout batch around their "
            "mean, which slightly lowers tokens without a reward. For `gae` and `global`."
        },
    )
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Scale advantages to mean 0 and variance 1 over the rollout batch, for `gae` and `global`."},
    )
    reward_model_batch_size: int | None = field(
        default=None, metadata={"help": "Responses per forward pass of a reward model; None: the model's own setting."}
    )

    vllm_server_timeout: float = field(
        default=10.0,
        metadata={
            "help": "Seconds to wait for a vLLM server that does not answer (TRL waits 240), for `vllm_mode=server`."
        },
    )

    on_alarm: Literal["warn", "stop", "rollback"] = field(
        default="warn",
        metadata={
            "help": "At signs of reward hacking: `warn` logs a warning; `stop` ends training after this step; "
            "`rollback` restores the weights of the last checkpoint before the sign and halves `step_weight`. The "
            "signs are `guards/` in the logs; one counts when it stays beyond its limit."
        },
    )
    guard_reference_batches: int = field(
        default=8, metadata={"help": "First rollout batches, which define the normal range and raise no alarm."}
    )
    guard_patience: int = field(
        default=3, metadata={"help": "Consecutive rollout batches beyond a limit before an alarm."}
    )
    rm_update_every: int = field(
        default=0,
        metadata={
            "help": "Rollout batches between updates of the reward model, which then keeps learning from the rollouts "
            "and their outcomes (`reward_funcs`, in [0, 1]); 0: it stays frozen."
        },
    )
    rm_learning_rate: float = field(
        default=1e-5,
        metadata={
            "help": "Learning rate of reward model updates; ten times that for the scorer's own weight and bias, or "
            "head."
        },
    )
    rm_update_steps: int = field(default=8, metadata={"help": "Optimizer steps per reward model update."})
    rm_batch_size: int = field(default=32, metadata={"help": "Responses per batch of a reward model update."})
    rm_replay_size: int = field(
        default=2048, metadata={"help": "Number of latest rollouts that updates are trained on and evaluated with."}
    )
    rm_holdout_share: float = field(
        default=0.2, metadata={"help": "Share of the prompts whose responses are only used to evaluate updates."}
    )
    rm_original_share: float = field(
        default=0.25,
        metadata={
            "help": "Share of original responses (`reward_model_dataset`) in every batch of an update, and their "
            "weight in its evaluation."
        },
    )

    @property
    def function_segmentation(self) -> Segmentation | None:
        """How completions are cut for `step_reward_funcs`; None: as for the first reward model."""
        if self.step_segmentation is None:
            return None
        return Segmentation(self.step_segmentation, separator=self.step_separator, pattern=self.step_pattern)

    def template_options(self, tools: Any) -> dict[str, Any]:
        """Arguments of the policy's and reward models' chat templates, in addition to the messages."""
        given: Any = self.chat_template_kwargs or {}
        return {**given, "tools": tools} if tools else dict(given)

    def __post_init__(self) -> None:
        check_ranges(self)
        self.check_amounts()
        self.check_objects()
        self.check_compilation()
        check_template_options(self.template_options(None))
        one_each = self.num_generations == 1
        if one_each and self.advantage == "group":
            raise ValueError(
                "`advantage='group'` compares completions of one prompt, but `num_generations` is 1. "
                "Set `num_generations` to 2 or more, or use `advantage='gae'`."
            )
        self._check_combinations()
        if self.bf16 is None and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            self.bf16 = False  # TRL would choose True, and transformers would refuse it without bf16 hardware
        if not one_each:
            super().__post_init__()
            return
        # GRPO refuses one completion per prompt because its baseline would be the completion itself; GAE has another.
        # Any batch consists of whole groups of one, so TRL's check runs with a size that divides the batch.
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # `world_size` would initialize devices too early
        size = self.generation_batch_size or processes * self.per_device_train_batch_size * (
            self.steps_per_generation or self.gradient_accumulation_steps
        )
        if size < 2:
            raise ValueError("The rollout batch has only one completion. Raise `per_device_train_batch_size`.")
        evaluated = self.num_generations_eval
        self.num_generations, self.num_generations_eval = size, evaluated or 1
        super().__post_init__()
        self.num_generations, self.num_generations_eval = 1, evaluated

    def _check_combinations(self) -> None:
        """Refuse options that would have no effect, or another effect than their name says."""
        if self.scale_rewards not in ("group", "batch", "none", True, False):
            raise ValueError(f"`scale_rewards` is {self.scale_rewards!r}. Choose one of group, batch, none.")
        # TRL rejects others only after the first rollout; its help lists the names of the installed version.
        field_of_trl = GRPOConfig.__dataclass_fields__["loss_type"]
        losses = re.findall(r"(?<!=)'(\w+)'", field_of_trl.metadata["help"])
        for name, known in (("loss_type", losses), ("importance_sampling_level", ["token", "sequence"])):
            readable = name != "loss_type" or field_of_trl.default in losses  # another TRL may word its help otherwise
            if readable and (given := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` is {given!r}. Choose one of {', '.join(dict.fromkeys(known))}.")
        if getattr(self, "trust_remote_code", False) or "trust_remote_code" in str(self.model_init_kwargs):
            raise ValueError(
                "`trust_remote_code` would run code from a model's folder, which this package never does. Leave it out."
            )
        if not 1 <= round(self.rm_replay_size * self.rm_holdout_share) < self.rm_replay_size:
            raise ValueError(
                f"`rm_replay_size` is {self.rm_replay_size}: too small for both training and held-out rollouts "
                f"(`rm_holdout_share` {self.rm_holdout_share}). Raise it."
            )
        for name in ("separator", "pattern"):
            if (self.step_segmentation == name) != (getattr(self, f"step_{name}") is not None):
                raise ValueError(
                    f"`step_{name}` is {getattr(self, f'step_{name}')!r} with `step_segmentation="
                    f"{self.step_segmentation!r}`. Give it if and only if `step_segmentation='{name}'`."
                )
        _ = self.function_segmentation  # an invalid pattern is refused here
        if self.shaping == "min_form" and self.advantage == "group" and self.step_gamma < 1:
            raise ValueError(
                "`shaping='min_form'` works by the sum of later rewards, but `step_gamma` is "
                f"{self.step_gamma}. Set `step_gamma` to 1, or use `advantage='gae'`."
            )
        if self.shaping == "min_form" and self.advantage == "gae" and self.step_lam is not None and self.step_lam < 1:
            raise ValueError(
                f"`shaping='min_form'` works by the sum of later rewards, but `step_lam` is {self.step_lam}. "
                "Set `step_lam` to 1."
            )
        if self.shaping in ("delta", "min_form", "first_mistake") and self.length_neutral != "none":
            raise ValueError(
                f"`shaping='{self.shaping}'` pays a response one score at any length, and "
                f"`length_neutral='{self.length_neutral}'` would change that score. Leave `length_neutral` out."
            )
        if self.shaping == "centered" and self.center == "response" and self.length_neutral != "none":
            raise ValueError(
                "`center='response'` makes the step rewards of a completion sum to 0 at any length, and "
                f"`length_neutral='{self.length_neutral}'` would change that. Leave `length_neutral` out, or set "
                "`center` to 'batch', 'group' or 'threshold'."
            )
        if self.kl_coef and self.advantage == "group":
            raise ValueError("`kl_coef` needs token rewards, and `advantage='group'` has none. Use `beta` instead.")
        if self.whiten_rewards and self.advantage == "group":
            raise ValueError(
                "`whiten_rewards` needs token rewards, and `advantage='group'` has none. Use `scale_rewards`."
            )
        if self.load_best_model_at_end and (self.advantage == "gae" or self.rm_update_every):
            raise ValueError(
                "`load_best_model_at_end` would restore the policy, but not the value model and the reward model. "
                "Leave it out, and load the checkpoint that you want."
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("`kl_target` adapts `kl_coef`, which is 0. Give `kl_coef` a value to start from.")
        if self.value_warmup_steps and self.advantage != "gae":
            raise ValueError(
                f"`value_warmup_steps` needs a value model. Leave it out for advantage='{self.advantage}'."
            )
        if self.on_alarm == "rollback" and self.save_strategy == "no":
            raise ValueError("`on_alarm='rollback'` needs checkpoints. Set `save_strategy='steps'` and `save_steps`.")
        if self.on_alarm == "rollback" and self.use_vllm:
            raise ValueError("`on_alarm='rollback'` would not restore vLLM's weights. Use `on_alarm='stop'`.")
