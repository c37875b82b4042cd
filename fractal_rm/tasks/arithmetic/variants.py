"""Variants of the arithmetic task, with exact checkers: distractor sentences, and two counters that are combined.

They share the facts, the beliefs and the lines of `arithmetic.py`. With distractors, the prompt also tells of other
people's counters, which change nothing; responses are as before:

    Mia's counter shows 3 and wraps after 9.
    1: add 4
    Tom's counter: subtract 8
    2: multiply by 3
    What does it show?

With branching there are two counters, whose last values are combined at the end:

    Mia's counter shows 3 and wraps after 9.
    1: add 4
    Tom's counter shows 5 and wraps after 9.
    2: multiply by 3
    Mia's add Tom's: what does it show?

    Mia: 3
    1: add 4 -> 7
    Tom: 5
    2: multiply by 3 -> 5
    Both: 7 add 5 -> 2
    Answer: 2
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fractal_rm.tasks.arithmetic.problems import MODULUS, NAMES, OPERANDS, PHRASES, SIGNS, Beliefs, Problem, apply

_DISTRACTOR = re.compile(r"^(\w+)'s counter: (add|subtract|multiply by) (\d)$", re.MULTILINE)
_BRANCHES = re.compile(
    r"(\w+)'s counter shows (\d) and wraps after 9\.\n((?:\d+: .*\n)+)"
    r"(\w+)'s counter shows (\d) and wraps after 9\.\n((?:\d+: .*\n)+)"
    r"\1's (add|subtract) \4's: what does it show\?\n"
)
_CHANGE = re.compile(r"(\d+): (add|subtract|multiply by) (\d)")
_START = re.compile(r"(\w+): (\d)")
_STEP = re.compile(_CHANGE.pattern + r" -> (\d)")
_BOTH = re.compile(r"Both: (\d) (add|subtract) (\d) -> (\d)")
_ANSWER = re.compile(r"Answer: (\d)")

Change = tuple[str, int]


class AnyProblem(Protocol):
    """What every problem of these tasks has."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> int: ...

    def check_steps(self, response: str) -> list[bool]: ...

    def check_answer(self, response: str) -> bool: ...


@dataclass(frozen=True)
class DistractedProblem(Problem):
    """A chain of changes with sentences about other counters between them.

    Args:
        distractors: Number of changes that stand before it in the prompt, name and change.
    """

    distractors: tuple[tuple[int, str, Change], ...] = ()

    @property
    def prompt(self) -> str:
        """The problem as text, ending in a newline."""
        lines = [f"{self.name}'s counter shows {self.start} and wraps after 9."]
        for place in range(len(self.changes) + 1):
            if place:
                sign, operand = self.changes[place - 1]
                lines.append(f"{place}: {PHRASES[sign]} {operand}")
            for before, name, (sign, operand) in self.distractors:
                if before == place:
                    lines.append(f"{name}'s counter: {PHRASES[sign]} {operand}")
        return "\n".join([*lines, "What does it show?", ""])

    @classmethod
    def from_prompt(cls, prompt: str) -> "DistractedProblem":
        """Read a problem back from its prompt.

        Raises:
            ValueError: If the text is no prompt of this task.
        """
        plain = Problem.from_prompt(_DISTRACTOR.sub("", prompt))
        found = [
            (len(_CHANGE.findall(prompt[: match.start()])), match[1], (SIGNS[match[2]], int(match[3])))
            for match in _DISTRACTOR.finditer(prompt)
        ]
        return cls(plain.name, plain.start, plain.changes, tuple(found))


