"""Hooks of mkdocs: pages from outside docs/, a generated reference, and links between pages of the site.

mkdocs calls the functions `on_...`. In the site, docs/x is x, and every other file of the repository keeps its path.
"""

import functools
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

import site_reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>```+)[^\n]*\n.*?^(?P=indent)(?P=marks)[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<mark>!?)\[(?P<label>[^\]]*)\]\((?P<target>[^)\s]+)\)")

# An interval or a deviation in a cell of a table: a line breaks before it, not in it.
INTERVAL = re.compile(r"(?<=[\s>])(\[[^\[\]<>,]+, [^\[\]<>,]+\]|[\d.,]+ ± [\d.,]+)(?=\s*</td>)")

# A flag of a command in code: a browser would break a line after its hyphens.
FLAG = re.compile(r"(?<=[\s>])(--[a-z][\w-]*)(?=[\s<])")
CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)

# Tags for which a browser would fetch something from another site.
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*")


def site_path(path: str) -> str:
    """Path of a repository file in the site; for a module, its page in the reference.

    Example:
        >>> site_path("docs/data.md"), site_path("recipes"), site_path("fractal_rm/objectives/bag_loss.py")
        ('data.md', 'recipes/README.md', 'reference/objectives/bag_loss.md')
    """
    module = re.fullmatch(r"fractal_rm/((?:(?:objectives|credit|data)/)?\w+)\.py", path)
    if module:
        return f"reference/{module[1]}.md"
    return "recipes/README.md" if path == "recipes" else path.removeprefix("docs/")


def links(text: str) -> list[str]:
    """Targets of the relative links in Markdown, except in code."""
    targets = [found["target"] for found in LINK.finditer(FENCE.sub("", text))]
    return [target for target in targets if not re.match(r"[a-z]+:|#|//", target)]


def with_site_links(text: str, source: str) -> str:
    """Markdown of the repository with its links turned into links of the site.

    Args:
        text: Markdown whose links lead from file to file of the repository.
        source: Its path in the repository.

    Returns:
        The same with links between places in the site; links to folders become text.

    Example:
        >>> with_site_links("[how](docs/data.md#bad-input)", "README.md")
        '[how](data.md#bad-input)'
    """
    here = posixpath.dirname(site_path(source))

    def turned(found: re.Match[str]) -> str:
        path, hash_mark, anchor = found["target"].partition("#")
        if not path or re.match(r"[a-z]+:|//", path):
            return found[0]
        target = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if (REPOSITORY / target).is_dir():
            return found["label"]  # a folder has no page
        return f"{found['mark']}[{found['label']}]({posixpath.relpath(target, here or '.')}{hash_mark}{anchor})"

    pieces, end = [], 0
    for code in FENCE.finditer(text):
        pieces += [LINK.sub(turned, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(turned, text[end:])])


def pages_outside_docs(repository: Path = REPOSITORY) -> dict[str, str]:
    """Markdown files of the repository that become pages: path -> text."""
    paths = [repository / "README.md", repository / "CHANGELOG.md", *sorted(repository.glob("recipes/*/README.md"))]
    pages = {path.relative_to(repository).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    recipes = {path: text for path, text in pages.items() if path.startswith("recipes/")}
    return pages | {"recipes/README.md": recipe_list(recipes)}


def recipe_list(recipes: dict[str, str]) -> str:
    """A page that names every recipe by its own heading."""
    lines = [
        f"- [{text.splitlines()[0].lstrip('# ')}]({path.removeprefix('recipes/')})" for path, text in recipes.items()
    ]
    return "\n".join(
        ["# Recipes", "", "Each is a folder with a configuration and the command that runs it.", "", *lines, ""]
    )


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text unchanged, its code as blocks, and a link to the notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join([parts[0], f"[This page as a notebook]({path.name})", *parts[1:], ""])


@functools.cache
def generated_pages() -> dict[str, str]:
    """Generated pages: path in the site -> Markdown."""
    notebooks = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
    return {f"notebooks/{path.stem}.md": notebook_page(path) for path in notebooks} | site_reference.pages()


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Add generated pages to the navigation."""
    recipes = sorted(pages_outside_docs().keys() - {"README.md", "CHANGELOG.md", "recipes/README.md"})
    generated = list(generated_pages())
    assert config.nav is not None
    config.nav += [
        {"Notebooks": [page for page in generated if page.startswith("notebooks/")]},
        {"Recipes": ["recipes/README.md", *recipes]},
        {"Reference": [page for page in generated if page.startswith("reference/")]},
        {"Changes": "CHANGELOG.md"},
    ]
    return config


def on_files(files: "Files", *, config: "MkDocsConfig") -> "Files":
    """Add pages from outside docs/, the files that pages link to, and generated pages."""
    from mkdocs.structure.files import File

    outside = pages_outside_docs()
    for path, text in outside.items():
        files.append(File.generated(config, site_path(path), content=with_site_links(text, path)))
    for uri, text in generated_pages().items():
        files.append(File.generated(config, uri, content=text))
    texts = outside | {
        f"docs/{file.src_uri}": Path(file.abs_src_path).read_text(encoding="utf-8")
        for file in files.documentation_pages()
        if file.abs_src_path is not None
    }
    for source, text in texts.items():
        for link in links(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link.partition("#")[0]))
            path = REPOSITORY / target
            if path.is_file() and files.get_file_from_path(site_path(target)) is None:
                files.append(File.generated(config, site_path(target), abs_src_path=str(path)))
    return files


def with_contents(markdown: str) -> str:
    """Markdown with its table of contents before its first section, if it has more than one.

    Example:
        >>> with_contents("# Page\\n\\n## One\\n\\n## Two\\n")
        '# Page\\n\\n[TOC]\\n\\n## One\\n\\n## Two\\n'
    """
    code = [found.span() for found in FENCE.finditer(markdown)]
    starts = [found.start() for found in re.finditer(r"^##+ ", markdown, re.MULTILINE)]
    sections = [start for start in starts if not any(first <= start < last for first, last in code)]
    if len(sections) < 2:
        return markdown
    return f"{markdown[: sections[0]]}[TOC]\n\n{markdown[sections[0] :]}"


def on_page_markdown(markdown: str, *, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Turn the links of pages in docs/ (those of other pages are turned already), and add a table of contents."""
    if page.file.generated_by is None:
        markdown = with_site_links(markdown, f"docs/{page.file.src_uri}")
    return with_contents(markdown)


def with_unbroken(html: str) -> str:
    """HTML whose style sheet can keep the intervals of tables, and the flags in code, in one piece.

    Example:
        >>> with_unbroken("<td>0.5 [0.4, 0.6]</td>")
        '<td>0.5 <span class="unbroken">[0.4, 0.6]</span></td>'
        >>> with_unbroken("<code>train --bf16 false</code>")
        '<code>train <span class="unbroken">--bf16</span> false</code>'
    """
    unbroken = r'<span class="unbroken">\1</span>'
    return CODE.sub(lambda code: FLAG.sub(unbroken, code[0]), INTERVAL.sub(unbroken, html))


def on_page_content(html: str, *, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Mark what no line may break."""
    return with_unbroken(html)


def on_post_page(output: str, *, page: "Page", config: "MkDocsConfig") -> str:
    """Refuse a page that would fetch something from another site."""
    from mkdocs.exceptions import PluginError

    found = FETCHED.search(output)
    if found:
        raise PluginError(
            f"{page.file.src_uri} would fetch something: {found[0]}. Put it into the site, or leave it out."
        )
    return output
