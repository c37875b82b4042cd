"""Any data set of `reasoning-gym` as a task: its problems, and its own verifier of answers as the outcome.

Needs the extra `gym`. `gsm_symbolic`, grade-school word problems made from templates, has more: splits by template, a
reference solution for each problem, and a checker of steps.
"""

import difflib
import hashlib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fractal_rm.tasks.answers import MARK, check_math_verify, read_answer
from fractal_rm.tasks.equations import check_lines
from fractal_rm.tasks.task import Split, Task

PROMPT = "Question: {question}\nAnswer:\n"

# Templates of gsm_symbolic by the number of calculations (lines before the answer) of their solutions: those with
# integer answers whose question and solution stay within 110 tokens of SmolLM2 in 40 draws each.
TEMPLATES: dict[int, tuple[int, ...]] = {
    2: (4, 6, 8, 10, 14, 16, 20, 23, 24, 26, 30, 39, 43, 50, 54, 55, 56, 58, 59, 69, 72, 95, 99),
    3: (1, 13, 31, 33, 34, 41, 47, 48, 53, 57, 62, 67, 70, 75, 78, 82, 85, 88, 91, 93),
    4: (18, 40, 44, 51, 71),
    5: (3, 9, 28, 84),
}
# The same with solutions of up to 160 tokens and at least four calculations: only in `gsm_symbolic_hard`.
LONG_TEMPLATES = (0, 2, 7, 15, 22, 42, 46, 60, 64, 96, 19)
_USABLE = tuple(number for numbers in TEMPLATES.values() for number in numbers)
# Every fifth template, over all lengths, is in no split of `gsm_symbolic`: they are the unseen kind of problem.
UNSEEN_TEMPLATES = _USABLE[2::5]
KNOWN_TEMPLATES = tuple(number for number in _USABLE if number not in UNSEEN_TEMPLATES)
GSM_SYMBOLIC: dict[str, tuple[int, ...]] = {
    "gsm_symbolic": KNOWN_TEMPLATES,
    "gsm_symbolic_unseen": UNSEEN_TEMPLATES,
    "gsm_symbolic_easy": tuple(number for number in TEMPLATES[2] if number in KNOWN_TEMPLATES),
    "gsm_symbolic_hard": tuple(n for n in KNOWN_TEMPLATES if n in TEMPLATES[4] + TEMPLATES[5]) + LONG_TEMPLATES,
}

# A prompt belongs to one split, by its hash: tenths of all prompts.
_SHARES: dict[Split, range] = {
    "held_out": range(2),
    "validation": range(2, 3),
    "reward_model": range(3, 6),
    "train": range(6, 10),
}
# Draws per requested problem before the data set counts as exhausted.
_DRAWS = 100
_BLOCK = 500
_SEEDS_APART = 10_000_000


@dataclass(frozen=True)
class GymProblem:
    """A problem of a data set.

    Args:
        prompt: The text that the policy sees.
        entry: The library's record: `question`, `answer`, `metadata`.
        verifier: The data set, whose `score_answer` judges answers.
    """

    prompt: str
    entry: dict[str, Any] = field(repr=False, hash=False, compare=False)
    verifier: Any = field(repr=False, hash=False, compare=False)

    @property
    def answer(self) -> str:
        """The reference answer."""
        return self.entry["answer"]

    @property
    def solution(self) -> str | None:
        """A right solution, one calculation per line and `#### answer` last; None if the data set has no solutions."""
        return self.entry["metadata"].get("answer_cot")

    @property
    def is_sound(self) -> bool:
        """Whether the answer passes the library's verifier, and every line of the solution the checker of steps.

        Up to 2 in a hundred records of gsm_symbolic do not: negative answers, results truncated to whole numbers.
        """
        if self.solution is None:
            return self.check_answer(f"{MARK} {self.answer}")
        return self.check_answer(self.solution) and all(self.check_steps(self.solution) or ())

    def check_answer(self, response: str) -> bool:
        """Whether the verifier gives its full score to what the response states ([`read_answer`])."""
        stated = read_answer(response)
        if stated is None:
            return False
        try:
            return self.verifier.score_answer(stated, self.entry) >= 1
        except Exception as error:  # the verifier is the library's, and a policy may state anything
            warnings.warn(
                f"The verifier of reasoning-gym raised {type(error).__name__} ({error}) for the answer "
                f"{stated[:80]!r}: it counts as wrong.",
                stacklevel=2,
            )
            return False

    def check_steps(self, response: str) -> list[bool] | None:
        """Whether each line is right, by the reference solution; None if there is none."""
        if self.solution is None:
            return None
        return check_lines(response, self.entry["question"], self.solution, self.answer)


