"""Drawing of plots: colours on a page and on paper, axes, lines, the heat map, conversion to SVG.

Figures are made without pyplot, so none stays open and no state is shared. Text is drawn as paths: a page shows it
the same on every machine. matplotlib is imported inside the functions, since it comes with an optional extra.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fractal_rm.files import write_atomic
from fractal_rm.report.palette import ink_on, score_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: real ones for a picture, stand-ins for a page, which `to_svg` turns into CSS."""

    ink: str  # text
    muted: str  # axes, ticks and less important text
    rule: str  # grid lines
    paper: str  # the background
    series: tuple[str, ...]  # lines, one colour each


PICTURE = Theme("#1c1e21", "#5d636b", "#dcdcd6", "#ffffff", ("#5b3a8e", "#6f747b", "#0b7a5e", "#a35200"))
PAGE = Theme("#010101", "#020202", "#030303", "#040404", ("#050501", "#050502", "#050503", "#050504"))
PAGE_CSS = {
    PAGE.ink: "currentColor",
    PAGE.muted: f"var(--muted, {PICTURE.muted})",
    PAGE.rule: f"var(--rule, {PICTURE.rule})",
    PAGE.paper: f"var(--paper, {PICTURE.paper})",
    **{stand_in: f"var(--series-{index + 1}, {PICTURE.series[index]})" for index, stand_in in enumerate(PAGE.series)},
}
LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))  # distinguishable even without colour
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "svg.fonttype": "path",
    "svg.hashsalt": "fractal_rm",  # the same plot gives the same bytes
    "figure.constrained_layout.use": True,
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure (inches), to draw and save inside the `with` block, independent of the user's settings.

    Raises ImportError if matplotlib is not installed.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which is not installed: pip install "fractal-rm[plots]".') from error
    with matplotlib.style.context(["default", SETTINGS]):
        yield Figure(figsize=(width, height))


def style_axes(axes: Axes, theme: Theme) -> None:
    """Give axes the quiet look of all our plots."""
    axes.set_facecolor("none")
    axes.tick_params(color=theme.muted, labelcolor=theme.muted, labelsize=10, length=3)
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=theme.ink, fontsize=10.5)


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    theme: Theme,
    *,
    baseline: str | None,
    seeds: Mapping[str, Sequence[Curve]] | None = None,
) -> None:
    """Draw accuracy against rollouts, one line per arm, with its last value at its end.

    `curves` has pairs of rollouts and accuracy in [0, 1] by arm, and `seeds` the runs that a curve is the mean of,
    drawn as thin lines. The final accuracy of the arm `baseline` is a dotted line, from where another arm first reaches
    it.

    Raises ValueError if curves are missing, one is empty, or `baseline` is not an arm.
    """
    if not curves or not all(curves.values()):
        raise ValueError("There is no learning curve, or one without points. Pass at least one point for each arm.")
    if baseline is not None and baseline not in curves:
        raise ValueError(f"The baseline {baseline!r} has no learning curve. Choose from {list(curves)}.")
    style_axes(axes, theme)
    last = max(rollouts for curve in curves.values() for rollouts, _ in curve)
    thin = [(arm, curve) for arm, runs in (seeds or {}).items() for curve in runs]
    values = [accuracy for curve in (*curves.values(), *(curve for _, curve in thin)) for _, accuracy in curve]
    low, high = max(0.0, min(values) - 0.04), min(1.0, max(values) + 0.04)
    if baseline is not None:
        final = max(curves[baseline])[1]
        reached = [n for arm, curve in curves.items() if arm != baseline for n, accuracy in curve if accuracy >= final]
        axes.plot([min(reached, default=0), last], [final] * 2, color=theme.muted, linewidth=1.3, linestyle=(0, (1, 2)))
    for index, (arm, curve) in enumerate(curves.items()):
        line, marker = LINES[index % len(LINES)]
        axes.plot(
            *zip(*sorted(curve), strict=True),
            color=theme.series[index % len(theme.series)],
            linestyle=line,
            linewidth=2,
            marker=marker,
            markersize=5.5,
            markeredgecolor=theme.paper,
            markeredgewidth=0.8,
            label=arm,
            clip_on=False,
            zorder=10 - index,
        )
    for arm, curve in thin:
        colour = theme.series[list(curves).index(arm) % len(theme.series)]
        axes.plot(*zip(*sorted(curve), strict=True), color=colour, linewidth=0.8, alpha=0.45)
    height = -1.0  # of the last text, so that the next one above does not touch it
    for accuracy, index in sorted((max(curve)[1], index) for index, curve in enumerate(curves.values())):
        height = max(accuracy, height + 0.07 * (high - low))
        axes.annotate(
            f"{accuracy:.1%}",
            (last, height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=theme.series[index % len(theme.series)],
            annotation_clip=False,
        )
    axes.set(ylim=(low, high), xlim=(-0.02 * last, last or 1), xlabel="Rollouts", ylabel="Held-out accuracy")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=2,
        frameon=False,
        handlelength=2.8,
        fontsize=10.5,
        labelcolor=theme.ink,
    )


