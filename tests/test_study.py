"""The statistics of the comparison, against independent computations, and its plan of runs."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import TrainerControl, TrainerState

from benchmarks.evidence import page as evidence_page
from benchmarks.evidence import statistics, study_page
from benchmarks.evidence.arms import ARMS, MAIN_CONDITIONS, Assets, Evidence, copy_label, result_spans
from benchmarks.evidence.claims import claims as claims_of
from benchmarks.evidence.claims import verdicts
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.study import arms as shipped
from fractal_rm.study import page
from fractal_rm.study.arms import LEARNING_RATES, PPO_SETTINGS, TRAINING
from fractal_rm.study.rivals import ScriptedRewardModel, one_by_one, oracle, random_steps
from fractal_rm.study.run import Budget, Clock, Evaluations
from fractal_rm.study.statistics import BENCHMARK, curves, finished_runs, interquartile_mean, latest
from fractal_rm.study.study import TUNING_SEED, Study, Unit, run_units
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS, ConditionName, form_tokenizer
from fractal_rm.tasks.arithmetic.problems import Beliefs, read_problem

VALUES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)
RECIPES = Assets.recipes(CONDITIONS["easy"])
EXTRA = {"rm_rollouts": 0, "rm_seconds": 0.0, "response_tokens": 30.0, "kl": 0.1, "alarms": 0, "rm_score": None}


def rows_of(setting, arm, seed, curve, *, finished=True, rm_rollouts=0, step=100):
    """Rows of a run whose accuracy follows a curve; evaluations stand `step` rollouts and as many seconds apart."""
    return [
        {
            "benchmark": BENCHMARK, "dataset": setting, "arm": arm, "seed": seed, "split": "held_out",
            "metrics": EXTRA | {
                "rollouts": step * i, "accuracy": value, "accuracy_greedy": value, "step_accuracy": value,
                "seconds": float(step * i), "rm_rollouts": rm_rollouts, "rm_seconds": float(rm_rollouts),
            },
            "config": {"last": finished and i == len(curve) - 1},
        }
        for i, value in enumerate(curve)
    ]  # fmt: skip


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=40).filter(lambda v: len(v) % 4 == 0))
def test_the_interquartile_mean_is_that_of_scipy_where_quarters_are_whole(values):
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-9)


@given(VALUES, VALUES)
def test_the_probability_of_improvement_is_the_u_statistic_over_all_pairs(ours, theirs):
    found = stats.mannwhitneyu(ours, theirs, alternative="two-sided", method="asymptotic").statistic
    assert statistics.improvement_probability(ours, theirs) == pytest.approx(found / (len(ours) * len(theirs)))


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_area_of_a_straight_line_is_its_middle(start, end):
    rollouts = np.array([0, 64, 256, 512])
    line = start + (end - start) * rollouts / 512
    assert statistics.area(rollouts, line) == pytest.approx((start + end) / 2)


def test_rollouts_to_reach_are_where_the_line_crosses():
    rollouts = np.array([0, 100, 300])
    curve = np.array([0.2, 0.4, 0.8])
    for target in (0.25, 0.4, 0.5, 0.8):
        place = statistics.rollouts_to_reach(rollouts, curve, target)
        assert np.interp(place, rollouts, curve) == pytest.approx(target)
    assert statistics.rollouts_to_reach(rollouts, curve, 0.81) == float("inf")
    assert statistics.rollouts_to_reach(rollouts, curve, 0.1) == 0


def compare(rows, setting, arm):
    return statistics.evidence_of(finished_runs(rows), setting, arm)


def claims(rows, arm):
    return claims_of(statistics.evidence(finished_runs(rows), arm))


def study(gain, *, seeds=10, rm_rollouts=0):
    """A study in which `fractal` is `gain` above `outcome_grpo` after the start, on all main settings."""
    rng, rows = np.random.default_rng(0), []
    for setting in MAIN_CONDITIONS:
        for seed in range(seeds):
            noise = rng.normal(0, 0.01)
            base = [0.3 + noise, 0.4 + noise, 0.5 + noise, 0.6 + noise]
            ours = [base[0], *(value + gain for value in base[1:])]
            rows += rows_of(setting, "outcome_grpo", seed, base)
            rows += rows_of(setting, "outcome_ppo", seed, [value - 0.1 for value in base])
            rows += rows_of(setting, "outcome_grpo_long", seed, [*base, 0.7 + noise])
            rows += rows_of(setting, "outcome_ppo_long", seed, [*base, 0.65 + noise])
            rows += rows_of(setting, "supervised", seed, [value + 0.01 for value in ours])
            for arm in ("fractal", "fractal_mix"):
                rows += rows_of(setting, arm, seed, ours, rm_rollouts=rm_rollouts)
    return rows


def test_a_known_gain_over_the_better_outcome_arm_is_found_with_its_interval():
    found = compare(study(0.2), "easy", "fractal")
    assert found.rival == "outcome_grpo"
    assert (found.seeds, found.half_rollouts) == (10, 200)
    for difference in (found.half, found.end):
        assert difference.value == pytest.approx(0.2)
        assert difference.low == pytest.approx(0.2)
    # The mean area differs by the gain, but for the triangle before the first evaluation.
    assert found.area.value == pytest.approx(0.2 * (1 - 1 / 6))
    assert found.improvement == 1.0
    assert found.reach.value == pytest.approx(1 / 3)  # .4 + .2 is where the rival ends
    assert found.means == (pytest.approx(found.means[1] + 0.2), pytest.approx(0.6, abs=0.02))
    assert found.ceiling.value == pytest.approx(-0.01)
    assert found.drop == pytest.approx(0.0)


def test_a_rival_without_a_gain_is_compared_with_at_its_end():
    rows = [row for row in study(0.2) if not row["arm"].startswith("outcome")]
    for seed in range(10):
        end = 0.3 + 0.02 * (-1) ** seed  # as many runs rise as fall
        rows += rows_of("easy", "outcome_grpo", seed, [0.3, 0.31, 0.3, end])
    found = compare(rows, "easy", "fractal")
    assert not found.learns
    assert found.half_rollouts == 300
    assert found.half.value == found.end.value
    # Where that point is does not depend on how many seeds our arm has.
    few = [row for row in rows if row["arm"] != "fractal" or row["seed"] == 0]
    assert compare(few, "easy", "fractal").half_rollouts == 300
    # Nothing to reach: no share is shown, and claims are counted without such a setting too.
    made = study_page.tables(rows)
    (line,) = (line for line in made["summary"].splitlines() if line.startswith("| easy |"))
    assert line.endswith(f"| {study_page.MISSING} |")
    (claim,) = (claim for claim in claims(rows, "fractal") if "at most half" in claim.text)
    assert "easy" in claim.known
    assert claim.learning == ()  # the only setting with an outcome-only arm is that one


def test_the_share_of_rollouts_to_reach_the_rivals_end_has_an_interval_over_seeds():
    rows = []
    for seed in range(10):
        rows += rows_of("easy", "outcome_grpo", seed, [0.2, 0.3, 0.5])
        rows += rows_of("easy", "fractal", seed, [0.2, 0.5 + 0.02 * (seed - 4.5), 0.8])
    found = compare(rows, "easy", "fractal").reach
    assert found.value == pytest.approx(0.5)
    assert 0.4 < found.low < 0.5 < found.high < 0.6
    # Draws of seeds whose mean never gets there leave the upper end open.
    never = [row for row in rows if row["arm"] != "fractal"]
    for seed in range(10):
        never += rows_of("easy", "fractal", seed, [0.2, 0.3, 0.52 if seed else 0.3])
    reach = compare(never, "easy", "fractal").reach
    assert (reach.value, reach.high) == (float("inf"), float("inf"))
    assert np.isfinite(reach.low)
    assert "never" in study_page.tables(never)["gains"]


def test_the_reward_models_rollouts_are_taken_from_its_arm():
    # 100 of 300 rollouts go to the reward model: its arm is at its second evaluation when the rival is at its end.
    found = compare(study(0.3, rm_rollouts=100), "easy", "fractal")
    assert found.with_rollouts.value == pytest.approx(0.5 + 0.3 - 0.6)
    assert compare(study(0.3, rm_rollouts=300), "easy", "fractal").with_rollouts is None


def test_the_better_of_the_longer_outcome_runs_is_compared_at_its_own_end():
    rows = study(0.3)
    assert compare(rows, "easy", "fractal").longer.value == pytest.approx(0.9 - 0.7)
    short = [row for row in rows if row["arm"] != "outcome_ppo_long"]
    assert compare(short, "easy", "fractal").longer is None  # the one that is missing may be the better one
    for seed in range(5):  # half of the seeds are enough, and those are the ones that are compared
        short += rows_of("easy", "outcome_ppo_long", seed, [0.3, 0.4, 0.5, 0.6, 0.8])
    difference = compare(short, "easy", "fractal").longer
    ends = curves(finished_runs(short), "easy", "fractal").values[:5, -1]
    assert difference.value == pytest.approx(ends.mean() - 0.8)


def test_at_equal_seconds_the_longest_outcome_runs_are_compared_where_they_have_taken_as_many():
    # Our runs take 300 seconds, their reward model 100 (`rows_of`: a second a rollout).
    rows = study(0.3, rm_rollouts=100)
    for seed in range(10):
        rows += rows_of("easy", "outcome_grpo_4x", seed, [0.3, 0.4, 0.5, 0.6, 0.8, 0.9])
    assert compare(rows, "easy", "fractal").with_seconds is None  # the one that is missing may be the better one
    end = 0.3 + curves(finished_runs(rows), "easy", "outcome_grpo").values[:, -1].mean()
    for seed in range(10):  # done after 300 seconds: its end counts, which is not the better one
        rows += rows_of("easy", "outcome_ppo_3x", seed, [0.3, 0.4, 0.5, 0.79])
    found = compare(rows, "easy", "fractal").with_seconds
    assert found.value == pytest.approx(end - 0.8)
    halfway = study(0.3, rm_rollouts=150)
    for seed in range(10):
        halfway += rows_of("easy", "outcome_grpo_4x", seed, [0.3, 0.4, 0.5, 0.6, 0.8, 0.9])
        halfway += rows_of("easy", "outcome_ppo_3x", seed, [0.3, 0.4, 0.5, 0.86])
    assert compare(halfway, "easy", "fractal").with_seconds.value == pytest.approx(end - 0.86)
    few = [row for row in halfway if row["arm"] != "outcome_ppo_3x"]
    few += [row for seed in range(10) for row in rows_of("easy", "outcome_ppo_3x", seed, [0.3, 0.4, 0.5, 0.84])]
    assert compare(few, "easy", "fractal").with_seconds.value == pytest.approx(end - 0.85)


def test_ahead_with_all_rollouts_counted_in_takes_an_interval_above_0():
    rows = [row for row in study(0.3) if not row["arm"].endswith("_long")]
    for setting in MAIN_CONDITIONS:
        for seed in range(10):  # ahead in the mean, because of one seed
            end = 0.3 if seed == 0 else 0.95
            for arm in ("outcome_grpo_long", "outcome_ppo_long"):
                rows += rows_of(setting, arm, seed, [0.3, 0.4, 0.5, 0.6, end])
    assert compare(rows, "easy", "fractal").longer.value > 0
    (claim,) = (claim for claim in claims(rows, "fractal") if "counted in" in claim.text)
    assert (claim.state, claim.holds) == ("not met", ())


def test_claims_are_met_by_a_gain_and_not_by_none():
    met = {claim.text: claim.state for claim in claims(study(0.3), "fractal")}
    assert set(met.values()) == {"met"}, met
    none = [claim.state for claim in claims(study(0.0), "fractal") if claim.state != "met"]
    assert none == ["not met"] * 4  # all but: not below at the end, near the ceiling, no collapse


def test_one_run_that_collapses_is_a_collapse():
    rows = study(0.3)
    last = max(row["metrics"]["rollouts"] for row in rows if not row["arm"].endswith("_long"))
    for row in rows:
        if (row["dataset"], row["arm"], row["seed"]) == ("medium", "fractal", 3) and row["metrics"]["rollouts"] == last:
            row["metrics"]["accuracy"] -= 0.2
    assert compare(rows, "medium", "fractal").drop == pytest.approx(0.1)
    (claim,) = (claim for claim in claims(rows, "fractal") if "collapse" in claim.text)
    assert (claim.state, set(MAIN_CONDITIONS) - set(claim.holds)) == ("not met", {"medium"})


def test_claims_are_undecided_as_long_as_settings_without_rows_could_meet_them():
    rows = [row for row in study(0.3) if row["dataset"] in ("easy", "medium")]
    found = claims(rows, "fractal")
    assert found[0].holds == found[0].known == ("easy", "medium")
    assert found[2].known == ("medium",)  # the long ones
    assert {claim.state for claim in found} == {"undecided"}
    few = [row for row in study(0.3) if row["arm"] != "supervised" or row["seed"] < 4]
    assert [claim.state for claim in claims(few, "fractal")].count("undecided") == 1
    worse = [row for row in study(0.0) if row["dataset"] in ("easy", "medium")]
    assert claims(worse, "fractal")[0].state == "not met"  # the other four are fewer than five
    assert claims([], "fractal")[0].known == ()
    assert verdicts([], study_page.DEFAULT_ARMS) == []


def test_few_seeds_have_no_interval_and_decide_no_claim():
    few = study(0.3, seeds=4)
    found = compare(few, "easy", "fractal")
    assert found.end.value == pytest.approx(0.3)
    assert np.isnan(found.end.low)
    assert np.isnan(found.half.high)
    assert all(not claim.known for claim in claims(few, "fractal"))
    made = study_page.tables(few)
    assert made["claims"] == study_page.UNDECIDED
    assert "| +30.0 | +30.0 | 25% |" in made["summary"]
    assert all(claim.state == "met" for claim in claims(study(0.3, seeds=5), "fractal"))


def test_half_a_run_is_no_run_and_a_run_that_was_done_again_counts_once():
    half = rows_of("easy", "fractal", 0, [0.1, 0.2], finished=False)
    assert finished_runs(half) == {}
    again = half + rows_of("easy", "fractal", 0, [0.3, 0.4, 0.5])
    assert len(latest(again)) == 3
    assert curves(finished_runs(again), "easy", "fractal").values.tolist() == [[0.3, 0.4, 0.5]]


def test_a_run_with_other_settings_takes_the_place_of_the_whole_old_one():
    old = rows_of("easy", "fractal", 0, [0.3, 0.4, 0.5])
    new = rows_of("easy", "fractal", 0, [0.6, 0.7, 0.8])
    for row in new:
        row["config"]["lam"] = 0.5
    # Killed on its way: its first rows and the old last one make no run.
    assert finished_runs(old + new[:2]) == {}
    assert [row["metrics"]["accuracy"] for row in latest(old + new[:2])] == [0.6, 0.7]
    assert curves(finished_runs(old + new), "easy", "fractal").values.tolist() == [[0.6, 0.7, 0.8]]


def test_a_metric_that_some_evaluations_lack_has_a_curve_of_the_others():
    rows = rows_of("easy", "fractal", 0, [0.1, 0.2, 0.3])
    rows[1]["metrics"]["accuracy_greedy"] = None
    assert curves(finished_runs(rows), "easy", "fractal", "accuracy_greedy").rollouts.tolist() == [0, 200]
    assert curves(finished_runs(rows), "easy", "fractal", "rm_score") is None


def test_tables_are_made_of_any_rows_and_the_figure_is_drawn(tmp_path):
    assert set(study_page.tables([]).values()) == {page.NOTHING}
    made = study_page.tables(study(0.3))
    assert "| easy | fractal | outcome_grpo | 10 | 200 | **+30.0** [+30.0, +30.0]" in made["gains"]
    assert "**met**" in made["claims"]
    assert {line.split(" | ")[0] for line in made["claims_default"].splitlines()[2:]} == {"| fractal_mix"}
    assert "| easy | **+30.0** [+30.0, +30.0] | **+20.0** [+20.0, +20.0] | — |" in made["costs"]
    # outcome-only's end, ours, the ceiling's; then the gains
    assert "| easy | 10 |" in made["summary"]
    assert "| **+30.0** [+30.0, +30.0] | **+30.0** [+30.0, +30.0] | 25% |" in made["summary"]
    # Against `fractal`: at the end a known distance; with other numbers of rollouts there is no area to compare.
    lines = [made[name].splitlines()[2:] for name in ("against", "against_area")]
    ends, areas = (dict(line.split(" | ", 1) for line in table) for table in lines)
    assert ends["| outcome_grpo"].startswith("-30.0 [-30.0, -30.0] (10) | -30.0")
    assert ends["| supervised"].startswith("**+1.0** [+1.0, +1.0] (10)")
    assert "| fractal" not in ends
    assert areas["| outcome_grpo"].startswith("-25.0 [-25.0, -25.0] (10)")
    assert "| outcome_grpo_long" in ends
    assert "| outcome_grpo_long" not in areas
    plain = page.tables(study(0.3))
    line = "| easy | fractal | outcome_grpo | 10 | 90.1 | 60.1 | 200 | **+30.0** [+30.0, +30.0] |"
    assert line in plain["Against the better outcome-only arm"]
    assert "| fractal | 0.9" in plain["Accuracy at the end"]
    (said,) = (one for one in page.sentences(study(0.3)) if one.startswith("easy"))
    gain = "+30.0 [+30.0, +30.0] points (seeds: 10)"
    assert said == f"easy: accuracy at the end, fractal_mix minus outcome_grpo: {gain}."
    assert not page.draw_curves(tmp_path / "curves.png", [])
    assert page.draw_curves(tmp_path / "curves.png", study(0.3))
    assert not evidence_page.draw_scores(tmp_path / "scores.png", [])
    scored = study(0.3)
    for row in scored:
        row["metrics"]["rm_score"] = row["metrics"]["accuracy"] - 0.1
    assert evidence_page.draw_scores(tmp_path / "scores.png", scored)
    assert "-0.10 to -0.10" in study_page.tables(scored)["hacking"]
    assert not evidence_page.draw_seconds(tmp_path / "seconds.png", [])
    assert evidence_page.draw_seconds(tmp_path / "seconds.png", scored)
    for name in ("curves", "scores", "seconds"):
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"


# The plan ------------------------------------------------------------------------------------------------------------


def plan(chosen=None, kind=Evidence):
    return kind(Path("rows.jsonl"), Path(), Budget(), chosen or {})


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_has_two_different_trials_a_rate_that_the_trainer_takes(name, tmp_path):
    for rate in LEARNING_RATES:
        trials = [ARMS[name].trials[number] for number in plan().trials_at(name, [rate])]
        assert len(trials) == 2
        assert trials[0] != trials[1]
        for trial in trials:
            config = StepPPOConfig(output_dir=str(tmp_path), **(PPO_SETTINGS | trial))
            assert {option: getattr(config, option) for option in trial} == trial
    assert {unit.seed for unit in plan().tuning_units(["easy"], {name: LEARNING_RATES})} == {TUNING_SEED}


@pytest.mark.parametrize(
    "kind", sorted({arm.judge for arm in ARMS.values() if arm.judge in Assets.recipes(CONDITIONS["easy"])})
)
def test_every_kind_of_reward_model_has_a_recipe_that_can_be_trained(kind, tmp_path):
    recipe = dict(RECIPES[kind])
    if "beta" in recipe:  # as many passes over the responses as the others make, in batches as large
        assert (recipe["epochs"], recipe["batch_size"]) == (
            TRAINING["num_train_epochs"],
            TRAINING["per_device_train_batch_size"],
        )
        return
    if recipe.get("likelihood_prior_weight"):
        recipe["reference_model"] = "policy"
    config = FractalConfig(output_dir=str(tmp_path), **recipe)
    assert config.num_train_epochs == TRAINING["num_train_epochs"]
    # Only the arm that is named for gold step labels learns from them.
    assert (config.instance_weight > 0) == (kind == "supervised")


def trial_rows(arm, accuracies):
    """Rows of an arm's trials on two settings; accuracies by setting and trial."""
    return [
        {
            "benchmark": BENCHMARK, "arm": arm, "dataset": setting, "seed": TUNING_SEED, "split": "tuning",
            "metrics": {"rollouts": 64, "accuracy": value}, "config": {"trial": trial},
        }
        for setting, values in accuracies.items()
        for trial, value in enumerate(values)
    ]  # fmt: skip


