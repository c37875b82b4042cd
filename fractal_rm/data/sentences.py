r"""Sentences of a response that may contain formulas, code, lists and amounts of money.

`sentencex` finds the sentences. It gets a copy of the text, of the same length, with zeros in place of text it would
cut wrongly: positions in the copy are positions in the text. Every function takes time linear in the text, up to the
logarithm of the number of formulas.
"""

# ruff: noqa: RUF001 - the quotation marks and full stops of other scripts are intended

import re
from bisect import bisect_right
from itertools import pairwise, zip_longest
from typing import NamedTuple

from sentencex import get_sentence_boundaries  # pyright: ignore[reportAttributeAccessIssue] - compiled, without stubs

from fractal_rm.data.bag import Span, trim

NEWLINE = re.compile(r"\r\n|\r|\n")

# Tags and special tokens, which have no content, with the role or channel after them. Opening ones belong to the text
# that follows.
_ROLE = r"(?:(?:assistant|model|user|system|tool|analysis|commentary|final|thought)\b)?"
TAG = re.compile(
    rf"(?:<start_of_turn>|<[|\uff5c][^<>\s]+>){_ROLE}|</?[A-Za-z][\w:.-]*(?:\s[^<>\n]*)?[/|]?>"
    r"|\[/?THINK\]|◁/?think▷|<!--[^\n<]*-->|&nbsp;"
)
OPENING_TAG = re.compile(
    r"(?:<start_of_turn>"
    r"|<[|\uff5c](?!(?i:end)(?!_header))(?=[^<>\s]*(?i:begin|start|channel|message|header|prefix|assistant|chatbot|turn>))"
    rf"[^<>\s]+>){_ROLE}|<(?!(?:[bh]r|eos|pad|\w*end\w*)\b)[A-Za-z][\w:.-]*(?:\s[^<>\n]*)?(?<!/)(?<!\|)>"
    r"|\[THINK\]|◁think▷"
)

# Environments and layout of LaTeX, which say nothing although they may hold letters.
_FRAME = r"\{[^{}]*\}(?:\{(?:[^{}]|\{[^{}]*\})*\}|\[[^\[\]]*\])*"
LAYOUT = re.compile(
    rf"\\(?:begin|end){_FRAME}"
    r"|\\(?:hline|newline|q?quad|displaystyle|centering|noindent|par|(?:big|med|small)skip|[vh]space\*?|(?:top|mid|bottom)rule"
    r"|label|tag\*?|[hv]fill|nonumber|notag|left|right|therefore|because|implies|iff|[bB]igg?[lr]?|item|normalsize|[lL]arge"
    r"|small)(?![a-zA-Z])"
    r"(?:\{[^{}]*\})?|\\[a-zA-Z]+(?=\{\s*\Z)"  # a command whose argument begins on the next line
)
# What belongs, at the end of a piece that says nothing, to the piece after it.
OPENER = re.compile(
    rf"(?:\\\[|\\begin{_FRAME}|{OPENING_TAG.pattern}|\\(?:left|item)(?![a-zA-Z])[^\w\\]*|[({{\[]+)\s*\Z"
)

_TICKS = re.compile("`{3,}")
_FENCES = re.compile("`{3,}|~{3,}")
_LANGUAGE_NAME = re.compile(r"[ \t]*[\w+#.-]*\s*")

_ENVIRONMENTS = (
    r"(?:equation|align(?:ed|at)?|gather(?:ed)?|multline|eqnarray|split|cases|array|[bBpvV]?(?:small)?matrix|tabular"
    r"|displaymath|math)\*?"
)
# What opens or closes a formula or code, after the escapes that look like it, and the end of a paragraph.
_TOKEN = re.compile(
    rf"\\\\|\\\$|\\[()\[\]]|\$\$|\$|`+|''|\\begin\{{{_ENVIRONMENTS}\}}|\\end\{{{_ENVIRONMENTS}\}}|\n[ \t]*\r?(?=\n)"
)
_CLOSERS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
_DISPLAY = ("$$", "\\[", "\\begin{")

