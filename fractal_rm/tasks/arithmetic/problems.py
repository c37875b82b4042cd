"""Word problems in small integers with an exact checker of every step: the arithmetic task.

A counter shows one digit and wraps around after 9. A problem changes it several times; a response writes one change a
line and then the answer:

    Mia's counter shows 3 and wraps after 9.
    1: add 4
    2: multiply by 3
    What does it show?

    1: add 4 -> 7
    2: multiply by 3 -> 1
    Answer: 1

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
_CHANGE = re.compile(r"(\d+): (add|subtract|multiply by) (\d)", re.MULTILINE)
_STEP = re.compile(_CHANGE.pattern + r" -> (\d)")
_ANSWER = re.compile(r"Answer: (\d)")


def apply(left: int, operator: str, right: int) -> int:
    """The true result of a fact, on a counter that wraps around after 9.

    Example:
        >>> apply(7, "*", 3), apply(1, "-", 2)
        (1, 9)
    """
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operator] % MODULUS


@dataclass(frozen=True)
class Problem:
    """One word problem: a start and the changes that follow."""

    name: str
    start: int
    changes: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """The problem as text, ending in a newline: a response follows directly."""
        changes = "\n".join(f"{i}: {PHRASES[sign]} {operand}" for i, (sign, operand) in enumerate(self.changes, 1))
        return f"{self.name}'s counter shows {self.start} and wraps after 9.\n{changes}\nWhat does it show?\n"

    @property
    def answer(self) -> int:
        """What the counter shows at the end."""
        value = self.start
        for operator, operand in self.changes:
            value = apply(value, operator, operand)
        return value

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        """Read a problem back from its prompt.

        Raises:
            ValueError: If the text is no prompt of this task.
        """
        head = re.match(r"(\w+)'s counter shows (\d) and", prompt)
        changes = _CHANGE.findall(prompt)
        if not head or not changes:
            raise ValueError(f"Not a prompt of the arithmetic task: {prompt!r}. Make prompts with `make_problems`.")
        return cls(head[1], int(head[2]), tuple((SIGNS[phrase], int(operand)) for _, phrase, operand in changes))

    def check_steps(self, response: str) -> list[bool]:
        """Whether each line of a response is right, given the lines before it.

        A line is right if it continues from the result that the line before it *states*, makes the change that is due,
        and computes it correctly. So one mistake makes one wrong line, and a later mistake may undo it. The answer
        line is right if it repeats the last result after all changes. A line beyond the answer is wrong.

        Args:
            response: One step a line.

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
        last = response.rstrip().rpartition("\n")[2].strip()
        match = _ANSWER.fullmatch(last)
        return match is not None and int(match[1]) == self.answer


@dataclass(frozen=True)
class Beliefs:
    """What a base policy holds true: some facts wrongly, most of the time.

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

    def respond(self, problem: Problem, rng: random.Random) -> str:
        """A response as somebody with these beliefs writes it."""
        value, lines = problem.start, []
        for number, (operator, operand) in enumerate(problem.changes, 1):
            fact = (value, operator, operand)
            believed = fact in self.wrong and rng.random() < self.strength
            result = self.wrong[fact] if believed else apply(*fact)
            lines.append(f"{number}: {PHRASES[operator]} {operand} -> {result}")
            value = result
        return "\n".join([*lines, f"Answer: {value}"])


def make_problems(count: int, *, seed: int, min_steps: int = 3, max_steps: int = 6) -> list[Problem]:
    """Random problems; the same seed gives the same list.

    Args:
        count: How many.
        seed: Seed of this list; use another one for held-out problems.
        min_steps: Fewest changes of the counter.
        max_steps: Most changes of the counter.

    Raises:
        ValueError: If the lengths are not `1 <= min_steps <= max_steps`.
    """
    if not 1 <= min_steps <= max_steps:
        raise ValueError(f"Lengths from {min_steps} to {max_steps} make no problem. Give 1 <= min_steps <= max_steps.")
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


def exact_answer(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """TRL reward function: 1 if the answer is right, else 0."""
    return [
        float(Problem.from_prompt(prompt).check_answer(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