def test_the_rate_is_that_of_the_outcome_only_arms_and_each_arm_has_its_own_best_variant(tmp_path):
    rows = trial_rows(
        "outcome_grpo", {"medium": [0.1, 0.1, 0.5, 0.2, 0.6, 0.6], "branching": [0.1, 0.1, 0.2, 0.4, 0, 0]}
    )
    rows += trial_rows("outcome_ppo", {"medium": [0.3] * 6, "branching": [0.3] * 6})
    rows += trial_rows("fractal_mix_own_rate", {"medium": [0, 0, 0.5, 0.4, 0.9, 0.8], "branching": [0] * 6})
    # Better with another rate, on the two settings together; on one alone it would be another variant.
    rows += trial_rows("fractal", {"medium": [0, 0, 0.5, 0.4, 0.9, 0.9], "branching": [0, 0, 0.3, 0.5, 0.9, 0.9]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = Evidence(file, tmp_path, Budget(), {})
    settings = ("medium", "branching")
    assert study.choose_rate(settings) == LEARNING_RATES[1]
    arms = ["outcome_grpo", "outcome_ppo", "fractal", "fractal_mix_own_rate"]
    chosen = study.choose(settings, arms, LEARNING_RATES[1])
    # An arm with a rate of its own takes it from all of its trials.
    trials = {"outcome_grpo": 2, "outcome_ppo": 3, "fractal": 3, "fractal_mix_own_rate": 4}
    assert chosen == {arm: ARMS[arm].trials[number] for arm, number in trials.items()}
    with pytest.raises(ValueError, match="Trial 2 of orm on medium has no rows"):
        study.choose(settings, ["orm"], LEARNING_RATES[1])


def test_core_arms_come_first_and_seeds_before_settings():
    units = plan().units(["branching", "medium", "hard"], ["outcome_grpo", "fractal", "lca"], 6)
    assert units[:4] == [
        Unit("branching", 0, "outcome_grpo"), Unit("branching", 0, "fractal"), Unit("medium", 0, "outcome_grpo"),
        Unit("medium", 0, "fractal"),
    ]  # fmt: skip
    assert len(units) == 6 * 3 * 2 + 5 * 2
    assert all(unit.arm == "lca" and unit.task != "hard" for unit in units[-10:])
    # Ten seeds of these on every setting; five of the rest, of longer outcome-only runs on every setting too.
    assert set(shipped.ARMS) == {
        "outcome_grpo", "outcome_ppo", "orm", "fractal", "fractal_mix", "fractal_online", "supervised", "oracle",
        "random_steps",
    }  # fmt: skip
    assert plan(kind=Study).units(["easy", "hard"], ["fractal"], 2) == [
        Unit("easy", 0, "fractal"), Unit("hard", 0, "fractal"), Unit("easy", 1, "fractal"), Unit("hard", 1, "fractal"),
    ]  # fmt: skip
    assert len(plan().units(list(CONDITIONS), ["outcome_grpo_long"], 10)) == 5 * len(CONDITIONS)


def test_the_arm_that_knows_of_flipped_labels_runs_where_labels_are_flipped_as_long_as_the_one_that_does_not():
    units = plan().units(["medium", "noise_20"], ["fractal_flips"], 2)
    assert units == [Unit("noise_20", 0, "fractal_flips"), Unit("noise_20", 1, "fractal_flips")]
    study = plan({"fractal": {}, "fractal_flips": {}})
    blind, told = (study.config(Unit("noise_20", 0, arm)) for arm in ("fractal", "fractal_flips"))
    assert blind["budget"] == told["budget"]
    known = {"missed_good": 0.2, "missed_bad": pytest.approx(0.1 * 0.8 + 0.9 * 0.2)}
    assert told["reward_model"] == blind["reward_model"] | known


def test_the_choices_of_the_command_are_the_arms_and_settings_that_there_are():
    assert get_args(shipped.ArmName) == tuple(shipped.ARMS)
    assert get_args(ConditionName) == tuple(CONDITIONS)


class InThisProcess:
    """A pool of processes whose only process is this one."""

    def __init__(self, jobs, initializer):
        self.before = signal.getsignal(signal.SIGINT), torch.get_num_threads()
        initializer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before[0])
        torch.set_num_threads(self.before[1])

    def imap_unordered(self, run, units, chunksize):
        return map(run, units)


def test_ctrl_c_is_left_to_the_process_that_started_the_others(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda method: SimpleNamespace(Pool=InThisProcess))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it from the start
    seen = []
    run_units(lambda unit: seen.append((unit, signal.getsignal(signal.SIGINT), torch.get_num_threads())), [7, 8], 2)
    assert seen == [(7, signal.SIG_IGN, 1), (8, signal.SIG_IGN, 1)]
    run_units(lambda unit: seen.append(signal.getsignal(signal.SIGINT)), [9], 1)
    assert seen[-1] is not signal.SIG_IGN


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match=r"There is no arm 'dense'\. Choose from outcome_grpo, "):
        plan(kind=Study).check_arms(["dense"])


