"""Word problems that people wrote, with new random numbers and solutions by rule: every line has an exact checker.

The rows are read from a folder with `train.jsonl[.gz]` and `test.jsonl[.gz]`: `template` (slots `number0`, `number1`,
...), `numbers`, and `equation` (prefix form, `["+", "number0", "number1"]`), as MAWPS, ASDiv and SVAMP have them.
Nothing of the data is part of this package.

A solution has one `a op b = c` per line, and `#### c` last. Results are whole numbers of at most 999; one of two
factors (or of divisor and quotient) is at most 12.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal_rm.data.readers import naming, read_jsonl
from fractal_rm.tasks.answers import check_math_verify, read_answer, same_answer
from fractal_rm.tasks.gym import PROMPT
from fractal_rm.tasks.task import Split, Task

LARGEST, LARGEST_FACTOR = 999, 12
_SLOT = re.compile(r"number(\d+)")
_LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
# Attempts to draw numbers that fit an equation; the few texts that fail are left out.
_DRAWS = 400
# Tenths of the texts of the training file; the policy and the reward model share texts, not numbers.
_VALIDATION = range(1)

Calculation = tuple[int, str, int, int]  # a, operator, b, result


@dataclass(frozen=True)
class WordProblem:
    """A problem with numbers.

    Args:
        prompt: The text that the policy sees.
        calculations: The operations of the solution, in order.
    """

    prompt: str
    calculations: tuple[Calculation, ...]

    @property
    def answer(self) -> str:
        """The right final answer."""
        return str(self.calculations[-1][3])

    @property
    def solution(self) -> str:
        """The solution by rule."""
        return "\n".join([*(f"{a} {sign} {b} = {c}" for a, sign, b, c in self.calculations), f"#### {self.answer}"])

    def check_answer(self, response: str) -> bool:
        """Whether the response states the answer, by the rule of [`~fractal_rm.tasks.answers.read_answer`]."""
        return same_answer(read_answer(response), self.answer)

    def check_steps(self, response: str) -> list[bool]:
        """Whether each line that is not blank is right; after the first wrong line, none is.

        A calculation is right if it is an unused calculation of the solution (in any order that its numbers
        allow, terms and factors in either order); the answer is right after all of them.
        """
        due = [_key(*calculation) for calculation in self.calculations]
        flags: list[bool] = []
        for line in (line.strip() for line in response.split("\n") if line.strip()):
            right = False
            if all(flags) and (found := _LINE.fullmatch(line)):
                key = _key(int(found[1]), found[2], int(found[3]), int(found[4]))
                right = key in due
                if right:
                    due.remove(key)
            elif all(flags) and line.startswith("####"):
                right = not due and self.check_answer(line)
            flags.append(right)
        return flags


def _key(a: int, sign: str, b: int, c: int) -> Calculation:
    return (min(a, b), sign, max(a, b), c) if sign in "+*" else (a, sign, b, c)


def calculate(equation: Sequence[str], numbers: Sequence[int]) -> list[Calculation] | None:
    """The calculations of an equation in prefix form, innermost first; None if one breaks the size limits.

    Raises:
        ValueError: If the equation is not in prefix form.

    Example:
        >>> calculate(["-", "+", "number0", "number1", "2.0"], [3, 4])
        [(3, '+', 4, 7), (7, '-', 2, 5)]
    """
    made: list[Calculation] = []
    rest = list(equation)

    def value() -> int | None:
        if not rest:
            raise ValueError(f"the equation {list(equation)} ends early; write it in prefix form.")
        token = rest.pop(0)
        if token not in ("+", "-", "*", "/"):
            slot = _SLOT.fullmatch(token)
            if slot and int(slot[1]) >= len(numbers):
                raise ValueError(f"the equation names {token}, but there are {len(numbers)} numbers.")
            try:
                found = numbers[int(slot[1])] if slot else float(token)
            except ValueError:
                raise ValueError(f"{token!r} in the equation is neither a number, a slot nor an operator.") from None
            return int(found) if found == int(found) else None
        a, b = value(), value()
        if a is None or b is None:
            return None
        c = _apply(a, token, b)
        if c is not None:
            made.append((a, token, b, c))
        return c

    result = value()
    if rest:
        raise ValueError(f"the equation {list(equation)} continues after its end; write it in prefix form.")
    return None if result is None or not made else made


def _apply(a: int, sign: str, b: int) -> int | None:
    """The result of a calculation; None if it breaks the size limits."""
    if sign == "/":
        if b == 0 or a % b:
            return None
        c = a // b
        suits = min(b, c) <= LARGEST_FACTOR
    else:
        c = {"+": a + b, "-": a - b, "*": a * b}[sign]
        suits = sign != "*" or min(a, b) <= LARGEST_FACTOR
    return c if suits and 0 <= c <= LARGEST else None


def draw_numbers(row: Mapping[str, Any], rng: random.Random) -> list[int] | None:
    """New numbers for a row: the numbers of its equation are drawn, keeping their order of size; others stay.

    Numbers that the equation does not use are part of the text ("1 year"), and so is a 1, which precedes a singular.
    None: no numbers of this size fit the equation.
    """
    old = row["numbers"]
    used = {int(found[1]) for token in row["equation"] if (found := _SLOT.fullmatch(token))}
    free = [i for i in range(len(old)) if i in used and old[i] != 1]
    if any(number != int(number) for number in old):
        return None
    few = any(sign in row["equation"] for sign in "*/")
    pairs = [(i, j) for i in range(len(old)) for j in range(i)]
    slots = [int(found[1]) for token in row["equation"] if (found := _SLOT.fullmatch(token))]
    quotient = slots if row["equation"][0] == "/" and len(slots) == len(row["equation"]) - 1 == 2 else None
    for _ in range(_DRAWS):
        new = [int(number) for number in old]
        for i in free:
            top = rng.choice((12, 12, 60, 400) if few else (20, 100, 500))
            new[i] = rng.randint(2, top)
        if quotient and quotient[0] in free:  # exact division, drawn backwards
            new[quotient[0]] = new[quotient[1]] * rng.randint(2, 60)
        in_order = all((new[i] - new[j]) * (old[i] - old[j]) > 0 or old[i] == old[j] for i, j in pairs)
        if in_order and calculate(row["equation"], new) is not None:
            return new
    return None


def write_text(template: str, numbers: Sequence[int]) -> str:
    """A template with numbers in its slots, spaced as people write.

    Example:
        >>> write_text("Tom has $ number0 . He finds number1 more , and buys 2 pens .", [3, 4])
        'Tom has $3. He finds 4 more, and buys 2 pens.'
    """
    text = _SLOT.sub(lambda found: str(numbers[int(found[1])]), template)
    text = re.sub(r"\s+([.,;:!?%)]|'s\b|n't\b)", r"\1", text)
    return re.sub(r"([$(])\s+", r"\1", re.sub(r"\s+", " ", text)).strip()


class WordProblems(Task):
    """Problems of `train` with new numbers, and problems of `test` unchanged.

    Args:
        folder: Holds `train.jsonl[.gz]` and `test.jsonl[.gz]`.
        model: Folder or hub id of the base policy.

    Raises:
        FileNotFoundError: If a file is missing.
        ImportError: If math-verify is not installed.
        ValueError: If a row cannot be read; it names the row.
    """

    name = "word_problems"
    max_new_tokens = 64

    def __init__(self, folder: str | Path, *, model: str = "") -> None:
        check_math_verify("The task `word_problems`")
        self.model = model
        self._train, self._test = (self._read(Path(folder), split) for split in ("train", "test"))
        self._made: dict[str, WordProblem] = {}

    @staticmethod
    def _read(folder: Path, split: str) -> list[dict[str, Any]]:
        path = next((path for end in (".jsonl.gz", ".jsonl") if (path := folder / f"{split}{end}").is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{folder} has no {split}.jsonl or {split}.jsonl.gz: the task word_problems reads both from a folder "
                "`word_problems` of `data_dir`."
            )
        rows = read_jsonl(path)
        for number, row in enumerate(rows, 1):
            with naming(str(path), number):
                missing = [name for name in ("template", "numbers", "equation") if name not in row]
                if missing:
                    raise ValueError(f"column {missing[0]!r} is missing; add it.")
                calculate(row["equation"], row["numbers"])
        return rows

    def problems(self, split: Split, count: int, seed: int) -> list[WordProblem]:
        """Problems of a split, all different: texts of `test` are held out, and a tenth of the others is validation."""
        rng = random.Random(f"word-problems-{split}-{seed}")
        if split == "held_out":
            rows = [row for row in self._test if calculate(row["equation"], row["numbers"]) is not None]
        else:
            rows = [r for r in self._train if (_tenth(r["template"]) in _VALIDATION) == (split == "validation")]
        found: dict[str, WordProblem] = {}
        for round_number in range(50):
            for row in rng.sample(rows, len(rows)):
                if len(found) == count:
                    break
                numbers = [int(n) for n in row["numbers"]] if split == "held_out" else draw_numbers(row, rng)
                if numbers is None:
                    continue
                made = calculate(row["equation"], numbers)
                prompt = PROMPT.format(question=write_text(row["template"], numbers))
                if made and (split in ("held_out", "validation") or _part(prompt) == split):
                    found.setdefault(prompt, WordProblem(prompt, tuple(made)))
            if len(found) == count or (split == "held_out" and round_number == 0):
                break
        if len(found) < count:
            raise ValueError(f"word_problems has only {len(found)} different problems for {split}, not {count}.")
        self._made |= found
        return list(found.values())

    def read(self, prompt: str) -> WordProblem:
        """The problem of a prompt that this task has made."""
        return self._made[prompt]

    def base_policy(self, number: int, work: Path) -> Path:
        """The given model."""
        if not self.model:
            raise ValueError("The task word_problems does not bring a base policy. Give `model`.")
        return Path(self.model)


def _tenth(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 10


def _part(prompt: str) -> str:
    """The split of a prompt, policy's or reward model's, by its hash."""
    return "train" if _tenth(prompt) % 2 else "reward_model"
