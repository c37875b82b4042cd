"""Processes that share a batch: what a process must know of the rows of the others.

A rollout or batch is split into consecutive rows, equally many for each process. Means and deviations are taken over
the whole batch, and completions of one prompt may lie in several processes. With one process, every function returns
its input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

Row = TypeVar("Row")


def rows_of_all(rows: Sequence[Row]) -> tuple[list[Row], slice]:
    """The rows of all processes in order, and the slice of them that belongs to this process.

    Args:
        rows: Plain values of this process; every process has equally many.
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


def mean_terms(terms: Mapping[str, Tensor], names: Sequence[str], accelerator: Accelerator) -> dict[str, Tensor]:
    """The mean of each loss term over the batch that all processes share.

    A term may apply to different numbers of rows in each process, down to none. Gradients are averaged over processes,
    so each mean is this process's sum, divided by the count of all processes, times the number of processes.

    Args:
        terms: The values of each term in this process.
        names: Every term that some process may have: the same list in all.
        accelerator: The trainer's.
    """
    if accelerator.num_processes == 1:
        return {name: term.mean() for name, term in terms.items()}
    counts = [float(terms[name].numel()) if name in terms else 0.0 for name in names]
    everyone: Any = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="mean")
    shares = dict(zip(names, everyone, strict=True))
    return {name: term.sum() / shares[name].clamp(min=1.0 / accelerator.num_processes) for name, term in terms.items()}


def share_metrics(metrics: dict[str, list[float]]) -> None:
    """Extend each process's lists of numbers to log by the numbers of all others: every process logs the same mean."""
    everyone: list[dict[str, list[float]]] = gather_object([dict(metrics)])
    for name in dict.fromkeys(name for one in everyone for name in one):
        metrics[name] = [value for one in everyone for value in one.get(name, [])]


def logged_means(terms: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The mean of each term over the values of all processes since the last log."""
    here = {name: (float(sum(part.sum() for part in parts)), sum(map(len, parts))) for name, parts in terms.items()}
    everyone = gather_object([here])
    names = dict.fromkeys(name for one in everyone for name in one)
    means = {}
    for name in names:
        totals = [one[name] for one in everyone if name in one]
        means[name] = sum(total for total, _ in totals) / max(sum(count for _, count in totals), 1)
    return means
