"""The Markdown files of the repository, and the code in them."""

import importlib.util
import re
import textwrap
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[2]

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """README, and every Markdown file in the folders that are documented."""
    found = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"]
    for folder in ("docs", "recipes", "benchmarks"):
        found += sorted((REPOSITORY / folder).rglob("*.md"))
    return found


def blocks(text: str, *languages: str) -> list[str]:
    """Bodies of the fenced blocks in one of the languages."""
    return [textwrap.dedent(found["body"]) for found in FENCE.finditer(text) if found["language"] in languages]


def commands(text: str) -> list[str]:
    """Command lines of the shell blocks, without prompts, comments, and the steps that fetch the code."""
    lines = [
        line.partition("#")[0].strip().removeprefix("$ ")
        for body in blocks(text, "bash", "sh", "console", "shell")
        for line in body.splitlines()
    ]
    return [line for line in lines if line and line.split()[0] not in ("git", "cd")]


def script(path: Path) -> ModuleType:
    """A script of a recipe or of docs/tools as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
