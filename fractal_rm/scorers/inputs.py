"""Text -> the tensors of a scorer: token ids with the step of each token, or embeddings.

The response is tokenized in pieces that end where steps end, in training and in scoring alike. So no token spans the
end of a step, a step's score never depends on later text (causal models), and scoring a whole response gives each step
the score of the prefix that ends with it, for every tokenizer. Nothing is inserted.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.prompts import Conversation, Prompt, RenderedPrompt, content_text, is_chat
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.scorers.templates import apply_template

# Turns text into a scorer's input: a tokenizer, or a frozen encoder.
Processor = PreTrainedTokenizerBase | SentenceEncoder


class BagInputs(Protocol):
    """Encodes bags once, and pads encoded bags to batches."""

    def encode(self, bags: Sequence[Bag]) -> list[Any]:
        """One encoded bag for each bag, with `length`, `num_steps` and `kept_steps`."""
        ...

    def pad(self, bags: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors for the scorer, `mask` (B, S) among them."""
        ...


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
        """Length that determines the cost of a forward pass."""
        return len(self.input_ids)


# Matches a prompt whose chat template opens the policy's thought.
_THINK_OPENED = re.compile(r"<think>\s*$")
# A Unicode private-use character, which ordinary text does not contain: it marks places while a template runs.
_MARK = "\ue0f5"
# Two turns put before the turns whose rendering is tested, and the call that a tool answers.
_DUMMY = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "."})
_CALLING = {"tool_calls": [{"type": "function", "id": "000000000", "function": {"name": "name", "arguments": {}}}]}


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str, size: int) -> re.Pattern[str] | None:
    """A pattern that matches the empty string before each control token in a text; None if there are none.

    Control tokens are the special tokens, and the tokens that the chat template puts around a user's turn. The unknown
    token is excluded, and so are single characters, which cannot be spelled in another way. `chat_template` and `size`
    are only keys of the cache.
    """
    turn = ""
    if tokenizer.chat_template:
        try:
            turn = apply_template(tokenizer, [{"role": "user", "content": "?"}], {})
        except ValueError:
            turn = ""  # a template for other chats
    found = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1 and token.content != tokenizer.unk_token and (token.special or token.content in turn)
    }
    return re.compile(f"(?=({'|'.join(map(re.escape, sorted(found)))}))") if found else None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern that matches the empty string before each control token of a tokenizer; None if it has none."""
    return _control_tokens(tokenizer, repr(tokenizer.chat_template), len(tokenizer))


def _cuts(text: str, control: re.Pattern[str] | None) -> list[int]:
    """Where to cut a text so that no piece contains a control token: after the first character of each."""
    return [] if control is None else [match.start() + 1 for match in control.finditer(text)]


def _texts(value: Any) -> Iterator[str]:
    """The texts in a message value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _mark_beside(*texts: str) -> str:
    """A mark that none of the texts contains."""
    mark = _MARK
    while any(mark in text for text in texts):
        mark += _MARK
    return mark


def _marked(value: Any, token: str, mark: str) -> Any:
    """A message value with a mark inside each occurrence of a control token."""
    if isinstance(value, str):
        return value.replace(token, token[0] + mark + token[1:])
    if isinstance(value, Mapping):
        return {name: one if name == "role" else _marked(one, token, mark) for name, one in value.items()}
    return [_marked(one, token, mark) for one in value] if isinstance(value, list | tuple) else value


def prompt_text(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    prompt_template: str,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    response: str = "",
) -> str:
    """The text that precedes the response: the template filled in, or the chat template of the tokenizer.

    If a chat ends with an assistant message, the response continues it. If both the template and the response open a
    `<think>`, only the response's is kept.

    Args:
        prompt: Text or chat.
        tokenizer: The reward model's tokenizer.
        prompt_template: Text with `{prompt}` in the place of a text prompt.
        chat_template_kwargs: Arguments of the chat template in addition to the messages.
        response: What follows.

    Returns:
        The text; for a chat a [`RenderedPrompt`], which knows where its messages contain control tokens as text.

    Raises:
        ValueError: If the prompt is a chat and the tokenizer has no chat template, or one that refuses it or leaves a
            message out.
    """
    if isinstance(prompt, RenderedPrompt):
        return prompt
    if not is_chat(prompt):
        return prompt_template.replace("{prompt}", prompt)
    if not tokenizer.chat_template:
        raise ValueError(
            f"The prompts are chats, but the tokenizer {tokenizer.name_or_path} has no chat template. Set "
            "`tokenizer.chat_template`, use a chat model's tokenizer, or give the prompts as text."
        )
    for place, message in enumerate(prompt):
        _check_role(tokenizer, message["role"], first=place == 0)
    begun = prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not begun, "continue_final_message": begun}
    text = _render(prompt, tokenizer, {**(chat_template_kwargs or {}), **options})
    return _without_opened_thought(text) if response.lstrip().startswith("<think>") else text


