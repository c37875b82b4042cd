"""What a trainer may log: numbers that every tracker and JSON can hold."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)
# That a metric is not defined is nothing to worry about; that one of these is not a number is.
_VITAL = ("loss", "grad_norm")


def log_finite(
    log: Callable[[dict[str, float], float | None], None],
    logs: dict[str, float],
    start_time: float | None,
    *,
    step: int,
) -> None:
    """Log what is a finite number, leave out the rest, and warn of a loss that is not finite at an optimizer step.

    TRL logs None where a number is not known, metrics are NaN where they are not defined, and a training that diverges
    logs NaN: each tracker drops these or fails in its own way, and strict JSON has none of them. `logs`, which
    `evaluate` returns, keeps its NaN and gets what `log`, that of the class above, adds.
    """
    kept = finite(logs)
    for name in _VITAL:
        if name in logs and name not in kept:
            logger.warning(
                "`%s` is %s at step %d: the training diverges. Lower `learning_rate`, or go back to a checkpoint.",
                name,
                logs[name],
                step,
            )
    log(kept, start_time)
    logs.update(kept)


def finite(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are finite numbers, as plain Python ones.

    Example:
        >>> import numpy as np
        >>> finite({"loss": np.float32(0.5), "steps": 3, "kl": None, "auc": float("nan"), "ratio": float("inf")})
        {'loss': 0.5, 'steps': 3}
    """
    # Scalars of numpy and torch have no axes.
    plain = {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in logs.items()}
    return {name: value for name, value in plain.items() if isinstance(value, int | float) and math.isfinite(value)}
