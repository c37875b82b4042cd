r"""Cut a response into steps.

A step is a character span of the response; the text itself is never changed. The text between two steps is a gap, and
steps and gaps together give the response exactly.
"""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fractal_rm.data.bag import Span, trim
from fractal_rm.data.patterns import compiled
from fractal_rm.data.prompts import Conversation, turns_of
from fractal_rm.data.sentences import NEWLINE, OPENER, is_marker, says_nothing, sentences

Method = Literal["lines", "sentences", "turns", "separator", "pattern", "given"]
Thinking = Literal["score", "skip"]
# Current version of the rules; older checkpoints keep the rules they were trained with.
VERSION = 2

# Share of one-step responses above which a segmentation probably does not fit, and the minimum number of responses.
_UNCUT, _LOOKED_AT = 0.9, 200
# Where models think before they answer: opening and closing marks.
_THINK = "(?:seed:)?(?:think|thinking|thoughts?|reasoning|scratchpad|analysis|reflection)"
THINKING = (
    (re.compile(rf"(?<!`)<{_THINK}(?:\s[^<>\n]*)?>", re.I), re.compile(rf"(?<!`)</{_THINK}\s*>", re.I)),
    (re.compile(r"\[THINK(?:ING)?\]", re.I), re.compile(r"\[/THINK(?:ING)?\]", re.I)),
    (re.compile("◁think▷"), re.compile("◁/think▷")),
    (re.compile(r"<\|(?:begin_of_thought|START_THINKING|inner_prefix|think(?:ing)?)\|>|<start_working_out>"),
     re.compile(r"<\|(?:end_of_thought|END_THINKING|inner_suffix|/think(?:ing)?)\|>|<end_working_out>")),
    (re.compile(r"<unused94>thought"), re.compile(r"<unused95>")),
    (re.compile(r"<\|channel>thought"), re.compile(r"<channel\|>")),
    (re.compile(r"<\|channel\|>\s*(?:analysis|commentary)"),
     re.compile(r"<\|channel\|>\s*final\s*(?:<\|constrain\|>\s*\w+\s*)?<\|message\|>")),
    # The same, decoded without special tokens.
    (re.compile(r"(?:\A|assistant)analysis(?=[^\W\d_a-z])"), re.compile(r"assistantfinal(?![a-z])")),
)  # fmt: skip
# Calls of tools in the forms that models write. One that is never closed reaches to the end.
TOOL_CALL = re.compile(
    "|".join(
        f"{opening}(?:.*?{closing}|.*)"
        for opening, closing in (
            (
                r"<(?P<tag>(?:\w+:|\uff5cDSML\uff5c)?(?:(?:tool|function)_calls?|TOOLCALL))>(?=\s*[{<\[]|\w+\s*[\n<])",
                "</(?P=tag)>",
            ),
            (r"<function=\w[\w.-]*>", "</function>"),
            (r"<\|tool_calls?\|>(?=\s*[{\[])", r"<\|/tool_calls?\|>"),
            (r"\bfunctools(?=\[\s*\{)", r"\Z"),
            (r"<\|(?P<call>tool_calls?)(?P<section>_section)?_(?:start|begin)\|>", r"<\|(?P=call)(?P=section)?_end\|>"),
            (r"<\uff5ctool▁calls▁begin\uff5c>", r"<\uff5ctool▁calls▁end\uff5c>"),
            (r"<\|tool_call>", r"<tool_call\|>"),
            (r"to=[\w.]{1,80}(?:[^\n<]{0,20}<\|\w{1,20}\|>){0,3}?[^\n<]{0,20}<\|message\|>", r"<\|call\|>"),
            (r"<\|python_tag\|>", r"<\|eo[mt](?:_id)?\|>"),
            (r"\[TOOL_CALLS\]", r"\Z"),
            (r"\A(?=\s*\{\s*\"name\"\s*:.*\}\s*\Z)", r"\Z"),
        )
    ),
    re.DOTALL,
)
_FENCE = re.compile(r"[> \t]*(?P<run>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)")
_RESULT = re.compile(r"\w+[.\uff0e]|\d+[:\uff1a]")


