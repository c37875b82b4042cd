"""Chat templates of downloaded tokenizers: programs that run in Jinja's sandbox, with a time limit.

The sandbox keeps them from files and from Python, but not from loops without end.
"""

import ctypes
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from fractal_rm.errors import reason

# Longest time for one chat. A long one takes a hundredth of a second; a slow machine gets more.
SECONDS = 20.0
# Pause between two looks at what is running.
_PAUSE = 0.25
# Time for a thread to receive the exception that ends its template.
_DELIVERY = 5.0
# Larger numbers are for texts of that length, or for powers.
_LARGEST = 1_000_000

# Arguments of `apply_chat_template`, which this package gives itself, and the names of the chat in a template.
_TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"tools", "documents"}
_TAKEN |= {"messages", "conversations"}

# What runs: the deadline of each thread.
_deadlines: dict[int, float] = {}
# Templates that took too long once.
_given_up: set[str] = set()


class _LateError(BaseException):
    """Raised in a thread whose template takes too long; not an Exception, which libraries would catch."""


def apply_template(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Any], options: Mapping[str, Any]) -> str:
    """A chat as the template of a tokenizer writes it.

    Args:
        tokenizer: Has a chat template.
        chat: The messages.
        options: Arguments of the template, such as `add_generation_prompt`.

    Raises:
        ValueError: If the template refuses the chat, fails, or takes longer than [`SECONDS`], then or before.
    """
    template = str(tokenizer.chat_template)
    try:
        if template not in _given_up:
            return str(_in_time(lambda: tokenizer.apply_chat_template(list(chat), **{**options, "tokenize": False})))
    except _LateError:
        _given_up.add(template)
    except Exception as error:  # its own refusals, such as of a system message, and whatever else it raises
        told = reason(error)
        raise ValueError(f"The chat template refuses this chat ({told}). Change its messages.") from error
    raise ValueError(
        f"The chat template takes longer than {SECONDS:g} s on a chat. Use a tokenizer with another template."
    )


def check_template_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument would not reach the chat template, but change what is rendered, or how.

    Example:
        >>> check_template_options({"enable_thinking": False})
    """
    if taken := sorted(options.keys() & _TAKEN):
        raise ValueError(
            f"`chat_template_kwargs` has the key {taken[0]!r}, which is not for the chat template. Leave it out."
        )


def check_template(template: Any, path: object) -> None:
    """Raise ValueError if a chat template calculates with powers or huge numbers, which nothing can interrupt.

    Args:
        template: The template, or several by name.
        path: The folder that it comes from.

    Example:
        >>> check_template("{{ 9 ** 9 }}", "rm")
        Traceback (most recent call last):
        ValueError: rm: the chat template calculates with `**`, which can run without end. Restore the original one.
    """
    for source in template.values() if isinstance(template, Mapping) else [template]:
        try:
            tokens = list(jinja2.Environment(autoescape=True).lex(str(source or "")))
        except jinja2.TemplateError:
            continue  # it is refused where it is used
        for _, kind, value in tokens:
            is_huge = kind == "integer" and len(value) >= len(str(_LARGEST))
            if is_huge or (kind == "operator" and value == "**"):
                raise ValueError(
                    f"{path}: the chat template calculates with `{value[:20]}`, which can run without end. Restore "
                    "the original one."
                )


def _in_time(work: Callable[[], Any]) -> Any:
    """Do some work; raises _LateError if it takes too long."""
    thread = threading.get_ident()
    _start_watch()
    _deadlines[thread] = time.monotonic() + SECONDS
    try:
        result = work()
    except _LateError:
        raise
    except BaseException:
        _finish(thread)
        raise
    _finish(thread)
    return result


def _finish(thread: int) -> None:
    """Take the deadline back; if the watch has taken it first, wait for the exception: nothing else may get it."""
    if _deadlines.pop(thread, None) is None:
        until = time.monotonic() + _DELIVERY
        while time.monotonic() < until:
            time.sleep(_PAUSE)
        raise _LateError


def _watch() -> None:
    while True:
        time.sleep(_PAUSE)
        now = time.monotonic()
        for thread, deadline in list(_deadlines.items()):
            if deadline < now and _deadlines.pop(thread, None) is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_LateError))


_watcher: threading.Thread | None = None


def _start_watch() -> None:
    """Start the thread that watches the others; it is lost when a process forks."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _deadlines.clear()
        _watcher = threading.Thread(target=_watch, name="chat template watch", daemon=True)
        _watcher.start()
