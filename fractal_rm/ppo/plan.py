"""Memory and time of PPO with step rewards on one GPU, from the sizes of its models: formulas, each with its source.

Nothing is loaded and nothing is run. `benchmarks/speed/plan_check.py` compares the formulas with a measured training
run. Models are dense and Llama-like: Qwen, Mistral, SmolLM. Plans for many GPUs: `benchmarks/speed/scale_formulas.py`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Dtype = Literal["bfloat16", "float32"]
BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
# Numbers per trained parameter beyond the weight: its gradient, and the two moments of Adam, of the same type
# (Rajbhandari et al., "ZeRO", 2020, section 3.1, has the same 16 bytes for mixed precision with a float32 copy).
GRADIENTS, MOMENTS = 1, 2
# Logits of a completion's token and their gradient, in the computation's type; under bf16 also a float32 copy of both
# (accelerate's wrapper of the forward pass).
LOGITS = 2
# Bytes per token, layer and hidden unit that autocast over float32 weights needs beyond bf16 weights, if all weights
# are trained: the residual stream is float32. Measured (tests/test_plan.py).
AUTOCAST = 10
# Operations per weight and token: forward 2, backward 4, half of them for the weight's own gradient (a frozen weight
# has none), and 2 more to recompute what checkpointing dropped (Kaplan et al., "Scaling laws for neural language
# models", 2020, section 2.1; Korthikanti et al.).
FORWARD, BACKWARD, RECOMPUTED = 2, 4, 2
# Tokens whose logits the likelihood scorer computes at a time (`CHUNK_TOKENS` of `scorers/likelihood.py`).
REWARD_LOGITS = 1024
# Milliseconds to launch a layer's kernels, for every token that transformers' `generate` writes, at any batch size: an
# assumption (28 layers: about 30 steps a second). vLLM replays CUDA graphs instead.
LAUNCH_MS = 1.2


@dataclass(frozen=True)
class Shape:
    """A dense Llama-like model."""

    layers: int
    hidden: int
    intermediate: int  # width of the gated feed-forward part
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False  # input and output embeddings are the same
    head_width: int | None = None  # width of an attention head; None: the heads share the model's width

    @property
    def query_width(self) -> int:
        """Numbers in the queries of a token in a layer."""
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        """Numbers in the keys of a token in a layer; the values have as many."""
        return self.kv_heads * (self.head_width or self.hidden // self.heads)

    @property
    def layer(self) -> int:
        """Parameters of a layer, without its norms and biases."""
        return 2 * self.hidden * (self.query_width + self.kv_width) + 3 * self.hidden * self.intermediate

    @property
    def backbone(self) -> int:
        """Parameters without the output layer; the biases of some families are not counted."""
        return self.vocabulary * self.hidden + self.layers * (self.layer + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.backbone + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def scorer_parameters(self) -> int:
        """Parameters as a token classification model with one label and a bias."""
        return self.backbone + self.hidden + 1

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters on queries and values, PEFT's default for these models."""
        return self.layers * rank * (2 * self.hidden + self.query_width + self.kv_width)

    def scaled_to(self, parameters: float) -> "Shape":
        """The same widths with the number of layers that comes closest to a number of parameters."""
        embeddings = self.parameters - self.layers * (self.layer + 2 * self.hidden)
        return replace(self, layers=max(1, round((parameters - embeddings) / (self.layer + 2 * self.hidden))))


def shape_of(config: Any, *, where: str) -> Shape:
    """The sizes in a transformers configuration (of a multimodal model, in its text configuration); `where` names the
    model.

    Raises ValueError if it is not a dense Llama-like model.
    """
    text = config.get_text_config()
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, name, None)]
    if experts:
        raise ValueError(
            f"{where} is a mixture of experts (`{experts[0]}`), and the formulas are for dense models. Give "
            "`parameters` instead: the memory of weights will be right, the hours an upper bound."
        )
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes: list[Any] = [getattr(text, name, None) for name in names]
    missing = [name for name, size in zip(names, sizes, strict=True) if not isinstance(size, int)]
    if missing:
        raise ValueError(f"The configuration of {where} has no `{missing[0]}`. Give `parameters` instead.")
    layers, hidden, intermediate, heads, vocabulary = sizes
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    tied, width = bool(getattr(config, "tie_word_embeddings", False)), getattr(text, "head_dim", None)
    return Shape(layers, hidden, intermediate, heads, kv_heads, vocabulary, tied, width)


