"""What every test runs under: no network, one thread, fixed seeds, checked shapes in the pure modules."""

import os

# Read by the libraries when they are imported, so set before anything else is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
)
# One thread, in the processes that tests start too: two on busy cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import gc
import random
from pathlib import Path

import accelerate.utils.imports
import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

REPOSITORY = Path(__file__).resolve().parent.parent

# Mathematics on tensors: each call is checked against its annotated shapes. Before the modules are imported. A function
# that is defined inside another is wrapped anew at every call of that one, which takes milliseconds.
PURE_MODULES = (
    "objectives.aggregation",
    "objectives.bag_loss",
    "objectives.calibration",
    "objectives.grades",
    "objectives.preferences",
    "objectives.priors",
    "objectives.pseudo_labels",
    "credit.advantages",
    "credit.guards",
    "credit.kl",
    "credit.moments",
    "credit.placement",
    "credit.shaping",
    "evaluation.intervals",
    "evaluation.statistics",
)
install_import_hook([f"fractal_rm.{module}" for module in PURE_MODULES], "beartype.beartype")

torch.set_num_threads(1)

# For devices that are not there torch keeps the seed, with the stack of the call as text: milliseconds for each.
for _devices in (torch.cuda, torch.xpu, torch.mtia):
    if not _devices.is_available():
        _devices.manual_seed_all = lambda seed: None

# Accelerate looks for installed packages anew at every call, several times in every step of a training.
_find = getattr(accelerate.utils.imports, "_is_package_available", None)
if _find is not None:
    accelerate.utils.imports._is_package_available = functools.cache(_find)

# No deadline: a machine that is busy is not a bug. The same examples in every run: a test that passes, passes again.
settings.register_profile("fractal_rm", deadline=None, derandomize=True)
settings.load_profile("fractal_rm")


# Files that take longest, longest first. With several processes they start first: otherwise one process still works on
# the last of them when the others have nothing left.
LONG_FILES = (
    "test_compare_command.py",
    "test_step_ppo_trainer.py",
    "test_tutorial.py",
    "test_speed_benchmarks.py",
    "test_processes.py",
    "test_words_recipe.py",
    "test_quickstart.py",
    "test_disaggregation.py",
    "test_training_report.py",
    "test_recipes.py",
    "test_embedding.py",
    "test_placement.py",
    "test_what_is_read.py",
    "test_stages.py",
    "test_kill_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        help="folder of the real data sets; without it FRACTAL_RM_DATA, then shared/data beside the repository",
    )


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Every training collects garbage at its start: of all that the libraries hold, unless that is set aside."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def quick_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are spawned come from a server that has imported the trainers: as fresh, and seconds sooner."""
    from benchmarks.common.killable import CONTEXT
    from benchmarks.speed.kill_and_resume import IMPORTED

    CONTEXT.set_forkserver_preload(IMPORTED)
    monkeypatch.setattr("multiprocessing.get_context", lambda method: CONTEXT)


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of the real data sets; a test that wants it skips where there is none."""
    named = request.config.getoption("--data-dir") or os.environ.get("FRACTAL_RM_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"{named} is no folder: give --data-dir or FRACTAL_RM_DATA the folder of the data sets.")
    pytest.skip("the real data sets are not here: name their folder with --data-dir or FRACTAL_RM_DATA")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy on disk: TRL loads the reference from where the policy came from."""
    from support.step_ppo import policy

    folder = tmp_path_factory.mktemp("policy")
    policy().save_pretrained(folder)
    return str(folder)