@dataclass(frozen=True)
class Segmentation:
    r"""How a response is cut into steps. A reward model stores it, so training and scoring cut in the same way.

    Args:
        method: `"lines"` (lines end with `\n`, `\r\n` or `\r`; one without a letter or digit, a fence of code or a
            `</think>` belongs to its neighbour), `"sentences"`, `"turns"` (each turn of the assistant is a step),
            `"separator"` (a fixed text lies between steps), `"pattern"` (a regular expression matches what lies between
            steps) or `"given"` (the data brings its steps already cut). In a conversation all of them cut inside the
            turns of the assistant; nothing else has steps.
        separator: The text between steps, for `method="separator"`.
        pattern: The regular expression between steps, for `method="pattern"`. An empty match, such as that of
            `(?=Step \d)`, cuts at its position.
        language: Language code for `method="sentences"`.
        thinking: Whether text in `<think> ... </think>` (or marks like it) has steps (`"score"`) or is passed over
            (`"skip"`). An answer whose `<think>` the prompt opened begins in it; a block that is never closed reaches
            to the end.
        version: Rules of `"lines"` and `"sentences"`: 2, or 1 for checkpoints from before there was a second one. In
            version 1, every line that is not blank is a step, and lists that run on in a line are cut at their numbers.

    Raises:
        ValueError: If the method is unknown, or its option is missing, unusable, or belongs to another method.

    Example:
        >>> Segmentation()("3*4=12.\n2+12=14.")
        [(0, 7), (8, 16)]
        >>> text = "So:\n\\[\nx = 2\n\\]\n---\nDone."
        >>> [text[start:end] for start, end in Segmentation()(text)]
        ['So:', '\\[\nx = 2\n\\]\n---', 'Done.']
        >>> Segmentation("separator", separator=" ## ")("3*4=12 ## 2+12=14")
        [(0, 6), (10, 17)]
    """

    method: Method = "lines"
    separator: str | None = None
    pattern: str | None = None
    language: str = "en"
    thinking: Thinking = "score"
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"Unknown segmentation method {self.method!r}; use one of {', '.join(get_args(Method))}.")
        if self.thinking not in get_args(Thinking):
            raise ValueError(
                f"Segmentation has thinking={self.thinking!r}; use one of {', '.join(get_args(Thinking))}."
            )
        for name in ("separator", "pattern"):
            value = getattr(self, name)
            if (self.method == name) != (value is not None) or value == "" or not isinstance(value, str | None):
                found = f"method={self.method!r} with {name}={value!r}"
                raise ValueError(f"Segmentation has {found}; give {name} a text if and only if method={name!r}.")
        if self.pattern is not None:
            compiled(self.pattern)  # raises its own error
        if self.version not in range(1, VERSION + 1):
            raise ValueError(f"Segmentation has version={self.version!r}; this package supports 1 to {VERSION}.")
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)*", self.language):
            raise ValueError(f"Segmentation language {self.language!r} is not a language code; give one such as 'en'.")
        if self.language != "en" and self.method != "sentences":
            raise ValueError(
                f"Segmentation has method={self.method!r} with language={self.language!r}; only method='sentences' "
                "reads a language."
            )

    def __call__(self, text: str) -> list[Span]:
        """Cut one response.

        Returns:
            Spans in order, apart, not empty and without white space at their ends; `[]` for a blank text.

        Raises:
            ValueError: If the method is `"given"`, which cannot cut a text, or the pattern runs out of time.
        """
        if self.method == "given":
            raise ValueError(
                "Segmentation 'given' cannot cut a text; bring data with a 'steps' column or choose another method."
            )
        if isinstance(text, Conversation):
            return [(start + a, start + b) for start, end in text.turns for a, b in self(text[start:end])]
        if self.thinking == "score":
            return self._cut(text)
        edges = [0, *(edge for span in _thoughts(text) for edge in span), len(text)]
        answers = zip(edges[::2], edges[1::2], strict=True)
        spans = [(start + a, start + b) for start, end in answers for a, b in self._cut(text[start:end])]
        return [(spans[0][0], spans[-1][1])] if spans and self.method == "turns" else spans

    @property
    def joint(self) -> str:
        """Text between steps given as a list, if the original text is unknown."""
        if self.version == 1 or self.method not in ("sentences", "separator"):
            return "\n"
        return " " if self.separator is None else self.separator

    def _cut(self, text: str) -> list[Span]:
        if self.method == "turns":
            return trim(text, [(0, len(text))])
        if self.version > 1 and self.method in ("lines", "sentences"):
            text = TOOL_CALL.sub(_masked, text)  # one line, and one sentence
        if self.method == "sentences":
            return sentences(text, self.language, old_rules=self.version == 1)
        if self.pattern is not None:
            matches: Iterable[Any] = compiled(self.pattern).finditer(text)
        else:
            matches = re.finditer(re.escape(self.separator) if self.separator is not None else NEWLINE.pattern, text)
        edges = [0, *(edge for match in matches for edge in match.span()), len(text)]
        spans = trim(text, zip(edges[::2], edges[1::2], strict=True))
        return _join_frames(text, spans) if self.method == "lines" and self.version > 1 else spans


