"""Writes the tables of README and docs from the rows in `benchmarks/results`; a test compares them.

Command: python -m benchmarks.tables
"""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.places import REPOSITORY, RESULTS
from benchmarks.disaggregation.page import FIGURE, draw_figure, page
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
from benchmarks.evidence.study_page import tables as evidence_tables
from benchmarks.evidence.words_page import page as words_page
from benchmarks.speed.page import page as speed_page
from benchmarks.speed.plan_page import recipe_table
from benchmarks.speed.scale_page import scale_page
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.files import write_atomic
from fractal_rm.report.tables import markdown_table, replace_table
from fractal_rm.study.page import NOTHING, draw_curves
from fractal_rm.study.statistics import BENCHMARK


def last_rows(name: str, arms: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The last evaluation of each arm and seed of a quickstart's results file."""
    rows = [row for row in read_results(RESULTS / name) if row["split"] == "held_out"]
    last = max(row["metrics"]["rollouts"] for row in rows)
    chosen = [row for row in rows if row["metrics"]["rollouts"] == last and (arms is None or row["arm"] in arms)]
    return sorted(chosen, key=lambda row: (row["arm"], row["seed"]))


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


def cutting_table() -> str:
    """Which forms of step rewards pay for cuts: a line a form, data set by data set."""
    rows = rows_of("cutting_finer")
    shown = ["responses", *(f"{cut}_{what}" for cut in CUTS for what in ("rising", "change"))]
    return markdown_table(rows, metrics=shown) if rows else NOTHING


def evidence_pages(page: str, history: str, readme: str) -> tuple[str, str, str]:
    """The page of the evidence, that of its history, and the README, with its tables made anew."""
    chosen = REPOSITORY / "benchmarks" / "evidence" / "dense_vs_outcome.yaml"
    known = yaml.safe_load(chosen.read_text(encoding="utf-8")) if chosen.is_file() else {}
    rows, trials = rows_of(BENCHMARK), read_results(RESULTS / "dense_vs_outcome_development.jsonl")
    made = evidence_tables(rows)
    pictures = {
        "figure": "![Held-out accuracy against rollouts, by setting and arm](evidence.png)",
        "seconds": "![Held-out accuracy against processor seconds, by setting and arm](evidence_seconds.png)",
        "scores": "![Scores and held-out accuracy against rollouts, by setting and arm](evidence_scores.png)",
    }
    beside = {
        "chosen": chosen_table(known),
        "steps": step_scores_table(rows_of(STEP_SCORES)),
        "learning_on": learning_on_table(rows_of(LEARNING_ON)),
    }
    for name, table in (made | beside | (pictures if rows else {})).items():
        page = replace_table(page, f"evidence {name}", table)
    for name, table in {"development": variants_table(trials), "recipes": recipes_table(trials)}.items():
        history = replace_table(history, f"evidence {name}", table)
    return page, history, replace_table(readme, "evidence summary", made["summary"])


def documents() -> dict[Path, str]:
    """Each document with its tables made anew."""
    shown = ["accuracy", "accuracy_greedy", "step_accuracy", "step_auc", "within_bag_auc", "rollouts"]
    readme, quickstart = REPOSITORY / "README.md", REPOSITORY / "docs" / "quickstart.md"
    arms = ("dense+outcome", "outcome")
    short = markdown_table(last_rows("quickstart.jsonl", arms), metrics=shown)
    # One line a seed: a mean over a policy that learned and one that did not would describe neither.
    own = [row | {"arm": f"{row['arm']}, seed {row['seed']}"} for row in last_rows("quickstart_own_policy.jsonl", arms)]
    text = quickstart.read_text(encoding="utf-8")
    text = replace_table(text, "quickstart_arms", markdown_table(last_rows("quickstart.jsonl"), metrics=shown))
    text = replace_table(text, "quickstart_own_policy", markdown_table(own, metrics=shown[:5]))
    disaggregation = REPOSITORY / "docs" / "disaggregation.md"
    tables = page(disaggregation.read_text(encoding="utf-8"), read_results(RESULTS / "disaggregation.jsonl"))
    scale = REPOSITORY / "docs" / "scale.md"
    plan = scale_page(scale.read_text(encoding="utf-8"), read_results(RESULTS / "scale_plan.jsonl"))
    # One line a trainer: shares of the runs, and the mean step of the last whole checkpoint when they were killed.
    moments = read_results(RESULTS / "kill_and_resume.jsonl")
    killed = markdown_table(moments, metrics=["equal", "files_that_differ", "checkpoint_torn", "checkpoint_step"])
    runs = REPOSITORY / "docs" / "runs.md"
    faults = markdown_table(rows_of("faults"), metrics=["kills", "equal", "weights", "rows", "left_over"])
    recipe = REPOSITORY / "recipes" / "gsm8k_ppo" / "README.md"
    online = REPOSITORY / "docs" / "online_reward.md"
    shaping, aggregation = (REPOSITORY / "docs" / name for name in ("step_ppo.md", "how_to/choose_aggregation.md"))
    speed = REPOSITORY / "docs" / "speed.md"
    evaluation = REPOSITORY / "docs" / "evaluation.md"
    judged = (read_results(RESULTS / f"{name}.jsonl") for name in ("processbench", "best_of_n"))
    evidence, history = (REPOSITORY / "docs" / f"{name}.md" for name in ("evidence", "evidence_history"))
    pages = evidence_pages(*(path.read_text(encoding="utf-8") for path in (evidence, history, readme)))
    words = (REPOSITORY / "docs" / "words.md", REPOSITORY / "recipes" / "words" / "README.md")
    return {
        **{path: words_page(path.read_text(encoding="utf-8"), rows_of("words")) for path in words},
        evidence: pages[0],
        history: pages[1],
        speed: speed_page(speed.read_text(encoding="utf-8"), RESULTS),
        disaggregation: tables,
        scale: replace_table(plan, "kill_and_resume", killed),
        runs: replace_table(runs.read_text(encoding="utf-8"), "faults", faults),
        recipe: replace_table(recipe.read_text(encoding="utf-8"), "gsm8k_ppo plan", recipe_table()),
        online: replace_table(online.read_text(encoding="utf-8"), "online_reward", online_table()),
        evaluation: evaluation_page(evaluation.read_text(encoding="utf-8"), *judged),
        readme: replace_table(pages[2], "quickstart", short),
        shaping: replace_table(shaping.read_text(encoding="utf-8"), "cutting_finer", cutting_table()),
        aggregation: replace_table(
            aggregation.read_text(encoding="utf-8"), "long_responses", markdown_table(rows_of("long_responses"))
        ),
        quickstart: text,
    }


if __name__ == "__main__":
    for path, text in documents().items():
        write_atomic(path, text)
    draw_figure(REPOSITORY / "docs" / FIGURE, read_results(RESULTS / "disaggregation.jsonl"))
    draw_curves(REPOSITORY / "docs" / "evidence.png", rows_of(BENCHMARK))
    draw_scores(REPOSITORY / "docs" / "evidence_scores.png", rows_of(BENCHMARK))
    draw_seconds(REPOSITORY / "docs" / "evidence_seconds.png", rows_of(BENCHMARK))
