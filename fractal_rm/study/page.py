"""Tables and figure of the comparison, from its rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fractal_rm.evaluation.intervals import Estimate, interval_of_mean
from fractal_rm.report.drawing import PICTURE, new_figure, save_figure, style_axes
from fractal_rm.report.tables import MISSING, format_number
from fractal_rm.study.arms import ARMS, CEILING, OUTCOME_ONLY
from fractal_rm.study.statistics import Curves, Rows, Runs, comparisons, curves, finished_runs, interquartile_mean
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS

# The defaults of `StepPPOConfig` with a reward model and a checker, except that step scores are centred over the batch.
DEFAULT = "fractal_mix"
DRAWN = (DEFAULT, *OUTCOME_ONLY, CEILING)
NOTHING = "No rows yet."
COLUMNS = 2  # of panels: more are too small to read on a page 700 pixels wide


def tables(rows: Rows, arms: Mapping[str, Any] = ARMS) -> dict[str, str]:
    """Each table by its name, with the arms in order; a table without rows says so."""
    runs = finished_runs(rows)
    return {
        "Against the better outcome-only arm": _gains(runs, [name for name in arms if name not in OUTCOME_ONLY]),
        "Accuracy at the end": by_setting(runs, arms, lambda name, arm: iqm(curves(runs, name, arm), end, 3)),
    }


def sentences(rows: Rows) -> list[str]:
    """What the default arm gains over the better outcome-only one, one line per setting."""
    return [
        f"{setting}: accuracy at the end, {DEFAULT} minus {one.rival}: {points(one.end).replace('*', '')} points "
        f"(seeds: {one.seeds})."
        for setting, one in comparisons(finished_runs(rows), DEFAULT).items()
    ]


def _gains(runs: Runs, arms: Sequence[str]) -> str:
    found = {arm: comparisons(runs, arm) for arm in arms}
    body = [
        [
            setting, arm, one.rival, str(one.seeds), *(f"{100 * value:.1f}" for value in one.means),
            format_number(int(one.half_rollouts)), points(one.half), points(one.end),
        ]
        for setting in CONDITIONS for arm in arms if (one := found[arm].get(setting)) is not None
    ]  # fmt: skip
    header = [
        "setting", "arm", "better outcome-only arm", "seeds", "ours at the end", "its end",
        "rollouts at half of its gain", "difference there", "difference at the end",
    ]  # fmt: skip
    return table_lines(header, body)


def table_lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table of texts, all columns but the first aligned right."""
    if not body:
        return NOTHING
    rule = f"|---|{'---:|' * (len(header) - 1)}"
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in body)])


def points(found: Estimate | None) -> str:
    """A difference in points of accuracy with its interval, if it has one; bold if the interval is above 0."""
    if found is None:
        return MISSING
    value = f"{100 * found.value:+.1f}"
    if np.isnan(found.low):
        return value
    return f"{f'**{value}**' if found.low > 0 else value} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def by_setting(runs: Runs, arms: Mapping[str, Any], cell: Callable[[str, str], str]) -> str:
    """One line per arm and one column per setting with finished runs; arms without a value are left out."""
    settings = [name for name in CONDITIONS if any(setting == name for setting, _ in runs)]
    body = [[arm, *(cell(setting, arm) for setting in settings)] for arm in arms if any(arm == one for _, one in runs)]
    return table_lines(["arm", *settings], [line for line in body if set(line[1:]) != {MISSING}])


def end(found: Curves) -> np.ndarray:
    """The last value of each run."""
    return found.values[:, -1]


def iqm(found: Curves | None, value: Callable[[Curves], Any], digits: int) -> str:
    """Interquartile mean of a value of each run, and the number of runs."""
    return MISSING if found is None else f"{interquartile_mean(value(found)):.{digits}f} ({len(found.seeds)})"


def band(axes: Any, colour: str, truth: Curves, score: Curves | None) -> None:
    """Draw the interval of a mean curve."""
    low, high = interval_of_mean(truth.values)
    axes.fill_between(truth.rollouts, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_curves(
    path: Path,
    rows: Rows,
    arms: Sequence[str] = DRAWN,
    label: str = "held-out accuracy",
    *,
    along: tuple[str, Callable[[Curves], np.ndarray]] = ("rollouts", lambda one: one.rollouts),
    beside: Callable[[Any, str, Curves, Curves | None], None] = band,
) -> bool:
    """Draw learning curves, the mean accuracy of arms with one panel per setting; returns whether there were any.

    `along` has the label and values of the horizontal axis; `beside` draws next to each curve, by default its interval.
    """
    runs = finished_runs(rows)
    settings = [name for name in CONDITIONS if any(curves(runs, name, arm) is not None for arm in arms)]
    if not settings:
        return False
    columns = min(COLUMNS, len(settings))
    height = -(-len(settings) // columns)
    with new_figure(3.6 * columns, 2.8 * height) as figure:
        for number, setting in enumerate(settings, 1):
            axes = figure.add_subplot(height, columns, number)
            style_axes(axes, PICTURE)
            for colour, arm in zip(PICTURE.series, arms, strict=True):
                truth = curves(runs, setting, arm)
                if truth is not None:
                    axes.plot(along[1](truth), truth.values.mean(axis=0), color=colour, linewidth=1.6, label=arm)
                    beside(axes, colour, truth, curves(runs, setting, arm, "rm_score"))
            axes.set_title(setting, fontsize=9, color=PICTURE.ink)
        # An arm may be missing on some settings.
        lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        named = [lines[arm] for arm in arms if arm in lines]
        figure.legend(handles=named, loc="outside upper center", ncols=2 * columns, fontsize=8.5, frameon=False)
        figure.supxlabel(along[0], fontsize=9, color=PICTURE.muted)
        figure.supylabel(label, fontsize=9, color=PICTURE.muted)
        save_figure(figure, path)
    return True
