"""The one reader of final answers: for rewards, sampling, evaluation and votes.

An answer counts only if a response marks it: `#### 7`, or `\\boxed{7}`, and nothing else. A response with two different
answers counts as having none.
"""

# ruff: noqa: RUF001 - the quotation marks and dashes of other keyboards are intended

import functools
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import regex as re  # unlike the standard library's, it counts the vowel signs of Indic scripts as letters

from fractal_rm.data.prompts import TEXT_PARTS, Conversation
from fractal_rm.data.segmentation import THINKING, TOOL_CALL
from fractal_rm.data.sentences import TAG
from fractal_rm.tasks.numbers import LONGEST, MATH_NAMES, NO_VALUE, SPACED, UNSIGNED, denied, measure, number_values

MARK = "####"

# Seconds that math-verify may take for an expression.
_SECONDS = 10

# A mark with its line; a line of Markdown may close with the same signs.
_MARKED = re.compile(r"(?<!#)####(?!#)[^\S\n\r\u2028]*([^\n\r\u2028]*)")
_NOTHING = re.compile(rf"(?:\s|{TAG.pattern})*\Z")
_CLOSED = re.compile(r"(?:^|\s)#+\s*$")
_BOX = re.compile(r"\\(?:f?boxed|fbox)\s*")
# A brace, or a sign that is escaped.
_BRACE = re.compile(r"\\.|[{}]", re.S)
# Markup around a part of a statement: `**42** apples`.
_INLINE = re.compile(r"`([^`]+)`|\\\((.+?)\\\)|(?<![\w)*])\*\*(?=[^\s*])([^*]+)(?<=\S)\*\*(?![\w*])")
_LABEL = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+|numerical\s+)?"
    r"(?:answer|result)(?:\s+is)?|(?:最终)?答案(?:是|为)?|(?:答え?|正解)は?|(?:정답|답)[은는]?"
    r"|(?:(?:die|das|la|el|il|a|o|het)\s+)?(?:antwort|ergebnis|réponse|résultat|respuesta|resultado|resposta|risposta"
    r"|risultato|antwoord|odpowiedź|svar|ответ)(?:\s+(?:ist|lautet|est|es|é|è|is|to|är))?",
    re.I,
)
# Words that begin a heading, whatever follows.
_HEADING = re.compile(
    r"(?:step|part|case|phase|stage|section|problem|question|example|check|verif\w*|note|method|option|approach"
    r"|solution|calculat\w*|comput\w*|explanation|reasoning|given|understand\w*|summary|conclusion|work|plan)\b",
    re.I,
)
_RELATION = re.compile(r"[<>≤≥≠=]|\\(?:[lg]e|[lg]eq|[lg]t|neq?)(?![a-z])")
_LIST = re.compile(r"[,;<>]")
_WORD = re.compile(r"[^\W\d_]{2,}")
_HEDGED = re.compile(r"\d.*\b(?:or|and/or|ou|oder|o|или)\b.*\d|\d.*或.*\d", re.I | re.S)

_FONT = r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox)"
# Signs of other keyboards for the same in ASCII: full-width, Arabic, spaces within a number.
_ASCII = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    | {"∞": "\\infty ", "¢": " cents"}
    | dict(zip("\u2044\u2215、\u060c\u066b\u066c\u066a\u00a0\u2009\u202f", "//,,.,%   ", strict=True))
)
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_RAISED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
# A variable or function to which an answer gives a value.
_NAME = re.compile(r"[a-zA-Z](?:_\{?\w+\}?)?'?(?:\([\w, ]*\))?\s*(?:=|\\in(?![a-z])|∈)\s*(?=\S)")
_FULL_STOPS = (".", "。", "।", "۔")
_CHECK_MARKS = "✅✓✔☑👍💯🎉🎊🎯🥳\ufe0f"
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("「", "」"))
_DASH = re.compile(r"\s*[-–—*•][ \t]+")
_NAMED = re.compile(r"(?P<name>[^\d:=<>]{1,60})(?:(?<![!~≈≠±])=|:)(?P<rest>.+)", re.S)


# Finding the answer --------------------------------------------------------------------------------------------------


def last_message_text(completion: Any) -> str:
    """The text of a completion: for a chat its last message, for content in parts its text parts.

    A completion without text (no message, `content` that is None) gives an empty text, never an error. So does a chat
    that ends in tool output, which the policy did not answer.

    Example:
        >>> last_message_text([{"role": "assistant", "content": [{"type": "text", "text": "#### 3"}]}])
        '#### 3'
        >>> last_message_text([{"role": "assistant", "content": None, "tool_calls": []}])
        ''
    """
    if isinstance(completion, Conversation):
        start, end = completion.turns[-1]
        return completion[start:end] if end == len(completion) else ""
    if isinstance(completion, list | tuple) and completion and isinstance(completion[-1], Mapping):
        last = completion[-1]
        if "role" in last:
            completion = last.get("content") if last["role"] == "assistant" else None
    if isinstance(completion, list | tuple):
        parts = [part for part in completion if not isinstance(part, Mapping) or part.get("type", "text") in TEXT_PARTS]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        return "".join(text for text in texts if isinstance(text, str))
    return completion if isinstance(completion, str) else ""


