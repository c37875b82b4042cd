"""Tables in README and docs are those that the committed rows give, and short pages give no other measurements."""

import re

import pytest
from support.documents import FENCE, REPOSITORY

from benchmarks.tables import documents, filled

GENERATED = re.compile(r"<!-- table: ([^>]*) -->.*?<!-- end of table: \1 -->", re.DOTALL)
MEASURED = re.compile(r"\d ?%|(?<![\d.-])[01]?\.\d{2,}\b(?!\.)|\d points?\b")  # not versions


def typed_measurements(text: str) -> list[str]:
    """Percentages, decimals and points that stand outside generated tables and code; the level of intervals may."""
    for pattern in (GENERATED, FENCE, re.compile(r"`[^`]*`"), re.compile(r"95 % (?=(bootstrap )?interval)")):
        text = pattern.sub("", text)
    return [line for line in text.splitlines() if MEASURED.search(line)]


def test_every_generated_table_equals_the_one_that_stands_in_its_document():
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python -m benchmarks.tables"


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md", "docs/disaggregation.md"])
def test_the_pages_read_first_have_no_measurement_that_was_typed(page):
    assert typed_measurements((REPOSITORY / page).read_text(encoding="utf-8")) == []


def test_a_planted_measurement_is_found():
    text = "<!-- table: a -->\n0.51\n<!-- end of table: a -->\n`0.51`, 95 % intervals, TRL 1.14.2\n"
    planted = ["ends 7 points above", "at 54 %", "AUC .95"]
    assert typed_measurements(text + "\n".join(planted)) == planted


def test_a_table_without_a_page_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: a -->\nold\n<!-- end of table: a -->\n")
    assert "\nnew\n" in filled([page], {"a": "new"})[page]
    with pytest.raises(ValueError, match="No page has the marks of the table 'b'"):
        filled([page], {"b": "new"})
