"""Numbers next to zero, with which a CPU computes many times slower than with others."""

import torch


def flush_subnormals(device: torch.device) -> None:
    """Let the CPU take numbers below 1e-38 as 0.

    A policy that is sure of its tokens has gradients full of them: with small models half of the time of a backward
    pass went into numbers that no update ever shows (docs/speed.md). The setting is PyTorch's own
    (`torch.set_flush_denormal`), holds for the process from here on, and does nothing on a GPU.

    Args:
        device: Where is trained.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)
