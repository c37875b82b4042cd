"""Where rewards come from: outcome functions, reward models, and functions that score steps.

An outcome function is an ordinary TRL reward function: one number per completion. A source of step rewards returns each
completion's steps with their scores. They are independent of each other and of how their results are used.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

from torch import Tensor, nn
from trl.trainer import utils as trl_utils

from fractal_rm.data.bag import Span, Step, StepScores
from fractal_rm.data.segmentation import Segmentation, warn_of_uncut_responses
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.reward_model import StepRewardModel

# Characters of a prompt or a completion in a message.
_SHOWN = 200


# Sources of step rewards ----------------------------------------------------------------------------------------------


class StepRewardSource(ABC):
    """A source of step scores.

    Args:
        name: Its name in logs.
        weight: Its weight among the sources.

    Attributes:
        gives_probabilities: Whether scores are P(step is good), as the guards need.
        is_async: Whether TRL must await it.
        segmentation: How it cuts completions into steps.
    """

    gives_probabilities = False
    is_async = False
    segmentation: Segmentation

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.name, self.weight = name, weight

    @abstractmethod
    def __call__(
        self, prompts: list[Any], texts: list[str], template_options: Mapping[str, Any], /, **arguments: Any
    ) -> list[StepScores] | Awaitable[list[StepScores]]:
        """Score completions.

        Args:
            prompts: Their prompts.
            texts: The completions.
            template_options: Arguments of the policy's chat template in addition to the messages.
            arguments: What TRL passes to reward functions: `completions`, `completion_ids`, columns of the data set.

        Returns:
            Steps and scores of each completion; a `score` of NaN means no opinion.
        """


class ModelSource(StepRewardSource):
    """A reward model. Its number for a completion is P(response is good).

    Its chat template gets the same arguments as the policy's. `batch_size` is the number of responses per forward pass;
    None: the model's own setting.
    """

    gives_probabilities = True

    def __init__(self, name: str, weight: float, reward_model: StepRewardModel, batch_size: int | None) -> None:
        super().__init__(name, weight)
        self.reward_model, self.batch_size, self.segmentation = reward_model, batch_size, reward_model.segmentation

    def __call__(
        self, prompts: list[Any], texts: list[str], template_options: Mapping[str, Any], /, **arguments: Any
    ) -> list[StepScores]:
        found = self.reward_model.score(
            prompts, texts, batch_size=self.batch_size, progress=False, chat_template_kwargs=template_options
        )
        for row, scored in enumerate(found):
            if not all(map(math.isfinite, scored.step_scores)):
                raise NotFiniteReward(
                    f"`{self.name}` scored the steps of {completion_in_words(row, prompts[row], texts[row])} as "
                    f"{scored.step_scores}. Its weights or their precision are broken: check them with "
                    "`StepRewardModel.score` on that text."
                )
        return found


class FunctionSource(StepRewardSource):
    """A function that scores steps. Its number for a completion is the mean score of its steps.

    The function gets TRL's arguments (`prompts`, `completions`, `completion_ids`, columns of the data set) and `steps`,
    the texts of each completion's steps. It returns a score for each step of each completion, on any scale. None for a
    step or a completion means no opinion: it is then ignored. `bounded_by` is the shaping, if it needs scores in [0,
    1].
    """

    def __init__(
        self,
        name: str,
        weight: float,
        function: Callable[..., Any],
        segmentation: Segmentation,
        *,
        bounded_by: str | None,
    ) -> None:
        super().__init__(name, weight)
        self.function, self.segmentation, self.bounded_by = function, segmentation, bounded_by
        self.is_async = trl_utils.is_async_callable(function)

    def __call__(
        self, prompts: list[Any], texts: list[str], template_options: Mapping[str, Any], /, **arguments: Any
    ) -> list[StepScores] | Awaitable[list[StepScores]]:
        spans = [self.segmentation(text) for text in texts]
        steps = [[text[a:b] for a, b in cut] for text, cut in zip(texts, spans, strict=True)]
        returned = self.function(prompts=prompts, steps=steps, **arguments)
        if not self.is_async:
            return self._checked(returned, prompts, texts, spans)

        async def later() -> list[StepScores]:
            return self._checked(await returned, prompts, texts, spans)

        return later()

    def _checked(
        self, returned: Any, prompts: Sequence[Any], texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[StepScores]:
        """The function's result as steps with scores; a TypeError or ValueError names the row, its prompt and the
        completion."""
        rows = _checked_list(returned, f"`{self.name}` returned", "a list with an entry for each completion")
        if len(rows) != len(texts):
            raise ValueError(
                f"`{self.name}` returned {len(rows)} entries for {len(texts)} completions. Return one list of step "
                "scores for each completion, None for one without an opinion."
            )
        found = []
        for row, (scores, prompt, text, cut) in enumerate(zip(rows, prompts, texts, spans, strict=True)):
            steps = [] if scores is None else self._steps(scores, text, cut, completion_in_words(row, prompt, text))
            mean = sum(step.score for step in steps) / len(steps) if steps else math.nan
            found.append(StepScores(text, steps, mean))
        return found

    def _steps(self, scores: Any, text: str, cut: Sequence[Span], where: str) -> list[Step]:
        values = _checked_list(scores, f"`{self.name}` gave {where}", "a list with a score for each step")
        if len(values) != len(cut):
            raise ValueError(
                f"`{self.name}` gave {where} {len(values)} scores for {len(cut)} steps. Return one score for each "
                "of `steps`, None for a step without an opinion."
            )
        steps = []
        for number, (value, (start, end)) in enumerate(zip(values, cut, strict=True), 1):
            if value is None:
                continue
            try:
                score = float(value)
            except (TypeError, ValueError):
                kind = type(value).__name__
                raise TypeError(
                    f"`{self.name}` gave step {number} of {where} a {kind}. Return a number, or None."
                ) from None
            if not math.isfinite(score):
                raise NotFiniteReward(
                    f"`{self.name}` gave step {number} of {where} the score {score}. Return a finite number, or "
                    "None for a step without an opinion."
                )
            if self.bounded_by and not 0.0 <= score <= 1.0:
                raise ValueError(
                    f"`{self.name}` gave step {number} of {where} the score {score:g}, and "
                    f"`shaping='{self.bounded_by}'` needs probabilities. Return scores in [0, 1], or choose another "
                    "shaping."
                )
            steps.append(Step(text[start:end], start, end, score))
        return steps


def as_list(given: Any) -> list[Any]:
    """One value or several as a new list; None: an empty list."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def make_sources(
    reward_models: Sequence[StepRewardModel],
    functions: Sequence[Any],
    args: StepPPOConfig,
    outcomes: Sequence[Any] = (),
) -> list[StepRewardSource]:
    """The sources of step rewards with their weights and names, the reward models first.

    Functions get steps by `step_segmentation`; without it, by the first reward model's segmentation, or lines. A name
    that occurs more than once, also among the outcome functions, gets a number.

    Raises:
        ValueError: If the number of weights differs from the number of sources, or a model does not suit the shaping.
    """
    segmentation = args.function_segmentation or (reward_models[0].segmentation if reward_models else Segmentation())
    bounded_by = args.shaping if args.shaping in ("log_odds", "first_mistake") else None
    count = len(reward_models) + len(functions)
    weights = [1.0] * count if args.step_reward_weights is None else args.step_reward_weights
    if len(weights) != count:
        raise ValueError(
            f"`step_reward_weights` has {len(weights)} numbers for {len(reward_models)} reward models and "
            f"{len(functions)} `step_reward_funcs`. Give one each, in this order."
        )
    for which, model in numbered(reward_models):
        found = model.settings.aggregation
        if args.shaping in ("min_form", "first_mistake") and meaning(found) == "max":
            raise ValueError(
                f"{which} was trained with aggregation {found!r}: one good step makes a response good, but "
                f"`shaping='{args.shaping}'` charges for bad steps. Choose another shaping, or another model."
            )
    usual = ["step_reward_model"] * len(reward_models) + list(map(trl_utils.get_callable_name, functions))
    names = _apart(usual, map(trl_utils.get_callable_name, outcomes))
    sources: list[StepRewardSource] = []
    for name, weight, source in zip(names, weights, [*reward_models, *functions], strict=True):
        if isinstance(source, StepRewardModel):
            sources.append(ModelSource(name, weight, source, args.reward_model_batch_size))
        else:
            sources.append(FunctionSource(name, weight, source, segmentation, bounded_by=bounded_by))
    return sources


