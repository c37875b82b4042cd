"""Checks the lines of a worded solution: whether their equations hold and their results occur in a reference.

Checks are only for evaluation, and for a reward model trained on step labels as a ceiling.

A line is right if each equation in it holds, and the last number of each of its equations is one of the reference
solution. A line without an equation is right if its numbers are known: from the question or from the reference. The
line with the final answer (`#### 7`) is right if its number is the reference's. From the first wrong line on, no line
counts as right, because later lines build on a mistake.
"""

import ast
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence

from fractal_rm.tasks.answers import MARK, read_answer, same_answer

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# A token of an expression: number with its percent sign, operator or parenthesis, or the letter of an unknown.
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(
    rf"(?P<number>{_NUMBER})(?P<percent>\s?%)?|(?P<sign>[-+*/()\u00d7\u00f7])|(?P<unknown>\b[A-Za-z]\b)"
)
# Units after a number, as in "6 days/week" or "3 kg-bags", contain no operator.
_UNIT = re.compile(r"(?<=[A-Za-z])\s?[/-]\s?(?=[A-Za-z$£€])|(?<=[A-Za-z$£€0-9])/(?=[A-Za-z])")
_TIMES = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d($£€])|(?<=[a-z])\s+[xX]\s+(?=[\d($£€])|(?<=\d)(?=\()")
_BY_FRACTION = re.compile(r"÷\s*(\d+/\d+)")  # 12÷1/2 = 24
_WORDS = {re.compile(r"\bhalf\b(?=\s*[*x\u00d7])", re.IGNORECASE): "0.5"}
_FRACTION = re.compile(r"\s*(\d+)/(\d+)\b")
_SIDES = re.compile(r"\s*=+\s*")
# Where a sentence ends, an expression ends too: "... = 12 pens. 3 of them".
_SENTENCE = re.compile(r"[.;:!?](?=\s|$)|,(?=\s)")
# The largest difference of two sides that a rounded last digit explains.
_HALF = 0.51


def numbers(text: str) -> set[float]:
    """All numbers of a text, without sign; a percentage counts as its number and as its share.

    Example:
        >>> sorted(numbers("He paid $1,200 for 3 of them, 50% of all."))
        [0.5, 3.0, 50.0, 1200.0]
    """
    found = set()
    for match in _TOKEN.finditer(_UNIT.sub(" ", text)):
        if match["number"]:
            value = float(match["number"].replace(",", ""))
            found |= {value, value / 100} if match["percent"] else {value}
    return found


def last_number(text: str) -> float | None:
    """The last number of a text, without sign; None if there is none.

    Example:
        >>> last_number("She pays 3 * $1,200 = $3,600."), last_number("So be it.")
        (3600.0, None)
    """
    found = [match["number"] for match in _TOKEN.finditer(_UNIT.sub(" ", text)) if match["number"]]
    return float(found[-1].replace(",", "")) if found else None


def _tokens(text: str) -> list[str]:
    """Numbers, signs and unknowns of a text as Python writes them; `|` where a sentence ends."""
    for word, value in _WORDS.items():
        text = word.sub(value, text)
    text = _BY_FRACTION.sub(r"÷(\1)", text)
    text = _SENTENCE.sub(" \x00 ", _TIMES.sub(" * ", _UNIT.sub(" ", text)))
    found = []
    for piece in text.split("\x00"):
        found.append("|")
        for match in _TOKEN.finditer(piece):
            if match["number"]:
                value = match["number"].replace(",", "")
                found.append(f"({value}%)" if match["percent"] else value.lstrip("0") or "0")
            elif match["sign"]:
                found.append({"\u00d7": "*", "÷": "/"}.get(match["sign"], match["sign"]))
            elif match["unknown"] not in "aAIs":  # words and the genitive, not unknowns
                found.append(match["unknown"])
    return found[1:]


def _values(tokens: Sequence[str], unknown: float | None) -> list[float] | None:
    """The values of an expression: one, or two where a percentage may be a number or a share; None: no expression."""
    if not tokens or "|" in tokens:
        return None
    texts = {" ".join(tokens)}
    if any(token.endswith("%)") for token in tokens):
        texts = {re.sub(r"%\)", f"{share})", text) for text in texts for share in ("", "/100")}
    values = []
    for text in texts:
        try:
            values.append(_evaluate(ast.parse(text.strip(), mode="eval").body, unknown))
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            return None
    return values


def _evaluate(node: ast.expr, unknown: float | None) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.Name) and unknown is not None:
        return unknown
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, unknown)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, unknown), _evaluate(node.right, unknown))
    raise ValueError("not arithmetic")


