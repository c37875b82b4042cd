"""Places a server's step scores on the tokens that another engine sampled; shared by the engines' files."""

import functools
import math
import os
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fractal_rm import ScoringClient
from fractal_rm.credit.advantages import group_step_advantages
from fractal_rm.credit.placement import completion_text, step_end_tokens, token_end_characters

URL_VARIABLE = "FRACTAL_RM_URL"


class Placed(NamedTuple):
    """Scores of a completion's steps in [0, 1], and the token at which each step ends; None if at no token."""

    scores: list[float]
    ends: list[int | None]


@functools.cache
def client(url: str) -> ScoringClient:
    """The client of a server."""
    return ScoringClient(url)


def from_environment() -> ScoringClient:
    """The client of the server that the variable names.

    Raises:
        ValueError: If the variable is not set.
    """
    if not (url := os.environ.get(URL_VARIABLE)):
        raise ValueError(f"{URL_VARIABLE} is not set. Set it to the address that `fractal-rm serve` printed.")
    return client(url)


def placed_scores(
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    tokenizer: Any,
    scoring: ScoringClient,
    masks: Sequence[Sequence[int]] | None = None,
) -> list[Placed]:
    """Score the steps of completions and find the tokens at which they end.

    Args:
        prompts: Texts or chats, as the reward model learned them.
        completion_ids: Sampled ids of each completion, without padding.
        tokenizer: The policy's.
        scoring: The server.
        masks: For each completion, 1 where the policy wrote the token.

    Returns:
        The steps of each completion; no steps if it cannot be scored, or not to its end.

    Raises:
        ValueError: If no completion with text is scored: nothing could be learned. If others wrote between tokens of
            the policy: a tool's output would be scored as steps.
    """
    for row, mask in enumerate(masks or ()):
        if "10" in "".join(str(int(bool(one))) for one in mask).strip("0"):
            raise ValueError(
                f"Completion {row} holds tokens that the policy did not write, such as a tool's output, between its "
                "own: they would be scored as steps. Train on rollouts of one turn, or with `StepPPOTrainer`."
            )
    texts = [completion_text(ids, tokenizer) for ids in completion_ids]
    found = scoring.score(list(prompts), texts)
    written = [one for one, text in zip(found, texts, strict=True) if text.strip()]
    if written and all(math.isnan(one.score) for one in written):
        raise ValueError(f"None of {len(texts)} completions could be scored. First: {written[0].error}")
    pieces: dict[int, str] = {}
    return [
        Placed(one.step_scores, step_end_tokens(token_end_characters(ids, tokenizer, pieces), one.spans))
        if one.judged
        else Placed([], [])
        for one, ids in zip(found, completion_ids, strict=True)
    ]


def token_rewards(placed: Sequence[Placed], lengths: Sequence[int], *, baseline: float = 0.0) -> list[list[float]]:
    """A reward for each token of each completion: the score minus a baseline where a step ends, 0 elsewhere."""
    rewards = [[0.0] * length for length in lengths]
    for row, (scores, ends) in zip(rewards, placed, strict=True):
        for score, end in zip(scores, ends, strict=True):
            if end is not None:
                row[end] += score - baseline
    return rewards


def mean_score(placed: Sequence[Placed]) -> float:
    """Mean of the scored steps, 0 without any: with it as baseline, an unscored completion earns the mean."""
    scores = [score for one in placed for score in one.scores]
    return sum(scores) / len(scores) if scores else 0.0


def group_advantages(placed: Sequence[Placed], mask: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Advantages (B, T) of steps against the other steps of the same group.

    Args:
        placed: Steps of each completion.
        mask: True where the policy wrote the token (B, T).
        groups: What completions of one prompt have in common; they need not be consecutive.
    """
    advantages = torch.zeros(mask.shape)
    for group in dict.fromkeys(groups):
        rows = [row for row, found in enumerate(groups) if found == group]
        scores, ends = [placed[row].scores for row in rows], [placed[row].ends for row in rows]
        advantages[rows] = group_step_advantages(
            scores, ends, mask[rows].bool().cpu(), len(rows), gamma=1.0, scale=False, baseline="step"
        )
    return advantages.to(mask.device)
