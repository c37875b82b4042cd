"""The arms of the comparison: where the reward comes from, and which settings compete for it on the tuning seed."""

from dataclasses import dataclass
from typing import Any

from fractal_rm.tasks.arithmetic.conditions import CONDITIONS, MAIN_CONDITIONS

Options = dict[str, Any]
# Tried by the outcome-only arms; all arms then use the one that suits those best, and each has two settings of its own.
# (An arm with `own_rate` tries as many as they do.)
LEARNING_RATES = (4e-4, 8e-4, 1.6e-3)
# How far the credit of a step's reward reaches: fading from token to token, or from step to step.
_LAMBDAS = (
    {"advantage": "gae", "lam": 0.95, "step_lam": None},
    {"advantage": "gae", "step_lam": 0.2},
)
# One score a response: GRPO's baseline or a value model, whose rewards fade or do not.
_SCALES = (
    {"advantage": "group", "scale_rewards": "group"},
    {"advantage": "group", "scale_rewards": "none"},
)
_VALUES = ({"advantage": "gae", "lam": 0.95}, {"advantage": "gae", "lam": 1.0})
# Sums of later rewards are what the min-form is about: credit must reach back to the first step.
_SUMS = ({"advantage": "group", "step_gamma": 1.0}, {"advantage": "gae", "step_lam": 1.0})
# A difference to the step before: all later ones together are the last step's score, the nearest one is the step's own.
_NEAR_OR_ALL = ({"advantage": "gae", "step_lam": 0.2}, {"advantage": "gae", "step_lam": 1.0})


@dataclass(frozen=True)
class Arm:
    """One way to reward the policy; everything else is the same in all arms.

    Args:
        name: Its name in the rows.
        steps: What scores steps: a kind of reward model (`assets.py`), a rule (`rivals.py`), or None.
        outcome: Whether the checker's outcome labels are a reward.
        response_model: A reward model that scores whole responses is the outcome reward.
        variants: Two settings that compete.
        options: Settings of all trials.
        online: Whether the implicit reward learns on from the outcomes of each rollout batch; step reward models do by
            their option `rm_update_every`.
        own_rate: Whether its trials have all learning rates, of which it takes its own best.
        core: Whether it runs on every setting with every seed.
        conditions: Where it runs if it is not a core arm; None: where most of these do.
        like: The arm whose chosen settings it has; it has no trials of its own.
        times: How many times the updates of that arm it makes; None: as many more as make the rollouts of a reward
            model's labelled responses.
    """

    name: str
    steps: str | None = None
    outcome: bool = False
    response_model: bool = False
    variants: tuple[Options, Options] = _LAMBDAS
    options: tuple[tuple[str, Any], ...] = ()
    online: bool = False
    own_rate: bool = False
    core: bool = True
    conditions: tuple[str, ...] | None = None
    like: str | None = None
    times: int | None = None

    @property
    def judge(self) -> str | None:
        """What scores responses or their steps: a kind of reward model or a rule; None: the outcome alone."""
        return "response" if self.response_model else self.steps

    @property
    def trials(self) -> list[Options]:
        """What can compete on the tuning seed: the variants, with each learning rate."""
        return [
            {**dict(self.options), **variant, "learning_rate": rate}
            for rate in LEARNING_RATES
            for variant in self.variants
        ]


_LEARNING_ON = (("rm_update_every", 4), ("rm_learning_rate", 5e-4))

# Arms that are `fractal_mix`, where steps and outcome weigh the same, with another weight of the outcome.
MIXES = {"fractal_mix_low": 0.3, "fractal_mix_high": 3.0}
OUTCOME_ONLY = ("outcome_grpo", "outcome_ppo")
LONGER = {name: f"{name}_long" for name in OUTCOME_ONLY}
# So many times its updates take an outcome-only arm about as long as a reward model and a run with its scores.
TIMES = {"outcome_grpo": 4, "outcome_ppo": 3}
AS_LONG = {name: f"{name}_{times}x" for name, times in TIMES.items()}
CEILING = "supervised"