def _apart(names: Sequence[str], taken: Iterable[str]) -> Iterator[str]:
    """The names, with a number appended to each one that occurs more than once or is taken."""
    counts, seen = Counter([*taken, *names]), Counter[str]()
    for name in names:
        seen[name] += 1
        yield f"{name}_{seen[name]}" if counts[name] > 1 else name


def numbered(models: Sequence[StepRewardModel]) -> Iterator[tuple[str, StepRewardModel]]:
    """Reward models with their names in messages."""
    for number, model in enumerate(models, 1):
        yield f"Reward model {number} of {len(models)}" if len(models) > 1 else "The reward model", model


def warn_of_uncut_completions(batch: RolloutBatch, sources: Sequence[StepRewardSource]) -> None:
    """Warn if a source left almost every completion of a rollout as one step although another rule finds several."""
    for source in sources:
        read = [(one.response, one.spans) for one in batch.scores[source.name] if one.steps and one.judged]
        if read:
            warn_of_uncut_responses(read, source.segmentation)


def step_lines(scored: StepScores) -> str:
    """Steps with their scores as text, one per line.

    Example:
        >>> from fractal_rm.reward_model import Step
        >>> steps = [Step("2+2=4", 0, 5, 0.98), Step("4+1=6", 6, 11, 0.07)]
        >>> print(step_lines(StepScores("2+2=4 4+1=6", steps, 0.07)))
        0.98  2+2=4
        0.07  4+1=6
    """
    lines = [f"{step.score:.2f}  {step.text}" for step in scored.steps]
    if scored.truncated_steps:
        lines.append(f"{scored.truncated_steps} more beyond `max_length`")
    return f"not scored: {scored.error}" if scored.error else "\n".join(lines)


