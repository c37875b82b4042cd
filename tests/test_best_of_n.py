"""Best-of-n against trying every subset; ties, votes, ceilings, and what was not scored."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import (
    Questions,
    best_of,
    majority_of,
    measure_best_of_n,
    pass_at,
    read_questions,
    sizes_of,
    solution_scores,
)
from fractal_rm.evaluation.intervals import estimates

samples = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7)
LINES = Segmentation("lines")


def result(*values: float, own: float | None = None) -> StepScores:
    steps = [Step("", i, i + 1, value) for i, value in enumerate(values)]
    return StepScores("x", steps, own if own is not None else min(values, default=math.nan))


@given(samples, st.data())
def test_the_best_of_n_is_the_average_over_every_subset(rows, data):
    n = data.draw(st.integers(1, len(rows)))
    scores, right = np.array([float(s) for s, _ in rows]), np.array([r for _, r in rows])
    found = []
    for subset in itertools.combinations(range(len(rows)), n):
        top = max(scores[list(subset)])
        found.append(np.mean([right[i] for i in subset if scores[i] == top]))
    assert best_of(scores, right, n) == pytest.approx(np.mean(found))
    assert pass_at(right, n) == pytest.approx(
        np.mean([any(right[list(subset)]) for subset in itertools.combinations(range(len(rows)), n)])
    )
    assert best_of(np.zeros(len(rows)), right, n) == pytest.approx(right.mean())  # a score that says nothing
    assert best_of(right.astype(float), right, n) == pytest.approx(pass_at(right, n))  # one that knows all


@given(st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=6), st.data())
def test_a_vote_is_the_average_over_every_subset(answers, data):
    n = data.draw(st.integers(1, len(answers)))
    right = np.array([answer == "7" for answer in answers])
    found = []
    for subset in itertools.combinations(range(len(answers)), n):
        voted = [answers[i] for i in subset if answers[i] is not None]
        most = max((voted.count(answer) for answer in voted), default=0)
        winners = {answer for answer in voted if voted.count(answer) == most}
        found.append(("7" in winners) / len(winners) if winners else 0.0)
    assert majority_of(answers, right, n) == pytest.approx(np.mean(found))


def test_votes_over_drawn_subsets_come_close_to_all_of_them():
    answers = ["7"] * 9 + ["8"] * 8
    right = np.array([answer == "7" for answer in answers])
    exact = [
        np.mean([0.5 if sum(right[list(s)]) * 2 == 4 else sum(right[list(s)]) > 2])
        for s in itertools.combinations(range(17), 4)
    ]
    assert majority_of(answers, right, 4) == pytest.approx(np.mean(exact), abs=0.05)
    assert majority_of(answers, right, 4) == majority_of(answers, right, 4)


def test_readings_of_step_scores():
    found = solution_scores([result(0.5, 0.8, own=0.3), result(), result(0.0, 1.0)])
    assert found["own"].tolist() == [0.3, -math.inf, 0.0]
    assert found["min"].tolist() == [0.5, -math.inf, 0.0]
    assert found["product"][0] == pytest.approx(math.log(0.4))
    assert found["mean"][0] == pytest.approx(0.65)
    assert found["last"].tolist() == [0.8, -math.inf, 1.0]


def test_the_product_of_many_scores_still_has_an_order():
    low, high = ([value] * 400 for value in (0.10, 0.11))
    found = solution_scores([result(*low), result(*high)])["product"]
    assert found[0] < found[1]


def rows(*questions: list[tuple[str, int]]) -> list[dict]:
    """Rows of sampled solutions: for each question the answers, and whether they are right."""
    return [
        {"prompt": f"Question {i}?", "response": f"Think.\nAnswer: {answer}", "label": right, "answer": answer}
        for i, found in enumerate(questions)
        for answer, right in found
    ]


def test_a_measurement_by_hand():
    questions = read_questions(rows([("7", 1), ("8", 0), ("8", 0)], [("1", 1), ("2", 0)]), LINES)
    scored = [result(0.9, 0.9), result(0.5, 0.9), result(0.5, 0.4), result(0.2, 0.3), result(0.9, 0.1)]
    measured = measure_best_of_n(scored, questions, outcome=[result(1.0 - i / 10) for i in range(5)])
    found = {**measured.counts, **{name: value.value for name, value in estimates(measured).items()}}
    assert [found["own@1"], found["majority@1"]] == pytest.approx([(1 / 3 + 1 / 2) / 2] * 2)
    assert found["min@2"] == pytest.approx((2 / 3 + 1) / 2)  # the right one of the first is in two of three pairs
    assert found["last@2"] == pytest.approx((1 / 3 + 1 / 6 + 1) / 2)  # a tie with the first wrong one
    assert found["mean@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["outcome@2"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["majority@3"] == 0.0
    assert (found["pass@3"], found["skipped@3"], found["questions"], found["responses"]) == (1.0, 1, 2, 5)
    assert "skipped@2" not in found


def test_a_scripted_oracle_reaches_the_ceiling_at_every_n():
    questions = read_questions(rows(*[[("7", i % 2), ("8", 0), ("9", 0), ("7", i % 2)] for i in range(6)]), LINES)
    scored = [result(float(right)) for right in questions.right]
    found = {name: value.value for name, value in estimates(measure_best_of_n(scored, questions)).items()}
    for n in (1, 2, 4):
        assert found[f"own@{n}"] == pytest.approx(found[f"pass@{n}"])
    assert found["pass@4"] == 0.5


def test_solutions_that_were_not_scored_are_chosen_last_and_counted():
    questions = read_questions(rows([("7", 1), ("8", 0)]), LINES)
    measured = measure_best_of_n([result(), result(0.1)], questions)
    assert estimates(measured)["own@2"].value == 0.0
    assert measured.counts["unscored"] == 1


def test_rows_of_a_question_need_not_stand_together_and_chats_are_grouped_too():
    given_rows = rows([("7", 1), ("8", 0)], [("1", 0), ("2", 0)])
    mixed = read_questions([given_rows[i] for i in (0, 2, 1, 3)], LINES)
    assert mixed.groups == [[0, 2], [1, 3]]
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in given_rows]
    assert read_questions(chats, LINES).groups == [[0, 1], [2, 3]]


def test_answers_come_from_a_pattern_or_a_column_or_are_not_known():
    bare = [{key: row[key] for key in ("prompt", "response", "label")} for row in rows([("7", 1), ("8", 0)])]
    assert read_questions(bare, LINES).answers is None
    assert read_questions(bare, LINES, answer_pattern=r"Answer: (\d)").answers == ["7", "8"]
    assert read_questions(bare, LINES, answer_pattern=r"Result: (\d)").answers == [None, None]
    measured = measure_best_of_n([result(0.1), result(0.2)], read_questions(bare, LINES))
    assert not any(name.startswith("majority") for name in measured.statistics)


@pytest.mark.parametrize(
    ("row", "options", "sentence"),
    [
        ({"label": None}, {}, "data, row 1: column 'label' is null; fill it in or drop the row."),
        (
            {"chosen": "7", "rejected": "8"},
            {},
            "data, row 1: there are 'response' and 'chosen' and 'rejected'; name the response",
        ),
        ({}, {"answer_pattern": "("}, "`answer_pattern`: The pattern '(' is not a regular expression: "),
        ({}, {"answer_pattern": "A"}, "`answer_pattern` 'A' has no group. Put the answer in parentheses"),
    ],
)
def test_what_is_wrong_is_said(row, options, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared
        read_questions([rows([("7", 1)])[0] | row], LINES, **options)
    assert str(caught.value).startswith(sentence)


def test_a_preference_is_no_sampled_solution():
    row = {"prompt": "q", "chosen": "7", "rejected": "8"}
    with pytest.raises(ValueError, match="data, row 1: preferences are not sampled solutions; give one response"):
        read_questions([row], LINES)


def test_choosing_for_no_question_is_refused():
    with pytest.raises(ValueError, match="There are no questions"):
        measure_best_of_n([], Questions([], [], None))


def test_sizes_are_powers_of_two_and_all():
    questions = read_questions(rows([("7", 1)] * 5), LINES)
    assert sizes_of(questions) == [1, 2, 4, 5]
    assert json.dumps(questions.groups) == "[[0, 1, 2, 3, 4]]"
