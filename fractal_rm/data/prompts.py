"""Prompts and completions: each a text or a chat. Only this module distinguishes and checks them."""

import contextlib
import itertools
import json
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Prompt = str | list[dict[str, Any]]
# Roles allowed in a completion besides the policy's: their messages are context.
CONTEXT_ROLES = ("tool", "user", "system", "developer", "function", "ipython", "environment", "observation")
# Keys of a model's thoughts outside the content of its message.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Types of the parts of a content that are text, in both APIs of OpenAI.
TEXT_PARTS = ("text", "input_text", "output_text")


class RenderedPrompt(str):
    """A prompt exactly as the policy reads it: no template is applied, and it may come from a chat."""

    __slots__ = ("chat", "cuts")

    def __new__(cls, text: str, cuts: tuple[int, ...] = (), chat: bool | None = None) -> "RenderedPrompt":
        """Make one.

        Args:
            text: The prompt.
            cuts: Characters at which it is cut before tokenization: inside user text that looks like a control token,
                so that it stays text.
            chat: Whether a chat template wrote it; None: the same as in the reward model's training.
        """
        made = super().__new__(cls, text)
        made.cuts, made.chat = cuts, chat
        return made


# Context before a turn: messages; a text written by a chat template; None: the characters unchanged.
Context = Sequence[Mapping[str, Any]] | RenderedPrompt | None


class Conversation(str):
    """A response of several turns as one text; the policy wrote only parts of it.

    Only its turns have steps. The text between them (tool output, user messages) is context: it is read, but never cut,
    scored or rewarded.

    Example:
        >>> told = {"role": "tool", "content": "4"}
        >>> said = Conversation("Look up.\\n4\\nIt is 4.", ((0, 8), (11, 19)), (None, [told]))
        >>> [said[start:end] for start, end in said.turns]
        ['Look up.', 'It is 4.']
    """

    __slots__ = ("context", "turns")

    def __new__(
        cls, text: str, turns: Sequence[tuple[int, int]] = (), context: Sequence[Context] = ()
    ) -> "Conversation":
        """Make one.

        Args:
            text: All messages as one text, in order.
            turns: Characters `start, end` of the policy's turns, in order.
            context: For each turn the context before it; the first follows the prompt.
        """
        made = super().__new__(cls, text)
        made.turns, made.context = tuple((start, end) for start, end in turns), tuple(context)
        return made

    def turn_of(self, start: int, end: int) -> int | None:
        """The turn that contains these characters; None if no turn contains all of them."""
        return next((i for i, (first, last) in enumerate(self.turns) if first <= start and end <= last), None)


def turns_of(response: str) -> Sequence[tuple[int, int]]:
    """Characters `start, end` of each turn that the policy wrote; a plain text is one turn."""
    return response.turns if isinstance(response, Conversation) else ((0, len(response)),)


def shortened(response: str, end: int) -> str:
    """The first `end` characters of a response; a conversation keeps the turns inside them, with their context."""
    if not isinstance(response, Conversation):
        return response[:end]
    turns = [(start, min(stop, end)) for start, stop in response.turns if start < end]
    return Conversation(response[:end], turns, response.context[: len(turns)])


def is_chat(prompt: Prompt) -> "TypeIs[list[dict[str, Any]]]":
    """Whether a prompt or completion is a chat, not a text."""
    return not isinstance(prompt, str)


def check_text(text: Any, what: str) -> None:
    """Raise unless a value is text that a tokenizer can read.

    Args:
        text: The value.
        what: Its name in the sentence.

    Raises:
        TypeError: If the value is not text.
        ValueError: If the text holds half of a surrogate pair, which UTF-8 cannot express.
    """
    if not isinstance(text, str):
        raise TypeError(f"{what} is {reprlib.repr(text)} ({type(text).__name__}), not text; make it a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half of a surrogate pair at character {error.start}; escape or remove it."
        ) from None


