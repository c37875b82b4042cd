"""The reference of the site: pages from docstrings, and tables from the help of configuration fields.

`python docs/tools/site_reference.py OUTPUT_DIR` writes the pages as Markdown.
"""

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from unittest import mock

import fractal_rm
from fractal_rm.cli.main import COMMANDS, run
from fractal_rm.files import write_atomic

PACKAGE = Path(fractal_rm.__file__).parent
# Targets of links to public names: the short name -> the name that mkdocstrings uses.
PUBLIC = {name: f"fractal_rm.{name}" for name in fractal_rm.__all__ if not name.startswith("__")}
# Commands have a separate page, and the quickstart is a script.
_NO_PAGE = ("__init__",)
# Rooms whose modules have public functions.
_ROOMS = ("objectives", "credit", "data")


def pages() -> dict[str, str]:
    """Every page of the reference: place in the site -> Markdown."""
    found = {"reference/index.md": public_page(), "reference/config.md": config_page()}
    found["reference/commands.md"] = commands_page()
    for path in sorted([*PACKAGE.glob("*.py"), *(path for room in _ROOMS for path in PACKAGE.glob(f"{room}/*.py"))]):
        if path.stem in _NO_PAGE:
            continue
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        module = f"fractal_rm.{place.replace('/', '.')}"
        found[f"reference/{place}.md"] = (
            f"# {path.stem}\n\n[TOC]\n\n::: {module}\n    options:\n      show_root_heading: false\n"
        )
    return found


def public_page() -> str:
    """The names of `import fractal_rm`, from their docstrings; fields of configurations have tables elsewhere."""
    says = "What `import fractal_rm` offers. Every other module is usable by its own name."
    parts = ["# Public names", says, "[TOC]"]
    for name, identifier in PUBLIC.items():
        kind = getattr(fractal_rm, name)
        is_config = is_configuration(kind)
        parts.append(f"::: {identifier}\n    options:\n      heading_level: 2")
        if is_config:
            parts[-1] += "\n      members: false\n      show_signature: false"
            parts.append(f"Its fields: [configuration](config.md#{name.lower()}).")
    return "\n\n".join([*parts, ""])


def config_page() -> str:
    """Tables of the fields that each public configuration adds to the class that it extends."""
    parts = ["# Configuration", "What each class adds; all other fields are those of the class that it extends."]
    for name in PUBLIC:
        kind = getattr(fractal_rm, name)
        if is_configuration(kind):
            ours = [base for base in reversed(kind.__mro__) if base.__module__.startswith("fractal_rm")]
            base = next(base for base in kind.__mro__ if base not in ours)
            parts += [f"## {name}", f"Extends `{base.__module__.split('.')[0]}.{base.__name__}`.", field_table(*ours)]
    return "\n\n".join([*parts, ""])


def commands_page() -> str:
    """For each command what it does, and what its flags say of themselves."""
    parts = [
        "# Commands",
        "`fractal-rm <command> --config file.yaml --any_flag value`: flags beat the file.",
    ]
    for name, says in COMMANDS.items():
        parts += [f"## fractal-rm {name}", says]
        kinds = arguments_of(name)
        ours = [base for kind in kinds if kind.__name__ not in PUBLIC for base in reversed(kind.__mro__)]
        parts.append(field_table(*filter(dataclasses.is_dataclass, ours)))
        parts += [
            f"And every field of [{kind.__name__}](config.md#{kind.__name__.lower()})."
            for kind in kinds
            if kind.__name__ in PUBLIC
        ]
    return "\n\n".join([*parts, ""])


class _Recorded(Exception):
    """The parser was asked for, and its arguments are known."""


def arguments_of(command: str) -> list[type]:
    """The dataclasses that a command reads its arguments into."""
    from fractal_rm.cli.options.parser import CommandParser

    kinds: list[type] = []

    def record(self: CommandParser, name: str, dataclasses: typing.Sequence[type]) -> None:
        kinds.extend(dataclasses)
        raise _Recorded

    with mock.patch.object(CommandParser, "__init__", record):
        try:
            run(command, [])
        except _Recorded:
            return kinds
    raise ValueError(f"`fractal-rm {command}` reads its arguments without `parse`: describe them here.")


def is_configuration(kind: object) -> bool:
    """Whether a public name is a configuration: a dataclass whose own fields describe themselves."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and any("help" in f.metadata for f in own(kind))


def own(kind: type) -> list[dataclasses.Field]:
    """The fields that a dataclass itself declares, in order."""
    return [field for field in dataclasses.fields(kind) if field.name in inspect.get_annotations(kind)]


def field_table(*kinds: type) -> str:
    """A table of the own fields of dataclasses: name, type, default, help.

    Raises:
        ValueError: If a field has no help.
    """
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in own(kind):
            if "help" not in field.metadata:
                raise ValueError(f"`{kind.__name__}.{field.name}` has no help. Give it one: nothing else describes it.")
            cells = (
                f"`{field.name}`",
                type_text(hints[field.name]),
                default_text(field),
                as_cell(field.metadata["help"]),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_cell(text: str) -> str:
    r"""Text as a cell of a table: what stands between backticks stays, an asterisk elsewhere is no emphasis.

    Example:
        >>> print(as_cell("power_* and `a * b | c`"))
        power_\* and `a * b \| c`
    """
    parts = text.replace("|", r"\|").split("`")
    return "`".join(part if number % 2 else part.replace("*", r"\*") for number, part in enumerate(parts))


def type_text(hint: object) -> str:
    """A type as a reader wants it: the choices of a `Literal`, no None.

    Example:
        >>> type_text(typing.Literal["a", "b"] | None), type_text(list[str])
        ('`a`, `b`', '`list[str]`')
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return ", ".join(type_text(one) for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return f"`{hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint}`"


def default_text(field: dataclasses.Field) -> str:
    """The default of a field as code; "required" without one."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "required"


if __name__ == "__main__":
    for place, text in pages().items():
        write_atomic(Path(sys.argv[1]) / place, text)
