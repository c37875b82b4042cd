"""The site of the documentation, as far as it can be checked without building it; `make docs` builds it."""

import dataclasses
import doctest
import importlib
import re
import sys
from dataclasses import make_dataclass

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from support.documents import documents

import fractal_rm
from fractal_rm.cli.main import COMMANDS
from fractal_rm.cli.options.parser import CommandParser

TOOLS = REPOSITORY / "docs" / "tools"


def tool(name: str):
    """A script of docs/tools as a module."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


site_hooks, site_reference = tool("site_hooks"), tool("site_reference")


def nav_pages(entries: list) -> list[str]:
    """Pages that a navigation names, in order."""
    pages = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += nav_pages(value) if isinstance(value, list) else [value]
    return pages


def test_the_navigation_names_every_page_of_docs_once():
    nav = nav_pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    written = [path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.md")]
    assert sorted(nav) == sorted(["README.md", *written]), "mkdocs.yml: name every page of docs/ under `nav`, once"


def test_the_site_fetches_nothing():
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    own = [*config["extra_css"], *config["extra"]["polyfills"]]
    assert all((REPOSITORY / "docs" / path).is_file() for path in own)
    assert any("iframe-worker" in path for path in config["extra"]["polyfills"])  # or the plugin fetches one
    assert "url(" not in (REPOSITORY / "docs" / "assets" / "site.css").read_text(encoding="utf-8")
    assert not {"extra_javascript"} & config.keys()
    assert all("```mermaid" not in path.read_text(encoding="utf-8") for path in documents())  # it comes from a CDN


@pytest.mark.parametrize(
    "html",
    ['<script src="https://cdn.example/x.js"></script>', '<link rel="stylesheet" href="//cdn.example/x.css">'],
)
def test_a_page_that_would_fetch_something_is_refused(html):
    assert site_hooks.FETCHED.search(html)
    assert not site_hooks.FETCHED.search('<script src="assets/x.js"></script><a href="https://example.org">there</a>')


@pytest.mark.parametrize(
    ("source", "link", "turned"),
    [
        ("README.md", "[a](docs/data.md#bad-input)", "[a](data.md#bad-input)"),
        ("docs/how_to/chats.md", "[a](../../recipes/gsm8k_ppo/README.md)", "[a](../recipes/gsm8k_ppo/README.md)"),
        ("recipes/arithmetic/README.md", "[a](../../docs/quickstart.md)", "[a](../../quickstart.md)"),
        ("docs/fractal.md", "[a](../recipes)", "[a](recipes/README.md)"),
        ("docs/concepts.md", "[a](../fractal_rm/objectives/bag_loss.py)", "[a](reference/objectives/bag_loss.md)"),
        ("docs/migration.md", "[a](../benchmarks) b", "a b"),
        ("docs/data.md", "![a](b.png) [c](#d) [e](https://f.org/g)", "![a](b.png) [c](#d) [e](https://f.org/g)"),
        ("README.md", "```\n[a](docs/b.md)\n```\n[a](docs/b.md)", "```\n[a](docs/b.md)\n```\n[a](b.md)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(source, link, turned):
    assert site_hooks.with_site_links(link, source) == turned


def test_pages_with_sections_have_a_table_of_contents_and_long_ones_have_sections():
    assert "[TOC]" not in site_hooks.with_contents("# Page\n\n## One\n\n```\n## no section\n```\n")
    for path in documents():
        text = path.read_text(encoding="utf-8")
        # A phone shows some 40 characters a line and 30 lines a screen; a line of a table is about one line.
        lines = sum(1 if line.startswith("|") else 1 + len(line) // 40 for line in text.splitlines())
        assert lines < 10 * 30 or "[TOC]" in site_hooks.with_contents(text), f"{path.name}: give it sections (##)"


def test_every_recipe_and_notebook_becomes_a_page():
    pages = site_hooks.pages_outside_docs()
    for readme in (REPOSITORY / "recipes").glob("*/README.md"):
        assert readme.relative_to(REPOSITORY).as_posix() in pages
        assert f"({readme.parent.name}/README.md)" in pages["recipes/README.md"]
    page = site_hooks.notebook_page(REPOSITORY / "docs" / "notebooks" / "score_and_see.ipynb")
    assert page.startswith("# Score and see\n")
    assert "(score_and_see.ipynb)" in page
    assert page.count("```python\n") == page.count("\n```\n") > 3


def test_the_reference_has_every_public_name_and_every_module():
    pages = site_reference.pages()
    public = {name for name in fractal_rm.__all__ if not name.startswith("__")}
    assert set(re.findall(r"^::: fractal_rm\.(\w+)$", pages["reference/index.md"], re.MULTILINE)) == public
    for module in ("objectives/bag_loss", "objectives/priors", "credit/placement", "credit/advantages", "data/readers"):
        assert f"\n\n[TOC]\n\n::: fractal_rm.{module.replace('/', '.')}\n" in pages[f"reference/{module}.md"]


@pytest.mark.parametrize("name", ["FractalConfig", "StepPPOConfig"])
def test_the_table_of_a_configuration_holds_the_help_of_each_of_its_fields(name):
    kind = getattr(fractal_rm, name)
    table = site_reference.config_page().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    ours = [base for base in kind.__mro__ if base.__module__.startswith("fractal_rm")]
    inherited = kind.__mro__[len(ours)].__dataclass_fields__
    added = {field.name for field in dataclasses.fields(kind) if field.name not in inherited}
    own = {field.name for field in dataclasses.fields(kind)} & {
        field for base in ours for field in base.__annotations__
    }
    assert added <= rows.keys() == own
    for field, line in rows.items():
        assert kind.__dataclass_fields__[field].metadata["help"] in line.replace("\\|", "|").replace("\\*", "*")
        assert f"`{kind.__dataclass_fields__[field].default!r}`" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_commands_holds_every_flag(command):
    kinds = site_reference.arguments_of(command)
    section = site_reference.commands_page().partition(f"\n## fractal-rm {command}\n")[2].partition("\n## ")[0]
    flags = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    for kind in kinds:
        if kind.__name__ in site_reference.PUBLIC:
            assert f"(config.md#{kind.__name__.lower()})" in section
            flags |= {field.name for field in dataclasses.fields(kind)}
    assert flags == set(CommandParser(command, kinds).names) - {"config"}


@pytest.mark.parametrize("module", [site_hooks, site_reference], ids=lambda module: module.__name__)
def test_examples_in_the_tools_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_field_without_help_is_refused():
    with pytest.raises(ValueError, match=r"Mute\.x"):
        site_reference.field_table(make_dataclass("Mute", [("x", int)]))


NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize("name", ["data_flow", "placement", "aggregation", "shaping", "advantages"])
def test_a_figure_is_what_its_script_draws(name):
    pytest.importorskip("matplotlib", reason="figures are drawn by the extra `plots`")
    figures = tool("figures")
    others = {"architecture"}  # drawn by docs/tools/architecture.py
    assert set(figures.FIGURES) | others == {path.stem for path in figures.FOLDER.glob("*.svg")}
    stored, drawn = (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8"), figures.draw(name)
    assert NUMBER.sub("", stored) == NUMBER.sub("", drawn)
    there, here = (np.array([float(number) for number in NUMBER.findall(text)]) for text in (stored, drawn))
    np.testing.assert_allclose(here, there, atol=0.05)  # another machine may round otherwise
