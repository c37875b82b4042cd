"""docs/architecture.md says what the source says, and routes are counted as the script claims."""

import doctest
import importlib
import re
import sys

import pytest
from support.documents import REPOSITORY, script

import fractal_rm

architecture = script(REPOSITORY / "docs" / "tools" / "architecture.py")
REWRITE = "docs/architecture.md is old: run `python docs/tools/architecture.py --write`"


def without_numbers(text: str) -> str:
    return re.sub(r"[\d,]+", "0", text)


@pytest.fixture(scope="module")
def page() -> str:
    return architecture.generated(architecture.PAGE.read_text(encoding="utf-8"))


def test_the_page_and_the_picture_show_the_rooms_and_imports_that_there_are(page):
    assert without_numbers(architecture.rooms_table(architecture.PACKAGE)) in without_numbers(page), REWRITE
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture(architecture.PACKAGE), REWRITE


def test_the_page_says_how_many_circles_and_upward_imports_there_are(page):
    name = "circular imports, upward imports"
    found = re.escape(architecture.static_counts(architecture.PACKAGE)[name])
    assert re.search(rf"^\| {name} \|.*\| {found} \|$", page, re.MULTILINE), REWRITE


def test_the_page_says_which_files_a_label_a_completion_and_a_key_pass(page, tmp_path):
    runs = architecture.Runs(tmp_path)
    label, completion, keys = runs.label(), runs.completion(), runs.keys()
    for title, files in zip(list(architecture.COUNTS)[:2], (label, completion), strict=True):
        assert f"- {title}: " + ", ".join(f"`{file}`" for file in files) in page, REWRITE
    assert ", ".join(f"`{file}`" for file in max(keys.values(), key=len)) in page, REWRITE
    assert {"objectives/aggregation.py", "objectives/bag_loss.py"} <= set(label)
    assert {"reward_training/config.py", "reward_training/objective.py"} <= set(keys["bag_weight"])
    assert "credit/shaping.py" in keys["shaping"]
    assert "credit/advantages.py" in keys["lam"]


def test_files_that_the_page_names_exist():
    text = architecture.PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|json))`", text))
    assert named
    for file in sorted(named):
        assert (REPOSITORY / file).is_file() or (architecture.PACKAGE / file).is_file(), f"there is no {file}"


def test_files_beside_a_route_exist():
    for files in architecture.BESIDE.values():
        for file in files:
            assert (architecture.PACKAGE / file).exists(), f"BESIDE of docs/tools/architecture.py names {file}"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of three files: `start` calls `middle`, and that `end`."""
    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "start.py").write_text("from toy_package.middle import middle\ndef start(x): return middle(x)\n")
    (package / "middle.py").write_text(
        "from toy_package.end import end, Kept\n"
        "def unused(lam): return lam\n"
        "def middle(x): return [end(x, lam=y) for y in (1, 2)]\n"
    )
    (package / "end.py").write_text("class Kept:\n    size = 1\ndef end(x, lam): return x * lam\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.startswith("toy_package")]:
        del sys.modules[name]


def route(package, **events):
    def run():
        importlib.import_module("toy_package.start").start(3)

    return architecture.functions_run(run, package, **events)


def test_a_route_is_the_files_whose_functions_run_between_two_events(toy):
    found = route(toy, ends=("return", "start"))
    assert architecture.files_of(found, toy, {}) == ["start.py", "middle.py", "end.py"]
    assert architecture.files_of(found, toy, {"middle.py": "a reason"}) == ["start.py", "end.py"]
    found = route(toy, ends=("return", "end"), begins=("call", "middle"))
    assert architecture.files_of(found, toy, {}) == ["middle.py", "end.py"]


def test_a_route_ends_when_its_file_has_something_in_it(toy, tmp_path):
    out = tmp_path / "rows.jsonl"
    (toy / "end.py").write_text(
        f"import pathlib\nclass Kept: pass\ndef end(x, lam): pathlib.Path({str(out)!r}).write_text('row')\n"
    )
    assert [code.co_name for code in route(toy, ends=out)] == ["start", "middle", "end"]


@pytest.mark.parametrize(
    "events", [{"ends": ("return", "nobody")}, {"ends": ("return", "end"), "begins": ("call", "x")}]
)
def test_a_route_that_does_not_begin_or_end_is_refused(toy, events):
    with pytest.raises(RuntimeError, match="give events that happen"):
        route(toy, **events)


def test_a_key_is_found_in_the_functions_that_name_it_and_run(toy):
    found = route(toy, ends=("return", "start"))
    assert [code.co_name for code in found if architecture.names_key(code, "lam")] == ["middle", "end"]


def test_examples_in_the_script_hold():
    result = doctest.testmod(architecture)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_script_and_the_tests_read_the_same_package():
    assert architecture.PACKAGE.samefile(fractal_rm.__path__[0])