# Settings and rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_setting_makes_problems_that_differ_by_seed_and_stream_and_fit_the_longest_response(name):
    setting = CONDITIONS[name]
    held_out = [p.prompt for p in setting.problems("held_out", 50, 3)]
    assert held_out == [p.prompt for p in setting.problems("held_out", 50, 3)]
    assert held_out != [p.prompt for p in setting.problems("held_out", 50, 4)]
    assert held_out != [p.prompt for p in setting.problems("train", 50, 3)]
    tokenizer = form_tokenizer()
    for problem in setting.problems("held_out", 50, 3):
        assert read_problem(problem.prompt).prompt == problem.prompt
        right = Beliefs(0.0).respond(problem, None)
        assert problem.check_answer(right)
        # With its end of text.
        assert len(tokenizer(right)["input_ids"]) + 1 <= setting.max_new_tokens


def test_the_reward_model_of_the_shift_sees_shorter_problems_only():
    shift = CONDITIONS["shift"]
    longest = max(len(p.changes) for p in shift.problems("reward_model", 200, 0))
    assert longest < min(len(p.changes) for p in shift.problems("train", 200, 0))


def test_a_fixed_share_of_labels_is_flipped_and_always_the_same_ones():
    setting, clean = CONDITIONS["noise_20"], CONDITIONS["easy"]
    prompts = [p.prompt for p in setting.problems("train", 2000, 0)]
    answers = [f"Answer: {i % 10}" for i in range(len(prompts))]
    noisy, true = setting.outcome(prompts, answers), clean.outcome(prompts, answers)
    assert noisy == setting.outcome(prompts, answers)
    assert 0.16 < np.mean(np.array(noisy) != np.array(true)) < 0.24


