"""The one reader of final answers: what is stated, what equals what, and who reads with it."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import majority_of, read_questions
from fractal_rm.tasks.answers import group_answers, read_answer, same_answer
from fractal_rm.tasks.equations import check_line
from fractal_rm.tasks.gsm8k import gsm8k_answer, last_number_answer
from fractal_rm.tasks.word_problems import WordProblem

CORPUS = Path(__file__).parent / "corpus" / "answers.jsonl"
CASES = {row["kind"]: row for row in map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())}
HALVES = ["0.5", ".5", "1/2", "\\frac{1}{2}", "\\dfrac12", "½", "5e-1", "5 \\times 10^{-1}", "0.50", "50%", "$0.5$"]


@pytest.mark.parametrize("kind", CASES)
def test_an_answer_is_paid_if_and_only_if_it_is_stated_and_right(kind):
    case = CASES[kind]
    assert gsm8k_answer(["?"], [case["completion"]], [case["gold"]]) == [float(case["right"])]


def test_the_last_number_counts_only_where_it_is_asked_for():
    said = ["So she has 7 pens.", "It is 7. No, 8.", "<think>7", "#### 8\n7", "7 pens of 2x"]
    assert gsm8k_answer(["?"] * 5, said, ["7"] * 5) == [0.0] * 5
    assert last_number_answer(["?"] * 5, said, ["7"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_answers_are_texts_or_numbers_and_none_is_no_opinion():
    assert gsm8k_answer(["?"] * 3, ["#### 0.5"] * 3, [0.5, 1, None]) == [1.0, 0.0, None]
    with pytest.raises(TypeError, match=r"the answer of row 0 is \['42'\] \(list\), not text"):
        gsm8k_answer(["?"], ["#### 42"], [["42"]])


@pytest.mark.parametrize("unit", [" ", "\\boxed{", "#### a\n", "#### \n", "<|im_end|>\n", "<a ", "assistantanalysis"])
def test_answers_are_read_in_linear_time(unit):
    start = time.process_time()
    read_answer(unit * (40_000 // len(unit)) + "x")
    assert time.process_time() - start < 4


def test_the_last_number_is_no_exponent():
    assert read_answer("The area is 42 m², or 42 m^2.", last_number=True) == "42"


def test_a_problem_in_words_and_a_line_of_a_solution_read_as_the_reward_does():
    problem = WordProblem("?", ((3, "+", 4, 7),))
    assert problem.check_answer("#### Final Answer\n7")
    assert not problem.check_answer("#### 3\n#### 7")
    assert check_line("#### \\$7", {3, 4, 7}, {7}, "7")
    assert not check_line("#### 6 or 7", {3, 4, 7}, {7}, "7")


@given(st.permutations(HALVES), st.sampled_from(["3", "\u22123", "x"]))
def test_equal_answers_are_one_group_in_any_order(halves, other):
    assert group_answers([*halves, other, None]) == [0] * len(halves) + [1, None]


def test_a_power_is_one_group_with_its_number():
    assert (
        group_answers(["10^3", "1,000", "10³", "1e3", "cafe\u0301", "café", "42\u200b", "42"])
        == [0] * 4 + [1] * 2 + [2] * 2
    )


def test_a_vote_joins_units_of_one_kind_by_their_sizes():
    assert group_answers(["5 m", "500 cm", "5 cm", "0.05 m"]) == [0, 0, 1, 1]
    assert group_answers(["500 cm", "5 cm", "5 m", "5"]) == [0, 1, 1, 1]  # without a unit it may be either
    assert group_answers(["5 m", "5 cm", "5.00"]) == [0, 0, 0]


def test_answers_that_differ_stay_apart():
    different = ["41", "42", "4.2", "-42", "1, 2", "2, 1", "(1, 2)", "[1, 2]", "yes", "no", "x", "42x", "42 thousand"]
    assert group_answers(different) == list(range(len(different)))


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_a_number_equals_itself_however_it_is_written_and_no_other(value, digits):
    written = [f"{value:,}", f"{value}.0", f"{value}e0", f"$ {value}", f"\\${value:,}", f"{value} km", f"**{value}**"]
    written += [str(value).replace("-", "\u2212"), f"\\frac{{{value}}}{{1}}", f"{value * 10**digits}e-{digits}"]
    for text in written:
        assert same_answer(text, str(value)), text
        assert not same_answer(text, str(value + 1)), text


@given(st.text(st.sampled_from("0123456789.,-+/#\\{}$%e ex\n<>think*boxedfrac=()or|\u2212½²"), max_size=40))
def test_any_text_is_read_without_an_error(text):
    stated = read_answer(f"#### {text}")
    assert stated is None or same_answer(stated, stated)
    assert group_answers([stated]) == [None if stated is None else 0]


def test_a_vote_counts_equal_answers_together():
    answers = ["0.5", "1/2", "\\frac{1}{2}", "3", "3"]
    right = np.array([True, True, True, False, False])
    assert majority_of(answers, right, 5) == 1.0


def test_votes_are_read_from_responses_where_no_column_has_them():
    said = ["Half.\n#### 0.5", "\\boxed{1/2}", "<think>3", "#### 3 or 4"]
    rows = [{"prompt": "?", "response": text, "label": int(i < 2)} for i, text in enumerate(said)]
    assert read_questions(rows, Segmentation("lines")).answers == ["0.5", "1/2", None, None]
