"""Word problems in small integers with an exact checker of every step: the arithmetic task.

A counter shows one digit and wraps around after 9. A problem changes it several times; a response writes one change per
line and then the answer:

    Mia's counter shows 3 and wraps after 9.
    1: add 4
    2: multiply by 3
    What does it show?

    1: add 4 -> 7
    2: multiply by 3 -> 1
    Answer: 1

With distractors, the prompt also tells of other people's counters ("Tom's counter: subtract 8"), which change nothing;
responses are as before. With branching there are two counters, whose last values are combined at the end:

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

Every change can be undone (factors are 1, 3, 7 and 9), so a wrong result never washes out by itself: only a second
mistake can bring back the right answer. There are 240 facts (`a op b`). A base policy is fine-tuned on text in which a
fixed share of them is wrong most of the time: its mistakes are *beliefs*, not sampling noise, so greedy decoding fails
too and there is something to learn. Which facts are wrong is known here and nowhere else: reward models see outcomes
only.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MODULUS = 10
OPERATORS = ("+", "-", "*")
NAMES = ("Mia", "Tom", "Ana", "Leo", "Eva", "Sam", "Ida", "Max")
PHRASES = {"+": "add", "-": "subtract", "*": "multiply by"}
SIGNS = {phrase: sign for sign, phrase in PHRASES.items()}

OPERANDS = {"+": tuple(range(MODULUS)), "-": tuple(range(MODULUS)), "*": (1, 3, 7, 9)}
FACTS = tuple((a, sign, b) for sign in OPERATORS for a in range(MODULUS) for b in OPERANDS[sign])

Fact = tuple[int, str, int]
Change = tuple[str, int]
_CHANGE = re.compile(r"(\d+): (add|subtract|multiply by) (\d)")
_STEP = re.compile(_CHANGE.pattern + r" -> (\d)")
_ANSWER = re.compile(r"Answer: (\d)")
_DISTRACTOR = re.compile(r"^(\w+)'s counter: (add|subtract|multiply by) (\d)$", re.MULTILINE)
_BRANCHES = re.compile(
    r"(\w+)'s counter shows (\d) and wraps after 9\.\n((?:\d+: .*\n)+)"
    r"(\w+)'s counter shows (\d) and wraps after 9\.\n((?:\d+: .*\n)+)"
    r"\1's (add|subtract) \4's: what does it show\?\n"
)
_START = re.compile(r"(\w+): (\d)")
_BOTH = re.compile(r"Both: (\d) (add|subtract) (\d) -> (\d)")


def apply(left: int, operator: str, right: int) -> int:
    """The true result of a fact, on a counter that wraps around after 9.

    Example:
        >>> apply(7, "*", 3), apply(1, "-", 2)
        (1, 9)
    """
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operator] % MODULUS


def _read_changes(text: str) -> tuple[Change, ...]:
    return tuple((SIGNS[phrase], int(operand)) for _, phrase, operand in _CHANGE.findall(text))


def _states(response: str, answer: int) -> bool:
    """Whether the last line of a response states an answer."""
    match = _ANSWER.fullmatch(response.rstrip().rpartition("\n")[2].strip())
    return match is not None and int(match[1]) == answer


@dataclass(frozen=True)
class Problem:
    """One word problem: a start and the changes that follow."""

    name: str
    start: int
    changes: tuple[Change, ...]

    @property
    def prompt(self) -> str:
        """The problem as text, ending in a newline: a response follows directly."""
        changes = "\n".join(f"{i}: {PHRASES[sign]} {operand}" for i, (sign, operand) in enumerate(self.changes, 1))
        return f"{self.name}'s counter shows {self.start} and wraps after 9.\n{changes}\nWhat does it show?\n"

    @property
    def answer(self) -> int:
        """The final value of the counter."""
        value = self.start
        for operator, operand in self.changes:
            value = apply(value, operator, operand)
        return value

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        """Read a problem back from its prompt.

        Raises:
            ValueError: If the text is not a prompt of this task.
        """
        head, changes = re.match(r"(\w+)'s counter shows (\d) and", prompt), _read_changes(prompt)
        if not head or not changes:
            raise ValueError(f"Not a prompt of the arithmetic task: {prompt!r}. Make prompts with `make_problems`.")
        return cls(head[1], int(head[2]), changes)

    def check_steps(self, response: str) -> list[bool]:
        """Whether each line of a response is right, given the lines before it.

        A line is right if it continues from the result that the line before it *states*, makes the change that is due,
        and computes it correctly. So one mistake makes one wrong line, and a later mistake may undo it. The answer
        line is right if it repeats the last result after all changes. A line beyond the answer is wrong.

        Returns:
            One flag for each line that is not blank.
        """
        flags: list[bool] = []
        value = self.start
        done = 0
        for line in (line.strip() for line in response.split("\n") if line.strip()):
            step, answer = _STEP.fullmatch(line), _ANSWER.fullmatch(line)
            if step and done < len(self.changes):
                operator, operand, result = SIGNS[step[2]], int(step[3]), int(step[4])
                due = (int(step[1]), operator, operand) == (done + 1, *self.changes[done])
                flags.append(due and result == apply(value, operator, operand))
                value, done = result, done + 1
            else:
                flags.append(answer is not None and done == len(self.changes) and int(answer[1]) == value)
                done = len(self.changes) + 1
        return flags

    def check_answer(self, response: str) -> bool:
        """Whether the last line states the right answer: the outcome label.

        Example:
            >>> problem = Problem("Mia", 3, (("+", 4), ("*", 3)))
            >>> problem.check_answer("1: add 4 -> 7\\n2: multiply by 3 -> 1\\nAnswer: 1")
            True
            >>> problem.check_answer("Answer: 2")
            False
        """
        return _states(response, self.answer)


@dataclass(frozen=True)
class DistractedProblem(Problem):
    """A chain of changes with sentences about other counters between them.

    Args:
        distractors: For each: the number of changes before it in the prompt, the name, and the change.
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
            ValueError: If the text is not a prompt of this task.
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
        """The problem as text, ending in a newline; changes are numbered across both chains."""
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
        """The final combined value."""
        results = list(self.starts)
        for branch, chain in enumerate(self.chains):
            for operator, operand in chain:
                results[branch] = apply(results[branch], operator, operand)
        return apply(results[0], self.operator, results[1])

    @classmethod
    def from_prompt(cls, prompt: str) -> "BranchingProblem":
        """Read a problem back from its prompt.

        Raises:
            ValueError: If the text is not a prompt of this task.
        """
        found = _BRANCHES.fullmatch(prompt)
        if found is None:
            raise ValueError(f"Not a branching prompt: {prompt!r}. Make prompts with `make_branching_problems`.")
        chains = _read_changes(found[3]), _read_changes(found[6])
        return cls((found[1], found[4]), (int(found[2]), int(found[5])), chains, SIGNS[found[7]])

    def check_steps(self, response: str) -> list[bool]:
        """Whether each line of a response is right, given the lines before it.

        A line is right if it is the one that is due (in its kind, name, number, change) and right given what earlier
        lines *state*. A wrong line of the kind that is due counts as done; after any other line, no line is right.

        Returns:
            One flag for each line that is not blank.
        """
        due: list[tuple[str, int, int]] = []  # kind, branch, number across both chains
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
        return _states(response, self.answer)


