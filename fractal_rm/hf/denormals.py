"""Flush denormals to zero in training: CPUs process them many times slower than other numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flush_denormals(device: torch.device) -> Iterator[None]:
    """Let the CPU round numbers below 1e-38 to 0 inside a `with` block; on a GPU nothing changes.

    The gradients of a policy that is sure of its tokens are full of denormals: small models spent half of the backward
    pass on numbers that change no weight (docs/speed.md). The setting (`torch.set_flush_denormal`) belongs to the whole
    process, so it is restored at the end.
    """
    if device.type != "cpu" or _already_flushed():
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _already_flushed() -> bool:
    """Whether the process flushes denormals now; PyTorch has no function that says so."""
    return not bool(torch.tensor([torch.finfo(torch.float32).tiny]) * 0.1 > 0)
