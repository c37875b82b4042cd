"""Writes the tables of README and docs from the rows in `benchmarks/results`; a test compares them.

Command: python -m benchmarks.tables
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.audit import audit_table
from benchmarks.common.marks import replace_table
from benchmarks.common.places import REPOSITORY, RESULTS
from benchmarks.coverage import coverage_table
from benchmarks.disaggregation.page import FIGURE, draw_figure
from benchmarks.disaggregation.page import tables as disaggregation_tables
from benchmarks.evaluation.page import page as evaluation_page
from benchmarks.evidence.cutting_finer import CUTS
from benchmarks.evidence.page import (
    LEARNING_ON,
    STEP_SCORES,
    chosen_table,
    draw_scores,
    draw_seconds,
    learning_on_table,
    recipes_table,
    step_scores_table,
    variants_table,
)
from benchmarks.evidence.quickstart import EXAMPLES
from benchmarks.evidence.study_page import tables as study_tables
from benchmarks.evidence.words_page import arithmetic as words_arithmetic
from benchmarks.evidence.words_page import page as words_page
from benchmarks.evidence.words_page import run as words_run
from benchmarks.speed.page import page as speed_page
from benchmarks.speed.plan_page import recipe_table
from benchmarks.speed.scale_page import scale_page
from benchmarks.versions import versions_table
from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.intervals import interval_of_share
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.files import write_atomic
from fractal_rm.report.plots import save_picture
from fractal_rm.report.tables import markdown_table
from fractal_rm.study.page import NOTHING, draw_curves
from fractal_rm.study.statistics import BENCHMARK

QUICKSTART_ARMS = ("dense+outcome", "outcome")


def last_rows(name: str, arms: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The last evaluation of each arm and seed of a quickstart's results file."""
    rows = [row for row in read_results(RESULTS / name) if row["split"] == "held_out"]
    last = max(row["metrics"]["rollouts"] for row in rows)
    chosen = [row for row in rows if row["metrics"]["rollouts"] == last and (arms is None or row["arm"] in arms)]
    return sorted(chosen, key=lambda row: (row["arm"], row["seed"]))


def draw_quickstart(path: Path) -> None:
    """README's picture: the curves that its table has the ends of, and scored responses of seed 0."""
    runs: dict[str, dict[int, list[tuple[float, float]]]] = {arm: defaultdict(list) for arm in QUICKSTART_ARMS}
    for row in read_results(RESULTS / "quickstart.jsonl"):
        if row["arm"] in runs and row["split"] == "held_out":
            runs[row["arm"]][row["seed"]].append((row["metrics"]["rollouts"], row["metrics"]["accuracy"]))
    curves = {arm: list(seeds.values()) for arm, seeds in runs.items()}
    save_picture(path, curves, read_jsonl(RESULTS / EXAMPLES), baseline="outcome")


def whole_runs(name: str) -> list[dict[str, Any]]:
    """One row for each run of a results file of curves: accuracy by rollouts, and what its last evaluation adds."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for row in sorted(read_results(RESULTS / name), key=lambda row: (row["arm"], row["seed"])):
        run = runs.setdefault((row["arm"], row["seed"]), row | {"metrics": {}})
        metrics = dict(row["metrics"])
        run["metrics"] |= {f"accuracy at {metrics.pop('rollouts'):,}": metrics.pop("accuracy")} | metrics
    return list(runs.values())


def online_table() -> str:
    """Frozen against online reward models: accuracy on the way, the best of it, and how the two end."""
    if not (RESULTS / "online_reward.jsonl").is_file():
        return "No rows yet."
    runs = {(run["arm"], run["seed"]): run for run in whole_runs("online_reward.jsonl")}
    curve = list(
        dict.fromkeys(name for run in runs.values() for name in run["metrics"] if name.startswith("accuracy at"))
    )
    for run in runs.values():
        run["metrics"]["best"] = max(run["metrics"][name] for name in curve if name in run["metrics"])
    shown = [*curve, "best", "step_accuracy", "score", "bag_auc", "step_auc"]
    pairs = [
        run
        | {
            "arm": "online - frozen",
            "metrics": {n: run["metrics"][n] - runs["frozen", seed]["metrics"][n] for n in shown},
        }
        for (arm, seed), run in runs.items()
        if arm == "online" and ("frozen", seed) in runs
    ]
    return markdown_table([*runs.values(), *pairs], metrics=shown)


def rows_of(benchmark: str) -> list[dict[str, Any]]:
    """Rows of a part of the evidence, if there are any yet."""
    return ResultsFile(RESULTS / f"{benchmark}.jsonl").rows()


def cutting_table(dataset: str) -> str:
    """Which forms of step rewards pay for cuts: a line a form."""
    rows = [row for row in rows_of("cutting_finer") if row["dataset"] == dataset]
    shown = ["responses", *(f"{cut}_{what}" for cut in CUTS for what in ("rising", "change"))]
    return markdown_table(rows, metrics=shown) if rows else NOTHING


def mutation_tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Mutants by draw and room, with the share that was killed, and those of the last draw that survived."""
    if not rows:
        return dict.fromkeys(("mutation", "survivors"), NOTHING)
    draws: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for room in (row["arm"].split("/")[0], "all"):
            draws[f"draw {row['seed']}, {room}"].update(row["metrics"])
    lines: list[dict[str, Any]] = []
    for name, counts in sorted(draws.items()):
        low, high = interval_of_share(counts["killed"] / counts["mutants"], counts["mutants"])
        shares = {"share": counts["killed"] / counts["mutants"], "low": low, "high": high}
        lines.append({"arm": name, "metrics": {**counts, **shares}})
    last = max(row["seed"] for row in rows)
    survivors = []
    for row in rows:
        for said in row["config"]["survivors"] if row["seed"] == last else []:
            line, _, change = said.partition(": ")
            survivors.append(f"- `{row['arm']}`, {line}: `` {change} ``")  # brackets in code would be links
    return {
        "mutation": markdown_table(lines, metrics=["mutants", "killed", "too_long", "share", "low", "high"]),
        "survivors": "\n".join(survivors) or "None.",
    }