AnyProblem = Problem | BranchingProblem


@dataclass(frozen=True)
class Beliefs:
    """A base policy's beliefs: some facts are wrong, most of the time.

    Args:
        wrong_share: Share of the 240 facts that are believed wrongly.
        strength: How often a wrongly believed fact is written wrongly in the policy's training text.
        seed: Which facts these are.
    """

    wrong_share: float = 0.3
    strength: float = 0.8
    seed: int = 0
    wrong: Mapping[Fact, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("wrong_share", "strength"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, outside [0, 1]. Give a share.")
        rng = random.Random(f"beliefs-{self.seed}")
        chosen = sorted(rng.sample(FACTS, round(self.wrong_share * len(FACTS))))
        offsets = {fact: rng.randrange(1, MODULUS) for fact in chosen}
        wrong = {fact: (apply(*fact) + offset) % MODULUS for fact, offset in offsets.items()}
        object.__setattr__(self, "wrong", wrong)

    def result(self, fact: Fact, rng: random.Random) -> int:
        """The result of a fact according to these beliefs."""
        return self.wrong[fact] if fact in self.wrong and rng.random() < self.strength else apply(*fact)

    def respond(self, problem: AnyProblem, rng: random.Random) -> str:
        """A response written according to these beliefs."""
        branching = isinstance(problem, BranchingProblem)
        starts, chains = (problem.starts, problem.chains) if branching else ((problem.start,), (problem.changes,))
        lines, results, number = [], [], 0
        for branch, (value, chain) in enumerate(zip(starts, chains, strict=True)):
            if branching:
                lines.append(f"{problem.names[branch]}: {value}")
            for operator, operand in chain:
                number += 1
                value = self.result((value, operator, operand), rng)
                lines.append(f"{number}: {PHRASES[operator]} {operand} -> {value}")
            results.append(value)
        if branching:
            first, second = results
            results.append(self.result((first, problem.operator, second), rng))
            lines.append(f"Both: {first} {PHRASES[problem.operator]} {second} -> {results[-1]}")
        return "\n".join([*lines, f"Answer: {results[-1]}"])


def make_problems(count: int, *, seed: int, min_steps: int = 3, max_steps: int = 6) -> list[Problem]:
    """Random problems; the same seed gives the same list.

    Args:
        count: Number of problems.
        seed: Seed of this list; use another one for held-out problems.
        min_steps: Fewest changes of the counter.
        max_steps: Most changes of the counter.

    Raises:
        ValueError: If the lengths are not `1 <= min_steps <= max_steps`.
    """
    if not 1 <= min_steps <= max_steps:
        raise ValueError(f"Lengths from {min_steps} to {max_steps} are impossible. Give 1 <= min_steps <= max_steps.")
    rng = random.Random(f"problems-{seed}")

    def change() -> tuple[str, int]:
        operator = rng.choice(OPERATORS)
        return operator, rng.choice(OPERANDS[operator])

    return [
        Problem(
            rng.choice(NAMES),
            rng.randrange(MODULUS),
            tuple(change() for _ in range(rng.randint(min_steps, max_steps))),
        )
        for _ in range(count)
    ]


def _changes(rng: random.Random, count: int) -> tuple[Change, ...]:
    signs = [rng.choice(tuple(OPERANDS)) for _ in range(count)]
    return tuple((sign, rng.choice(OPERANDS[sign])) for sign in signs)


def make_distracted_problems(count: int, *, seed: int, min_steps: int, max_steps: int) -> list[DistractedProblem]:
    """Random chains with one to three distractors; the same seed gives the same list.

    Args:
        count: Number of problems.
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
        count: Number of problems.
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
        ValueError: If the text is not a prompt of these tasks.
    """
    kind = BranchingProblem if prompt.count("'s counter shows ") == 2 else DistractedProblem
    return kind.from_prompt(prompt)


def exact_answer(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """TRL reward function: 1 if the answer is right, else 0."""
    return [
        float(Problem.from_prompt(prompt).check_answer(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
