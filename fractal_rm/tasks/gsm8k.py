"""GSM8K: grade-school word problems with a number as the answer, from the hub or from a file."""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from fractal_rm.data.prompts import check_text
from fractal_rm.data.readers import naming
from fractal_rm.tasks.answers import MARK, check_math_verify, read_answer, same_answer

INSTRUCTION = "Solve the problem step by step, one step a line. Put the final answer on the last line, after '#### '."


def gold_answer(answer: str) -> str:
    """The number after `####` in a reference solution, without thousands separators.

    Raises:
        ValueError: If there is no `####`, or nothing follows it.

    Example:
        >>> gold_answer("She sold 48/2 = 24 clips in May.\\n#### 1,024")
        '1024'
    """
    number = answer.rpartition(MARK)[2].strip().replace(",", "")
    if MARK not in answer or not number:
        raise ValueError(f"the answer has no number after {MARK!r}; give reference solutions as GSM8K has them.")
    return number


def read_gsm8k(rows: Iterable[Mapping[str, Any]], *, source: str, chat: bool = True) -> list[dict[str, Any]]:
    """Prompts and answers from rows with `question` and `answer`, as `load_dataset("openai/gsm8k", "main")` has them.

    Args:
        rows: The rows.
        source: Name of the data in messages, such as the file.
        chat: Ask in a chat of one message, for models with a chat template; otherwise as text.

    Returns:
        One dictionary per row: `prompt`, and `answer`, the number only.

    Raises:
        TypeError: If a question or answer is not a text.
        ValueError: If one is missing or empty, or the answer states no number. Names the row, counted from 1.

    Example:
        >>> read_gsm8k([{"question": "1+1?", "answer": "It is 2.\\n#### 2"}], source="demo", chat=False)[0]["answer"]
        '2'
    """
    problems = []
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            for column in ("question", "answer"):
                if column not in row:
                    names = ", ".join(map(repr, row)) or "no columns"
                    raise ValueError(f"column {column!r} is missing (found: {names}); add it.")
                check_text(row[column], f"the {column}")
            question, answer = row["question"].strip(), gold_answer(row["answer"])
            if not question:
                raise ValueError("the question is empty; drop the row or write the question.")
        text = f"{question}\n{INSTRUCTION}"
        problems.append({"prompt": [{"role": "user", "content": text}] if chat else f"{text}\n", "answer": answer})
    if not problems:
        raise ValueError(f"{source} has no rows; give at least one.")
    return problems


def gsm8k_answer(prompts: list[Any], completions: list[Any], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """TRL reward function: 1 if the completion states the column `answer` as its final answer, else 0.

    [`~fractal_rm.tasks.answers.read_answer`] defines what counts as stated: after `####` or boxed, exactly once.

    Args:
        prompts: Texts or chats; not read.
        completions: Texts, or chats, whose last message counts.
        answer: Right answers, as texts or numbers, or reference solutions that state them in the same way. Without one
            (None) a completion gets None, which TRL leaves out.
        kwargs: Other columns; not read.

    Raises:
        ImportError: If math-verify is not installed.
        TypeError: If an answer is neither text nor number.

    Example:
        >>> gsm8k_answer(["", ""], ["3 + 4 = 7.\\n#### 7", "I think it is 7."], ["7", "7"])
        [1.0, 0.0]
    """
    return _rewards(completions, answer, last_number=False)


def last_number_answer(
    prompts: list[Any], completions: list[Any], answer: list[Any], **kwargs: Any
) -> list[float | None]:
    """As [`gsm8k_answer`], but if a completion marks no answer, its last number counts.

    It also rewards solutions that were cut off at the right moment.

    Example:
        >>> last_number_answer(["", ""], ["3 + 4 = 7.\\n#### 7", "I think it is 7."], ["7", "7"])
        [1.0, 1.0]
    """
    return _rewards(completions, answer, last_number=True)


def _rewards(completions: list[Any], answers: list[Any], *, last_number: bool) -> list[float | None]:
    check_math_verify("The reward `gsm8k_answer`")
    rewards: list[float | None] = []
    for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
        if answer is None:
            rewards.append(None)
            continue
        gold = str(answer) if isinstance(answer, numbers.Number) else answer
        check_text(gold, f"the answer of row {row}")
        stated = read_answer(completion, last_number=last_number)
        rewards.append(float(same_answer(stated, read_answer(gold) or gold)))
    return rewards
