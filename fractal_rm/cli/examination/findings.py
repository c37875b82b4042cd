"""Checks of `fractal-rm doctor`, each a printed line, whatever error it meets."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from fractal_rm.errors import reason

# Errors whose message explains what is wrong with models, rows or packages.
_SAYING = (ImportError, OSError, TypeError, ValueError)

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """The result of a check."""

    says: str
    made: Any = None  # for the checks that come after it
    status: Status = "ok"


class Examination:
    """Runs checks one after the other and prints a line for each."""

    def __init__(self) -> None:
        self.has_failed = False

    def check(self, name: str, look: Callable[..., Finding], *arguments: Any) -> Any:
        """Run a check on its arguments and print its line; returns what later checks need, None if it failed."""
        try:
            found = look(*arguments)
        except Exception as error:  # whatever a library raises: a line, no traceback
            text = " ".join(str(error).split())
            if not (isinstance(error, _SAYING) and text):
                kind = type(error).__name__
                text = (
                    f"An error of a library ended the check ({kind}: {reason(error)}). If that is not clear, report it."
                )
            found = Finding(text, status="fail")
        self.has_failed |= found.status == "fail"
        print(f"{found.status:<5} {name:<13} {found.says}", flush=True)
        return found.made
