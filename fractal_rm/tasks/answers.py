"""The one reader of final answers: for rewards, sampling, evaluation and votes.

An answer counts only if a response marks it: `#### 7`, or `\\boxed{7}`, and nothing else. A response with two different
answers counts as having none.
"""

# ruff: noqa: RUF001 - the quotation marks and dashes of other keyboards are intended

import functools
import math
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import regex as re  # unlike the standard library's, it counts the vowel signs of Indic scripts as letters

from fractal_rm.data.prompts import TEXT_PARTS, Conversation
from fractal_rm.data.segmentation import THINKING, TOOL_CALL
from fractal_rm.data.sentences import TAG

MARK = "####"

# Longer statements are not answers, and larger powers of ten are not computed.
_LONGEST = 400
_LARGEST_POWER = 300
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

_GROUPED = r"(?:\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|[\u2019'])\d{3})+)"
_UNSIGNED = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d*)?|\.\d+)"
_POWER = (
    r"(?:[eE]\s*\{?(?P<e>[-+]?\d+)\}?|\s*(?:\u00d7|x|\*|·|\\times|\\cdot)\s*10"
    r"\s*\^\s*\{?\s*(?P<ten>[-+]?\d+)\s*\}?)"
)
_FRACTION = (
    rf"(?:\\[dtc]?frac\s*(?:\{{\s*(?P<top>[-+]?{_UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_UNSIGNED})\s*\}}"
    r"|(?P<top1>\d)\s*(?P<bottom1>\d))"
    rf"|(?P<top2>{_UNSIGNED})\s*/\s*(?P<bottom2>{_UNSIGNED})|(?P<vulgar>[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]))"
)
# A decimal with digits that repeat: 0.\overline{3}, 0.\bar 3, 0.\dot{1}4\dot{2}, 0.(3).
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<once>\d*)(?:\\(?:overline|bar)\s*(?:\{(?P<r>\d+)\}|(?P<r1>\d))"
    r"|\\dot\s*(?:\{(?P<r2>\d)\}|(?P<r3>\d))(?:(?P<more>\d*)\\dot\s*(?:\{(?P<r4>\d)\}|(?P<r5>\d)))?|\((?P<r6>\d+)\))"
)
_FONT = r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox)"
_CURRENCY = r"(?:(?:US|A|C|R|S|HK|NT|NZ)?\\?\$|(?:USD|EUR|GBP|CHF|JPY|CNY|RMB|INR|CAD|AUD)(?![^\W\d_])|Rs\b\.?)"
_VALUE = re.compile(
    rf"(?P<sign>[-+])?\s*{_CURRENCY}?\s*(?P<sign2>[-+])?\s*"
    rf"(?:(?P<whole>\d+)(?:\s+|\s*(?=[\\½-⅞¼-¾])){_FRACTION.replace('?P<', '?P<m_')}"
    rf"|{_FRACTION}|(?P<number>{_UNSIGNED}){_POWER}?)\s*{_CURRENCY}?"
)
_MONEY = re.compile(_CURRENCY)
# A letter that multiplies an amount of money: $5k, $1.2M.
_SHORT = re.compile(r"k|mn?|bn?", re.I)
_SHORT_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_WIDE_SCALES = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
# What begins a unit and multiplies the number by more than is counted here, or by what depends on the language.
_MULTIPLIER = re.compile(
    r"(?:lakhs?|crores?|mil|mille|mill?i[oó]n\w*|bill?i[oó]n\w*|mill?iard\w*|tausend\w*|тыс\w*|миллион\w*|миллиард\w*|млн|млрд"
    r"|bn|mln|mrd|mio|milhão|milhões|mily\w+|bin|tys|ribu|juta|nghìn|ngàn|triệu|tỷ|सौ|हज\u093c?ार|लाख|करोड\u093c?"
    r"|مئة|ألف|آلاف|مليون|ملايين|مليار)\b|[十百千万萬亿億兆만억조](?<!千(?=[克米瓦卡赫帕焦伏升]))",
    re.I,
)
# What makes a bound, an estimate or a denial of the number before it.
_WIDE_NO_UNIT = re.compile("[或至到不非错錯约約以多余半吗嗎]|左右|[くぐ]らい|ほど|未満")
_WIDE_DOUBT = re.compile("[错錯约約]")
_UNIT = re.compile(
    r"(?:°\s?[CF]?|\^?\\?circ|\\degree|/?"
    r"[^\W\d_]{2,}(?:[-/.·'\u2019][^\W\d_]+)*(?:\^?\{?[23²³]\}?)?\.?"
    r"|[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]|/?[mgslhLCFKNJWVA](?:[/·][a-zA-Z]+)*(?:\^?\{?[23²³]\}?)?)"
    r"(?:\s+(?:[^\W\d_]+(?:[-/.'\u2019][^\W\d_]+)*)(?:\^?\{?[23²³]\}?)?){0,4}"
)
# Units of the same kind, by their names and abbreviations, with their sizes: 5 cm is not 5 m.
_SIZES = {
    name: (kind, Fraction(size))
    for kind, units in {
        "length": {"mm millimeter millimetre": "0.001", "cm centimeter centimetre": "0.01", "m meter metre": "1",
                   "km kilometer kilometre": "1000", "in inch inche": "0.0254", "ft foot feet": "0.3048",
                   "yd yard": "0.9144", "mi mile": "1609.344"},
        "mass": {"mg milligram": "0.001", "g gram": "1", "kg kilogram": "1000"},
        "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
        "months": {"month": "1", "year": "12"},
        "volume": {"ml milliliter millilitre": "0.001", "l liter litre": "1"},
        "money": {"cent penny pennie": "0.01", "$ dollar usd": "1"},
    }.items()
    for names, size in units.items()
    for name in names.split()
}  # fmt: skip
_POWERED = re.compile(r"(?P<power>square|sq\.?|cubic|cu\.?)?\s*(?P<name>[a-zA-Z$]+)\.?\s*(?:\^?\{?(?P<digit>[23])\}?)?")
# Words that revoke a number or mark it as a guess.
_DOUBTS = frozenset(
    [
        "not",
        "no",
        "wrong",
        "incorrect",
        "false",
        "cannot",
        "isn",
        "doesn",
        "wait",
        "maybe",
        "perhaps",
        "guess",
        "about",
        "approximately",
        "approx",
        "roughly",
        "around",
        "circa",
        "nearly",
        "almost",
        "probably",
        "possibly",
        "presumably",
        "likely",
        "hopefully",
        "unsure",
        "uncertain",
        "estimate",
        "estimated",
        "nicht",
        "etwa",
        "ungefähr",
        "vielleicht",
        "wahrscheinlich",
        "environ",
        "probablement",
        "aproximadamente",
        "quizás",
        "probablemente",
        "примерно",
        "около",
        "возможно",
        "не",
    ]
)
# Words that change the meaning of the number before them.
_NO_UNIT = frozenset(
    [
        "max",
        "maximum",
        "minimum",
        "more",
        "less",
        "fewer",
        "or",
        "and",
        "to",
        "but",
        "then",
        "than",
        "plus",
        "minus",
        "times",
        "through",
        "over",
        "divided",
        "by",
        "mod",
        "factorial",
        "choose",
        "squared",
        "cubed",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "fourths",
        "fifths",
        "tenths",
        "hundredths",
        "if",
        "when",
        "is",
        "was",
        "are",
        "equals",
        "because",
        "least",
        "most",
        "below",
        "negative",
        "ou",
        "oder",
        "und",
        "et",
        "или",
        "и",
    ]
)
# Not a value: an arrow, an ellipsis, a sign of approximation, digits in another base, two numbers in a row.
_NO_VALUE = re.compile(
    r"[!?±~≈→⇒⟶…]|[-=]>|\.\s*\.|\\(?:pm|mp|approx|sim(?:eq)?|cong|equiv|to|(?:long)?rightarrow|Rightarrow|implies|not|neg|[lc]?dots)"
    r"(?![a-zA-Z])|\d_|\d\s*:\s*\d|\b0[xXbBoO][0-9a-fA-F]|(?<!frac)(?<!frac\s)\d\s+\d+(?!\d*\s*/)"
)
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
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d|\s*/)")
_NAMED = re.compile(r"(?P<name>[^\d:=<>]{1,60})(?:(?<![!~≈≠±])=|:)(?P<rest>.+)", re.S)
_MATH_NAMES = frozenset(
    [
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "pi",
        "frac",
        "infty",
        "cup",
        "cap",
        "in",
        "deg",
        "theta",
        "alpha",
        "beta",
    ]
)
_NO_UNITS = _NO_UNIT | _DOUBTS | _MATH_NAMES - {"in", "deg", "sec", "cup", "cap"}
# Words that do so in parentheses behind the number too.
_BOUNDS = _DOUBTS | {"or", "and", "than", "least", "most", "if", "plus", "minus", "negative"}


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
        sound = len(first) <= _LONGEST and not _HEDGED.search(first)
        return first if sound and all(other == first or same_answer(other, first) for other in found[1:]) else None
    if not last_number:
        return None
    numbers = re.findall(rf"(?<![\w.]|\^|\^{{-?)-?{_UNSIGNED}(?!\w)", _plain(text))
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
            if below and _number(_value_side(below[1])) is not None:
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
    for sign in _BRACE.finditer(text, start, start + _LONGEST):
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
        and _number(named["rest"]) is not None
        and not _HEADING.match(named["name"])
        and not _denied(named["name"])
    ):
        return named["rest"].strip()
    left, _, right = text.rpartition("=")
    value = _number(right) if left and _is_expression(left) and not _LIST.search(left) else None
    if value is None or any(found is not None and not found & value for found in map(_number, left.split("="))):
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
    if stated == answer or not stated or not answer or max(len(stated), len(answer)) > _LONGEST:
        return stated == answer != ""
    left, right = _number(stated), _number(answer)
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
    first, second = _measure(stated), _measure(answer)
    return (first[1], second[1]) if first and second and first[0] == second[0] else None


