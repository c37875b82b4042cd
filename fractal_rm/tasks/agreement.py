"""A step is more likely right if other responses to the same prompt reach the same result: votes, step by step.

It needs no labels and no model, only several responses to a prompt, as GRPO samples them. It is the vote of
self-consistency (Wang et al., ICLR 2023, arXiv 2203.11171) on every intermediate result in place of the final answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fractal_rm.tasks.equations import last_number


def agreement(prompts: Sequence[Any], steps: Sequence[Sequence[str]], **kwargs: object) -> list[list[float]]:
    """Scores of steps: the share of the other responses to the prompt that have the same results up to this step.

    The result of a step is its last number, or None if it has no number; responses can share the result None too.
    A repeated or inserted step ends the agreement, so cutting finer does not pay. It has the signature of
    `step_reward_funcs`.

    Args:
        prompts: Prompts of the responses; responses with equal prompts are compared.
        steps: Texts of the steps of each response.
        kwargs: Other arguments that TRL passes to reward functions; ignored.

    Returns:
        For each response the scores of its steps, in [0, 1]; 0 where a prompt has one response.

    Example:
        >>> steps = [["2 + 2 = 4", "4 * 3 = 12"], ["2 + 2 = 4", "4 * 3 = 11"], ["2 + 2 = 4", "That is 12."]]
        >>> agreement(["p"] * 3, steps)
        [[1.0, 0.5], [1.0, 0.0], [1.0, 0.5]]
    """
    return _shares(prompts, steps, lambda other, mine: other[: len(mine)] == mine)


def result_agreement(prompts: Sequence[Any], steps: Sequence[Sequence[str]]) -> list[list[float]]:
    """As [`agreement`], but the other response may have the result of the step anywhere.

    Example:
        >>> result_agreement(["p"] * 2, [["2 + 2 = 4", "4 * 3 = 12"], ["4 * 3 = 12"]])
        [[0.0, 1.0], [1.0]]
    """
    return _shares(prompts, steps, lambda other, mine: mine[-1] in other)


def _shares(
    prompts: Sequence[Any],
    steps: Sequence[Sequence[str]],
    agrees: Callable[[list[float | None], list[float | None]], bool],
) -> list[list[float]]:
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(row)
    results = [[last_number(step) for step in cut] for cut in steps]
    found: list[list[float]] = [[] for _ in steps]
    for rows in groups.values():
        for row in rows:
            others = [results[other] for other in rows if other != row]
            for count in range(1, len(results[row]) + 1):
                agreeing = sum(agrees(other, results[row][:count]) for other in others)
                found[row].append(agreeing / len(others) if others else 0.0)
    return found
