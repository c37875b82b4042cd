"""Help and unknown names, answered without importing the libraries that options configure.

Importing torch, transformers and TRL takes seconds. The options of a command are therefore read from the source of the
dataclasses that it parses, TRL's and transformers' included: names, defaults, choices and help have no second list.
"""

import ast
import functools
import importlib.util
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fractal_rm.errors import did_you_mean, wrong_choice
from fractal_rm.files import is_number, read_yaml

# The most used options by group, for `fractal-rm <command> --help`. Other commands show all options.
COMMON: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "model": ("model", "scorer", "aggregation", "segmentation", "max_length", "use_peft", "lora_r"),
        "data": ("train_file", "eval_file", "test_file", "dataset_name", "dataset_format", "label_column", "limit"),
        "labels": ("missed_good", "missed_bad", "instance_weight", "pseudo_labels"),
        "learning": (
            "learning_rate", "head_learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
            "gradient_accumulation_steps", "bf16", "seed",
        ),
        "output": (
            "output_dir", "overwrite_output_dir", "logging_steps", "eval_strategy", "save_steps",
            "resume_from_checkpoint", "report_to",
        ),
    },
    "doctor": {
        "model": ("model", "reward_model", "published"),
        "data": ("train_file", "dataset_name", "dataset_format", "prompt_column", "response_column", "limit"),
        "plan": (
            "gpu", "use_peft", "lora_r", "value_model", "reference", "dtype", "prompt_length", "max_completion_length",
            "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "use_vllm", "max_steps",
        ),
    },
    "sample": {
        "model": ("model", "chat", "max_new_tokens", "dtype", "batch_size"),
        "data": ("task", "task_name", "split", "train_file", "dataset_name", "num_prompts", "skip_prompts"),
        "responses": ("samples", "greedy", "answers", "gold_steps", "seed"),
        "output": ("output",),
    },
    "score": {
        "model": ("model", "published", "compare_to", "batch_size"),
        "data": ("input", "dataset_format", "prompt_column", "response_column", "label_column", "limit"),
        "output": ("output", "html", "show"),
    },
    "evaluate": {
        "model": ("model", "published", "compare_to", "outcome_model", "batch_size"),
        "data": (
            "data", "benchmark", "dataset_format", "split", "data_dir", "label_column", "limit", "seed",
        ),
        "metrics": ("threshold_file", "tune_on", "answer_pattern"),
        "output": ("output",),
    },
    "ppo": {
        "model": ("model", "value_model", "use_peft", "lora_r"),
        "data": ("task", "train_file", "eval_file", "dataset_name", "prompt_column", "num_problems"),
        "rewards": ("reward_model", "reward_function", "step_weight", "outcome_weight", "shaping", "on_alarm"),
        "learning": (
            "advantage", "learning_rate", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "num_generations", "max_completion_length", "temperature", "beta", "use_vllm", "bf16", "seed",
        ),
        "output": (
            "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "page_steps",
            "resume_from_checkpoint", "report_to",
        ),
    },
}  # fmt: skip
# Names in TRL's scripts of options that have another name here.
ALIASES = {
    "model_name_or_path": "model",
    "reward_model_name_or_path": "reward_model",
    "reward_funcs": "reward_function",
}
# Help of other libraries' options whose own text is vague or too long for one line.
PLAIN = {
    "learning_rate": "Initial learning rate",
    "num_train_epochs": "Passes over the data",
    "max_steps": "Updates, instead of `num_train_epochs`",
    "gradient_accumulation_steps": "Batches per update",
    "num_generations": "Completions of each prompt",
    "max_completion_length": "Maximum tokens of a completion",
    "use_vllm": "Generate completions with vLLM",
    "bf16": "Mixed precision in bfloat16",
    "seed": "Random seed",
    "output_dir": "Folder of model, metrics and checkpoints",
    "logging_steps": "Updates between two lines of the log",
    "eval_strategy": "When to evaluate: no, steps, epoch",
    "save_steps": "Updates between two checkpoints",
    "resume_from_checkpoint": "Continue: `true`, or a checkpoint's folder",
    "report_to": "Where to log, such as wandb",
}
# Narrowest and widest page, the width of the flags, and the lines of a screen.
_NARROW, _WIDE, _FLAGS, SCREEN = 80, 120, 34, 50
_OURS = "fractal_rm"
# Annotations of options that take numbers, and their names in messages.
_NUMBER = re.compile(r"(?:list\[)?(int|float)\]?(?: \| None)?")
_NUMBERS = {"int": "a whole number", "float": "a number"}
# How much of an option's help is shown: all, its first sentence, or one line.
_Detail = Literal["whole", "sentence", "line"]