@dataclass(frozen=True)
class BranchingProblem:
    """Two chains of changes, whose results are combined."""

    names: tuple[str, str]
    starts: tuple[int, int]
    chains: tuple[tuple[Change, ...], tuple[Change, ...]]
    operator: str

    @property
    def prompt(self) -> str:
        """The problem as text, ending in a newline: changes are numbered through."""
        lines, number = [], 0
        for name, start, chain in zip(self.names, self.starts, self.chains, strict=True):
            lines.append(f"{name}'s counter shows {start} and wraps after 9.")
            for sign, operand in chain:
                number += 1
                lines.append(f"{number}: {PHRASES[sign]} {operand}")
        first, second = self.names
        return "\n".join([*lines, f"{first}'s {PHRASES[self.operator]} {second}'s: what does it show?", ""])

    @property
    def answer(self) -> int:
        """What both together show at the end."""
        results = list(self.starts)
        for branch, chain in enumerate(self.chains):
            for operator, operand in chain:
                results[branch] = apply(results[branch], operator, operand)
        return apply(results[0], self.operator, results[1])

    @classmethod
    def from_prompt(cls, prompt: str) -> "BranchingProblem":
        """Read a problem back from its prompt.

        Raises:
            ValueError: If the text is no prompt of this task.
        """
        found = _BRANCHES.fullmatch(prompt)
        if found is None:
            raise ValueError(f"Not a branching prompt: {prompt!r}. Make prompts with `make_branching_problems`.")
        first, second = (
            tuple((SIGNS[phrase], int(operand)) for _, phrase, operand in _CHANGE.findall(found[part]))
            for part in (3, 6)
        )
        return cls((found[1], found[4]), (int(found[2]), int(found[5])), (first, second), SIGNS[found[7]])

    def check_steps(self, response: str) -> list[bool]:
        """Whether each line of a response is right, given the lines before it.

        A line is right if it is the one that is due (in its kind, name, number, change) and right given what earlier
        lines *state*. A line of the due kind that is wrong counts as done; any other line ends what can be right.

        Args:
            response: One step a line.

        Returns:
            One flag for each line that is not blank.
        """
        due: list[tuple[str, int, int]] = []  # kind, branch, number through both chains
        number = 0
        for branch, chain in enumerate(self.chains):
            due.append(("start", branch, 0))
            for _ in chain:
                number += 1
                due.append(("step", branch, number))
        due += [("both", 0, 0), ("answer", 0, 0)]
        flags: list[bool] = []
        values = [-1, -1, -1]  # what the response states: of each branch, and of both
        for line in (line.strip() for line in response.split("\n") if line.strip()):
            kind, branch, number = due.pop(0) if due else ("nothing", 0, 0)
            good, stated = self._check_line(line, kind, branch, number, values)
            flags.append(good)
            if stated is None:
                due = []
            else:
                values[2 if kind == "both" else branch] = stated
        return flags

    def _check_line(self, line: str, kind: str, branch: int, number: int, values: list[int]) -> tuple[bool, int | None]:
        """Whether a line is right, and the value that it states; None if it is not of the kind that is due."""
        if kind == "start" and (found := _START.fullmatch(line)) and found[1] in self.names:
            stated = int(found[2])
            return (found[1], stated) == (self.names[branch], self.starts[branch]), stated
        if kind == "step" and (found := _STEP.fullmatch(line)):
            place = number - 1 - (len(self.chains[0]) if branch else 0)
            change, stated = (SIGNS[found[2]], int(found[3])), int(found[4])
            asked = (int(found[1]), change) == (number, self.chains[branch][place])
            return asked and stated == apply(values[branch], *change), stated
        if kind == "both" and (found := _BOTH.fullmatch(line)):
            stated = int(found[4])
            asked = (int(found[1]), SIGNS[found[2]], int(found[3])) == (values[0], self.operator, values[1])
            return asked and stated == apply(values[0], self.operator, values[1]), stated
        if kind == "answer" and (found := _ANSWER.fullmatch(line)):
            return int(found[1]) == values[2], int(found[1])
        return False, None

    def check_answer(self, response: str) -> bool:
        """Whether the last line states the right answer: the outcome label."""
        match = _ANSWER.fullmatch(response.rstrip().rpartition("\n")[2].strip())
        return match is not None and int(match[1]) == self.answer


