"""Turns this package's docstrings into the form that mkdocstrings reads: section headings and links."""

import re
from typing import Any

import griffe
from site_reference import PUBLIC

_NAMED = re.compile(r"\[`~?(?P<name>[\w.]+)`\]")


def as_mkdocstrings(text: str) -> str:
    """A docstring with `Examples:` for `Example:`, and TRL's links as links of the site, or as names alone.

    Example:
        >>> as_mkdocstrings("See [`FractalTrainer`] and [`~transformers.Trainer`].")
        'See [`FractalTrainer`][fractal_rm.FractalTrainer] and `transformers.Trainer`.'
    """

    def linked(found: re.Match[str]) -> str:
        target = PUBLIC.get(found["name"])
        return f"[`{found['name']}`][{target}]" if target else f"`{found['name']}`"

    return re.sub(r"^Example:$", "Examples:", _NAMED.sub(linked, text), flags=re.MULTILINE)


class DocstringStyle(griffe.Extension):
    """Rewrites every docstring when it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_mkdocstrings(obj.docstring.value)
