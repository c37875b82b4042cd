"""Recent rollouts with their outcomes: the training and held-out data of a reward model that keeps learning."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fractal_rm.data.bag import Bag
from fractal_rm.data.prompts import Conversation, Prompt
from fractal_rm.ppo.rollout import mean_outcomes


def outcome_labels(rewards: Tensor, weights: Tensor) -> Tensor:
    """Response labels (B,) in [0, 1] from outcome rewards by [`mean_outcomes`], whose arguments these are.

    Raises ValueError if a function with a weight gave a number outside [0, 1].
    """
    outside = ((rewards < 0) | (rewards > 1)) & (weights.to(rewards.device) > 0)
    if outside.any():
        row, function = outside.nonzero()[0].tolist()
        raise ValueError(
            f"`reward_funcs[{function}]` gave completion {row} {rewards[row, function].item():g}, outside [0, 1], so "
            "it cannot be a response label for `rm_update_every`. Scale it, give it weight 0, or set "
            "`rm_update_every=0`."
        )
    return mean_outcomes(rewards, weights)


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether a prompt belongs to the share of held-out prompts, whose responses are never trained on.

    The prompt's hash decides, so all responses to it are on the same side in every run and on every machine.

    Example:
        >>> [is_held_out("2+3*4?", share) for share in (0.0, 1.0)]
        [False, True]
    """
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


class ReplayBuffer:
    """The policy's latest responses with their labels; new ones replace the oldest.

    Args:
        size: Maximum number of responses, both sides together.
        holdout_share: Share of the prompts whose responses are held out, and their share of `size`.

    Attributes:
        learned: Responses to train on, oldest first.
        held_out: Responses to evaluate with, oldest first. No prompt is on both sides.
    """

    def __init__(self, size: int, holdout_share: float) -> None:
        room = max(1, round(size * holdout_share))
        self.holdout_share = holdout_share
        self.learned: deque[Bag] = deque(maxlen=size - room)
        self.held_out: deque[Bag] = deque(maxlen=room)

    def add(self, bags: Iterable[Bag]) -> None:
        """Add labelled responses, each on its prompt's side."""
        for bag in bags:
            (self.held_out if is_held_out(bag.prompt, self.holdout_share) else self.learned).append(bag)

    def to_jsonl(self) -> str:
        """One line per response: prompt, response, step spans, label; for a conversation its turns and their
        context."""
        fields = ("prompt", "response", "step_spans", "label")
        rows = [
            {name: getattr(bag, name) for name in fields}
            | ({"turns": said.turns, "context": said.context} if isinstance(said := bag.response, Conversation) else {})
            for bag in (*self.learned, *self.held_out)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def load_jsonl(self, text: str) -> None:
        """Replace the contents by what [`to_jsonl`] wrote; the prompts' hashes decide the sides again."""
        self.learned.clear()
        self.held_out.clear()
        # Not `splitlines`, which also splits at Unicode line separators that JSON does not escape.
        self.add(_bag(**json.loads(line)) for line in text.split("\n") if line)


def _bag(response: str, *, turns: Any = None, context: Any = None, **fields: Any) -> Bag:
    return Bag(response=response if turns is None else Conversation(response, turns, context), **fields)


def draw(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """Indices below `count` in random order: none repeats before all others were drawn."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(rounds)[:wanted].tolist()
