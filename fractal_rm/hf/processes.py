"""Multi-process batches: what a process must know about the rows of the others.

A rollout or batch is split into consecutive rows, with the same number per process. Means and deviations are computed
over the whole batch, and completions of one prompt may be on several processes. With one process, every function
returns its input.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

Row = TypeVar("Row")


def rows_of_all(rows: Sequence[Row]) -> tuple[list[Row], slice]:
    """The rows of all processes in order, and the slice of them that belongs to this process.

    Args:
        rows: Plain values of this process; every process has the same number.
    """
    first = PartialState().process_index * len(rows)
    return gather_object(list(rows)), slice(first, first + len(rows))


def masks_of_all(mask: Tensor, accelerator: Accelerator) -> Tensor:
    """The masks (B, T) of all processes in order, padded with False to the longest."""
    padded: Any = accelerator.pad_across_processes(mask.int(), dim=1)
    gathered: Any = accelerator.gather(padded)
    return gathered.bool()


def all_reduce(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """A function that adds up a tensor over all processes."""

    def summed(total: Tensor) -> Tensor:
        everyone: Any = accelerator.reduce(total, reduction="sum")
        return everyone

    return summed


def share_metrics(metrics: dict[str, list[float]]) -> None:
    """Extend each process's lists of numbers to log by all other processes' numbers, so that all log the same mean."""
    everyone: list[dict[str, list[float]]] = gather_object([dict(metrics)])
    for name in dict.fromkeys(name for one in everyone for name in one):
        metrics[name] = [value for one in everyone for value in one.get(name, [])]
