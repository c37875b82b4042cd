"""Prompt, response and step spans -> token ids that know which step each token belongs to.

The response is tokenized in pieces that are cut where steps end, the same way in training and in scoring. So no token
straddles the end of a step, a step's score never sees what follows it (causal models), and scoring a whole response
gives each step the score it would have had as the end of a shorter one, for every tokenizer. Nothing is inserted.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.data.prompts import Prompt, RenderedPrompt, is_chat
from fractal_rm.data.segmentation import Span
from fractal_rm.scorers.settings import FractalSettings


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


def _tokenize_continuations(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Tokens of texts that continue another text.

    Some tokenizers (those of Llama 2 and of its time) put a space before every text, which would stand before every
    step here. They are shown a text to continue, whose tokens are taken away again.
    """
    found = dict(enumerate(_tokenize(pieces, tokenizer)))
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    if not tokenizer.is_fast or not any(token.startswith(("\u2581", "\u0120")) for token in first):
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


def encode(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    spans: Sequence[Sequence[Span]],
    tokenizer: PreTrainedTokenizerBase,
    settings: FractalSettings,
) -> list[EncodedBag]:
    """Tokenize prompts with responses, keeping track of steps.

    A step's tokens are those that hold one of its characters; the gap before it (a newline, a separator) belongs to no
    step. Text after the last step is only white space or a separator and is left out. Tokenizers without offsets (those
    in plain Python) do not tell gaps from steps: there the gap before a step counts as its part.

    Args:
        prompts: Texts or chats.
        responses: Texts, as written.
        spans: Character spans of the steps of each response.
        tokenizer: The reward model's tokenizer.
        settings: Gives prompt template and `max_length`.

    Returns:
        One [`EncodedBag`] for each row; `step_ends` is empty where not even the first step fits.
    """
    encoded: list[EncodedBag] = []
    for start in range(0, len(prompts), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        encoded += _encode_some(prompts[some], responses[some], spans[some], tokenizer, settings)
    return encoded


def _encode_some(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    spans: Sequence[Sequence[Span]],
    tokenizer: PreTrainedTokenizerBase,
    settings: FractalSettings,
) -> list[EncodedBag]:
    texts = [prompt_text(prompt, tokenizer, settings.prompt_template) for prompt in prompts]
    # From the end of the step before to the end of the step.
    pieces = [
        response[start:end]
        for response, steps in zip(responses, spans, strict=True)
        for start, (_, end) in zip([0, *(end for _, end in steps)], steps, strict=False)
    ]
    tokenized = iter(_tokenize_continuations(pieces, tokenizer))
    prefix, suffix = special_affixes(tokenizer)
    different = list(dict.fromkeys(texts))  # several responses to a prompt are the rule
    prompt_ids = dict(zip(different, tokenizer(different, add_special_tokens=False)["input_ids"], strict=True))
    encoded = []
    for prompt, text, steps in zip(prompts, texts, spans, strict=True):
        # A chat template writes its special tokens itself.
        from_chat = bool(settings.chat) if isinstance(prompt, RenderedPrompt) else is_chat(prompt)
        before, after = ([], []) if from_chat else (prefix, suffix)
        gaps = [start - end for (start, _), end in zip(steps, [0, *(end for _, end in steps)], strict=False)]
        parts = [next(tokenized) for _ in steps]
        room = None if settings.max_length is None else settings.max_length - len(after)
        encoded.append(_join([*before, *prompt_ids[text]], parts, gaps, after, room))
    return encoded


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


def pad_encoded(bags: Sequence[EncodedBag], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded tensors for a scorer.

    Args:
        bags: Encoded bags, each with at least one step.
        pad_token_id: What stands at padding; the attention mask hides it.

    Returns:
        `input_ids` and `attention_mask` (B, T), `step_ids` (B, T) with -1 outside steps, `step_ends` (B, S) with 0 at
        padding, `mask` (B, S), True where a step is real.
    """
    tokens = _real([len(bag.input_ids) for bag in bags])
    steps = _real([bag.kept_steps for bag in bags])

    def padded(rows: Iterable[list[int]], real: Tensor, padding: int) -> Tensor:
        filled = torch.full(real.shape, padding)
        filled[real] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.long)
        return filled

    return {
        "input_ids": padded((bag.input_ids for bag in bags), tokens, pad_token_id),
        "attention_mask": tokens.long(),
        "step_ids": padded((bag.step_ids for bag in bags), tokens, -1),
        "step_ends": padded((bag.step_ends for bag in bags), steps, 0),
        "mask": steps,
    }


def _real(lengths: list[int]) -> Tensor:
    """True where a row of that length has something, (rows, longest)."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
