"""Tables in README and docs are those that the committed rows give."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "tables.py"


def load():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_generated_table_equals_the_one_that_stands_in_its_document():
    for path, text in load().documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python benchmarks/tables.py"
