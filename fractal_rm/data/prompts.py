"""Prompts and completions: each a text or a chat. This module alone tells which, and checks them."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Prompt = str | list[dict[str, Any]]


class RenderedPrompt(str):
    """A prompt exactly as the policy reads it: no template is applied to it, and it may come from a chat.

    Attributes:
        cuts: Characters at which it is cut before it is tokenized: inside whatever a person wrote that looks like a
            control token, so that it stays text.
        chat: Whether a chat template wrote it; None: as the prompts that the reward model learned from.
    """

    __slots__ = ("chat", "cuts")

    def __new__(cls, text: str, cuts: tuple[int, ...] = (), chat: bool | None = None) -> "RenderedPrompt":
        made = super().__new__(cls, text)
        made.cuts, made.chat = cuts, chat
        return made


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
        content: A text, or a list of parts `{"type": "text", "text": ...}`.
        what: Its name in the sentence.

    Raises:
        TypeError: If the content is neither, or a part has no text: an image cannot be read.
        ValueError: If a text cannot be expressed in UTF-8.

    Example:
        >>> content_text([{"type": "text", "text": "2+2"}, {"type": "text", "text": "?"}], "the content")
        '2+2?'
    """
    if isinstance(content, list | tuple):
        for number, part in enumerate(content, 1):
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
                raise TypeError(f"part {number} of {what} is {kind!r}, not text; reward models read text only.")
        content = "".join(part["text"] for part in content)
    check_text(content, what)
    return content


def read_prompt(prompt: Any) -> Prompt:
    """A text as it is, or a chat (messages with the keys `role` and `content`) in the form that templates read.

    Content in parts becomes one text; keys that are null, which `datasets` adds where only other rows have them, go;
    content that is null beside `tool_calls` is an empty text. Further keys reach the chat template as they are.

    Raises:
        TypeError: If the value, or a message of it, has the wrong type.
        ValueError: If the chat has no messages, or a text cannot be expressed in UTF-8.

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
            raise TypeError(f"message {number} of the prompt is no message; give it the keys 'role' and 'content'.")
        check_text(known["role"], f"the role of message {number} of the prompt")
        content = content_text(known["content"], f"the content of message {number} of the prompt")
        messages.append(known | {"content": content})
    return messages


def check_same_kind(prompt: Prompt, first: Prompt) -> None:
    """Raise if a prompt is a chat and the first one is text, or the other way round.

    Raises:
        ValueError: If the kinds differ.
    """
    if is_chat(prompt) != is_chat(first):
        found, expected = ("a chat", "text") if is_chat(prompt) else ("text", "a chat")
        raise ValueError(f"the prompt is {found} but that of row 1 is {expected}; make all prompts text or all chats.")


def check_learned_kind(prompts: Iterable[Any], chat: bool | None, *, where: str = "") -> None:
    """Raise if a prompt is a chat and a reward model learned from texts, or the other way round.

    Scores would be numbers all the same, but of text that the model has never seen the like of.

    Args:
        prompts: Texts or chats. What is neither passes: it becomes an error of its row.
        chat: Whether the model learned from chats; None: it is not known, or from both.
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


def response_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion in TRL's standard or conversational format; empty where the content is null."""
    return content_text(completion[-1]["content"] or "", "the completion") if is_chat(completion) else completion
