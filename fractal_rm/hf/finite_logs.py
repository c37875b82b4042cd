"""Filters what a trainer logs: only numbers that every tracker and JSON support."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)
# An undefined metric is harmless; NaN in one of these is not.
_VITAL = ("loss", "grad_norm")


def log_finite(
    log: Callable[[dict[str, float], float | None], None],
    logs: dict[str, float],
    start_time: float | None,
    *,
    step: int,
) -> None:
    """Log finite numbers, leave out the rest, and warn about a NaN or infinite loss at an optimizer step.

    TRL logs None for unknown numbers, undefined metrics are NaN, and diverging training logs NaN. Each tracker drops
    these or fails in its own way, and strict JSON does not allow them. `logs`, which `evaluate` returns, keeps its NaN
    and gets what the parent class's `log` adds.
    """
    kept = finite(logs)
    for name in _VITAL:
        if name in logs and name not in kept:
            logger.warning(
                "`%s` is %s at step %d: training diverges. Lower `learning_rate`, or go back to a checkpoint.",
                name,
                logs[name],
                step,
            )
    log(kept, start_time)
    logs.update(kept)


def finite(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are finite numbers, as plain Python numbers.

    Example:
        >>> import numpy as np
        >>> finite({"loss": np.float32(0.5), "steps": 3, "kl": None, "auc": float("nan"), "ratio": float("inf")})
        {'loss': 0.5, 'steps': 3}
    """
    # NumPy and torch scalars have no axes.
    plain = {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in logs.items()}
    return {name: value for name, value in plain.items() if isinstance(value, int | float) and math.isfinite(value)}
