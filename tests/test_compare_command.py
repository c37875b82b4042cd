"""The comparison of rewards at a size that proves nothing: all of it runs, goes on, and leaves what it promises."""

import importlib
import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock

from benchmarks.common.implicit import ImplicitReward
from benchmarks.evidence import arms as evidence_arms
from benchmarks.evidence.arms import ARMS, Assets, Evidence
from benchmarks.evidence.dense_vs_outcome import EvidenceArguments
from fractal_rm.cli import compare as command
from fractal_rm.cli.compare import SMOKE_BUDGET, SMOKE_STEPS, CompareArguments, run_comparison
from fractal_rm.evaluation.results import read_results
from fractal_rm.study import arms as study_arms
from fractal_rm.study import run, study
from fractal_rm.study.arms import LEARNING_RATES, OUTCOME_ONLY
from fractal_rm.study.run import measure_start
from fractal_rm.study.study import write_chosen
from fractal_rm.tasks.arithmetic import conditions
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS, Condition

EASY = CONDITIONS["easy"].small()
METRICS = {
    "rollouts", "accuracy", "accuracy_greedy", "step_accuracy", "rm_score", "response_tokens", "kl", "alarms",
    "seconds", "rm_rollouts", "rm_seconds",
}  # fmt: skip
LONGER = {"outcome_ppo_long": 32 + 48, "outcome_ppo_3x": 3 * 32}  # 48 labelled responses
RUN = [
    "outcome_ppo", *LONGER, "fractal_mix", "fractal_online", "orm", "supervised", "oracle", "implicit",
    "implicit_online", "fractal_result_token",
]  # fmt: skip
VARYING = ("seconds", "rm_seconds")