class Option(NamedTuple):
    """One option of a command, read from the source of its dataclass."""

    name: str
    help: str
    default: str  # as shown; empty: none
    required: bool
    choices: tuple[str, ...]
    is_list: bool
    number: str  # "a number" or "a whole number"; empty: something else
    owner: str  # `package.Class`


class Options(NamedTuple):
    """The options of a command."""

    options: tuple[Option, ...]
    removed: Mapping[str, str]  # options of earlier versions: what to use instead
    complete: bool  # False if a library comes without its source

    @property
    def names(self) -> list[str]:
        """All names that flags and keys may have."""
        return with_aliases([option.name for option in self.options])


# Help -----------------------------------------------------------------------------------------------------------------


def short_help(command: str, says: str) -> str:
    """One screen: what the command does, and its most used options."""
    known = {option.name: option for option in options_of(command).options}
    groups = COMMON.get(command, {"options": tuple(known)})
    rest = len(known) - sum(map(len, groups.values()))
    more = f"`fractal-rm {command} --help all` {f'lists {rest} more' if rest else 'explains them in full'}."

    def page(detail: _Detail) -> list[str]:
        lines = [_usage(command), "", says]
        for title, names in groups.items():
            lines += ["", f"{title}:", *(line for name in names for line in _lines(known[name], detail))]
        return [*lines, "", f"{more} --config reads a YAML file; flags beat it."]

    pages = (page(detail) for detail in ("whole", "sentence", "line"))
    return "\n".join(next((lines for lines in pages if len(lines) <= SCREEN), page("line")))


