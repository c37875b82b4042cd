"""Base class of scorers: a transformers model that gives each step of a response a logit."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel


class StepScorer(nn.Module):
    """Step logits (B, S) from one forward pass over prompts and responses.

    Args:
        model: A transformers model, a PEFT model around one, or the head of an embedding scorer.
    """

    model: Any  # typed by the subclasses
    # Names of the batch tensors that `forward` takes.
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "step_ids", "step_ends", "mask")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without a PEFT wrapper (whose layers stay in it)."""
        return self.model.get_base_model() if self.is_adapted else self.model

    @property
    def is_adapted(self) -> bool:
        """Whether the model is a PEFT model."""
        return hasattr(self.model, "peft_config")

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Step logits (B, S) in float32 from the tensors that `inputs` names."""
        raise TypeError(f"{type(self).__name__} cannot score. Use one of its subclasses.")

    # `transformers.Trainer` calls these with `gradient_checkpointing=True`; which one depends on its version.

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """As in `transformers.PreTrainedModel`."""
        self.base.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As in `transformers.PreTrainedModel`."""
        self.base.activation_checkpointing_enable(**kwargs)
