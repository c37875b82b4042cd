"""Official files of QA-Feedback become bags: irrelevant sentences, and preferences between answers."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.formats.qa_feedback import read_qa_feedback, read_qa_preferences
from fractal_rm.data.readers import read_jsonl

ANSWER = "Bloom is an album. It has ten songs. It came out in 2018."
PASSAGES = [["Bloom", "Bloom\n\nBloom is an album.", "It sold well."], ["Troye Sivan", "He sings."]]


def error(text, kind="Irrelevant", answer=ANSWER):
    start = answer.index(text)
    return {"error type": kind, "explanation": "", "start": start, "end": start + len(text)}


def feedback(*errors, **changes):
    """A row with all official columns."""
    row = {"question": "When did Bloom come out?", "passages": PASSAGES, "gold": "In 2018."}
    row |= {"prediction 1": ANSWER} | {f"prediction {number}": f"Answer {number}. The end." for number in (2, 3, 4)}
    row |= {"feedback": {"errors": list(errors), "missing-info": [], "corrected-prediction": "2018."}}
    return row | {"preference": [0, 1, 2, 1, 0, 2]} | changes


def test_a_step_is_bad_iff_an_irrelevant_span_touches_it():
    [bag] = read_qa_feedback([feedback(error("It has ten songs."))])
    assert bag.response == ANSWER
    assert bag.steps == ["Bloom is an album.", "It has ten songs.", "It came out in 2018."]
    assert (bag.step_labels, bag.label) == ((1.0, 0.0, 1.0), pytest.approx(2 / 3))


def test_part_of_a_sentence_or_two_of_them_can_be_irrelevant():
    assert read_qa_feedback([feedback(error("ten"))])[0].step_labels == (1.0, 0.0, 1.0)
    assert read_qa_feedback([feedback(error("songs. It came"))])[0].step_labels == (1.0, 0.0, 0.0)


def test_the_end_of_a_span_is_not_in_it():
    before = error("Bloom is an album. ")
    assert read_qa_feedback([feedback(before)])[0].step_labels == (0.0, 1.0, 1.0)
    before["end"] += 1
    assert read_qa_feedback([feedback(before)])[0].step_labels == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("kind", ["Redundant", "Incoherent", "Wrong-Grounding", "Unverifiable"])
def test_other_errors_leave_a_step_good(kind):
    assert read_qa_feedback([feedback(error("ten", kind))])[0].label == 1.0


@given(st.lists(st.tuples(st.integers(0, len(ANSWER) - 1), st.integers(1, 30)), max_size=4))
def test_labels_agree_with_painting_the_characters(spans):
    spans = [(start, min(start + length, len(ANSWER))) for start, length in spans]
    errors = [{"error type": "Irrelevant", "start": start, "end": end} for start, end in spans]
    [bag] = read_qa_feedback([feedback(*errors)])
    painted = {position for start, end in spans for position in range(start, end)}
    wanted = tuple(float(painted.isdisjoint(range(start, end))) for start, end in bag.step_spans)
    assert bag.step_labels == wanted
    assert bag.label == pytest.approx(sum(wanted) / 3)


def test_the_prompt_is_the_question_and_its_passages():
    [bag] = read_qa_feedback([feedback()])
    assert bag.prompt == (
        "When did Bloom come out?\n\n[Bloom] Bloom Bloom is an album. It sold well.\n\n[Troye Sivan] He sings."
    )


def test_preferences_compare_six_pairs_and_ties_are_left_out():
    bags = read_qa_preferences([feedback()], source="dev")
    assert [bag.id for bag in bags] == ["1-1", "1-3", "1-4", "1-1", "1-2", "1-3", "1-4", "1-3"]
    assert [bag.label for bag in bags] == [1.0, 0.0] * 4
    assert [bag.pair_id for bag in bags[::2]] == ["dev:1:1-3", "dev:1:1-4", "dev:1:2-3", "dev:1:3-4"]
    assert all(chosen.pair_id == rejected.pair_id for chosen, rejected in zip(bags[::2], bags[1::2], strict=True))
    assert {bag.step_labels for bag in bags} == {None}
    assert bags[0].response == ANSWER
    assert bags[1].steps == ["Answer 3.", "The end."]


def test_the_official_file_gives_both(tmp_path):
    path = tmp_path / "dev_feedback.json"
    path.write_text(json.dumps([feedback(), feedback(preference=[0] * 6)], indent=2), encoding="utf-8")
    assert read_qa_feedback(path) == read_qa_feedback([feedback(), feedback()])
    assert len(read_qa_preferences(path)) == 8  # a row of ties gives none


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            feedback({"error type": "Irrelevant", "start": 5, "end": 400}),
            "the span 5 to 400 is empty or outside",
        ),
        (
            feedback({"error type": "Irrelevant", "start": 5, "end": 5}),
            "the span 5 to 5 is empty or outside",
        ),
        (feedback(feedback=None), "column 'feedback' is missing or null"),
        (feedback(**{"prediction 1": " "}), "the response is empty"),
    ],
)
def test_a_defect_of_the_feedback_is_one_sentence_with_its_row(row, sentence):
    with pytest.raises(ValueError, match=re.escape(f"data, row 2: {sentence}")):
        read_qa_feedback([feedback(), row])


@pytest.mark.parametrize("preference", [[1] * 5, [0, 1, 2, 3, 0, 0]])
def test_a_defect_of_the_preferences_is_one_sentence_with_its_row(preference):
    with pytest.raises(
        ValueError, match=r"data, row 1: preference is \[.*\]; give 0, 1 or 2 for each of the 6 pairs\."
    ):
        read_qa_preferences([feedback(preference=preference)])


def test_real_rows_put_back_into_the_official_format_keep_their_labels(data_dir):
    rows = read_jsonl(data_dir / "qa_feedback" / "test.jsonl.gz")
    official = []
    for row in rows:
        question, *passages = row["prompt"].split("\n\n")
        errors = [{"error type": kind, "start": start, "end": end} for kind, start, end in row["meta"]["errors"]]
        passages = [passage.removeprefix("[").split("] ", 1) for passage in passages]
        official.append(
            feedback(*errors, question=question, passages=passages, **{"prediction 1": " ".join(row["steps"])})
        )
    bags = read_qa_feedback(official)
    assert [bag.prompt for bag in bags] == [row["prompt"] for row in rows]
    # The rows were cut by another rule: compare those that both cut alike.
    alike = [(bag, row) for bag, row in zip(bags, rows, strict=True) if bag.steps == row["steps"]]
    assert len(alike) > 0.8 * len(rows)
    assert all(list(bag.step_labels) == row["step_labels"] for bag, row in alike)


def test_real_preferences_put_back_into_the_official_format_keep_their_order(data_dir):
    rows = read_jsonl(data_dir / "qa_feedback_preferences" / "test.jsonl.gz")[:200]
    pairs = [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    official = []
    for row in rows:
        chosen, rejected = row["meta"]["chosen_index"], row["meta"]["rejected_index"]
        preference = [0] * 6
        preference[pairs.index(tuple(sorted((chosen, rejected))))] = 1 if chosen < rejected else 2
        answers = {f"prediction {chosen}": " ".join(row["chosen"]), f"prediction {rejected}": " ".join(row["rejected"])}
        official.append(feedback(preference=preference, **answers))
    bags = read_qa_preferences(official)
    assert [bag.response for bag in bags] == [" ".join(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert [bag.label for bag in bags] == [1.0, 0.0] * len(rows)
