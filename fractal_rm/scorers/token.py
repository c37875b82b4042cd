"""A head read where steps end: the usual shape of a process reward model."""

import inspect

import torch
from torch import Tensor, nn

from fractal_rm.scorers.base import StepScorer


class TokenScorer(StepScorer):
    """Step logit = the token classification head's output at the token that holds the step's last character.

    Works on any backbone that `AutoModelForTokenClassification` knows, decoders and encoders alike. An encoder sees
    the whole response when it scores a step.

    Args:
        model: A token classification model with one label, or one for each grade; or a PEFT model around one.
        num_grades: How many grades a step can have; None: a step is good or not.

    Raises:
        ValueError: If the model is another one.
    """

    def __init__(self, model: nn.Module, *, num_grades: int | None = None) -> None:
        super().__init__(model)
        labels = self.base.config.num_labels
        wanted = num_grades or 1
        if labels != wanted or self.base.get_output_embeddings() is not None:
            raise ValueError(
                f"The token scorer got a {type(self.base).__name__} with {labels} labels. Load the model with "
                f"`AutoModelForTokenClassification.from_pretrained(..., num_labels={wanted})`."
            )
        # Decoders would keep keys and values of the whole batch for tokens that never come; encoders have no cache.
        has_cache = "use_cache" in inspect.signature(self.base.forward).parameters
        self._options = {"use_cache": False} if has_cache else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S) in float32, or (B, S, G) for grades.

        The tensors are those of [`~fractal_rm.scorers.inputs.TokenInputs.pad`].
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options).logits
        found = torch.gather(logits, 1, step_ends.unsqueeze(-1).expand(-1, -1, logits.size(-1))).float()
        return found.squeeze(-1) if found.size(-1) == 1 else found
