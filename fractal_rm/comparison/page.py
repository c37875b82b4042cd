"""Tables and figure of the comparison, from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fractal_rm.comparison.arms import ARMS, CEILING, OUTCOME_ONLY
from fractal_rm.comparison.rows import Rows, latest
from fractal_rm.comparison.settings import SETTINGS
from fractal_rm.comparison.statistics import (
    Curves,
    area,
    claims,
    compare_arm,
    curves,
    interquartile_mean,
    largest_fall,
)
from fractal_rm.metrics import PairedDifference, interval_of_mean
from fractal_rm.report.drawing import PICTURE, new_figure, style_axes, to_bytes
from fractal_rm.report.tables import MISSING, format_number

# What `StepPPOConfig` does as it comes, with a reward model and a checker.
DEFAULT = "fractal_mix"
DEFAULT_ARMS = (DEFAULT, "fractal", "fractal_online")
DRAWN = (DEFAULT, *OUTCOME_ONLY, CEILING)
NOTHING = "No rows yet."
UNDECIDED = "No setting has the five seeds yet that an interval takes."


def tables(rows: Rows) -> dict[str, str]:
    """Each table of the page by its name; a table without rows says so."""
    return {
        "summary": _summary(rows),
        "claims": _claims(rows),
        "gains": _gains(rows),
        "accuracy": _by_setting(rows, _end_accuracy),
        "area": _by_setting(rows, lambda found: interquartile_mean(area(found.rollouts, found.values))),
        "greedy": _by_setting(rows, _end_accuracy, metric="accuracy_greedy"),
        "step_accuracy": _by_setting(rows, _end_accuracy, metric="step_accuracy"),
        "equal_cost": _equal_cost(rows),
        "cost": _cost(rows),
        "hacking": _hacking(rows),
    }


def present(rows: Rows) -> tuple[list[str], list[str]]:
    """Settings and arms that have rows, in their own order."""
    known = {(row["dataset"], row["arm"]) for row in latest(rows)}
    return (
        [name for name in SETTINGS if any(setting == name for setting, _ in known)],
        [name for name in ARMS if any(arm == name for _, arm in known)],
    )


def _lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
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


def _claims(rows: Rows) -> str:
    body = []
    for arm in DEFAULT_ARMS:
        for claim in claims(rows, arm):
            if claim.known:
                state = "**met**" if claim.state == "met" else claim.state
                holds = ", ".join(claim.holds) or MISSING
                body.append(
                    [arm, claim.text, str(claim.asked), f"{len(claim.holds)} of {len(claim.known)}", state, holds]
                )
    if rows and not body:
        return UNDECIDED
    return _lines(["arm", "claim", "settings asked", "settings met", "state", "where"], body)


def _summary(rows: Rows) -> str:
    """What a reader wants first: a line a setting, the default arm against the better outcome-only one."""
    body = []
    for setting in present(rows)[0]:
        found, supervised = compare_arm(rows, setting, DEFAULT), curves(rows, setting, CEILING)
        if found is not None:
            ceiling = MISSING if supervised is None else f"{100 * _end_accuracy(supervised):.1f}"
            if supervised is not None and len(supervised.seeds) != found.seeds:
                ceiling += f" (seeds: {len(supervised.seeds)})"
            reach = f"{found.reach:.0%}" if np.isfinite(found.reach) else "never"
            body.append([
                setting, str(found.seeds), *(f"{100 * value:.1f}" for value in reversed(found.iqm)), ceiling,
                _points(found.half), _points(found.end), reach,
            ])  # fmt: skip
    header = [
        "setting", "seeds", "outcome only", DEFAULT, CEILING, "gain half-way", "gain at the end",
        "rollouts to reach outcome-only's end",
    ]  # fmt: skip
    return _lines(header, body)


def _gains(rows: Rows) -> str:
    body = []
    for setting in present(rows)[0]:
        for arm in DEFAULT_ARMS:
            found = compare_arm(rows, setting, arm)
            if found is not None:
                reach = f"{found.reach:.2f}" if np.isfinite(found.reach) else "never"
                body.append([
                    setting, arm, found.rival, str(found.seeds), format_number(int(found.half_rollouts)),
                    _points(found.half), _points(found.end), _points(found.area), f"{found.improvement:.2f}", reach,
                    _points(found.ceiling), f"{100 * found.drop:.1f}",
                ])  # fmt: skip
    header = [
        "setting", "arm", "better outcome-only arm", "seeds", "rollouts at half of its gain", "difference there",
        "difference at the end", "difference of areas", "P(better)", "share of rollouts to reach its end",
        "to supervised steps", "largest fall of a run",
    ]  # fmt: skip
    return _lines(header, body)


def _equal_cost(rows: Rows) -> str:
    body = []
    for setting in present(rows)[0]:
        for arm in DEFAULT_ARMS:
            found, ours = compare_arm(rows, setting, arm), curves(rows, setting, arm)
            if found is not None and ours is not None:
                body.append([
                    setting, arm, format_number(int(ours.rm_rollouts)), f"{ours.rm_seconds:.0f}",
                    _points(found.end), _points(found.longer), _points(found.with_rollouts),
                    _points(found.with_seconds),
                ])  # fmt: skip
    header = [
        "setting", "arm", "rollouts of the reward model", "its seconds", "at equal rollouts",
        "outcome-only has those too", "our arm has those less", "at equal seconds, those included",
    ]  # fmt: skip
    return _lines(header, body)


def _end_accuracy(found: Curves) -> float:
    return interquartile_mean(found.values[:, -1])


def _by_setting(rows: Rows, value: Any, *, metric: str = "accuracy") -> str:
    """A line an arm, a column a setting, the number of seeds behind a value."""
    settings, arms = present(rows)
    body = []
    for arm in arms:
        found = [curves(rows, setting, arm, metric) for setting in settings]
        if any(one is not None for one in found):
            cells = [MISSING if one is None else f"{value(one):.3f} ({len(one.seeds)})" for one in found]
            body.append([arm, *cells])
    return _lines(["arm", *settings], body)


def _cost(rows: Rows) -> str:
    """Processor seconds of a run's training, of its reward model, and tokens a response has at the end."""
    body = []
    for setting in present(rows)[0]:
        for arm in present(rows)[1]:
            found = curves(rows, setting, arm, "response_tokens")
            kl = curves(rows, setting, arm, "kl")
            if found is not None and kl is not None:
                body.append([
                    setting, arm, format_number(int(found.rollouts[-1])), f"{found.seconds[-1]:.0f}",
                    format_number(int(found.rm_rollouts)), f"{found.rm_seconds:.0f}",
                    f"{found.values[:, -1].mean():.1f}", f"{kl.values[:, -1].mean():.2f}",
                ])  # fmt: skip
    header = [
        "setting", "arm", "rollouts", "seconds", "rollouts of the reward model", "its seconds", "tokens a response",
        "KL a response, nats",
    ]  # fmt: skip
    return _lines(header, body)