def evidence_tables() -> dict[str, str]:
    """Tables and pictures of the evidence by the names of their marks."""
    chosen = REPOSITORY / "benchmarks" / "evidence" / "dense_vs_outcome.yaml"
    known = yaml.safe_load(chosen.read_text(encoding="utf-8")) if chosen.is_file() else {}
    rows, trials = rows_of(BENCHMARK), read_results(RESULTS / "dense_vs_outcome_development.jsonl")
    pictures = {
        "figure": "![Held-out accuracy against rollouts, by setting and arm](evidence.png)",
        "seconds": "![Held-out accuracy against processor seconds, by setting and arm](evidence_seconds.png)",
        "scores": "![Scores and held-out accuracy against rollouts, by setting and arm](evidence_scores.png)",
    }
    beside = {
        "chosen": chosen_table(known),
        "steps": step_scores_table(rows_of(STEP_SCORES)),
        "learning_on": learning_on_table(rows_of(LEARNING_ON)),
        "development": variants_table(trials),
        "recipes": recipes_table(trials),
    }
    made = study_tables(rows) | beside | (pictures if rows else {})
    return {f"evidence {name}": table for name, table in made.items()}


def filled(paths: Sequence[Path], tables: Mapping[str, str]) -> dict[Path, str]:
    """Documents with the tables that they have marks for made anew.

    Raises:
        ValueError: If no document has the marks of a table.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    for name, table in tables.items():
        having = [path for path, text in texts.items() if f"<!-- table: {name} -->" in text]
        if not having:
            raise ValueError(f"No page has the marks of the table {name!r}. Add them, or delete the table.")
        for path in having:
            texts[path] = replace_table(texts[path], name, table)
    return texts


def documents() -> dict[Path, str]:
    """Each document with its tables made anew."""
    shown = ["accuracy", "accuracy_greedy", "step_accuracy", "step_auc", "within_bag_auc", "rollouts"]
    readme, quickstart = REPOSITORY / "README.md", REPOSITORY / "docs" / "quickstart.md"
    short = markdown_table(last_rows("quickstart.jsonl", QUICKSTART_ARMS), metrics=shown)
    # One line per seed: a mean over a policy that learned and one that did not would describe neither.
    own = [
        row | {"arm": f"{row['arm']}, seed {row['seed']}"}
        for row in last_rows("quickstart_own_policy.jsonl", QUICKSTART_ARMS)
    ]
    text = quickstart.read_text(encoding="utf-8")
    text = replace_table(text, "quickstart_arms", markdown_table(last_rows("quickstart.jsonl"), metrics=shown))
    text = replace_table(text, "quickstart_own_policy", markdown_table(own, metrics=shown[:5]))
    docs = REPOSITORY / "docs"
    parts = [docs / f"disaggregation{part}.md" for part in ("", "_arms", "_tables")]
    disaggregation = filled(parts, disaggregation_tables(read_results(RESULTS / "disaggregation.jsonl")))
    scale = REPOSITORY / "docs" / "scale.md"
    plan = scale_page(scale.read_text(encoding="utf-8"), read_results(RESULTS / "scale_plan.jsonl"))
    # One line per trainer: shares of the runs, and the mean step of the last complete checkpoint when they were killed.
    moments = read_results(RESULTS / "kill_and_resume.jsonl")
    killed = markdown_table(moments, metrics=["equal", "files_that_differ", "checkpoint_torn", "checkpoint_step"])
    runs = REPOSITORY / "docs" / "runs.md"
    faults = markdown_table(rows_of("faults"), metrics=["kills", "equal", "weights", "rows", "left_over"])
    attacked = ["asked", "answered", "median", "longest", "memory_growth", "log_lines", "alive"]
    large = markdown_table(rows_of("large_file"), metrics=["seconds", "cpu_seconds", "peak_mb"])
    limits = markdown_table(rows_of("server_limits"), metrics=attacked) if rows_of("server_limits") else NOTHING
    security, serving = REPOSITORY / "SECURITY.md", REPOSITORY / "docs" / "serving.md"
    recipe = REPOSITORY / "recipes" / "gsm8k_ppo" / "README.md"
    online = REPOSITORY / "docs" / "online_reward.md"
    shaping, aggregation = (REPOSITORY / "docs" / name for name in ("step_ppo.md", "how_to/choose_aggregation.md"))
    speed = REPOSITORY / "docs" / "speed.md"
    evaluation = REPOSITORY / "docs" / "evaluation.md"
    versions = REPOSITORY / "docs" / "versions.md"
    judged = (read_results(RESULTS / f"{name}.jsonl") for name in ("processbench", "best_of_n"))
    names = ("evidence", "evidence_arms", "evidence_tables", "evidence_history")
    pages = filled([*(docs / f"{name}.md" for name in names), readme], evidence_tables())
    words = {docs / "words.md": {"words arithmetic": words_arithmetic(rows_of("dense_vs_outcome"))}}

    words |= {REPOSITORY / "recipes" / "words" / "README.md": {"words run": words_run(rows_of("words_run"))}}
    testing = docs / "testing.md"
    return {
        **filled([testing], mutation_tables(rows_of("mutation")) | {"coverage": coverage_table(rows_of("coverage"))}),
        **{path: words_page(filled([path], made)[path], rows_of("words")) for path, made in words.items()},
        **pages,
        speed: speed_page(speed.read_text(encoding="utf-8"), RESULTS),
        **disaggregation,
        scale: replace_table(plan, "kill_and_resume", killed),
        runs: replace_table(runs.read_text(encoding="utf-8"), "faults", faults),
        security: replace_table(security.read_text(encoding="utf-8"), "audit", audit_table(rows_of("audit"))),
        docs / "data.md": replace_table((docs / "data.md").read_text(encoding="utf-8"), "large_file", large),
        serving: replace_table(serving.read_text(encoding="utf-8"), "server_limits", limits),
        recipe: replace_table(recipe.read_text(encoding="utf-8"), "gsm8k_ppo plan", recipe_table()),
        online: replace_table(online.read_text(encoding="utf-8"), "online_reward", online_table()),
        evaluation: evaluation_page(evaluation.read_text(encoding="utf-8"), *judged),
        readme: replace_table(words_page(pages[readme], rows_of("words")), "quickstart", short),
        shaping: replace_table(
            replace_table(shaping.read_text(encoding="utf-8"), "cutting_finer", cutting_table("arithmetic")),
            "cutting_finer gsm_symbolic",
            cutting_table("gsm_symbolic"),
        ),
        aggregation: replace_table(
            aggregation.read_text(encoding="utf-8"), "long_responses", markdown_table(rows_of("long_responses"))
        ),
        quickstart: text,
        versions: replace_table(versions.read_text(encoding="utf-8"), "versions", versions_table(rows_of("versions"))),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        write_atomic(path, text)
    draw_quickstart(REPOSITORY / "docs" / "quickstart.png")
    draw_figure(REPOSITORY / "docs" / FIGURE, read_results(RESULTS / "disaggregation.jsonl"))
    draw_curves(REPOSITORY / "docs" / "evidence.png", rows_of(BENCHMARK))
    draw_scores(REPOSITORY / "docs" / "evidence_scores.png", rows_of(BENCHMARK))
    draw_seconds(REPOSITORY / "docs" / "evidence_seconds.png", rows_of(BENCHMARK))
