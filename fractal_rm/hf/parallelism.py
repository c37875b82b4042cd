"""What works when weights are spread over processes, and what is refused before training.

With data parallelism (DDP) every process holds whole models and everything works. FSDP and DeepSpeed hold one model in
pieces, the one that `Trainer` prepares. A model beside it must be whole in every process or not be there:
`recipes/accelerate/README.md` has the table.
"""

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn

_FILES = "The files in recipes/accelerate say how."


def check_separate_value_model(trainer: Any) -> None:
    """Raise if a value model of its own is to be trained beside a policy that is not whole in every process.

    Args:
        trainer: A `transformers.Trainer`.

    Raises:
        ValueError: Under FSDP, whose optimizer knows the parameters of one model, and under DeepSpeed, which has one
            engine for one model.
    """
    engine = _engine(trainer)
    if engine:
        raise ValueError(
            f"`advantage='gae'` trains a value model beside the policy, and {engine} prepares one model. "
            "Use `advantage='group'` or `advantage='global'`, or launch with multi-GPU data parallelism (DDP)."
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes hold parts of one model, which all of them have to gather equally often."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_online_training(trainer: Any) -> None:
    """Raise if a reward model is to go on learning beside a policy in pieces.

    Args:
        trainer: A `transformers.Trainer`.

    Raises:
        ValueError: Under FSDP and DeepSpeed.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("`rm_update_every` does not work with FSDP and DeepSpeed yet. Use DDP, or set it to 0.")


def check_whole_model(trainer: Any, model: nn.Module, name: str) -> None:
    """Raise if a model that only scores was not loaded as a whole in every process.

    Args:
        trainer: A `transformers.Trainer`.
        model: The model.
        name: What it is, for the sentence.

    Raises:
        ValueError: If DeepSpeed ZeRO-3 has partitioned it while it was loaded, or FSDP has left it empty in all
            processes but the first.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{name} was partitioned by DeepSpeed ZeRO-3 while it was loaded, and nothing puts it together to score. "
            f"Set `zero3_init_flag: false` in the accelerate configuration. {_FILES}"
        )
    lazily = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1")
    if trainer.is_fsdp_enabled and lazily:
        raise ValueError(
            f"`fsdp_cpu_ram_efficient_loading` leaves the weights of {name} empty in all processes but the first. "
            f"Set it to false in the accelerate configuration. {_FILES}"
        )


def check_unsharded(trainer: Any) -> None:
    """Raise if the weights of a reward model in training would be in pieces when it is saved.

    Args:
        trainer: A `transformers.Trainer`.

    Raises:
        ValueError: Under FSDP and under DeepSpeed ZeRO-3.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ValueError(
            f"FractalTrainer saves whole scorers, and {_engine(trainer)} holds their weights in pieces. Launch with "
            "multi-GPU data parallelism (DDP); a model too large for that is trained with a `peft_config`."
        )


def _engine(trainer: Any) -> str | None:
    """The name of what holds weights in pieces, if anything does."""
    return "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
