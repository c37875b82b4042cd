"""Read the arguments of a command: `fractal-rm <command> --config file.yaml --any_flag value`.

Flags beat the file. `trl.TrlParser` turns dataclasses into flags. This module turns every mistake (in a flag, a key of
the file, a value) into one sentence that names the place and the nearest known name.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from trl.scripts.utils import TrlParser

from fractal_rm.files import read_yaml

# Least similarity of a name that is worth suggesting.
_ALIKE = 0.5


def parse(command: str, dataclasses: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """One instance of each dataclass, from the flags of a command and its configuration file.

    Raises:
        OSError: If the configuration file cannot be read.
        ValueError: If a flag, a key or a value is wrong.
        SystemExit: After `--help`, with status 0.
    """
    parser = CommandParser(command, dataclasses)
    parser.add_argument("--config", help="YAML file with any of these arguments; flags beat the file.")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    before.error = parser.error
    known, flags = before.parse_known_args(list(argv))
    if known.config is not None:
        parser.read_config(known.config)
    _, remaining = parser.parse_known_args(flags)
    if remaining:
        unknown = remaining[0].partition("=")[0]
        if not unknown.startswith("-"):
            parser.error(f"{unknown!r} stands alone, without a flag before it")
        hint = parser.hint(unknown.lstrip("-").replace("-", "_"))
        raise ValueError(f"fractal-rm {command}: unknown flag {unknown}.{hint}")
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)[: len(dataclasses)]


class CommandParser(TrlParser):
    """A `TrlParser` whose complaints are one sentence each."""

    def __init__(self, command: str, dataclasses: Sequence[type]) -> None:
        super().__init__(
            dataclasses,  # type: ignore[arg-type]
            prog=f"fractal-rm {command}",
            usage=f"fractal-rm {command} [--config file.yaml] [--any_flag value ...]",
            allow_abbrev=False,
        )
        self.advice = f"See `fractal-rm {command} --help`."
        self._removed = {name: advice for kind in dataclasses for name, advice in getattr(kind, "REMOVED", {}).items()}
        self._hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}

    @property
    def names(self) -> list[str]:
        """Every argument there is."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def hint(self, unknown: str) -> str:
        """What to do about an unknown name: what replaced it, the nearest known one, or where to look."""
        if unknown in self._removed:
            return f" It is no longer an option. {self._removed[unknown]}"
        found = difflib.get_close_matches(unknown, self.names, n=1, cutoff=_ALIKE)
        return f" Did you mean `{found[0]}`?" if found else f" {self.advice}"

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it exits."""
        raise ValueError(f"{self.prog}: {' '.join(message.split()).rstrip('.')}. {self.advice}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if advice := self._removed.get(f"{action.dest}={value}"):
            raise argparse.ArgumentError(action, advice)
        super()._check_value(action, value)

    def read_config(self, path: str) -> None:
        """Take the values of a YAML file as defaults, after checking them as flags are checked.

        Raises:
            OSError: If the file is missing.
            ValueError: If the file does not hold a YAML mapping, or a key or value is wrong.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no file. Give `--config` the path of a YAML file.")
        config = read_yaml(path)
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        for key, value in config.items():
            if key not in actions:
                raise ValueError(f"{path}: unknown key {key!r}.{self.hint(str(key))}")
            self.set_defaults(**{key: self._checked(actions[key], value, path)})
            actions[key].required = False

    def _checked(self, action: argparse.Action, value: Any, path: str) -> Any:
        """A value of the file in the type that its flag would give it."""
        hint = self._hints[action.dest]
        kinds = {getattr(kind, "__origin__", kind) for kind in (hint, *get_args(hint))}
        if value is None and (action.default is None or type(None) in kinds):
            return None
        if isinstance(value, dict) and dict in kinds:
            return value
        if isinstance(value, list) and list in kinds:
            return [self._converted(action, item, path) for item in value]
        if isinstance(value, list | dict) or value is None:
            raise ValueError(f"{path}: `{action.dest}` is {value!r}; give a single value. {self.advice}")
        if value is False and "no" in (action.choices or ()):
            return "no"  # YAML reads a bare `no` as false
        value = self._converted(action, value, path)
        return [value] if action.nargs == "+" else value

    def _converted(self, action: argparse.Action, value: Any, path: str) -> Any:
        convert: Any = action.type or str
        if "\0" in str(value):  # which no path and no text of a model can hold
            raise ValueError(f"{path}: `{action.dest}` holds a NUL character. Leave it out.")
        try:
            converted = convert(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(convert, "__name__", "value").replace("string_to_", "")
            raise ValueError(f"{path}: `{action.dest}` is {value!r}, which is no {kind}. {self.advice}") from None
        if action.choices is not None and converted not in action.choices:
            known = f"Choose one of {', '.join(map(str, action.choices))}."
            advice = self._removed.get(f"{action.dest}={converted}", known)
            raise ValueError(f"{path}: `{action.dest}` is {value!r}. {advice}")
        return converted
