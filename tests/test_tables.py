"""Tables in README and docs are those that the committed rows give."""

import importlib.util
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_generated_table_equals_the_one_that_stands_in_its_document(monkeypatch):
    for path, text in load(monkeypatch).documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python benchmarks/tables.py"
