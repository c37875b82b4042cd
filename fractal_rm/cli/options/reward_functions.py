"""Outcome rewards that `ppo` takes by name: built-in ones, and functions in the user's files and modules.

A name is checked without running any code; the function is loaded once all other arguments are valid.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fractal_rm.tasks import gsm8k
from fractal_rm.tasks.arithmetic import problems as arithmetic
from fractal_rm.tasks.task import Task

NAMED = ("exact_answer", "gsm8k_answer", "verifier")


def check_reward_function(name: str) -> None:
    """Raise unless a name is built in, names a function in a file, or may be a dotted path.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file does not define the function, or the name has none of the three forms.
    """
    if name in NAMED:
        return
    path, colon, function = name.partition(":")
    if colon:
        if not Path(path).is_file():
            raise FileNotFoundError(f"`reward_function={name}`: there is no file {path}. Give FILE.py:FUNCTION.")
        try:
            body = ast.parse(Path(path).read_bytes(), filename=path).body
        except SyntaxError as error:
            raise ValueError(
                f"`reward_function={name}`: {path} is not valid Python (line {error.lineno}: {error.msg}). Fix it."
            ) from None
        defined = [one.name for one in body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        if function not in defined:
            raise ValueError(
                f"`reward_function={name}`: {path} does not define the function {function!r}. "
                f"It defines {', '.join(defined) or 'no function'}."
            )
    elif "." not in name or not all(part.isidentifier() for part in name.split(".")):
        near = difflib.get_close_matches(name, NAMED, n=1)
        advice = f"Did you mean `{near[0]}`? Or give" if near else f"Give one of {', '.join(NAMED)}, or"
        raise ValueError(f"`reward_function` is {name!r}. {advice} FILE.py:FUNCTION, or PACKAGE.MODULE.FUNCTION.")


def load_reward_function(name: str, task: Task | None = None, answers: str = "marked") -> Callable[..., Any]:
    """The reward function of a name that [`check_reward_function`] accepts.

    `task` checks answers for `verifier`; `answers` says what counts as an answer for `gsm8k_answer`.

    Raises:
        ImportError: If its module, or a package that it needs, cannot be imported.
        ValueError: If its module has no such function.
    """
    if name == "verifier" and task is not None:
        return task.outcome
    if name == "exact_answer":
        return arithmetic.exact_answer
    if name == "gsm8k_answer":
        reward = gsm8k.last_number_answer if answers == "last_number" else gsm8k.gsm8k_answer
        reward([], [], [])  # raises now, not after the first rollout, if math-verify is missing
        return reward
    path, colon, function = name.partition(":")
    if colon:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None  # the file ends in .py, or was read as Python
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        path, _, function = name.rpartition(".")
        sys.path.insert(0, str(Path.cwd()))  # as `trl grpo --reward_funcs` does
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"`reward_function={name}`: {error}. Check the path, or give FILE.py:FUNCTION."
            ) from error
        finally:
            sys.path.remove(str(Path.cwd()))
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"`reward_function={name}`: {path} has no function {function!r}. Check the name.")
    return found
