"""`fractal-rm sample`: labelled responses, in a file that a stopped run goes on with."""

import json
import re
from pathlib import Path

import pytest
from support.stand_ins import gsm8k_problems, save_policy, write_jsonl

from fractal_rm.cli.main import main
from fractal_rm.cli.options.arguments import DataArguments
from fractal_rm.cli.sample import Asked, SampleArguments, _prompts_of_rows, _rows, _rows_so_far, read_rows_of
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import Problem

SMALL = ["--task", "arithmetic", "--samples", "3", "--batch_size", "6", "--max_new_tokens", "48", "--dtype", "float32"]


def run(output: Path, *flags: str) -> list[dict]:
    assert main(["sample", "--model", str(SHIPPED_POLICY), "--output", str(output), *SMALL, *flags]) == 0
    return read_rows_of(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[dict]]:
    path = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    return path, run(path, "--num_prompts", "5", "--gold_steps", "true")


def test_rows_hold_responses_with_the_labels_of_the_checkers(whole):
    _, rows = whole
    assert len(rows) == 15
    for row in rows:
        problem = Problem.from_prompt(row["prompt"])
        assert row["label"] == float(problem.check_answer(row["completion"]))
        wrong = row["step_labels"].index(0.0) if 0.0 in row["step_labels"] else len(row["step_labels"])
        flags = problem.check_steps(row["completion"])
        assert all(flags[:wrong])
        assert wrong == len(flags) or not flags[wrong]
        assert all(label is None for label in row["step_labels"][wrong + 1 :])
    assert len({row["completion"] for row in rows}) > 5


def test_a_run_that_was_killed_ends_like_one_that_was_not(whole, tmp_path):
    path, rows = whole
    lines = path.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "rows.jsonl"
    cut.with_name("rows.jsonl.settings.json").write_bytes(path.with_name("rows.jsonl.settings.json").read_bytes())
    cut.write_bytes(b"".join(lines[:8]) + lines[8][:20])  # two prompts, two rows of a third, and a torn line
    resumed = run(cut, "--num_prompts", "5", "--gold_steps", "true")
    assert sorted(map(json.dumps, resumed)) == sorted(map(json.dumps, rows))


def test_a_finished_run_samples_nothing(whole, capsys):
    path, rows = whole
    before = path.read_bytes()
    assert run(path, "--num_prompts", "5", "--gold_steps", "true") == rows
    assert path.read_bytes() == before
    assert "15 responses to 5 prompts: " in capsys.readouterr().out


def test_a_file_of_another_run_is_refused(whole, capsys):
    path, _ = whole
    flags = ["sample", "--model", str(SHIPPED_POLICY), "--output", str(path), *SMALL, "--seed", "1"]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert "holds responses of a run with other settings (gold_steps True, now False, seed 0, now 1)" in said


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ("{", None, "row 1: the line begins a list or an object"),
        ('{"prompt": "a"}', None, "row 1 has no 'answer'; remove the row, or give another `output`."),
        ("[]", None, "row 1: the row is list; make it a JSON object."),
        ("{}", "{", "o.jsonl.settings.json is invalid JSON"),
        ("{}", "[1]", "o.jsonl.settings.json holds no settings. Remove "),
    ],
)
def test_a_file_that_is_damaged_is_one_sentence(tmp_path, rows, settings, told):
    arguments = SampleArguments(model="m", output=str(tmp_path / "o.jsonl"))
    kept = {name: value for name, value in vars(arguments).items() if name not in ("output", "num_prompts")}
    (tmp_path / "o.jsonl").write_text(rows + "\n")
    (tmp_path / "o.jsonl.settings.json").write_text(json.dumps(kept) if settings is None else settings)
    with pytest.raises((TypeError, ValueError), match=re.escape(told)):
        _rows_so_far(tmp_path / "o.jsonl", arguments)


def test_a_file_of_an_older_version_with_fewer_arguments_is_gone_on_with(tmp_path):
    first = run(tmp_path / "rows.jsonl", "--num_prompts", "1")
    beside = tmp_path / "rows.jsonl.settings.json"
    settings = json.loads(beside.read_text())
    del settings["skip_prompts"]
    beside.write_text(json.dumps(settings))
    assert run(tmp_path / "rows.jsonl", "--num_prompts", "2")[: len(first)] == first


def test_step_labels_are_written_on_request_only(tmp_path):
    assert all("step_labels" not in row for row in run(tmp_path / "rows.jsonl", "--num_prompts", "1"))


def test_a_file_of_problems_is_labelled_by_its_answers(tmp_path):
    policy = save_policy(tmp_path / "policy", chat=True)
    rows = write_jsonl(tmp_path / "problems.jsonl", gsm8k_problems(3))
    flags = ["--model", policy, "--task", "gsm8k", "--train_file", rows, "--output", str(tmp_path / "out.jsonl")]
    more = ["--samples", "2", "--max_new_tokens", "4", "--chat", "true"]
    assert main(["sample", *flags, *more]) == 0
    found = read_rows_of(tmp_path / "out.jsonl")
    assert len(found) == 6
    assert all(row["label"] == 0.0 and row["prompt"][0]["role"] == "user" for row in found)


def test_answers_are_texts_or_numbers(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": answer} for answer in (42, 0.5, "#### 7")])
    arguments = SampleArguments(model="m", output="o")
    asked = _prompts_of_rows(arguments, DataArguments(train_file=rows))
    said = ["#### 42.0", "#### 1/2", "#### 7"]
    assert [[one.is_right(text) for text in said] for one in asked] == [
        [row == place for place in range(3)] for row in range(3)
    ]
    rows = write_jsonl(tmp_path / "more.jsonl", [{"prompt": "?", "answer": True}])
    with pytest.raises(ValueError, match=r"row 1: a row needs `prompt`, and `answer` as text or number"):
        _prompts_of_rows(arguments, DataArguments(train_file=rows))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "reasoning_gym"], "needs `task_name`"),
        (["--task", "arithmetic", "--task_name", "gsm_symbolic"], "Set `task=reasoning_gym`"),
        (["--task", "arithmetic", "--train_file", "x.jsonl"], "makes its own prompts, but a file or data set is given"),
        (["--task", "word_problems"], "reads its texts from a folder `word_problems` of `data_dir`"),
        ([], "There are no prompts"),
        (["--samples", "0"], "`samples` is 0"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FRACTAL_RM_DATA", raising=False)
    output = tmp_path / "rows.jsonl"
    assert main(["sample", "--model", str(SHIPPED_POLICY), "--output", str(output), *flags]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not output.exists()


def test_step_labels_are_of_the_steps_that_a_reward_model_reads():
    asked = Asked("2+3\n", lambda _: True, lambda text: [True for line in text.split("\n") if line.strip()])
    (row,) = _rows(asked, ["a\rb\x0cc\n---\n d\u2028e"], gold_steps=True)
    assert len(row["step_labels"]) == len(Segmentation("lines")(row["completion"]))
