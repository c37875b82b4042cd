"""Data sets of reasoning-gym as tasks."""

import sys

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")

from fractal_rm.tasks.gym import (
    GSM_SYMBOLIC,
    KNOWN_TEMPLATES,
    UNSEEN_TEMPLATES,
    GymProblem,
    GymTask,
    demonstrations,
)

SPLITS = ("train", "reward_model", "validation", "held_out")


@pytest.mark.parametrize("name", ["gsm_symbolic", "chain_sum", "word_sorting"])
def test_splits_share_no_prompt(name):
    task = GymTask(name)
    prompts = [{problem.prompt for problem in task.problems(split, 40, seed)} for split in SPLITS for seed in (0, 1)]
    for i, first in enumerate(prompts):
        assert len(first) == 40
        assert all(not first & other for other in prompts[: i - i % 2])


def test_a_longer_list_begins_with_the_shorter_one():
    task = GymTask("gsm_symbolic")
    assert task.problems("train", 30, 3)[:10] == task.problems("train", 10, 3)
    assert task.problems("train", 10, 3) != task.problems("train", 10, 4)


def test_templates_of_the_unseen_part_are_in_no_split():
    assert not set(KNOWN_TEMPLATES) & set(UNSEEN_TEMPLATES)
    for name, templates in GSM_SYMBOLIC.items():
        assert bool(set(templates) & set(UNSEEN_TEMPLATES)) == (name == "gsm_symbolic_unseen")
        made = {p.entry["metadata"]["template"] for p in GymTask(name).problems("train", 200, 0)}
        assert made <= set(templates)


def test_reference_solutions_pass_both_checkers_and_errors_do_not():
    for problem in GymTask("gsm_symbolic").problems("held_out", 100, 0):
        assert problem.check_answer(problem.solution)
        assert all(problem.check_steps(problem.solution))
        wrong = problem.solution.replace(f"#### {problem.answer}", f"#### {int(problem.answer) + 1}")
        assert not problem.check_answer(wrong)
        assert problem.check_steps(wrong)[-1] is False
        assert not problem.check_answer(problem.solution.partition("####")[0])  # an answer has to be stated


def test_the_outcome_is_that_of_the_librarys_verifier():
    task = GymTask("word_sorting")
    problem = task.problems("train", 1, 0)[0]
    assert task.outcome([problem.prompt] * 2, [f"#### {problem.answer}", "#### b, a"]) == [1.0, 0.0]
    assert problem.check_steps(f"#### {problem.answer}") is None
    with pytest.raises(ValueError, match="no solution to learn from"):
        demonstrations([problem])


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match=r"no data set 'gsm_symbolik'. Nearest: gsm_symbolic"):
        GymTask("gsm_symbolik")


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="does not make 'chain_sum' with the options"):
        GymTask("chain_sum", options={"min_terms": -1})
    with pytest.raises(ValueError, match="does not make 'chain_sum' with the options"):
        GymTask("chain_sum", options={"terms": 3})


def test_a_verifier_that_raises_counts_as_wrong():
    class Broken:
        def score_answer(self, answer, entry):
            raise ZeroDivisionError("1/0")

    problem = GymProblem("q", {"answer": "3", "metadata": {}}, Broken())
    with pytest.warns(UserWarning, match="raised ZeroDivisionError"):
        assert not problem.check_answer("#### 3")


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"fractal-rm\[gym\]"):
        GymTask("gsm_symbolic")


def test_without_the_reader_of_expressions_nothing_begins(monkeypatch):
    # A response that states `1/2` would otherwise stop a run that has been training for an hour.
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"The task `reasoning_gym` needs math-verify.*fractal-rm\[math\]"):
        GymTask("gsm_symbolic")


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="different problems for validation"):
        GymTask("coin_flip", options={"min_trials": 3, "max_trials": 3}).problems("validation", 200, 0)