def read_answer(completion: Any, *, last_number: bool = False) -> str | None:
    """The final answer that a response states, as written; None if it states none, or several.

    An answer is the text after `####` on its line, or on the next line if the mark is alone or before "Final Answer",
    or the content of `\\boxed{}`. Headings (`#### Step 2: divide by 7`), thinking (`<think>...</think>`) and calls of
    tools state nothing; after an unclosed thinking block there is no answer. Statements must be equal by
    [`same_answer`]; "41 or 42" is not a statement.

    Args:
        completion: Text, or a chat whose last message is read.
        last_number: If nothing is marked, read the last number of the response: even in a truncated solution, or in a
            sentence that revokes it.

    Example:
        >>> read_answer("3 + 4 = 7.\\n#### 7")
        '7'
        >>> read_answer("#### Step 2: divide by 7\\nThat is 3.") is None
        True
        >>> read_answer("So she has 7 pens."), read_answer("So she has 7 pens.", last_number=True)
        (None, '7')
    """
    text = _without_thoughts(last_message_text(completion))
    if text is None:
        return None
    found = [_unlabelled(statement) for statement in _statements(text)]
    found = [statement for statement in found if statement]
    if found:
        first = found[0]
        sound = len(first) <= LONGEST and not _HEDGED.search(first)
        return first if sound and all(other == first or same_answer(other, first) for other in found[1:]) else None
    if not last_number:
        return None
    numbers = re.findall(rf"(?<![\w.]|\^|\^{{-?)-?{UNSIGNED}(?!\w)", _plain(text))
    return numbers[-1].rstrip(".") if numbers else None


def _without_thoughts(text: str) -> str | None:
    """What follows the last thought, without calls of tools; None if the last thought is not closed."""
    for opening, closing in THINKING:
        ends = [match.end() for match in closing.finditer(text)]
        text = text[ends[-1] :] if ends else text
        if opening.search(text):
            return None
    return TOOL_CALL.sub("\n", text)


def _statements(text: str) -> Iterator[str]:
    """Texts after marks and in boxes, in order; a box after a mark counts once."""
    taken: list[tuple[int, int]] = []
    for match in _MARKED.finditer(text):
        content, end = _CLOSED.sub("", match[1]).strip(), match.end()
        label = _LABEL.match(_bare(content))
        rest = _bare(content)[label.end() :].strip(" :\uff1a*=") if label else _bare(content)
        if not rest:
            below = re.compile(r"\s*(?:(?:\\\[|\$\$)[ \t]*\n\s*|[-*•][ \t]+)?([^\n\r\u2028]+)").match(text, end)
            if below and number_values(_value_side(below[1])) is not None:
                taken.append(below.span())
                yield below[1]
        elif not _is_heading(rest, text, end):
            taken.append(match.span())
            yield content
    for match in _BOX.finditer(text):
        if not any(start <= match.start() < end for start, end in taken):
            content = _braced(text, match.end())
            if content is not None:
                yield content


def _is_heading(content: str, text: str, end: int) -> bool:
    """Whether the line of a mark, which ends here, is a heading: a word of headings first, a colon last, or words and
    then more text."""
    if _HEADING.match(content) or content.endswith((":", "\uff1a")):
        return True
    words = _WORD.match(content.lstrip("*_ ")) and not _is_expression(content)
    return bool(words) and not _NOTHING.match(text, end)


def _braced(text: str, start: int) -> str | None:
    """The content of the braces that begin at a position; None if they are not closed. Without braces, one token.

    None too if it is too long for an answer: so the time is linear in the text.
    """
    if not text.startswith("{", start):
        match = re.compile(r"[\w.]+").match(text, start)
        return match[0] if match else None
    depth = 0
    for sign in _BRACE.finditer(text, start, start + LONGEST):
        depth += {"{": 1, "}": -1}.get(sign[0], 0)
        if depth == 0:
            return text[start + 1 : sign.start()]
    return None


