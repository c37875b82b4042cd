"""Read the arguments of a command: `fractal-rm <command> --config file.yaml --any_flag value`.

Flags override the file. `trl.TrlParser` turns dataclasses into flags. This module turns every mistake in a flag, a key
or a value into one sentence that names the place and the nearest known name.
"""

import argparse
import os
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from trl.scripts.utils import TrlParser

from fractal_rm.cli.options.help import ALIASES, hint, not_a_choice, read_config, unknown_key, with_aliases
from fractal_rm.files import is_number


def parse(command: str, dataclasses: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """One instance of each dataclass, from a command's flags and configuration file.

    Raises OSError if the file cannot be read, ValueError for a wrong flag, key or value, and SystemExit after `--help`.
    """
    parser = CommandParser(command, dataclasses)
    parser.add_argument("--config", help="YAML file with any of these arguments; flags override it.")
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
            parser.error(f"{unknown!r} has no flag before it")
        hint = parser.hint(unknown.lstrip("-").replace("-", "_"))
        raise ValueError(f"fractal-rm {command}: unknown flag {unknown}.{hint}")
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)[: len(dataclasses)]


def _to_float(text: str) -> float:
    """The number that a text says in decimal digits; NaN and infinity too, which a range refuses by name."""
    if not is_number(text):
        raise ValueError  # argparse says the rest
    return float(text)


def _to_int(text: str) -> int:
    """The whole number that a text says in decimal digits: also `1e3` and `5.0`."""
    number = _to_float(text)
    if not number.is_integer():
        raise ValueError
    return int(number) if {".", "e", "E"} & set(text) else int(text)


def _to_text(text: str) -> str:
    """A text that is not empty, as it is where a variable of a shell script has no value."""
    if not text.strip():
        raise ValueError
    return text


# What flags are read by, and how messages call it.
_READERS = {int: _to_int, float: _to_float, str: _to_text}
_to_int.__name__, _to_float.__name__, _to_text.__name__ = "int", "float", "non-empty text"
# Options for which an empty text has a meaning: no cache.
_MAY_BE_EMPTY = ("embedding_cache",)


class CommandParser(TrlParser):
    """A `TrlParser` whose errors are one sentence each."""

    def __init__(self, command: str, dataclasses: Sequence[type]) -> None:
        super().__init__(
            dataclasses,  # type: ignore[arg-type]
            prog=f"fractal-rm {command}",
            usage=f"fractal-rm {command} [--config file.yaml] [--any_flag value ...]",
            allow_abbrev=False,
        )
        self.command, self.advice = command, f"See `fractal-rm {command} --help`."
        self._removed = {name: advice for kind in dataclasses for name, advice in getattr(kind, "REMOVED", {}).items()}
        self._hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
        for alias, name in ALIASES.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is not None:
                self._option_string_actions |= dict.fromkeys((f"--{alias}", f"--{alias.replace('_', '-')}"), action)
        self._set_choices_of_lists()
        self._set_default_output()
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")  # `-1e-5` is a number, not a flag
        for action in self._actions:
            if action.default != "" and action.dest not in _MAY_BE_EMPTY:
                action.type = _READERS.get(action.type, action.type)  # type: ignore[arg-type]

    def _set_choices_of_lists(self) -> None:
        """Check each item of a list of choices; `transformers` checks single values only."""
        for name, kind in self._hints.items():
            for part in (kind, *get_args(kind)):
                (item,) = get_args(part) if get_origin(part) is list else (None,)
                if get_origin(item) is Literal:
                    action = self._option_string_actions[f"--{name}"]
                    action.type, action.choices = str, get_args(item)

    def _set_default_output(self) -> None:
        """Without `--output_dir` a run gets a new folder, named after the command and the time."""
        action = self._option_string_actions.get("--output_dir")
        if action is None or action.default is not None:
            return
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            action.required = True  # processes that start in different seconds would choose different folders
        else:
            action.default = f"runs/{self.command}-{datetime.now():%Y%m%d-%H%M%S}"

    @property
    def names(self) -> list[str]:
        """Names of all arguments."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def hint(self, unknown: str) -> str:
        """What to do about an unknown name."""
        return hint(self.command, unknown, with_aliases(self.names), self._removed)

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print before it exits."""
        raise ValueError(f"{self.prog}: {' '.join(message.split()).rstrip('.')}. {self.advice}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{self.prog}: {not_a_choice(action.dest, value, action.choices, self._removed)}")

    def read_config(self, path: str) -> None:
        """Make the values of a YAML file the defaults, checked like flags; raises as [`parse`]."""
        config = read_config(path)
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        for key, value in config.items():
            key = ALIASES.get(key, key)
            if key not in actions:
                raise ValueError(unknown_key(self.command, path, key, with_aliases(self.names), self._removed))
            self.set_defaults(**{key: self._checked(actions[key], value, path)})
            actions[key].required = False

    def _checked(self, action: argparse.Action, value: Any, path: str) -> Any:
        """A value of the file, converted to the type of its flag."""
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
        if "\0" in str(value):  # not allowed in paths or text
            raise ValueError(f"{path}: `{action.dest}` holds a NUL character. Leave it out.")
        if convert is _to_text and isinstance(value, float):  # `1.10` has become 1.1
            raise ValueError(f"{path}: `{action.dest}` is the number {value}. Put a text in quotes.")
        try:
            converted = convert(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(convert, "__name__", "value").replace("string_to_", "")
            what = f"{value!r}, which is not of type {kind}"
            raise ValueError(f"{path}: `{action.dest}` is {what}. {self.advice}") from None
        if action.choices is not None and converted not in action.choices:
            raise ValueError(f"{path}: {not_a_choice(action.dest, value, action.choices, self._removed)}")
        return converted
