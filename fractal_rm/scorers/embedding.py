"""A frozen sentence encoder with a small head: the paper's `mlp`, the comparing `pair`, or `set`, whose steps see each
other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.prompts import Conversation, Prompt, is_chat
from fractal_rm.data.sentences import sentences
from fractal_rm.scorers.base import StepScorer
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

# Characters of a prompt part that is embedded at once: about the maximum length of common encoders.
SPLIT_CHARACTERS = 800
# Width of a step inside the `set` head, and its number of attention heads.
_WIDTH, _VIEWS, _LAYERS = 64, 4, 2
_DROPOUT = 0.1


@dataclass(frozen=True)
class EmbeddedBag:
    """Embeddings of one response.

    Args:
        steps: Embeddings of the steps (S, D).
        contexts: For each step the closest part of the prompt or of earlier messages (S, D).
    """

    steps: Tensor
    contexts: Tensor

    @property
    def num_steps(self) -> int:
        """Number of steps. Each is embedded separately, so all fit, and their number determines the cost of a forward
        pass."""
        return len(self.steps)

    kept_steps = length = num_steps


def prompt_splits(prompt: Prompt) -> list[str]:
    """Split a prompt into parts of whole sentences, each short enough to be embedded at once.

    Args:
        prompt: Text, or a chat, whose messages are joined by line breaks.

    Example:
        >>> prompt_splits("2+3*4?")
        ['2+3*4?']
    """
    text = "\n".join(message["content"] for message in prompt) if is_chat(prompt) else prompt
    if len(text) <= SPLIT_CHARACTERS:
        return [text]
    parts: list[Span] = []
    for start, end in sentences(text):
        if parts and end - parts[-1][0] <= SPLIT_CHARACTERS:
            parts[-1] = parts[-1][0], end
        else:
            parts.append((start, end))
    return [text[start:end] for start, end in parts] or [text]


@dataclass(frozen=True)
class EmbeddingInputs:
    """Converts text to the input of an [`EmbeddingScorer`]."""

    encoder: SentenceEncoder

    def encode(self, bags: Sequence[Bag]) -> list[EmbeddedBag]:
        """Embed the steps of bags, each with the closest part of its prompt."""
        found = [_contexts(bag) for bag in bags]
        splits, steps = [[text for text, _ in parts] for parts in found], [bag.steps for bag in bags]
        places = [torch.tensor([place for _, place in parts]) for parts in found]
        starts = [torch.tensor([start for start, _ in bag.step_spans]) for bag in bags]
        later = [place > start.unsqueeze(1) for place, start in zip(places, starts, strict=True)]
        texts = [text for part in (*splits, *steps) for text in part]
        # Not all encoders give vectors of length 1, but the head and its learning rate need a common scale.
        embeddings = nn.functional.normalize(self.encoder.embed(texts, progress=True), dim=1)
        rows = iter(embeddings.split([len(part) for part in (*splits, *steps)]))
        contexts = [next(rows) for _ in splits]
        return [EmbeddedBag(step, closest(step, *seen)) for step, *seen in zip(rows, contexts, later, strict=True)]

    def pad(self, bags: Sequence[EmbeddedBag]) -> dict[str, Tensor]:
        """Right-padded tensors: `steps` and `contexts` (B, S, D), `mask` (B, S), True where a step is real."""
        pad = nn.utils.rnn.pad_sequence
        real = [torch.ones(bag.num_steps, dtype=torch.bool) for bag in bags]
        return {
            "steps": pad([bag.steps for bag in bags], batch_first=True),
            "contexts": pad([bag.contexts for bag in bags], batch_first=True),
            "mask": pad(real, batch_first=True),
        }


def _contexts(bag: Bag) -> list[tuple[str, int]]:
    """Texts that steps may refer to, each with the character of the response where it ends; 0 for parts of the
    prompt."""
    parts, end = [(text, 0) for text in prompt_splits(bag.prompt)], 0
    if isinstance(bag.response, Conversation):
        for start, stop in bag.response.turns:
            said = bag.response[end:start]
            parts += [(text, start) for text in prompt_splits(said) if said.strip()]
            end = stop
    return parts


def closest(steps: Tensor, contexts: Tensor, later: Tensor) -> Tensor:
    """For each step (S, D) the context (C, D) with the largest cosine, excluding later contexts (S, C): (S, D)."""
    if len(contexts) == 1:
        return contexts.expand_as(steps)
    cosines = nn.functional.normalize(steps, dim=1) @ nn.functional.normalize(contexts, dim=1).T
    return contexts[cosines.masked_fill(later.to(cosines.device), -torch.inf).argmax(dim=1)]


class MLPHead(nn.Sequential):
    """The paper's head: context and step concatenated, two hidden layers; a step never sees the others.

    Source:
        The released code of FRACTAL (Makhija et al., ACL 2025): widths D/2 and D/4 with GELU.
    """

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(2 * size, size // 2),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(size // 2, size // 4),
            nn.GELU(),
            nn.Linear(size // 4, outputs),
        )

    def forward(self, steps: Tensor, contexts: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, S, outputs) from embeddings (B, S, D)."""
        return super().forward(torch.cat([contexts, steps], dim=-1))


