"""Any task can be studied: its problems, its checker, its policy; a checker of steps where it has one."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from fractal_rm.cli.compare import SMOKE_BUDGET
from fractal_rm.evaluation.results import read_results
from fractal_rm.study.arms import ARMS, Assets
from fractal_rm.study.study import Study, Unit
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import make_problems
from fractal_rm.tasks.task import Task, unseen


@dataclass(frozen=True)
class Saying:
    """A problem whose right response has a digit in it; nobody knows which lines are right."""

    prompt: str
    digit: str

    def check_answer(self, response: str) -> bool:
        return self.digit in response

    def check_steps(self, response: str) -> None:
        return None


class Digits(Task):
    """A task that has nothing of its own but its problems: the policy is one that exists."""

    name = "digits"
    max_new_tokens = 48
    updates = 2
    responses = 32

    def problems(self, split, count, seed):
        first = ["held_out", "train", "reward_model", "validation"].index(split)
        return [self.read(problem.prompt) for problem in make_problems(count, seed=10 * seed + first)]

    def read(self, prompt):
        return Saying(prompt, str(len(prompt) % 10))

    def base_policy(self, number, work):
        return SHIPPED_POLICY


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    options = ARMS["outcome_ppo"].trials[0]
    study = Study(
        folder / "rows.jsonl",
        folder,
        SMOKE_BUDGET,
        {"outcome_ppo": options, "fractal_mix": options},
        tasks={"digits": Digits()},
        reward_model_steps=2,
    )
    units = [Unit("digits", 0, arm) for arm in ("outcome_ppo", "fractal_mix")]
    study.run_all(units, 1)
    assert all(study.is_done(unit, study.rows()) for unit in units)
    return folder


def test_a_task_without_a_checker_of_steps_is_studied_and_says_nothing_of_steps(studied):
    rows = read_results(studied / "rows.jsonl")
    assert [(row["dataset"], row["arm"], row["metrics"]["rollouts"]) for row in rows] == [
        ("digits", arm, rollouts) for arm in ("outcome_ppo", "fractal_mix") for rollouts in (0, 32)
    ]
    assert all(row["metrics"]["step_accuracy"] is None for row in rows)
    assert all(0 < row["metrics"]["accuracy"] <= 1 for row in rows)
    assert [row["metrics"]["rm_score"] is None for row in rows] == [True, True, False, False]


def test_arms_that_need_gold_steps_say_that_the_task_has_none(studied):
    assets = Assets(studied, Digits(), 0, max_steps=2)
    for make in (lambda: assets.bags("supervised"), lambda: assets.reward_model("oracle").score(["a"], ["1\n2"])):
        with pytest.raises(ValueError, match="'digits' cannot check steps"):
            make()


def test_flipped_labels_are_the_same_for_the_same_response_and_as_many_as_they_should_be():
    clean, noisy = Digits(), Digits()
    noisy.flipped = 0.25
    prompts = [problem.prompt for problem in noisy.problems("train", 1000, 0)]
    answers = [f"{number % 10}" for number in range(len(prompts))]
    assert noisy.outcome(prompts, answers) == noisy.outcome(prompts, answers)
    pairs = zip(noisy.outcome(prompts, answers), clean.outcome(prompts, answers), strict=True)
    assert 0.2 < sum(ours != theirs for ours, theirs in pairs) / len(prompts) < 0.3


def test_problems_whose_prompt_is_held_out_are_left_out():
    problems = Digits().problems("train", 10, 0)
    assert unseen(problems, {problems[3].prompt}) == [p for p in problems if p.prompt != problems[3].prompt]
