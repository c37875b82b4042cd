"""The exact value and the unit of a number as people write it: `1/2`, `$1,200`, `0.(3)`, `5 km/h`, `3 million`.

A bound, an estimate or a denial ("at most 5", "42 probably") is not a number.
"""

import math
import unicodedata
from fractions import Fraction
from typing import Any

import regex as re  # unlike the standard library's, it counts the vowel signs of Indic scripts as letters

# Longer statements are not answers, and larger powers of ten are not computed.
LONGEST = 400
_LARGEST_POWER = 300
_GROUPED = r"(?:\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|[\u2019'])\d{3})+)"
UNSIGNED = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d*)?|\.\d+)"
_POWER = (
    r"(?:[eE]\s*\{?(?P<e>[-+]?\d+)\}?|\s*(?:\u00d7|x|\*|·|\\times|\\cdot)\s*10"
    r"\s*\^\s*\{?\s*(?P<ten>[-+]?\d+)\s*\}?)"
)
_FRACTION = (
    rf"(?:\\[dtc]?frac\s*(?:\{{\s*(?P<top>[-+]?{UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{UNSIGNED})\s*\}}"
    r"|(?P<top1>\d)\s*(?P<bottom1>\d))"
    rf"|(?P<top2>{UNSIGNED})\s*/\s*(?P<bottom2>{UNSIGNED})|(?P<vulgar>[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]))"
)
# A decimal with digits that repeat: 0.\overline{3}, 0.\bar 3, 0.\dot{1}4\dot{2}, 0.(3).
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<once>\d*)(?:\\(?:overline|bar)\s*(?:\{(?P<r>\d+)\}|(?P<r1>\d))"
    r"|\\dot\s*(?:\{(?P<r2>\d)\}|(?P<r3>\d))(?:(?P<more>\d*)\\dot\s*(?:\{(?P<r4>\d)\}|(?P<r5>\d)))?|\((?P<r6>\d+)\))"
)
_CURRENCY = r"(?:(?:US|A|C|R|S|HK|NT|NZ)?\\?\$|(?:USD|EUR|GBP|CHF|JPY|CNY|RMB|INR|CAD|AUD)(?![^\W\d_])|Rs\b\.?)"
_VALUE = re.compile(
    rf"(?P<sign>[-+])?\s*{_CURRENCY}?\s*(?P<sign2>[-+])?\s*"
    rf"(?:(?P<whole>\d+)(?:\s+|\s*(?=[\\½-⅞¼-¾])){_FRACTION.replace('?P<', '?P<m_')}"
    rf"|{_FRACTION}|(?P<number>{UNSIGNED}){_POWER}?)\s*{_CURRENCY}?"
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
NO_VALUE = re.compile(
    r"[!?±~≈→⇒⟶…]|[-=]>|\.\s*\.|\\(?:pm|mp|approx|sim(?:eq)?|cong|equiv|to|(?:long)?rightarrow|Rightarrow|implies|not|neg|[lc]?dots)"
    r"(?![a-zA-Z])|\d_|\d\s*:\s*\d|\b0[xXbBoO][0-9a-fA-F]|(?<!frac)(?<!frac\s)\d\s+\d+(?!\d*\s*/)"
)
SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d|\s*/)")
MATH_NAMES = frozenset(
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
_NO_UNITS = _NO_UNIT | _DOUBTS | MATH_NAMES - {"in", "deg", "sec", "cup", "cap"}
# Words that do so in parentheses behind the number too.
_BOUNDS = _DOUBTS | {"or", "and", "than", "least", "most", "if", "plus", "minus", "negative"}


def number_values(text: str) -> frozenset[Fraction] | None:
    """The values of a number, with or without a unit: two of a percentage, otherwise one; None: it is not a number."""
    text = SPACED.sub(lambda found: found[0].replace(" ", ""), text)
    text = _REPEATING.sub(_repeated, text)
    match = _VALUE.match(text)
    if match is None or len(text) > LONGEST or (match["sign"] and match["sign2"]) or NO_VALUE.search(text):
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
    if unit and (denied(unit.removesuffix("times")) or _MULTIPLIER.match(unit) or not _UNIT.fullmatch(unit)):
        return None
    return frozenset({value, value / 100} if percent else {value})


def measure(text: str) -> tuple[str, Fraction] | None:
    """Kind and size of the unit of a number (`$5 per hour`, `5 m^2`, `5 km/h`); None if there is none that is known."""
    match = _VALUE.match(SPACED.sub(lambda found: found[0].replace(" ", ""), text))
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


def denied(words: str) -> bool:
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


def _repeated(match: re.Match[str]) -> str:
    """A decimal with digits that repeat, as a fraction."""
    again = "".join(match[name] or "" for name in ("r", "r1", "r2", "r3", "more", "r4", "r5", "r6"))
    once, power = match["whole"] + match["once"], 10 ** len(match["once"])
    top = int(once + again) - int(once or "0")
    return f"{top}/{power * (10 ** len(again) - 1)}"


def _fraction(digits: str) -> Fraction:
    """The value of digits with separators of thousands and a point."""
    sign = -1 if digits.startswith("-") else 1
    return sign * Fraction(re.sub(r"[^\d.]", "", digits).rstrip(".") or "0")
