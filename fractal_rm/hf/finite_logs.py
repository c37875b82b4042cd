"""Logs that every tracker and JSON can hold: finite numbers only."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from transformers import Trainer

logger = logging.getLogger(__name__)
# An undefined metric is harmless; if one of these is NaN or infinite, the training diverges.
_VITAL = ("loss", "grad_norm")


class FiniteLogs(Trainer):
    """A trainer that logs finite numbers only; it leaves out all else and warns if the loss is not finite.

    TRL logs None for an unknown number, undefined metrics are NaN, and a diverging training logs NaN. Trackers drop
    these or fail, each in its own way, and strict JSON cannot hold them.
    """

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`; the dictionary itself, which `evaluate` returns, keeps its NaN."""
        kept = finite(logs)
        for name in _VITAL:
            if name in logs and name not in kept:
                logger.warning(
                    "`%s` is %s at step %d: the training diverges. Lower `learning_rate`, or go back to a checkpoint.",
                    name,
                    logs[name],
                    self.state.global_step,
                )
        super().log(kept, start_time)
        logs.update(kept)  # with what `Trainer` adds, such as the epoch


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
