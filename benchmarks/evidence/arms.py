"""The arms of the evidence: the arms of `fractal-rm compare`, with variations, rivals and longer runs."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common.implicit import ImplicitReward, ImplicitRewardModel
from fractal_rm.data.bag import StepScores
from fractal_rm.data.segmentation import Segmentation, Span
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study import arms as shipped
from fractal_rm.study.arms import FRACTAL, LAMBDAS, LEARNING_ON, LEARNING_RATES, OUTCOME_ONLY, TRAINING, Arm, Recipe
from fractal_rm.study.rivals import Rule
from fractal_rm.study.study import Study, Unit
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS
from fractal_rm.tasks.task import Task

# The six settings of the claims; the noise test is separate.
MAIN_CONDITIONS = ("easy", "medium", "hard", "distractors", "branching", "shift")
# Tasks for the arms beyond the core: long problems, and problems on which step scores can be gamed.
FURTHER = ("medium", "branching")
FURTHER_SEEDS = 5
# The min-form depends on sums of later rewards: credit must reach back to the first step.
_SUMS = ({"advantage": "group", "step_gamma": 1.0}, {"advantage": "gae", "step_lam": 1.0})
# Differences to the step before: all later ones add up to the last step's score, the nearest one is the step's own.
_NEAR_OR_ALL = ({"advantage": "gae", "step_lam": 0.2}, {"advantage": "gae", "step_lam": 1.0})
# The log-ratio itself is the reward: the log-odds of the score that is its sigmoid.
_LOG_ODDS = (("shaping", "log_odds"),)
RESULT = re.compile(r"(?:->|:)( \d)$", re.MULTILINE)
# The implicit process reward: the same numbers of steps and responses as the others. `beta` marks its recipes.
IMPLICIT: Recipe = {"learning_rate": 3e-4, "beta": 0.1, "epochs": 16, "batch_size": 32}


@dataclass(frozen=True)
class Further(Arm):
    """An arm beyond the core, on fewer settings and seeds.

    Args:
        online: Whether the implicit reward learns on from the outcomes of each rollout batch; step reward models do by
            their option `rm_update_every`.
        own_rate: Whether its trials have all learning rates, of which it takes its own best.
        conditions: Where it runs; None: where most of these do.
        like: The arm whose chosen settings it has; it is not tuned.
        times: How many times the updates of that arm it makes; None: as many more as make the rollouts of a reward
            model's labelled responses.
    """

    online: bool = False
    own_rate: bool = False
    conditions: tuple[str, ...] | None = None
    like: str | None = None
    times: int | None = None


# `fractal_mix`, where steps and outcome have equal weights, with another weight for the outcome.
MIXES = {"fractal_mix_low": 0.3, "fractal_mix_high": 3.0}
# Forms of step rewards with a sum or bound that does not grow with the number of steps.
CANDIDATES: dict[str, tuple[tuple[str, Any], ...]] = {
    "response": (("center", "response"),),
    "min_form": (("shaping", "min_form"), ("step_lam", 1.0)),
    "first_mistake": (("shaping", "first_mistake"),),
    "cap": (("length_neutral", "cap"),),
}
CANDIDATE_ARMS = {"fractal_mix": tuple(CANDIDATES), "fractal": ("response",)}
LONGER = {name: f"{name}_long" for name in OUTCOME_ONLY}
# With this many times the updates, an outcome-only arm takes about as long as a reward model and a run with it.
TIMES = {"outcome_grpo": 4, "outcome_ppo": 3}
AS_LONG = {name: f"{name}_{times}x" for name, times in TIMES.items()}
_EVERYWHERE = tuple(CONDITIONS)
_CORE = shipped.ARMS

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        *(_CORE[name] for name in OUTCOME_ONLY),
        *(Further(longer, outcome=True, like=name, conditions=_EVERYWHERE) for name, longer in LONGER.items()),
        *(
            Further(longer, outcome=True, like=name, conditions=_EVERYWHERE, times=TIMES[name])
            for name, longer in AS_LONG.items()
        ),
        _CORE["fractal"],
        _CORE["fractal_mix"],
        *(
            Further(name, steps="fractal", outcome=True, options=(("outcome_weight", weight),))
            for name, weight in MIXES.items()
        ),
        # As many trials as an outcome-only arm, because the study's rate is the one that suits the outcome-only arms.
        Further("fractal_mix_own_rate", steps="fractal", outcome=True, own_rate=True, conditions=MAIN_CONDITIONS),
        # Rewards that cutting finer must not raise: candidates for the default, with the settings of its arm.
        *(
            Further(
                f"{like}_{name}",
                steps="fractal",
                outcome=_CORE[like].outcome,
                options=options,
                variants=_SUMS if name == "min_form" else LAMBDAS,
                like=like,
                times=1,
                conditions=MAIN_CONDITIONS,
            )
            for like, names in CANDIDATE_ARMS.items()
            for name, options in CANDIDATES.items()
            if name in names
        ),
        # Do step scores have a ceiling? Training for as long as the outcome-only arms.
        Further("fractal_mix_4x", steps="fractal", outcome=True, like="fractal_mix", times=4),
        _CORE["fractal_online"],
        # Outcomes train the reward model but are not rewards: the effect of continued learning on step scores.
        Further("fractal_online_steps", steps="fractal", outcome=True, options=(*LEARNING_ON, ("outcome_weight", 0.0))),
        *(_CORE[name] for name in ("orm", "supervised", "oracle", "random_steps")),
        Further("copy_label", steps="copy_label"),
        Further("fractal_raw", steps="fractal", options=(("shaping", "raw"),)),
        Further("fractal_delta", steps="fractal", options=(("shaping", "delta"),), variants=_NEAR_OR_ALL),
        Further("fractal_min_form", steps="fractal", options=(("shaping", "min_form"),), variants=_SUMS),
        Further("fractal_log_odds", steps="fractal", options=_LOG_ODDS),
        # Steps only, and only the result of each step: how a careless choice of what to score is gamed.
        Further("fractal_result_token", steps="result_token"),
        Further("lca", steps="lca"),
        Further("implicit", steps="implicit", options=_LOG_ODDS),
        Further("implicit_mix", steps="implicit", outcome=True, options=_LOG_ODDS),
        # PRIME: the same with continued learning; credit is the sum of all later log-ratios, or reaches to near steps.
        Further(
            "implicit_online",
            steps="implicit",
            outcome=True,
            variants=(_SUMS[0], LAMBDAS[1]),
            options=_LOG_ODDS,
            online=True,
        ),
        Further("fractal_bag", steps="fractal_bag"),
        Further("fractal_flips", steps="fractal_flips", conditions=("noise_10", "noise_20"), like="fractal", times=1),
        Further("fractal_priors", steps="fractal_priors"),
        Further("fractal_pseudo", steps="fractal_pseudo"),
    )
}


def copy_label(task: Task) -> Rule:
    """The response's label at every step.

    Args:
        task: Gives the outcome label of a prompt and a response.
    """
    return lambda prompt, steps: [task.label(prompt, "\n".join(steps))] * len(steps)


def result_spans(response: str) -> tuple[Span, ...]:
    """The results that a response states, one a line; its lines where it states none.

    Example:
        >>> text = "1: add 4 -> 7\\nAnswer: 7"
        >>> [text[a:b] for a, b in result_spans(text)]
        [' 7', ' 7']
    """
    return tuple(match.span(1) for match in RESULT.finditer(response)) or tuple(Segmentation("lines")(response))


class ResultTokenModel(StepRewardModel):
    """A reward model that reads of each step its result only: what a policy does to get there is not scored."""

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        """Scores of the results."""
        spans = [result_spans(text) if text.strip() else None for text in responses]
        return super().score(prompts, responses, spans=spans, **kwargs)


class Assets(shipped.Assets):
    """Reward models of all arms."""

    rules: ClassVar[Mapping[str, Callable[[Task], Rule]]] = {**shipped.Assets.rules, "copy_label": copy_label}

    @classmethod
    def recipes(cls, task: Task) -> dict[str, Recipe]:
        """What each kind of reward model is trained with.

        `result_token` reads of each step what it states and not what it does. `fractal_flips` alone is told the share
        of outcome labels that are wrong.

        Example:
            >>> recipe = Assets.recipes(CONDITIONS["noise_20"])["fractal_flips"]
            >>> recipe["missed_good"], round(recipe["missed_bad"], 3)  # a wrong chain: lucky and kept, or flipped
            (0.2, 0.26)
        """
        luck, flipped = FRACTAL["missed_bad"], task.flipped
        changes: dict[str, Recipe] = {
            "fractal_bag": {},
            "fractal_flips": {"missed_good": flipped, "missed_bad": luck * (1 - flipped) + (1 - luck) * flipped},
            "fractal_priors": {**FRACTAL, "likelihood_prior_weight": 0.3, "prior_schedule": "linear"},
            "fractal_pseudo": {**FRACTAL, "pseudo_labels": "soft", "pseudo_bag_weight": 1.0, "pseudo_start": "warm"},
            "result_token": FRACTAL,
            "lca": {**FRACTAL, "aggregation": "softmin"},
        }
        further = {kind: TRAINING | change for kind, change in changes.items()}
        return super().recipes(task) | further | {"implicit": IMPLICIT}

    def spans(self, kind: str, response: str) -> tuple[Span, ...]:
        """The steps that a kind of reward model reads."""
        return result_spans(response) if kind == "result_token" else super().spans(kind, response)

    def train_reward_model(self, kind: str, folder: Path, **options: Any) -> None:
        """Train a reward model into a folder."""
        recipe = self.recipes(self.task)[kind]
        if "beta" in recipe:
            training = dict(recipe)
            model = ImplicitReward(self.policy(), training.pop("beta"), self.seed)
            model.train(self.bags(kind), **training, max_steps=None if self.max_steps < 0 else self.max_steps)
            model.save(folder)
            return
        if "likelihood_prior_weight" in recipe:
            options["reference_model"] = str(self.policy())
        super().train_reward_model(kind, folder, **options)

    def reward_model(self, kind: str) -> StepRewardModel:
        """A reward model of a kind, or a rule in its place."""
        recipe = self.recipes(self.task).get(kind, {})
        if "beta" in recipe:
            folder = self.reward_model_folder(kind)
            trained = ImplicitReward(self.policy(), recipe["beta"], self.seed, trained=folder)
            return ImplicitRewardModel(trained, recipe["learning_rate"], recipe["batch_size"])
        if kind == "result_token":
            return ResultTokenModel.from_pretrained(self.reward_model_folder(kind), device="cpu", batch_size=64)
        return super().reward_model(kind)

    def outcome(self, arm: Arm, judge: StepRewardModel | None) -> Callable[..., list[float]]:
        """The outcome reward of an arm, from which an implicit reward may learn on."""
        outcome = super().outcome(arm, judge)
        if isinstance(arm, Further) and arm.online and isinstance(judge, ImplicitRewardModel):
            return judge.learning_from(outcome)
        return outcome


@dataclass(frozen=True)
class Evidence(Study):
    """The study with all arms; those beyond the core have five seeds at most, on two tasks or those that they name."""

    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    assets: type[shipped.Assets] = Assets

    def units(self, tasks: Sequence[str], arms: Sequence[str], seeds: int) -> list[Unit]:
        """All runs: core arms first."""
        found = super().units(tasks, [name for name in arms if name in _CORE], seeds)
        for unit in super().units(tasks, [name for name in arms if name not in _CORE], min(seeds, FURTHER_SEEDS)):
            arm = self.arms[unit.arm]
            if unit.task in ((isinstance(arm, Further) and arm.conditions) or FURTHER):
                found.append(unit)
        return found

    def updates(self, unit: Unit) -> int:
        """Policy updates of a run; some arms run for longer."""
        arm, updates = self.arms[unit.arm], super().updates(unit)
        if isinstance(arm, Further) and arm.times:
            return arm.times * updates
        if isinstance(arm, Further) and arm.like:
            return updates + self.tasks[unit.task].responses // self.budget.rollouts_per_update
        return updates

    def tuned_as(self, arm: str) -> str:
        """The arm whose trials choose the options of an arm."""
        return getattr(self.arms[arm], "like", None) or arm

    def rates(self, arm: str, rate: float) -> Sequence[float]:
        """Learning rates of the trials of an arm."""
        return LEARNING_RATES if getattr(self.arms[arm], "own_rate", False) else super().rates(arm, rate)