def full_help(command: str, says: str) -> str:
    """Every option with its full help, this package's first."""
    groups: dict[str, list[Option]] = {}
    for option in options_of(command).options:
        groups.setdefault(option.owner, []).append(option)
    lines = [_usage(command), "", says]
    for owner in sorted(groups, key=lambda owner: not owner.startswith(_OURS)):
        lines += ["", f"{owner}:"]
        for option in groups[owner]:
            names = ", ".join(f"--{name}" for name in with_aliases([option.name]))
            choices = f" {{{','.join(option.choices)}}}" if option.choices else ""
            default = "  (required)" if option.required else f"  [{option.default}]" if option.default else ""
            lines.append(f"  {names}{choices}{default}")
            lines += textwrap.wrap(option.help, _width(), initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _usage(command: str) -> str:
    return f"usage: fractal-rm {command} [--config file.yaml] [--any_flag value ...]"


def _lines(option: Option, detail: _Detail) -> list[str]:
    """An option's flag, its help or the start of it, and its default in brackets."""
    shown = "" if option.default == "false" else option.default
    default = " (required)" if option.required else f" [{shown}]" if shown else ""
    text = option.help if option.owner.startswith(_OURS) else PLAIN.get(option.name, option.help)
    if detail != "whole":
        text = text.partition(". ")[0].partition("; ")[0]
    text, cut = text.rstrip("."), detail == "line"
    flag = f"  --{option.name} ".ljust(_FLAGS)
    room = _width() - len(flag)
    if option.choices and detail == "whole":
        sentence, dot, rest = text.partition(". ")
        if any(choice not in text for choice in option.choices):
            text = f"{sentence}: {', '.join(option.choices)}{dot}{rest}"
    elif option.choices:
        sentence = text.partition(": ")[0]
        text = f"{sentence}: {', '.join(option.choices)}"
        if cut and len(f"{sentence}: {option.choices[0]}, ...{default}") > room:
            text = sentence  # `--help all` lists the choices
    if cut:
        return [flag + textwrap.shorten(text, room - len(default), placeholder=" ...") + default]
    first, *others = textwrap.wrap(text + default, room, break_long_words=False, break_on_hyphens=False)
    return [flag + first, *(" " * len(flag) + line for line in others)]


def _width() -> int:
    return min(max(shutil.get_terminal_size((_NARROW, 24)).columns, _NARROW), _WIDE)


# Unknown names and choices --------------------------------------------------------------------------------------------


def check_arguments(command: str, argv: Sequence[str]) -> None:
    """Raise ValueError for an unknown flag, key of the configuration file or choice, with the closest known name, and
    for a flag whose value should be a number and is none.

    Raises OSError if the configuration file is missing.
    """
    known = options_of(command)
    if not known.complete:
        return  # the parser reports it later
    names, chosen = {*known.names, "config"}, {option.name: option for option in known.options if option.choices}
    numbers = {option.name: option for option in known.options if option.number}
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or not name or " " in flag:
            continue
        if name not in names and name.removeprefix("no_") not in names:
            raise ValueError(
                f"fractal-rm {command}: unknown flag {flag}.{hint(command, name, known.names, known.removed)}"
            )
        given = [value] if equals else list(takewhile(lambda word: not word.startswith("-"), argv[place + 1 :]))
        if name == "config":
            for path in given[:1]:
                config = read_config(path)
                for key in config.keys() - names:
                    raise ValueError(unknown_key(command, path, key, known.names, known.removed))
                for key in config.keys() & chosen.keys():
                    values = config[key] if isinstance(config[key], list) else [config[key]]
                    _check_choices(path, chosen[key], values, known.removed)
        elif name in chosen:
            _check_choices(f"fractal-rm {command}", chosen[name], given, known.removed)
        elif name in numbers:
            for one in given if numbers[name].is_list else given[:1]:
                if not is_number(one):
                    raise ValueError(f"fractal-rm {command}: `{name}` is {one!r}. Give {numbers[name].number}.")


def _check_choices(place: str, option: Option, given: Sequence[object], removed: Mapping[str, str]) -> None:
    """Raise ValueError if a text is not one of the option's choices; the parser checks everything else."""
    for value in given if option.is_list else given[:1]:
        if isinstance(value, str) and value not in option.choices:
            raise ValueError(f"{place}: {not_a_choice(option.name, value, option.choices, removed)}")


def not_a_choice(name: str, value: object, choices: Iterable[object], removed: Mapping[str, str]) -> str:
    """The error message for a value that an option does not accept, or no longer."""
    advice = removed.get(f"{name}={value}")
    return wrong_choice(name, value, choices) if advice is None else f"`{name}` is {value!r}. {advice}"


def with_aliases(names: Sequence[str]) -> list[str]:
    """Names, with the aliases that TRL's scripts have for some of them."""
    return [*names, *(alias for alias, name in ALIASES.items() if name in names)]


def unknown_key(command: str, path: str, key: object, names: Iterable[str], removed: Mapping[str, str]) -> str:
    """The error message for an unknown key of a configuration file."""
    return f"{path}: unknown key {key!r}.{hint(command, str(key), names, removed)}"


def hint(command: str, unknown: str, names: Iterable[str], removed: Mapping[str, str]) -> str:
    """Advice for an unknown name: its replacement, the closest known name, or the help."""
    if unknown in removed:
        return f" It is no longer an option. {removed[unknown]}"
    return did_you_mean(unknown, names, f" See `fractal-rm {command} --help`.")


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises FileNotFoundError, or ValueError as [`read_yaml`]."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}. Give `--config` the path of a YAML file.")
    return read_yaml(path)


# Options, read from source --------------------------------------------------------------------------------------------


class _Module(NamedTuple):
    name: str
    tree: ast.Module
    is_package: bool


class _Unreadable(Exception):
    """A value that is known only at run time."""


@functools.cache
def options_of(command: str) -> Options:
    """The options of the dataclasses that a command's module passes to `parse`, in order."""
    module = _module(f"{_OURS}.cli.{command}")
    assert module is not None
    kinds = next(
        [item.id for item in node.args[1].elts if isinstance(item, ast.Name)]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "parse"
        if isinstance(node.args[1], ast.List)
    )
    found: dict[str, Option] = {}
    removed: dict[str, str] = {}
    complete = all([_read_class(module, kind, found, removed) for kind in kinds])
    return Options(tuple(found.values()), removed, complete)


def _read_class(module: _Module, name: str, found: dict[str, Option], removed: dict[str, str]) -> bool:
    """Add the fields of a dataclass and its bases to `found`, and its removed options to `removed`; False if a base has
    no source."""
    place = _definition(module, name)
    if place is None or not isinstance(node := place[1], ast.ClassDef):
        return False
    module = place[0]
    complete = all([_read_class(module, ast.unparse(base), found, removed) for base in reversed(node.bases)])
    scope = {
        target.id: one.value
        for one in node.body
        if isinstance(one, ast.Assign)
        for target in one.targets
        if isinstance(target, ast.Name)
    }
    if "REMOVED" in scope:
        removed |= _value(module, scope["REMOVED"], scope)
    owner = f"{module.name.partition('.')[0]}.{node.name}"
    for one in node.body:
        match one:
            case ast.AnnAssign(target=ast.Name(id=field)) if "ClassVar" not in ast.unparse(one.annotation):
                found[field] = _option(module, one, field, scope, owner)
    return complete


