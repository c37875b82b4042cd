"""What PPO runs logged, as a page or a picture: learning curves, score against truth, guards, length, KL."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from fractal_rm.report.drawing import LINES, PAGE, PAGE_CSS, PICTURE, Theme, new_figure, save_figure, style_axes, to_svg
from fractal_rm.report.pages import write_page
from fractal_rm.report.tables import MISSING, Table, format_number
from fractal_rm.report.training_curves import (
    MOST_POINTS,
    Line,
    Panel,
    Section,
    by_name,
    early_ends,
    make_sections,
)
from fractal_rm.report.training_history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

COLUMNS = 3  # of a picture
# Inches of a panel on a page with two panels side by side; a single one is as wide as both, except on a phone.
WIDTH, HEIGHT = 4.7, 2.3
# Markers along a line distinguish groups without colour; dashes would hide noisy curves. With fewer than MARKED points,
# each is marked.
MARKERS, MARKED = 8, 16
# Margin below and above the curves, as a share of the height. A curve that varies by less than FLAT of its size is a
# constant with rounding errors, drawn in the middle of axes with FLAT_MARGIN.
MARGIN, FLAT, FLAT_MARGIN = 0.06, 1e-6, 0.1
TICKS = 5  # of the vertical axis
# Shapes of the markers in the page's legend, around (18, 6).
SHAPES = {
    "o": "M18 2a4 4 0 1 0 .01 0z",
    "s": "M14.5 2.5h7v7h-7z",
    "^": "M18 1.5l4.5 8h-9z",
    "D": "M18 1l5 5-5 5-5-5z",
}


def write_training_report(path: str | Path, runs: Sequence[Run], *, title: str = "Training") -> None:
    """Write what runs logged as one HTML page; runs with the same name are seeds, drawn as their mean with its
    interval.

    Raises ImportError if matplotlib is not installed, ValueError as [`make_sections`].

    Example:
        >>> import pathlib, tempfile
        >>> page = pathlib.Path(tempfile.mkdtemp()) / "training.html"
        >>> log = {"rewards/exact_answer/mean": {1: 0.5, 2: 0.75}}
        >>> write_training_report(page, [Run("dense", "runs/dense", "metrics.json", log)])
        >>> "exact_answer, training" in page.read_text(encoding="utf-8")
        True
    """
    sections, names = make_sections(runs), list(by_name(runs))
    lines = [line for section in sections for panel in section.panels for line in panel.lines]
    last = max(run.last_update for run in runs)
    write_page(
        path,
        "training.html.j2",
        title=title,
        sections=[(section, _plots(section, last)) for section in sections],
        legend=[(name, *_css_look(slot)) for slot, name in enumerate(names)],
        runs_table=_runs_table(runs),
        last_table=_last_table(sections, names),
        early=early_ends(runs),
        alarmed=[run for run in runs if run.alarms],
        several=any(line.low is not None for line in lines),
        window=max((line.window for line in lines), default=1),
        most_points=MOST_POINTS,
    )


def save_training_figure(path: str | Path, runs: Sequence[Run]) -> None:
    """Save the panels of the page as one picture on white; the ending `.png` or `.svg` decides the format.

    Raises as [`write_training_report`], and ValueError if the name ends otherwise.
    """
    sections, names = [section for section in make_sections(runs) if section.panels], list(by_name(runs))
    last = max(run.last_update for run in runs)
    rows = [-(-len(section.panels) // COLUMNS) for section in sections]
    with new_figure(9.6, 0.4 + sum(0.35 + 2.15 * count for count in rows)) as figure:
        heights = [0.4, *(0.35 + 2.15 * count for count in rows)]
        head, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
        head.legend(handles=_handles(enumerate(names)), loc="center left", ncols=4, frameon=False, fontsize=9)
        for part, section, count in zip(parts, sections, rows, strict=True):
            part.suptitle(section.title, x=0.01, ha="left", fontsize=11, color=PICTURE.ink)
            places = part.subplots(count, COLUMNS, squeeze=False).flat
            for axes in places[len(section.panels) :]:
                axes.set_axis_off()
            for axes, panel in zip(places, section.panels, strict=False):
                draw_panel(axes, panel, PICTURE, last)
                axes.set_title(panel.title, fontsize=9, loc="left", color=PICTURE.ink)
                if section.name == "truth":
                    axes.legend(
                        handles=_handles((line.slot, line.name) for line in panel.lines), frameon=False, fontsize=7.5
                    )
        save_figure(figure, path)


def draw_panel(axes: Axes, panel: Panel, theme: Theme, last: int) -> None:
    """Draw the curves of a panel with their intervals, and a triangle above each alarm.

    The axis ends at the update `last`, the same for all panels of a report.
    """
    style_axes(axes, theme)
    for line in panel.lines:
        colour, style, marker = _look(line.slot, theme)
        every = len(line.updates) // MARKERS if len(line.updates) >= MARKED else 1
        axes.plot(
            line.updates,
            line.mean,
            color=colour,
            linestyle=style,
            linewidth=1.5,
            marker=marker,
            markevery=((every // len(LINES)) * ((line.slot or 0) % len(LINES)), every),  # not on top of each other
            markersize=5,
            markeredgecolor=theme.paper,
            markeredgewidth=0.6,
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.updates, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    for mark in panel.marks:
        colour, *_ = _look(mark.slot, theme)
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 10}
        axes.plot([mark.update], [1.03], marker="v", markersize=8, color=colour, markeredgecolor=theme.paper, **place)
    ends = [end for line in panel.lines for end in (line.mean, line.low, line.high) if end is not None]
    low, high = min(end.min() for end in ends), max(end.max() for end in ends)
    size = max(abs(low), abs(high))
    margin = MARGIN * (high - low) if high - low > FLAT * size else FLAT_MARGIN * max(size, 0.5)
    axes.set(xlim=(0, 1.02 * last), ylim=(low - margin, high + margin))
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=TICKS)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    top = max(map(abs, axes.get_ylim()))
    step = (axes.get_ylim()[1] - axes.get_ylim()[0]) / TICKS
    digits = max(4, math.ceil(math.log10(top / step)) + 2)  # enough that no two ticks look the same
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.{digits}g}")
    axes.set_xlabel("Update", fontsize=9)
    axes.tick_params(labelsize=9)


def describe(panel: Panel) -> str:
    """What a panel shows, in words, for screen readers.

    Example:
        >>> import numpy as np
        >>> from fractal_rm.report.training_curves import Mark
        >>> line = Line("dense", 0, np.array([1, 9]), np.array([0.5, 0.75]), 1, None, None)
        >>> describe(Panel("Outcome", ("reward",), [line], [Mark(0, 7)]))
        'Outcome against updates: dense from 0.500 at update 1 to 0.750 at update 9. Alarms at update 7.'
    """
    lines = [
        f"{line.name} from {format_number(float(line.mean[0]))} at update {line.updates[0]:,} to {_last(line)} at "
        f"update {line.updates[-1]:,}"
        for line in panel.lines
    ]
    alarms = ", ".join(f"{update:,}" for update in sorted({mark.update for mark in panel.marks}))
    return f"{panel.title} against updates: {'; '.join(lines)}.{f' Alarms at update {alarms}.' if alarms else ''}"


def _plots(section: Section, last: int) -> list[tuple[Panel, Markup]]:
    """The panels of a section, each with its `<svg>`; a single panel has one for wide pages and one for phones."""
    if len(section.panels) == 1:
        wide, phone = (_plot(section, 0, last, width, css) for width, css in ((2 * WIDTH, "wide"), (WIDTH, "phone")))
        return [(section.panels[0], wide + phone)]
    return [(panel, _plot(section, number, last)) for number, panel in enumerate(section.panels)]


def _plot(section: Section, number: int, last: int, width: float = WIDTH, css: str = "any") -> Markup:
    """A panel as an `<svg>` in an element of a class of the style sheet."""
    panel = section.panels[number]
    with new_figure(width, HEIGHT) as figure:
        draw_panel(figure.add_subplot(), panel, PAGE, last)
        svg = Markup(to_svg(figure, f"{section.name}-{number + 1}-{css}", describe(panel)))
    return Markup('<div class="{}">{}</div>').format(css, svg)


def _look(slot: int | None, theme: Theme) -> tuple[str, Literal["-", "--"], str]:
    """Colour, dashes and marker: no two of sixteen lines look the same, and the first four differ without colour."""
    if slot is None:
        return theme.ink, "--", ""
    return theme.series[slot % len(theme.series)], "-", LINES[(slot + slot // len(LINES)) % len(LINES)][1]


def _css_look(slot: int) -> tuple[str, str]:
    colour, _, marker = _look(slot, PAGE)
    return PAGE_CSS[colour], SHAPES[marker]


def _handles(names: Iterable[tuple[int | None, str]]) -> list[Line2D]:
    """Samples of lines for a picture's legend."""
    from matplotlib.lines import Line2D

    handles = []
    for slot, name in names:
        colour, style, marker = _look(slot, PICTURE)
        label = f" {name}"  # matplotlib before 3.10 leaves out `_name`
        handles.append(Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=4.5, label=label))
    return handles


def _last(line: Line) -> str:
    """The last value of a line, with its interval."""
    value = format_number(float(line.mean[-1]))
    if line.low is None or line.high is None:
        return value
    return f"{value} [{format_number(float(line.low[-1]))}, {format_number(float(line.high[-1]))}]"


def _last_table(sections: Sequence[Section], names: Sequence[str]) -> Table:
    """The last value of every line: one row per panel, one column per group."""
    cells = []
    for section in sections:
        for panel in section.panels if section.name != "truth" else ():
            last = {line.name: _last(line) for line in panel.lines}
            cells.append([panel.title, *(last.get(name, MISSING) for name in names)])
    return Table(["last value", *names], cells, len(names))


def _runs_table(runs: Sequence[Run]) -> Table:
    cells = [[run.name, run.folder, run.file, format_number(run.last_update)] for run in runs]
    return Table(["name", "run", "read from", "updates"], cells, 1)