def _measure(text: str) -> tuple[str, Fraction] | None:
    """Kind and size of the unit of a number (`$5 per hour`, `5 m^2`, `5 km/h`); None if there is none that is known."""
    match = _VALUE.match(_SPACED.sub(lambda found: found[0].replace(" ", ""), text))
    if match is None:
        return None
    unit = ("$" if _MONEY.search(match[0]) else "") + match.string[match.end() :].strip()
    kind, size = "", Fraction(1)
    for place, part in enumerate(re.split(r"\s*/\s*|\s*\bper\s+", unit)):
        found = _POWERED.fullmatch(part.strip())
        name = found["name"].lower() if found else ""
        known = _SIZES.get(name) or _SIZES.get(name.removesuffix("s"))
        if found is None or known is None:
            return None
        power = int(found["digit"] or {"s": 2, "c": 3}.get((found["power"] or " ")[0], 1))
        kind += f"/{known[0]}{power}"
        size *= known[1] ** (power if place == 0 else -power)
    return kind, size


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
    for answer in sorted(known, key=lambda text: ("%" in text or _measure(_plain(text)) is not None, len(text), text)):
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


def _number(text: str) -> frozenset[Fraction] | None:
    """The values of a number, with or without a unit: two of a percentage, otherwise one; None: it is not a number."""
    text = _SPACED.sub(lambda found: found[0].replace(" ", ""), text)
    text = _REPEATING.sub(_repeated, text)
    match = _VALUE.match(text)
    if match is None or len(text) > _LONGEST or (match["sign"] and match["sign2"]) or _NO_VALUE.search(text):
        return None
    value = _value_of(match)
    unit = re.sub(r"\s*/\s*", "/", re.sub(r"\s*(?:\\cdot(?![a-z])|[·⋅])\s*", "·", text[match.end() :].strip()))
    note = re.search(r"\s*\(([^()\d]*)\)$", unit)
    if note and (_words_of(note[1]) & _BOUNDS or _WIDE_DOUBT.search(note[1])):
        return None
    unit = (unit[: note.start()] if note else unit).rstrip(".").strip()
    if (short := _SHORT.fullmatch(unit)) and _MONEY.search(match[0]):
        value, unit = value and value * _SHORT_SCALES[short[0][0].lower()], ""
    if re.fullmatch(r"/\w", unit) and not _MONEY.search(match[0]):
        return None  # 42/m may be a formula
    if unit == "K" and not text[match.end() - 1].isspace() and text[match.end() :].startswith("K"):
        return None  # kelvin, or thousands
    if value is None or (unit and not text[match.end() - 1].isspace() and unit[0] in "!?=<>±"):
        return None
    if match["sign"] or match["sign2"]:
        value = -value if "-" in (match["sign"], match["sign2"]) else value
    percent = re.match(r"(?:\\?%|percent\b|per\s?cent\b)\s*", unit, re.I)
    if percent:
        unit = unit[percent.end() :]
    scale, _, rest = unit.partition(" ")
    if (scale := scale.lower().removesuffix("s")) in _SCALES:
        value, unit = value * _SCALES[scale], rest.strip()
    elif unit[:1] in _WIDE_SCALES:
        value, unit = value * _WIDE_SCALES[unit[0]], unit[1:].strip()
    if unit and (_denied(unit.removesuffix("times")) or _MULTIPLIER.match(unit) or not _UNIT.fullmatch(unit)):
        return None
    return frozenset({value, value / 100} if percent else {value})


