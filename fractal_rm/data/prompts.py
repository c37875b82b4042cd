"""Prompts and completions: each a text or a chat. This module alone tells which, and checks them."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Prompt = str | list[dict[str, str]]


class RenderedPrompt(str):
    """A prompt exactly as the policy reads it: no template is applied to it, and it may come from a chat."""

    __slots__ = ()


def is_chat(prompt: Prompt) -> "TypeIs[list[dict[str, str]]]":
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


def check_prompt(prompt: Any) -> None:
    """Raise unless a value is a text or a chat: a list of messages with the keys `role` and `content`.

    Raises:
        TypeError: If the value, or a message of it, has the wrong type.
        ValueError: If the chat has no messages, or a text cannot be expressed in UTF-8.
    """
    if isinstance(prompt, str):
        return check_text(prompt, "the prompt")
    if not isinstance(prompt, list):
        raise TypeError(f"the prompt is {type(prompt).__name__}; make it a text or a list of messages.")
    if not prompt:
        raise ValueError("the prompt is a chat without messages; add the user's message.")
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TypeError(f"message {number} of the prompt is no message; give it the keys 'role' and 'content'.")
        for key in ("role", "content"):
            check_text(message[key], f"the {key} of message {number} of the prompt")


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


def response_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion in TRL's standard or conversational format."""
    return completion[-1]["content"] if is_chat(completion) else completion