def comparison(steps: Tensor, contexts: Tensor) -> Tensor:
    """Both embeddings, their product, the size of their difference, their cosine: (B, S, 4 D + 1).

    Source:
        Features of Conneau et al., "Supervised Learning of Universal Sentence Representations", 2017. With the product
        and the cosine, "the step is about the prompt" is a linear function, so few labels suffice.
    """
    cosine = (nn.functional.normalize(steps, dim=-1) * nn.functional.normalize(contexts, dim=-1)).sum(-1, keepdim=True)
    # Embedding entries are around 1, so the cosine is scaled by sqrt(D) to weigh as much.
    return torch.cat([contexts, steps, contexts * steps, (contexts - steps).abs(), cosine * steps.size(-1) ** 0.5], -1)


class PairHead(nn.Sequential):
    """Compares context and step, with one hidden layer; a step never sees the others."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(4 * size + 1, 2 * _WIDTH), nn.GELU(), nn.Dropout(2 * _DROPOUT), nn.Linear(2 * _WIDTH, outputs)
        )

    def forward(self, steps: Tensor, contexts: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, S, outputs) from embeddings (B, S, D)."""
        return super().forward(comparison(steps, contexts))


class SetHead(nn.Module):
    """A small transformer over the steps of a response: each step is judged together with the others.

    It has no positions: permuting the steps permutes the scores, so position alone cannot be learned.
    """

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        # Dropout only here: inside the layers it would cost more time than the layers themselves.
        self.project = nn.Sequential(nn.Linear(4 * size + 1, _WIDTH), nn.Dropout(_DROPOUT))
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _VIEWS, dim_feedforward=2 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(_WIDTH)
        self.output = nn.Linear(_WIDTH, outputs)

    def forward(self, steps: Tensor, contexts: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, S, outputs) from embeddings (B, S, D)."""
        hidden = self.layers(self.project(comparison(steps, contexts)), src_key_padding_mask=~mask)
        return self.output(self.norm(hidden))


HEADS = {"pair": PairHead, "mlp": MLPHead, "set": SetHead}


class EmbeddingScorer(StepScorer):
    """Step logits from frozen embeddings of steps and prompt; only the head, one of [`HEADS`], is trained."""

    inputs = ("steps", "contexts", "mask")

    def __init__(self, model: nn.Module, *, size: int) -> None:
        super().__init__(model)
        self.size = size

    def forward(self, steps: Tensor, contexts: Tensor, mask: Tensor) -> Tensor:
        """Step logits (B, S), or (B, S, G) for grades, in float32 from tensors of [`EmbeddingInputs.pad`]."""
        # Embeddings have length 1, but layers need entries around 1.
        scale = self.size**0.5
        logits = self.model(steps * scale, contexts * scale, mask).float()
        return logits.squeeze(-1) if logits.size(-1) == 1 else logits


def make_head(kind: str, size: int, outputs: int = 1) -> EmbeddingScorer:
    """A scorer with a fresh head from [`HEADS`] for embeddings of a given size; one output per grade, or 1."""
    return EmbeddingScorer(HEADS[kind](size, outputs), size=size)