def content_text(content: Any, what: str) -> str:
    """The text of a message's content: itself, or its parts of text joined.

    Args:
        content: A text, or a list of parts: `{"type": "text", "text": ...}`, or texts.
        what: Its name in the sentence.

    Raises:
        TypeError: If the content is neither, or a part has no text: an image cannot be read.
        ValueError: If a text cannot be expressed in UTF-8.

    Example:
        >>> content_text([{"type": "text", "text": "2+2"}, {"type": "text", "text": "?"}], "the content")
        '2+2?'
    """
    if isinstance(content, list | tuple):
        texts: list[Any] = []
        for number, part in enumerate(content, 1):
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if not isinstance(part, str) and (not isinstance(part, Mapping) or kind not in TEXT_PARTS):
                raise TypeError(f"part {number} of {what} is {kind!r}, not text; reward models read text only.")
            texts.append(part if isinstance(part, str) else part.get("text"))
            check_text(texts[-1], f"part {number} of {what}")
        content = "".join(texts)
    check_text(content, what)
    return content


def read_prompt(prompt: Any) -> Prompt:
    """A text unchanged, or a chat (messages with the keys `role` and `content`) in the form that templates read.

    Content in parts becomes one text. Null keys, which `datasets` adds if only other rows have them, are dropped. Null
    content of a message with `tool_calls` becomes an empty text. Other keys reach the chat template unchanged.

    Raises:
        TypeError: If the value, or a message of it, has the wrong type.
        ValueError: If the chat has no messages, one has a `function_call`, or a text cannot be expressed in UTF-8.

    Example:
        >>> read_prompt([{"role": "user", "content": [{"type": "text", "text": "2+2?"}], "name": None}])
        [{'role': 'user', 'content': '2+2?'}]
    """
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        return prompt
    if not isinstance(prompt, list):
        raise TypeError(f"the prompt is {type(prompt).__name__}; make it a text or a list of messages.")
    if not prompt:
        raise ValueError("the prompt is a chat without messages; add the user's message.")
    messages = []
    for number, message in enumerate(prompt, 1):
        given = message if isinstance(message, Mapping) else {}
        known = {key: value for key, value in given.items() if value is not None}
        if known.get("tool_calls"):
            known.setdefault("content", "")
        if "role" in known and "content" in given and "content" not in known:
            raise TypeError(
                f"the content of message {number} of the prompt is null; give it a text (only a message with "
                "'tool_calls' may have none)."
            )
        if not {"role", "content"} <= set(known):
            raise TypeError(f"message {number} of the prompt is not a message; give it the keys 'role' and 'content'.")
        _check_calls(known, f"message {number} of the prompt")
        check_text(known["role"], f"the role of message {number} of the prompt")
        content = content_text(known["content"], f"the content of message {number} of the prompt")
        messages.append(known | {"content": content})
    return messages


def check_not_blank(prompt: Any) -> None:
    """Raise ValueError if the prompt of a row is a blank text, or a chat of blank messages: probably it is missing."""
    messages = prompt if isinstance(prompt, list | tuple) else [{"content": prompt}]
    if messages and all(
        isinstance(one, Mapping)
        and isinstance(one.get("content"), str)
        and not one["content"].strip()
        and not one.get("tool_calls")
        for one in messages
    ):
        raise ValueError("the prompt is empty; write it, or drop the row.")


def check_same_kind(prompt: Prompt, first: Prompt) -> None:
    """Raise if a prompt is a chat and the first one is text, or vice versa.

    Raises:
        ValueError: If the kinds differ.
    """
    if is_chat(prompt) != is_chat(first):
        found, expected = ("a chat", "text") if is_chat(prompt) else ("text", "a chat")
        raise ValueError(f"the prompt is {found} but that of row 1 is {expected}; make all prompts text or all chats.")


def check_learned_kind(prompts: Iterable[Any], chat: bool | None, *, where: str = "") -> None:
    """Raise if a prompt is a chat and a reward model was trained on texts, or vice versa.

    It would still give scores, but for text unlike its training data.

    Args:
        prompts: Texts or chats. Other values pass here and become an error of their row.
        chat: Whether the model was trained on chats; None: unknown, or both.
        where: Begins the message.

    Raises:
        ValueError: Names the first such prompt, counted from 0, and what to do.
    """
    if chat is None:
        return
    found, learned = ("a text", "chats") if chat else ("a chat", "texts")
    for row, prompt in enumerate(prompts):
        either = isinstance(prompt, RenderedPrompt) or not isinstance(prompt, str | list)
        if not either and is_chat(prompt) != chat:
            raise ValueError(
                f"{where}row {row}: the prompt is {found}, but the reward model was trained on prompts that are "
                f"{learned}. Give the prompts as {learned}, or train a reward model on prompts like these."
            )


