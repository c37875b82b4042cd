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

import gc
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

REPOSITORY = Path(__file__).resolve().parent.parent

# Mathematics on tensors: each call is checked against its annotated shapes. Before the modules are imported.
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

# No deadline: a machine that is busy is not a bug. The same examples in every run: a test that passes, passes again.
settings.register_profile("fractal_rm", deadline=None, derandomize=True)
settings.load_profile("fractal_rm")


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
