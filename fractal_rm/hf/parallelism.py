"""Checks before training for what FSDP and DeepSpeed cannot do here.

With data parallelism (DDP) every process holds complete models and everything works. FSDP and DeepSpeed shard the one
model that `Trainer` prepares; every other model must be complete in every process. `recipes/accelerate/README.md` has
the table.
"""

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn

_FILES = "The files in recipes/accelerate say how."


def check_separate_value_model(trainer: Any) -> None:
    """Raise ValueError if a separate value model would be trained with a sharded policy.

    FSDP's optimizer knows the parameters of one model, and DeepSpeed has one engine for one model.
    """
    engine = _engine(trainer)
    if engine:
        raise ValueError(
            f"`advantage='gae'` trains a value model next to the policy, but {engine} prepares only one model. Use "
            "`advantage='group'` or `advantage='global'`, or launch with multi-GPU data parallelism (DDP)."
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes hold shards of one model, which all of them must gather equally often."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_online_training(trainer: Any) -> None:
    """Raise ValueError if a reward model would be updated while the policy is sharded."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("`rm_update_every` does not work with FSDP and DeepSpeed yet. Use DDP, or set it to 0.")


def check_whole_model(trainer: Any, model: nn.Module, name: str) -> None:
    """Raise ValueError if a process has only part of a scoring model.

    DeepSpeed ZeRO-3 may have partitioned it at load, or FSDP left it empty except in the first process.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{name} was partitioned by DeepSpeed ZeRO-3 while it was loaded, and nothing gathers it for scoring. Set "
            f"`zero3_init_flag: false` in the accelerate configuration. {_FILES}"
        )
    lazily = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1")
    if trainer.is_fsdp_enabled and lazily:
        raise ValueError(
            f"`fsdp_cpu_ram_efficient_loading` leaves the weights of {name} empty except in the first process. Set it "
            f"to false in the accelerate configuration. {_FILES}"
        )


def check_unsharded(trainer: Any) -> None:
    """Raise ValueError if the trained reward model is sharded (FSDP, DeepSpeed ZeRO-3): it could not be saved."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            f"FractalTrainer saves whole scorers, but {_engine(trainer)} shards their weights. Launch with multi-GPU "
            "data parallelism (DDP); train a model too large for that with a `peft_config`."
        )


def _engine(trainer: Any) -> str | None:
    """The name of the engine that shards weights, None without one."""
    return "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