def is_messages(value: Any) -> bool:
    """Whether a value is a chat with messages: a list of objects, not of texts."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def yields_names(given: Any) -> bool:
    """Whether iterating gives names or characters instead of entries: texts, paths, dictionaries, data frames."""
    return isinstance(given, str | os.PathLike | Mapping) or hasattr(given, "columns")


def read_completion(completion: Any) -> str:
    """The policy's text in a completion of TRL's standard or conversational format.

    The text of the assistant's message; for several messages a [`Conversation`], a text that knows which turns the
    assistant wrote. Tool calls of a message are added to its text on separate lines, in the form
    `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, and its thoughts as `<think>`.

    Args:
        completion: A text, or messages that begin with the assistant's. No messages: an empty text.

    Raises:
        TypeError: If a message is not an object, or its content is not text.
        ValueError: If the first message is not the assistant's, a role is unknown, or a message has a `function_call`.

    Example:
        >>> added, told = {"role": "assistant", "content": "I add."}, {"role": "assistant", "content": "It is 4."}
        >>> said = read_completion([added, {"role": "tool", "content": "4"}, told])
        >>> [said[start:end] for start, end in said.turns]
        ['I add.', 'It is 4.']
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple):
        raise TypeError(f"the completion is {type(completion).__name__}; make it a text or a list of messages.")
    for number, message in enumerate(completion, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role is None:
            raise TypeError(
                f"message {number} of the completion is not a message; give it the keys 'role' and 'content'."
            )
        if role != "assistant" and (number == 1 or role not in CONTEXT_ROLES):
            raise ValueError(
                f"the completion begins with a message of {role!r}; move what comes before the assistant to the prompt."
                if role in CONTEXT_ROLES
                else f"message {number} of the completion has the role {role!r}; use 'assistant' for what the policy "
                f"wrote, and one of {', '.join(CONTEXT_ROLES)} for context."
            )
    texts = [_said(message, number) for number, message in enumerate(completion, 1)]
    if len(texts) < 2:
        return "".join(texts)
    starts = itertools.accumulate((len(text) + 1 for text in texts), initial=0)  # texts are lines apart
    said = zip(completion, starts, texts, strict=False)
    turns = [(start, start + len(text)) for message, start, text in said if message["role"] == "assistant"]
    return Conversation("\n".join(texts), turns, contexts_of(completion))


def contexts_of(messages: Sequence[Mapping[str, Any]]) -> list[Context]:
    """The context before each assistant message, in a completion that begins with one."""
    written = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [None, *(list(messages[a + 1 : b]) for a, b in itertools.pairwise(written))]


def _said(message: Mapping[str, Any], number: int) -> str:
    """The text of a completion's message, with the thoughts and tool calls outside its content."""
    what = f"the content of message {number} of the completion"
    content = message.get("content")
    if message["role"] != "assistant":
        return content_text(content, what)
    _check_calls(message, f"message {number} of the completion")
    key = next((key for key in REASONING_KEYS if message.get(key)), None)
    thought = content_text(message[key], f"{key!r} of message {number} of the completion").strip() if key else ""
    parts = [f"<think>\n{thought}\n</think>\n"] if thought else []
    parts += [text] if (text := content_text("" if content is None else content, what)) else []
    parts += [_call(call, number) for call in message.get("tool_calls") or ()]
    return "\n".join(parts)


def _check_calls(message: Mapping[str, Any], what: str) -> None:
    """Raise if a message calls a function in the older form, which chat templates leave out."""
    if message.get("function_call"):
        raise ValueError(f"{what} has 'function_call', which chat templates leave out; write it as 'tool_calls'.")


def _call(call: Any, number: int) -> str:
    """A tool call as text, as the chat templates of Qwen and Hermes write it."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = (
        (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else (None, 0)
    )
    if not isinstance(name, str):
        raise TypeError(
            f"a tool call of message {number} of the completion has no name; give it 'name' and 'arguments'."
        )
    if isinstance(arguments, str):  # JSON in a text, as servers send it
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    if isinstance(arguments, Mapping):  # `datasets` adds keys that only other rows have
        arguments = {key: value for key, value in arguments.items() if value is not None}
    written = json.dumps({"name": name, "arguments": arguments or {}}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"
