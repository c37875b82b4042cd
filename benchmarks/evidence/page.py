"""Tables in addition to the study: trials on development seeds, and evaluations of its reward models."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.evidence.arms import ARMS, AS_LONG
from fractal_rm.report.tables import markdown_table
from fractal_rm.study.page import DEFAULT, NOTHING, draw_curves, table_lines
from fractal_rm.study.statistics import Curves, Rows, latest

REWARD_MODELS = "dense_vs_outcome_reward_models"
STEP_SCORES = "dense_vs_outcome_step_scores"
LEARNING_ON = "dense_vs_outcome_learning_on"
# Arms whose score is drawn next to the truth; the last one scores only the results of steps.
SCORED = (DEFAULT, "fractal", "orm", "fractal_result_token")
# Arms whose accuracy is drawn against seconds.
TIMED = (DEFAULT, f"{DEFAULT}_4x", *AS_LONG.values())
COMPARED_TO = "mix"
# Rollouts at which a model that keeps learning is shown: after its first two updates, and at the end.
SHOWN = (640, 2560)


def variants_table(rows: Rows) -> str:
    """What each variant is better than `mix` by, in points of accuracy, paired over the seeds that both have."""
    runs: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    ended = set()
    for row in latest(rows, split="development"):
        if row["metrics"]["rollouts"]:
            runs[row["dataset"], row["arm"]][row["seed"]].append(row["metrics"]["accuracy"])
            if row["config"]["last"]:
                ended.add((row["dataset"], row["arm"], row["seed"]))
    lines = []
    for (setting, variant), seeds in sorted(runs.items()):
        rivals = runs[setting, COMPARED_TO]
        both = [seed for seed in seeds if {(setting, variant, seed), (setting, COMPARED_TO, seed)} <= ended]
        if variant == COMPARED_TO or not both:
            continue
        metrics = {
            "all evaluations": 100 * fmean(fmean(seeds[seed]) - fmean(rivals[seed]) for seed in both),
            "at the end": 100 * fmean(seeds[seed][-1] - rivals[seed][-1] for seed in both),
            "runs": len(both),
        }
        lines.append({"arm": f"{setting}: {variant} - {COMPARED_TO}", "seed": 0, "metrics": metrics})
    return markdown_table(lines) if lines else NOTHING


def recipes_table(rows: Rows) -> str:
    """How well reward models of each recipe know labels that they have not learned from, over seeds."""
    known = {(row["dataset"], row["arm"], row["seed"]): row for row in rows if row["benchmark"] == REWARD_MODELS}
    return markdown_table([known[key] for key in sorted(known)]) if known else NOTHING


def step_scores_table(rows: Rows) -> str:
    """What the reward models of the study know of steps: means over seeds, a line a setting and kind."""
    known = {(row["dataset"], row["arm"], row["seed"]): row for row in rows if row["benchmark"] == STEP_SCORES}
    return markdown_table([known[key] for key in sorted(known)]) if known else NOTHING


def learning_on_table(rows: Rows) -> str:
    """What a reward model that learns on, or does not, knows of the policy's responses: a line a run and evaluation."""
    known = {
        (row["dataset"], row["seed"], row["metrics"]["rollouts"], row["arm"]): row
        for row in rows
        if row["benchmark"] == LEARNING_ON and row["metrics"]["rollouts"] in SHOWN
    }
    lines = [
        row | {"arm": f"{setting}, seed {seed}, {rollouts:,} rollouts: {arm}"}
        for (setting, seed, rollouts, arm), row in sorted(known.items())
    ]
    shown = [
        "accuracy", "rm_score", "bag_auc", "bag_nll", "right_steps_below_half", "wrong_steps_above_half", "kl",
    ]  # fmt: skip
    return markdown_table(lines, metrics=shown) if lines else NOTHING


def draw_scores(path: Path, rows: Rows) -> bool:
    """What the reward model thinks of held-out responses (dashed) and how many are right, a panel a setting.

    Returns:
        Whether there was anything to draw.
    """

    def dashed(axes: Any, colour: str, truth: Curves, score: Curves | None) -> None:
        if score is not None:
            axes.plot(score.rollouts, score.values.mean(axis=0), color=colour, linewidth=1.2, linestyle="--")

    return draw_curves(path, rows, SCORED, "held-out accuracy; dashed: score", beside=dashed)


def draw_seconds(path: Path, rows: Rows) -> bool:
    """Accuracy against all processor seconds, those of the reward model and its responses first, a panel a setting.

    Returns:
        Whether there was anything to draw.
    """
    along = ("processor seconds", lambda one: one.rm_seconds + one.seconds)
    return draw_curves(path, rows, TIMED, along=along, beside=lambda *curve: None)


def chosen_table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """What the tuning chose for each arm."""
    body = [[arm, ", ".join(f"{key}={value}" for key, value in chosen[arm].items())] for arm in ARMS if arm in chosen]
    return table_lines(["arm", "settings"], body).replace("---:|", "---|")