def respond(problem: AnyProblem, beliefs: Beliefs, rng: random.Random) -> str:
    """A response to any of these problems as somebody with these beliefs writes it."""
    if isinstance(problem, Problem):
        return beliefs.respond(problem, rng)
    if not isinstance(problem, BranchingProblem):
        raise TypeError(f"{type(problem).__name__} is no problem of the arithmetic tasks.")

    def result(value: int, operator: str, operand: int) -> int:
        fact = (value, operator, operand)
        believed = fact in beliefs.wrong and rng.random() < beliefs.strength
        return beliefs.wrong[fact] if believed else apply(*fact)

    lines, results, number = [], [], 0
    for name, value, chain in zip(problem.names, problem.starts, problem.chains, strict=True):
        lines.append(f"{name}: {value}")
        for operator, operand in chain:
            number += 1
            value = result(value, operator, operand)
            lines.append(f"{number}: {PHRASES[operator]} {operand} -> {value}")
        results.append(value)
    both = result(results[0], problem.operator, results[1])
    lines.append(f"Both: {results[0]} {PHRASES[problem.operator]} {results[1]} -> {both}")
    return "\n".join([*lines, f"Answer: {both}"])


def _changes(rng: random.Random, count: int) -> tuple[Change, ...]:
    signs = [rng.choice(tuple(OPERANDS)) for _ in range(count)]
    return tuple((sign, rng.choice(OPERANDS[sign])) for sign in signs)


def make_distracted_problems(count: int, *, seed: int, min_steps: int, max_steps: int) -> list[DistractedProblem]:
    """Random chains with one to three distractors; the same seed gives the same list.

    Args:
        count: How many.
        seed: Seed of this list.
        min_steps: Fewest changes of the counter.
        max_steps: Most changes of the counter.
    """
    rng = random.Random(f"distracted-{seed}")
    problems = []
    for _ in range(count):
        name, steps = rng.choice(NAMES), rng.randint(min_steps, max_steps)
        others = [other for other in NAMES if other != name]
        distractors = sorted(
            (rng.randint(0, steps), rng.choice(others), _changes(rng, 1)[0]) for _ in range(rng.randint(1, 3))
        )
        problems.append(DistractedProblem(name, rng.randrange(MODULUS), _changes(rng, steps), tuple(distractors)))
    return problems


def make_branching_problems(count: int, *, seed: int, min_steps: int, max_steps: int) -> list[BranchingProblem]:
    """Random problems with two chains; the same seed gives the same list.

    Args:
        count: How many.
        seed: Seed of this list.
        min_steps: Fewest changes of both counters together, at least 2.
        max_steps: Most changes of both counters together.

    Raises:
        ValueError: If the lengths are not `2 <= min_steps <= max_steps`.
    """
    if not 2 <= min_steps <= max_steps:
        raise ValueError(f"Two chains of {min_steps} to {max_steps} changes in all: give 2 <= min_steps <= max_steps.")
    rng = random.Random(f"branching-{seed}")
    problems = []
    for _ in range(count):
        steps = rng.randint(min_steps, max_steps)
        first = rng.randint(max(1, steps // 2 - 1), min(steps - 1, steps // 2 + 1))
        one, other = rng.sample(NAMES, 2)
        problems.append(
            BranchingProblem(
                (one, other),
                (rng.randrange(MODULUS), rng.randrange(MODULUS)),
                (_changes(rng, first), _changes(rng, steps - first)),
                rng.choice(("+", "-")),
            )
        )
    return problems


def read_problem(prompt: str) -> AnyProblem:
    """The problem of any prompt of these tasks.

    Raises:
        ValueError: If it is none.
    """
    kinds: dict[bool, Callable[[str], AnyProblem]] = {
        True: BranchingProblem.from_prompt,
        False: DistractedProblem.from_prompt,
    }
    return kinds[prompt.count("'s counter shows ") == 2](prompt)
