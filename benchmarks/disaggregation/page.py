"""Tables and figure of docs/disaggregation.md and docs/disaggregation_tables.md from the rows of the benchmark."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fractal_rm.report.drawing import PICTURE, new_figure, style_axes, to_bytes
from fractal_rm.report.tables import MISSING, format_number, markdown_table

Rows = Sequence[Mapping[str, Any]]

# Data sets without gold step labels for training that share the test steps, and so the ceiling, of another set.
CEILING_OF = {"qa_feedback_preferences": "qa_feedback"}
PLAIN = ("bag_min", "bag_max", "bag_mean")
GOLD_SHARES = (0, 1, 5, 10, 20, 50)
# Arms that response labels may choose among: configurations of `fractal-rm train`.
CHOICES = (*PLAIN, "bag_product", "bag_noisy_or", "bag_priors", "pseudo_hard", "pseudo_soft", "fractal")
FIGURE = "disaggregation.png"


def _arms(rows: Rows) -> list[str]:
    """Arms by kind: floors, methods, gold fractions, ceiling."""
    kinds = ("floor_", "response", "bag_", "pseudo", "fractal", "chosen", "lca", "implicit", "easyllp", "supervised")
    found = dict.fromkeys(row["arm"] for row in rows)

    def place(arm: str) -> tuple[int, int, str]:
        kind = next(number for number, start in enumerate(kinds) if arm.startswith(start))
        share = [int(part) for part in arm.split("_") if part.isdigit()]
        return kind, share[0] if share else 0, arm

    return sorted(found, key=place)


def _pivot(rows: Rows, metric: str, datasets: Sequence[str]) -> str:
    """A table with a line an arm and a column a data set: mean and spread over seeds."""
    lines = []
    for arm in _arms(rows):
        for dataset in datasets:
            for row in rows:
                value = row["metrics"].get(metric)
                if (row["arm"], row["dataset"]) == (arm, dataset) and value is not None:
                    lines.append({"arm": arm, "seed": row["seed"], "metrics": {dataset: value}})
    present = [name for name in datasets if any(name in line["metrics"] for line in lines)]
    merged: dict[tuple[str, Any], dict[str, Any]] = {}
    for line in lines:
        key = line["arm"], line["seed"]
        merged.setdefault(key, {"arm": line["arm"], "seed": line["seed"], "metrics": {}})["metrics"] |= line["metrics"]
    return markdown_table(list(merged.values()), metrics=present)


def _means(rows: Rows, metric: str) -> dict[tuple[str, str], float]:
    """Mean over seeds by data set and arm."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if (value := row["metrics"].get(metric)) is not None:
            values.setdefault((row["dataset"], row["arm"]), []).append(value)
    return {key: fmean(found) for key, found in values.items()}


def _recovery(rows: Rows, datasets: Sequence[str]) -> str:
    """How much of the ceiling's within-bag AUC above chance an arm reaches."""
    means = _means(rows, "within_bag_auc")
    lines = []
    for arm in _arms(rows):
        found = {}
        for dataset in datasets:
            ceiling = means.get((CEILING_OF.get(dataset, dataset), "supervised"))
            if ceiling is not None and (dataset, arm) in means:
                found[dataset] = (means[dataset, arm] - 0.5) / (ceiling - 0.5)
        if found:
            lines.append({"arm": arm, "seed": 0, "metrics": found})
    present = [name for name in datasets if any(name in line["metrics"] for line in lines)]
    return markdown_table(lines, metrics=present)


def best_floor(rows: Rows, dataset: str, metric: str = "within_bag_auc") -> str | None:
    """The rule without learning that scores highest on a data set."""
    means = {arm: value for (name, arm), value in _means(rows, metric).items() if name == dataset}
    floors = {arm: value for arm, value in means.items() if arm.startswith("floor_")}
    return max(floors, key=lambda arm: floors[arm]) if floors else None


def _rivals(gains: Rows, ours: str) -> dict[tuple[str, str | None], Mapping[str, Any]]:
    """What an arm gains over its rivals, by data set and rival; of two rows the later one counts."""
    return {(row["dataset"], row["config"]["rival"]): row["metrics"] for row in gains if row["arm"] == ours}


