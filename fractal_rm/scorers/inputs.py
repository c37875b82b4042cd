"""Text -> the tensors of a scorer: token ids that know which step each token belongs to, or embeddings.

The response is tokenized in pieces that are cut where steps end, the same way in training and in scoring. So no token
straddles the end of a step, a step's score never sees what follows it (causal models), and scoring a whole response
gives each step the score it would have had as the end of a shorter one, for every tokenizer. Nothing is inserted.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.prompts import Prompt, RenderedPrompt, is_chat
from fractal_rm.scorers.embedding import EmbeddingInputs
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

# What turns text into a scorer's input: its tokenizer, or its frozen encoder.
Processor = PreTrainedTokenizerBase | SentenceEncoder


class BagInputs(Protocol):
    """Encodes bags once, and pads some of them to a batch."""

    def encode(self, bags: Sequence[Bag]) -> list[Any]:
        """One encoded bag for each bag, with `length`, `num_steps` and `kept_steps`."""
        ...

    def pad(self, bags: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors for the scorer, `mask` (B, S) among them."""
        ...


def make_inputs(processor: Processor, settings: FractalSettings) -> BagInputs:
    """The inputs of the scorer that a tokenizer or an encoder belongs to."""
    from fractal_rm.scorers.published import PublishedInputs, PublishedSettings  # which build on this module

    if isinstance(processor, SentenceEncoder):
        return EmbeddingInputs(processor)
    return (PublishedInputs if isinstance(settings, PublishedSettings) else TokenInputs)(processor, settings)