# Parts of a formula that may hold prose, and what shows that a text between two dollar signs is not a formula.
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})?")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NEXT_SENTENCE = re.compile(r"[.!?][\"')]*\s+(?:[A-Z][a-z]|[AI]\b)")

# The marker that opens a list item or a heading. A marker without other text is never a separate step.
_MARKER = (
    r"(?:\#{1,6}[ \t]*)?[*_]{0,3}"
    r"(?:[-*+•–]|[(\[]?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})[.):\]]|(?:Step|Case|Part|Claim)[ \t]+\d{1,3}[.):]?)"
    r"[.:]?[*_]{0,3}"
)
# Markers that version 1 did not know: in other languages, full-width, and in a command of LaTeX.
_OTHER_MARKER = (
    r"(?:\#{1,6}[ \t]*)?[*_]{0,3}(?:[①-⑳❶-❿]|\d\ufe0f?\u20e3|[（【](?:[\d一二三四五六七八九十]{1,3}|[A-Za-z])[）】]"
    r"|(?:\d{1,3}|[A-Za-z])[）．]"
    r"|(?:(?:S(?:tep|TEP)|Case|Part|Schritt|Fall|[ÉE]tape|Passo|Paso|Caso|Шаг|Krok|Stap|Steg|Bước|चरण)[ \t]+\d{1,3}"
    r"|第[ \t]*[\d一二三四五六七八九十]{1,3}[ \t]*步|(?:步骤|ステップ|手順)[ \t]*[\d一二三四五六七八九十]{1,3}"
    r"|\d{1,2}단계)"
    r"(?:[ \t]?[.):：]|[ \t][-–—])?)[*_]{0,3}"
)
_ANY_MARKER = re.compile(rf"{_MARKER}|{_OTHER_MARKER}")
_COMMAND_OF_TEXT = re.compile(r"\\(?:textbf|textit|emph|underline|paragraph\*?|(?:sub)*section\*?)\{([^{}]*)\}")
_MARKER_ONLY = re.compile(_MARKER)
_LONGEST_MARKER = 40

