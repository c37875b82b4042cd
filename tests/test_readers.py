"""Rows of every format become bags, and each defect is one sentence with source, row and remedy."""

import gzip
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.bag import warn_of_equal_labels
from fractal_rm.data.prompts import is_messages
from fractal_rm.data.readers import read_bags, read_jsonl, read_row
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.data.shapes import Columns

LINES = Segmentation("lines")
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3*4?"}]
ANSWER = "3*4=12.\n2+12=14."
STEPS = ["3*4=12.", "2+12=14."]


def said(text):
    return [{"role": "assistant", "content": text}]


def unpaired(**changes):
    """An unpaired preference; a column set to `...` is left out."""
    return {
        name: value
        for name, value in ({"prompt": "2+3*4?", "completion": ANSWER, "label": True} | changes).items()
        if value is not ...
    }


def refuse(rows, error, **options):
    """Read rows that must be refused, and return the sentence after checking that it is one."""
    with pytest.raises(error) as caught:
        read_bags(rows, options.pop("segmentation", LINES), source="rows.jsonl", **options)
    return check_sentence(caught.value)


def check_sentence(error):
    sentence = str(error)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert not re.search(r"\. [A-Z]", sentence)
    assert re.search(
        r"[;,] (or )?(add|bring|choose|drop|escape|fill|fix|give|leave|make|mend|move|name|rescale|remove|save|"
        r"write|check|delete|copy)\b",
        sentence,
    ), sentence
    return sentence


# Formats


@pytest.mark.parametrize("name", ["completion", "response"])
@pytest.mark.parametrize("prompt", ["2+3*4?", CHAT])
@pytest.mark.parametrize("answer", [ANSWER, said(ANSWER)])
@pytest.mark.parametrize(
    ("label", "expected"), [(True, 1.0), (False, 0.0), (0.7, 0.7), (1, 1.0), (np.float64(0.25), 0.25)]
)
def test_unpaired_preferences_are_read(name, prompt, answer, label, expected):
    [bag] = read_bags([{"prompt": prompt, name: answer, "label": label, "id": 7}], LINES)
    assert (bag.prompt, bag.response, bag.steps, bag.label, bag.id) == (prompt, ANSWER, STEPS, expected, "7")
    assert bag.step_labels is None


@pytest.mark.parametrize("prompt", ["2+3*4?", CHAT])
@pytest.mark.parametrize("wrap", [str, said])
def test_preferences_become_two_bags_that_share_a_pair(prompt, wrap):
    row = {"prompt": prompt, "chosen": wrap(ANSWER), "rejected": wrap("2+3=5.\n5*4=20.\nSo 20.")}
    bags = read_bags([row, {**row, "id": "x"}], LINES, source="rows.jsonl")
    assert [bag.label for bag in bags] == [1.0, 0.0, 1.0, 0.0]
    assert [bag.pair_id for bag in bags] == ["rows.jsonl:1", "rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:2"]
    assert [bag.id for bag in bags] == [None, None, "x-chosen", "x-rejected"]
    assert [len(bag.steps) for bag in bags] == [2, 3, 2, 3]


def test_preferences_over_lists_of_steps_ignore_the_steps_column():
    row = {"prompt": "p", "steps": STEPS, "step_labels": [None, None], "label": 1, "aggregation": "native"}
    row |= {"chosen": STEPS, "rejected": ["2+3=5.", "5*4 = 20,\n  so 20."]}
    chosen, rejected = read_bags([row], LINES)
    assert (chosen.steps, chosen.label, chosen.step_labels) == (STEPS, 1.0, None)
    assert (rejected.steps, rejected.label) == (["2+3=5.", "5*4 = 20,\n  so 20."], 0.0)


def test_a_row_with_steps_and_another_aggregation_is_no_preference():
    row = {"prompt": "p", "steps": STEPS, "label": 0, "aggregation": "min", "chosen": STEPS, "rejected": STEPS}
    [bag] = read_bags([row], LINES)
    assert (bag.steps, bag.label, bag.pair_id) == (STEPS, 0.0, None)