def _checked_list(value: Any, found: str, wanted: str) -> list[Any]:
    """Lists, tuples, arrays and tensors as lists; a text also has a length, but is refused."""
    try:
        if isinstance(value, str | dict):
            raise TypeError
        return list(value)
    except TypeError:
        raise TypeError(f"{found} a {type(value).__name__}. Return {wanted}.") from None


# Outcome functions ----------------------------------------------------------------------------------------------------


class NotFiniteReward(ValueError):
    """A reward or score is NaN or infinite: the run stops and saves the rollout."""


def finite_outcomes(function: Any, name: str) -> Any:
    """A TRL reward function with checked rewards: NaN and infinity would spread to the whole batch.

    For TRL None means "no opinion" and becomes NaN, so the check must run where the function returns. A transformers
    reward model is not wrapped.
    """
    if isinstance(function, nn.Module):
        return function
    if trl_utils.is_async_callable(function):

        @wraps(function, updated=())
        async def checked_later(prompts: Any, completions: Any, **arguments: Any) -> list[Any]:
            rewards = await function(prompts=prompts, completions=completions, **arguments)
            return check_finite_rewards(rewards, name, prompts, completions)

        return checked_later

    @wraps(function, updated=())
    def checked(prompts: Any, completions: Any, **arguments: Any) -> list[Any]:
        rewards = function(prompts=prompts, completions=completions, **arguments)
        return check_finite_rewards(rewards, name, prompts, completions)

    return checked


def check_finite_rewards(
    rewards: Iterable[Any], name: str, prompts: Sequence[Any], completions: Sequence[Any]
) -> list[Any]:
    """The rewards; raises ValueError if one is NaN or infinite, naming the function, row, prompt and completion."""
    rewards = list(rewards)
    for row, (reward, prompt, completion) in enumerate(zip(rewards, prompts, completions, strict=False)):
        if reward is not None and not math.isfinite(reward):
            raise NotFiniteReward(
                f"The reward function `{name}` gave {completion_in_words(row, prompt, completion)} the reward "
                f"{float(reward)}. Return a finite number, or None for no opinion."
            )
    return rewards


def check_model_outcomes(
    functions: Sequence[Any], names: Sequence[str], rewards: Tensor, prompts: Sequence[Any], completions: Sequence[Any]
) -> None:
    """Raise if a transformers reward model gave NaN or infinity (B, F): it never returns None."""
    for column, (function, name) in enumerate(zip(functions, names, strict=True)):
        if isinstance(function, nn.Module):
            check_finite_rewards(rewards[:, column].tolist(), name, prompts, completions)


def completion_in_words(row: int, prompt: Any, completion: Any) -> str:
    """A completion as named in messages: its row, prompt and text; for a chat its last message.

    Example:
        >>> completion_in_words(3, [{"role": "user", "content": "2+2?"}], "4")
        "row 3 (prompt '2+2?', completion '4')"
    """
    return f"row {row} (prompt {_shown(prompt)}, completion {_shown(completion)})"


def _shown(text: Any) -> str:
    if isinstance(text, list) and text and isinstance(text[-1], dict):
        text = text[-1].get("content")
    words = repr(text)
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
