"""A head read where steps end: the usual shape of a process reward model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class TokenScorer(nn.Module):
    """Step logit = the token classification head's output at the token that holds the step's last character.

    Works on any backbone that `AutoModelForTokenClassification` knows, decoders and encoders alike. An encoder sees
    the whole response when it scores a step.

    Args:
        model: A token classification model with one label, or a PEFT model around one.
    """

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without a PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore[union-attr, return-value, operator]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S) in float32 from tensors of [`~fractal_rm.scorers.encoding.pad_encoded`]."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[..., 0]
        return torch.gather(logits, 1, step_ends).float()