def test_given_steps_are_joined_by_line_breaks_and_never_cut_again():
    steps = ["First\n  a = 1 ", "Then 2."]
    row = {"id": "a", "prompt": "p", "steps": steps, "step_labels": [1, None], "label": 0.5, "task": "math", "meta": {}}
    [bag] = read_bags([row], Segmentation("given"))
    assert bag.response == "First\n  a = 1 \nThen 2."
    assert bag.steps == ["First\n  a = 1", "Then 2."]
    assert (bag.label, bag.step_labels, bag.id) == (0.5, (1.0, None), "a")


def test_given_steps_are_found_in_the_response_they_come_with():
    row = {"prompt": "p", "response": "1. 3*4=12.  \n\n2. 2+12=14.", "steps": STEPS, "label": 1}
    [bag] = read_bags([row], Segmentation("given"))
    assert (bag.response, bag.steps) == (row["response"], STEPS)
    assert "row 1: step 1 is not in the response" in refuse([row | {"response": "3*4 = 12."}], ValueError)


@pytest.mark.parametrize(
    ("labels", "label", "expected"),
    [
        ([True, False], None, 0.0),
        ([True, True], None, 1.0),
        ([0.7, 0.9], None, 0.7),  # int() would make it 0
        ([1, 0.5], True, 1.0),  # a label of the response is not overruled
        ([-100, 0], None, 0.0),  # the unknown step cannot lower the minimum
        ([-100, 1], 0.25, 0.25),
    ],
)
def test_stepwise_supervision_is_read(labels, label, expected):
    row = {"prompt": "p", "completions": STEPS, "labels": labels, "label": label}
    [bag] = read_bags([row], Segmentation("given"))
    assert (bag.response, bag.steps, bag.label) == (ANSWER, STEPS, expected)
    assert bag.step_labels == tuple(None if value == -100 else float(value) for value in labels)


def test_minus_100_is_unknown_and_not_true():
    [bag] = read_bags([{"prompt": "p", "steps": STEPS, "step_labels": [-100, 1], "label": 1}], LINES)
    assert bag.step_labels == (None, 1.0)


def test_a_label_that_does_not_follow_from_its_steps_is_asked_for():
    row = {"prompt": "p", "completions": STEPS, "labels": [1, None]}
    assert "some step labels are unknown, so the label cannot be derived" in refuse([row], ValueError)
    assert read_bags([row], LINES, require_label=False)[0].label is None


def test_grades_are_read_only_where_their_number_is_given():
    row = unpaired(label=3, step_labels=[3, 3])
    assert read_bags([row], LINES, num_grades=4)[0].label == 3.0
    assert "set num_grades for grades" in refuse([row], ValueError)
    assert "give a whole number from 0 to 2" in refuse([row], ValueError, num_grades=3)


def test_rows_without_a_label_are_read_for_scoring():
    rows = [unpaired(label=...), unpaired(label=None), {"prompt": "p", "steps": STEPS}, unpaired(label=0.5)]
    assert [bag.label for bag in read_bags(rows, LINES, require_label=False)] == [None, None, None, 0.5]


def test_the_prompt_may_have_another_name():
    row = unpaired(prompt=..., question="2+3*4?")
    assert read_bags([row], LINES)[0].prompt == "2+3*4?"
    row = unpaired(prompt=..., asked="2+3*4?")
    assert read_bags([row], LINES, columns=Columns(prompt="asked"))[0].prompt == "2+3*4?"


def test_columns_that_are_null_count_as_missing():
    """`datasets` fills the columns that only other rows have with None, in messages too."""
    rows = [unpaired(chosen=None, rejected=None, steps=None), unpaired(completion=None, chosen="a", rejected="b")]
    assert [bag.label for bag in read_bags(rows, LINES)] == [1.0, 1.0, 0.0]
    [bag] = read_bags([unpaired(prompt=[{"role": "user", "content": "hi", "name": None}])], LINES)
    assert bag.prompt == [{"role": "user", "content": "hi"}]


def test_a_datasets_dataset_goes_straight_in():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([unpaired(prompt=CHAT), unpaired(prompt=CHAT, label=False)])
    assert [(bag.prompt, bag.label) for bag in read_bags(data, LINES)] == [(CHAT, 1.0), (CHAT, 0.0)]
    arrays = data.with_format("numpy").remove_columns("prompt").add_column("prompt", ["p", "q"])
    assert [bag.label for bag in read_bags(arrays, LINES)] == [1.0, 0.0]


