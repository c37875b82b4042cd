"""Text -> the tensors of a scorer, by what the scorer reads: token ids, or embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.data.prompts import Prompt
from fractal_rm.data.segmentation import Span
from fractal_rm.scorers.embedding import EmbeddingInputs
from fractal_rm.scorers.encoding import EncodedBag, encode, pad_encoded
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

# What turns text into a scorer's input: its tokenizer, or its frozen encoder.
Processor = PreTrainedTokenizerBase | SentenceEncoder


class BagInputs(Protocol):
    """Encodes responses once, and pads some of them to a batch."""

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Any]:
        """One encoded bag for each response, with `length`, `num_steps` and `kept_steps`."""
        ...

    def pad(self, bags: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors for the scorer, `mask` (B, S) among them."""
        ...


@dataclass(frozen=True)
class TokenInputs:
    """How text becomes what a likelihood or token scorer reads.

    Args:
        tokenizer: The reward model's tokenizer.
        settings: Gives prompt template and `max_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: FractalSettings

    def encode(
        self, prompts: Sequence[Prompt], responses: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[EncodedBag]:
        """See [`~fractal_rm.scorers.encoding.encode`]."""
        return encode(prompts, responses, spans, self.tokenizer, self.settings)

    def pad(self, bags: Sequence[EncodedBag]) -> dict[str, Tensor]:
        """See [`~fractal_rm.scorers.encoding.pad_encoded`]."""
        number: Any = self.tokenizer.pad_token_id
        return pad_encoded(bags, int(number))


def make_inputs(processor: Processor, settings: FractalSettings) -> BagInputs:
    """The inputs of the scorer that a tokenizer or an encoder belongs to."""
    if isinstance(processor, SentenceEncoder):
        return EmbeddingInputs(processor)
    return TokenInputs(processor, settings)