def test_the_reward_model_of_results_reads_what_lines_state_and_nothing_else():
    problem = CONDITIONS["branching"].problems("train", 1, 0)[0]
    response = Beliefs(0.0).respond(problem, None)
    found = [response[a:b] for a, b in result_spans(response)]
    assert found == [line[-2:] for line in response.split("\n")]
    assert len(result_spans("nothing\nof the kind")) == 2


def test_rules_score_every_line_as_a_reward_model_would():
    problem = CONDITIONS["easy"].problems("train", 1, 0)[0]
    good = Beliefs(0.0).respond(problem, None)
    bad = good.replace(f"Answer: {problem.answer}", "Answer: x")
    prompts = [problem.prompt] * 3
    for rule in (oracle(CONDITIONS["easy"]), random_steps, copy_label(CONDITIONS["easy"])):
        scored = ScriptedRewardModel(one_by_one(rule)).score(prompts, [good, bad, " \n"])
        assert [len(row.steps) for row in scored] == [len(good.split("\n"))] * 2 + [0]
        assert all(0 <= score <= 1 for row in scored for score in row.step_scores)
        assert scored[2].error
        assert "".join(good[a:b] for a, b in scored[0].spans) == good.replace("\n", "")
    compared = ScriptedRewardModel(lambda _, steps: [[len(steps) / 4] * len(cut) for cut in steps])
    assert [row.score for row in compared.score(prompts, [good, "\n", bad])[::2]] == [0.5, 0.5]
    known = ScriptedRewardModel(one_by_one(oracle(CONDITIONS["easy"]))).score(prompts[:2], [good, bad])
    assert known[0].step_scores == [1.0] * len(known[0].steps)
    assert known[1].step_scores == [1.0] * (len(known[1].steps) - 1) + [0.0]
    copied = ScriptedRewardModel(one_by_one(copy_label(CONDITIONS["easy"]))).score(prompts[:2], [good, bad])
    assert [set(row.step_scores) for row in copied] == [{1.0}, {0.0}]


