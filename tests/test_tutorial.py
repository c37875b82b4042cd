"""The tutorial as a reader copies it, block by block, with less of everything; and the notebooks."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from support.documents import FENCE, blocks

from fractal_rm.cli.main import main
from fractal_rm.evaluation.results import read_results

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
# What the last cell of each shows.
LAST = {"score_and_see": "scores.html", "outcome_to_dense_ppo": "dense + outcome"}
# Constants that say how much is done, and how little will do here.
LESS = {"RESPONSES": 64, "HELD_OUT": 16, "UPDATES": 2}
LESS_FLAGS = {
    "train": "--max_steps 2 --per_device_train_batch_size 8 --use_cpu true --disable_tqdm true",
    "ppo": "--max_steps 2 --per_device_train_batch_size 16 --num_problems 32 --use_cpu true --disable_tqdm true",
}


def with_less(code: str) -> str:
    """Code with smaller numbers for the constants at its head."""
    return re.sub(r"^([A-Z_]+) = \d+", lambda found: f"{found[1]} = {LESS[found[1]]}", code, flags=re.MULTILINE)


# torch says so on every machine without an accelerator, of TRL's data loader.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_python_of_readme_runs_as_it_stands_within_two_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks((REPOSITORY / "README.md").read_text(encoding="utf-8"), "python")
    start = time.process_time()
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert time.process_time() - start < 120
    assert re.search(r"0\.\d+ \[\('.*?', 0\.\d+\)", capsys.readouterr().out)  # a score, and steps with theirs
    assert (tmp_path / "rm" / "README.md").is_file()


def test_the_tutorial_runs_as_it_is_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "tutorial"}
    commands = []
    for block in FENCE.finditer(TUTORIAL.read_text(encoding="utf-8")):
        if block["language"] == "python":
            exec(compile(with_less(block["body"]), str(TUTORIAL), "exec"), session)
        for words in [shlex.split(line) for line in block["body"].splitlines() if line.startswith("fractal-rm ")]:
            commands.append(words[1])
            pages = ["--page_steps", "1"] if "--page_steps" in words else []
            assert main([*words[1:], *shlex.split(LESS_FLAGS.get(words[1], "")), *pages]) == 0
    assert session["RESPONSES"] == LESS["RESPONSES"]
    assert commands == ["train", "score", "ppo", "ppo", "report", "report"]
    assert "exact_answer, training" in (tmp_path / "tutorial" / "report.html").read_text(encoding="utf-8")  # curves
    rows = read_results("tutorial/results.jsonl")
    assert [row["arm"] for row in rows] == ["policy", "outcome", "dense"]
    assert (
        len(
            {(tmp_path / "tutorial" / arm / "model.safetensors").read_bytes() for arm in ("policy", "outcome", "dense")}
        )
        == 3
    )
    for page in ("scores.html", "report.html", "dense/step_scores/step-000002.html"):
        assert (tmp_path / "tutorial" / page).is_file()
    assert "label" in json.loads((tmp_path / "tutorial" / "responses.jsonl").read_text().splitlines()[0])
    assert "step_labels" not in (tmp_path / "tutorial" / "responses.jsonl").read_text()
    assert "step_auc" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert [cell["execution_count"] for cell in code] == [None] * len(code)
    assert cells[0]["cell_type"] == "markdown"  # its heading is the title of its page


@pytest.fixture(scope="module")
def last_outputs(tmp_path_factory) -> dict[str, str]:
    """What the last cell of each notebook gives, with less of everything.

    One kernel runs them all, because its imports take longest; it forgets all names before each.
    """
    for needed in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install {needed}")
    forget = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": ["%reset -f"]}
    cells, last = [], {}
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        constants = notebook["cells"][1]
        before = "".join(constants["source"])
        constants["source"] = with_less(before)
        assert constants["source"] != before
        cells += [forget, *notebook["cells"]]
        last[path.stem] = len(cells) - 1
    cells = [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)]
    folder = tmp_path_factory.mktemp("notebooks")
    file = folder / "all.ipynb"
    file.write_text(json.dumps(notebook | {"cells": cells}), encoding="utf-8")
    # In a process of its own: the warnings of the machinery of notebooks are not ours.
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", "--timeout=300", str(file)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return {name: str(cells[number]["outputs"]) for name, number in last.items()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, last_outputs):
    assert LAST[path.stem] in last_outputs[path.stem]