def _option(module: _Module, node: ast.AnnAssign, name: str, scope: Mapping[str, ast.expr], owner: str) -> Option:
    given: dict[str, ast.expr] = {} if node.value is None else {"default": node.value}
    if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith("field"):
        given = {keyword.arg or "": keyword.value for keyword in node.value.keywords}
    metadata = _readable(module, given.get("metadata"), scope) or {}
    default = _readable(module, given.get("default"), scope)
    shown = "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return Option(
        name,
        " ".join(str(metadata.get("help") or "").replace("%%", "%").split()),
        shown,
        not given.keys() & {"default", "default_factory"},
        tuple(map(str, metadata.get("choices") or ())) or _choices(module, node.annotation),
        ast.unparse(node.annotation).startswith("list["),
        _NUMBERS.get(match[1], "") if (match := _NUMBER.fullmatch(ast.unparse(node.annotation))) else "",
        owner,
    )


def _choices(module: _Module, node: ast.expr) -> tuple[str, ...]:
    """The choices of an annotation that is a `Literal` or an enumeration, else ().

    The annotation may be an alias, a list of choices, or a union with None or text.
    """
    if isinstance(node, ast.BinOp):
        parts = ast.unparse(node).split(" | ")
        if "str" in parts and any("[" in part for part in parts):
            return ()  # any text, unless the other part is an enumeration
        return _choices(module, node.left) or _choices(module, node.right)
    if isinstance(node, ast.Name):
        match _definition(module, node.id):
            case (there, ast.Subscript() as alias):
                return _choices(there, alias)
            case (_, ast.ClassDef(bases=[base]) as kind) if ast.unparse(base).endswith("Enum"):
                values = [one.value for one in kind.body if isinstance(one, ast.Assign)]
                return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))
        return ()
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "list":
        return _choices(module, node.slice)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return tuple(str(_value(module, value, {})) for value in values)
    return ()


def _readable(module: _Module, node: ast.expr | None, scope: Mapping[str, ast.expr]) -> Any:
    """The value of an expression; None without one, or if it is known only at run time."""
    try:
        return None if node is None else _value(module, node, scope)
    except _Unreadable:
        return None


def _value(module: _Module, node: ast.AST, scope: Mapping[str, ast.expr]) -> Any:
    """The value of an expression in a field: a literal, a name, or text put together."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if node.id in scope:
            return _value(module, scope[node.id], scope)
        case ast.Name() if (place := _definition(module, node.id)) is not None:
            return _value(*place, {})
        case ast.JoinedStr():
            return "".join(str(_value(module, part, scope)) for part in node.values)
        case ast.FormattedValue():
            return _value(module, node.value, scope)
        case ast.BinOp(op=ast.Add()):
            return _value(module, node.left, scope) + _value(module, node.right, scope)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(module, node.operand, scope)
        case ast.List() | ast.Tuple():
            return [_value(module, item, scope) for item in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {_value(module, k, scope): _readable(module, v, scope) for k, v in pairs if k is not None}
        case ast.Call(func=ast.Attribute(attr="fromkeys")):
            return dict.fromkeys(*(_value(module, item, scope) for item in node.args))
        case ast.Call(func=ast.Attribute(attr="join", value=separator)):
            return _value(module, separator, scope).join(_value(module, node.args[0], scope))
    raise _Unreadable


@functools.cache
def _module(name: str) -> _Module | None:
    """A module by its dotted name, without importing it or its packages; None if there is no source."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(spec.submodule_search_locations[0], *rest)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return _Module(name, ast.parse(path.read_bytes()), path.name == "__init__.py")
    return None


def _definition(module: _Module, name: str) -> tuple[_Module, ast.AST] | None:
    """Where a name of a module is defined, and its class or expression; follows imports."""
    for node in _statements(module.tree.body):
        match node:
            case ast.ClassDef() if node.name == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)) if (
                target == name
            ):
                return None if node.value is None else (module, node.value)
            case ast.ImportFrom():
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        there = _module(_absolute(module, node))
                        return None if there is None else _definition(there, alias.name)
    return None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, including those inside `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _absolute(module: _Module, node: ast.ImportFrom) -> str:
    """The module that a `from` statement names."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*package, *filter(None, [node.module])])
