"""A head read where steps end: the usual shape of a process reward model."""

import inspect

import torch
from torch import Tensor, nn

from fractal_rm.scorers.step_scorer import StepScorer


class TokenScorer(StepScorer):
    """Step logit = the token classification head's output at the token that holds the step's last character.

    Works on any backbone that `AutoModelForTokenClassification` knows, decoders and encoders alike. An encoder sees
    the whole response when it scores a step.

    Args:
        model: A token classification model with one label, or a PEFT model around one.

    Raises:
        ValueError: If the model is another one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        labels = self.base.config.num_labels
        if labels != 1 or self.base.get_output_embeddings() is not None:
            raise ValueError(
                f"The token scorer got a {type(self.base).__name__} with {labels} labels. Load the model with "
                "`AutoModelForTokenClassification.from_pretrained(..., num_labels=1)`."
            )
        # Decoders would keep keys and values of the whole batch for tokens that never come; encoders have no cache.
        has_cache = "use_cache" in inspect.signature(self.base.forward).parameters
        self._options = {"use_cache": False} if has_cache else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S) in float32 from tensors of [`~fractal_rm.scorers.encoding.pad_encoded`]."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options).logits[..., 0]
        return torch.gather(logits, 1, step_ends).float()