def draw_heat_map(axes: Axes, rows: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    """Draw one row of cells per response, one cell per step, with its score and a cross if the step is wrong.

    Scored responses come sorted, good labels first; their `steps` need `score` and may have `gold`.
    """
    from matplotlib.patches import Rectangle

    style_axes(axes, theme)
    axes.grid(visible=False)
    good = [is_good(row) for row in rows]
    tops = [index + 0.5 * (good[0] and not side) for index, side in enumerate(good)]
    for row, top in zip(rows, tops, strict=True):
        for column, step in enumerate(row["steps"]):
            colour = score_colour(step["score"])
            axes.add_patch(Rectangle((column, top), 0.96, 0.92, facecolor=colour, linewidth=0))
            wrong = step.get("gold") is not None and step["gold"] < 0.5
            text = f"{step['score']:.2f}{' ✗' if wrong else ''}"
            axes.text(column + 0.48, top + 0.48, text, ha="center", va="center", fontsize=7.5, color=ink_on(colour))
    for side, name in ((True, "right answer"), (False, "wrong answer")):
        mine = [top for top, is_mine in zip(tops, good, strict=True) if is_mine == side]
        if mine:
            middle = (mine[0] + mine[-1] + 0.92) / 2
            axes.text(-0.14, middle, name, rotation=90, ha="right", va="center", fontsize=10, color=theme.muted)
    width = max(len(row["steps"]) for row in rows)
    axes.set(xlim=(0, width), ylim=(tops[-1] + 0.92, 0), xlabel="Step", yticks=[])
    axes.set_xticks([column + 0.48 for column in range(width)], [str(column + 1) for column in range(width)])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("Step scores  (✗ marks a wrong step)", fontsize=10.5, loc="left", color=theme.ink)


def is_good(row: Mapping[str, Any]) -> bool:
    """Whether a scored response is labelled good: at least one half; an unknown label counts as bad.

    Example:
        >>> is_good({"label": 1}), is_good({"label": None})
        (True, False)
    """
    return (row.get("label") or 0) >= 0.5


def to_bytes(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """The content of a picture file, without time stamp and program name."""
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",))
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=200, metadata=metadata)
    return data.getvalue()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure inside its `with` block; the ending `.png` or `.svg` decides the format, others raise
    ValueError."""
    kind = Path(path).suffix[1:]
    if kind not in ("png", "svg"):
        raise ValueError(f"The picture cannot be named {Path(path).name!r}: end the name in .png or .svg.")
    write_atomic(path, to_bytes(figure, kind))


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Render a figure, drawn with the theme `PAGE`, as one `<svg>` element whose colours follow the page's mode.

    `name` prefixes every identifier, so that a page can hold several plots; screen readers read `description`.
    """
    figure.patch.set_visible(False)
    svg = to_bytes(figure, "svg").decode()
    svg = svg[svg.index("<svg") :].strip()
    for stand_in, css in PAGE_CSS.items():
        svg = svg.replace(stand_in, css)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
