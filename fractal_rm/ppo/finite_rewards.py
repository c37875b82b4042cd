"""Rewards that are no numbers, named before they reach an advantage: NaN and infinity would spread to the whole batch.

None stays what it is to TRL: no opinion on a completion. TRL writes None as NaN, so the two must be told apart where a
reward function returns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

# Characters of a prompt or a completion in a message.
_SHOWN = 200


def completion_in_words(row: int, prompt: Any, completion: Any) -> str:
    """A completion as messages name it: its row, its prompt, its text; of chats the last message.

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


def check_finite(rewards: Sequence[Any], name: str, prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    """Raise if a reward is NaN or infinite.

    Args:
        rewards: One number for each completion, None without an opinion.
        name: Of the reward function.
        prompts: The prompts.
        completions: The completions.

    Raises:
        ValueError: Names the function, the row, its prompt and its completion.
    """
    for row, (reward, prompt, completion) in enumerate(zip(rewards, prompts, completions, strict=False)):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"The reward function `{name}` gave {completion_in_words(row, prompt, completion)} the reward "
                f"{float(reward)}. Return a finite number, or None for no opinion."
            )


@contextmanager
def checked_reward_functions(trainer: Any) -> Iterator[None]:
    """Have every reward function of a TRL trainer checked for a while; reward models of transformers are left alone.

    Args:
        trainer: Has `reward_funcs` and `reward_func_names`.
    """
    functions = trainer.reward_funcs
    trainer.reward_funcs = [
        function if isinstance(function, nn.Module) else _checked(function, name)
        for function, name in zip(functions, trainer.reward_func_names, strict=True)
    ]
    try:
        yield
    finally:
        trainer.reward_funcs = functions


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if is_async_callable(function):

        async def call_later(prompts: Any, completions: Any, **kwargs: Any) -> list[Any]:
            rewards = list(await function(prompts=prompts, completions=completions, **kwargs))
            check_finite(rewards, name, prompts, completions)
            return rewards

        return call_later

    def call(prompts: Any, completions: Any, **kwargs: Any) -> list[Any]:
        rewards = list(function(prompts=prompts, completions=completions, **kwargs))
        check_finite(rewards, name, prompts, completions)
        return rewards

    return call


def check_model_rewards(trainer: Any, rewards: Tensor, prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    """Raise if a reward model of transformers gave NaN or infinity: it always has an opinion.

    Args:
        trainer: Has `reward_funcs` and `reward_func_names`.
        rewards: Of this process (B, functions).
        prompts: The prompts.
        completions: The completions.
    """
    for column, (function, name) in enumerate(zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)):
        if isinstance(function, nn.Module):
            check_finite(rewards[:, column].tolist(), name, prompts, completions)
