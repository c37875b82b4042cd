"""Step rewards on the policy's own tokens: (B, T) tensors with a reward where each step ends.

Characters connect the tokenizers. Steps are character spans of the completion text, so a reward model with another
tokenizer can score them; here the sampled token ids are mapped to the same characters. The ids are decoded, and the
text is never encoded again: a policy may spell a word letter by letter, which no tokenizer would reproduce.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# What decoders write for invalid or incomplete UTF-8 bytes.
REPLACEMENT = "\ufffd"
# Tokens per decoding window, with as many of context: enough that most windows end between characters, few enough that
# decoding costs microseconds.
WINDOW = 8
# Tokens within which a character must end: valid characters take at most four, after a full window.
_STALLED = 4 * WINDOW
# A byte's token name in tokenizers with byte fallback.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@runtime_checkable
class Decoder(Protocol):
    """The part of a `transformers` tokenizer that placement needs."""

    if TYPE_CHECKING:  # `isinstance` does not see what `__getattr__` of a tokenizer finds since Python 3.12

        @property
        def eos_token_id(self) -> int | None: ...

        @property
        def pad_token_id(self) -> int | None: ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any: ...


def _decode(token_ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _which_are_text(token_ids: Sequence[int], tokenizer: Decoder, endings: Collection[int] | None) -> list[bool]:
    """False for the ending (possibly several tokens) and for padding, True for text."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = {eos, pad} if endings is None else set(endings)
    stop = len(token_ids)
    while stop and token_ids[stop - 1] in ends:
        stop -= 1
    return [at < stop and (token != pad or pad == eos) for at, token in enumerate(token_ids)]


def completion_text(token_ids: Sequence[int], tokenizer: Decoder, endings: Collection[int] | None = None) -> str:
    """The text of sampled ids, exactly as [`token_end_characters`] counts its characters.

    Segment and score this text, not another decoding of the same ids, or the offsets will not match.

    Args:
        token_ids: Sampled ids of one completion; EOS and padding may be among them.
        tokenizer: The policy's tokenizer.
        endings: Ids that a finished completion may end with; None: the tokenizer's EOS and padding.

    Returns:
        The text as the policy wrote it, including special tokens, without padding and ending, and without clean-up of
        spaces.
    """
    is_text = _which_are_text(token_ids, tokenizer, endings)
    return _decode([token for token, keep in zip(token_ids, is_text, strict=True) if keep], tokenizer)