def _bare(text: str) -> str:
    """A statement without its markup: `**7**`, `$7$`, `\\(7\\)`, `\\boxed{7}`, `\\text{7}`, a full stop, tags, and
    characters that are not seen."""
    before = None
    text = unicodedata.normalize("NFC", re.sub(r"\p{Cf}", "", TAG.sub(" ", text)))
    text = _INLINE.sub(lambda found: found[1] or found[2] or found[3], text)
    while text != before:
        before = text
        text = text.strip().strip("`").rstrip("\\" + _CHECK_MARKS).strip()
        for opening, closing in (
            ("**", "**"),
            ("__", "__"),
            ("*", "*"),
            ("_", "_"),
            ("$$", "$$"),
            ("\\(", "\\)"),
            ("\\[", "\\]"),
            *_QUOTES,
        ):
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = text[len(opening) : -len(closing)]
        if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
            text = text[1:-1]
        match = re.match(rf"(?:\\(?:f?boxed|fbox)|{_FONT})\s*(?=\{{)", text)
        if match and (content := _braced(text, match.end())) is not None and text.endswith("}"):
            text = content if match.end() + len(content) + 2 == len(text) else text
        if text.endswith(_FULL_STOPS) and not text.endswith(".."):
            text = text[:-1]
        if text.endswith("**") and text.count("**") == 1:  # opened before the mark
            text = text[:-2]
    return text


def _unlabelled(text: str) -> str:
    """A statement without "The answer is" or "Answer:" before it."""
    text = _bare(text)
    start = len(text) - len(text.lstrip("*_"))
    label = _LABEL.match(text, start)
    if label and label.end() < len(text) and not text[label.end()].isalpha():
        rest = text[label.end() :].lstrip(" :\uff1a*_=")
        dash = _DASH.match(rest)
        return _bare(rest[dash.end() :] if dash else rest)
    return text


def _value_side(text: str) -> str:
    """An answer in the form for comparison: for an equation (`x = 7`, `3 + 4 = 7`) its right side, if that is a
    number."""
    text = _unlabelled(_plain(_bare(text)))
    named = _NAMED.fullmatch(text)
    if (
        named
        and number_values(named["rest"]) is not None
        and not _HEADING.match(named["name"])
        and not denied(named["name"])
    ):
        return named["rest"].strip()
    left, _, right = text.rpartition("=")
    value = number_values(right) if left and _is_expression(left) and not _LIST.search(left) else None
    if value is None or any(found is not None and not found & value for found in map(number_values, left.split("="))):
        return text
    return right


# Comparing answers ---------------------------------------------------------------------------------------------------


def same_answer(stated: str | None, answer: str | None) -> bool:
    """Whether two answers are equal.

    Numbers by their value, exactly: `0.5`, `1/2`, `\\frac{1}{2}`, `5e-1`; signs, thousands separators, currencies and
    units are read. If both state a unit, of one kind and known here, the sizes count: "5 cm" is not "5 m". A percentage
    equals its number and its share. Lists are equal item by item, words letter by letter; expressions are compared by
    math-verify. None equals nothing.

    Raises:
        ImportError: If two expressions are to be compared and math-verify is not installed.

    Example:
        >>> same_answer("\\\\frac{1}{2}", "0.5"), same_answer("\\u22125", "-5"), same_answer("1, 2, 3, 42", "42")
        (True, True, False)
    """
    if stated is None or answer is None:
        return False
    stated, answer = _value_side(stated), _value_side(answer)
    if stated == answer or not stated or not answer or max(len(stated), len(answer)) > LONGEST:
        return stated == answer != ""
    left, right = number_values(stated), number_values(answer)
    if left is not None and right is not None:
        return bool(left & right) if (sizes := _sizes(stated, answer)) is None else _share(left, right, *sizes)
    if bool(_NAME.match(stated)) != bool(_NAME.match(answer)):
        stated, answer = (_NAME.sub("", one, count=1) if _NAME.match(one) else one for one in (stated, answer))
    # A number may be written in a way that only this module reads.
    stated, answer = (one if value is None else str(min(value)) for one, value in ((stated, left), (answer, right)))
    first, second = _items(stated), _items(answer)
    if len(first) != len(second):
        return False
    if len(first) > 1:
        edges = (stated[0] + stated[-1], answer[0] + answer[-1])
        bracketed = any(edge in ("()", "[]", "{}", "(]", "[)", "\\}") for edge in edges)
        if edges[0] == edges[1] == "\\}":
            return _same_set(first, second)
        return (not bracketed or edges[0] == edges[1]) and all(map(same_answer, first, second))
    if _words(stated) == _words(answer):
        return True
    related = bool(_RELATION.search(stated)) != bool(_RELATION.search(answer))
    if related or not (_is_expression(stated) and _is_expression(answer)):
        return False
    return _equal_expressions(stated, answer)


def _share(left: frozenset[Fraction], right: frozenset[Fraction], one: Fraction, other: Fraction) -> bool:
    """Whether two numbers are equal, in units of these sizes."""
    return not {value * one for value in left}.isdisjoint(value * other for value in right)


def _sizes(stated: str, answer: str) -> tuple[Fraction, Fraction] | None:
    """The sizes of the units of two numbers; None unless both state one that is known, and of the same kind."""
    first, second = measure(stated), measure(answer)
    return (first[1], second[1]) if first and second and first[0] == second[0] else None


