"""Recent rollouts with their outcomes: what a reward model that keeps learning learns from, and is judged by."""

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
    """Response labels (B,) in [0, 1] from outcome rewards: [`mean_outcomes`], whose arguments these are.

    Raises:
        ValueError: If a function with a say gave a number outside [0, 1].
    """
    outside = ((rewards < 0) | (rewards > 1)) & (weights.to(rewards.device) > 0)
    if outside.any():
        row, function = outside.nonzero()[0].tolist()
        raise ValueError(
            f"`reward_funcs[{function}]` gave completion {row} {rewards[row, function].item():g}, outside [0, 1]: "
            "no response label for `rm_update_every`. Scale it, give it weight 0, or set `rm_update_every=0`."
        )
    return mean_outcomes(rewards, weights)


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether responses to a prompt are never learned from, as a share of the prompts is.

    The prompt's hash decides, so all responses to it are on one side, in every run and on every machine.

    Example:
        >>> [is_held_out("2+3*4?", share) for share in (0.0, 1.0)]
        [False, True]
    """
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


class ReplayBuffer:
    """The last responses of the policy, with their labels; the oldest make room for new ones.

    Args:
        size: Most responses, both sides together.
        holdout_share: Share of the prompts whose responses are held out, and of the room.

    Attributes:
        learned: Responses to learn from, oldest first.
        held_out: Responses to judge by, oldest first. No prompt is on both sides.
    """

    def __init__(self, size: int, holdout_share: float) -> None:
        room = max(1, round(size * holdout_share))
        self.holdout_share = holdout_share
        self.learned: deque[Bag] = deque(maxlen=size - room)
        self.held_out: deque[Bag] = deque(maxlen=room)

    def add(self, bags: Iterable[Bag]) -> None:
        """Put labelled responses in, each on its prompt's side."""
        for bag in bags:
            (self.held_out if is_held_out(bag.prompt, self.holdout_share) else self.learned).append(bag)

    def to_jsonl(self) -> str:
        """One line a response: prompt, response, step spans, label; of a conversation its turns and their context."""
        fields = ("prompt", "response", "step_spans", "label")
        rows = [
            {name: getattr(bag, name) for name in fields}
            | ({"turns": said.turns, "context": said.context} if isinstance(said := bag.response, Conversation) else {})
            for bag in (*self.learned, *self.held_out)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def load_jsonl(self, text: str) -> None:
        """Take what [`to_jsonl`] wrote in place of what is there; the sides are decided anew by the prompts."""
        self.learned.clear()
        self.held_out.clear()
        # Not `splitlines`, which would also cut at line separators that JSON leaves in a text.
        self.add(_bag(**json.loads(line)) for line in text.split("\n") if line)


def _bag(response: str, *, turns: Any = None, context: Any = None, **fields: Any) -> Bag:
    return Bag(response=response if turns is None else Conversation(response, turns, context), **fields)


def draw(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """Rows of `count` to learn from, in random order: none comes again before all the others have come."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(rounds)[:wanted].tolist()
