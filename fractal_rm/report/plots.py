"""The plots of a report as inline SVG that follows the page's light or dark mode, and the picture of the README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fractal_rm.evaluation.intervals import interval_of_share
from fractal_rm.evaluation.statistics import BINS, reliability_curve
from fractal_rm.report.drawing import (
    PAGE,
    PICTURE,
    Curve,
    draw_curves,
    draw_heat_map,
    is_good,
    new_figure,
    save_figure,
    style_axes,
    to_svg,
)

# Responses in the heat map of a picture.
MAX_ROWS = 12
# Minimum number of responses for a point in the calibration plot: with fewer, the share is too noisy.
FEWEST_IN_BIN = 10


def learning_curves(curves: Mapping[str, Curve], *, baseline: str | None = None) -> str:
    """One `<svg>` element for a page: [`~fractal_rm.report.drawing.draw_curves`], whose arguments these are.

    Example:
        >>> svg = learning_curves({"outcome": [(0, 0.5), (1024, 0.8)]})
        >>> svg[:4], svg[-6:]
        ('<svg', '</svg>')
    """
    with new_figure(5, 3.4) as figure:
        draw_curves(figure.add_subplot(), curves, PAGE, baseline=baseline)
        ends = "; ".join(f"{arm} ends at {max(curve)[1]:.1%}" for arm, curve in curves.items())
        return to_svg(figure, "curves", f"Held-out accuracy against rollouts: {ends}.")


def calibration_plot(probs: Sequence[float], labels: Sequence[float]) -> str:
    """One `<svg>` element: the share of good responses against the predicted probability, and their numbers.

    A bin of at least `FEWEST_IN_BIN` responses has a point with the 95 % interval of its share. `probs` are predicted
    probabilities that each response is good, and `labels` are in [0, 1], NaN where unknown.

    Raises ValueError if no label is known, or the numbers of labels and probabilities differ.

    Example:
        >>> svg = calibration_plot([0.1, 0.2, 0.9], [0, 0, 1])
        >>> svg[:4], svg[-6:]
        ('<svg', '</svg>')
    """
    known = sum(not math.isnan(label) for label in labels)
    if not known or len(probs) != len(labels):
        raise ValueError(
            f"The calibration plot got {len(probs)} probabilities and {len(labels)} labels, {known} known. "
            "Pass one of each for every response, and at least one known label."
        )
    curve = reliability_curve(probs, labels)
    filled = [one for one in curve if one.count >= FEWEST_IN_BIN]
    points = [(one.mean_probability, one.share_good) for one in filled]
    ends = [interval_of_share(one.share_good, one.count) for one in filled]
    quarters = [0, 0.25, 0.5, 0.75, 1]
    with new_figure(4.2, 4.2) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        style_axes(upper, PAGE)
        style_axes(lower, PAGE)
        upper.plot([0, 1], [0, 1], color=PAGE.muted, linewidth=1.3, linestyle=(0, (1, 2)))
        if points:
            upper.vlines([x for x, _ in points], *zip(*ends, strict=True), color=PAGE.series[0], linewidth=1.2)
            upper.plot(*zip(*points, strict=True), color=PAGE.series[0], linewidth=2, marker="o", markersize=6)
        upper.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), yticks=quarters, ylabel="Share that is good")
        middles, counts = [(one.low + one.high) / 2 for one in curve], [one.count for one in curve]
        lower.bar(middles, counts, width=0.82 / BINS, color=PAGE.series[0])
        lower.set(xlabel="Predicted probability of a good response", ylabel="Number", xticks=quarters)
        lower.locator_params(axis="y", nbins=2, integer=True)
        figure.align_ylabels([upper, lower])
        read = ", ".join(f"{predicted:.2f} predicted and {observed:.2f} observed" for predicted, observed in points)
        read = read or f"no bin has {FEWEST_IN_BIN} responses"
        return to_svg(figure, "calibration", f"Calibration of the response score: {read}.")


def save_picture(
    path: str | Path,
    runs: Mapping[str, Sequence[Curve]],
    examples: Sequence[Mapping[str, Any]],
    *,
    baseline: str | None = None,
) -> None:
    """Save learning curves next to a heat map of step scores, on white, as wide as a README.

    Args:
        path: Where to write it; the ending `.png` or `.svg` decides the format.
        runs: The curves of each arm's seeds, with the same rollouts; drawn as their mean, with the number of seeds.
        examples: Scored responses as `write_viewer` takes them; a cross marks steps whose `gold` label is wrong.
        baseline: As for [`learning_curves`].

    Raises:
        ValueError: If there is no curve or no scored example, or the name ends otherwise.

    Example:
        >>> import pathlib, tempfile
        >>> row = {"prompt": "2+2?", "label": 0, "score": 0.1, "steps": [{"text": "2+2=5", "score": 0.1, "gold": 0}]}
        >>> picture = pathlib.Path(tempfile.mkdtemp()) / "quickstart.png"
        >>> save_picture(picture, {"outcome": [[(0, 0.5), (1024, 0.8)]]}, [row])
        >>> picture.read_bytes()[1:4]
        b'PNG'
    """
    rows = _both_sides(examples)
    if not rows:
        raise ValueError("There is no scored response to draw. Pass at least one example with steps.")
    curves = {arm: _mean(seeds) for arm, seeds in runs.items()}
    count = max((len(seeds) for seeds in runs.values()), default=0)
    with new_figure(9, 3.7) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.12, 1], gridspec_kw={"wspace": 0.06})
        draw_curves(left, curves, PICTURE, baseline=baseline, seeds=runs if count > 1 else None)
        note = f"mean of {count} seeds; thin: single seeds" if count > 1 else "one seed"
        left.text(0.99, 0.03, note, transform=left.transAxes, ha="right", fontsize=9, color=PICTURE.muted)
        draw_heat_map(right, rows, PICTURE)
        save_figure(figure, path)


def _mean(seeds: Sequence[Curve]) -> Curve:
    """The mean curve of seeds that were measured at the same rollouts."""
    return [
        (points[0][0], fmean(accuracy for _, accuracy in points)) for points in zip(*map(sorted, seeds), strict=True)
    ]


def _both_sides(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many examples as fit, half of them from each label if there are enough."""
    scored = [row for row in examples if row.get("steps")]
    good = [row for row in scored if is_good(row)]
    bad = [row for row in scored if not is_good(row)]
    kept = good[: max(MAX_ROWS // 2, MAX_ROWS - len(bad))]
    return kept + bad[: MAX_ROWS - len(kept)]