def token_end_characters(
    token_ids: Sequence[int],
    tokenizer: Decoder,
    pieces: dict[int, str] | None = None,
    endings: Collection[int] | None = None,
) -> list[int]:
    """For each token, the number of characters of the completion text that are complete with it.

    A character whose bytes are split over tokens is complete with the last of them. Padding and the ending add nothing.
    A token ends where decoding up to it (without trailing U+FFFD, which marks an unfinished character) stops agreeing
    with the whole text; ends never decrease, and the last token that is text ends with the text, even inside a
    character.

    If the texts of single ids add up to the whole text, their lengths give the result. Otherwise (a character in
    several tokens, a decoder that looks at neighbours, invalid bytes) ids are decoded in windows of a few tokens, so
    the cost is still linear in the length; a long run of invalid bytes is one piece, complete with its last token. If
    the windows do not add up either (a decoder that looks back further), every prefix is decoded, in quadratic time.

    Args:
        token_ids: Sampled ids of one completion; EOS and padding may be among them.
        tokenizer: The policy's tokenizer.
        pieces: Texts of single ids; missing ones are added. Use one dictionary for all completions of a tokenizer, so
            that each id is decoded once.
        endings: As for [`completion_text`].

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
    is_text = _which_are_text(token_ids, tokenizer, endings)
    text_ids = [token for token, keep in zip(token_ids, is_text, strict=True) if keep]
    text, pieces = _decode(text_ids, tokenizer), {} if pieces is None else pieces
    for token_id in set(text_ids) - pieces.keys():
        pieces[token_id] = _decode([token_id], tokenizer)
    texts = [pieces[token_id] for token_id in text_ids]

    def decode(start: int, stop: int) -> str:
        return _decode(text_ids[start:stop], tokenizer)

    if REPLACEMENT not in text and "".join(texts) == text:
        complete = [0, *accumulate(map(len, texts))]
    else:
        broken = _broken(text_ids, texts, tokenizer)
        complete = _complete_by_runs(broken, text, decode) or _complete_by_prefixes(len(text_ids), text, decode)
    complete[-1] = len(text)
    return [complete[seen] for seen in accumulate(map(int, is_text))]


def _broken(token_ids: Sequence[int], texts: Sequence[str], tokenizer: Any) -> list[bool]:
    """Which tokens may be part of a character: tokens that decode to no character by themselves, and byte tokens."""
    names = getattr(tokenizer, "convert_ids_to_tokens", lambda ids: [None] * len(ids))(list(token_ids))
    return [
        not text or REPLACEMENT in text or bool(_BYTE_TOKEN.fullmatch(name or ""))
        for text, name in zip(texts, names, strict=True)
    ]


def _complete_by_runs(broken: Sequence[bool], text: str, decode: Callable[[int, int], str]) -> list[int] | None:
    """Characters that are complete after 0, 1, ... tokens, or None if the runs do not add up to `text`.

    No character spans the border between a broken token and a whole one, so runs of each kind are decoded separately,
    each after a few tokens of context.
    """
    complete, begin, counted = [0], 0, 0
    for _, tokens in groupby(broken):
        stop, start = begin + sum(1 for _ in tokens), max(begin - WINDOW, 0)
        context, window = decode(start, begin), decode(start, stop)
        new = window[len(context) :]
        if not (window.startswith(context) and text.startswith(new, counted)):
            return None
        found = _complete_by_windows(begin, stop, counted, text, decode)
        if found is None and not broken[begin]:
            return None
        if found is None and stop - begin <= _STALLED:
            prefixes = (decode(start, at)[len(context) :] for at in range(begin + 1, stop + 1))
            found = [counted + _shared(prefix, new) for prefix in prefixes]
        if found is None:
            found = [counted] * (stop - begin - 1) + [counted + len(new.rstrip(REPLACEMENT))]
        complete += list(accumulate(found, max, initial=complete[-1]))[1:]
        begin, counted = stop, counted + len(new)
    return complete if counted == len(text) else None


def _complete_by_windows(
    begin: int, end: int, counted: int, text: str, decode: Callable[[int, int], str]
) -> list[int] | None:
    """Characters that are complete after each of the tokens `begin:end`, before which there are `counted`.

    A window is some context (tokens whose characters are already counted) and the tokens after it, decoded together: a
    decoder may treat its first token specially, for example strip a leading space.

    Returns:
        One number per token; None if the windows do not add up to `text`, or no character ends for many tokens.
    """
    complete = []
    start, context_stop = max(begin - WINDOW, 0), begin
    context = decode(start, context_stop)
    for stop in range(begin + 1, end + 1):
        if stop - context_stop > _STALLED:
            return None
        window = decode(start, stop)
        finished = window.rstrip(REPLACEMENT)
        new = finished[len(context) :]
        continues = finished.startswith(context) and text.startswith(new, counted)
        # An unfinished byte token may hide the complete characters before it (byte fallback), so try a shorter window.
        is_hidden = context.startswith(finished)
        if not (continues or is_hidden):
            return None
        complete.append(counted + len(new))
        # The next context must end between characters, and must not be empty.
        if stop - context_stop >= WINDOW and new and finished == window:
            start, context_stop, counted = context_stop, stop, counted + len(new)
            context = decode(start, stop)
    return complete


def _complete_by_prefixes(count: int, text: str, decode: Callable[[int, int], str]) -> list[int]:
    """Characters that are complete after 0, 1, ... `count` tokens, by decoding every prefix: the definition."""
    found = (_shared(decode(0, stop), text) for stop in range(1, count + 1))
    return list(accumulate(found, max, initial=0))


def _shared(prefix: str, text: str) -> int:
    """Characters of a prefix, without unfinished ones at its end, that agree with the text."""
    prefix = prefix.rstrip(REPLACEMENT)
    if text.startswith(prefix):
        return len(prefix)
    return next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text))


def turn_spans(
    token_ids: Sequence[int], token_ends: Sequence[int], written: Sequence[bool], endings: Collection[int]
) -> list[tuple[int, int]]:
    """Character span of each turn that the policy wrote, without the tokens that end it.

    Args:
        token_ids: Ids of one completion: policy tokens, tool tokens and the text between turns.
        token_ends: End characters of the tokens, from [`token_end_characters`].
        written: True where the policy sampled the token.
        endings: Ids that a turn may end with.

    Returns:
        Start and end character of each run of tokens of the policy.

    Example:
        >>> turn_spans([5, 1, 9, 6, 1], [2, 3, 7, 9, 9], [True, True, False, True, True], {1})
        [(0, 2), (7, 9)]
    """
    spans, begin = [], 0
    for sampled, run in groupby(written):
        stop = begin + sum(1 for _ in run)
        if sampled:
            last = stop
            while last > begin and token_ids[last - 1] in endings:
                last -= 1
            start = token_ends[begin - 1] if begin else 0
            spans.append((start, token_ends[last - 1] if last > begin else start))
        begin = stop
    return spans


def step_end_tokens(token_ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """Index of the token with the last character of each step.

    Args:
        token_ends: End characters of the tokens, from [`token_end_characters`].
        spans: Start and end character of each step in the same text.

    Returns:
        One index per step; None for a step that ends beyond the tokens or is empty.

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
        unplaced: Number of steps whose reward was not placed; it should be 0.
    """

    rewards: Float[Tensor, "B T"]
    step_ends: list[list[int | None]]
    unplaced: int


def placeable_ends(
    step_ends: Sequence[Sequence[int | None]],
    completion_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> list[list[int | None]]:
    """Step ends, with None for steps that do not end on a real token.

    Args:
        step_ends: Token at which each step of each row ends, or None.
        completion_mask: True (or 1) where a token is real.

    Returns:
        The same lists; None replaces indices on padding, on masked tokens and outside the tensor.

    Raises:
        ValueError: If the number of rows differs from the mask, or an index is negative.
    """
    if len(step_ends) != len(completion_mask):
        raise ValueError(
            f"Step ends have {len(step_ends)} rows, the completion mask has {len(completion_mask)}. Pass one list of "
            "step ends per completion, empty if it has no steps."
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
    """Raise if step rewards do not match these step ends, or are not finite.

    Raises:
        ValueError: If a row is missing, has another number of steps, or contains NaN or infinity; the message names the
            row.
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
    """Put the reward of each step on the token with the step's last character.

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
    # The last real token has no real token after it.
    after = mask.int().flip(1).cumsum(1).flip(1) - mask.int()
    return rewards.unsqueeze(1).expand(mask.shape).masked_fill(~mask | (after > 0), 0.0)
