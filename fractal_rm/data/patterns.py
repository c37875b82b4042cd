"""Regular expressions of users and downloaded models, with a time limit.

A pattern with nested repeats can take longer than the universe is old. Python's `re` cannot be interrupted and holds
the GIL; `regex` releases it and has a timeout.
"""

import functools
from collections.abc import Iterator

import regex

from fractal_rm.errors import reason

# Longest time on one text: a pattern without nested repeats reads a million characters in less.
SECONDS = 1.0
# Number of timeouts before the pattern is given up, because a file has many rows.
_TRIES = 3
# Longer patterns are probably data, and take long to compile.
_LONGEST = 2_000
# A group that calls a group or the entire pattern: it can fill the memory in two seconds, and `regex` has no limit.
_CALL = regex.compile(r"\(\?(?:R|[-+]?\d+|&\w+|P>\w+)\)")
# Characters of a pattern shown in a message.
_SHOWN = 80


class Pattern:
    """A regular expression with a time limit. Made by [`compiled`].

    Raises:
        ValueError: If it is invalid, too long or calls itself.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _LONGEST:
            raise ValueError(f"The pattern has {len(pattern):,} characters; give {_LONGEST:,} at most.")
        self._shown = repr(pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}...")
        try:
            self._pattern = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, ValueError) as error:  # flags that exclude each other
            raise ValueError(f"The pattern {self._shown} is not a regular expression: {reason(error)}.") from None
        if call := _CALL.search(pattern):
            raise ValueError(
                f"The pattern {self._shown} calls itself ({call[0]}), which can fill the memory; write it without."
            )
        self._late = 0

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self._pattern.groups

    def finditer(self, text: str) -> Iterator["regex.Match[str]"]:
        """Its matches in a text, as in `re.finditer`.

        Raises:
            ValueError: If the search takes longer than [`SECONDS`], or if several earlier searches did.
        """
        try:
            if self._late < _TRIES:
                yield from self._pattern.finditer(text, timeout=SECONDS)
                return
        except TimeoutError:
            self._late += 1
        raise ValueError(
            f"the pattern {self._shown} takes longer than {SECONDS:g} s on a text of {len(text):,} characters; write "
            "it without repeats inside repeats."
        )


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> Pattern:
    """Compile a pattern, or return the one that was compiled before.

    Example:
        >>> [match.span() for match in compiled(r"\\n+").finditer("a\\n\\nb")]
        [(1, 3)]
    """
    return Pattern(pattern)