def _repeated(match: re.Match[str]) -> str:
    """A decimal with digits that repeat, as a fraction."""
    again = "".join(match[name] or "" for name in ("r", "r1", "r2", "r3", "more", "r4", "r5", "r6"))
    once, power = match["whole"] + match["once"], 10 ** len(match["once"])
    top = int(once + again) - int(once or "0")
    return f"{top}/{power * (10 ** len(again) - 1)}"


def _denied(words: str) -> bool:
    """Whether words turn the number next to them into a bound, an estimate, a denial or a multiple."""
    found = _words_of(words)
    singular = {word.removesuffix("s") for word in found}
    return bool(found & _NO_UNITS or singular & _SCALES.keys() or _WIDE_NO_UNIT.search(words))


def _words_of(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]+", text)}


def _value_of(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `_VALUE`, without its sign."""
    groups: dict[str, Any] = match.groupdict()
    if groups["number"] is not None:
        number = _fraction(groups["number"])
        digits = str(groups["e"] or groups["ten"] or 0)
        power = int(digits) if len(digits) < 5 else math.inf
        return number * Fraction(10) ** int(power) if abs(power) <= _LARGEST_POWER else None
    prefix = "m_" if groups["whole"] is not None else ""
    whole = Fraction(int(str(groups["whole"]))) if prefix else Fraction(0)
    if groups[f"{prefix}vulgar"]:
        return whole + Fraction(unicodedata.numeric(groups[f"{prefix}vulgar"])).limit_denominator(10)
    top, bottom = next(
        (_fraction(groups[f"{prefix}top{n}"]), _fraction(groups[f"{prefix}bottom{n}"]))
        for n in ("", "1", "2")
        if groups[f"{prefix}top{n}"] is not None
    )
    return whole + top / bottom if bottom else None


def _fraction(digits: str) -> Fraction:
    """The value of digits with separators of thousands and a point."""
    sign = -1 if digits.startswith("-") else 1
    return sign * Fraction(re.sub(r"[^\d.]", "", digits).rstrip(".") or "0")


def _items(text: str) -> list[str]:
    """Items of a list, split at commas and semicolons outside of brackets, but not at a number's own separators."""
    if _number(text) is not None:
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
    return all(word.lower() in _MATH_NAMES for word in words) and not _NO_VALUE.search(_SPACED.sub("0", bare))


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
