"""What `fractal-rm doctor` finds, one line for each check, whatever a check runs into."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from fractal_rm.errors import reason

# Errors that say in their own words what is wrong with models, rows or packages.
_SAYING = (ImportError, OSError, TypeError, ValueError)

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What a check found."""

    says: str
    made: Any = None  # for the checks that come after it
    status: Status = "ok"


class Examination:
    """Runs checks one after the other, and prints a line for each."""

    def __init__(self) -> None:
        self.has_failed = False

    def check(self, name: str, look: Callable[..., Finding], *arguments: Any) -> Any:
        """Run one check.

        Args:
            name: What is looked at, the second word of the line.
            look: The check.
            arguments: What it takes.

        Returns:
            What it made for later ones; None if it failed.
        """
        try:
            found = look(*arguments)
        except Exception as error:  # whatever strange models and rows make a library raise: a line, no traceback
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
