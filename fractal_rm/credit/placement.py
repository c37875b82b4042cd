"""Step rewards on the policy's own tokens: (B, T) tensors with a reward where each step ends.

Characters join tokenizers. Steps are character spans of the completion text, so a reward model with another tokenizer
can score them; here the token ids that the policy sampled are mapped to the same characters. The ids are decoded, the
text is never encoded again: a policy may spell a word by single letters, which no tokenizer would give back.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# What decoders write for bytes that are not, or not yet, a character.
REPLACEMENT = "\ufffd"
# Tokens that are decoded afresh with each new one, plus as many of context: enough that most windows end between
# characters, few enough that a decode costs microseconds.
WINDOW = 8


@runtime_checkable
class Decoder(Protocol):
    """The part of a `transformers` tokenizer that placement needs."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any: ...


def completion_text(token_ids: Sequence[int], tokenizer: Decoder) -> str:
    """The text that sampled ids stand for, exactly as [`token_end_characters`] counts its characters.

    Segment and score this text, not another decoding of the same ids, or the offsets do not fit.

    Args:
        token_ids: Sampled ids of one completion; EOS and padding may be among them.
        tokenizer: The policy's tokenizer.

    Returns:
        The text without special tokens and without cleaning up of spaces.
    """
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_end_characters(
    token_ids: Sequence[int], tokenizer: Decoder, pieces: dict[int, str] | None = None
) -> list[int]:
    """Number of characters of the completion text that are complete once each token is there.

    A character whose bytes are split over tokens is complete with the last of them. Special tokens add nothing. A token
    ends where decoding up to it (without trailing U+FFFD, which marks an unfinished character) stops agreeing with
    the whole text; ends never decrease, and the last token that is text ends with the text, even inside a character.

    Where the texts of single ids add up to the whole text, their lengths say it all. Otherwise (a character in several
    tokens, a decoder that looks at neighbours) ids are decoded in windows of a few tokens, so the cost still grows
    linearly with length. Where these do not add up either (a decoder that looks back further, invalid bytes), every
    prefix is decoded, in quadratic time.

    Args:
        token_ids: Sampled ids of one completion; EOS and padding may be among them.
        tokenizer: The policy's tokenizer.
        pieces: Texts of single ids; those that are missing are added. Keep one dictionary for all completions of a
            tokenizer and each id is decoded once.

    Returns:
        One number per id, non-decreasing.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.BPE(vocab={"2": 0, "+1": 1, "Ã": 2, "©": 3}, merges=[]))
        >>> backend.decoder = decoders.ByteLevel()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> token_end_characters([0, 1, 2, 3], tokenizer)  # "2+1é": the last two tokens are one letter
        [1, 3, 3, 4]
    """
    token_ids = list(token_ids)
    text = completion_text(token_ids, tokenizer)
    ends = _piece_ends(token_ids, text, tokenizer, {} if pieces is None else pieces)
    if ends is not None:
        return ends
    is_text = _which_are_text(token_ids, text, tokenizer)
    text_ids = [token_id for token_id, keep in zip(token_ids, is_text, strict=True) if keep]

    def decode(start: int, stop: int) -> str:
        return completion_text(text_ids[start:stop], tokenizer)

    complete = _complete_by_windows(len(text_ids), text, decode)
    if complete is None:
        complete = _complete_by_prefixes(len(text_ids), text, decode)
    complete[-1] = len(text)
    return [complete[seen] for seen in accumulate(map(int, is_text))]


def _piece_ends(token_ids: list[int], text: str, tokenizer: Decoder, pieces: dict[int, str]) -> list[int] | None:
    """End characters from the texts of single ids, or None where these do not add up to `text` by whole characters."""
    for token_id in set(token_ids) - pieces.keys():
        pieces[token_id] = completion_text([token_id], tokenizer)
    texts = [pieces[token_id] for token_id in token_ids]
    if REPLACEMENT in text or "".join(texts) != text:
        return None
    return list(accumulate(map(len, texts)))


