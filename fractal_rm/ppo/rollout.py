"""One batch of rollouts: made once, passed from stage to stage, never edited.

Every stage takes a batch and returns a batch with more fields set. Shapes: B completions of this process, T tokens of
the longest one, P columns of prompts, F reward functions.

With several processes, each has the same number of consecutive rows. Means and deviations are over the whole batch,
and completions of one prompt may be on several processes: the functions at the end tell a process of the others' rows.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

from fractal_rm.credit.placement import Placement
from fractal_rm.data.bag import StepScores

Row = TypeVar("Row")


class ShapedSteps(NamedTuple):
    """Step rewards of one source, before the source's weight."""

    weight: float
    rewards: list[list[float]]  # reward of every step of every completion
    ends: list[list[int | None]]  # token at which each step ends; None where the step could not be placed
    placement: Placement  # the rewards on tokens (B, T), with the audit
    judged: list[bool]  # for each completion, whether the source read all of it; others are not trained on


class TokenRewards(NamedTuple):
    """Token rewards, in two parts because each part has its own lambda (`step_lam`, `lam`)."""

    steps: Tensor  # rewards of steps (B, T), weighted
    others: Tensor  # rewards of outcomes, endings and the KL penalty (B, T), weighted
    step_ends: list[list[int | None]]  # tokens at which the steps of each row end
    penalties: Tensor  # penalty of each completion cut at the length limit (B,)
    step_weight: float  # weight that `steps` were multiplied by


@dataclass(frozen=True)
class RolloutBatch:
    """Completions of this process, with all results so far."""

    prompts: list[Any]  # texts or chats
    completion_ids: list[list[int]]  # sampled token ids, without padding
    # The completions as text: `completion_text` of the ids; step spans are character offsets into it. A
    # [`~fractal_rm.data.prompts.Conversation`] if a tool or an environment wrote in between.
    texts: list[str]
    function_rewards: Tensor  # reward of each function (B, F), NaN where it returned None
    function_weights: Tensor  # weight of each reward function (F,); sources of step rewards have 0
    is_outcome: Tensor  # which functions judge outcomes instead of scoring steps (F,)
    # Steps and scores of every completion, by the name of the source; the first source is the watched one.
    scores: Mapping[str, Sequence[StepScores]]
    tokens: dict[str, Any]  # TRL's dictionary of the rollout: what an update needs in addition to advantages
    mask: Tensor  # True where the policy wrote a token (B, T); tool outputs and padding are False
    outcome_advantages: Tensor  # TRL's group advantages of the outcomes (B,)
    # Whether the policy sampled each token of `completion_ids`; None: all of them.
    written: Sequence[Sequence[int]] | None = None
    logprobs: Tensor | None = None  # log-probabilities of the sampling policy (B, T), if they were computed
    # KL divergence from the reference at each token (B, T), if it is part of the reward or free.
    kl: Tensor | None = None
    # Values at all positions (B, P + T) from a head on the policy's states, if a forward pass computed them.
    state_values: Tensor | None = None
    steps: Sequence[ShapedSteps] = ()  # shaped step rewards, one entry per source
    rewards: TokenRewards | None = None
    values: Tensor | None = None  # values of the states before the tokens (B, T)
    returns: Tensor | None = None  # targets of the value model (B, T)
    advantages: Tensor | None = None  # advantages for the policy loss (B, T)
    # True where a token is trained on (B, T): `mask` without completions that no outcome function judged, or that a
    # source of step rewards could not read to the end.
    learned: Tensor | None = None
    # Tensors that the update needs in addition to `tokens`, by their names in a minibatch.
    for_update: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # numbers to log, by name

    def plus(
        self, metrics: Mapping[str, float] | None = None, for_update: Mapping[str, Tensor] | None = None, **made: Any
    ) -> "RolloutBatch":
        """The batch with a stage's results; metrics and tensors for the update are merged into the existing ones."""
        return replace(
            self,
            metrics={**self.metrics, **(metrics or {})},
            for_update={**self.for_update, **(for_update or {})},
            **made,
        )

    @property
    def policy_ids(self) -> list[list[int]]:
        """Token ids that the policy sampled: `completion_ids` without outputs of tools."""
        if self.written is None:
            return self.completion_ids
        rows = zip(self.completion_ids, self.written, strict=True)
        return [list(itertools.compress(ids, mask)) for ids, mask in rows]

    @property
    def watched(self) -> Sequence[StepScores] | None:
        """Scores of the first source; None without one."""
        return next(iter(self.scores.values()), None)

    @property
    def unscored(self) -> list[bool]:
        """For each completion, whether any source of step rewards could not read all of it; empty without a source."""
        return [not all(one.judged for one in row) for row in zip(*self.scores.values(), strict=True)]

    @property
    def outcomes(self) -> Tensor:
        """Weighted sum of the outcome rewards (B,); a function that returned None counts as 0."""
        return (self.function_rewards * self.function_weights.to(self.function_rewards.device)).nansum(dim=1)

    @property
    def judged(self) -> Tensor:
        """Whether any function judged a completion (B,)."""
        return ~self.function_rewards.isnan().all(dim=1)

    def minibatches(self) -> dict[str, Any]:
        """TRL's dictionary with these advantages instead of TRL's: TRL shuffles it and splits it into minibatches."""
        advantages = {} if self.advantages is None else {"advantages": self.advantages}
        return {**self.tokens, **self.for_update, **advantages}


def policy_mask(tokens: Mapping[str, Any]) -> Tensor:
    """True where the policy wrote a token (B, T), from TRL's dictionary: not padding, not the output of a tool."""
    mask = tokens["completion_mask"].bool()
    return mask & tokens["tool_mask"].bool() if "tool_mask" in tokens else mask


def mean_outcomes(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the outcome rewards (B, F) that judged a response: (B,), NaN where no function did.

    A reward is NaN where its function returned None. Weights (F,) are 0 or more; functions of weight 0 are ignored.

    Example:
        >>> import torch
        >>> mean_outcomes(torch.tensor([[1.0, 0.0], [torch.nan, 0.5]]), torch.tensor([3.0, 1.0]))
        tensor([0.7500, 0.5000])
    """
    known = weights.to(rewards.device).expand_as(rewards).masked_fill(rewards.isnan(), 0.0)
    return (known * rewards.nan_to_num()).sum(dim=1) / known.sum(dim=1)


# The rows of other processes ------------------------------------------------------------------------------------------


def rows_of_all(rows: Sequence[Row]) -> tuple[list[Row], slice]:
    """The plain values of all processes in order, and the slice of this process's; each process must have equally
    many."""
    first = PartialState().process_index * len(rows)
    return gather_object(list(rows)), slice(first, first + len(rows))


def masks_of_all(mask: Tensor, accelerator: Accelerator) -> Tensor:
    """The masks (B, T) of all processes in order, padded with False to the longest."""
    padded: Any = accelerator.pad_across_processes(mask.int(), dim=1)
    gathered: Any = accelerator.gather(padded)
    return gathered.bool()


def all_reduce(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """A function that adds up a tensor over all processes."""

    def summed(total: Tensor) -> Tensor:
        everyone: Any = accelerator.reduce(total, reduction="sum")
        return everyone

    return summed


def share_metrics(metrics: dict[str, list[float]]) -> None:
    """Extend each process's lists of numbers to log by all other processes' numbers, so that all log the same mean."""
    everyone: list[dict[str, list[float]]] = gather_object([dict(metrics)])
    for name in dict.fromkeys(name for one in everyone for name in one):
        metrics[name] = [value for one in everyone for value in one.get(name, [])]