@dataclass(frozen=True)
class EncodedBag:
    """Token ids of one prompt and response.

    Args:
        input_ids: Prompt and response tokens, special tokens included.
        step_ids: For each token the index of the step it belongs to, -1 for none (prompt, gaps, special tokens).
        step_ends: For each kept step the position of its last token.
        num_steps: Steps of the response before truncation.
    """

    input_ids: list[int]
    step_ids: list[int]
    step_ends: list[int]
    num_steps: int

    @property
    def kept_steps(self) -> int:
        """Whole steps that fit into `max_length`."""
        return len(self.step_ends)

    @property
    def length(self) -> int:
        """What makes a forward long."""
        return len(self.input_ids)


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> str:
    """The text that precedes the response: the template filled in, or the chat template of the tokenizer.

    A chat that ends with a message of the assistant is one whose last message the response goes on with.

    Args:
        prompt: Text or chat.
        tokenizer: The reward model's tokenizer.
        prompt_template: Text in which `{prompt}` stands for a prompt that is text.

    Raises:
        ValueError: If the prompt is a chat and the tokenizer has no chat template, or one that refuses it.
    """
    if isinstance(prompt, RenderedPrompt):
        return str(prompt)
    if not is_chat(prompt):
        return prompt_template.replace("{prompt}", prompt)
    if not tokenizer.chat_template:
        raise ValueError(
            f"The prompts are chats, but the tokenizer {tokenizer.name_or_path} has no chat template. Set "
            "`tokenizer.chat_template`, use a chat model's tokenizer, or give the prompts as text."
        )
    begun = prompt[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except TemplateError as error:  # some templates refuse a system message, or two messages of one role in a row
        raise ValueError(
            f"The chat template refuses this chat ({str(error).rstrip('.')}). Change its messages."
        ) from error
    return str(text)


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special token ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


# The token ids of a text, and the characters `start, end` of each; None from a tokenizer that does not tell.
_Piece = tuple[list[int], list[Span] | None]
# Rows whose tokens and offsets are held at a time: those of a whole data set would take more room than a small model.
_ROWS_AT_ONCE = 512
# Texts after which a tokenizer is likely to begin a new token, whatever follows.
_ANCHORS = ("\n", "a", ".")


def _tokenize(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Token ids and offsets of texts, without special tokens."""
    if not pieces:
        return []
    fast = bool(tokenizer.is_fast)
    tokens = tokenizer(list(pieces), add_special_tokens=False, return_offsets_mapping=fast)
    offsets = tokens["offset_mapping"] if fast else [None] * len(pieces)
    return list(zip(tokens["input_ids"], offsets, strict=True))


def spaces_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a space before every text, as those of Llama 2 and of its time do."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    return any(token.startswith(("\u2581", "\u0120")) for token in first)


def _tokenize_continuations(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Tokens of texts that continue another text.

    Tokenizers that put a space before every text would put one before every step here. They are shown a text to
    continue, whose tokens are taken away again.
    """
    found = dict(enumerate(_tokenize(pieces, tokenizer)))
    if not tokenizer.is_fast or not spaces_texts(tokenizer):
        return list(found.values())
    left = list(found)
    for anchor in _ANCHORS:
        merged = []  # those whose start makes one token with the anchor's end
        for i, (ids, offsets) in zip(left, _tokenize([anchor + pieces[i] for i in left], tokenizer), strict=True):
            cut = sum(end <= len(anchor) for _, end in offsets or [])
            if cut < len(ids) and offsets and offsets[cut][0] >= len(anchor):
                rest = [(start - len(anchor), end - len(anchor)) for start, end in offsets[cut:]]
                found[i] = ids[cut:], rest
            else:
                merged.append(i)
        left = merged
    return list(found.values())


@dataclass(frozen=True)
class TokenInputs:
    """How text becomes what a likelihood or token scorer reads."""

    tokenizer: PreTrainedTokenizerBase
    settings: FractalSettings

    def encode(self, bags: Sequence[Bag]) -> list[EncodedBag]:
        """Tokenize prompts with responses, keeping track of steps.

        A step's tokens are those that hold one of its characters; the gap before it (a newline, a separator) belongs to
        no step. Text after the last step is only white space or a separator and is left out. Tokenizers without offsets
        (those in plain Python) do not tell gaps from steps: there the gap before a step counts as its part.

        Returns:
            One [`EncodedBag`] for each bag; `step_ends` is empty where not even the first step fits.
        """
        starts = range(0, len(bags), _ROWS_AT_ONCE)
        return [bag for start in starts for bag in self._encode_some(bags[start : start + _ROWS_AT_ONCE])]

    def _encode_some(self, bags: Sequence[Bag]) -> list[EncodedBag]:
        tokenizer, settings = self.tokenizer, self.settings
        texts = [prompt_text(bag.prompt, tokenizer, settings.prompt_template) for bag in bags]
        # A step is tokenized from the end of the one before: its gap, then the step.
        previous = [[0, *(end for _, end in bag.step_spans)] for bag in bags]
        pieces = [
            bag.response[start:end]
            for bag, starts in zip(bags, previous, strict=True)
            for start, (_, end) in zip(starts, bag.step_spans, strict=False)
        ]
        tokenized = iter(_tokenize_continuations(pieces, tokenizer))
        prefix, suffix = special_affixes(tokenizer)
        different = list(dict.fromkeys(texts))  # several responses to a prompt are the rule
        prompt_ids = dict(zip(different, tokenizer(different, add_special_tokens=False)["input_ids"], strict=True))
        encoded = []
        for bag, text, starts in zip(bags, texts, previous, strict=True):
            # A chat template writes its special tokens itself.
            from_chat = bool(settings.chat) if isinstance(bag.prompt, RenderedPrompt) else is_chat(bag.prompt)
            before, after = ([], []) if from_chat else (prefix, suffix)
            gaps = [start - end for (start, _), end in zip(bag.step_spans, starts, strict=False)]
            parts = [next(tokenized) for _ in gaps]
            room = None if settings.max_length is None else settings.max_length - len(after)
            encoded.append(_join([*before, *prompt_ids[text]], parts, gaps, after, room))
        return encoded

    def pad(self, bags: Sequence[EncodedBag]) -> dict[str, Tensor]:
        """Right-padded tensors for a scorer, of encoded bags with at least one step each.

        Returns:
            `input_ids` and `attention_mask` (B, T), `step_ids` (B, T) with -1 outside steps, `step_ends` (B, S) with 0
            at padding, `mask` (B, S), True where a step is real.
        """
        tokens, steps = _real([bag.length for bag in bags]), _real([bag.kept_steps for bag in bags])
        padding: Any = self.tokenizer.pad_token_id
        return {
            "input_ids": _padded((bag.input_ids for bag in bags), tokens, int(padding)),
            "attention_mask": tokens.long(),
            "step_ids": _padded((bag.step_ids for bag in bags), tokens, -1),
            "step_ends": _padded((bag.step_ends for bag in bags), steps, 0),
            "mask": steps,
        }


def _join(start: list[int], parts: list[_Piece], gaps: list[int], after: list[int], room: int | None) -> EncodedBag:
    """Put the steps behind the start as long as there is room for whole ones."""
    ids, step_ids, step_ends = list(start), [-1] * len(start), []
    for index, ((piece, offsets), gap) in enumerate(zip(parts, gaps, strict=True)):
        if room is not None and len(ids) + len(piece) > room:
            break
        ids.extend(piece)
        step_ids.extend([index if offsets is None or offsets[i][1] > gap else -1 for i in range(len(piece))])
        step_ends.append(max(len(ids) - 1, 0))
    return EncodedBag([*ids, *after], step_ids + [-1] * len(after), step_ends, len(parts))


def _padded(rows: Iterable[list[int]], real: Tensor, padding: int) -> Tensor:
    """Rows where `real` is True, and padding elsewhere."""
    filled = torch.full(real.shape, padding)
    filled[real] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.long)
    return filled


def _real(lengths: list[int]) -> Tensor:
    """True where a row of that length has something, (rows, longest)."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