def test_numpy_columns_are_read_as_lists():
    row = {
        "prompt": "p",
        "steps": np.array(STEPS, dtype=object),
        "step_labels": np.array([1.0, 0.0]),
        "label": np.bool_(0),
    }
    [bag] = read_bags([row], LINES)
    assert (bag.steps, bag.step_labels, bag.label) == (STEPS, (1.0, 0.0), 0.0)


# Defects


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        (
            unpaired(prompt=...),
            ValueError,
            "column 'prompt' is missing (found: 'completion', 'label'); add it or rename",
        ),
        (unpaired(prompt=None), ValueError, "column 'prompt' is null"),
        (unpaired(label=...), ValueError, "column 'label' is missing (found: 'prompt', 'completion')"),
        (unpaired(label=None), ValueError, "column 'label' is null; fill it in or drop the row"),
        (
            unpaired(completion=...),
            ValueError,
            "there is no response (found: 'prompt', 'label'); add a column 'completion'",
        ),
        ({}, ValueError, "column 'prompt' is missing (found: no columns)"),
        ({"prompt": "p", "chosen": "a"}, ValueError, "column 'rejected' is missing"),
        ({"prompt": "p", "rejected": "a"}, ValueError, "column 'chosen' is missing"),
        ({"prompt": "p", "completions": STEPS}, ValueError, "column 'labels' is missing"),
        ("a text", TypeError, "the row is str; make it an object with named columns"),
        (unpaired(prompt=3), TypeError, "the prompt is int; make it a text or a list of messages"),
        (unpaired(prompt=["hi"]), TypeError, "message 1 of the prompt is not a message"),
        (unpaired(completion=3), TypeError, "'completion' is 3 (int), not text"),
        (unpaired(completion={"a": 1}), TypeError, "'completion' is {'a': 1} (dict), not text"),
        (unpaired(completion=["a", 3]), TypeError, "step 2 is int, not text"),
        (unpaired(completion=[]), ValueError, "'completion' is a chat of 0 messages"),
        (
            unpaired(completion=[*said("a"), *said("b")]),
            ValueError,
            "the response is a chat of 2 turns, but the prompt is a text",
        ),
        (unpaired(completion=CHAT[1:]), ValueError, "move what comes before the assistant to the prompt"),
        (unpaired(completion=said(None)), ValueError, "the content of the message of 'completion' is null"),
        (unpaired(response="b"), ValueError, "both a 'completion' and a 'response'; drop one"),
        (unpaired(completion=""), ValueError, "the response is empty; drop the row or write the response"),
        (unpaired(completion=" \n"), ValueError, "the response is empty"),
        (unpaired(completion=said("")), ValueError, "the response is empty"),
        (unpaired(completion="a \ud800"), ValueError, "'completion' holds half of a surrogate pair at character 2"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, ValueError, "the response is empty"),
        (unpaired(label=1.7), ValueError, "the label is 1.7, outside [0, 1]; rescale it"),
        (unpaired(label=-1), ValueError, "the label is -1, outside [0, 1]"),
        (unpaired(label=math.nan), ValueError, "the label is NaN; give a number, or drop the row"),
        (unpaired(label="yes"), TypeError, "the label is 'yes' (str); make it a number"),
        (unpaired(label=[1]), TypeError, "the label is [1] (list); make it a number"),
        ({"prompt": "p", "steps": ANSWER, "label": 1}, TypeError, "'steps' is str; make it a list"),
        ({"prompt": "p", "steps": [], "label": 1}, ValueError, "'steps' is empty; drop the row"),
        (
            {"prompt": "p", "steps": ["a", " "], "label": 1},
            ValueError,
            "step 2 is blank; remove it together with its label",
        ),
        (
            {"prompt": "p", "steps": STEPS, "step_labels": [1], "label": 1},
            ValueError,
            "there are 1 step labels for 2 steps",
        ),
        (
            {"prompt": "p", "steps": STEPS, "step_labels": 1, "label": 1},
            TypeError,
            "'step_labels' is int; make it a list",
        ),
        ({"prompt": "p", "steps": STEPS, "step_labels": [1, "?"], "label": 1}, TypeError, "the label of step 2 is '?'"),
        ({"prompt": "p", "completions": STEPS, "labels": [1, 0, 1]}, ValueError, "there are 3 step labels for 2 steps"),
        ({"prompt": "p", "completions": STEPS, "labels": [1, math.nan]}, ValueError, "the label of step 2 is NaN"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_each_defect_is_one_sentence_with_source_and_row(row, error, words):
    sentence = refuse([unpaired(), unpaired(), row], error)
    assert sentence.startswith("rows.jsonl, row 3: ")
    assert words in sentence


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [("p", CHAT, "a chat but that of row 1 is text"), (CHAT, "p", "text but that of row 1 is a chat")],
)
def test_mixed_prompt_types_are_refused(first, second, words):
    sentence = refuse([unpaired(prompt=first), unpaired(prompt=first), unpaired(prompt=second)], ValueError)
    assert sentence == f"rows.jsonl, row 3: the prompt is {words}; make all prompts text or all chats."