def _without_opened_thought(text: RenderedPrompt) -> RenderedPrompt:
    return RenderedPrompt(_THINK_OPENED.sub("", text), text.cuts, chat=True)


@lru_cache(maxsize=64)
def _writes_role(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, role: str, *, first: bool, called: bool
) -> bool:
    """Whether a chat template writes messages of this role. `chat_template` is only a key of the cache."""
    said = {"role": role, "name": "name", "tool_call_id": "000000000", "content": _MARK}
    user, assistant = _DUMMY
    chat = [said, user] if first else [user, assistant | _CALLING if called else assistant, said]
    try:
        return _MARK in apply_template(tokenizer, chat, {})
    except ValueError:
        return True  # refused: rendering will raise the template's own message


def _check_role(tokenizer: PreTrainedTokenizerBase, role: str, *, first: bool = False, called: bool = True) -> None:
    """Raise ValueError if the chat template leaves out messages of this role, also after `tool_calls`."""
    template = repr(tokenizer.chat_template)
    ways = {False, called and not first}
    if role in ("user", "assistant") or any(
        _writes_role(tokenizer, template, role, first=first, called=way) for way in ways
    ):
        return
    raise ValueError(
        f"The chat template does not write messages of {role!r}. Give them another role, or use a tokenizer whose "
        "template knows it."
    )


def context_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    response: str = "",
) -> RenderedPrompt:
    """What a chat template writes between two assistant turns, from the end of the first to the beginning of the next.

    Args:
        messages: The messages between them; none from the assistant.
        tokenizer: The reward model's tokenizer.
        chat_template_kwargs: As for [`prompt_text`].
        response: The turn that follows.

    Raises:
        ValueError: If the template refuses the messages, or drops one.
    """
    messages = [
        {name: value for name, value in message.items() if value is not None}
        | {"content": content_text(message.get("content"), f"the content of a message of {message['role']!r}")}
        for message in messages
    ]
    for message in messages:
        _check_role(tokenizer, message["role"], called=False)  # the calls before it are a part of the turn's text
    turn = _mark_beside(*_texts(messages))
    chat = [_DUMMY[0], {"role": "assistant", "content": turn}, *messages]
    rendered = _render(chat, tokenizer, {**(chat_template_kwargs or {}), "add_generation_prompt": True})
    if turn not in rendered:
        raise ValueError("The chat template drops assistant messages before the last one. Use another template.")
    start = rendered.rindex(turn) + len(turn)
    text = RenderedPrompt(rendered[start:], tuple(cut - start for cut in rendered.cuts if cut > start), chat=True)
    return _without_opened_thought(text) if response.lstrip().startswith("<think>") else text


