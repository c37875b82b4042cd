"""What earlier packages wrote is read as they meant it; what a later one will write is refused in a sentence."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY

from fractal_rm.hf.checkpoints import check_same_run, fault, find_checkpoint
from fractal_rm.hf.manifest import MANIFEST, read_manifest, write_manifest
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.settings import FractalSettings

# Made by tests/fixtures/make_checkpoints.py, each by the package as it was at the commit of its name.
FIXTURES = REPOSITORY / "tests" / "fixtures"
CHECKPOINTS = sorted((FIXTURES / "checkpoints").iterdir())
FINISHED = sorted((FIXTURES / "manifests").glob("*/checkpoint-2"))
IDENTITY = {"seed": 0, "learning_rate": 0.001, "max_steps": 4}


def block(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["fractal"]


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_of_an_earlier_package_scores_as_it_did(folder):
    expected = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    model = StepRewardModel.from_pretrained(folder, device="cpu")
    found = model.score([expected["prompt"]], [expected["response"]])[0]
    assert [[step.start, step.end] for step in found.steps] == [[start, end] for start, end, _ in expected["steps"]]
    assert found.step_scores == pytest.approx([score for *_, score in expected["steps"]], abs=1e-5)
    assert found.score == pytest.approx(expected["score"], abs=1e-5)
    assert max(found.step_scores) - min(found.step_scores) > 1e-3
    rules = (2, 2) if "reading" in block(folder) else (1, 1)
    assert (model.settings.reading, model.segmentation.version) == rules
    assert len(found.steps) == (2 if rules == (2, 2) else 3)


def test_every_key_of_the_block_of_today_stands_in_a_checkpoint():
    keys = [set(block(folder)) for folder in CHECKPOINTS]
    assert max(keys, key=len) == set(FractalSettings().to_dict()), "Add the new format to make_checkpoints.py."
    assert len({frozenset(one) for one in keys}) == len(CHECKPOINTS) - 1  # the first set has both scorers


@pytest.mark.parametrize("folder", FINISHED, ids=lambda folder: folder.parent.name)
def test_a_finished_checkpoint_of_an_earlier_package_is_gone_on_from(folder):
    assert fault(folder) is None
    assert find_checkpoint(str(folder), None, IDENTITY) == str(folder)
    with pytest.raises(ValueError, match="belongs to another run: `seed` was 0 and is 1"):
        find_checkpoint(str(folder), None, IDENTITY | {"seed": 1})


def test_a_manifest_of_an_unknown_version_is_refused(tmp_path):
    folder = shutil.copytree(FINISHED[-1], tmp_path / "checkpoint-2")
    write_manifest(folder, IDENTITY, [folder / "weights.txt"])
    manifest = read_manifest(folder)
    assert fault(folder) is None
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 2}))
    says = r"its manifest\.json has format version 2, and this package reads version 1\."
    for refuse in (lambda: find_checkpoint(str(folder), None, IDENTITY), lambda: check_same_run(folder, IDENTITY)):
        with pytest.raises(ValueError, match=says):
            refuse()
    with pytest.raises(ValueError, match=f"holds no complete checkpoint: checkpoint-2 is damaged.*{says[:-2]}"):
        find_checkpoint(True, tmp_path, IDENTITY)