# Places where a sentence-ending mark does not end a sentence. These marks are hidden from the splitter.
_NO_END = re.compile(
    rf"^[ \t]*{_MARKER}(?=[ \t])"
    r"|(?<![\w.])(?:[Ee]\.g|[Ii]\.e|[Cc]f|viz|vs|resp|w\.r\.t|s\.t|[Ww]\.l\.o\.g|Mr|Mrs|Ms|Dr|Prof)\."
    r"|(?<![\w.])(?:[Ee]qs?|[Ee]qns?|[Ff]igs?|[Ss]ecs?|[Cc]hs?|[Tt]hms?|[Ll]ems?|[Pp]rop|[Cc]ors?|[Dd]efs?|[Ee]xs?|[Tt]ab"
    r"|[Rr]efs?|[Vv]ols?|[Aa]pp|[Nn]os?|pp?|[Pp]robs?|[Aa]lgs?|[Aa]rts?|[Pp]aras?|[Aa]pprox|ca)\.(?=[\s~]*[(\[$\\\d])"
    r"|(?<=[\w)])!(?=\s*[=+*/×·^<>≤≥,;:)\]]|\s+-\s)"  # a factorial: "5! = 120", "n! / 2"
    r"|(?:(?<=[\d)])|(?<=\b[a-z]))!(?=\s+[a-z])",
    re.MULTILINE,
)
# Abbreviations unknown to version 1 that do not end a sentence, or not before a number.
_ABBREVIATED = re.compile(
    r"(?<!\S)(?:डॉ|रु|श्री|प्रो)\.|(?<![\w.])(?:[Aa]pprox|[Zz]\.[ \u00a0]?[Bb]|[Dd]\.[ \u00a0]?h|[Uu]\.[ \u00a0]?a|bzw|vgl"
    r"|[Тт]\.[ \u00a0]?е|[Нн]апр|p\.[ \u00a0]?ej|[SD]ra|Srta|Sig|[Cc]\.[ \u00a0]?-à-d)\."
    r"|(?<![\w.])(?:EE\.[ \u00a0]?UU|Mio|Mrd)\.(?=[ \u00a0]+(?:[a-zäöü]|Euro\b|Dollar\b|Franken\b))"
    r"|(?<![\w.])(?:Nr|Abb|Kap|Art|[Mm]ax|[Aa]vg|[Aa]pt|[Pp]ágs?|Mon|Tues?|Wed|Thurs?|Fri|Sat|Sun|руб|[Сс]тр|[Рр]ис|[Гг]л"
    r"|[Тт]абл)\.(?=[ \u00a0]*\d)"
    r"|(?<![\w.])(?:[Vv]ol|[Cc]h|[Ss]ec|[Pp]t|[Bb]k)\.(?=[ \u00a0]+[IVX]+\b)"
    # before a small letter or a digit, abbreviations of units end no sentence
    r"|(?<![\w.])(?:temp|hrs?|mins?|secs?|yrs?|lbs?|tbsp|tsp|Std|Sek|Tsd|MwSt|inkl|exkl|zzgl|incl|excl)\."
    r"(?=[ \u00a0]+[a-zäöü\d])"
    r"|(?<![\w.])(?:inkl|exkl|zzgl)\.(?=[ \u00a0]+MwSt)|(?<![\w.])[Сс][мр]\.(?=[ \u00a0])"
    r"|(?<![\w.])[А-Я]\.[ \u00a0]?[А-Я]\.(?=[ \u00a0]?[А-Я][а-я])"
    r"|(?<=\d[ \u00a0])(?:г|тыс|млн|млрд)\.(?=[ \u00a0]+[а-я])|(?<=\bи[ \u00a0])т\.(?=[ \u00a0]?[дп]\.)"
)
# German ordinals ("am 3. Mai", "der 2. und 3. Platz"), if no sentence begins after them.
_ORDINAL = re.compile(
    r"(?<![\w.])(?<!\bI )(?:[AaIi]m|[Vv]om|[Zz]u[mr]|[Bb]eim|[Dd]e[rmns]|[Dd]as|[Dd]ie|[Dd]iese[rmns]?|[Jj]ede[rmns]?"
    r"|[Ii]hr|[Ss]ein|[Ee]in(?:e[rmns]?)?)[ \u00a0]+\d{1,2}\."
    r"(?:[ \u00a0]+(?:und|oder|bis)(?:[ \u00a0]+zu[mr])?[ \u00a0]+\d{1,2}\.)?(?=[ \u00a0]+"
    r"(?!(?:D(?:as|er|ie|en|em|ann|anach|aher|araus|amit|adurch|a|ies\w*|och|eshalb)|Also|Somit|Folglich|Insgesamt"
    r"|Schließlich|Zuletzt|Zuerst|Zusammen|Nun|Jetzt|Hier|Nach|Es|Er|Sie|Wir|Ich|Man|So|Und|Aber|Wenn|Weil|Als|Am|Im|In"
    r"|Für|Mit|Von|Zu|Auf|Bei|Ein\w*|Jed\w+|Ihr\w*|Sein\w*|Was|Wie|Fertig|Ende|Noch|Ist|Sind)\b)[A-ZÄÖÜ][a-zäöüß]+)"
)
# Markers of a list that runs on in its line, "Do: 1. Add. 2. Multiply.", once abbreviations are hidden ("Fig. 2. So").
_INLINE_MARKER = re.compile(r"(?:(?<=[.!?;][ \t])\d{1,2}|(?<=:[ \t])1)[.)](?=[ \t]+[A-Z\[$\\(*])")
# Numbers in a list of things that runs on ("1. a pizza, 2. a pie", "i. one and ii. two"), and the text before them.
_ROMAN = [tens + one for tens in ("", "x") for one in ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")]
_ROMAN_VALUES = {numeral: value for value, numeral in enumerate(_ROMAN, 1)}
_LIST_NUMBER = re.compile(
    r"(?:(?<![\w.*])|(?<=[\u3040-\u9fff]))(?P<bold>\*{0,3})(?P<value>\d{1,2}|[ivx]{1,5}|[IVX]{1,5})[.)](?P=bold)"
    r"(?=[ \t]+[^\W\d_])"
)
_LIST_COMMA = re.compile(r"(?:[,;:、，；：&]|\b(?:and|or|und|oder|et|ou|y|и))[ \t]*\Z")
_NO_OPERATOR = re.compile(r"[^\W\d_][ \t]*\Z|[,;:、，；：&)\]][ \t]*\Z")
# Numbers of Chinese steps, which follow a full stop without a space ("先加。2. 再乘。"): they open a sentence.
_WIDE_NUMBER = re.compile(r"(?<=[。！？；])[ \t]*\d{1,2}[.．、](?![ \t]*\d)")
# The end of a sentence before any other number, which sentencex takes for a mark inside it ("共有5。3是素数。").
_WIDE_END = re.compile(r"[。！？][”’」』）]*(?=[ \t]*\d)")
# A long run of punctuation: `sentencex` takes time quadratic in the marks inside it.
_NOISE = re.compile(r"[^\w\s]{200,}")
# "no" as an answer, which sentencex takes for "number": "The answer is no. 5 is odd."
_ANSWER_NO = re.compile(
    r"(?:\b(?:is|are|was|were|be|says?|said)|[?:])[ \t]+no[.0](?=[ \t]+\d+[ \t]+[a-z])", re.IGNORECASE
)
_TABLE_ROW = re.compile(r"^[ \t]*\|.*\|[ \t]*\r?$", re.MULTILINE)
# Rows of a table, quotations in the middle of a Japanese sentence, full-width numbers of steps.
_WHOLE = (
    _TABLE_ROW,
    re.compile(r"[。！？](?=[」』](?:と|って))"),
    re.compile(rf"^[ \t]*(?:{_OTHER_MARKER}(?=[ \t])|\d{{1,3}}．(?!\d))", re.MULTILINE),
)
# The end of a thought or a turn within a line.
_TAG_END = re.compile(rf"(?<=[.!?…。！？])(?:\s*(?!{OPENING_TAG.pattern})(?:{TAG.pattern}))++(?![ \t]*[a-z])")
# An ellipsis of one character before a capital, and sentences in parentheses in a row.
_MORE_ENDS = (re.compile(r"…[”’\"')]*(?=\s+[A-ZÀ-ÞА-Я])"), re.compile(r"[.!?]\)(?=[ \t]+\([A-ZÀ-ÞА-Я])"))
# A variable before the full stop ("so x. Then") is not an initial: it is replaced by a digit.
_VARIABLE = re.compile(r"(?<![\w.'’\\-])[a-z](?=\.\s+[A-Z0$\\])")
# Text that sentencex cannot read: half of a surrogate pair, and a space of several bytes after a capital (1.0.32
# panics).
_SURROGATE = re.compile("[\ud800-\udfff]")
# Invisible characters between sentences.
_UNSEEN = re.compile("(?<=[.!?。！？])[\u200b\u200e\u200f\u2060\ufeff]")
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")

# Characters allowed between the mark that ends a sentence and the white space after it.
_AFTER_END = re.compile(r"(?:[*_)\]}\"'”’»`」』）]|\[\d+\])*")
_INDENT = re.compile(r"[ \t]*")
_ENDS = ".!?;:…。！？；："
# A line that begins like this continues the sentence of the previous line.
_GOES_ON = re.compile(r"[ \t]*([^\W\d_]{2,})\b(?![ \t]*[=:<>(\[+*/^]|[ \t]+-)")


def sentences(text: str, language: str = "en", *, old_rules: bool = False) -> list[Span]:
    r"""Make every sentence a step.

    A line break ends a step, except where the sentence continues: the next line begins with a lower-case word, or with
    the display formula that the sentence leads up to. Nothing is cut inside a formula, inline code or a fence of code,
    after an abbreviation such as "e.g." or "eq. (3)", or in "5! = 120". A list marker ("1.", "2)", "-", "Step 3:")
    belongs to the step it opens, and a piece without letters or digits to its neighbour. A dollar sign opens a formula
    only if what follows up to the next one does not read like prose, so amounts of money change nothing.

    Args:
        text: The response.
        language: Language code. `sentencex` treats a language that it does not know as English.
        old_rules: Cut as version 1 of [`~fractal_rm.data.segmentation.Segmentation`] did.

    Returns:
        Spans of the steps. Every character that is not white space lies in one.

    Source:
        Sentence boundaries: `sentencex` of the Wikimedia Foundation.

    Example:
        >>> text = "1. Eggs cost $2 and $3. So e.g. $x = 2. 5$ fits.\n2. Dr. Lee pays 3.14."
        >>> [text[start:end] for start, end in sentences(text)]
        ['1. Eggs cost $2 and $3.', 'So e.g. $x = 2. 5$ fits.', '2. Dr. Lee pays 3.14.']
    """
    fences = _fences(text, _TICKS if old_rules else _FENCES)
    edges = [0, *(edge for fence in fences for edge in fence), len(text)]
    formulas = [
        region for start, end in zip(edges[::2], edges[1::2], strict=True) for region in _formulas(text, start, end)
    ]
    masked = _mask(text, fences, formulas, () if old_rules else (_ABBREVIATED, _ORDINAL, *_WHOLE))
    cuts = [0]
    if not old_rules:
        cuts += [match.start() for match in _WIDE_NUMBER.finditer(masked)]
        cuts += [
            match.end() for mark in (_WIDE_END, _ANSWER_NO, _TAG_END, *_MORE_ENDS) for match in mark.finditer(masked)
        ]
        masked = _hide_list_numbers(text, _UNSEEN.sub(" ", _WIDE_NUMBER.sub(_hidden, masked)))
    for start, end in _blocks(text, masked, {end for _, end in fences}):
        if old_rules or not _TABLE_ROW.fullmatch(masked, start, end):  # sentencex cuts before the second "(5)" of a row
            cuts += [start + cut for cut in _sentence_ends(masked[start:end], language)]
        cuts.append(end)
    return _merge(text, trim(text, pairwise(sorted(set(cuts)))), old_rules=old_rules)


def _fences(text: str, marks: re.Pattern[str]) -> list[Span]:
    """Spans of fenced code. A fence that is never closed reaches to the end of the text (CommonMark)."""
    fences: list[Span] = []
    opener: re.Match[str] | None = None
    runs = list(marks.finditer(text))
    paired = False  # with the run before, on one line: inline code, not a fence
    for run, after in zip_longest(runs, runs[1:]):
        rest = text[run.end() : after.start() if after else len(text)]
        last_of_line = after is None or "\n" in rest
        rest = rest.partition("\n")[0]
        if opener is not None:
            if last_of_line and not rest.strip() and run[0].startswith(opener[0]):
                fences.append((opener.start(), run.end() + len(rest.rstrip("\r"))))
                opener = None
        elif paired:
            paired = False
        elif after is not None and not last_of_line:
            paired = len(run[0]) == len(after[0])
        else:
            line = text[text.rfind("\n", 0, run.start()) + 1 : run.start()].strip(" \t>")
            if not line or _MARKER_ONLY.fullmatch(line) or _LANGUAGE_NAME.fullmatch(rest):
                opener = run
    return [*fences, (opener.start(), len(text))] if opener else fences


def _formulas(text: str, start: int, end: int) -> list[Span]:
    """Spans of formulas and inline code in `text[start:end]`; none crosses the end of a paragraph."""
    tokens = [(match.start(), match[0]) for match in _TOKEN.finditer(text, start, end)]
    where: dict[str, list[int]] = {}
    for position, token in tokens:
        where.setdefault("paragraph" if token.startswith("\n") else token, []).append(position)

    def following(token: str, position: int) -> int:
        """The next place of `token` after `position`; `end` if there is none."""
        positions = where.get(token, [])
        index = bisect_right(positions, position)
        return positions[index] if index < len(positions) else end

    formulas, done = [], start
    for position, token in tokens:
        closer = token.replace("\\begin", "\\end") if token.startswith("\\begin") else _CLOSERS.get(token)
        if token.startswith("`"):
            closer = token
        if closer is None or position < done:
            continue
        close = following(closer, position)
        if close >= min(end, following("paragraph", position)) or (
            closer != token and following(token, position) < close and not token.startswith("\\begin")
        ):
            continue  # never closed, or opened again first: not an opener after all
        if token == "``" and following("''", position) < close:
            continue  # LaTeX quotation marks
        if token == "$" and not _is_formula(text[position + 1 : close], text[close + 1 : close + 2]):
            continue
        done = close + len(closer)
        formulas.append((position, done))
    return formulas


def _is_formula(content: str, after: str) -> bool:
    """Tell a formula between two dollar signs from the text between two amounts of money."""
    bare = _COMMAND.sub(" ", content)
    open_space, close_space = content[:1].isspace(), content[-1:].isspace()
    return not (
        not content.strip()
        or after.isdigit()
        or open_space != close_space
        or _NEXT_SENTENCE.search(bare)
        or ((open_space or "\n" in content) and _WORD.search(bare))
    )


def _mask(text: str, fences: list[Span], formulas: list[Span], more: tuple[re.Pattern[str], ...] = ()) -> str:
    """Hide what must not be cut; the result has the length of the text."""
    pieces, done = [], 0
    for start, end in sorted(fences + formulas):
        pieces += [text[done:start], "0" * (end - start)]
        # "$x = 3.$ Then": the sentence ends in the formula, so the cut comes after it.
        content = text[start:end].rstrip("$)]\\ \n")
        if text[start] in "$\\" and content.endswith((".", "?")) and re.match(r"\s+[A-Z]", text[end : end + 9]):
            pieces[-1] = pieces[-1][:-1] + "."
        done = end
    masked = "".join([*pieces, text[done:]])
    for no_end in (*more, _NO_END, _INLINE_MARKER):
        masked = no_end.sub(_hidden, masked)
    return _WIDE_SPACE.sub(" ", _SURROGATE.sub("0", _VARIABLE.sub("0", masked)))


def _hidden(match: re.Match[str]) -> str:
    """A match with zeros in place of marks that could end a sentence."""
    return re.sub("[.!?．。！？]", "0", match[0])


class _ListNumber(NamedTuple):
    """A number that may belong to a list: its place, its kind (digits, small or capital Roman), its surroundings."""

    start: int
    end: int
    kind: str
    value: int
    joined: bool  # after a comma, a colon, "and"
    within: bool  # after a word or such a mark, not after an operator or the end of a sentence
    capital: bool  # before a capital

    def follows(self, before: "_ListNumber") -> bool:
        return self.kind == before.kind and self.value == before.value + 1


def _hide_list_numbers(text: str, masked: str) -> str:
    """Hide the numbers of lists that run on in their lines."""
    pieces, done = [], 0
    for line in _lines_of_numbers(text):
        for number in sorted(_numbers_of_lists(line)):
            pieces += [masked[done : number.start], "0" * (number.end - number.start)]
            done = number.end
    return "".join([*pieces, masked[done:]])


def _lines_of_numbers(text: str) -> list[list[_ListNumber]]:
    """What may be numbers of a list, line by line: a list ends with its line."""
    lines: list[list[_ListNumber]] = [[]]
    line = seen = 0
    for match in _LIST_NUMBER.finditer(text):
        start, end, word = match.start(), match.end(), match["value"]
        value = int(word) if word.isdigit() else _ROMAN_VALUES.get(word.lower())
        if value is None:
            continue
        if (newline := text.rfind("\n", seen, start)) >= 0:
            line = newline + 1
            lines.append([])
        before = text[max(line, start - 8) : start]
        kind = "digits" if word.isdigit() else "small" if word.islower() else "capital"
        joined, within = bool(_LIST_COMMA.search(before)), bool(_NO_OPERATOR.search(before))
        capital = text[end : end + 8].lstrip(" \t")[:1].isupper()
        lines[-1].append(_ListNumber(start, end, kind, value, joined, within, capital))
        seen = start
    return lines


def _numbers_of_lists(line: list[_ListNumber]) -> set[_ListNumber]:
    """The numbers of a line that belong to a list inside a sentence.

    These are: numbers after a comma or "and" that continue the count or precede no capital, and the number that they
    continue; and counts from 1 without commas, if no number precedes a capital ("1. add 2. multiply").
    """
    found: set[_ListNumber] = set()
    run: list[_ListNumber] = []
    for place, number in enumerate(line):
        before = line[place - 1] if place else None
        follows = before is not None and number.follows(before)
        if number.joined and (follows or (number.kind == "digits" and not number.capital)):
            found.add(number)
            if follows and before is not None and before.within:
                found.add(before)
        if not number.within or number.capital or not (number.value == 1 or (run and number.follows(run[-1]))):
            run = []
            continue
        run = [number] if number.value == 1 else [*run, number]
        if len(run) > 1:
            found |= {run[-2], number}
    return found


def _blocks(text: str, masked: str, fence_ends: set[int]) -> list[Span]:
    """Spans between the line breaks that end a step."""
    blocks, start, line = [], 0, 0
    for match in NEWLINE.finditer(masked):
        before = masked[line : match.start()].rstrip("*_\"'”’ \t")[-1:]
        line = match.end()
        if match.start() not in fence_ends and before:
            word = _GOES_ON.match(masked, line)
            if word and word[1][0].islower() and before not in _ENDS:
                continue
            indent = _INDENT.match(masked, line).end()  # pyright: ignore[reportOptionalMemberAccess]
            if masked.startswith("0", indent) and text.startswith(_DISPLAY, indent):
                continue
        blocks.append((start, match.start()))
        start = line
    return [*blocks, (start, len(masked))]


def _without_marks(noise: re.Match[str]) -> str:
    """The run with zeros in place of its marks, except at its end."""
    inside = noise[0].rstrip(".!?")
    return re.sub("[.!?]", "0", inside) + noise[0][len(inside) :]


def _sentence_ends(masked: str, language: str) -> list[int]:
    """Where `sentencex` ends a sentence in a block, corrected: after closing marks, and never inside a word."""
    if not masked.strip() or (masked.isascii() and not re.search("[.!?]", masked)):
        return []
    ends = []
    for boundary in get_sentence_boundaries(language, _NOISE.sub(_without_marks, masked)):
        end = boundary["end_index"]
        if not masked[end - 1].isspace():
            before = masked[end - 1]
            end = _AFTER_END.match(masked, end).end()  # pyright: ignore[reportOptionalMemberAccess]
            if before.isascii() and not masked[end : end + 1].isspace():
                continue
        ends.append(end)
    return ends


def says_nothing(piece: str) -> bool:
    """Whether a piece lacks letters and digits outside of tags and of the layout of LaTeX."""
    return not any(map(str.isalnum, TAG.sub("", LAYOUT.sub("", piece))))


def is_marker(piece: str) -> bool:
    """Whether a piece is only the marker of a list item, which belongs to the item."""
    return len(piece) < _LONGEST_MARKER and bool(_ANY_MARKER.fullmatch(_COMMAND_OF_TEXT.sub(r"\1", piece)))


def _merge(text: str, spans: list[Span], *, old_rules: bool) -> list[Span]:
    """Join a list marker to what it opens, and a piece without letters or digits, or a mark of thinking, to another."""
    merged: list[Span] = []
    waiting: Span | None = None  # markers that wait for their step
    for start, end in spans:
        piece = text[start:end]
        empty = not any(map(str.isalnum, piece)) if old_rules else says_nothing(piece)
        begin = start if waiting is None else waiting[0]
        if old_rules:
            opens = len(piece) < _LONGEST_MARKER and bool(_MARKER_ONLY.fullmatch(piece))
        else:
            opens = is_marker(piece) or (empty and bool(OPENER.search(piece)))
        if opens or (empty and (waiting or not merged)):
            waiting = (begin, end)
        elif empty:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
            waiting = None
    if waiting and merged:
        merged[-1] = (merged[-1][0], waiting[1])
    elif waiting:
        merged.append(waiting)
    return merged
