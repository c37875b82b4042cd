"""The final page of `fractal-rm quickstart`: what was learned, how fast, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.results import read_results
from fractal_rm.evaluation.score_rows import score_rows
from fractal_rm.evaluation.statistics import expected_calibration_error
from fractal_rm.report.drawing import Curve
from fractal_rm.report.pages import response_view, write_page
from fractal_rm.report.plots import FEWEST_IN_BIN, calibration_plot, learning_curves
from fractal_rm.report.tables import tabulate
from fractal_rm.reward_model import StepRewardModel

ARM = "dense+outcome"
BASELINE = "outcome"
# Responses of each kind in the heat map: the first of the validation set, not chosen by hand.
EXAMPLES_OF_A_KIND = 6


@dataclass(frozen=True)
class QuickstartReport:
    """The contents of the report; empty parts are left out of the page."""

    title: str
    seed: int
    budget: str  # `small` or `full`
    seconds: float  # duration of the run
    # The numbers to read first, at most five: name, value, and what to compare it with.
    headlines: Sequence[tuple[str, str, str]] = ()
    # Pairs of rollouts and held-out accuracy in [0, 1], by arm.
    curves: Mapping[str, Curve] = field(default_factory=dict)
    findings: Sequence[str] = ()  # sentences from `compare_curves`
    # Scored responses, as `write_viewer` takes them, with `gold` in their steps.
    examples: Sequence[Mapping[str, Any]] = ()
    probs: Sequence[float] = ()  # predicted probability that each held-out response is good
    labels: Sequence[float] = ()
    rows: Sequence[Mapping[str, Any]] = ()  # of `results.jsonl`
    next_commands: Sequence[tuple[str, str]] = ()  # the command, and what it does


def summarize(folder: Path, arms: Sequence[str], seed: int, budget: str) -> QuickstartReport:
    """The contents of `report.html` from the folder of a finished run; arms: the dense one, then outcome-only."""
    rows = read_results(folder / "results.jsonl")
    curves: dict[str, list[tuple[float, float]]] = {}
    for arm in arms:
        points = json.loads((folder / "ppo" / arm / "curve.json").read_text(encoding="utf-8"))
        curves[arm] = [(point["rollouts"], point["accuracy"]) for point in points]
    reward_model = StepRewardModel.from_pretrained(folder / "reward_model", device="cpu")
    scored = score_rows(reward_model, read_jsonl(folder / "validation.jsonl"), source="validation")
    known: list[dict[str, Any]] = [
        record | {"id": f"validation-{record['row'] - 1}"} for record in scored if record["error"] is None
    ]
    return QuickstartReport(
        title="fractal_rm quickstart",
        seed=seed,
        budget=budget,
        seconds=sum(json.loads(file.read_text())["seconds"] for file in (folder / "done").glob("*.json")),
        headlines=headlines(rows, curves),
        curves=curves,
        findings=compare_curves(curves),
        examples=[one for label in (1, 0) for one in [r for r in known if r["label"] == label][:EXAMPLES_OF_A_KIND]],
        probs=[record["score"] for record in known],
        labels=[record["label"] for record in known],
        rows=rows,
        next_commands=next_commands(folder),
    )


def headlines(
    rows: Sequence[dict[str, Any]], curves: dict[str, list[tuple[float, float]]]
) -> list[tuple[str, str, str]]:
    """The numbers to read first, as (name, value, note)."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    metrics = {row["arm"]: row["metrics"] for row in rows}
    trained, untrained = metrics["reward_model"], metrics["likelihood_before_training"]
    dense, outcome = list(curves.values())[:2]
    reached = rollouts_to_reach(dense, outcome[-1][1])
    return [
        *(
            (title, shown(trained[name]), f"{shown(untrained[name])} before it saw a label")
            for title, name in (
                ("Step AUC from outcome labels only", "step_auc"),
                ("The same within responses", "within_bag_auc"),
            )
        ),
        *(
            (f"Accuracy with {arm}", shown(curve[-1][1]), f"{shown(curve[0][1])} before PPO")
            for arm, curve in curves.items()
        ),
        (
            "Rollouts to outcome-only's final accuracy",
            "not reached" if reached is None else f"{reached:,.0f}",
            f"{outcome[-1][0]:,.0f} with outcome-only rewards",
        ),
    ]


def next_commands(folder: Path) -> list[tuple[str, str]]:
    """Commands to continue with, as (command, purpose)."""
    return [
        (
            f"fractal-rm score --model {folder}/reward_model --input {folder}/validation.jsonl "
            "--output scores.jsonl --html view.html",
            "Score responses and look at every step.",
        ),
        (
            "fractal-rm ppo --config recipes/arithmetic/config.yaml",
            "PPO with your own settings on this task, in a clone of the repository.",
        ),
        (
            f"fractal-rm train --model {folder}/policy --train_file {folder}/responses.jsonl --aggregation product "
            "--output_dir my_reward_model",
            "Train a step reward model on your own responses and labels.",
        ),
    ]


def write_report(path: str | Path, report: QuickstartReport) -> None:
    """Write the report as one HTML page that needs only a browser.

    Raises ImportError if there is something to plot and matplotlib is not installed.

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
        fewest=FEWEST_IN_BIN,
        calibration_error=expected_calibration_error(report.probs, report.labels) if len(report.probs) else None,
        sides=[(name, side) for name, side in (("right answer", good), ("wrong answer", bad)) if side],
        longest=max((len(response.steps) for response in scored), default=0),
        responses=responses,
        any_gold=any(response.judged for response in responses),
        table=tabulate(report.rows, metrics=_policies_first(report.rows)) if report.rows else None,
        origin=_origin(report.rows[0]) if report.rows else "",
    )


def _policies_first(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of rows, policies before the reward model: a narrow window cuts the last ones."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return sorted(names, key=lambda name: not name.startswith(("accuracy", "step_accuracy")))


def rollouts_to_reach(curve: Curve, accuracy: float) -> float | None:
    """Rollouts at the first point of a learning curve that reaches an accuracy; None if it stays below.

    Example:
        >>> rollouts_to_reach([(0, 0.5), (512, 0.7), (1024, 0.8)], 0.7)
        512
    """
    return next((rollouts for rollouts, reached in sorted(curve) if reached >= accuracy), None)


def compare_curves(curves: Mapping[str, Curve], *, arm: str = ARM, baseline: str = BASELINE) -> list[str]:
    """Describe two learning curves in sentences, whether they favour the arm or not.

    First whether and when the arm reached the baseline's final accuracy, then how far each ended below its best. Raises
    ValueError if one of the two arms has no points.

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
    """The origin of a row: its command, commit, versions and machine, where known."""
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
