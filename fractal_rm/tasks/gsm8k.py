"""GSM8K: grade-school word problems with a number as the answer, from the hub or from a file."""

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from fractal_rm.data.prompts import check_text, response_text
from fractal_rm.data.readers import naming

INSTRUCTION = "Solve the problem step by step, one step a line. Put the final answer on the last line, after '#### '."
_MARK = "####"


def gold_answer(answer: str) -> str:
    """The number after `####` in a reference solution, without thousands separators.

    Raises:
        ValueError: If there is no `####`, or nothing follows it.

    Example:
        >>> gold_answer("She sold 48/2 = 24 clips in May.\\n#### 1,024")
        '1024'
    """
    number = answer.rpartition(_MARK)[2].strip().replace(",", "")
    if _MARK not in answer or not number:
        raise ValueError(f"the answer has no number after {_MARK!r}; give reference solutions as GSM8K has them.")
    return number


def read_gsm8k(rows: Iterable[Mapping[str, Any]], *, source: str, chat: bool = True) -> list[dict[str, Any]]:
    """Prompts and answers from rows with `question` and `answer`, as `load_dataset("openai/gsm8k", "main")` has them.

    Args:
        rows: The rows.
        source: Name of the data in messages, such as the file.
        chat: Ask in a chat of one message, for models with a chat template; otherwise as text.

    Returns:
        One dictionary a row: `prompt`, and `answer`, the number only.

    Raises:
        TypeError: If a question or answer is no text.
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


def gsm8k_answer(prompts: list[Any], completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1 if the completion's final answer equals the column `answer`, else 0.

    The final answer is what follows the last `####`; without one, whatever math-verify finds in the whole completion.

    Args:
        prompts: Texts or chats; not read.
        completions: Texts, or chats of one assistant message.
        answer: Right answers.
        kwargs: Other columns; not read.

    Raises:
        ImportError: If math-verify is not installed.

    Example:
        >>> gsm8k_answer(["", ""], ["3 + 4 = 7.\\n#### 7", "I think it is 8."], ["7", "7"])
        [1.0, 0.0]
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError(
            'The reward `gsm8k_answer` needs math-verify. Install it: `pip install "fractal-rm[math]"`.'
        ) from None
    # math-verify limits its time with a signal, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        text = response_text(completion)
        stated = text.rpartition(_MARK)[2].strip()
        found = parse(stated.partition("\n")[0] if _MARK in text else text, parsing_timeout=seconds)  # type: ignore[arg-type]
        right = bool(found) and verify(parse(gold, parsing_timeout=seconds), found, timeout_seconds=seconds)  # type: ignore[arg-type]
        rewards.append(float(right))
    return rewards