def test_the_oracle_agrees_with_the_checker_on_text_with_strange_line_ends():
    prompt = CONDITIONS["branching"].problems("train", 1, 0)[0].prompt
    for text in ("Mia: 3\r\nTom: 4", "Mia: 3\x0bTom: 4\x85x", "\n\n a \n"):
        (scored,) = ScriptedRewardModel(one_by_one(oracle(CONDITIONS["branching"]))).score([prompt], [text])
        assert len(scored.steps) == len(scored.spans) > 0


def test_a_resumed_run_goes_on_with_the_seconds_of_its_checkpoint_and_is_not_evaluated_at_its_start(tmp_path):
    file, evaluated = tmp_path / "seconds.json", []
    clock = Clock(file)
    clock.seconds = 40.0
    saving, going_on = TrainerControl(should_save=True), TrainerControl()
    Evaluations([2], evaluated.append, clock).on_step_end(None, TrainerState(global_step=1), saving)
    clock.seconds = 50.0  # of a second step, whose checkpoint was not finished
    Evaluations([], evaluated.append, clock).on_step_end(None, TrainerState(global_step=2), saving)
    resumed = Clock(file)
    callback = Evaluations([2], evaluated.append, resumed)
    callback.on_train_begin(None, TrainerState(global_step=1), None)
    assert (resumed.seconds, evaluated) == (40.0, [])
    callback.on_step_end(None, TrainerState(global_step=2), going_on)
    assert evaluated == [2]
    with resumed.stopped():
        assert resumed.seconds > 40.0  # time that passed since it went on
