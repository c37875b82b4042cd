"""Tables in README and docs are those that the committed rows give."""

from benchmarks.tables import documents


def test_every_generated_table_equals_the_one_that_stands_in_its_document():
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python -m benchmarks.tables"
