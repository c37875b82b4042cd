"""`fractal-rm <command>`: parse, call, print.

The exit status is 0, or one sentence on standard error says what was wrong, where, and what to do. Only bugs show a
traceback.
"""

import errno
import importlib
import linecache
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fractal_rm import __version__
from fractal_rm.cli.options.help import check_arguments, full_help, short_help
from fractal_rm.errors import did_you_mean
from fractal_rm.interrupts import SIGNALS, Interrupted, handled, interrupt

BAD_INPUT = 2
# Packages that raise errors about their input. An error raised elsewhere is a bug.
_COMPLAINANTS = ("fractal_rm", "transformers", "trl", "peft", "datasets", "huggingface_hub", "accelerate")
# Errors of the system about a full disk, a quota, or the largest size of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Each command is the function of that name in the module of that name.
COMMANDS = {
    "quickstart": "Run the whole pipeline on arithmetic word problems: CPU, minutes, no network.",
    "doctor": "Before a run: check versions, the device, and how models read your rows.",
    "plan": "Before a run: estimate its memory and hours on a GPU, without loading a model.",
    "sample": "Sample a policy's responses to prompts, and label them by their answers.",
    "train": "Train a step reward model from response labels.",
    "score": "Score the steps of the responses in a file.",
    "evaluate": "Evaluate one or two step reward models on labelled responses or a benchmark.",
    "ppo": "Train a policy with PPO on step rewards, outcome rewards, or both.",
    "compare": "Compare step rewards with the outcome alone on arithmetic, over paired seeds.",
    "serve": "Serve step scores over HTTP.",
    "report": "Make tables from a results.jsonl, or curves from PPO runs.",
}
_ERASED_LINE = "\r\033[K"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# What an interrupted command keeps and how to continue. For `train` and `ppo` it depends on checkpoints: they say so.
_GO_ON = {
    "quickstart": "Finished stages are kept; the same command continues with the others.",
    "compare": "Finished runs are kept; the same command continues with the others.",
    "score": "Scores so far are kept; the same command continues.",
    "evaluate": "Scores so far are kept; the same command continues.",
    "sample": "Responses so far are kept; the same command continues.",
}


def usage() -> str:
    """What `fractal-rm --help` prints."""
    lines = [f"  {name:<12}{says}" for name, says in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fractal-rm <command> [--config file.yaml] [--any_flag value ...]",
            "",
            "Labels on whole responses go in; a reward model that scores every step comes out.",
            "",
            *lines,
            "",
            "`fractal-rm <command> --help` shows the options that people change, `--help all` every one.",
        ]
    )


def run(command: str, argv: Sequence[str]) -> None:
    """Import the module of one command and call it with its arguments."""
    with loading():
        module = importlib.import_module(f"fractal_rm.cli.{command}")
    getattr(module, command)(argv)


@contextmanager
def loading() -> Iterator[None]:
    """Show on a terminal that libraries are loading, which takes seconds; the line is erased afterwards."""
    shown = sys.stderr.isatty()
    if shown:
        print("Loading libraries ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(_ERASED_LINE, end="", file=sys.stderr, flush=True)


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is about the input, not a bug.

    True for errors of the operating system, and for those raised by a package that checks its input.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | TypeError | ImportError | KeyError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename).parts
    raised = linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise ")
    return raised and any(package in path for package in _COMPLAINANTS)


def _check_processes() -> None:
    """Raise ValueError unless a launcher's variables, which libraries read at import, are numbers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not value.removeprefix("-").isdecimal():
            raise ValueError(
                f"The environment variable {name} is {value!r}. Unset it, or start with `accelerate launch`, which "
                "sets it."
            )


def sentence(error: BaseException) -> str:
    """The printed form of an error about the input; errors of the operating system get their path and advice.

    Control characters, which a name in a file may hold, are shown as escapes: a terminal would obey them.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], _sentence(error))


def _sentence(error: BaseException) -> str:
    full = isinstance(error, OSError) and error.errno in _FULL
    if not isinstance(error, OSError) or error.strerror is None or not (full or error.filename is not None):
        told = error.args[0] if isinstance(error, KeyError) else error
        text = " ".join(str(told).split()).removeprefix("fractal-rm ")
        return text if text.endswith((".", "?", "!", ")")) else f"{text}."
    place = "" if error.filename is None else f"{error.filename or repr('')}: "
    advice = "Free space" if full else "Check the path and its permissions"
    return f"{place}{error.strerror}. {advice}, and run the command again."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` starts with; default: the arguments of the process.

    Returns:
        Exit status: 0, 1 if `doctor` finds a fault, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print(usage(), file=sys.stderr)
        return BAD_INPUT
    name, *rest = argv
    if name in ("-h", "--help", "--version"):
        print(f"fractal-rm {__version__}" if name == "--version" else usage())
        return 0
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda message, *where, **line: f"Warning: {message}\n"
    try:
        if name not in COMMANDS:
            advice = did_you_mean(name, COMMANDS, f" Choose one of {', '.join(COMMANDS)}.")
            raise ValueError(f"Unknown command {name!r}.{advice}")
        if "--help" in rest or "-h" in rest:
            page = full_help if "all" in rest else short_help
            print(page(name, COMMANDS[name]))
            return 0
        _check_processes()
        check_arguments(name, rest)  # before the seconds that imports take
        with warnings.catch_warnings():
            # Users can change neither: TRL passes an argument that transformers has renamed, and a default of
            # transformers has no effect without a GPU.
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing.* is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
            with handled(interrupt):
                run(name, rest)
        return 0
    except SystemExit as end:  # argparse after --help, `doctor`
        return int(end.code or 0)
    except KeyboardInterrupt as end:
        told = end if isinstance(end, Interrupted) else Interrupted(SIGNALS[0])
        then = _GO_ON.get(name) or told.then or "The same command starts again."
        print(f"{told.message} {then}", file=sys.stderr)
        return told.status
    except Exception as error:
        if not is_bad_input(error):
            raise
        print(f"fractal-rm: {sentence(error)}", file=sys.stderr)
        return BAD_INPUT
    finally:
        warnings.formatwarning = formatwarning


if __name__ == "__main__":
    sys.exit(main())
