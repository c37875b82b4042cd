"""Values from the policy's own backbone: a linear head on the hidden states that log-probabilities are computed from.

No second backbone is held, and no forward is run where TRL runs one anyway: in an update, the states are those of the
forward that gives the log-probabilities; at a rollout, those of the old log-probabilities where TRL computes them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Log-probabilities of the policy, of a reference that is the policy without its adapter, and of the policy once more.
_FORWARDS_OF_A_ROLLOUT = 3


class ValueHead(nn.Linear):
    """Hidden states (..., H) -> values (...), in float32 whatever the states are in; 0 everywhere at the start.

    Args:
        width: Size H of a hidden state.

    Example:
        >>> ValueHead(8)(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        # One output in half precision would round every value to three digits.
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).squeeze(-1)


def make_value_head(policy: Any) -> ValueHead:
    """A head for the last hidden states of a causal language model, with or without a PEFT adapter.

    Raises:
        ValueError: If the model has no output embeddings, which say how wide those states are.
    """
    embeddings = policy.get_output_embeddings()
    if embeddings is None:
        raise ValueError(
            f"{type(policy).__name__} has no output embeddings, so no value head fits it. Leave out "
            "`value_model='shared'`."
        )
    return ValueHead(embeddings.in_features)


def backbone(policy: Any) -> nn.Module:
    """The part of a causal language model that ends with the last hidden states, PEFT layers included."""
    return (policy.get_base_model() if hasattr(policy, "peft_config") else policy).base_model


class _Forward(NamedTuple):
    """Log-probabilities (B, T) of a forward without gradients, and the values (B, P + T) of its states."""

    logprobs: Tensor
    values: Tensor


class SharedBackbone:
    """Last hidden states of the policy, read while they are computed for something else.

    Args:
        policy: Gives the policy without wrappers. Asked each time: they are put on, and parts replaced, after this.
        head: Takes the states.
    """

    def __init__(self, policy: Callable[[], Any], head: nn.Module) -> None:
        self._policy, self._head = policy, head
        self._states: Tensor | None = None
        self._rollout_forwards: deque[_Forward] = deque(maxlen=_FORWARDS_OF_A_ROLLOUT)

    @property
    def policy(self) -> Any:
        """The policy, without wrappers."""
        return self._policy()

    @contextmanager
    def _reading(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        handle = backbone(self._policy()).register_forward_hook(lambda module, args, output: keep(output[0]))
        try:
            yield
        finally:
            handle.remove()

    def read(self, log_probs: Callable[[], Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
        """Compute log-probabilities as TRL does, and keep the states, or without gradients the values, beside them.

        Args:
            log_probs: Computes them, in one forward or in several.
            join: Makes one tensor (B, P + T, ...) of what the forwards gave.
        """
        return (self._read_states if torch.is_grad_enabled() else self._read_values)(log_probs, join)

    def _read_states(self, log_probs: Callable[[], Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
        states: list[Tensor] = []
        with self._reading(states.append):
            result = log_probs()
        self._states = join(states) if states else None
        return result

    def _read_values(self, log_probs: Callable[[], Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
        """The values of each forward are kept, and not its states, which are wide."""
        values: list[Tensor] = []
        with self._reading(lambda states: values.append(self._head(states))):
            result = log_probs()
        if values:  # a reference that is a model of its own has none
            self._rollout_forwards.append(_Forward(logprobs=result[0], values=join(values)))
        return result

    def values_beside(self, logprobs: Tensor | None) -> Tensor | None:
        """Values at all positions (B, P + T) from the forward that gave these very log-probabilities, if one was read.

        Asking for them forgets everything that was read without gradients.
        """
        found = next((forward.values for forward in self._rollout_forwards if forward.logprobs is logprobs), None)
        self._rollout_forwards.clear()
        return found

    def values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values at all positions (B, P + T) from a forward of the backbone alone."""
        states = backbone(self._policy())(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        return self._head(states)

    def take_states(self) -> Tensor:
        """The states (B, P + T, H) of the last forward with gradients, once.

        Raises:
            RuntimeError: If there was none: TRL computes log-probabilities in another way than it used to.
        """
        if self._states is None:
            raise RuntimeError(
                "The loss was computed without a forward of the policy's backbone, so `value_model='shared'` has no "
                "states to read. Use `value_model=None`, or the TRL versions that fractal_rm is tested with."
            )
        states, self._states = self._states, None
        return states