def _masked(match: re.Match[str]) -> str:
    """A sentence of one word in place of a match, as long as it, without the white space at its ends."""
    bare = match[0].strip()
    start = match[0].index(bare)
    return match[0][:start] + f"{'X' * (len(bare) - 1)}." + match[0][start + len(bare) :]


def _join_frames(text: str, lines: list[Span]) -> list[Span]:
    """Join a line without content to the line before, or to the line after if it opens something or comes first."""
    joined: list[Span] = []
    waiting: Span | None = None  # lines that join the next line with content
    fences: list[str] = []  # what opened them, outermost first
    formula = False
    for start, end in lines:
        line = text[start:end]
        fence, dollars = _FENCE.fullmatch(line), line.count("$$") % 2 == 1
        closes = fence is not None and not fence["info"] and bool(fences) and fence["run"].startswith(fences[-1])
        if fence:
            fences = fences[:-1] if closes else [*fences, fence["run"]]
        formula = formula != dollars
        empty = fence is not None or says_nothing(line)
        opens = empty and (bool(fence and not closes) or (dollars and formula) or bool(OPENER.search(line)))
        # "12." may be a result, and "12:" a step that was left empty; nothing follows the last line.
        opens = opens or (is_marker(line) and not _RESULT.fullmatch(line) and end < lines[-1][1])
        begin = start if waiting is None else waiting[0]
        if not empty and not opens:
            joined.append((begin, end))
            waiting = None
        elif opens or waiting or not joined:
            waiting = (begin, end)
        else:
            joined[-1] = (joined[-1][0], end)
    if waiting and joined:
        joined[-1] = (joined[-1][0], waiting[1])
    return joined if joined or waiting is None else [waiting]


def _thoughts(text: str) -> list[Span]:
    """Spans of `<think> ... </think>` and similar marks, in order and without overlap."""
    found = sorted(span for marks in THINKING for span in _thoughts_between(text, *marks))
    thoughts: list[Span] = []
    for start, end in found:
        if thoughts and start < thoughts[-1][1]:
            thoughts[-1] = (thoughts[-1][0], max(end, thoughts[-1][1]))
        else:
            thoughts.append((start, end))
    return thoughts


