"""NaN and infinite values: a training run stops before it trains on them or saves them, and logs leave them out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from fractal_rm.files import replacing


class FiniteTraining(TrainerCallback):
    """Stops training at a NaN or infinite loss or gradient, before the optimizer step.

    The batches of that step are saved in the output folder, `not_finite-<step>-<number>.safetensors`: give one to
    `trainer.compute_loss` to see it again. Under a gradient scaler gradients are not checked, because it skips such
    steps.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.batches: list[dict[str, Any]] = []

    def check_loss(self, loss: Any, batch: dict[str, Any]) -> None:
        """Keep a batch until the optimizer step; raise ValueError if its loss is NaN or infinite."""
        self.batches.append(batch)
        if not loss.isfinite().all():
            self.stop("loss", loss.detach().float().mean().item())

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        if optimizer is None or getattr(self.trainer.accelerator, "scaler", None) is not None:
            return
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if not norm.isfinite():
            self.stop("gradient norm", norm.item())

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.batches.clear()

    def stop(self, what: str, value: float) -> None:
        """Save the batches and raise."""
        step, folder = self.trainer.state.global_step, Path(str(self.trainer.args.output_dir))
        name = f"not_finite-{step}"
        for number, batch in enumerate(self.batches):
            tensors = {key: x.detach().cpu().contiguous() for key, x in batch.items() if isinstance(x, torch.Tensor)}
            process = self.trainer.args.process_index
            with replacing(folder / f"{name}-{process}-{number}.safetensors") as file:
                save_file({key: x.clone() for key, x in tensors.items()}, file)
        self.batches.clear()
        raise ValueError(
            f"The {what} of step {step} is {value}: training diverges, and stops before it corrupts the weights. "
            f"{folder} keeps the batch ({name}-*.safetensors). Lower `learning_rate`, and resume from a checkpoint."
        )


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
