"""What README promises: two commands on its first screen, links that lead somewhere, Python that compiles."""

import re
from pathlib import Path

import pytest
from support.documents import FENCE, REPOSITORY, blocks, commands, documents

FIRST_SCREEN = 60  # lines
CODE_WIDTH = 80  # characters that fit beside navigation and contents at 1,280 pixels
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)>\s]+)|(?:src|href|srcset)=\"([^\"\s]+)")


def broken_links(document: Path) -> list[str]:
    """Relative links of a Markdown file to files that do not exist."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = [markdown or html for markdown, html in LINK.findall(text)]
    relative = [target for target in targets if not re.match(r"[a-z]+:|#|//", target)]
    return [target for target in relative if not (document.parent / target.partition("#")[0]).exists()]


def test_the_first_screen_of_readme_gives_exactly_the_two_commands():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first_screen = "\n".join(text.splitlines()[:FIRST_SCREEN])
    assert commands(first_screen) == ["make quickstart", "make test"]


def test_the_first_screen_of_readme_has_a_picture_and_a_python_example():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first_screen = "\n".join(text.splitlines()[:FIRST_SCREEN])
    assert re.search(r"!\[[^\]]*\]\(|<img ", first_screen)
    assert blocks(first_screen, "python")


def test_no_paragraph_of_readme_is_longer_than_four_lines():
    text = FENCE.sub("", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    paragraphs = [part.strip().splitlines() for part in text.split("\n\n")]
    assert [lines for lines in paragraphs if len(lines) > 4 and not lines[0].startswith(("|", "-", "<!--"))] == []


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_relative_links_lead_to_files(document):
    assert broken_links(document) == []


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_python_blocks_compile_and_are_not_wrapped_by_the_site(document):
    for number, body in enumerate(blocks(document.read_text(encoding="utf-8"), "python"), start=1):
        compile(body, f"{document.name}, Python block {number}", "exec")
        assert [line for line in body.splitlines() if len(line) > CODE_WIDTH] == []


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_make_targets_that_are_named_exist(document):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    named = {line.split()[1] for line in commands(document.read_text(encoding="utf-8")) if line.startswith("make ")}
    assert named <= targets


def test_a_planted_broken_link_is_found(tmp_path):
    document = tmp_path / "README.md"
    (tmp_path / "there.md").write_text("")
    document.write_text(
        '[a](there.md#part) [b](gone.md) ![c](gone.png) [d](https://example.org/x) [e](#here) <img src="gone.svg">\n'
        "```python\nrows[a](gone_in_code)\n```\n"
    )
    assert broken_links(document) == ["gone.md", "gone.png", "gone.svg"]


def test_commands_are_read_from_shell_blocks_only():
    text = "```bash\ngit clone x && cd x\nmake quickstart  # minutes\n$ make test\n```\n```python\nmake_it()\n```\n"
    assert commands(text) == ["make quickstart", "make test"]