def _thoughts_between(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> list[Span]:
    """Spans from an opening mark to the closing one; a first closing mark closes what the prompt opened."""
    marks = sorted(
        [(match.span(), True) for match in opening.finditer(text)]
        + [(match.span(), False) for match in closing.finditer(text)]
    )
    thoughts: list[Span] = []
    opened: int | None = 0 if marks and not marks[0][1] else None
    inner = 0  # opening marks inside of the thought
    for (start, end), opens in marks:
        if opens:
            inner = 0 if opened is None else inner + 1
            opened = start if opened is None else opened
        elif opened is not None:
            thoughts.append((opened, end))
            opened = None
        elif inner:
            thoughts[-1] = (thoughts[-1][0], end)
            inner -= 1
    return [*thoughts, (opened, len(text))] if opened is not None else thoughts


def join_steps(steps: Sequence[str], joint: str = "\n") -> tuple[str, list[Span]]:
    r"""Join steps that are already cut into a response.

    Args:
        steps: Texts of the steps.
        joint: Text between them.

    Returns:
        The response, and the spans of the steps in it, without the white space at a step's ends.

    Raises:
        TypeError: If a step is not a text.
        ValueError: If there is no step, or a step is blank.

    Example:
        >>> join_steps(["3*4=12.", "2+12=14."])
        ('3*4=12.\n2+12=14.', [(0, 7), (8, 16)])
    """
    _check_steps(steps)
    pieces, start = [], 0
    for step in steps:
        pieces.append((start, start + len(step)))
        start += len(step) + len(joint)
    text = joint.join(steps)
    return text, trim(text, pieces)


def locate_steps(text: str, steps: Sequence[str]) -> list[Span]:
    r"""Find steps that are already cut in the response they come from; white space at their ends does not matter.

    In a conversation, only the policy's turns are searched.

    Raises:
        TypeError: If a step is not a text.
        ValueError: If there is no step, or a step is blank or does not follow the one before it in the response.

    Example:
        >>> locate_steps("a. b. a.", ["a.", "a."])
        [(0, 2), (6, 8)]
    """
    _check_steps(steps)
    spans, turns = [], iter(turns_of(text))
    begin, stop = next(turns)
    for number, step in enumerate(steps, 1):
        while (start := text.find(step.strip(), begin, stop)) < 0:
            begin, stop = next(turns, (len(text), -1))
            if stop < 0:
                raise ValueError(f"step {number} is not in the response after step {number - 1}; copy steps unchanged.")
        begin = start + len(step.strip())
        spans.append((start, begin))
    return spans


def common_gap(texts: Iterable[tuple[str, Sequence[Span]]]) -> str | None:
    """The most frequent gap between two steps of a turn, from responses with spans; None if no turn has two steps.

    Example:
        >>> common_gap([("a b c", [(0, 1), (2, 3), (4, 5)]), ("a\\nb", [(0, 1), (2, 3)])])
        ' '
    """
    counts = Counter(
        text[end:start]
        for text, spans in texts
        for (first, end), (start, last) in itertools.pairwise(spans)
        if any(begin <= first and last <= stop for begin, stop in turns_of(text))
    )
    return counts.most_common(1)[0][0] if counts else None


def warn_of_uncut_responses(texts: Iterable[tuple[str, Sequence[Span]]], segmentation: Segmentation) -> None:
    """Warn if almost every response is one step although another segmentation would find several.

    Args:
        texts: Responses with their spans.
        segmentation: What cut them.
    """
    responses = list(texts)
    single = [text for text, spans in responses if len(spans) == 1]
    cuts_text = segmentation.method in ("lines", "sentences", "separator", "pattern")
    if not cuts_text or len(single) < _UNCUT * len(responses):
        return
    looked_at = single[:_LOOKED_AT]
    others: tuple[Method, ...] = ("lines", "sentences")
    found = {
        other: sum(len(Segmentation(other)(text)) for text in looked_at)
        for other in others
        if other != segmentation.method
    }
    best = max(found, key=lambda other: found[other])
    if looked_at and found[best] >= 2 * len(looked_at):
        warnings.warn(
            f"{len(responses)} responses have {sum(len(spans) for _, spans in responses)} steps under "
            f"`segmentation={segmentation.method}`: almost every response is one step, so steps cannot be compared "
            f"within a response. `segmentation={best}` finds {found[best]} steps in {len(looked_at)} of them.",
            stacklevel=3,
        )


def gaps(text: str, spans: Sequence[Span]) -> list[str]:
    r"""Return the text around and between the steps, whose spans are in order.

    Returns:
        One text more than there are steps: `gap, step, gap, ..., step, gap` joined is the response.

    Raises:
        ValueError: If the spans overlap, are out of order or leave the text.

    Example:
        >>> gaps("a\n\nb ", [(0, 1), (3, 4)])
        ['', '\n\n', ' ']
    """
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    if edges != sorted(edges):
        raise ValueError(f"Spans {spans} overlap or leave the text of {len(text)} characters; sort and fix them.")
    return [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _check_steps(steps: Sequence[str]) -> None:
    if not steps:
        raise ValueError("there are no steps; drop the row or give it at least one.")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, str):
            raise TypeError(f"step {number} is {type(step).__name__}, not text; make every step a text.")
        if not step.strip():
            raise ValueError(f"step {number} is blank; remove it together with its label.")