# From the configurations published with the models.
MODELS: dict[str, Shape] = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "SmolLM2-360M": Shape(32, 960, 2560, 15, 5, 49152, tied=True),
    "Qwen2.5-0.5B": Shape(24, 896, 4864, 14, 2, 151936, tied=True),
    "Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": Shape(36, 2048, 11008, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 152064),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Qwen2.5-14B": Shape(48, 5120, 13824, 40, 8, 152064),
    "Qwen2.5-32B": Shape(64, 5120, 27648, 40, 8, 152064),
    "Llama-3.1-70B": Shape(80, 8192, 28672, 64, 8, 128256),
}


def nearest_model(parameters: float) -> str:
    """Name of the model in [`MODELS`] whose number of parameters is closest by ratio."""
    return min(MODELS, key=lambda name: abs(math.log(MODELS[name].parameters / parameters)))


@dataclass(frozen=True)
class GPU:
    """A GPU, from its data sheet."""

    memory: float = 80e9  # bytes
    operations: float = 989e12  # dense bf16 operations a second, without sparsity
    bandwidth: float = 3.35e12  # bytes of memory a second
    # Share of the operations that training reaches: an assumption (PaLM reports .46 and Llama 3 .38 to .43 of the peak
    # for pretraining; Chowdhery et al., 2022; Grattafiori et al., 2024).
    used: float = 0.35
    read: float = 0.6  # share of the bandwidth that generation reaches: an assumption
    # Share of the memory that a run may use; the rest is for fragmentation and libraries: an assumption.
    usable: float = 0.9


# NVIDIA's data sheets and white papers. A memory size means the first GPU of that size, which is never the fastest.
GPUS: dict[str, GPU] = {
    "T4": GPU(16e9, 65e12, 0.3e12),
    "RTX-3090": GPU(24e9, 71e12, 0.936e12),
    "A10": GPU(24e9, 125e12, 0.6e12),
    "L4": GPU(24e9, 121e12, 0.3e12),
    "RTX-4090": GPU(24e9, 165e12, 1.008e12),
    "A100-40GB": GPU(40e9, 312e12, 1.555e12),
    "L40S": GPU(48e9, 362e12, 0.864e12),
    "A100-80GB": GPU(80e9, 312e12, 2.039e12),
    "H100": GPU(80e9, 989e12, 3.35e12),
    "H200": GPU(141e9, 989e12, 4.8e12),
}


@dataclass(frozen=True)
class Run:
    """A run of PPO: models, and the options of `fractal-rm ppo` that memory and time depend on."""

    policy: Shape
    reward: Shape | None  # None: no reward model
    # Value model: `own` (a backbone of the policy's size), `shared` (a head on the policy), or `none`.
    value: Literal["own", "shared", "none"] = "none"
    # Rank of the adapters of policy and value model; None: all weights are trained.
    lora_rank: int | None = None
    # Type of the policy's and value model's weights; with `float32` a GPU computes in bf16 by autocast.
    dtype: Dtype = "float32"
    reward_dtype: Dtype = "float32"  # type of the reward model's weights
    prompt: int = 150  # tokens of a prompt
    completion: int = 320  # tokens of a completion
    rollouts: int = 128  # completions in an update
    micro_batch: int = 8  # completions per forward and backward pass
    generated: int = 128  # completions generated at once
    checkpointing: bool = True  # recompute activations
    reference: bool = False  # a reference model; with adapters, it is the policy without them
    # Share of the GPU's memory that vLLM takes in the same process; None: transformers generates.
    vllm: float | None = None
    sleep: bool = False  # vLLM frees its memory while the policy trains
    computed: Dtype = "bfloat16"  # type that models compute in; bf16 on a GPU

    @property
    def length(self) -> int:
        """Tokens of a prompt with its completion."""
        return self.prompt + self.completion


