"""The token scorer: a head read where steps end, the usual design of a process reward model."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput

from fractal_rm.scorers.base import StepScorer

# Name of the linear layer in classes made by `head_class`.
_SCORE = "score"


def at_steps(values: Tensor, step_ends: Tensor) -> Tensor:
    """Select the values (B, T, N) at positions (B, S): (B, S, N)."""
    return torch.gather(values, 1, step_ends.unsqueeze(-1).expand(-1, -1, values.size(-1)))


class TokenScorer(StepScorer):
    """Step logit = the token classification head's output at the token with the step's last character.

    Works on any backbone that [`token_classifier`] knows, decoders and encoders alike. An encoder sees the whole
    response when it scores a step.

    Args:
        model: A token classification model with one label, or one for each grade; or a PEFT model around one.
        num_grades: How many grades a step can have; None: a step is good or not.

    Raises:
        ValueError: If the model is not a token classification model with that many labels.
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
        # Decoders would keep a KV cache of the whole batch for nothing; encoders have no cache.
        has_cache = "use_cache" in inspect.signature(self.base.forward).parameters
        self._options = {"use_cache": False} if has_cache else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, step_ids: Tensor, step_ends: Tensor, mask: Tensor
    ) -> Tensor:
        """Step logits (B, S), or (B, S, G) for grades, in float32, from `scorers.inputs.TokenInputs.pad`."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options).logits
        found = at_steps(logits, step_ends).float()
        return found.squeeze(-1) if found.size(-1) == 1 else found


def token_classifier(config: Any) -> type[PreTrainedModel]:
    """The token classification class for a configuration or a model: transformers' own, or one made here.

    Transformers has none for several causal families (Gemma 3, Granite, OLMo 2, ...). The class made here is the
    backbone of `AutoModel` with a linear layer `score`; its folders have the usual weight names.

    Raises:
        ValueError: If transformers has neither a token classification nor a causal language model for it.
    """
    known: Any = AutoModelForTokenClassification._model_mapping
    if type(config) in known:
        return known[type(config)]
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"transformers has no token classification model and no causal language model for a {type(config).__name__}"
        )
    return head_class(type(config), _SCORE, _linear_head)


def _linear_head(config: Any) -> nn.Module:
    return nn.Linear(config.get_text_config().hidden_size, config.num_labels)


@functools.cache
def head_class(kind: type[Any], name: str, make_head: Callable[[Any], nn.Module]) -> type[PreTrainedModel]:
    """Make a model class: a backbone, and a head that reads its last hidden states.

    Args:
        kind: Class of the configuration.
        name: Name of the head in the weights.
        make_head: Makes the head from a configuration.

    Returns:
        The class; its models load and save like any model of transformers.
    """
    backbones: Any = AutoModel._model_mapping
    backbone = backbones[kind]
    # Multimodal models have two classes in transformers (vision and text); the parent creates and loads weights.
    parent = next(found for found in backbone.__mro__[1:] if issubclass(found, PreTrainedModel))

    class Model(parent):  # type: ignore[misc, valid-type]
        config_class = kind
        _tied_weights_keys: Any = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.num_labels = config.num_labels
            setattr(self, self.base_model_prefix, AutoModel.from_config(config))
            setattr(self, name, make_head(config))
            self.post_init()

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            use_cache: bool | None = None,
        ) -> TokenClassifierOutput:
            texts = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
            known = {key: value for key, value in texts.items() if value is not None}
            states = self.base_model(attention_mask=attention_mask, **known)[0]
            return TokenClassifierOutput(logits=getattr(self, name)(states))

    Model.__name__ = Model.__qualname__ = f"{backbone.__name__.removesuffix('Model')}ForTokenClassification"
    return Model
