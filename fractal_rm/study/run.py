"""One run of the comparison: an arm on a setting with a seed, measured at fixed numbers of rollouts."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, TrainerCallback, TrainerState

from fractal_rm.ppo import alarms as rollout_guards
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import Arm, Options
from fractal_rm.study.held_out import mean, measure, response_logprobs
from fractal_rm.study.reward_models import Assets, ImplicitRewardModel, WholeResponseReward

# The same for all arms; the rest is what `arms.py` names.
PPO_SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "num_iterations": 1,
    "value_learning_rate": 1e-3,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
    "temperature": 1.0,
    "beta": 0.0,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
# Shares of the updates after which a policy is measured.
POINTS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
# Held-out responses from which the distance to the base policy is estimated.
KL_RESPONSES = 64


@dataclass(frozen=True)
class Budget:
    """How much a run does.

    Args:
        rollouts_per_update: Completions in an update.
        held_out: Problems that a policy is measured on.
        updates: Policy updates; None: those of the setting.
        points: Shares of the updates after which the policy is measured, beside the start.
    """

    rollouts_per_update: int = 64
    held_out: int = 256
    updates: int | None = None
    points: tuple[float, ...] = POINTS


# Takes the metrics of one evaluation point.
Report = Callable[[dict[str, Any]], None]


def run_arm(arm: Arm, options: Options, assets: Assets, budget: Budget, report: Report) -> None:
    """Train a policy with an arm's rewards and report its metrics at each evaluation point, the start included.

    Args:
        arm: Where rewards come from.
        options: Settings of [`StepPPOConfig`] that were chosen for it.
        assets: Policy and reward models.
        budget: How much to do.
        report: Takes the metrics of each point.
    """
    setting = assets.setting
    updates = budget.updates or setting.updates
    kind = arm.judge
    judge = assets.reward_model(kind) if kind else None
    outcome: Any = setting.outcome
    if arm.online and isinstance(judge, ImplicitRewardModel):
        outcome = judge.learning_from(outcome)
    functions: list[Any] = [outcome] if arm.outcome else []
    if arm.response_model and judge is not None:
        functions.append(WholeResponseReward(judge))
    held_out = setting.problems("held_out", budget.held_out, assets.seed)
    known = {problem.prompt for problem in held_out}
    count = updates * budget.rollouts_per_update // PPO_SETTINGS["num_generations"]
    prompts = [p.prompt for p in setting.problems("train", 2 * count, assets.seed) if p.prompt not in known][:count]
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    alarms = AlarmCount()
    try:
        trainer = StepPPOTrainer(
            model=str(assets.policy()),
            reward_model=None if arm.response_model else judge,
            reward_funcs=functions or None,
            args=StepPPOConfig(
                output_dir=str(folder),
                **(PPO_SETTINGS | options),
                per_device_train_batch_size=budget.rollouts_per_update,
                max_completion_length=setting.max_new_tokens,
                max_steps=updates,
                seed=assets.seed,
            ),
            # A model that learns on goes on with the responses that it was trained on, too.
            reward_model_dataset=assets.bags(kind) if kind and options.get("rm_update_every") else None,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        )
        trainer.remove_callback(PrinterCallback)
        curve = Curve(trainer, assets, budget, held_out, judge, alarms, assets.cost(kind), report)
        trainer.add_callback(curve)
        with alarms:
            trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Curve(TrainerCallback):
    """Measures the policy at fixed numbers of rollouts; its own time does not count."""

    def __init__(
        self,
        trainer: StepPPOTrainer,
        assets: Assets,
        budget: Budget,
        held_out: list[Any],
        judge: StepRewardModel | None,
        alarms: "AlarmCount",
        cost: dict[str, float],
        report: Report,
    ) -> None:
        self.trainer, self.assets, self.budget, self.held_out = trainer, assets, budget, held_out
        self.judge, self.alarms, self.cost, self.report = judge, alarms, cost, report
        updates = trainer.args.max_steps
        self.steps = {max(round(share * updates), 1) for share in budget.points}
        self.reference, self.tokenizer = assets.load_policy()
        self.started = self.spent = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()
        self._measure(0)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        start = time.process_time()
        seconds = start - self.started - self.spent
        model, prompts = self.trainer.model, [problem.prompt for problem in self.held_out]
        if step == 0:
            found, texts = self.assets.start(len(prompts))
        else:
            # Greedy decoding at the start, the middle and the end: it is as dear as sampling.
            greedy = step == max(self.steps) or 2 * step == max(self.steps)
            found, texts = measure(model, self.tokenizer, self.assets.setting, self.held_out, greedy=greedy)
        some = slice(KL_RESPONSES)
        logprobs = [response_logprobs(m, self.tokenizer, prompts[some], texts[some]) for m in (model, self.reference)]
        found |= {
            "rollouts": step // self.trainer.num_iterations * self.budget.rollouts_per_update,
            "rm_score": self._score(prompts, texts),
            "kl": (logprobs[0] - logprobs[1]).mean().item(),
            "alarms": self.alarms.count,
            "seconds": seconds,
        }
        self.report(found | self.cost)
        self.spent += time.process_time() - start

    def _score(self, prompts: list[str], texts: list[str]) -> float | None:
        """Mean response score by what rewards the policy."""
        if self.judge is None:
            return None
        if self.judge.settings.segmentation.method == "given":
            return mean(WholeResponseReward(self.judge)(prompts, texts))
        scored = self.judge.score(prompts, texts, progress=False)
        return mean([result.score for result in scored if result.error is None])


class AlarmCount(logging.Handler):
    """Counts the alarms that guards raise while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self.source = logging.getLogger(rollout_guards.__name__)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1

    def __enter__(self) -> "AlarmCount":
        self.source.addHandler(self)
        self.source.propagate = False
        return self

    def __exit__(self, *exception: Any) -> None:
        self.source.removeHandler(self)
        self.source.propagate = True