def _plain(dataset: str, known: Collection[tuple[str, str | None]]) -> str | None:
    """The arm of the plain bag loss on a data set, if it is among the known pairs of data set and arm."""
    return next((arm for arm in PLAIN if (dataset, arm) in known), None)


def _gain(found: Mapping[str, Any]) -> str:
    """A gain with its interval, bold where that is above 0."""
    mark = "**" if found["gain_low"] > 0 else ""
    return f"{mark}{found['gain']:+.3f}{mark} [{found['gain_low']:+.3f}, {found['gain_high']:+.3f}]"


def _summary(rows: Rows, gains: Rows, datasets: Sequence[str]) -> str:
    """A line a data set: the within-bag AUC of what a reader compares first."""
    means, latest = _means(rows, "within_bag_auc"), _rivals(gains, "fractal")
    arms = {"with 10 % gold labels": "fractal_gold_10", "all gold labels": "supervised"}
    header = ["data set", "best floor", "plain bag loss", "FRACTAL", "gain over the plain loss", *arms]
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---:|' * (len(header) - 2)}"]
    for dataset in datasets:
        floor, plain = best_floor(rows, dataset), _plain(dataset, means)
        cells = [
            f"{format_number(means[dataset, floor])} ({floor.removeprefix('floor_')})" if floor else MISSING,
            *(format_number(means.get((dataset, arm))) for arm in (plain or "", "fractal")),
            _gain(latest[dataset, plain]) if plain and (dataset, plain) in latest else MISSING,
            *(format_number(means.get((dataset, arm))) for arm in arms.values()),
        ]
        lines.append(f"| {dataset} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gains(rows: Rows, gains: Rows, datasets: Sequence[str], ours: str) -> str:
    """Our gain over plain bag loss, the best floor, LCA and the implicit reward, with intervals."""
    latest = _rivals(gains, ours)
    header = ["data set", "plain bag loss", "best floor", "lca", "implicit", "mixed bags"]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] * 5 + ['---:'])}|"]
    for dataset in datasets:
        plain = _plain(dataset, latest)
        if plain is None:
            continue
        floor = best_floor(rows, dataset)
        cells = []
        for rival, label in ((plain, ""), (floor, f" ({floor})"), ("lca", ""), ("implicit", "")):
            found = latest.get((dataset, rival))
            if found is None:
                cells.append("—")
                continue
            cells.append(_gain(found) + label)
        lines.append(f"| {dataset} | {' | '.join(cells)} | {format_number(latest[dataset, plain]['mixed_bags'])} |")
    return "\n".join(lines)


def _chosen(rows: Rows, datasets: Sequence[str]) -> str:
    """What validation bag labels chose for `fractal`."""
    hidden = {"scorer", "train_bags", "test_bags", "reference_model"}
    lines = ["| data set | training bags | what `fractal` was chosen to be |", "|---|---:|---|"]
    for dataset in datasets:
        for row in rows:
            if (row["dataset"], row["arm"], row["seed"]) == (dataset, "fractal", 0):
                options = ", ".join(f"{key}={value}" for key, value in row["config"].items() if key not in hidden)
                lines.append(f"| {dataset} | {format_number(row['config']['train_bags'])} | {options} |")
                break
    return "\n".join(lines)