class GymTask(Task):
    """Problems of a data set of `reasoning-gym`.

    Args:
        name: Name of the data set; for gsm_symbolic also `gsm_symbolic_unseen`, `gsm_symbolic_easy` (two calculations)
            and `gsm_symbolic_hard` (four and more).
        model: Folder or hub id of the base policy.
        options: Options of the data set, as the library names them.

    Raises:
        ImportError: If reasoning-gym or math-verify is not installed.
        ValueError: If there is no data set of this name, an option is wrong, or its answers are not text that its own
            verifier accepts.
    """

    max_new_tokens = 160

    def __init__(self, name: str, *, model: str = "", options: dict[str, Any] | None = None) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ImportError(
                f'The task `reasoning_gym` needs reasoning-gym ({error}). Install it: `pip install "fractal-rm[gym]"`.'
            ) from None
        check_math_verify("The task `reasoning_gym`")  # now, not when a response states an expression
        if name not in DATASETS and name not in GSM_SYMBOLIC:
            alike = difflib.get_close_matches(name, {**DATASETS, **GSM_SYMBOLIC}, n=3, cutoff=0.5)
            near = f" Nearest: {', '.join(alike)}." if alike else f" It has {len(DATASETS)}, such as gsm_symbolic."
            raise ValueError(f"reasoning-gym has no data set {name!r}.{near}")
        self.name, self.model = name, model
        self._options = dict(options or {})
        self._create = reasoning_gym.create_dataset
        self._made: dict[str, GymProblem] = {}
        self._check()

    def _dataset(self, seed: int, size: int) -> Any:
        name = "gsm_symbolic" if self.name in GSM_SYMBOLIC else self.name
        try:
            return self._create(name, seed=seed, size=size, **self._options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"reasoning-gym does not make {name!r} with the options {self._options}: {error}"
            ) from error

    def _check(self) -> None:
        """Raise unless the reference answer of a first problem passes the verifier, before any training."""
        entry = self._dataset(0, 1)[0]
        answer = entry.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{self.name} of reasoning-gym has no answers that are text. Choose another data set.")
        problem = GymProblem("", entry, self._dataset(0, 1))
        if not problem.check_answer(f"#### {answer}"):
            raise ValueError(
                f"The verifier of {self.name} refuses the data set's own answer on one line ({answer[:60]!r}). Choose "
                "another data set."
            )

    def problems(self, split: Split, count: int, seed: int) -> list[GymProblem]:
        """Problems of a split, all different. Splits share no prompt, whatever their seeds."""
        found: dict[str, GymProblem] = {}
        for problem in self.draws(seed, count):
            tenth = hashlib.blake2b(problem.prompt.encode(), digest_size=4).digest()
            if int.from_bytes(tenth, "big") % 10 in _SHARES[split] and problem.prompt not in found:
                if problem.is_sound:
                    found[problem.prompt] = problem
                if len(found) == count:
                    break
        if len(found) < count:
            raise ValueError(f"{self.name} has only {len(found)} different problems for {split}, not {count}.")
        self._made |= found
        return list(found.values())

    def draws(self, seed: int, count: int) -> Iterator[GymProblem]:
        """Problems of all splits, sound or not: up to 100 for each requested problem."""
        templates = GSM_SYMBOLIC.get(self.name)
        for block in range(-(-_DRAWS * count // _BLOCK)):
            # The library makes problem i from seed + i: seeds lie further apart than all draws. Blocks are of one size,
            # so that a longer list begins with the shorter one.
            dataset = self._dataset(seed * _SEEDS_APART + block * _BLOCK, _BLOCK)
            for number in range(_BLOCK):
                if templates is None:
                    entry = dataset[number]
                else:
                    rng = random.Random(f"{self.name}-{seed}-{block}-{number}")
                    template = rng.choice(templates)
                    entry = dataset.generators[template](rng, 1.0)
                    entry["metadata"]["template"] = template
                yield GymProblem(PROMPT.format(question=entry["question"].strip()), entry, dataset)

    def read(self, prompt: str) -> GymProblem:
        """The problem of a prompt that this task has made.

        Raises:
            KeyError: If this task did not make it; a prompt does not reveal its answer.
        """
        return self._made[prompt]

    def base_policy(self, number: int, work: Path) -> Path:
        """The given model."""
        if not self.model:
            raise ValueError(f"The task {self.name} does not bring a base policy. Give `model`.")
        return Path(self.model)


def demonstrations(problems: Sequence[GymProblem]) -> list[tuple[str, str]]:
    """Prompts with their reference solutions, for supervised fine-tuning.

    Raises:
        ValueError: If the data set has no solutions.
    """
    missing = [problem.prompt for problem in problems if problem.solution is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(problems)} problems have no solution to learn from. Use gsm_symbolic."
        )
    return [(problem.prompt, str(problem.solution).strip()) for problem in problems]
