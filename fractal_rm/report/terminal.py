"""Scored responses on a terminal: every step with its score, in the colours of the pages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from fractal_rm.report.pages import response_view
from fractal_rm.report.palette import ink_on, score_colour

# Control characters (also those that begin escape sequences) and lone surrogates, except tab and newline.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def show_steps(rows: Iterable[Mapping[str, Any]], console: Console | None = None, *, threshold: float = 0.5) -> None:
    """Print scored responses, as [`~fractal_rm.report.viewer.write_viewer`] takes them, one step per line.

    Example:
        >>> step = {"text": "2+2=5", "score": 0.08, "gold": 0}
        >>> show_steps([{"id": "a", "prompt": "2+2?", "steps": [step], "score": 0.08, "label": 0}])
        a  score 0.08  label bad
        2+2?
          0.08  ✗ 2+2=5  first wrong step
        <BLANKLINE>
    """
    console = console or Console(highlight=False, soft_wrap=True)
    for number, row in enumerate(rows, start=1):
        view = response_view(row, number, threshold=threshold)
        console.print(Text(f"{_plain(view.name)}  score {view.score}  label {view.label_text}", style="bold"))
        console.print(Text(_plain(view.prompt), style="dim"))
        if view.error:
            console.print(Text(f"Not scored: {_plain(view.error)}"))
        for step, value in zip(view.steps, row.get("steps") or [], strict=True):
            line = Text(f" {step.score} ".rjust(7), style=_style(value.get("score")))
            mark = {"right": "\u2713", "wrong": "\u2717"}.get(step.gold or "", "")
            notes = [step.mistake, "first wrong step" if step.first_wrong else ""]
            line.append(f" {mark} " if view.judged else " ", style="bold")
            line.append(_plain(step.text.strip()), style="default on default")
            line.append("".join(f"  {note}" for note in notes if note), style="bold default on default")
            console.print(line)
        console.print()


def _plain(text: str) -> str:
    """Text without terminal control sequences and characters that cannot be shown."""
    return _CONTROL.sub("\ufffd", text)


def _style(score: float | None) -> str:
    if score is None or not math.isfinite(score):
        return "dim"
    colour = score_colour(score)
    return f"{ink_on(colour)} on {colour}"
