"""Where step rewards come from: reward models and functions of one's own, each one more reward function to TRL."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from trl.trainer.utils import get_callable_name

from fractal_rm.credit.moments import RunningMoments
from fractal_rm.credit.placement import completion_text
from fractal_rm.data.segmentation import Segmentation, Span
from fractal_rm.ppo.finite_rewards import completion_in_words
from fractal_rm.reward_model import Step, StepRewardModel, StepScores


class StepRewardSource:
    """Something that scores steps, seen by TRL as one more reward function.

    TRL logs what it returns, one number a completion, as `rewards/<name>`. Its weight among TRL's outcome rewards is 0:
    the trainer uses the step scores instead.

    Attributes:
        weight: Among the dense sources.
        gives_probabilities: Whether scores are P(step is good), as the guards take them.
        scored: Steps of the last rollout's completions, with their scores.
        moments: Of its shaped rewards in the whole run, for `normalize_step_rewards`.
        tokenizer: The policy's, once TRL has loaded it.
    """

    gives_probabilities = False

    def __init__(self) -> None:
        self.__name__, self.weight = "", 1.0
        self.scored: list[StepScores] = []
        self.moments = RunningMoments()
        self.tokenizer: Any = None

    def prepare(self, tokenizer: Any, device: Any) -> None:
        """Take what the trainer knows once TRL has made it."""
        self.tokenizer = tokenizer

    def texts(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """The completions. Not TRL's: placement counts the characters of exactly this decoding."""
        return [completion_text(ids, self.tokenizer) for ids in completion_ids]


class StepScoreReward(StepRewardSource):
    """A reward model. Its number for a completion is P(response is good).

    Args:
        reward_model: The model.
        batch_size: Responses in a forward; None: the model's own setting.
    """

    gives_probabilities = True

    def __init__(self, reward_model: StepRewardModel, batch_size: int | None) -> None:
        super().__init__()
        self.__name__ = "step_reward_model"
        self.reward_model, self.batch_size = reward_model, batch_size

    def prepare(self, tokenizer: Any, device: Any) -> None:
        super().prepare(tokenizer, device)
        self.reward_model.scorer.to(device)

    def __call__(
        self,
        prompts: list[Any],
        completion_ids: list[list[int]],
        log_extra: Callable[[str, list[str]], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        texts = self.texts(completion_ids)
        self.scored = self.reward_model.score(prompts, texts, batch_size=self.batch_size, progress=False)
        for row, scored in enumerate(self.scored):
            if not all(map(math.isfinite, scored.step_scores)):
                raise ValueError(
                    f"`{self.__name__}` scored the steps of {completion_in_words(row, prompts[row], texts[row])} as "
                    f"{scored.step_scores}. Its weights or their precision are broken: check them with "
                    "`StepRewardModel.score` on that text."
                )
        if log_extra is not None:  # a column of TRL's table of completions, for `log_completions`
            log_extra(f"steps/{self.__name__}", [step_lines(scored) for scored in self.scored])
        return [None if scored.error else scored.score for scored in self.scored]


def step_lines(scored: StepScores) -> str:
    """Steps with their scores as text, one a line.

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


class StepFunctionReward(StepRewardSource):
    """A function of one's own. Its number for a completion is the mean score of its steps.

    It is called with TRL's arguments (`prompts`, `completions`, `completion_ids`, the data set's other columns) and
    `steps`, the texts of each completion's steps. It returns one score per step for each completion, on a scale of its
    own; None for a step or for a completion without an opinion, which is then as if it were not there.

    Args:
        function: The function.
        segmentation: How completions become steps.
        bounded: Whether the shaping needs scores in [0, 1].
    """

    def __init__(self, function: Callable[..., Any], segmentation: Segmentation, *, bounded: bool) -> None:
        super().__init__()
        self.__name__ = get_callable_name(function)
        self.function, self.segmentation, self.bounded = function, segmentation, bounded

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> Any:
        texts, spans, steps = self.cut(completion_ids)
        returned = self.function(prompts=prompts, completion_ids=completion_ids, steps=steps, **kwargs)
        return self.take(returned, prompts, texts, spans)

    def cut(self, completion_ids: Sequence[Sequence[int]]) -> tuple[list[str], list[list[Span]], list[list[str]]]:
        """The completions, the characters of their steps, and the texts of these."""
        texts = self.texts(completion_ids)
        spans = [self.segmentation(text) for text in texts]
        return texts, spans, [[text[a:b] for a, b in cut] for text, cut in zip(texts, spans, strict=True)]

    def take(
        self, returned: Any, prompts: Sequence[Any], texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[float | None]:
        """Check and keep what the function returned.

        Args:
            returned: Scores of the steps of each completion.
            prompts: Their prompts, for messages.
            texts: The completions.
            spans: Characters of their steps.

        Returns:
            Mean score of each completion, None where there is none.

        Raises:
            TypeError: If something is no list or no number.
            ValueError: If there are not as many completions or steps as there should be, or a score is not finite or
                out of bounds. The sentence names the row, its prompt and the completion.
        """
        rows = _checked_list(returned, f"`{self.__name__}` returned", "a list with an entry for each completion")
        if len(rows) != len(texts):
            raise ValueError(
                f"`{self.__name__}` returned {len(rows)} entries for {len(texts)} completions. Return one list of step "
                "scores for each completion, None for one without an opinion."
            )
        self.scored = []
        for row, (scores, prompt, text, cut) in enumerate(zip(rows, prompts, texts, spans, strict=True)):
            found = [] if scores is None else self._steps(scores, text, cut, completion_in_words(row, prompt, text))
            mean = sum(step.score for step in found) / len(found) if found else math.nan
            self.scored.append(StepScores(text, found, mean))
        return [scored.score if scored.steps else None for scored in self.scored]

    def _steps(self, scores: Any, text: str, cut: Sequence[Span], where: str) -> list[Step]:
        values = _checked_list(scores, f"`{self.__name__}` gave {where}", "a list with a score for each step")
        if len(values) != len(cut):
            raise ValueError(
                f"`{self.__name__}` gave {where} {len(values)} scores for {len(cut)} steps. Return one score for each "
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
                    f"`{self.__name__}` gave step {number} of {where} a {kind}. Return a number, or None."
                ) from None
            if not math.isfinite(score):
                raise ValueError(
                    f"`{self.__name__}` gave step {number} of {where} the score {score}. Return a finite number, or "
                    "None for a step without an opinion."
                )
            if self.bounded and not 0.0 <= score <= 1.0:
                raise ValueError(
                    f"`{self.__name__}` gave step {number} of {where} the score {score:g}, and `shaping='log_odds'` "
                    "needs probabilities. Return scores in [0, 1], or choose another shaping."
                )
            steps.append(Step(text[start:end], start, end, score))
        return steps


class AsyncStepFunctionReward(StepFunctionReward):
    """An `async` function of one's own: TRL runs it beside the other asynchronous reward functions."""

    async def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> Any:
        texts, spans, steps = self.cut(completion_ids)
        returned = await self.function(prompts=prompts, completion_ids=completion_ids, steps=steps, **kwargs)
        return self.take(returned, prompts, texts, spans)


def _checked_list(value: Any, found: str, wanted: str) -> list[Any]:
    """Lists, tuples, arrays and tensors as lists; a text is none, although it has a length."""
    try:
        if isinstance(value, str | dict):
            raise TypeError
        return list(value)
    except TypeError:
        raise TypeError(f"{found} a {type(value).__name__}. Return {wanted}.") from None
