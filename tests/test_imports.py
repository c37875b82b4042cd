"""Who may import whom, read from the source; and what `import fractal_rm` costs."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PURE_MODULES
from jaxtyping import TypeCheckError

import fractal_rm
from fractal_rm.objectives.bag_loss import bag_loss

PACKAGE = Path(fractal_rm.__file__).parent

# Rooms of the package, top row first: a module imports from its own row or from rows above.
ROWS = (
    ("objectives", "credit", "files", "errors", "versions"),
    ("data",),
    ("scorers", "tasks"),
    ("reward_model",),
    ("hf", "evaluation"),
    ("reward_training", "ppo"),
    ("report", "serving"),
    ("study",),
    ("cli",),
)
ROW_OF = {room: number for number, rooms in enumerate(ROWS) for room in rooms}

# Third-party packages, and the only rooms that may import them.
ONLY_IN = {
    "trl": ("ppo", "cli"),
    "matplotlib": ("report",),
    "jinja2": ("report", "scorers"),
    "fastapi": ("serving",),
    "uvicorn": ("serving",),
}

# The mathematics and the data are usable without the libraries that models and data sets come from.
NOT_IN = {room: ("transformers", "peft", "accelerate", "datasets") for room in ("objectives", "credit", "data")}


class Import(NamedTuple):
    """One import: the file and line it stands in, and the dotted name it asks for."""

    path: Path
    line: int
    name: str


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands (in a function, under `TYPE_CHECKING`), as absolute names."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    inside = parts[:-1]  # the package that `from . import` means
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == package.name:  # `from fractal_rm import bags` asks for fractal_rm.data.bag
                for alias in node.names:
                    yield Import(path, node.lineno, f"{module}.{alias.name}")
            else:
                yield Import(path, node.lineno, module)


def broken_rules(package: Path) -> list[str]:
    """One sentence for each import that a row or a room forbids."""
    broken = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative == Path("__init__.py"):
            continue  # the list of public names: it names modules of every row and imports none
        room = relative.parts[0].removesuffix(".py")
        if room not in ROW_OF:
            broken.append(f"{relative} has no row: give `{room}` one in ROWS.")
            continue
        for found in imports_of(path, package):
            top, _, rest = found.name.partition(".")
            where = f"{relative}:{found.line} imports {found.name}"
            target = rest.partition(".")[0]
            if top == package.name and target not in ROW_OF:
                if target != "__version__":
                    broken.append(f"{where}: import from the module that defines it, not from the package.")
            elif top == package.name and ROW_OF[target] > ROW_OF[room]:
                broken.append(f"{where}: `{target}` stands in a row below `{room}`.")
            elif top in ONLY_IN and room not in ONLY_IN[top]:
                broken.append(f"{where}: only {', '.join(ONLY_IN[top])} may.")
            elif top in NOT_IN.get(room, ()):
                broken.append(f"{where}: `{room}` works without it.")
    return broken


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that finds the same package, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_imports_from_a_row_below_its_own():
    assert broken_rules(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("bags.py", "from fractal_rm.objectives.bag_loss import bag_loss", "`losses` stands in a row below `bags`"),
        ("bags.py", "import fractal_rm.report.viewer", "`report` stands in a row below `bags`"),
        ("bags.py", "from . import cli", "`cli` stands in a row below `bags`"),
        ("scorers/token_scorer.py", "from ..trainers import x", "`trainers` stands in a row below `scorers`"),
        ("scorers/token_scorer.py", "from ..reward_model import x", "`reward_model` stands in a row below `scorers`"),
        ("reward_model.py", "def f():\n    from trl import GRPOTrainer", "only trainers may"),
        ("cli.py", "import trl.trainer.utils as u", "only trainers may"),
        ("cli.py", "import matplotlib.pyplot as plt", "only report may"),
        ("trainers/step.py", "if TYPE_CHECKING:\n    from jinja2 import Template", "only report, scorers may"),
        ("losses.py", "import transformers", "the first two rows work without it"),
        ("trainers/step.py", "from fractal_rm import Bag", "import from the module that defines it"),
        ("helpers.py", "import os", "give `helpers` one in ROWS"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, line, sentence):
    package = tmp_path / "fractal_rm"
    path = package / file
    path.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    path.write_text(line + "\n")
    (broken,) = broken_rules(package)
    assert broken.startswith(file)
    assert sentence in broken


def test_allowed_imports_are_left_alone(tmp_path):
    package = tmp_path / "fractal_rm"
    for file, text in {
        "bags.py": "import torch\nfrom fractal_rm import segmentation\nfrom .spans import Span\n",
        "trainers/step.py": "import trl\nfrom fractal_rm.data.bag import Bag\nfrom . import other\n",
        "report/plots.py": "import matplotlib\nimport jinja2\nfrom fractal_rm.trainers.step import x\n",
        "cli.py": "from fractal_rm import __version__\nfrom fractal_rm.study.quickstart import run\n",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    assert broken_rules(package) == []


def test_importing_the_package_imports_no_heavy_library():
    heavy = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sklearn", "matplotlib", "numpy")
    code = f"import sys, fractal_rm; print(*sorted(set({heavy}) & set(sys.modules)))"
    assert run_python(code) == ""


@pytest.mark.parametrize("name", [name for name in fractal_rm.__all__ if name != "__version__"])
def test_a_public_name_resolves_to_what_its_module_defines(name):
    value = getattr(fractal_rm, name)
    assert value.__module__.startswith("fractal_rm.")
    assert value.__name__ == name


def test_using_the_data_half_of_the_package_does_not_import_trl():
    names = ("Bag", "Segmentation", "read_bags", "StepRewardModel", "StepScores", "FractalReward")
    code = f"import sys, fractal_rm; [getattr(fractal_rm, name) for name in {names}]; print('trl' in sys.modules)"
    assert run_python(code) == "False"


def test_public_names_are_listed_before_they_are_loaded():
    code = "import fractal_rm; print(set(fractal_rm.__all__) <= set(dir(fractal_rm)), 'Bag' in vars(fractal_rm))"
    assert run_python(code) == "True False"


def test_type_checkers_and_the_lazy_table_know_the_same_names():
    lazy = {(module, name) for name, module in fractal_rm._MODULES.items()}
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert lazy == typed
    assert {name for _, name in lazy} | {"__version__"} == set(fractal_rm.__all__)


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(AttributeError, match="no attribute 'Bags'; its public names are Bag, "):
        fractal_rm.Bags  # noqa: B018


@pytest.mark.parametrize("name", PURE_MODULES)
def test_a_pure_module_was_loaded_with_its_shapes_checked(name):
    loader = importlib.import_module(f"fractal_rm.{name}").__loader__
    assert type(loader).__module__.startswith("jaxtyping"), "it was imported before conftest.py installed the hook"


def test_a_wrong_shape_is_refused_in_tests():
    with pytest.raises(TypeCheckError):
        bag_loss(torch.zeros(2, 3), torch.zeros(5), torch.ones(2, 3, dtype=torch.bool))
