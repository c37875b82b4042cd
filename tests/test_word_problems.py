"""Word problems with new numbers: solutions by rule, and their exact checker."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stand_ins import write_jsonl

from fractal_rm.tasks.word_problems import LARGEST, WordProblems, calculate, draw_numbers, write_text

NAMES = ("Ada", "Ben", "Cem", "Dora", "Eli", "Fay", "Gus", "Hal", "Ida", "Jo", "Kim", "Lou")
FORMS = [
    ("has number0 pens and finds number1 more . How many pens are there ?", [5.0, 3.0], ["+", "number0", "number1"]),
    ("has number0 bags of number1 pens . How many pens ?", [5.0, 3.0], ["*", "number0", "number1"]),
    ("puts number0 pens into boxes of number1 . How many boxes ?", [12.0, 3.0], ["/", "number0", "number1"]),
    (
        "has number0 pens , loses number1 , and finds number2 a day for 2 days . How many now ?",
        [9.0, 3.0, 4.0],
        ["+", "-", "number0", "number1", "*", "number2", "2.0"],
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rows = [
        {"template": f"{name} {text}", "numbers": numbers, "equation": equation}
        for name in NAMES
        for text, numbers, equation in FORMS
    ]
    path = tmp_path_factory.mktemp("word_problems")
    write_jsonl(path / "train.jsonl.gz", rows)
    write_jsonl(path / "test.jsonl", [{**row, "template": f"At noon {row['template']}"} for row in rows])
    return path


def test_without_the_reader_of_expressions_nothing_begins(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"The task `word_problems` needs math-verify.*fractal-rm\[math\]"):
        WordProblems(folder)


@given(st.sampled_from(FORMS), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_new_numbers_keep_the_rules(form, seed):
    _, old, equation = form
    new = draw_numbers({"numbers": old, "equation": equation}, random.Random(seed))
    assert new is not None
    values = dict(zip((f"number{i}" for i in range(len(new))), new, strict=True))

    def value(tokens: list[str]) -> float:  # an independent reading of the prefix form
        token = tokens.pop(0)
        if token not in "+-*/":
            return float(values.get(token, token)) if token in values else float(token)
        a, b = value(tokens), value(tokens)
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else float("nan")}[token]

    made = calculate(equation, new)
    assert made is not None
    assert made[-1][3] == value(list(equation))
    assert all(0 <= c <= LARGEST for *_, c in made)
    assert sorted(range(len(new)), key=lambda i: new[i]) == sorted(range(len(old)), key=lambda i: old[i])


def test_splits_share_no_prompt_and_held_out_has_other_texts(folder):
    task = WordProblems(folder)
    sizes = {"train": 60, "reward_model": 60, "validation": 10, "held_out": 40}
    made = {split: {p.prompt for p in task.problems(split, size, 0)} for split, size in sizes.items()}
    assert [len(prompts) for prompts in made.values()] == list(sizes.values())
    assert len(set.union(*made.values())) == sum(sizes.values())
    assert all("At noon" in prompt for prompt in made["held_out"])
    assert task.problems("train", 20, 1) == WordProblems(folder).problems("train", 20, 1)


def test_solutions_by_rule_pass_and_wrong_lines_do_not(folder):
    task = WordProblems(folder)
    for problem in task.problems("train", 50, 0):
        assert task.read(problem.prompt) is problem
        assert problem.check_answer(problem.solution)
        assert all(problem.check_steps(problem.solution))
        lines = problem.solution.split("\n")
        for place, line in enumerate(lines):
            head, _, last = line.rpartition(" ")
            wrong = [*lines[:place], f"{head} {int(last) + 1}", *lines[place + 1 :]]
            flags = problem.check_steps("\n".join(wrong))
            assert flags == [i < place for i in range(len(lines))]
        assert problem.check_steps(lines[-1]) == [False]  # an answer out of nothing


def test_terms_may_change_places_and_no_calculation_counts_twice(folder):
    problem = next(
        p for p in WordProblems(folder).problems("train", 50, 0) if "finds" in p.prompt and "day" not in p.prompt
    )
    a, _, b, c = problem.calculations[0]
    assert problem.check_steps(f"{b} + {a} = {c}\n#### {c}") == [True, True]
    assert problem.check_steps(f"{a} + {b} = {c}\n{a} + {b} = {c}\n#### {c}") == [True, False, False]


def test_text_is_spaced_as_people_write():
    assert write_text("Is it ( number0 % ) ? He does n't know .", [5]) == "Is it (5%)? He doesn't know."


def test_bad_rows_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl"):
        WordProblems(tmp_path)
    good = {"template": "number0 and number1", "numbers": [1.0, 2.0], "equation": ["+", "number0", "number1"]}
    write_jsonl(tmp_path / "test.jsonl", [good])
    for change, message in (
        ({"equation": ["+", "number0", "number7"]}, "names number7, but there are 2 numbers"),
        ({"equation": ["+", "number0"]}, "ends early"),
        ({"equation": ["number0", "number1"]}, "continues after its end"),
        ({"equation": ["^", "number0", "number1"]}, "neither a number, a slot nor an operator"),
    ):
        write_jsonl(tmp_path / "train.jsonl", [good, {**good, **change}])
        with pytest.raises(ValueError, match=message) as raised:
            WordProblems(tmp_path)
        assert "row 2" in str(raised.value)
