"""Two processes that share a batch, against one that has it all."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model
from support.step_ppo import policy, policy_tokenizer
from support.train_in_processes import CASES, train_all

TESTS = Path(__file__).parent
TOLERANCE = 1e-4

# The rollouts are handed to the trainer by `rollout_func`, which TRL calls experimental.
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


def train_in_two(folder: Path) -> None:
    """Train every case in two processes."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "train_in_processes.py"), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What one process and what two have trained."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for folder in (one, two):
        policy().save_pretrained(folder / "policy")
        policy_tokenizer().save_pretrained(folder / "policy")
    with warnings.catch_warnings():  # see pytestmark, which fixtures do not know
        warnings.simplefilter("ignore")
        train_all(one)
    train_in_two(two)
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does_on_the_same_batches(folders, case):
    one, two = (load_file(folder / f"{case}.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0.0, atol=TOLERANCE, msg=f"{case}: {name}")
    start = {f"policy.{name}": tensor for name, tensor in policy().state_dict().items()}
    start |= {f"model.{name}": tensor for name, tensor in make_model("likelihood", "llama").state_dict().items()}
    moved = [(tensor - start[name]).abs().max() for name, tensor in one.items() if name in start]
    assert len(moved) > 10
    assert min(moved) > 100 * TOLERANCE
