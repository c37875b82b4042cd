"""Numbers next to zero, with which a CPU computes many times slower than with others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flush_denormals(device: torch.device) -> Iterator[None]:
    """Let the CPU take numbers below 1e-38 as 0 for a while.

    A policy that is sure of its tokens has gradients full of them: with small models half of the time of a backward
    pass went into numbers that no update ever shows (docs/speed.md). The setting is PyTorch's own
    (`torch.set_flush_denormal`) and the process's, so it is put back afterwards.

    Args:
        device: Where is trained; on a GPU nothing changes.
    """
    if device.type != "cpu" or not _kept():
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _kept() -> bool:
    """Whether subnormal numbers are there: PyTorch does not tell."""
    return bool(torch.tensor([torch.finfo(torch.float32).tiny]) * 0.1 > 0)
