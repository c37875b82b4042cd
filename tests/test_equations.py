"""Checking the lines of a solution in words: equations of many forms, and where a response goes wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.tasks.equations import check_line, check_lines, numbers, step_labels

RIGHT = [
    "The carpenter works for 6 days/week * 2 weeks/month = 12 days/month",
    "If he earns £195 every day he then earns £195/day * 12 days/month = £2340/month",
    "34% of the remaining 60 students are dancers so that's 0.34*60 = 20 students",
    "After buying the tube, Isabella has 75 + 46 + 20 + T = 141 + T = 220 toys for her cousin.",
    "The number is 27 total students - 5 play music - 3 tennis - 6 bake = 13",
    "Bobby did 1/2 * 230 pieces = 115 pieces.",
    "Warm water mile = 9+2(10)=29.0 minutes",
    "There are 5 girls x 2 boys/girl = 10 boys in the field.",
    "The total number of wasps in the field is half * 190 beetles = 95 wasps",
    "He makes 1,200 - 200 = 1000 in all.",
    "So she walks 12/60 = 1/5 miles per minute.",
    "It takes her 13÷1/2=26 minutes.",
    "That is 50% * 40 = 20 pens.",
]
WRONG = [
    "Then 134/2 = 69 are left.",
    "He has 3 + 4 = 8 pens.",
    "He has 3 + 4 = 7 + 2 = 10 pens.",
    "After buying the tube, Isabella has 75 + 46 + 20 + T = 142 + T = 220 toys for her cousin.",
    "That is 50% * 40 = 21 pens.",
]


def everything(line: str) -> set[float]:
    return numbers(line)


@pytest.mark.parametrize("line", RIGHT)
def test_an_equation_that_holds_is_right(line):
    known = everything(line) | {79.0, 141.0}
    assert check_line(line, known, known, "0")


@pytest.mark.parametrize("line", WRONG)
def test_an_equation_that_does_not_hold_is_wrong(line):
    known = everything(line) | {79.0, 141.0}
    assert not check_line(line, known, known, "0")


def test_a_result_that_is_not_in_the_reference_is_wrong():
    assert not check_line("He has 3 * 5 = 15 pens.", {3, 4, 12, 5}, {12}, "12")


def test_a_line_without_an_equation_may_name_known_numbers_only():
    assert check_line("Tom has 3 pens.", {3.0}, {7.0}, "7")
    assert not check_line("Tom has 9 pens.", {3.0}, {7.0}, "7")


@given(st.integers(0, 999), st.integers(1, 99), st.sampled_from("+-*"), st.integers(-9, 9))
def test_only_the_right_result_holds(a, b, sign, offset):
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    if result + offset < 0:
        return
    line = f"They have {a} pens {sign} {b} pens = {result + offset} pens."
    known = {float(abs(n)) for n in (a, b, result + offset)}
    assert check_line(line, known, known, "0") == (offset == 0)


def test_nothing_is_right_behind_the_first_wrong_line():
    reference = "2 + 3 = 5\n5 * 2 = 10\n#### 10"
    flags = check_lines("2 + 3 = 6\n\n5 * 2 = 10\n#### 10", "Tom has 2 and 3, twice.", reference, "10")
    assert flags == [False, False, False]
    assert check_lines(reference, "", reference, "10") == [True, True, True]
    assert step_labels([True, False, False]) == [1.0, 0.0, None]


@pytest.mark.parametrize(
    "text", ["", "= = =", "#### ", "3 = ", "(((( = 1", "1/0 = 3", "x = x", "9" * 500 + " = 1", "-" * 2000 + "1 = 1"]
)
def test_any_text_gets_an_answer(text):
    assert len(check_lines(text, "q", "1 + 1 = 2\n#### 2", "2")) == len([line for line in text.split("\n") if line])
