"""The benchmark that plants wrong lines: what it draws, what it runs, and that a mutant is what is imported."""

import sys

import pytest

from benchmarks import mutation
from benchmarks.tables import mutation_tables
from fractal_rm.evaluation.intervals import interval_of_share

SOURCE = "from typing import Any\n\n\ndef share(a: int | None, b: Any = 1) -> int | float:\n    return 2 * a / b\n"


def test_every_module_has_tests_and_examples():
    found = mutation.modules()
    assert {module.split("/")[0] for module in found} == set(mutation.ROOMS)
    assert set(mutation.TESTS) <= set(found)
    for module in found:
        assert len(mutation.tests_of(module)) >= 2
    with pytest.raises(ValueError, match=r"test_nothing\.py.*do not exist"):
        mutation.tests_of("data/nothing")


@pytest.mark.parametrize(
    ("operator", "drawn"),
    [
        ("core/ReplaceBinaryOperator_Add_Sub", True),
        ("core/ReplaceBinaryOperator_Add_LShift", False),
        ("core/ReplaceBinaryOperator_BitAnd_BitOr", True),
        ("core/ReplaceComparisonOperator_Is_IsNot", True),
        ("core/ReplaceComparisonOperator_Eq_Is", False),
        ("core/ReplaceUnaryOperator_Delete_Not", True),
        ("core/ReplaceUnaryOperator_USub_Not", False),
        ("core/NumberReplacer", True),
        ("core/VariableReplacer", False),
    ],
)
def test_operators_whose_mutants_say_nothing_of_tests_are_left_out(operator, drawn):
    assert mutation.is_drawn(operator) == drawn


def test_annotations_are_found():
    texts = [SOURCE.splitlines()[line - 1][start:end] for (line, start), (_, end) in mutation.annotated(SOURCE)]
    assert sorted(texts) == ["Any", "int | None", "int | float"]


def test_what_was_changed_is_said():
    assert mutation.said(SOURCE, SOURCE.replace("2 *", "3 *")) == "line 5: return 2 * a / b -> return 3 * a / b"


def test_a_process_imports_the_mutant_in_place_of_the_file_and_of_its_cache(tmp_path, monkeypatch):
    file = tmp_path / "mutated_once.py"
    file.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    import mutated_once  # type: ignore[import-not-found]

    assert mutated_once.VALUE == 1
    assert list((tmp_path / "__pycache__").iterdir())
    loader = mutation.SourceFileLoader
    monkeypatch.setattr(loader, "get_data", loader.get_data)  # put back at the end
    mutation.read_instead(file, "VALUE = 2\n")
    del sys.modules["mutated_once"]
    import mutated_once  # type: ignore[import-not-found]

    assert mutated_once.VALUE == 2


def test_the_tables_hold_each_draw_and_the_survivors_of_the_last():
    rows = [
        {
            "arm": f"data/{module}",
            "seed": seed,
            "metrics": {"places": 40, "mutants": 4, "killed": 4 - len(left), "too_long": 1},
            "config": {"survivors": left},
        }
        for seed, module, left in [
            (1, "bag", ["line 1: a"]),
            (1, "readers", []),
            (2, "bag", []),
            (2, "readers", ["line 2: a[0]: 1 -> a[1]: 1", "line 3: b -> c"]),
        ]
    ]
    made = mutation_tables(rows)
    low, high = interval_of_share(6 / 8, 8)
    assert f"| draw 2, data | 8 | 6 | 2 | 0.750 | {low:.3f} | {high:.3f} |" in made["mutation"].splitlines()
    assert "| draw 1, all | 8 | 7 | 2 | 0.875 |" in made["mutation"]
    assert made["survivors"].splitlines() == [
        "- `data/readers`, line 2: `` a[0]: 1 -> a[1]: 1 ``",
        "- `data/readers`, line 3: `` b -> c ``",
    ]
