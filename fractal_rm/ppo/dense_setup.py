"""How the sources of step rewards of `StepPPOTrainer` are made, weighted, named, and shown to TRL."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.ppo.checks import check_reward_models, check_step_functions
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.sources import (
    AsyncStepFunctionReward,
    StepFunctionReward,
    StepRewardSource,
    StepScoreReward,
)
from fractal_rm.reward_model import StepRewardModel


def as_list(given: Any) -> list[Any]:
    """One or several as a list of its own; None: an empty one."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def dense_sources(
    reward_model: Any,
    step_reward_funcs: Any,
    functions: list[Any],
    args: StepPPOConfig,
    train_dataset: Any,
    kwargs: dict,
) -> list[StepRewardSource]:
    """The sources of step rewards of a trainer, checked, and shown to TRL.

    Args:
        reward_model: Step reward models, one or several, instances or paths.
        step_reward_funcs: Functions of one's own, one or several.
        functions: The outcome rewards; see [`add_to_outcomes`].
        args: The configuration.
        train_dataset: The prompts, and the columns that functions read.
        kwargs: Arguments of `GRPOTrainer`.

    Raises:
        TypeError: If a function cannot be called as it will be.
        ValueError: If a reward model or a function does not suit the rest, or weights are not as many as they should.
    """
    own = as_list(step_reward_funcs)
    check_step_functions(own, args, train_dataset)  # before models are loaded
    models = [
        one if isinstance(one, StepRewardModel) else StepRewardModel.from_pretrained(one)
        for one in as_list(reward_model)
    ]
    check_reward_models(models, args, train_dataset)
    sources = make_sources(models, own, args, [get_callable_name(function) for function in functions])
    add_to_outcomes(sources, functions, args, kwargs)
    return sources


def make_sources(
    reward_models: Sequence[StepRewardModel], functions: Sequence[Any], args: StepPPOConfig, taken: Sequence[str] = ()
) -> list[StepRewardSource]:
    """Dense sources with their weights and names, the reward models first.

    Functions get steps as `step_segmentation` cuts them; without one, as the first reward model does, or by lines.

    Args:
        reward_models: Step reward models.
        functions: Functions of one's own.
        args: The configuration.
        taken: Names of outcome rewards. A name that occurs more than once gets a number.

    Raises:
        ValueError: If there are not as many weights as sources.
    """
    segmentation = args.function_segmentation or (reward_models[0].segmentation if reward_models else Segmentation())
    sources: list[StepRewardSource] = [StepScoreReward(model, args.reward_model_batch_size) for model in reward_models]
    for function in functions:
        kind = AsyncStepFunctionReward if is_async_callable(function) else StepFunctionReward
        sources.append(kind(function, segmentation, bounded=args.shaping == "log_odds"))
    weights = [1.0] * len(sources) if args.step_reward_weights is None else args.step_reward_weights
    if len(weights) != len(sources):
        raise ValueError(
            f"`step_reward_weights` has {len(weights)} numbers for {len(reward_models)} reward models and "
            f"{len(functions)} `step_reward_funcs`. Give one each, in this order."
        )
    counts, seen = Counter([*taken, *(source.__name__ for source in sources)]), Counter()
    for source, weight in zip(sources, weights, strict=True):
        source.weight = weight
        if counts[source.__name__] > 1:
            seen[source.__name__] += 1
            source.__name__ += f"_{seen[source.__name__]}"
    return sources


def add_to_outcomes(
    sources: Sequence[StepRewardSource], functions: list[Any], args: StepPPOConfig, kwargs: dict
) -> None:
    """Show dense sources to TRL as more reward functions, of weight 0.

    Args:
        sources: The dense sources.
        functions: The outcome rewards, of which they become the last.
        args: The configuration, whose `reward_weights` become as many more.
        kwargs: Arguments of `GRPOTrainer`, whose `reward_processing_classes` become as many more, if there are any.

    Raises:
        ValueError: If there are not as many weights as outcome rewards.
    """
    if not sources:
        return
    weights = args.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(
            f"`reward_weights` has {len(weights)} numbers for {len(functions)} `reward_funcs`. Give one each; "
            "those of step rewards are `step_weight` and `step_reward_weights`."
        )
    args.reward_weights = [*weights, *[0.0] * len(sources)]
    functions.extend(sources)
    theirs = kwargs.get("reward_processing_classes")
    if theirs is not None:
        theirs = theirs if isinstance(theirs, list) else [theirs]
        kwargs["reward_processing_classes"] = [*theirs, *[None] * len(sources)]
