"""Outcome rewards by name: checked without running anything, loaded when all other arguments are right."""

import pytest

from fractal_rm.cli.main import main
from fractal_rm.cli.options.reward_functions import check_reward_function, load_reward_function

SOURCE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()


def exact(completions, **columns):
    return [float(completion == "4") for completion in completions]


not_callable = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def exact(:\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["my_rewards.py:exact", "my_rewards.exact"])
def test_a_function_of_a_file_or_a_module_is_loaded_and_not_before(folder, name, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    check_reward_function(name)
    assert not (folder / "ran").exists()
    function = load_reward_function(name)
    assert function(completions=["4", "5"]) == [1.0, 0.0]
    assert (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none.py:exact", "there is no file none.py. Give FILE.py:FUNCTION."),
        ("my_rewards.py:exakt", "does not define the function 'exakt'. It defines exact."),
        ("broken.py:exact", r"broken.py is not valid Python \(line 1: "),
        ("exact_anwser", "Did you mean `exact_answer`?"),
        ("qqq", "Give one of exact_answer, gsm8k_answer, verifier, or FILE.py:FUNCTION"),
    ],
)
def test_a_wrong_name_is_refused_without_running_the_file(folder, name, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        check_reward_function(name)
    assert not (folder / "ran").exists()


def test_a_module_without_the_function_is_named(folder):
    with pytest.raises(ValueError, match="my_rewards has no function 'not_callable'"):
        load_reward_function("my_rewards.not_callable")
    with pytest.raises(ImportError, match=r"No module named 'no_rewards'\. Check the path"):
        load_reward_function("no_rewards.exact")


def test_nothing_runs_while_other_arguments_are_wrong(folder, capsys):
    arguments = ["--model", "nowhere/at/all", "--task", "arithmetic", "--bf16", "false"]
    assert main(["ppo", *arguments, "--reward_function", "my_rewards.py:exact", "--output_dir", "out"]) == 2
    assert "There is no model folder nowhere/at/all." in capsys.readouterr().err
    assert not (folder / "ran").exists()
