"""What the quickstart's folder holds -> the contents of its report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fractal_rm.evaluation.results import read_results
from fractal_rm.report.quickstart_report import QuickstartReport, compare_curves, rollouts_to_reach
from fractal_rm.reward_model import StepRewardModel, StepScores

# Responses of each kind in the heat map: the first of the validation set, not chosen by hand.
EXAMPLES_OF_A_KIND = 6


def summarize(folder: Path, arms: Sequence[str], seed: int, budget: str) -> QuickstartReport:
    """Read rows, curves and validation responses of a finished run.

    Args:
        folder: The run's output folder.
        arms: Names of the arms, the dense one first and the outcome-only one second.
        seed: The run's seed.
        budget: Name of the run's budget.

    Returns:
        The contents of `report.html`.
    """
    rows = read_results(folder / "results.jsonl")
    curves: dict[str, list[tuple[float, float]]] = {}
    for arm in arms:
        points = json.loads((folder / "ppo" / arm / "curve.json").read_text(encoding="utf-8"))
        curves[arm] = [(point["rollouts"], point["accuracy"]) for point in points]
    reward_model = StepRewardModel.from_pretrained(folder / "reward_model", device="cpu")
    lines = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    validation = [json.loads(line) for line in lines]
    scored = reward_model.score([row["prompt"] for row in validation], [row["steps"] for row in validation])
    return QuickstartReport(
        title="fractal_rm quickstart",
        seed=seed,
        budget=budget,
        seconds=sum(json.loads(file.read_text())["seconds"] for file in (folder / "done").glob("*.json")),
        headlines=headlines(rows, curves),
        curves=curves,
        findings=compare_curves(curves),
        examples=examples(validation, scored),
        probs=[result.score for result in scored],
        labels=[row["label"] for row in validation],
        rows=rows,
        next_commands=next_commands(folder),
    )


def headlines(
    rows: Sequence[dict[str, Any]], curves: dict[str, list[tuple[float, float]]]
) -> list[tuple[str, str, str]]:
    """The numbers that a reader looks for first, as (name, value, note)."""

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


def examples(validation: Sequence[dict[str, Any]], scored: Sequence[StepScores]) -> list[dict[str, Any]]:
    """Viewer rows of the first responses with a right answer and the first with a wrong one."""
    right, wrong = (
        [i for i, row in enumerate(validation) if row["label"] == label][:EXAMPLES_OF_A_KIND] for label in (1.0, 0.0)
    )
    return [
        {
            "id": f"validation-{i}",
            "prompt": validation[i]["prompt"],
            "response": scored[i].response,
            "label": validation[i]["label"],
            "score": scored[i].score,
            "steps": [
                asdict(step) | {"gold": gold}
                for step, gold in zip(scored[i].steps, validation[i]["step_labels"], strict=True)
            ],
        }
        for i in (*right, *wrong)
    ]


def next_commands(folder: Path) -> list[tuple[str, str]]:
    """Commands to go on with, as (command, purpose)."""
    return [
        (
            f"fractal-rm score --model {folder}/reward_model --input {folder}/validation.jsonl "
            "--output scores.jsonl --html view.html",
            "Score responses and look at every step.",
        ),
        ("fractal-rm ppo --config recipes/arithmetic/config.yaml", "PPO with your own settings on this task."),
        (
            f"fractal-rm train --model {folder}/policy --train_file {folder}/responses.jsonl --aggregation product "
            "--output_dir my_reward_model",
            "Train a step reward model on your own responses and labels.",
        ),
    ]