def with_context(
    response: str, tokenizer: PreTrainedTokenizerBase, *, chat_template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """A response with its context as the chat template writes it; a plain text unchanged.

    Raises:
        ValueError: For a reason of [`context_text`].
    """
    if not isinstance(response, Conversation):
        return response
    context = [
        one
        if one is None or isinstance(one, RenderedPrompt)
        else context_text(one, tokenizer, chat_template_kwargs=chat_template_kwargs, response=response[start:end])
        for one, (start, end) in zip(response.context, response.turns, strict=True)
    ]
    return Conversation(response, response.turns, context)


def _render(chat: Sequence[Any], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> RenderedPrompt:
    """A chat as its template writes it, with the places of control tokens that messages contain as text.

    A token is not cut if the template interprets it (`</think>`, where thoughts of earlier turns are left out).
    """
    text, control = apply_template(tokenizer, chat, options), control_tokens(tokenizer)
    mark = _mark_beside(text, *_texts(chat))
    held = set() if control is None else {token for one in _texts(chat) for token in control.findall(one)}
    marked = [
        apply_template(tokenizer, _marked(list(chat), token, mark), options).split(mark) for token in sorted(held)
    ]
    same = [pieces for pieces in marked if "".join(pieces) == text]
    cuts = {cut for pieces in same for cut in itertools.accumulate(map(len, pieces[:-1]))}
    return RenderedPrompt(text, tuple(sorted(cuts)), chat=True)


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special token ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


# The token ids of a text, and the characters `start, end` of each; None if the tokenizer has no offsets.
_Piece = tuple[list[int], list[Span] | None]
# Rows tokenized at a time: tokens and offsets of a whole data set need more memory than a small model.
_ROWS_AT_ONCE = 512
# Texts after which a tokenizer probably begins a new token, whatever follows.
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
    """Whether a tokenizer puts a space before every text, as Llama 2's does."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    return any(token.startswith(("\u2581", "\u0120")) for token in first)


def _tokenize_continuations(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Tokens of texts that continue another text.

    Tokenizers that put a space before every text would put one before every step. They get an anchor text before the
    step, whose tokens are removed again.
    """
    found = dict(enumerate(_tokenize(pieces, tokenizer)))
    if not tokenizer.is_fast or not spaces_texts(tokenizer):
        return list(found.values())
    left = list(found)
    for anchor in _ANCHORS:
        merged = []  # texts whose start merges with the anchor's end
        for i, (ids, offsets) in zip(left, _tokenize([anchor + pieces[i] for i in left], tokenizer), strict=True):
            cut = sum(end <= len(anchor) for _, end in offsets or [])
            if cut < len(ids) and offsets and offsets[cut][0] >= len(anchor):
                rest = [(start - len(anchor), end - len(anchor)) for start, end in offsets[cut:]]
                found[i] = ids[cut:], rest
            else:
                merged.append(i)
        left = merged
    return list(found.values())


def _joined(pieces: Sequence[_Piece], starts: Sequence[int]) -> _Piece:
    """Join the token ids of pieces of one text, which begin at these characters."""
    ids = [token for piece, _ in pieces for token in piece]
    if any(offsets is None for _, offsets in pieces):
        return ids, None
    spans = [(a + at, b + at) for (_, offsets), at in zip(pieces, starts, strict=True) for a, b in offsets or []]
    return ids, spans


@dataclass(frozen=True)
class TokenInputs:
    """Converts text to the input of a likelihood or token scorer.

    Control tokens come only from the chat template and from text prompts. In a response and in chat messages they are
    encoded as ordinary text, so they cannot open or close a turn. The text between the turns of a conversation is read
    as the chat template writes it.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: FractalSettings

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        return None if self.settings.reading == 1 else control_tokens(self.tokenizer)

    def _tokenize_steps(self, pieces: Sequence[str]) -> list[_Piece]:
        """Tokens of parts of responses, without control tokens."""
        edges = [[0, *_cuts(piece, self._control), len(piece)] for piece in pieces]
        parts = [piece[a:b] for piece, cut in zip(pieces, edges, strict=True) for a, b in itertools.pairwise(cut)]
        found = iter(_tokenize_continuations(parts, self.tokenizer))
        return [_joined([next(found) for _ in cut[1:]], cut[:-1]) for cut in edges]

    def _tokenize_context(self, text: str) -> list[int]:
        """Token ids of the text between two turns, with the chat template's control tokens."""
        if not text:
            return []
        if not isinstance(text, RenderedPrompt):
            return self._tokenize_steps([text])[0][0]
        cuts = text.cuts if self.settings.reading > 1 else ()
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        return [token for ids, _ in _tokenize_continuations(parts, self.tokenizer) for token in ids]

    def _before(self, response: Conversation, place: int, last: int, turn: int) -> list[int]:
        """Token ids from a place in turn `last` (-1: before the first) to the beginning of another turn."""
        ids = self._tokenize_context(response[place : response.turns[last][1]]) if last >= 0 else []
        for number in range(last + 1, turn + 1):
            (start, end), context = response.turns[number], response.context[number]
            if context is None:
                context = response[response.turns[number - 1][1] if number else 0 : start]
            ids += self._tokenize_context(context)
            ids += self._tokenize_context(response[start:end]) if number < turn else []
        return ids

    def _tokenize_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, cut where user text looks like a control token."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for row, text in enumerate(texts):
            cuts = text.cuts if isinstance(text, RenderedPrompt) and self.settings.reading > 1 else ()
            if cuts:
                parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
                rest = _tokenize_continuations(parts[1:], self.tokenizer)
                ids[row] = [*_tokenize(parts[:1], self.tokenizer)[0][0], *(i for piece, _ in rest for i in piece)]
        return ids

    def encode(self, bags: Sequence[Bag]) -> list[EncodedBag]:
        """Tokenize prompts with responses, keeping track of steps.

        A token belongs to a step if it contains one of its characters; the gap before a step (a newline, a separator)
        belongs to no step. Text after the last step is only white space or a separator and is left out. Tokenizers
        without offsets (in plain Python) cannot separate gaps from steps: there the gap before a step counts as part of
        it.

        Returns:
            One [`EncodedBag`] for each bag; `step_ends` is empty if not even the first step fits.
        """
        starts = range(0, len(bags), _ROWS_AT_ONCE)
        return [bag for start in starts for bag in self._encode_some(bags[start : start + _ROWS_AT_ONCE])]

    def _encode_some(self, bags: Sequence[Bag]) -> list[EncodedBag]:
        tokenizer, settings = self.tokenizer, self.settings
        options = {"chat_template_kwargs": settings.chat_template_kwargs}
        template = settings.prompt_template
        texts = [prompt_text(bag.prompt, tokenizer, template, response=bag.response, **options) for bag in bags]
        # A step is tokenized from the end of the previous one, or the beginning of its turn: its gap, then the step.
        starting = [self._starts(bag) for bag in bags]
        previous = [starts for starts, _ in starting]
        pieces = [
            bag.response[start:end]
            for bag, starts in zip(bags, previous, strict=True)
            for start, (_, end) in zip(starts, bag.step_spans, strict=False)
        ]
        tokenized = iter(self._tokenize_steps(pieces))
        prefix, suffix = special_affixes(tokenizer)
        # Prompts usually have several responses. Two prompts may have the same text but different authors.
        different = {(text, getattr(text, "cuts", ())): text for text in texts}
        prompt_ids = dict(zip(different, self._tokenize_prompts(list(different.values())), strict=True))
        encoded = []
        for bag, text, (starts, context) in zip(bags, texts, starting, strict=True):
            # A chat template already writes its special tokens.
            from_chat = text.chat if isinstance(text, RenderedPrompt) else False
            from_chat = settings.chat if from_chat is None else from_chat
            before, after = ([], []) if from_chat else (prefix, suffix)
            gaps = [start - end for (start, _), end in zip(bag.step_spans, starts, strict=False)]
            parts = [_behind(context.get(i, []), next(tokenized), gap) for i, gap in enumerate(gaps)]
            room = None if settings.max_length is None else settings.max_length - len(after)
            start = prompt_ids[text, getattr(text, "cuts", ())]
            encoded.append(_join([*before, *start], parts, gaps, after, room))
        return encoded

    def _starts(self, bag: Bag) -> tuple[list[int], dict[int, list[int]]]:
        """Where the text before each step begins and, for a step that begins a turn, the token ids before that."""
        starts, context, last = [0, *(end for _, end in bag.step_spans)], {}, -1
        if isinstance(bag.response, Conversation):
            kwargs = self.settings.chat_template_kwargs
            response: Any = with_context(bag.response, self.tokenizer, chat_template_kwargs=kwargs)
            for number, span in enumerate(bag.step_spans):
                turn = response.turn_of(*span)
                if turn != last:
                    context[number] = self._before(response, starts[number], last, turn)
                    starts[number], last = response.turns[turn][0], turn
        return starts, context

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


def _behind(context: list[int], piece: _Piece, gap: int) -> _Piece:
    """A step preceded by context tokens, which belong to no step."""
    ids, offsets = piece
    if not context:
        return piece
    return [*context, *ids], [
        *[(0, 0)] * len(context),
        *(offsets if offsets is not None else [(0, gap + 1)] * len(ids)),
    ]


def _join(start: list[int], parts: list[_Piece], gaps: list[int], after: list[int], room: int | None) -> EncodedBag:
    """Append whole steps to the start as long as they fit."""
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
    """True within each row's length, (rows, longest)."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
