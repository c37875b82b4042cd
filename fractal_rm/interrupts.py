"""Signals that end a command: Ctrl-C, and SIGTERM, which clusters send before they reclaim a machine."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; the message says what was saved, and how to continue.

    Args:
        number: The signal.
        message: A sentence for the user: what was saved.
        then: How to continue; commands that run several trainings replace it.
    """

    def __init__(self, number: int, message: str = "Interrupted.", then: str = "") -> None:
        super().__init__(f"{message} {then}".rstrip())
        self.number, self.message, self.then = number, message, then

    @classmethod
    def by(cls, end: KeyboardInterrupt, message: str, then: str = "") -> "Interrupted":
        """The same interrupt with another message."""
        return cls(end.number if isinstance(end, Interrupted) else signal.SIGINT, message, then)

    @property
    def status(self) -> int:
        """The exit status that a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


def interrupt(number: int, frame: Any) -> None:
    """A signal handler that raises [`Interrupted`]."""
    raise Interrupted(number)


@contextmanager
def handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within the context, let a function handle Ctrl-C and SIGTERM; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