def _choice(rows: Rows, trials: Rows, datasets: Sequence[str]) -> str:
    """Within-bag AUC of what response labels choose, less that of the plain bag loss, with the error over seeds.

    `highest` is the arm whose best trial has the highest value on validation; `chosen` is the arm of that name.
    """
    seeds: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        seeds.setdefault((row["dataset"], row["arm"]), []).append(row["metrics"]["within_bag_auc"])
    values: dict[tuple[str, str], float] = {}
    for row in trials:
        key = row["dataset"], row["arm"]
        values[key] = max(values.get(key, -1.0), row["metrics"]["selection"])
    lines = [
        "| data set | plain bag loss | highest on validation | by how much | less plain | `chosen` less plain |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for dataset in datasets:
        known = [arm for arm in CHOICES if (dataset, arm) in values and len(seeds.get((dataset, arm), ())) > 1]
        plain = next((arm for arm in known if arm in PLAIN), None)
        if plain is None:
            continue
        best = max(known, key=lambda arm: values[dataset, arm])
        gain = values[dataset, best] - values[dataset, plain]
        cells = [f"{fmean(seeds[dataset, plain]):.3f} ({plain})", best, f"{gain:+.3f}"]
        for arm in (best, "chosen"):
            cells.append(_less(seeds.get((dataset, arm), ()), seeds[dataset, plain]) if arm != plain else "—")
        lines.append(f"| {dataset} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _less(values: Sequence[float], others: Sequence[float]) -> str:
    """Difference of two means over seeds, with its standard error; a dash without at least two values."""
    if min(len(values), len(others)) < 2:
        return "—"
    error = (stdev(values) ** 2 / len(values) + stdev(others) ** 2 / len(others)) ** 0.5
    return f"{fmean(values) - fmean(others):+.3f} ± {error:.3f}"


def _errors(rows: Rows) -> str:
    """Errors of grades, of steps and of responses, of the data sets that have them."""
    found = [row for row in rows if "step_mae" in row["metrics"]]
    ordered = [row for arm in _arms(found) for row in found if row["arm"] == arm]
    return markdown_table(ordered, metrics=["step_mae", "bag_mae"])


def tables(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tables of the pages by the names of their marks."""
    known = list(rows)
    tests = [row for row in known if row["split"] == "test"]
    gains = [row for row in known if row["split"] == "gain"]
    trials = [row for row in known if row["split"] == "validation"]
    datasets = list(dict.fromkeys(row["dataset"] for row in tests))
    math = [name for name in datasets if name.startswith(("prm", "processbench", "arithmetic"))]
    timed = [{**row, "metrics": {"seconds": row["seconds"]}} for row in tests if not row["arm"].startswith("floor_")]
    made = {
        "summary": _summary(tests, gains, datasets),
        "seconds": _pivot(timed, "seconds", datasets),
        "within_bag_auc": _pivot(tests, "within_bag_auc", datasets),
        "recovery": _recovery(tests, datasets),
        "gains": _gains(tests, gains, datasets, "fractal"),
        "gains_gold": _gains(tests, gains, datasets, "fractal_gold_10"),
        "chosen": _chosen(tests, datasets),
        "choice": _choice(tests, trials, datasets),
        "same_position_auc": _pivot(tests, "same_position_auc", math),
        "first_error_f1": _pivot(tests, "f1", math),
        "step_auc": _pivot(tests, "step_auc", datasets),
        "bag_auc": _pivot(tests, "bag_auc", datasets),
        "ece": _pivot(tests, "ece", datasets),
        "grades": _errors(tests),
    }
    return {f"disaggregation {name}": table for name, table in made.items()}


def draw_figure(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Curves of within-bag AUC against the share of responses with gold step labels, one panel a data set."""
    means = _means([row for row in rows if row["split"] == "test"], "within_bag_auc")
    names = {dataset for dataset, arm in means if arm == "fractal_gold_10"}
    datasets = [name for name in dict.fromkeys(dataset for dataset, _ in means) if name in names]
    columns = 3
    height = -(-len(datasets) // columns)
    with new_figure(3 * columns, 2.4 * height) as figure:
        for number, dataset in enumerate(datasets, 1):
            axes = figure.add_subplot(height, columns, number)
            style_axes(axes, PICTURE)
            arms = {share: f"fractal_gold_{share}" if share else "fractal" for share in GOLD_SHARES}
            shares = [share for share, arm in arms.items() if (dataset, arm) in means]
            values = [means[dataset, arms[share]] for share in shares]
            axes.plot(shares, values, "-o", color=PICTURE.series[0], markersize=4, label="FRACTAL")
            plain = _plain(dataset, means)
            levels = {"all gold labels": ("supervised", "--", 2), "plain bag loss": (plain, ":", 3)}
            for label, (arm, line, colour) in levels.items():
                if (dataset, arm) in means:
                    axes.axhline(means[dataset, arm], linestyle=line, color=PICTURE.series[colour], label=label)
            axes.set_title(dataset, fontsize=9, color=PICTURE.ink)
            if number == 1:
                axes.legend(fontsize=8, frameon=False)
        figure.supxlabel("% of responses with gold step labels", fontsize=9, color=PICTURE.muted)
        figure.supylabel("within-bag AUC", fontsize=9, color=PICTURE.muted)
        path.write_bytes(to_bytes(figure, "png"))
