"""The colours of step scores, for pages and for plots, in light and in dark mode.

Scores run from orange (wrong) through a neutral middle to blue (right): two hues that differ in every common kind of
colour blindness. A page never relies on colour alone: the number is always printed.
"""

from __future__ import annotations

import math
from typing import Literal

Mode = Literal["light", "dark"]

SCORE_ANCHORS: dict[Mode, tuple[str, ...]] = {
    "light": ("#e06f24", "#f2b488", "#f0eee8", "#abcfea", "#559fd8"),
    "dark": ("#b9501a", "#7c4729", "#3b3e42", "#2a567b", "#2371b3"),
}
INKS = ("#111111", "#ffffff")
SCORE_BINS = 11


def score_colour(score: float, mode: Mode = "light") -> str:
    """Colour of a step score on the diverging scale, as `#rrggbb`; outside [0, 1] the colour of the nearer end.

    Example:
        >>> score_colour(0.0), score_colour(0.5), score_colour(1.0)
        ('#e06f24', '#f0eee8', '#559fd8')
    """
    anchors = SCORE_ANCHORS[mode]
    position = min(max(score, 0.0), 1.0) * (len(anchors) - 1)
    left = min(int(position), len(anchors) - 2)
    share = position - left
    pairs = zip(_channels(anchors[left]), _channels(anchors[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour, as `#rrggbb`.

    Example:
        >>> ink_on("#2371b3")
        '#ffffff'
    """
    return max(INKS, key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours `#rrggbb`: 1 for equal ones, 21 for black on white.

    Source:
        Contrast ratio of the Web Content Accessibility Guidelines 2.2, which require 4.5 in body text.

    Example:
        >>> round(contrast("#000000", "#ffffff"), 1)
        21.0
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def score_class(score: float | None) -> str:
    """CSS class of a score, for the rules of [`score_css`]: `s0` (wrong) to `s10` (right), `none` without a score.

    Example:
        >>> score_class(0.0), score_class(0.93), score_class(None)
        ('s0', 's9', 'none')
    """
    if score is None or not math.isfinite(score):
        return "none"
    return f"s{round(min(max(score, 0.0), 1.0) * (SCORE_BINS - 1))}"


def score_css(mode: Mode) -> str:
    """CSS rules, one per line, that give each score class its colour `--c` and the colour `--t` of text on it.

    Example:
        >>> score_css("light").splitlines()[0]
        '.s0{--c:#e06f24;--t:#111111}'
    """
    colours = [score_colour(index / (SCORE_BINS - 1), mode) for index in range(SCORE_BINS)]
    return "\n".join(f".s{index}{{--c:{colour};--t:{ink_on(colour)}}}" for index, colour in enumerate(colours))


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