def _which_are_text(token_ids: list[int], text: str, tokenizer: Decoder) -> list[bool]:
    """False for special tokens; True for all where `text` is another one without them."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    is_text = [token_id not in special for token_id in token_ids]
    without_special = completion_text([token_id for token_id in token_ids if token_id not in special], tokenizer)
    return is_text if without_special == text else [True] * len(token_ids)


def _complete_by_windows(count: int, text: str, decode: Callable[[int, int], str]) -> list[int] | None:
    """Characters that are complete after 0, 1, ... `count` tokens, or None where the windows do not add up to `text`.

    A window is context, tokens whose characters are counted already, and the tokens after it, decoded together: a
    decoder may treat the first token of what it is given in its own way, such as to strip a leading space.
    """
    complete = [0]
    start, context_stop, context, counted = 0, 0, "", 0  # `counted` characters end with the context
    for stop in range(1, count + 1):
        window = decode(start, stop)
        finished = window.rstrip(REPLACEMENT)
        new = finished[len(context) :]
        continues = finished.startswith(context) and text.startswith(new, counted)
        # An unfinished byte token may hide the whole characters before it (byte fallback): a shorter window, no other.
        is_hidden = context.startswith(finished)
        if not (continues or is_hidden):
            return None
        complete.append(max(counted + len(new), complete[-1]))
        # The next context must end between characters, and must not be empty.
        if stop - context_stop >= WINDOW and new and finished == window:
            start, context_stop, counted = context_stop, stop, counted + len(new)
            context = decode(start, stop)
    left = text[complete[-1] :].strip(REPLACEMENT)
    return None if left else complete


def _complete_by_prefixes(count: int, text: str, decode: Callable[[int, int], str]) -> list[int]:
    """Characters that are complete after 0, 1, ... `count` tokens, by decoding every prefix: the definition."""
    complete = [0]
    for stop in range(1, count + 1):
        prefix = decode(0, stop).rstrip(REPLACEMENT)
        shared = len(prefix)
        if not text.startswith(prefix):
            shared = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text))
        complete.append(max(shared, complete[-1]))
    return complete


def step_end_tokens(token_ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """Index of the token that holds the last character of each step.

    Args:
        token_ends: End characters of the tokens, from [`token_end_characters`].
        spans: Start and end character of each step in the same text.

    Returns:
        One index per step; None for a step that ends beyond the tokens or holds no character.

    Example:
        >>> step_end_tokens([1, 4, 4, 9], [(0, 3), (4, 9), (9, 12)])
        [1, 3, None]
    """
    ends: list[int | None] = []
    for start, end in spans:
        index = bisect_left(token_ends, end)
        ends.append(index if index < len(token_ends) and end > start else None)
    return ends


@dataclass(frozen=True)
class Placement:
    """Step rewards on tokens, with the audit of what could not be placed.

    Attributes:
        rewards: Reward of each token; 0 except where a step ends.
        step_ends: Token at which each step's reward lies; None where it was not placed.
        unplaced: Number of steps whose reward was not placed; anything but 0 deserves a look.
    """

    rewards: Float[Tensor, "B T"]
    step_ends: list[list[int | None]]
    unplaced: int


def placeable_ends(
    step_ends: Sequence[Sequence[int | None]],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> list[list[int | None]]:
    """Step ends with None for those that do not lie on a real token.

    Args:
        step_ends: Token at which each step of each row ends, or None.
        completion_mask: True (or 1) where a token is real.

    Returns:
        The same lists; None replaces indices on padding, on masked tokens and outside the tensor.

    Raises:
        ValueError: If there are not as many rows as in the mask, or an index is negative.
    """
    if len(step_ends) != len(completion_mask):
        raise ValueError(
            f"Step ends have {len(step_ends)} rows, the completion mask has {len(completion_mask)}. "
            "Pass one list of step ends per completion, an empty one where there are no steps."
        )
    placeable: list[list[int | None]] = []
    for row, (ends, real) in enumerate(zip(step_ends, completion_mask.bool().tolist(), strict=True)):
        if any(end is not None and end < 0 for end in ends):
            raise ValueError(
                f"A step of row {row} ends at a negative token: {list(ends)}. "
                "Count tokens from the start of the completion, and use None for a step without a token."
            )
        placeable.append([end if end is not None and end < len(real) and real[end] else None for end in ends])
    return placeable


def check_step_rewards(step_rewards: Sequence[Sequence[float]], step_ends: Sequence[Sequence[int | None]]) -> None:
    """Raise a sentence if step rewards do not belong to these step ends, or are no finite numbers.

    Raises:
        ValueError: If a row is missing, has another number of steps, or holds NaN or infinity; it names the row.
    """
    if len(step_rewards) != len(step_ends):
        raise ValueError(
            f"Step rewards have {len(step_rewards)} rows, step ends have {len(step_ends)}. "
            "Pass both for every completion of the batch."
        )
    for row, (values, ends) in enumerate(zip(step_rewards, step_ends, strict=True)):
        if len(values) != len(ends):
            raise ValueError(
                f"Row {row} has {len(values)} step rewards and {len(ends)} step ends. "
                "Score and place the same steps: cut the text once and use its spans for both."
            )
        if not all(math.isfinite(value) for value in values):
            raise ValueError(
                f"Row {row} has a step reward that is not a finite number: {list(values)}. "
                "Leave a step that could not be scored out of both lists."
            )


def place_step_rewards(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int | None]],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Placement:
    """Put the reward of each step on the token that holds the step's last character.

    Rewards of steps that end on the same token add up, so the rewards of a row sum to those of its placed steps.

    Args:
        step_rewards: Reward of each step of each row.
        step_ends: Token at which each step ends, or None, from [`step_end_tokens`].
        completion_mask: True (or 1) where a token is real. Nothing is placed elsewhere.

    Returns:
        Rewards in float32 on the mask's device, with the audit.

    Raises:
        ValueError: If rows or steps do not match, an index is negative, or a reward is not finite.

    Example:
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> place_step_rewards([[0.5, 1.0, 2.0]], [[0, 2, None]], mask)
        Placement(rewards=tensor([[0.5000, 0.0000, 1.0000, 0.0000]]), step_ends=[[0, 2, None]], unplaced=1)
    """
    check_step_rewards(step_rewards, step_ends)
    placed = placeable_ends(step_ends, completion_mask)
    steps = [
        (row, end, reward)
        for row, (row_rewards, ends) in enumerate(zip(step_rewards, placed, strict=True))
        for reward, end in zip(row_rewards, ends, strict=True)
        if end is not None
    ]
    rewards = torch.zeros(completion_mask.shape, dtype=torch.float32)
    if steps:
        rows, ends, values = zip(*steps, strict=True)
        where = (torch.tensor(rows), torch.tensor(ends))
        rewards.index_put_(where, torch.tensor(values, dtype=torch.float32), accumulate=True)
    unplaced = sum(end is None for ends in placed for end in ends)
    return Placement(rewards=rewards.to(completion_mask.device), step_ends=placed, unplaced=unplaced)


def place_outcome(
    rewards: Float[Tensor, " B"],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Put one reward per completion on its last real token.

    Args:
        rewards: Reward of each completion.
        completion_mask: True (or 1) where a token is real.

    Returns:
        Rewards of each token, all 0 for a completion without a real token.

    Example:
        >>> mask = torch.tensor([[True, True, False], [False, False, False]])
        >>> place_outcome(torch.tensor([1.0, 1.0]), mask)
        tensor([[0., 1., 0.],
                [0., 0., 0.]])
    """
    mask = completion_mask.bool()
    # A real token is the last if no real token comes after it.
    after = mask.int().flip(1).cumsum(1).flip(1) - mask.int()
    return rewards.unsqueeze(1).expand(mask.shape).masked_fill(~mask | (after > 0), 0.0)
