"""Plain English: phrases that native readers stumble over stay out of pages, docstrings, comments and messages.

Each phrase has a replacement. `ALLOWED` lists right English that contains one of them.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest
from support.documents import FENCE, REPOSITORY, documents

BANNED = {
    r"(?:is|are|was|were) no (?!longer|more|less|fewer|further|other|later|earlier|better|worse|easier)\w+": (
        "say what it is not: `is not a model`"
    ),
    r"of one's own": "say `separate` or `its own`",
    r"(?:which|that|it|he|who) (?:has|have) not(?: been| yet|[.,;:)])": "say `lacks`, `has none` or `does not have`",
    r"\bthe one which\b": "name it",
    r"\bwith which\b": "start a new sentence",
    r"\bsaid once\b": "say who warns: `a warning says once`",
    r"\bof which the\b": "start a new sentence",
}
ALLOWED = re.compile(r"(?:there|here) (?:is|are|was|were) no |has not been (?:run|trained|checked)")


def prose(path: Path) -> list[tuple[int, str]]:
    """Line numbers and texts of a page without code, or of the comments and strings of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = FENCE.sub(lambda found: "\n" * found.group().count("\n"), text)
        return list(enumerate(text.splitlines(), start=1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT)]


def stumbles(text: str) -> list[str]:
    """Banned phrases of a text, each with what to write."""
    text = " ".join(text.split())
    found = [(match, advice) for phrase, advice in BANNED.items() for match in re.finditer(rf"\b{phrase}", text, re.I)]
    spans = [allowed.span() for allowed in ALLOWED.finditer(text)]
    return [
        f"{match.group()!r}: {advice}"
        for match, advice in found
        if not any(low <= match.start() < high or low < match.end() <= high for low, high in spans)
    ]


def test_pages_and_modules_are_in_plain_english():
    pages = [path for path in documents() if path.name != "CHANGELOG.md"]
    modules = sorted((REPOSITORY / "fractal_rm").rglob("*.py"))
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {stumble}"
        for path in [*pages, *modules]
        for line, text in prose(path)
        for stumble in stumbles(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Rewards that are no numbers, named before they count.", 1),
        ("There is no value model, and it is no longer an option.", 0),
        ("A folder of one's own, with which it goes on.", 2),
        ("The rewards which `group` has not.", 0),
        ("Tokens that it has not.", 1),
    ],
)
def test_planted_phrases_are_found(text, count):
    assert len(stumbles(text)) == count


# Of a docstring: a heading, and lines one level below it that name something.
SECTION = re.compile(r"^( *)(?:Args|Attributes|Raises):\n((?:\1 {4,}.*\n|\n)+)", re.M)
NAMED = re.compile(r"(?:\*{0,2}[\w.]+|`[^`]+`)(?:, (?:\*{0,2}[\w.]+|`[^`]+`))*:")


def test_a_section_of_a_docstring_is_indented_as_the_reference_reads_it():
    found = []
    for path in sorted((REPOSITORY / "fractal_rm").rglob("*.py")):
        for indent, lines in SECTION.findall(path.read_text(encoding="utf-8")):
            for line in lines.splitlines():
                text = line.removeprefix(indent + 4 * " ")
                if text and not text.startswith(" ") and not NAMED.match(text):
                    found.append(f"{path.relative_to(REPOSITORY)}: indent what goes on: {text}")
    assert found == []