def trained_bytes(run: Run, parameters: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state of a model that trains all weights or adapters.

    PEFT keeps adapters in float32 whatever the type of the weights.
    """
    trained, size = (parameters, BYTES[run.dtype])
    if run.lora_rank is not None:
        trained, size = run.policy.adapters(run.lora_rank), BYTES["float32"]
    frozen = 0 if run.lora_rank is None else parameters * BYTES[run.dtype]
    return {
        "weights": float(frozen + trained * size),
        "gradients": float(trained * size * GRADIENTS),
        "optimizer": float(trained * size * MOMENTS),
    }


def layer_bytes(shape: Shape, run: Run) -> float:
    """Bytes per token that a layer stores for the backward pass.

    Two norms store their input in float32. If all weights are trained, the layer stores the input of every matrix,
    queries, keys, values, the attention output, and three numbers of the gated part. A frozen matrix needs no input,
    except that queries and values have adapters. Attention stores no square matrix. Counted, tensor by tensor, in
    `benchmarks/speed/plan_check.py`; Korthikanti et al., equation 1, have 34 bytes per hidden unit for GPT's layers.
    """
    size, lora = BYTES[run.computed], run.lora_rank is not None
    attention = 2 * shape.query_width + 2 * shape.kv_width
    kept = attention + (3 * shape.intermediate if lora else 4 * (shape.hidden + shape.intermediate))
    # The adapters of queries and values read the same input, each as a float32 copy if it is in bf16.
    copies = 0 if not lora else BYTES["float32"] * (1 if run.dtype == "float32" else 2)
    cast = AUTOCAST if run.computed != run.dtype and not lora else 0
    return size * kept + (2 * BYTES["float32"] + copies + cast) * shape.hidden


def activation_bytes(shape: Shape, run: Run) -> float:
    """Bytes that a forward pass over a micro-batch stores for all layers, without logits.

    With checkpointing: the input of every layer, and one complete layer. Under autocast, the bf16 copies of float32
    weights are stored too, for the same layers.
    """
    tokens = run.micro_batch * run.length
    whole = 1 if run.checkpointing else shape.layers
    inputs = shape.layers * shape.hidden * BYTES[run.dtype] if run.checkpointing else 0
    copies = shape.layer * BYTES[run.computed] if run.computed != run.dtype else 0
    return tokens * (inputs + whole * layer_bytes(shape, run)) + whole * copies


def cache_bytes(shape: Shape, sequences: float, length: float, *, dtype: Dtype = "bfloat16") -> float:
    """Bytes of the KV cache of sequences that are generated at once, `length` tokens each."""
    return sequences * length * 2 * shape.kv_width * BYTES[dtype] * shape.layers


def memory(run: Run, gpu: GPU) -> dict[str, float]:
    """Bytes by purpose; training and generation alternate, so `total` counts the larger of the two.

    Returns:
        `weights`, `gradients`, `optimizer` of the policy; `value model`, `reference`, `reward model`; `activations` and
        `logits` of training; `generation`: the KV cache of transformers, or vLLM's share for its own weights and cache;
        `total`.

    Raises:
        ValueError: If the weights and one sequence do not fit into vLLM's share.
    """
    policy, computed = run.policy, BYTES[run.computed]
    parts = trained_bytes(run, policy.parameters)
    # A value model that trains adapters shares the policy's frozen weights.
    own = trained_bytes(run, policy.scorer_parameters) if run.value == "own" else {}
    shared = policy.scorer_parameters * BYTES[run.dtype] if own and run.lora_rank is not None else 0
    parts["value model"] = sum(own.values()) - shared
    parts["reference"] = policy.parameters * float(BYTES[run.dtype]) * (run.reference and run.lora_rank is None)
    parts["reward model"] = run.reward.scorer_parameters * float(BYTES[run.reward_dtype]) if run.reward else 0.0
    held = sum(parts.values())
    parts["activations"] = activation_bytes(policy, run) * (2 if run.value == "own" else 1)
    float32 = LOGITS * BYTES["float32"] if run.computed != "float32" else 0
    parts["logits"] = run.micro_batch * run.completion * policy.vocabulary * float(LOGITS * computed + float32)
    training = parts["activations"] + parts["logits"]
    sequences = min(run.generated, run.rollouts)
    if run.vllm is None:
        parts["generation"] = cache_bytes(policy, sequences, run.length, dtype=run.computed)
        return parts | {"total": held + max(training, parts["generation"])}
    parts["generation"] = run.vllm * gpu.memory
    least = policy.parameters * BYTES[run.computed] + cache_bytes(policy, 1, run.length, dtype=run.computed)
    if least > parts["generation"]:
        raise ValueError(
            f"vLLM's share, {parts['generation'] / 1e9:.1f} GB, does not hold the weights and one sequence "
            f"({least / 1e9:.1f} GB). Raise `vllm_gpu_memory_utilization` to {least / gpu.memory:.2f} or more."
        )
    turns = max(training, parts["generation"]) if run.sleep else training + parts["generation"]
    return parts | {"total": held + turns}


def reward_training_memory(run: Run) -> dict[str, float]:
    """Bytes of reward model training, by the parts of [`memory`] that apply.

    `FractalTrainer` loads float32 weights; batches, adapters and checkpointing are assumed to be as in PPO, and the
    scorer is the likelihood scorer, which needs the most.
    """
    assert run.reward is not None
    training = replace(run, policy=run.reward, dtype="float32")
    parts = trained_bytes(training, run.reward.parameters)
    parts["activations"] = activation_bytes(run.reward, training)
    tokens = min(REWARD_LOGITS, run.micro_batch * run.completion)
    parts["logits"] = tokens * run.reward.vocabulary * float(LOGITS * (BYTES["float32"] + BYTES[run.computed]))
    return parts | {"total": sum(parts.values())}


def operations(shape: Shape, *, head: bool = True) -> float:
    """Weights that each token is multiplied by: layers and output layer, without the embeddings."""
    return shape.layers * shape.layer + (shape.vocabulary * shape.hidden if head else 0)


def trained_operations(run: Run) -> float:
    """Operations per weight and token of a training step."""
    backward = BACKWARD if run.lora_rank is None else BACKWARD / 2
    return FORWARD + backward + (RECOMPUTED if run.checkpointing else 0)


def generation_rate(run: Run, gpu: GPU) -> float:
    """Tokens per second over all sequences.

    Each step reads the weights and the cache, or computes if that takes longer; transformers launches every kernel
    again.
    """
    sequences = min(run.generated, run.rollouts)
    # vLLM loads weights in the published type, transformers in the policy's type.
    read = float(run.policy.parameters * BYTES[run.dtype if run.vllm is None else run.computed])
    read += cache_bytes(run.policy, sequences, run.prompt + run.completion / 2, dtype=run.computed)
    computed = FORWARD * operations(run.policy) * sequences / (gpu.operations * gpu.used)
    launched = LAUNCH_MS / 1000 * run.policy.layers if run.vllm is None else 0.0
    return sequences / (max(read / (gpu.bandwidth * gpu.read), computed) + launched)


def seconds(run: Run, gpu: GPU, *, generated_per_second: float | None = None) -> dict[str, float]:
    """Seconds of an update by purpose; `generated_per_second`, tokens over all sequences, replaces the estimate.

    Returns:
        `generate`, `score` (the reward model), `evaluate` (forward passes of the rollout: the reference, and the policy
        if vLLM generates), `update`, and their sum `total`.
    """
    rate, tokens = gpu.operations * gpu.used, run.rollouts * run.length
    weights = operations(run.policy)
    updated = weights + (operations(run.policy, head=False) if run.value == "own" else 0)
    parts = {
        "generate": run.rollouts * run.completion / (generated_per_second or generation_rate(run, gpu)),
        "score": FORWARD * tokens * (operations(run.reward, head=False) if run.reward else 0) / rate,
        "evaluate": FORWARD * tokens * weights * ((run.vllm is not None) + run.reference) / rate,
        "update": tokens * updated * trained_operations(run) / rate,
    }
    return parts | {"total": sum(parts.values())}


def hours(
    run: Run, gpu: GPU, *, updates: int, sampled: int, generated_per_second: float | None = None
) -> dict[str, float]:
    """Hours of the commands `sample`, `train` and `ppo` that train a policy with step rewards, by name.

    The reward model is trained like the policy (adapters, checkpointing), for one epoch on `sampled` responses, which
    are sampled 64 at a time without vLLM. `generated_per_second` as for [`seconds`].
    """
    sampling = replace(run, vllm=None, rollouts=64, generated=64, dtype="bfloat16")
    parts = {"sample": 0.0, "train": 0.0}
    if run.reward is not None:
        parts["sample"] = sampled * run.completion / (generated_per_second or generation_rate(sampling, gpu))
        trained = operations(run.reward, head=False) * trained_operations(run)
        parts["train"] = sampled * run.length * trained / (gpu.operations * gpu.used)
    parts["ppo"] = updates * seconds(run, gpu, generated_per_second=generated_per_second)["total"]
    return {stage: time / 3600 for stage, time in parts.items()}