def _side(tokens: list[str], unknown: float | None, *, at_end: bool) -> list[float] | None:
    """The values of the longest expression at the end of a text, or at its start."""
    for cut in range(len(tokens)):
        found = _values(tokens[cut:] if at_end else tokens[: len(tokens) - cut], unknown)
        if found is not None:
            return found
    return None


def _equal(left: Sequence[float], right: Sequence[float]) -> bool:
    return any(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
        or (b == int(b) and a != int(a) and abs(a - b) <= _HALF)  # a rounded result
        or (round(b, 2) == b and b != int(b) and abs(a - b) <= 0.0051)
        for a in left
        for b in right
    )


def check_line(line: str, known: set[float], results: set[float], answer: str) -> bool:
    """Whether a line is right.

    Args:
        line: One line of a solution.
        known: Numbers of the question and of the reference solution.
        results: Numbers of the reference solution and its answer.
        answer: The right final answer.

    Example:
        >>> check_line("She has 3 + 4 = 7 pens.", {3, 4, 7}, {7}, "7")
        True
        >>> check_line("She has 3 + 4 = 8 pens.", {3, 4, 7}, {7}, "7")
        False
        >>> check_line("#### 7", {3, 4, 7}, {7}, "7")
        True
    """
    if MARK in line:
        return same_answer(read_answer(line), answer)
    texts = _SIDES.split(line)
    if len(texts) == 1:
        return numbers(line) <= known
    sides = [_tokens(text) for text in texts]
    has_unknown = any(len(token) == 1 and token.isalpha() for side in sides for token in side)
    candidates: Sequence[float | None] = sorted(known) if has_unknown else [None]
    for left, right in itertools.pairwise(sides):
        if not any(_holds(left, right, unknown) for unknown in candidates):
            return False
    last = _side(sides[-1], None, at_end=False)
    fraction = _FRACTION.match(texts[-1])  # "= 1/5 miles": the reference has its numbers, but not its value
    return (
        last is None
        or any(math.isclose(abs(a), b, abs_tol=1e-6) for a in last for b in results)
        or (fraction is not None and {float(fraction[1]), float(fraction[2])} <= results)
    )


def _holds(left: list[str], right: list[str], unknown: float | None) -> bool:
    """Whether both sides are equal; a side without an expression, as in "T = the number of pens", states nothing."""
    a, b = _side(left, unknown, at_end=True), _side(right, unknown, at_end=False)
    return a is None or b is None or _equal(a, b)


def check_lines(response: str, question: str, reference: str, answer: str) -> list[bool]:
    """Whether each line of a response that is not blank is right; after the first wrong line, none is.

    Args:
        response: The solution to check, one step per line.
        question: The problem.
        reference: A right solution of it, with its calculations.
        answer: The right final answer.
    """
    results = numbers(reference) | numbers(answer)
    known = results | numbers(question)
    flags: list[bool] = []
    for line in response.split("\n"):
        if line.strip():
            flags.append(all(flags) and check_line(line, known, results, answer))
    return flags


def step_labels(flags: Sequence[bool]) -> list[float | None]:
    """Gold labels of steps: 1 before the first wrong line, 0 at it, None after it.

    Example:
        >>> step_labels([True, False, False])
        [1.0, 0.0, None]
    """
    wrong = list(flags).index(False) if False in flags else len(flags)
    return [1.0 if i < wrong else 0.0 if i == wrong else None for i in range(len(flags))]