def _same_set(first: Sequence[str], second: list[str]) -> bool:
    """Whether two sets of the same size are equal, in any order."""
    left = list(second)
    for item in first:
        place = next((place for place, other in enumerate(left) if same_answer(item, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def group_answers(answers: Sequence[str | None]) -> list[int | None]:
    """The group of each answer: equal answers share one, numbered by first appearance; None stays None.

    Raises:
        ImportError: As for [`same_answer`].

    Example:
        >>> group_answers(["0.5", "3", "1/2", None])
        [0, 1, 0, None]
    """
    # Percentages and units last, because they may equal two numbers that differ; sorted, so that order does not matter.
    known = {answer for answer in answers if answer is not None}
    members: list[list[str]] = []
    for answer in sorted(known, key=lambda text: ("%" in text or measure(_plain(text)) is not None, len(text), text)):
        home = next((group for group in members if answer == group[0] or same_answer(answer, group[0])), None)
        if home is None:
            members.append([answer])
        else:
            home.append(answer)
    group_of = {answer: number for number, group in enumerate(members) for answer in group}
    order: dict[int, int] = {}
    return [None if answer is None else order.setdefault(group_of[answer], len(order)) for answer in answers]


def check_math_verify(what: str = "Comparing answers that are expressions") -> None:
    """Raise unless math-verify is installed.

    Raises:
        ImportError: Names the extra to install.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise ImportError(f'{what} needs math-verify. Install it: `pip install "fractal-rm[math]"`.') from None


@functools.cache
def _load_math_verify() -> None:
    """Let math-verify load its parser first: its time limit would interrupt the slow first load every time."""
    from math_verify import parse

    parse("$1$", parsing_timeout=None)  # type: ignore[arg-type]  # None is documented as no limit


def _plain(text: str) -> str:
    """Digits of every script as ASCII, one minus sign, one sign of currency, powers with `^`, no layout of LaTeX."""
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(_ASCII))
    text = re.sub("[\u2212\u2013\u2010\u2011\ufe63\uff0d]", "-", text)
    text = re.sub(r"\p{Sc}", "$", text)
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\d(-])", "^", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z]))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\\(?:left|right|displaystyle|;|:|quad|(?:text)?color\s*\{\w+\})(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<=\d)(?:\\ |~)(?=\d{3}(?!\d))", " ", text)
    text = re.sub(r"\\[hv]space\*?\{[^{}]*\}", " ", text)
    text = re.sub(r"(?<=[\w}%$°])\s*(?:\\[,! ]|~)+\s*(?!\d)", " ", text)
    text = re.sub(rf"(?:{_FONT}|\\operatorname)\s*\{{([^{{}}]*)\}}", r" \1 ", text)
    text = re.sub(r"(?<=\d)\s*[·⋅]\s*(?=\d)", r"\\cdot ", text)
    return re.sub(r"\s+(?=\^)", "", text).strip()


def _items(text: str) -> list[str]:
    """Items of a list, split at commas and semicolons outside of brackets, but not at a number's own separators."""
    if number_values(text) is not None:
        return [text]
    pairs = {"(": ")", "[": "]", "{": "}"}
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]":
        text = text[1:-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    found, depth = [""], 0
    for place, sign in enumerate(text):
        depth += (sign in pairs) - (sign in pairs.values())
        grouped = sign == "," and re.match(r"\d{3}(?!\d)", text[place + 1 :]) and text[place - 1 : place].isdigit()
        if sign in ",;" and depth == 0 and not grouped:
            found.append("")
        else:
            found[-1] += sign
    return [item.strip() for item in found]


def _words(text: str) -> str:
    """Text normalised for comparison: no case, no white space, no brackets around a single letter."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).casefold()
    return text.strip("()") if re.fullmatch(r"\(?[a-z]\)", text) else text


def _is_expression(text: str) -> bool:
    """Whether a text is mathematics: no words except names of functions and commands of LaTeX."""
    text = re.sub(r"\\[a-zA-Z]+", " ", bare := _plain(text))
    words = re.findall(r"[^\W\d_]{2,}|[^\W\d_\p{Latin}\p{Greek}\p{Common}\p{Inherited}]", text)
    return all(word.lower() in MATH_NAMES for word in words) and not NO_VALUE.search(SPACED.sub("0", bare))


def _equal_expressions(stated: str, answer: str) -> bool:
    check_math_verify()
    _load_math_verify()
    from math_verify import parse, verify

    # math-verify limits its time with a signal, which only the main thread may set.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    left, right = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=seconds, fallback_mode="no_fallback")  # type: ignore[arg-type]
        for text in (stated, answer)
    )
    return bool(left and right) and bool(verify(right, left, timeout_seconds=seconds))  # type: ignore[arg-type]
