"""Processes that a benchmark starts, kills, or lets finish."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

# A server that has imported everything makes the processes, so that they start at once.
CONTEXT: Any = multiprocessing.get_context("forkserver")


def start(target: Callable[..., Any], *arguments: Any, imported: Sequence[str]) -> Any:
    """A process of [`CONTEXT`] that runs a function.

    Args:
        target: The function, of a module.
        arguments: Its arguments.
        imported: Modules that take long to import.
    """
    CONTEXT.set_forkserver_preload(list(imported))
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: Any, what: str) -> float:
    """Let a process come to its end; the seconds from now on.

    Raises:
        RuntimeError: If it fails.
    """
    began = time.perf_counter()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{what} ended with status {process.exitcode}: see what it said above.")
    return time.perf_counter() - began
