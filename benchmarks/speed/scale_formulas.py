"""Memory and time of PPO with step rewards on many GPUs: formulas, each with its source. `scale_plan.py` uses them.

Bytes and seconds are per GPU. Models are Llama-like. For a single GPU see `fractal_rm.ppo.plan`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fractal_rm.ppo.plan import BACKWARD, FORWARD, GPU, RECOMPUTED, Shape, cache_bytes

Plan = Literal["ddp", "zero2", "fsdp2", "lora"]

# Bytes a number. bf16 with Adam: weight 2, gradient 2, and 4 each for the float32 copy and two moments: 16 in all
# (Rajbhandari et al., "ZeRO", 2020, section 3.1). float32 with autocast, which transformers' Trainer does, has
# 4 + 4 + 8 instead: 16 as well.
WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12
FLOAT32_WEIGHT, FLOAT32_GRADIENT, FLOAT32_ADAM = 4, 4, 8
# A layer's activations in bf16, of each token and hidden unit, with attention that keeps no square matrix: 34 bytes;
# with checkpointing only its input stays, 2 bytes (Korthikanti et al., "Reducing activation recomputation in large
# transformer models", 2022, equation 1 and section 5).
LAYER_ACTIVATION, LAYER_INPUT = 34, 2
# Logits of the completion in float32, and their gradient.
LOGITS = 8


# Touvron et al., "Llama 2: open foundation and fine-tuned chat models", 2023, and the configurations published with it.
LLAMA_7B = Shape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocabulary=32000)
LLAMA_70B = Shape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=32000)


@dataclass(frozen=True)
class Work:
    """A rollout batch and what is done with it: choices of the plan.

    Args:
        completions: In the batch, of all GPUs.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.
        epochs: Over the batch.
        micro_batch: Completions on a GPU at once in training.
        generated: Completions on a GPU at once while generating, if there are as many.
        adapters: Share of the weights that a LoRA adapter has.
    """

    completions: int = 512
    prompt: int = 512
    completion: int = 1536
    epochs: int = 1
    micro_batch: int = 1
    generated: int = 16
    adapters: float = 0.005

    @property
    def length(self) -> int:
        """Tokens of a prompt with its completion."""
        return self.prompt + self.completion


def trained_bytes(parameters: float, plan: Plan, gpus: int, work: Work) -> dict[str, float]:
    """Weights, gradients and optimizer of a model that is trained, on one GPU."""
    trained = parameters * work.adapters if plan == "lora" else parameters
    pieces = {"ddp": (1, 1), "lora": (1, 1), "zero2": (1, gpus), "fsdp2": (gpus, gpus)}
    weights, rest = pieces[plan]
    frozen = parameters * WEIGHT if plan == "lora" else 0.0
    return {
        "weights": frozen + trained * WEIGHT / weights,
        "gradients": trained * GRADIENT / rest,
        "optimizer": trained * OPTIMIZER / rest,
    }


def activation_bytes(shape: Shape, work: Work) -> float:
    """What a training pass keeps with checkpointing: inputs of all layers, one layer whole, logits."""
    tokens = work.micro_batch * work.length
    layers = tokens * shape.hidden * (LAYER_INPUT * shape.layers + LAYER_ACTIVATION)
    return layers + work.micro_batch * work.completion * shape.vocabulary * LOGITS


def generating(policy: Shape, gpus: int, work: Work, gpu: GPU) -> tuple[int, float]:
    """GPUs that share one copy of the weights to generate (a power of two, half their memory at most); sequences each.

    Args:
        policy: The policy.
        gpus: How many there are.
        work: The batch.
        gpu: Its memory.
    """
    needed = math.ceil(policy.parameters * WEIGHT / (0.5 * gpu.memory))
    return 2 ** math.ceil(math.log2(needed)), min(work.completions / gpus, work.generated)


def memory(
    policy: Shape, reward: Shape, plan: Plan, gpus: int, work: Work, gpu: GPU, *, value: Shape | None, reference: bool
) -> dict[str, float]:
    """Bytes on one GPU by what they are for; training and generation take turns, so the larger of the two counts.

    Weights in pieces are put together to generate: a copy in bf16 over as few GPUs as hold it (vLLM in the same
    processes, with tensor parallelism and sleep mode).

    Args:
        policy: The policy.
        reward: The reward model, whole on every GPU in bf16.
        plan: How the policy is laid out; a value model is laid out the same way, which only `ddp` and `lora` can.
        gpus: How many.
        work: The batch.
        gpu: Its memory.
        value: The value model; None: advantages without one.
        reference: Whether there is a reference model; with `lora` it is the policy without its adapter.
    """
    parts = trained_bytes(policy.parameters, plan, gpus, work)
    parts["value"] = sum(trained_bytes(value.scorer_parameters, plan, gpus, work).values()) if value else 0.0
    pieces = gpus if plan == "fsdp2" else 1
    parts["reference"] = policy.parameters * WEIGHT / pieces if reference and plan != "lora" else 0.0
    parts["reward"] = reward.scorer_parameters * float(WEIGHT)
    parts["activations"] = activation_bytes(policy, work)
    share, sequences = generating(policy, gpus, work, gpu)
    copy = policy.parameters * WEIGHT / share if plan == "fsdp2" else 0.0
    parts["generation"] = copy + cache_bytes(policy, sequences, work.length)
    held = sum(parts.values()) - parts["activations"] - parts["generation"]
    return parts | {"total": held + max(parts["activations"], parts["generation"])}


def seconds(
    policy: Shape, reward: Shape, gpus: int, work: Work, gpu: GPU, *, value: Shape | None, reference: bool
) -> dict[str, float]:
    """Seconds of a rollout batch by what they are spent on; communication is not in them.

    Generation reads all weights and the cache so far for every token that its sequences take together, or computes
    them if that takes longer; GPUs that share the weights do so at once. What does not fit at once comes after.
    """
    tokens = work.completions * work.length
    rate = gpus * gpu.operations * gpu.used
    share, each = generating(policy, gpus, work, gpu)
    sequences = each * share
    read = policy.parameters * WEIGHT + cache_bytes(policy, sequences, work.prompt + work.completion // 2)
    step = max(
        read / (share * gpu.bandwidth * gpu.read),
        FORWARD * policy.parameters * sequences / (share * gpu.operations * gpu.used),
    )
    rounds = math.ceil(work.completions / gpus / each)
    scored = FORWARD * tokens * reward.scorer_parameters
    seen = FORWARD * tokens * (policy.parameters * (1 + reference) + (value.scorer_parameters if value else 0))
    updated = policy.parameters + (value.scorer_parameters if value else 0)
    update = work.epochs * tokens * updated * (FORWARD + BACKWARD + RECOMPUTED)
    parts = {
        "generate": rounds * work.completion * step,
        "score": scored / rate,
        "evaluate": seen / rate,
        "update": update / rate,
    }
    return parts | {"rollout": sum(parts.values())}
