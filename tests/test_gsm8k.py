"""GSM8K: what counts as a row; which answers count is in test_answers.py."""

import sys
import threading

import pytest
from support.stand_ins import gsm8k_problems

from fractal_rm.tasks.gsm8k import gold_answer, gsm8k_answer, read_gsm8k


def test_thousands_separators_make_no_difference():
    assert gsm8k_answer(["?"] * 2, ["#### 1,024", "#### 1024"], [gold_answer("#### 1,024")] * 2) == [1.0, 1.0]


def test_chats_are_read_as_their_text():
    assert gsm8k_answer(["?"], [[{"role": "assistant", "content": "#### 3"}]], ["3"]) == [1.0]


def test_answers_are_checked_outside_the_main_thread_too():
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(gsm8k_answer(["?"], ["#### 3"], ["3"])))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "fractal-rm\[math\]"'):
        gsm8k_answer([], [], [])


def test_a_question_becomes_a_chat_or_a_text():
    rows = gsm8k_problems(1)
    (chat,), (text,) = read_gsm8k(rows, source="rows"), read_gsm8k(rows, source="rows", chat=False)
    assert chat["prompt"] == [{"role": "user", "content": text["prompt"].rstrip("\n")}]
    assert text["prompt"].startswith(rows[0]["question"])
    assert chat["answer"] == text["answer"] == "3"


@pytest.mark.parametrize(
    ("row", "error", "sentence"),
    [
        ({"answer": "#### 3"}, ValueError, "rows, row 2: column 'question' is missing"),
        ({"question": "?", "answer": 3}, TypeError, r"rows, row 2: the answer is 3 \(int\), not text"),
        ({"question": " ", "answer": "#### 3"}, ValueError, "rows, row 2: the question is empty"),
        ({"question": "?", "answer": "3"}, ValueError, "rows, row 2: the answer has no number after '####'"),
        ({"question": "?", "answer": "####  "}, ValueError, "rows, row 2: the answer has no number"),
    ],
)
def test_a_bad_row_is_named(row, error, sentence):
    with pytest.raises(error, match=sentence):
        read_gsm8k([*gsm8k_problems(1), row], source="rows")
