"""Tables of docs/words.md and recipes/words, from the rows of `words.jsonl`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.marks import replace_table
from fractal_rm.evaluation.intervals import as_columns, paired_difference
from fractal_rm.study.statistics import finished_runs

Row = Mapping[str, Any]
DATASETS = ("gsm_symbolic", "gsm_symbolic_fresh", "gsm_symbolic_unseen", "gsm_symbolic_hard", "word_problems")
NONE_YET = "No rows yet."
# Pairs of arms to compare: with a value model, and with the group baseline.
PAIRS = (
    ("dense_outcome", "outcome_grpo"),
    ("dense_outcome", "outcome_ppo"),
    ("dense_outcome", "scalar_outcome"),
    ("dense_outcome_group", "outcome_grpo"),
    ("dense_outcome_group", "scalar_outcome_group"),
    ("oracle_outcome_group", "outcome_grpo"),
    ("oracle_outcome_group", "dense_outcome_group"),
    ("oracle_outcome_first", "outcome_grpo"),
    ("dense_outcome_batch", "outcome_grpo"),
    ("agreement_outcome", "outcome_grpo"),
)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first two columns are aligned to the left."""
    if not lines:
        return NONE_YET
    marks = ["---" if place < 2 else "---:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, marks, *lines])


def _shown(metrics: Mapping[str, Any], name: str, form: str, scale: float) -> str:
    """A metric with its interval where it has one; a dash where it is not known."""
    values = [metrics.get(name + end) for end in ("", "_low", "_high")]
    if values[0] is None:
        return "—"
    shown = [format(scale * value, form) for value in values if value is not None]
    return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def percent(metrics: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    """A share in percent.

    Example:
        >>> percent({"accuracy": 0.25, "accuracy_low": 0.2, "accuracy_high": 0.31}, "accuracy")
        '25.0 [20.0, 31.0]'
    """
    return _shown(metrics, name, "+.1f" if signed else ".1f", 100)


def score(metrics: Mapping[str, Any], name: str) -> str:
    """An area under a curve."""
    return _shown(metrics, name, ".3f", 1)


def last(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> list[Row]:
    """The last row of each arm, data set and seed among the wanted ones, by data set."""
    found = {(row["dataset"], row["arm"], row["seed"]): row for row in rows if wanted(row)}
    return sorted(found.values(), key=lambda row: DATASETS.index(row["dataset"]))


def step_checker(rows: Sequence[Row]) -> str:
    """What the checker says of reference solutions, and of errors that were planted in them."""
    lines = []
    for row in last(rows, lambda row: row["arm"] == "step_checker"):
        shares = [percent(row["metrics"], name) for name in ("right_lines", "found")]
        lines.append([f"`{row['dataset']}`", str(row["config"]["problems"]), *shares])
    return table(["problems", "drawn", "lines of references called right, %", "planted errors found, %"], lines)


def policies(rows: Sequence[Row]) -> str:
    """What the fine-tuned policies are worth."""
    names = ("accuracy", "pass_8", "majority_8", "without_answer", "right_through_a_wrong_line")
    lines = []
    for row in last(rows, lambda row: names[-1] in row["metrics"]):
        metrics = row["metrics"]
        shares = [percent(metrics, name) for name in names]
        lines.append([f"`{row['dataset']}`", f"`{row['arm']}`", str(int(metrics["prompts"])), *shares])
    header = ["problems", "policy", "prompts", "accuracy, %", "pass@8, %", "majority of 8, %"]
    return table([*header, "no answer stated, %", "right through a wrong line, %"], lines)


def reward_models(rows: Sequence[Row]) -> str:
    """What reward models know of steps, beside the floors."""
    lines = []
    for row in last(rows, lambda row: "within_bag_auc" in row["metrics"]):
        metrics = row["metrics"]
        of_steps = [score(metrics, "within_bag_auc"), score(metrics, "same_position_auc")]
        of_steps += [percent(metrics, "first_error_accuracy")]
        of_steps += [score(metrics, "bag_auc"), score(metrics, "within_prompt_auc")]
        gain = _shown(metrics, "within_bag_auc_over_likelihood", "+.3f", 1)
        best = [percent(metrics, "best_of_8"), percent(metrics, "best_of_8_over_majority", signed=True)]
        lines.append([f"`{row['dataset']}`", f"`{row['arm']}`", of_steps[0], gain, *of_steps[1:], *best])
    header = [
        "problems",
        "arm",
        "within-bag AUC",
        "over the likelihood",
        "same-position AUC",
        "first error found, %",
        "response AUC",
    ]
    return table([*header, "the same, within prompts", "best of 8, %", "over the majority, points"], lines)


def summary(rows: Sequence[Row]) -> str:
    """The reward model beside the policy's own likelihood, for README: problems that both have judged."""
    arms = ("untrained_likelihood", "fractal", "frozen_likelihood_agreement")
    judged = {row["dataset"] for row in rows if row["arm"] == "fractal"}
    lines = []
    for row in last(rows, lambda row: row["arm"] in arms and row["dataset"] in judged):
        metrics = row["metrics"]
        shown = [score(metrics, "within_bag_auc"), percent(metrics, "first_error_accuracy")]
        shown += [percent(metrics, "best_of_8"), percent(metrics, "best_of_8_over_majority", signed=True)]
        lines.append([f"`{row['dataset']}`", f"`{row['arm']}`", *shown])
    header = ["problems", "step scores", "within-bag AUC", "first error found, %", "best of 8, %"]
    return table([*header, "over the majority, points"], lines)


def study(rows: Sequence[Row]) -> str:
    """Accuracy of each arm at its start, its middle and its end, and how far it moved: means over seeds."""
    runs, lines = finished_runs(rows, benchmark="words"), []
    for (dataset, arm), seeds in runs.items():
        points = sorted(set.intersection(*(set(run) for run in seeds.values())))
        shown = [points[0], points[len(points) // 2], points[-1]]
        means = [np.mean([run[point]["accuracy"] for run in seeds.values()]) for point in shown]
        steps, kl = (np.mean([run[shown[-1]][name] for run in seeds.values()]) for name in ("step_accuracy", "kl"))
        numbers = [*(f"{100 * mean:.1f}" for mean in [*means, steps]), f"{kl:.2f}"]
        lines.append([f"`{dataset}`", f"`{arm}`", str(len(seeds)), str(points[-1]), *numbers])
    header = ["problems", "arm", "seeds", "rollouts", "start, %", "half-way, %", "end, %", "right lines at the end, %"]
    return table([*header, "KL at the end"], lines)


def differences(rows: Sequence[Row]) -> str:
    """Points of accuracy that an arm is ahead of another, half-way and at the end.

    The items of the interval are the held-out problems of all seeds: both arms drew as many responses to each.
    """
    runs, lines = finished_runs(rows, benchmark="words"), []
    for dataset in DATASETS:
        for arm, rival in PAIRS:
            mine, theirs = runs.get((dataset, arm), {}), runs.get((dataset, rival), {})
            seeds = sorted(mine.keys() & theirs.keys())
            if not seeds:
                continue
            points = sorted(mine[seeds[0]])
            shown = []
            for point in (points[len(points) // 2], points[-1]):
                pairs = [_solved(run[seed][point]) for seed in seeds for run in (mine, theirs)]
                found = paired_difference(np.concatenate(pairs[::2]), np.concatenate(pairs[1::2]))
                shown.append(percent(as_columns({"gain": found}), "gain", signed=True))
            lines.append([f"`{dataset}`", f"`{arm}` - `{rival}`", str(len(seeds)), *shown])
    return table(["problems", "difference", "seeds", "half-way, points", "end, points"], lines)


def arithmetic(rows: Sequence[Row], *, rollouts: int = 1280) -> str:
    """Accuracy of `outcome_grpo` in the arithmetic study, at its start and after as many rollouts as a run on words."""
    lines = []
    for (setting, arm), seeds in finished_runs(rows, benchmark="dense_vs_outcome").items():
        if arm == "outcome_grpo" and all(rollouts in run for run in seeds.values()):
            start, end = (np.mean([run[n]["accuracy"] for run in seeds.values()]) for n in (0, rollouts))
            numbers = [f"{100 * start:.1f}", f"{100 * end:.1f}", f"{100 * (end - start):+.1f}"]
            lines.append([f"`{setting}`", str(len(seeds)), *numbers])
    return table(["setting", "seeds", "start, %", f"after {rollouts:,} rollouts, %", "gain, points"], lines)


def run(rows: Sequence[Row]) -> str:
    """What each step of `make words` took, and all of them."""
    steps = [row["metrics"] for row in rows]
    if not steps:
        return NONE_YET
    whole = {name: sum(step[name] for step in steps) for name in ("minutes", "processor_minutes")}
    whole["peak_gb"] = max(step["peak_gb"] for step in steps)
    lines = [
        [name, f"{step['minutes']:.1f}", f"{step['processor_minutes']:.1f}", f"{step['peak_gb']:.2f}"]
        for name, step in zip([*(row["arm"] for row in rows), "all"], [*steps, whole], strict=True)
    ]
    return table(["step", "minutes", "processor minutes", "peak memory, GB"], lines)


def _solved(metrics: Mapping[str, Any]) -> np.ndarray:
    """Share of right responses to each held-out problem."""
    return np.array(metrics["solved"]) / metrics["draws"]


TABLES = {
    "words step_checker": step_checker,
    "words policies": policies,
    "words reward_models": reward_models,
    "words summary": summary,
    "words study": study,
    "words differences": differences,
}


def page(document: str, rows: Sequence[Row]) -> str:
    """A document with the tables that it has made anew."""
    for name, make in TABLES.items():
        if f"<!-- table: {name} -->" in document:
            document = replace_table(document, name, make(rows))
    return document
