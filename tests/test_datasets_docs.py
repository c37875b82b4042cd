"""`docs/datasets.md` says what the code does: examples run, and the tables are the formats and Hub ids of the code."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import fractal_rm.data.formats
from fractal_rm.data.formats.index import FORMATS

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "datasets.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def readers() -> dict[str, object]:
    """Functions that read a format, by module and name."""
    shared = ("reading", "tables")  # not formats of a data set
    names = [found.name for found in pkgutil.iter_modules(fractal_rm.data.formats.__path__) if found.name not in shared]
    modules = {name: importlib.import_module(f"fractal_rm.data.formats.{name}") for name in names}
    return {
        f"{room}.{name}": function
        for room, module in modules.items()
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("read_") and function.__module__ == module.__name__
    }


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example):
    exec(example, {})


def test_there_are_examples():
    assert len(EXAMPLES) == 1


def test_every_reader_has_a_name_for_the_commands():
    assert {id(known.read) for known in FORMATS.values()} == {id(reader) for reader in readers().values()}


def test_the_table_is_that_of_the_formats():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+\.read_\w+)` \|.*\| `(min|max|mean)` \|[^|]*\|$", TEXT, re.MULTILINE)
    names = {id(reader): name for name, reader in readers().items()}
    assert rows == [(name, names[id(known.read)], known.meaning) for name, known in FORMATS.items()]


def test_the_table_of_the_hub_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| `([\w./-]+/[\w./-]+)`[^|]*\| ([^|]*) \|$", TEXT, re.MULTILINE)
    found = {name: (path, tuple(re.findall(r"`(\w+)`", cell))) for name, path, cell in rows}
    hub = {name: known.hub for name, known in FORMATS.items() if known.hub is not None}
    assert found == {name: (known.path, known.splits) for name, known in hub.items()}


@pytest.mark.parametrize("name", sorted(readers()))
def test_a_reader_says_where_its_format_comes_from_and_what_labels_mean(name):
    text = inspect.getdoc(readers()[name]) or ""
    source = " ".join(text.partition("Source:")[2].split())
    assert re.search(r"licen[cs]e|Apache-2\.0|CC BY-SA|As \[`read_qa_feedback`\]", source)
    assert re.search(r"[Ll]abels? (are )?of|grade of a", text)
