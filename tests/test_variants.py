"""The variants of the arithmetic task: their checkers against an independent evaluation."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.tasks.arithmetic.problems import (
    Beliefs,
    BranchingProblem,
    DistractedProblem,
    Problem,
    make_branching_problems,
    make_distracted_problems,
    read_problem,
)

SEEDS = st.integers(0, 10_000)
EXAMPLE = BranchingProblem(("Mia", "Tom"), (3, 5), ((("+", 4),), (("*", 3),)), "+")
RIGHT = "Mia: 3\n1: add 4 -> 7\nTom: 5\n2: multiply by 3 -> 5\nBoth: 7 add 5 -> 2\nAnswer: 2"


def distracted(seed):
    return make_distracted_problems(1, seed=seed, min_steps=2, max_steps=7)[0]


def branching(seed):
    return make_branching_problems(1, seed=seed, min_steps=2, max_steps=8)[0]


def evaluated(prompt):
    """The answer, from the text of the prompt alone, by Python's own arithmetic."""
    words = {"add": "+", "subtract": "-", "multiply by": "*"}
    values, names = [], []
    for line in prompt.splitlines():
        if start := re.match(r"(\w+)'s counter shows (\d)", line):
            names.append(start[1])
            values.append(start[2])
        elif change := re.match(r"\d+: (add|subtract|multiply by) (\d)", line):
            values[-1] = f"({values[-1]} {words[change[1]]} {change[2]})"
        elif both := re.match(r"(\w+)'s (add|subtract) (\w+)'s: what", line):
            one, other = (values[names.index(name)] for name in (both[1], both[3]))
            values = [f"({one} {words[both[2]]} {other})"]
    assert len(values) == 1
    return eval(values[0]) % 10


@given(SEEDS)
def test_answers_are_those_of_an_independent_evaluation(seed):
    for problem in (distracted(seed), branching(seed)):
        assert problem.answer == evaluated(problem.prompt)
        assert problem.check_answer(f"Answer: {problem.answer}")
        assert not problem.check_answer(f"Answer: {(problem.answer + 1) % 10}")


@given(SEEDS)
def test_distractors_never_change_the_answer_nor_what_steps_are_right(seed):
    problem = distracted(seed)
    plain = Problem(problem.name, problem.start, problem.changes)
    assert 1 <= len(problem.distractors) <= 3
    assert problem.prompt != plain.prompt
    assert problem.answer == plain.answer
    response = Beliefs(0.4, seed=seed).respond(problem, random.Random(seed))
    assert problem.check_steps(response) == plain.check_steps(response)


@given(SEEDS)
def test_prompts_are_read_back(seed):
    for problem in (distracted(seed), branching(seed)):
        assert read_problem(problem.prompt) == problem
        assert read_problem(problem.prompt).prompt == problem.prompt


@given(SEEDS)
def test_whoever_believes_the_truth_writes_right_steps_only(seed):
    for problem in (distracted(seed), branching(seed)):
        response = Beliefs(0.0).respond(problem, random.Random(seed))
        assert all(problem.check_steps(response))
        assert problem.check_answer(response)


@given(SEEDS)
def test_a_mistake_makes_one_wrong_line_and_lines_after_it_are_judged_by_what_is_stated(seed):
    problem, rng = branching(seed), random.Random(seed)
    beliefs = Beliefs(1.0, strength=0.5, seed=seed)
    response = beliefs.respond(problem, rng)
    flags = problem.check_steps(response)
    wrong = []
    stated = {}
    for line in response.splitlines():
        if start := re.fullmatch(r"(\w+): (\d)", line):
            current, good = start[1], True
            stated[current] = int(start[2])
            if current == "Answer":
                good = stated["Answer"] == stated["Both"]
        else:
            left, operator, right, result = re.fullmatch(
                r"(.*?) ?(add|subtract|multiply by) (\d) -> (\d)", line
            ).groups()
            owner = "Both" if left.startswith("Both") else current
            value = int(left[-1]) if owner == "Both" else stated[current]
            sign = {"add": "+", "subtract": "-", "multiply by": "*"}[operator]
            good = int(result) == eval(f"{value} {sign} {right}") % 10
            stated[owner] = int(result)
        wrong.append(not good)
    assert [not flag for flag in flags] == wrong


@pytest.mark.parametrize(
    ("response", "flags", "answered"),
    [
        (RIGHT, [True] * 6, True),
        (RIGHT.replace("Tom: 5", "Tom: 6"), [True, True, False, False, True, True], True),
        (RIGHT.replace("-> 7", "-> 8"), [True, False, True, True, False, True], True),
        (RIGHT.replace("Both: 7 add 5", "Both: 7 subtract 5"), [True, True, True, True, False, True], True),
        (RIGHT.replace("Tom: 5\n", ""), [True, True, False, False, False], True),
        (RIGHT.replace("Mia: 3", "Tom: 3"), [False, True, True, True, True, True], True),
        (RIGHT + "\nAnswer: 2", [True] * 6 + [False], True),
        (RIGHT.replace("Answer: 2", "Answer: 7"), [True] * 5 + [False], False),
        ("", [], False),
    ],
)
def test_the_branching_checker_says_which_lines_are_wrong(response, flags, answered):
    assert EXAMPLE.check_steps(response) == flags
    assert EXAMPLE.check_answer(response) is answered


@given(SEEDS, st.text(alphabet="0123: add->\nAnswerBothMia", max_size=60))
def test_the_branching_checker_reads_any_text(seed, text):
    assert len(branching(seed).check_steps(text)) == sum(bool(line.strip()) for line in text.split("\n"))


def test_problems_come_from_their_seed():
    for make in (make_branching_problems, make_distracted_problems):
        assert make(50, seed=1, min_steps=3, max_steps=5) == make(50, seed=1, min_steps=3, max_steps=5)
        assert make(50, seed=1, min_steps=3, max_steps=5) != make(50, seed=2, min_steps=3, max_steps=5)


def test_what_is_no_prompt_or_no_length_is_refused():
    with pytest.raises(ValueError, match="Not a prompt"):
        read_problem("2+2?")
    with pytest.raises(ValueError, match="Not a branching prompt"):
        BranchingProblem.from_prompt(distracted(0).prompt)
    with pytest.raises(ValueError, match="give 2 <= min_steps <= max_steps"):
        make_branching_problems(1, seed=0, min_steps=1, max_steps=4)


def test_distracted_prompts_without_distractors_read_as_chains():
    problem = DistractedProblem("Mia", 3, (("+", 4),))
    assert problem.prompt == Problem("Mia", 3, (("+", 4),)).prompt
