"""The page that `fractal-rm quickstart` ends with: what was learned, how fast, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fractal_rm.evaluation.statistics import expected_calibration_error
from fractal_rm.report.drawing import Curve
from fractal_rm.report.pages import response_view, write_page
from fractal_rm.report.plots import calibration_plot, learning_curves
from fractal_rm.report.tables import tabulate

ARM = "dense+outcome"
BASELINE = "outcome"


@dataclass(frozen=True)
class QuickstartReport:
    """All that the report shows; empty parts are left out of the page.

    Attributes:
        title: Heading of the page.
        seed: Seed of the run.
        budget: Its budget, `small` or `full`.
        seconds: How long it took.
        headlines: The numbers to read first, four at best: what it is, how it reads, what to compare it with.
        curves: For each arm its pairs of rollouts and held-out accuracy in [0, 1].
        findings: What the curves say, one sentence each; `compare_curves` writes them.
        examples: Scored responses, as `write_viewer` takes them, with `gold` in their steps.
        probs: Predicted probability that each held-out response is good.
        labels: Labels of these responses.
        rows: The run's rows of `results.jsonl`.
        next_commands: What to go on with: the command, and what it does.

    Raises:
        ValueError: If there are not as many labels as probabilities.
    """

    title: str
    seed: int
    budget: str
    seconds: float
    headlines: Sequence[tuple[str, str, str]] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    findings: Sequence[str] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    probs: Sequence[float] = ()
    labels: Sequence[float] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    next_commands: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        if len(self.probs) != len(self.labels):
            raise ValueError(
                f"The report was given {len(self.probs)} probabilities and {len(self.labels)} labels for calibration. "
                "Pass one of each for every held-out response."
            )


def write_report(path: str | Path, report: QuickstartReport) -> None:
    """Write the report as one HTML page that needs nothing but a browser.

    Args:
        path: Where to write the page.
        report: What to show.

    Raises:
        ImportError: If matplotlib is not installed and there is something to plot.
        OSError: If the page cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> page = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(page, QuickstartReport("Quickstart", seed=0, budget="small", seconds=372.0))
        >>> "6 min 12 s" in page.read_text(encoding="utf-8")
        True
    """
    responses = [response_view(row, number) for number, row in enumerate(report.examples, start=1)]
    scored = [response for response in responses if response.steps]
    good = [response for response in scored if response.label is not None and response.label >= 0.5]
    bad = [response for response in scored if response not in good]
    plots = {}
    if report.curves:
        baseline = BASELINE if BASELINE in report.curves and len(report.curves) > 1 else None
        plots["curves"] = Markup(learning_curves(report.curves, baseline=baseline))
    if len(report.probs):
        plots["calibration"] = Markup(calibration_plot(report.probs, report.labels))
    write_page(
        path,
        "quickstart.html.j2",
        title=report.title,
        report=report,
        duration=_duration(report.seconds),
        curves=plots.get("curves"),
        calibration=plots.get("calibration"),
        calibration_error=expected_calibration_error(report.probs, report.labels) if len(report.probs) else None,
        sides=[(name, side) for name, side in (("right answer", good), ("wrong answer", bad)) if side],
        longest=max((len(response.steps) for response in scored), default=0),
        responses=responses,
        any_gold=any(response.judged for response in responses),
        table=tabulate(report.rows) if report.rows else None,
        origin=_origin(report.rows[0]) if report.rows else "",
    )


def rollouts_to_reach(curve: Curve, accuracy: float) -> float | None:
    """Rollouts after which a learning curve first stands at an accuracy; measured points only, nothing in between.

    Args:
        curve: Pairs of rollouts and accuracy, in any order.
        accuracy: The accuracy to reach.

    Returns:
        The rollouts, or None if the curve stays below.

    Example:
        >>> rollouts_to_reach([(0, 0.5), (512, 0.7), (1024, 0.8)], 0.7)
        512
    """
    return next((rollouts for rollouts, reached in sorted(curve) if reached >= accuracy), None)


def compare_curves(curves: Mapping[str, Curve], *, arm: str = ARM, baseline: str = BASELINE) -> list[str]:
    """Say in sentences what two learning curves show, in favour of the arm or not.

    Args:
        curves: For each arm its pairs of rollouts and accuracy in [0, 1].
        arm: The arm in question.
        baseline: The arm it is compared with.

    Returns:
        Whether and when the arm reached the baseline's final accuracy, then how far each ended below its best.

    Raises:
        ValueError: If one of the two arms has no points.

    Example:
        >>> curves = {"outcome": [(0, 0.5), (1024, 0.8)], "dense+outcome": [(0, 0.5), (512, 0.8), (1024, 0.9)]}
        >>> for sentence in compare_curves(curves):
        ...     print(sentence)
        dense+outcome reached the final accuracy of outcome (80.0%) after 512 rollouts; outcome needed 1,024.
        dense+outcome ended at its best, 90.0%, 10.0 points above outcome.
        outcome ended at its best, 80.0%.
    """
    missing = [name for name in (arm, baseline) if not curves.get(name)]
    if missing:
        raise ValueError(f"The arm {missing[0]!r} has no learning curve to compare. Choose from {list(curves)}.")
    final = max(curves[baseline])[1]
    own, others = rollouts_to_reach(curves[arm], final), rollouts_to_reach(curves[baseline], final)
    target = f"the final accuracy of {baseline} ({final:.1%})"
    if own is None:
        first = f"{arm} did not reach {target} within {max(curves[arm])[0]:,} rollouts."
    else:
        first = f"{arm} reached {target} after {own:,} rollouts; {baseline} needed {others:,}."
    difference = 100 * (max(curves[arm])[1] - final)
    compared = f", {abs(difference):.1f} points {'above' if difference >= 0 else 'below'} {baseline}"
    return [first, _ending(arm, curves[arm], compared), _ending(baseline, curves[baseline], "")]


def _ending(arm: str, curve: Curve, compared: str) -> str:
    best, final = max(accuracy for _, accuracy in curve), max(curve)[1]
    if final == best:
        return f"{arm} ended at its best, {final:.1%}{compared}."
    when = rollouts_to_reach(curve, best)
    return f"{arm} ended at {final:.1%}{compared}; its best was {best:.1%}, after {when:,} rollouts."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _origin(row: Mapping[str, Any]) -> str:
    """Where a row comes from: its command, commit, versions and machine, as far as it tells."""
    commit, _, dirty = (row.get("commit") or "").partition("-")
    machine = row.get("machine") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (row.get("versions") or {}).items() if version)
    parts = [
        row.get("command") and f"Written by {row['command']}",
        commit and f"commit {commit[:12]}{' with changes' if dirty else ''}",
        versions,
        machine.get("cores") and f"{machine['cores']} cores of {machine.get('cpu')}",
        machine.get("gpu"),
        row.get("finished_at"),
    ]
    return "; ".join(part for part in parts if part) + "."
