"""Who may import whom, read from the source; and what `import fractal_rm` costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LONG_FILES, PURE_MODULES
from jaxtyping import TypeCheckError
from support.documents import REPOSITORY, script

import fractal_rm
from fractal_rm.objectives.bag_loss import bag_loss

PACKAGE = Path(fractal_rm.__file__).parent
architecture = script(REPOSITORY / "docs" / "tools" / "architecture.py")  # the rooms, and how imports are read

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
# Formats of data sets that come from the hub are read by the library that fetches them.
EXCEPT = {("data/formats", "datasets")}


def broken_rules(package: Path) -> list[str]:
    """One sentence for each import that a row or a room forbids, and for each circle."""
    broken = architecture.upward_imports(package)
    for name, path in architecture.modules(package).items():
        relative, room = path.relative_to(package), architecture.room_of(name)
        if room not in architecture.ROW_OF:
            broken.append(f"{relative} has no row: give `{room}` one in ROWS of docs/tools/architecture.py.")
            continue
        for found in architecture.imports_of(path, package):
            top, _, rest = found.name.partition(".")
            where = f"{relative}:{found.line} imports {found.name}"
            if top == package.name and architecture.room_of(rest) not in architecture.ROW_OF:
                if rest != "__version__":
                    broken.append(f"{where}: import from the module that defines it, not from the package.")
            elif top in ONLY_IN and room not in ONLY_IN[top]:
                broken.append(f"{where}: only {', '.join(ONLY_IN[top])} may.")
            elif top in NOT_IN.get(room, ()) and (relative.parent.as_posix(), top) not in EXCEPT:
                broken.append(f"{where}: `{room}` works without it.")
    graph = architecture.import_graph(package)
    for kind, nodes in (("modules", graph), ("rooms", architecture.room_graph(graph))):
        broken += [f"A circle of {kind}: {', '.join(circle)}." for circle in architecture.circles(nodes)]
    return broken


def plant(folder: Path, files: dict[str, str]) -> Path:
    """A package of that name with some files."""
    package = folder / "fractal_rm"
    for file, text in {"__init__.py": "from fractal_rm.cli.main import main\n", **files}.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text + "\n")
    return package


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that finds the same package, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_room_that_a_rule_names_exists():
    rules = {room for rooms in ONLY_IN.values() for room in rooms} | NOT_IN.keys() | {path for path, _ in EXCEPT}
    for room in architecture.ROW_OF.keys() | rules:
        assert (PACKAGE / room / "__init__.py").is_file() or (PACKAGE / f"{room}.py").is_file(), room


def test_imports_keep_to_the_rows_the_rooms_and_no_circles():
    assert broken_rules(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("data/bag.py", "from fractal_rm.scorers.base import x", "`scorers` stands in a row below `data`"),
        ("data/bag.py", "import fractal_rm.report.viewer", "`report` stands in a row below `data`"),
        ("data/bag.py", "from .. import cli", "`cli` stands in a row below `data`"),
        ("objectives/priors.py", "def f():\n    from fractal_rm.data import bag", "`data` stands in a row below"),
        ("scorers/token.py", "from ..ppo import x", "`ppo` stands in a row below `scorers`"),
        ("scorers/token.py", "from ..reward_model import x", "`reward_model` stands in a row below `scorers`"),
        ("ppo/pages.py", "if T:\n    from fractal_rm.report.viewer import x", "`report` stands in a row below `ppo`"),
        ("reward_model.py", "def f():\n    from trl import GRPOTrainer", "only ppo, cli may"),
        ("hf/runs.py", "import trl.trainer.utils as u", "only ppo, cli may"),
        ("cli/main.py", "import matplotlib.pyplot as plt", "only report may"),
        ("ppo/pages.py", "if TYPE_CHECKING:\n    from jinja2 import Template", "only report, scorers may"),
        ("objectives/bag_loss.py", "import transformers", "`objectives` works without it"),
        ("credit/kl.py", "from accelerate import Accelerator", "`credit` works without it"),
        ("data/readers.py", "from datasets import Dataset", "`data` works without it"),
        ("data/formats/hub.py", "import peft", "`data` works without it"),
        ("ppo/trainer.py", "from fractal_rm import Bag", "import from the module that defines it"),
        ("ppo/trainer.py", "import fractal_rm", "import from the module that defines it"),
        ("helpers.py", "import os", "give `helpers` one in ROWS"),
        ("trainers/step.py", "import os", "give `trainers` one in ROWS"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, line, sentence):
    (broken,) = broken_rules(plant(tmp_path, {file: line}))
    assert broken.startswith(file)
    assert sentence in broken


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        (
            {"ppo/a.py": "from fractal_rm.ppo.b import x", "ppo/b.py": "def f():\n    from fractal_rm.ppo import a"},
            "modules: ppo.a, ppo.b",
        ),
        (
            {"hf/a.py": "from .b import x", "hf/b.py": "from . import c",
             "hf/c.py": "if T:\n    import fractal_rm.hf.a"},
            "modules: hf.a, hf.b, hf.c",
        ),
        (
            {"hf/a.py": "from fractal_rm.evaluation.b import x", "hf/d.py": "", "evaluation/b.py": "",
             "evaluation/c.py": "import fractal_rm.hf.d"},
            "rooms: evaluation, hf",
        ),
    ],
)  # fmt: skip
def test_a_planted_circle_is_found(tmp_path, files, circle):
    assert broken_rules(plant(tmp_path, files)) == [f"A circle of {circle}."]


def test_allowed_imports_are_left_alone(tmp_path):
    files = {
        "data/bag.py": "import torch\nfrom fractal_rm.data import segmentation\nfrom .sentences import trim",
        "data/segmentation.py": "from fractal_rm.data.sentences import trim",
        "data/sentences.py": "",
        "data/formats/hub.py": "from datasets import load_dataset\nfrom ..bag import Bag",
        "ppo/trainer.py": "import trl\nfrom fractal_rm.data.bag import Bag\nfrom fractal_rm.hf import runs",
        "hf/runs.py": "import accelerate",
        "report/plots.py": "import matplotlib\nimport jinja2\nfrom fractal_rm.ppo.trainer import x",
        "cli/main.py": "from fractal_rm import __version__\nfrom fractal_rm.report.plots import x",
    }
    assert broken_rules(plant(tmp_path, files)) == []


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


def test_a_client_needs_none_of_our_version_of_transformers():
    # Engines that people train with pin older ones: the client and what places scores on tokens work beside them.
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fractal_rm import ScoringClient, StepScores\n"
        "import fractal_rm.credit.advantages, fractal_rm.credit.placement\n"
        "step = {'text': 'a', 'start': 0, 'end': 1, 'score': 0.5}\n"
        "found = {'response': 'a', 'score': None, 'steps': [step], 'truncated_steps': 0, 'error': None}\n"
        "ScoringClient._ask = lambda self, path, body: {'results': [found] * len(body['prompts'])}\n"
        "print(ScoringClient('http://127.0.0.1:1').score(['p'], ['a'])[0].spans)"
    )
    assert run_python(code) == "[(0, 1)]"


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


def test_the_test_files_that_start_first_are_there():
    assert [name for name in LONG_FILES if not (REPOSITORY / "tests" / name).is_file()] == []


def test_a_wrong_shape_is_refused_in_tests():
    with pytest.raises(TypeCheckError):
        bag_loss(torch.zeros(2, 3), torch.zeros(5), torch.ones(2, 3, dtype=torch.bool))
