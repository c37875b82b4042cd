"""Results files: what a row holds, and what a kill, several writers or another machine's folders may do to them."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.cli.sample import _append
from fractal_rm.evaluation import results
from fractal_rm.evaluation.results import ResultsFile, portable_command, read_results
from fractal_rm.files import write_atomic
from fractal_rm.versions import PACKAGES

NAN = float("nan")
KEYS = ["benchmark", "arm", "dataset", "seed", "split", "metrics", "config", "command", "commit", "versions"]
KEYS += ["machine", "seconds", "finished_at"]


def append(path, **changes):
    row = {"benchmark": "demo", "arm": "dense", "dataset": "toy", "seed": 0, "split": "test"}
    return ResultsFile(path).append(**(row | {"metrics": {"accuracy": 0.5}, "config": {}, "seconds": 1.0} | changes))


def test_a_row_holds_what_is_needed_to_get_it_again(tmp_path):
    path = tmp_path / "new" / "folder" / "results.jsonl"
    returned = append(path, config={"lr": 1e-3, "steps": 4}, seconds=2.34567)
    (row,) = read_results(path)
    assert row == returned
    assert list(row) == KEYS
    assert row["config"] == {"lr": 1e-3, "steps": 4}
    assert row["seconds"] == 2.346
    assert list(row["versions"]) == list(PACKAGES)
    assert row["versions"]["torch"] == torch.__version__.split("+")[0] or row["versions"]["torch"] == torch.__version__
    assert set(row["machine"]) == {"cpu", "cores", "gpu"}
    assert 1 <= row["machine"]["cores"] <= (os.cpu_count() or 1)
    finished = datetime.fromisoformat(row["finished_at"])
    assert finished.utcoffset() == timedelta(0)
    assert abs(datetime.now(finished.tzinfo) - finished) < timedelta(minutes=5)


@pytest.mark.parametrize(
    "write", [append, lambda path: _append(path, [{"prompt": "1+1?"}]), lambda path: write_atomic(path, "whole")]
)
def test_what_is_written_is_on_disk_before_the_run_goes_on(tmp_path, monkeypatch, write):
    path, synced = tmp_path / "results.jsonl", []

    def watch(file):
        synced.append((os.fstat(file).st_ino, os.fstat(file).st_size))

    monkeypatch.setattr(os, "fsync", watch)
    write(path)
    assert synced == [(path.stat().st_ino, path.stat().st_size)]


def test_rows_are_added_in_order_one_a_line(tmp_path):
    path = tmp_path / "results.jsonl"
    for seed in range(3):
        append(path, seed=seed, arm="dense\noutcome 😀")
    assert [row["seed"] for row in read_results(path)] == [0, 1, 2]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    metrics = {"auc": NAN, "loss": math.inf, "deep": [{"x": -math.inf}], "ok": 1.0}
    append(tmp_path / "r.jsonl", metrics=metrics)
    assert "NaN" not in (tmp_path / "r.jsonl").read_text()
    assert read_results(tmp_path / "r.jsonl")[0]["metrics"] == {
        "auc": None,
        "loss": None,
        "deep": [{"x": None}],
        "ok": 1.0,
    }


def test_scalars_of_numpy_and_torch_paths_and_tuples_are_written_as_plain_values(tmp_path):
    config = {
        "a": np.float32(0.5),
        "b": torch.tensor(3),
        "c": Path("runs/rm"),
        "d": (1, 2),
        "e": None,
        "f": np.bool_(True),
    }
    append(tmp_path / "r.jsonl", config=config)
    plain = {"a": 0.5, "b": 3, "c": "runs/rm", "d": [1, 2], "e": None, "f": True}
    assert read_results(tmp_path / "r.jsonl")[0]["config"] == plain


def test_a_value_that_no_row_can_hold_is_named_and_nothing_is_written(tmp_path):
    append(tmp_path / "r.jsonl")
    with pytest.raises(TypeError, match=r"config\.deep\[1\] is object"):
        append(tmp_path / "r.jsonl", config={"deep": [0, object()]})
    assert len(read_results(tmp_path / "r.jsonl")) == 1


def test_a_row_torn_at_any_byte_costs_that_row_only(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, seed=0)
    first = path.read_bytes()
    append(path, seed=1, arm="dénse 😀")
    whole = path.read_bytes()
    for cut in [*range(len(first) + 1, len(first) + 60), *range(len(first) + 60, len(whole) - 1, 37), len(whole) - 2]:
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="line 2 is torn"):
            assert [row["seed"] for row in read_results(path)] == [0]
        append(path, seed=2)
        with pytest.warns(UserWarning, match="line 2 is torn"):
            assert [row["seed"] for row in read_results(path)] == [0, 2]


def test_a_row_that_lacks_its_line_end_only_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, seed=0)
    path.write_bytes(path.read_bytes()[:-1])
    assert [row["seed"] for row in read_results(path)] == [0]
    append(path, seed=1)
    assert [row["seed"] for row in read_results(path)] == [0, 1]


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "[1, 2]", "3"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    append(tmp_path / "r.jsonl")
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2 is (not a result|invalid JSON)"):
        read_results(tmp_path / "r.jsonl")


def test_writers_at_the_same_time_lose_no_row(tmp_path):
    path = tmp_path / "r.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: append(path, seed=seed, config={"long": "x" * 5000}), range(64)))
    assert sorted(row["seed"] for row in read_results(path)) == list(range(64))


@pytest.mark.filterwarnings("ignore:.*is torn.*:UserWarning")  # a kill may tear a row, which is the point
def test_a_killed_run_leaves_the_rows_it_had_finished(tmp_path):
    path = tmp_path / "r.jsonl"
    program = (
        "import sys; from fractal_rm.evaluation.results import ResultsFile; file = ResultsFile(sys.argv[1]); seed = 0\n"
        "while True:\n"
        "    file.append(benchmark='b', arm='a', dataset='d', seed=seed, split='s', metrics={'m': seed / 3},"
        " config={'long': 'x' * 50_000}, seconds=1.0); seed += 1\n"
    )
    root = Path(results.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=root)
    try:
        deadline = time.monotonic() + 120
        while (not path.exists() or path.stat().st_size < 500_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    rows = read_results(path)
    assert len(rows) >= 9
    assert [row["seed"] for row in rows] == list(range(len(rows)))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_a_file_written_whole_holds_the_text_exactly(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("atomic") / "new" / "report.html"
    write_atomic(path, "old")
    write_atomic(path, text)
    assert path.read_bytes() == text.encode()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_bytes_are_written_whole_too(tmp_path):
    write_atomic(tmp_path / "picture.png", "old")
    write_atomic(tmp_path / "picture.png", b"\x89PNG\r\n\xff")
    assert (tmp_path / "picture.png").read_bytes() == b"\x89PNG\r\n\xff"
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        write_atomic(pipe, "one\n")
        assert read.result(timeout=10) == "one\n"
    assert pipe.is_fifo()
    link.symlink_to(file)
    write_atomic(link, "two")
    assert link.is_symlink()
    assert file.read_text() == "two"


def test_a_reader_that_has_the_old_file_open_reads_it_to_its_end(tmp_path):
    write_atomic(tmp_path / "report.html", "old")
    with (tmp_path / "report.html").open() as reader:
        write_atomic(tmp_path / "report.html", "new, and longer")
        assert reader.read() == "old"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "report.html", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "report.html", "new \ud800")
    assert (tmp_path / "report.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["{home}/.venv/bin/fractal-rm", "ppo", "--seed", "3"], "fractal-rm ppo --seed 3"),
        (["{here}/fractal_rm/__main__.py", "train"], "python -m fractal_rm train"),
        (["{here}/benchmarks/toy.py", "--lr=1e-3"], "python benchmarks/toy.py --lr=1e-3"),
        (
            ["benchmarks/toy.py", "--config", "{here}/recipes/a b.yaml"],
            "python benchmarks/toy.py --config 'recipes/a b.yaml'",
        ),
        (["x.py", "{beside}/data/gsm8k", "--out={here}/runs"], "python x.py ../data/gsm8k --out=runs"),
        (["x.py", "{home}/models/rm"], "python x.py '~/models/rm'"),
        (["x.py", "/mnt/disk/user/rm"], "python x.py rm"),
        (["-c"], "-c"),
    ],
)
def test_a_command_names_no_folder_of_this_machine(tmp_path, monkeypatch, argv, command):
    here, home = tmp_path / "code" / "project", tmp_path / "home"
    here.mkdir(parents=True)
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(Path, "home", lambda: home)
    filled = [word.format(home=home, here=here, beside=here.parent) for word in argv]
    assert portable_command(filled) == command


def test_a_row_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), f"--output_dir={tmp_path}/out"])
    append(tmp_path / "r.jsonl", config={"output_dir": tmp_path / "out"})
    assert str(tmp_path) not in (tmp_path / "r.jsonl").read_text()
    assert read_results(tmp_path / "r.jsonl")[0]["command"] == "python run.py --output_dir=out"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_running_code_marked_where_the_code_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a git hook
    package = tmp_path / "package"
    (package / "evaluation").mkdir(parents=True)
    shutil.copy(results.__file__, package / "evaluation" / "results.py")

    def git(*arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    def commit():
        spec = importlib.util.spec_from_file_location("copied_results", package / "evaluation" / "results.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.current_commit()

    assert commit() is None
    git("init", "--quiet")
    assert commit() is None  # inside a checkout, but no part of it
    git("add", "package")
    assert commit() is None  # nothing is committed yet
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert commit() == head
    with (package / "evaluation" / "results.py").open("a") as file:
        file.write("# changed\n")
    assert commit() == f"{head}-dirty"


def test_a_row_is_plain_json_for_other_tools(tmp_path):
    append(tmp_path / "r.jsonl", metrics={"auc": NAN})

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / "r.jsonl").read_text(), parse_constant=refuse)


def test_a_module_that_python_runs_is_named_so_that_the_command_runs_again(tmp_path):
    package = tmp_path / "toys"
    package.mkdir()
    (package / "__init__.py").touch()
    lines = [
        "import sys",
        "from fractal_rm.evaluation.results import portable_command",
        "print(portable_command(sys.argv))",
    ]
    (package / "toy.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "toys.toy", "--seed", "3"]
    found = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    assert found.stdout.decode().strip() == "python -m toys.toy --seed 3"


def test_a_row_is_found_by_its_fields_as_they_are_written(tmp_path):
    file = ResultsFile(tmp_path / "rows.jsonl")
    assert not file.has(arm="dense")
    file.append(
        benchmark="b", arm="dense", dataset="toy", seed=0, split="test", metrics={}, config={"points": (0.5, 1.0)},
        seconds=1.0,
    )  # fmt: skip
    assert file.has(arm="dense", seed=0, config={"points": (0.5, 1.0)})
    assert not file.has(arm="dense", seed=1)
    assert not file.has(arm="dense", config={"points": [0.5]})