ARMS = {
    arm.name: arm
    for arm in (
        Arm("outcome_grpo", outcome=True, variants=_SCALES),
        Arm("outcome_ppo", outcome=True, variants=_VALUES),
        *(
            Arm(longer, outcome=True, like=name, core=False, conditions=tuple(CONDITIONS))
            for name, longer in LONGER.items()
        ),
        *(
            Arm(longer, outcome=True, like=name, core=False, conditions=tuple(CONDITIONS), times=TIMES[name])
            for name, longer in AS_LONG.items()
        ),
        Arm("fractal", steps="fractal"),
        Arm("fractal_mix", steps="fractal", outcome=True),
        *(
            Arm(name, steps="fractal", outcome=True, options=(("outcome_weight", weight),), core=False)
            for name, weight in MIXES.items()
        ),
        # As many trials as an outcome-only arm has, where the rate of the study is what suits those.
        Arm(
            "fractal_mix_own_rate",
            steps="fractal",
            outcome=True,
            own_rate=True,
            core=False,
            conditions=MAIN_CONDITIONS,
        ),
        # Where step scores end when they are trained on for as long as outcomes: whether what they teach has a ceiling.
        Arm("fractal_mix_4x", steps="fractal", outcome=True, core=False, like="fractal_mix", times=4),
        Arm("fractal_online", steps="fractal", outcome=True, options=_LEARNING_ON),
        # Outcomes teach the reward model and are no reward: what learning on does for step scores alone.
        Arm(
            "fractal_online_steps",
            steps="fractal",
            outcome=True,
            options=(*_LEARNING_ON, ("outcome_weight", 0.0)),
            core=False,
        ),
        # Judges as outcome-only arms do, so it may have the better of what each of them has chosen.
        Arm("orm", response_model=True, variants=(_SCALES[0], _VALUES[1])),
        Arm("supervised", steps="supervised"),
        Arm("oracle", steps="oracle"),
        Arm("random_steps", steps="random_steps"),
        Arm("copy_label", steps="copy_label", core=False),
        Arm("fractal_raw", steps="fractal", options=(("shaping", "raw"),), core=False),
        Arm("fractal_delta", steps="fractal", options=(("shaping", "delta"),), variants=_NEAR_OR_ALL, core=False),
        Arm("fractal_min_form", steps="fractal", options=(("shaping", "min_form"),), variants=_SUMS, core=False),
        Arm("fractal_log_odds", steps="fractal", options=(("shaping", "log_odds"),), core=False),
        # Steps alone, and of each step only what it states: how a careless choice of what to score is gamed.
        Arm("fractal_result_token", steps="result_token", core=False),
        Arm("lca", steps="lca", core=False),
        # The log-ratio itself is the reward: the log-odds of the score that is its sigmoid.
        Arm("implicit", steps="implicit", options=(("shaping", "log_odds"),), core=False),
        Arm("implicit_mix", steps="implicit", outcome=True, options=(("shaping", "log_odds"),), core=False),
        # PRIME: the same, learning on; its credit is the sum of all later log-ratios, or reaches to near steps.
        Arm(
            "implicit_online",
            steps="implicit",
            outcome=True,
            variants=(_SUMS[0], _LAMBDAS[1]),
            options=(("shaping", "log_odds"),),
            online=True,
            core=False,
        ),
        Arm("fractal_bag", steps="fractal_bag", core=False),
        Arm(
            "fractal_flips",
            steps="fractal_flips",
            core=False,
            conditions=("noise_10", "noise_20"),
            like="fractal",
            times=1,
        ),
        Arm("fractal_priors", steps="fractal_priors", core=False),
        Arm("fractal_pseudo", steps="fractal_pseudo", core=False),
    )
}
