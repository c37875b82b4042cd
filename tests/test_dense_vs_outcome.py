"""The comparison of rewards at a size that proves nothing: all of it runs, goes on, and leaves what it promises."""

import json

import pytest
import yaml

from fractal_rm.comparison import command, reward_models, study
from fractal_rm.comparison.arms import ARMS, LEARNING_RATES, OUTCOME_ONLY
from fractal_rm.comparison.command import SMOKE_BUDGET, CompareArguments, run_comparison
from fractal_rm.comparison.page import UNDECIDED
from fractal_rm.comparison.study import trials_at, write_chosen
from fractal_rm.results import read_results

METRICS = {
    "rollouts", "accuracy", "accuracy_greedy", "step_accuracy", "rm_score", "response_tokens", "kl", "alarms",
    "seconds", "rm_rollouts", "rm_seconds",
}  # fmt: skip
LONG = "outcome_ppo_long"
RUN = [
    "outcome_ppo", LONG, "fractal_mix", "fractal_online", "orm", "supervised", "oracle", "implicit",
    "fractal_result_token",
]  # fmt: skip
VARYING = ("seconds", "rm_seconds")


def arguments(folder, **changes):
    """For a run in a folder that is named `smoke`, where smoke runs go."""
    known = {"output_dir": str(folder.parent), "smoke": True, "seeds": 1, "settings": ["easy"], "arms": RUN}
    return CompareArguments(**known | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "smoke"
    write_chosen(folder / "chosen.yaml", {name: ARMS[name].trials[0] for name in RUN if name != LONG}, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "FURTHER_SETTINGS", ("easy",))  # where arms beyond the core run
        run_comparison(arguments(folder))
        yield folder


def rows_of(folder):
    return read_results(folder / "results.jsonl")


def measured(row):
    return {key: value for key, value in row["metrics"].items() if key not in VARYING}


def test_every_arm_leaves_a_row_at_every_evaluation_point(finished):
    rows = rows_of(finished)
    # 48 labelled responses are three updates of 16 rollouts.
    last = {arm: 32 for arm in RUN} | {LONG: 32 + 48}
    assert {(row["arm"], row["metrics"]["rollouts"]) for row in rows} == {
        (arm, n) for arm in RUN for n in (0, last[arm])
    }
    assert len(rows) == 2 * len(RUN)
    assert all(set(row["metrics"]) == METRICS for row in rows)
    assert all((row["benchmark"], row["dataset"]) == ("dense_vs_outcome", "easy") for row in rows)


def test_all_arms_start_at_the_same_policy_without_having_moved_from_it(finished):
    starts = [row["metrics"] for row in rows_of(finished) if row["metrics"]["rollouts"] == 0]
    for name in ("accuracy", "accuracy_greedy", "step_accuracy", "response_tokens"):
        assert len({start[name] for start in starts}) == 1
    assert all(start["kl"] == pytest.approx(0.0, abs=1e-4) for start in starts)


def test_only_arms_with_a_reward_model_pay_for_one(finished):
    for row in rows_of(finished):
        paid = row["arm"] not in ("outcome_ppo", LONG, "oracle")
        assert (row["metrics"]["rm_rollouts"] > 0) == (row["metrics"]["rm_seconds"] > 0) == paid
        assert (row["metrics"]["rm_score"] is None) == (row["arm"] in ("outcome_ppo", LONG))


def test_labelled_responses_hold_outcomes_and_no_step_labels(finished):
    file = finished / "easy" / "seed-0" / "labelled" / "rows.jsonl"
    assert all(set(json.loads(line)) == {"prompt", "response", "label"} for line in file.read_text().splitlines())


def test_tables_figure_and_verdicts_are_written(finished):
    text = (finished / "report.md").read_text()
    assert "| easy | fractal_mix | outcome_ppo | 1 |" in text
    assert UNDECIDED in text  # one seed says nothing of a claim
    assert (finished / "curves.png").stat().st_size > 5000


def test_a_finished_study_is_not_run_again_and_half_a_run_is(finished):
    file = finished / "results.jsonl"
    before = rows_of(finished)
    run_comparison(arguments(finished))
    assert rows_of(finished) == before
    lost = [row for row in before if row["arm"] == "outcome_ppo" and row["config"]["last"]]
    text = file.read_text()
    file.write_text("".join(line for line in text.splitlines(keepends=True) if json.loads(line) not in lost))
    run_comparison(arguments(finished))
    again = rows_of(finished)[len(before) - 1 :]
    assert [row["arm"] for row in again] == ["outcome_ppo"] * 2
    # The same seed gives the same run: what was lost is made again as it was.
    assert measured(again[-1]) == measured(lost[0])
    file.write_text(text)


def test_another_recipe_makes_other_reward_models_and_runs_their_arms_again(finished, monkeypatch):
    file, before = finished / "results.jsonl", rows_of(finished)
    text, models = file.read_text(), finished / "easy" / "seed-0"
    monkeypatch.setitem(reward_models.TRAINING, "learning_rate", 1e-5)
    run_comparison(arguments(finished, arms=["outcome_ppo", "oracle", "fractal_mix"]))
    again = rows_of(finished)[len(before) :]
    assert {(row["arm"], row["config"]["reward_model"]["learning_rate"]) for row in again} == {("fractal_mix", 1e-5)}
    assert len(list(models.glob("reward_model-fractal-*"))) == 2
    file.write_text(text)


def test_a_longer_arm_has_the_settings_of_the_one_that_it_is(finished):
    wanted = ARMS["outcome_ppo"].trials[0]
    used = [row["config"] for row in rows_of(finished) if row["arm"] in (LONG, "outcome_ppo")]
    assert len(used) == 4
    assert all(config | wanted == config for config in used)


def test_tuning_finds_the_rate_with_the_outcome_only_arms_and_runs_an_arms_trials_with_it(
    tmp_path, finished, monkeypatch
):
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "policies").symlink_to(finished / "policies")
    monkeypatch.setattr(command, "TUNING_SETTINGS", ("easy",))
    for module in (command, study):
        monkeypatch.setattr(module, "LEARNING_RATES", LEARNING_RATES[:2])
    run_comparison(arguments(folder, tune=True, arms=["oracle", LONG]))  # a longer arm has no trials of its own
    rows = rows_of(folder)
    assert {row["split"] for row in rows} == {"tuning"}
    rates = {
        arm: {row["config"]["learning_rate"] for row in rows if row["arm"] == arm} for arm in (*OUTCOME_ONLY, "oracle")
    }
    (rate,) = rates.pop("oracle")
    assert set(map(frozenset, rates.values())) == {frozenset(LEARNING_RATES[:2])}
    points = {trial: [] for trial in trials_at("oracle", rate)}
    for row in rows:
        if row["arm"] == "oracle" and row["metrics"]["rollouts"]:
            points[row["config"]["trial"]].append(row["metrics"]["accuracy"])
    best = max(points, key=lambda trial: (sum(points[trial]), trial))
    chosen = yaml.safe_load((folder / "chosen.yaml").read_text())
    assert chosen == {"oracle": ARMS["oracle"].trials[best]}
    assert [len(values) for values in points.values()] == [len(SMOKE_BUDGET.points)] * 2


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="There is no setting 'hell'"):
        arguments(tmp_path / "smoke", settings=["hell"])
    with pytest.raises(ValueError, match="There is no arm 'dense'"):
        arguments(tmp_path / "smoke", arms=["dense"])
    with pytest.raises(ValueError, match="`jobs` is 0"):
        arguments(tmp_path / "smoke", jobs=0)
    with pytest.raises(FileNotFoundError, match=r"chosen\.yaml is no file"):
        run_comparison(arguments(tmp_path / "smoke"))
    write_chosen(tmp_path / "smoke" / "chosen.yaml", {"oracle": {}}, "a test")
    with pytest.raises(ValueError, match="has no settings of outcome_ppo"):
        run_comparison(arguments(tmp_path / "smoke"))
