"""Tables and figure of the comparison, from its rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fractal_rm.evaluation.statistics import PairedDifference, interval_of_mean
from fractal_rm.report.drawing import PICTURE, new_figure, style_axes, to_bytes
from fractal_rm.report.tables import MISSING, format_number
from fractal_rm.study.arms import ARMS, CEILING, OUTCOME_ONLY
from fractal_rm.study.claims import claims
from fractal_rm.study.statistics import (
    Comparison,
    Curves,
    Rows,
    Runs,
    area,
    area_difference,
    comparisons,
    curves,
    end_difference,
    finished_runs,
    interquartile_mean,
    largest_fall,
)
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS

# What `StepPPOConfig` does as it comes, with a reward model and a checker.
DEFAULT = "fractal_mix"
DEFAULT_ARMS = (DEFAULT, f"{DEFAULT}_own_rate", "fractal", "fractal_online")
DRAWN = (DEFAULT, *OUTCOME_ONLY, CEILING)
# The arm that the others vary or rival, paired seed by seed.
REFERENCE = "fractal"
# Shares of the rollouts at which a table shows the accuracy: after 10, 20 and 40 updates of the study.
PROGRESS = (0.25, 0.5, 1.0)
# What `comparisons` says of arms.
Found = Mapping[str, Mapping[str, Comparison]]
NOTHING = "No rows yet."
UNDECIDED = "No setting has the five seeds yet that an interval takes."


def tables(rows: Rows) -> dict[str, str]:
    """Each table of the page by its name; a table without rows says so."""
    runs = finished_runs(rows)
    found = {arm: comparisons(runs, arm) for arm in DEFAULT_ARMS}

    def shown(cell: Callable[[str, str], str]) -> str:
        return _by_setting(runs, cell)

    def end(metric: str, digits: int = 3) -> str:
        return shown(lambda setting, arm: _of(curves(runs, setting, arm, metric), _end, digits))

    def area_of(setting: str, arm: str) -> str:
        return _of(curves(runs, setting, arm), lambda one: area(one.rollouts, one.values), 3)

    def against(difference: Callable[[Curves | None, Curves | None], PairedDifference | None]) -> str:
        return shown(lambda setting, arm: _against(runs, setting, arm, difference))

    def gap(setting: str, arm: str) -> str:
        return _gaps(curves(runs, setting, arm, "rm_score"), curves(runs, setting, arm))

    def fall(setting: str, arm: str) -> str:
        return _falls(curves(runs, setting, arm), curves(runs, setting, arm, "alarms"))

    return {
        "summary": _summary(runs, found[DEFAULT]),
        "claims": _claims(runs, found),
        "gains": _gains(found),
        "accuracy": end("accuracy"),
        "progress": shown(lambda setting, arm: _progress(curves(runs, setting, arm))),
        "area": shown(area_of),
        "greedy": end("accuracy_greedy"),
        "step_accuracy": end("step_accuracy"),
        "against": against(end_difference),
        "against_area": against(area_difference),
        "equal_cost": _equal_cost(runs, found),
        "cost": shown(lambda setting, arm: _seconds(curves(runs, setting, arm))),
        "length": end("response_tokens", 1),
        "kl": end("kl", 1),
        "hacking": shown(gap),
        "falls": shown(fall),
    }


def present(runs: Runs) -> tuple[list[str], list[str]]:
    """Settings and arms that have finished runs, in their own order."""
    settings, arms = {setting for setting, _ in runs}, {arm for _, arm in runs}
    return [name for name in CONDITIONS if name in settings], [name for name in ARMS if name in arms]


def table_lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    if not body:
        return NOTHING
    rule = f"|---|{'---:|' * (len(header) - 1)}"
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in body)])


def _points(found: PairedDifference | None) -> str:
    """A difference in points of accuracy with its interval, if it has one; bold where the interval is above 0."""
    if found is None:
        return MISSING
    value = f"{100 * found.difference:+.1f}"
    if np.isnan(found.low):
        return value
    return f"{f'**{value}**' if found.low > 0 else value} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _share(found: PairedDifference) -> str:
    """A share of rollouts with its interval, if it has one."""
    if np.isnan(found.low):
        return _percent(found.difference)
    return f"{_percent(found.difference)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(share: float) -> str:
    return f"{share:.0%}" if np.isfinite(share) else "never"


def _claims(runs: Runs, found: Found) -> str:
    body = []
    for arm, by_setting in found.items():
        for claim in claims(by_setting):
            if claim.known:
                state = "**met**" if claim.state == "met" else claim.state
                learning = sum(name in claim.learning for name in claim.holds)
                body.append([
                    arm, claim.text, str(claim.asked), f"{len(claim.holds)} of {len(claim.known)}", state,
                    f"{learning} of {len(claim.learning)}", ", ".join(claim.holds) or MISSING,
                ])  # fmt: skip
    if runs and not body:
        return UNDECIDED
    header = ["arm", "claim", "settings asked", "settings met", "state", "met where outcome-only learns", "where"]
    return table_lines(header, body)


def _summary(runs: Runs, by_setting: Mapping[str, Comparison]) -> str:
    """What a reader wants first: a line a setting, the default arm against the better outcome-only one."""
    body = []
    for setting, found in by_setting.items():
        supervised = curves(runs, setting, CEILING)
        ceiling = MISSING if supervised is None else f"{100 * supervised.values[:, -1].mean():.1f}"
        if supervised is not None and len(supervised.seeds) != found.seeds:
            ceiling += f" (seeds: {len(supervised.seeds)})"
        body.append([
            setting, str(found.seeds), *(f"{100 * value:.1f}" for value in reversed(found.means)), ceiling,
            _points(found.half), _points(found.end), _percent(found.reach.difference) if found.learns else MISSING,
        ])  # fmt: skip
    header = [
        "setting", "seeds", "outcome only", DEFAULT, CEILING, "gain half-way", "gain at the end",
        "rollouts to reach outcome-only's end",
    ]  # fmt: skip
    return table_lines(header, body)


def _lines_of(found: Found) -> list[tuple[str, str, Comparison]]:
    """Setting, arm and comparison, setting by setting."""
    return [(name, arm, found[arm][name]) for name in CONDITIONS for arm in found if name in found[arm]]


def _gains(found: Found) -> str:
    body = [
        [
            setting, arm, one.rival, str(one.seeds), format_number(int(one.half_rollouts)), _points(one.half),
            _points(one.end), _points(one.area), f"{one.improvement:.2f}",
            _share(one.reach) if one.learns else MISSING, _points(one.ceiling), f"{100 * one.drop:.1f}",
        ]
        for setting, arm, one in _lines_of(found)
    ]  # fmt: skip
    header = [
        "setting", "arm", "better outcome-only arm", "seeds", "rollouts at half of its gain", "difference there",
        "difference at the end", "difference of areas", "P(better)", "share of rollouts to reach its end",
        "to supervised steps", "largest fall of a run",
    ]  # fmt: skip
    return table_lines(header, body)


def _equal_cost(runs: Runs, found: Found) -> str:
    body = []
    for setting, arm, one in _lines_of(found):
        ours, theirs = curves(runs, setting, arm), curves(runs, setting, one.rival)
        if ours is not None and theirs is not None:
            seconds = (ours.rm_seconds, ours.seconds[-1], theirs.seconds[-1])
            body.append([
                setting, arm, format_number(int(ours.rm_rollouts)), *(f"{value:.0f}" for value in seconds),
                _points(one.end), _points(one.longer), _points(one.with_rollouts), _points(one.with_seconds),
            ])  # fmt: skip
    header = [
        "setting", "arm", "rollouts of the reward model", "its seconds", "seconds of our run",
        "seconds of outcome-only", "at equal rollouts", "outcome-only has those rollouts too",
        "our arm has those less", "outcome-only has all those seconds",
    ]  # fmt: skip
    return table_lines(header, body)


def _by_setting(runs: Runs, cell: Callable[[str, str], str]) -> str:
    """A line an arm, a column a setting; arms without a value are left out."""
    settings, arms = present(runs)
    body = [[arm, *(cell(setting, arm) for setting in settings)] for arm in arms]
    return table_lines(["arm", *settings], [line for line in body if set(line[1:]) != {MISSING}])


def _end(found: Curves) -> np.ndarray:
    return found.values[:, -1]


def _of(found: Curves | None, value: Callable[[Curves], Any], digits: int) -> str:
    """Interquartile mean of a value of each run, and how many runs there are."""
    return MISSING if found is None else f"{interquartile_mean(value(found)):.{digits}f} ({len(found.seeds)})"


def _against(
    runs: Runs,
    setting: str,
    arm: str,
    difference: Callable[[Curves | None, Curves | None], PairedDifference | None],
) -> str:
    """What an arm is better than the reference by, and how many seeds both have."""
    ours, theirs = (curves(runs, setting, name) for name in (arm, REFERENCE))
    found = difference(ours, theirs)
    if arm == REFERENCE or found is None or ours is None or theirs is None:
        return MISSING
    return f"{_points(found)} ({len(set(ours.seeds) & set(theirs.seeds))})"


def _progress(found: Curves | None) -> str:
    """Mean accuracy at shares of the rollouts."""
    if found is None:
        return MISSING
    shares = np.isin(found.rollouts, [share * found.rollouts[-1] for share in PROGRESS])
    return " / ".join(f"{value:.2f}" for value in found.values.mean(axis=0)[shares])


def _seconds(found: Curves | None) -> str:
    """Processor seconds of training, and those of the reward model and its responses."""
    if found is None:
        return MISSING
    return f"{found.seconds[-1]:.0f}" + (f" + {found.rm_seconds:.0f}" if found.rm_seconds else "")


def _gaps(score: Curves | None, truth: Curves | None) -> str:
    """What the reward model thinks of held-out responses, less their accuracy, at the start and at the end."""
    if score is None or truth is None:
        return MISSING
    gaps = score.values.mean(axis=0) - truth.values.mean(axis=0)
    return f"{gaps[0]:+.2f} to {gaps[-1]:+.2f}"


def _falls(truth: Curves | None, alarms: Curves | None) -> str:
    """Points that a run ends below its best, at most; alarms of a run, where there were any."""
    if truth is None or alarms is None:
        return MISSING
    raised = alarms.values[:, -1].mean()
    return f"{100 * largest_fall(truth.values):.1f}" + (f", {raised:.1f} alarms" if raised else "")


def draw_curves(path: Path, rows: Rows) -> bool:
    """Learning curves with intervals, a panel a setting.

    Returns:
        Whether there was anything to draw.
    """

    def band(axes: Any, colour: str, truth: Curves, score: Curves | None) -> None:
        low, high = interval_of_mean(truth.values)
        axes.fill_between(truth.rollouts, low, high, color=colour, alpha=0.15, linewidth=0)

    return draw_panels(path, rows, DRAWN, "held-out accuracy", beside=band)


def draw_panels(
    path: Path,
    rows: Rows,
    arms: Sequence[str],
    label: str,
    *,
    along: tuple[str, Callable[[Curves], np.ndarray]] = ("rollouts", lambda one: one.rollouts),
    beside: Callable[[Any, str, Curves, Curves | None], None] | None = None,
) -> bool:
    """Mean accuracy of arms along something, a panel a setting; `beside` adds to each curve, from it and its scores."""
    runs = finished_runs(rows)
    settings = [name for name in present(runs)[0] if any(curves(runs, name, arm) is not None for arm in arms)]
    if not settings:
        return False
    columns = min(3, len(settings))
    height = -(-len(settings) // columns)
    with new_figure(3.6 * columns, 2.8 * height) as figure:
        for number, setting in enumerate(settings, 1):
            axes = figure.add_subplot(height, columns, number)
            style_axes(axes, PICTURE)
            for colour, arm in zip(PICTURE.series, arms, strict=True):
                truth = curves(runs, setting, arm)
                if truth is not None:
                    axes.plot(along[1](truth), truth.values.mean(axis=0), color=colour, linewidth=1.6, label=arm)
                    if beside is not None:
                        beside(axes, colour, truth, curves(runs, setting, arm, "rm_score"))
            axes.set_title(setting, fontsize=9, color=PICTURE.ink)
        # An arm may be missing on some settings.
        lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        named = [lines[arm] for arm in arms if arm in lines]
        figure.axes[0].legend(handles=named, fontsize=7, frameon=False)
        figure.supxlabel(along[0], fontsize=9, color=PICTURE.muted)
        figure.supylabel(label, fontsize=9, color=PICTURE.muted)
        path.write_bytes(to_bytes(figure, "png"))
    return True