def test_no_rows_are_refused():
    assert refuse([], ValueError) == "rows.jsonl has no rows; give at least one."


def test_a_response_in_which_nothing_is_a_step_is_refused():
    segmentation = Segmentation("separator", separator="#")
    assert "row 1: the response has no steps" in refuse(
        [unpaired(completion="##")], ValueError, segmentation=segmentation
    )
    assert "bring data with a 'steps' column" in refuse([unpaired()], ValueError, segmentation=Segmentation("given"))


def test_one_bad_row_does_not_spoil_the_others():
    rows = [unpaired(), unpaired(completion=""), unpaired(label=...)]
    good, bad = [], []
    for row, record in enumerate(rows, 1):
        try:
            good += read_row(record, LINES, source="rows.jsonl", row=row, require_label=False)
        except ValueError as error:
            bad.append(check_sentence(error))
    assert [bag.steps for bag in good] == [STEPS, STEPS]
    assert bad == ["rows.jsonl, row 2: the response is empty; drop the row or write the response."]


def test_equal_labels_of_a_data_set_warn():
    with pytest.warns(UserWarning, match="All 2 responses have the label 1: the reward model can only learn"):
        warn_of_equal_labels(read_bags([unpaired(), unpaired()], LINES))


# Files


json_rows = st.lists(
    st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
@pytest.mark.parametrize("ascii_only", [True, False])
@given(rows=json_rows)
def test_what_is_written_is_read_back(tmp_path_factory, suffix, ascii_only, rows):
    path = tmp_path_factory.mktemp("rows") / f"a.b{suffix}"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = "\n".join(lines) + "\n\n" if ".jsonl" in suffix else f"[{', '.join(lines)}]"
    content = text.encode("utf-8", errors="replace")
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    expected = [json.loads(line.encode("utf-8", errors="replace")) for line in lines]
    assert read_jsonl(path) == expected


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.jsonl", b"", ValueError, "is empty; give a file with at least one row"),
        ("a.jsonl", b"\n \n", ValueError, "is empty; give a file"),
        ("a.jsonl.gz", gzip.compress(b""), ValueError, "is empty; give a file"),
        ("a.json", b"", ValueError, "is empty; give a file"),
        ("a.json", b"[]", ValueError, "is empty; give a file"),
        (
            "a.jsonl",
            GOOD + GOOD + b'{"a": \n' + GOOD,
            ValueError,
            "row 3: the line is invalid JSON (Expecting value at column 6",
        ),
        ("a.jsonl", GOOD + b"nonsense", ValueError, "row 2: the line is invalid JSON"),
        (
            "a.jsonl",
            GOOD + b'{"a": 1} {"a": 2}\n',
            ValueError,
            "row 2: the line is invalid JSON (Extra data at column 10)",
        ),
        ("a.jsonl.gz", gzip.compress(GOOD + b"{"), ValueError, "row 2: the line is invalid JSON"),
        (
            "a.jsonl",
            GOOD + b'{"a": ' + b"1" * 5000 + b"}",
            ValueError,
            "row 2: the line is JSON that Python cannot hold",
        ),
        ("a.jsonl", GOOD + b"[" * 100_000, ValueError, "row 2: the line is JSON that Python cannot hold"),
        ("a.jsonl", GOOD + b"\n\n" + GOOD, ValueError, "row 2: the line is blank; delete it"),
        (
            "a.jsonl",
            GOOD + b'{"a": "\xe9"}\n',
            ValueError,
            "row 2: the line is not UTF-8 (byte 7); write it in UTF-8",
        ),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), ValueError, "row 1: the line is not UTF-8"),
        ("a.json", b'["\xff"]', ValueError, "the file is not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', ValueError, "the file is invalid JSON (Expecting ':' delimiter at line 2)"),
        ("a.json", b'{"a": 1}', TypeError, "does not hold a list; give a list of objects, or name it .jsonl"),
        ("a.jsonl", GOOD + b"[1]\n", TypeError, "row 2: the row is list; make it a JSON object"),
        ("a.jsonl", GOOD + b"null\n", TypeError, "row 2: the row is NoneType; make it a JSON object"),
        ("a.json", b'[{"a": 1}, 3]', TypeError, "row 2: the row is int; make it a JSON object"),
        (
            "a.csv",
            b"a,b",
            ValueError,
            "has an unknown ending; give a file that ends in one of .jsonl, .jsonl.gz, .ndjson",
        ),
        ("a.jsonl.gz", GOOD, ValueError, "is not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], ValueError, "is not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:10] + b"\xff" * 20, ValueError, "is not a complete gzip file"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_each_defect_of_a_file_is_one_sentence_with_file_and_row(tmp_path, name, content, error, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_jsonl(path)
    sentence = check_sentence(caught.value)
    assert sentence.startswith(str(path))
    assert words in sentence


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            read_jsonl(path)
        assert check_sentence(caught.value).startswith(str(path))


def test_rows_of_a_file_and_rows_of_bags_are_counted_alike(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [unpaired(), unpaired(), unpaired(label=2)]), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 3: the label is 2, outside [0, 1]")):
        read_bags(read_jsonl(path), LINES, source=str(path))


def test_the_real_data_sets_are_read_whole(data_dir):
    for name in ("gsm8k_solutions", "gsm8k_preferences", "qa_feedback", "multispanqa"):
        path = data_dir / name / "test.jsonl.gz"
        rows = read_jsonl(path)
        bags = read_bags(rows, Segmentation("given"), source=str(path))
        warn_of_equal_labels(bags)
        steps = [row[side] for row in rows for side in (("chosen", "rejected") if "chosen" in row else ("steps",))]
        assert [bag.steps for bag in bags] == [[step.strip() for step in given] for given in steps]


# Teacher scores


def test_teacher_scores_are_read_beside_steps():
    rows = [
        {"prompt": "p", "steps": STEPS, "label": 1, "teacher_scores": [0.25, None]},
        {"prompt": "p", "steps": STEPS, "label": 0, "teacher_scores": np.array([0.5, 1.0])},
        {"prompt": "p", "steps": STEPS, "label": 0},
        {"prompt": "p", "completions": STEPS, "labels": [1, 0], "teacher_scores": [0.1, 0.2]},
    ]
    found = [bag.teacher_scores for bag in read_bags(rows, LINES)]
    assert found == [(0.25, None), (0.5, 1.0), None, (0.1, 0.2)]


@pytest.mark.parametrize("scores", [[0.5], [0.5, 2.0], "0.5", [0.5, "high"]])
def test_teacher_scores_that_cannot_be_are_one_sentence_with_the_row(scores):
    row = {"prompt": "p", "steps": STEPS, "label": 1, "teacher_scores": scores}
    sentence = refuse([row], (TypeError, ValueError))
    assert "row 1" in sentence
    assert "teacher" in sentence


def test_the_first_row_that_is_left_out_is_named():
    rows = [{"prompt": "p", "response": text, "label": 1} for text in ("", "a", " ")]
    with pytest.warns(UserWarning, match=r"2 of 3 rows of rows are left out\. First: rows, row 1: "):
        assert len(read_bags(rows, Segmentation("lines"), source="rows", on_bad_row="skip")) == 1


@pytest.mark.parametrize("value", [[], (), ["a"], [{"role": "user"}, "a"], "a", None, {"role": "user"}])
def test_only_lists_of_objects_are_messages(value):
    assert not is_messages(value)