def _hacking(rows: Rows) -> str:
    """What the reward model thinks of held-out responses, less their accuracy, at the start and at the end."""
    body = []
    for setting in present(rows)[0]:
        for arm in present(rows)[1]:
            score, truth = curves(rows, setting, arm, "rm_score"), curves(rows, setting, arm)
            alarms = curves(rows, setting, arm, "alarms")
            if score is None or truth is None or alarms is None:
                continue
            gaps = score.values.mean(axis=0)[[0, -1]] - truth.values.mean(axis=0)[[0, -1]]
            body.append([
                setting, arm, f"{gaps[0]:+.3f}", f"{gaps[1]:+.3f}", f"{100 * largest_fall(truth.values):.1f}",
                f"{alarms.values[:, -1].mean():.1f}",
            ])  # fmt: skip
    header = ["setting", "arm", "score - accuracy, start", "score - accuracy, end", "largest fall", "alarms a run"]
    return _lines(header, body)


def draw_curves(path: Path, rows: Rows) -> bool:
    """Learning curves with intervals, a panel a setting.

    Returns:
        Whether there was anything to draw.
    """
    settings = [name for name in present(rows)[0] if any(curves(rows, name, arm) is not None for arm in DRAWN)]
    if not settings:
        return False
    columns = min(3, len(settings))
    height = -(-len(settings) // columns)
    with new_figure(3.6 * columns, 2.8 * height) as figure:
        for number, setting in enumerate(settings, 1):
            axes = figure.add_subplot(height, columns, number)
            style_axes(axes, PICTURE)
            for colour, arm in zip(PICTURE.series, DRAWN, strict=True):
                found = curves(rows, setting, arm)
                if found is None:
                    continue
                low, high = interval_of_mean(found.values)
                axes.plot(found.rollouts, found.values.mean(axis=0), color=colour, linewidth=1.6, label=arm)
                axes.fill_between(found.rollouts, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_title(setting, fontsize=9, color=PICTURE.ink)
            if number == 1:
                axes.legend(fontsize=7, frameon=False)
        figure.supxlabel("rollouts", fontsize=9, color=PICTURE.muted)
        figure.supylabel("held-out accuracy", fontsize=9, color=PICTURE.muted)
        path.write_bytes(to_bytes(figure, "png"))
    return True


def chosen_table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """What the tuning chose for each arm."""
    body = [[arm, ", ".join(f"{key}={value}" for key, value in chosen[arm].items())] for arm in ARMS if arm in chosen]
    return _lines(["arm", "settings"], body).replace("---:|", "---|")