def arguments(folder, **changes):
    """For a run in a folder that is named `smoke`, where smoke runs go."""
    known = {"output_dir": str(folder.parent), "smoke": True, "seeds": 1, "settings": ["easy"], "arms": RUN}
    return EvidenceArguments(**known | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "smoke"
    write_chosen(folder / "chosen.yaml", {name: ARMS[name].trials[0] for name in RUN if name not in LONGER}, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_arms, "FURTHER", ("easy",))  # where arms beyond the core run
        patch.setattr(conditions, "TOKENS_PER_STEP", 3)  # the small policy writes noise to the last token
        run_comparison(arguments(folder), Evidence)
        yield folder


def rows_of(folder):
    return read_results(folder / "results.jsonl")


def measured(row):
    return {key: value for key, value in row["metrics"].items() if key not in VARYING}


def test_every_arm_leaves_a_row_at_every_evaluation_point(finished):
    rows = rows_of(finished)
    last = {arm: 32 for arm in RUN} | LONGER
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
        paid = row["arm"] not in ("outcome_ppo", *LONGER, "oracle")
        assert (row["metrics"]["rm_rollouts"] > 0) == (row["metrics"]["rm_seconds"] > 0) == paid
        assert (row["metrics"]["rm_score"] is None) == (row["arm"] in ("outcome_ppo", *LONGER))


def assets_of(folder):
    return Assets(folder, EASY, 0, max_steps=SMOKE_STEPS)


def test_only_supervised_reward_models_are_given_step_labels(finished):
    assets = assets_of(finished)
    for kind in ("fractal", "fractal_bag", "fractal_priors", "fractal_pseudo", "result_token", "response", "lca"):
        assert all(bag.step_labels is None and bag.label in (0.0, 1.0) for bag in assets.bags(kind))
    assert all(len(bag.step_labels) == len(bag.step_spans) for bag in assets.bags("supervised"))


def test_no_problem_that_policies_are_measured_on_is_labelled_or_trained_on(finished, tmp_path, monkeypatch):
    held_out = EASY.problems("held_out", 64, 0)
    plain = Condition.problems

    def mixed(self, stream, count, seed):
        found = plain(self, stream, count, seed)
        return found if stream == "held_out" else [*held_out[: count // 4], *found[count // 4 :]]

    monkeypatch.setattr(Condition, "problems", mixed)
    (tmp_path / "policies").symlink_to(finished / "policies")
    assets = assets_of(tmp_path)
    known = {problem.prompt for problem in held_out}
    labelled = [bag.prompt for bag in assets.bags("fractal")]
    assert len(labelled) > EASY.responses // 2
    assert not known & set(labelled)
    trained = []

    def trainer(**options):
        trained.extend(options["train_dataset"]["prompt"])
        raise InterruptedError

    monkeypatch.setattr(run, "StepPPOTrainer", trainer)
    budget = replace(SMOKE_BUDGET, held_out=64)
    with pytest.raises(InterruptedError):
        run.run_arm(ARMS["oracle"], {}, assets, budget, print, tmp_path / "run")
    assert len(trained) == budget.updates * budget.rollouts_per_update // assets.ppo["num_generations"]
    assert not known & set(trained)


def test_the_reward_model_of_results_scores_results_and_nothing_else(finished):
    model = assets_of(finished).reward_model("result_token")
    prompt, response = "1+1\n", "1: add 4 -> 7\nAnswer: 7"
    (scored,) = model.score([prompt], [response], progress=False)
    assert [step.text for step in scored.steps] == [" 7", " 7"]


def test_the_implicit_reward_learns_which_steps_good_responses_have(finished):
    assets = assets_of(finished)
    bags = [replace(bag, label=1.0 if " 7" in bag.response else 0.0) for bag in assets.bags("fractal")]
    assert 0 < sum(bag.label for bag in bags) < len(bags)
    model = ImplicitReward(assets.policy(), 0.5, 0)
    start = [result.score for result in model.score(bags)]
    assert start == pytest.approx([0.5] * len(bags))  # the policy against itself
    model.train(bags, learning_rate=1e-2, epochs=10, batch_size=16)
    scores = np.array([result.score for result in model.score(bags)])
    good = np.array([bag.label == 1.0 for bag in bags])
    assert scores[good].mean() > scores[~good].mean() + 0.3
    steps = [step for result in model.score(bags) for step in result.steps]
    sevens, others = ([step.score for step in steps if (" 7" in step.text) == has] for has in (True, False))
    assert np.mean(sevens) > np.mean(others) + 0.1


def test_the_implicit_reward_learns_on_from_the_outcomes_of_rollouts(finished):
    assets = assets_of(finished)
    judge = assets.reward_model("implicit")
    judge.learning_rate = 1e-2
    bags = [bag for bag in assets.bags("fractal") if bag.response.strip()]
    prompts, responses = [bag.prompt for bag in bags], [bag.response for bag in bags]
    labels = [1.0 if " 7" in text else 0.0 for text in responses]
    outcome = judge.learning_from(lambda prompts, completions: [*labels, 0.0])
    good = np.array(labels) == 1.0

    def margin():
        scores = np.array([one.score for one in judge.score(prompts, responses)])
        return scores[good].mean() - scores[~good].mean()

    before = margin()
    for _ in range(10):
        assert outcome([*prompts, "1+1\n"], [*responses, " "]) == [*labels, 0.0]  # what is empty teaches nothing
    assert margin() > before + 0.1


def test_step_scores_of_a_studys_reward_models_are_held_against_the_checkers_own(finished, monkeypatch):
    benchmark = importlib.import_module("benchmarks.evidence.dense_vs_outcome_step_scores")
    kinds = {kind for _, _, kind in benchmark.trained_models(finished / "results.jsonl")}
    assert kinds == {"fractal", "supervised", "implicit"}  # no rules, no results of steps, no whole responses
    assets, rng = assets_of(finished), random.Random(0)  # responses with wrong beliefs; the small policy writes noise
    texts = [assets.task.beliefs(0).respond(one, rng) for one in assets.task.problems("held_out", 256, 0)]
    recipes = importlib.import_module("benchmarks.evidence.dense_vs_outcome_reward_models")
    monkeypatch.setattr(recipes, "measure_start", lambda assets, count: ({}, texts[:count]))
    right, noise = (benchmark.measure(assets, rule) for rule in ("oracle", "random_steps"))
    assert right.pop("score_less_truth") <= 0  # right answers by luck
    assert right == {
        "step_auc": 1.0, "right_step_score": 1.0, "wrong_step_score": 0.0,
        "wrong_steps_above_half": 0.0, "right_steps_below_half": 0.0,
    }  # fmt: skip
    del noise["score_less_truth"]
    assert list(noise.values()) == pytest.approx([0.5] * len(noise), abs=0.15)


def test_a_run_whose_reward_model_is_watched_is_the_run_of_the_study(finished, tmp_path, monkeypatch):
    benchmark = importlib.import_module("benchmarks.evidence.dense_vs_outcome_learning_on")
    assets = benchmark.WatchedAssets(finished, EASY, 0, max_steps=SMOKE_STEPS)
    chosen, seen = yaml.safe_load((finished / "chosen.yaml").read_text()), []

    def measure(assets):
        _, scored = assets.judge.last
        seen.append([one.response for one in scored])
        return {"watched": float(np.mean([one.score for one in scored if one.error is None]))}

    with monkeypatch.context() as patch:  # the small policy writes noise, which has no right step
        patch.setattr(benchmark, "measure", measure)
        benchmark.run(assets, "online", chosen, SMOKE_BUDGET, tmp_path / "rows.jsonl")
    rows = read_results(tmp_path / "rows.jsonl")
    watched = [row["metrics"].pop("watched") for row in rows]
    assert [measured(row) for row in rows] == [measured(r) for r in rows_of(finished) if r["arm"] == "fractal_online"]
    assert watched == pytest.approx([row["metrics"]["rm_score"] for row in rows])
    assert [len(texts) for texts in seen] == [SMOKE_BUDGET.held_out] * 2
    assert seen[0] == measure_start(assets, SMOKE_BUDGET.held_out)[1]
    rng, held_out = random.Random(0), assets.task.problems("held_out", 256, 0)
    texts = [assets.task.beliefs(0).respond(one, rng) for one in held_out]
    prompts = [one.prompt for one in held_out]
    # What is judged is what was scored last; this small a policy writes the same at its end as at its start.
    scored = assets.judge.score(prompts[:4], texts[:4], progress=False)
    assert assets.judge.last == (prompts[:4], scored)
    judge = assets_of(finished).reward_model("oracle")
    assets.judge.last = prompts, judge.score(prompts, texts)
    right = benchmark.measure(assets)
    assert right["bag_auc"] > 0.9  # but for right answers by luck, which a loss that knows of luck forgives
    assert right["bag_nll"] < 0.4
    assert (right["right_step_score"], right["wrong_step_score"], right["step_auc"]) == (1.0, 0.0, 1.0)


def test_recipes_of_reward_models_are_measured_once_each(tmp_path, monkeypatch):
    benchmark = importlib.import_module("benchmarks.evidence.dense_vs_outcome_reward_models")
    measured = []

    def measure(assets, recipe):
        measured.append((assets.task.name, assets.seed, recipe))
        return {"bag_nll": 0.5}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "ROWS", tmp_path / "rows.jsonl")
    asked = ["--settings", "easy", "noise_20", "--seeds", "2000", "--recipes", "fractal", "supervised"]
    for seeds in ([], ["2001"]):
        monkeypatch.setattr("sys.argv", ["benchmark", *asked[:5], *seeds, *asked[5:]])
        benchmark.main()
    wanted = [(s, n, r) for n in (2000, 2001) for s in ("easy", "noise_20") for r in ("fractal", "supervised")]
    assert measured == wanted


def test_without_a_file_of_settings_those_of_the_published_study_are_used(tmp_path, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(study.Study, "run_all", lambda self, units, jobs: runs.append((self.chosen, units)))
    monkeypatch.setattr(command, "draw_curves", lambda *_: None)
    known = {"settings": ["easy"], "seeds": 2, "arms": None}
    run_comparison(CompareArguments(output_dir=str(tmp_path), **known))
    ((chosen, units),) = runs
    published = yaml.safe_load(Path("benchmarks/evidence/dense_vs_outcome.yaml").read_text(encoding="utf-8"))
    assert chosen == {arm: published[arm] for arm in study_arms.ARMS}
    assert f"{len(units)} runs, a minute or more each" in capsys.readouterr().out
    assert (tmp_path / "report.md").read_text().split("\n\n")[1] == command.REPORT
    first = command._FIRST_LOOK.partition("--arms ")[2].partition(" --seeds")[0].split()
    assert set(first) < set(study_arms.ARMS)
    write_chosen(tmp_path / "chosen.yaml", {"oracle": {"lam": 0.5}}, "a test")
    run_comparison(CompareArguments(output_dir=str(tmp_path), **known | {"arms": ["oracle"]}))
    assert runs[-1][0] == {"oracle": {"lam": 0.5}}


def test_tables_and_figure_are_written(finished):
    text = (finished / "report.md").read_text()
    assert "| easy | fractal_mix | outcome_ppo | 1 |" in text
    assert "\n| implicit_online | 0." in text  # arms of benchmarks have their lines too
    assert (finished / "curves.png").stat().st_size > 5000


def test_a_finished_study_is_not_run_again_and_half_a_run_is(finished):
    file = finished / "results.jsonl"
    before = rows_of(finished)
    killed = finished / "running" / "easy-0-outcome_ppo-None"  # by a process that was killed after the last row
    killed.mkdir(parents=True)
    run_comparison(arguments(finished), Evidence)
    assert rows_of(finished) == before
    assert not killed.exists()
    lost = [row for row in before if row["arm"] == "outcome_ppo" and row["config"]["last"]]
    text = file.read_text()
    file.write_text("".join(line for line in text.splitlines(keepends=True) if json.loads(line) not in lost))
    run_comparison(arguments(finished), Evidence)
    again = rows_of(finished)[len(before) - 1 :]
    assert [row["arm"] for row in again] == ["outcome_ppo"]  # the row of its start is there, and is not written twice
    # The same seed gives the same run: what was lost is made again as it was.
    assert measured(again[-1]) == measured(lost[0])
    file.write_text(text)


def test_another_recipe_makes_other_reward_models_and_runs_their_arms_again(finished, monkeypatch):
    file, before = finished / "results.jsonl", rows_of(finished)
    text, models = file.read_text(), finished / "easy" / "seed-0"
    monkeypatch.setitem(study_arms.TRAINING, "learning_rate", 1e-5)
    run_comparison(arguments(finished, arms=["outcome_ppo", "oracle", "fractal_mix"]))
    again = rows_of(finished)[len(before) :]
    assert {(row["arm"], row["config"]["reward_model"]["learning_rate"]) for row in again} == {("fractal_mix", 1e-5)}
    assert len(list(models.glob("reward_model-fractal-*"))) == 2
    file.write_text(text)


def test_a_longer_arm_has_the_settings_of_the_one_that_it_is(finished):
    wanted = ARMS["outcome_ppo"].trials[0]
    used = [row["config"] for row in rows_of(finished) if row["arm"] in (*LONGER, "outcome_ppo")]
    assert len(used) == 2 * (1 + len(LONGER))
    assert all(config | wanted == config for config in used)


def test_tuning_finds_the_rate_with_the_outcome_only_arms_and_runs_an_arms_trials_with_it(
    tmp_path, finished, monkeypatch
):
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "policies").symlink_to(finished / "policies")
    for module in (study, evidence_arms):
        monkeypatch.setattr(module, "LEARNING_RATES", LEARNING_RATES[:2])
    own = "fractal_mix_own_rate"  # has as many trials as they have; a longer arm has none
    run_comparison(arguments(folder, tune=True, settings=["easy"], arms=["oracle", own, *LONGER]), Evidence)
    rows = rows_of(folder)
    assert {(row["split"], row["dataset"]) for row in rows} == {("tuning", "easy")}
    rates = {
        arm: {row["config"]["learning_rate"] for row in rows if row["arm"] == arm}
        for arm in (*OUTCOME_ONLY, own, "oracle")
    }
    (rate,) = rates.pop("oracle")
    assert set(map(frozenset, rates.values())) == {frozenset(LEARNING_RATES[:2])}
    chosen = yaml.safe_load((folder / "chosen.yaml").read_text())
    for arm, used in (("oracle", [rate]), (own, LEARNING_RATES[:2])):
        points = {trial: [] for trial, options in enumerate(ARMS[arm].trials) if options["learning_rate"] in used}
        for row in rows:
            if row["arm"] == arm and row["metrics"]["rollouts"]:
                points[row["config"]["trial"]].append(row["metrics"]["accuracy"])
        best = max(points, key=lambda trial: (sum(points[trial]), trial))
        assert chosen.pop(arm) == ARMS[arm].trials[best]
        assert [len(values) for values in points.values()] == [len(SMOKE_BUDGET.points)] * 2 * len(used)
    assert not chosen


def test_the_benchmark_runs_at_the_size_of_a_smoke_test_in_two_processes(quick_spawn, capsys):
    benchmark = importlib.import_module("benchmarks.evidence.dense_vs_outcome")
    arms = ["outcome_ppo", "fractal"]
    benchmark.main(["--smoke", "true", "--jobs", "2", "--settings", "easy", "--arms", *arms])
    assert "/results.jsonl the rows." in capsys.readouterr().out


def test_a_run_that_two_processes_come_to_is_done_once(tmp_path, monkeypatch):
    one = study.Study(tmp_path / "rows.jsonl", tmp_path, SMOKE_BUDGET, {"oracle": {}})
    started, done = threading.Event(), []

    def slow(self, unit):
        started.set()
        time.sleep(0.2)
        done.append(unit)

    monkeypatch.setattr(study.Study, "_run", slow)
    monkeypatch.setattr(study.Study, "is_done", lambda self, unit, rows: unit in done)
    unit = study.Unit("easy", 0, "oracle")
    first = threading.Thread(target=one.run, args=(unit,))
    first.start()
    started.wait()
    one.run(unit)
    first.join()
    assert done == [unit]


def test_two_processes_share_runs_and_wait_for_each_other_at_the_end(tmp_path, monkeypatch):
    one = study.Study(tmp_path / "rows.jsonl", tmp_path, SMOKE_BUDGET, {"oracle": {}})
    units, done = one.units(["easy"], ["oracle"], 3), []
    (tmp_path / "locks").mkdir()
    started = threading.Event()

    def other() -> None:  # does the first one, and is killed
        with FileLock(tmp_path / "locks" / "-".join(map(str, units[0]))):
            started.set()
            time.sleep(0.5)

    monkeypatch.setattr(study.Study, "_run", lambda self, unit: done.append(unit))
    monkeypatch.setattr(study.Study, "is_done", lambda self, unit, rows: unit in done)
    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    one.run_all(units, 1)
    thread.join()
    assert done == [units[1], units[2], units[0]]


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`settings` is 'eazy'\. Did you mean `easy`\? Choose one of easy, medium, "):
        arguments(tmp_path / "smoke", settings=["eazy"])
    with pytest.raises(ValueError, match=r"There is no arm 'fractal_mx'\. Did you mean `fractal_mix`\?"):
        run_comparison(arguments(tmp_path / "smoke", arms=["fractal_mx"]))
    with pytest.raises(ValueError, match=r"`arms` is 'implicit'\. Choose one of outcome_grpo, "):
        CompareArguments(arms=["oracle", "implicit"])
    with pytest.raises(ValueError, match="`jobs` is 0"):
        arguments(tmp_path / "smoke", jobs=0)
    with pytest.raises(FileNotFoundError, match=r"chosen\.yaml is not a file"):
        run_comparison(arguments(tmp_path / "smoke", arms=None, chosen=str(tmp_path / "chosen.yaml")))
    write_chosen(tmp_path / "smoke" / "chosen.yaml", {"oracle": {}}, "a test")
    with pytest.raises(ValueError, match="has no settings of outcome_grpo"):
        run_comparison(arguments(tmp_path / "smoke", arms=None))
