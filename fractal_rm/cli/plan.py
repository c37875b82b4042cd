"""`fractal-rm plan`: whether a run fits a GPU and how long it takes, before anything is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fractal_rm.cli.checks import check_models, number_cell, print_table
from fractal_rm.cli.options.parser import parse
from fractal_rm.errors import reason
from fractal_rm.ppo.plan import (
    GPU,
    GPUS,
    MODELS,
    Dtype,
    Run,
    Shape,
    hours,
    memory,
    nearest_model,
    reward_training_memory,
    shape_of,
)
from fractal_rm.ranges import check_ranges

GIGABYTE = 1e9
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MB])", re.IGNORECASE)
_UNITS = {"M": 1e6, "B": 1e9}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GB|GIB|G)", re.IGNORECASE)
# Options that may make a run fit, cheapest first: flag and value.
_HELP: tuple[tuple[str, Any], ...] = (
    ("gradient_checkpointing", True),
    ("vllm_enable_sleep_mode", True),
    ("per_device_train_batch_size", 1),
    ("use_peft", True),
    ("value_model", "shared"),
    ("dtype", "bfloat16"),
    ("reward_dtype", "bfloat16"),
    ("use_vllm", False),
)


@dataclass
class PlanArguments:
    """Arguments of `fractal-rm plan`: the GPU, and the options of `fractal-rm ppo` that memory and time depend on."""

    model: str | None = field(
        default=None, metadata={"help": "The policy: folder or hub id. Only its config.json is read."}
    )
    parameters: str | None = field(
        default=None,
        metadata={
            "help": "Size of the policy, such as 1.5B, instead of `model`. Without both: a table of common models."
        },
    )
    gpu: str = field(
        default="24GB", metadata={"help": f"Memory such as 24GB, or a card: {', '.join(GPUS)}. Sizes are in 1e9 bytes."}
    )
    reward_model: str = field(
        default="policy",
        metadata={"help": "Folder, hub id or size; `policy`: the size of the policy; `none`: no reward model."},
    )
    value_model: Literal["own", "shared", "none"] = field(
        default="none",
        metadata={
            "help": "Value model: `none` for `advantage=group`, `own` for a backbone, `shared` for a head "
            "on the policy."
        },
    )
    reference: bool = field(
        default=False, metadata={"help": "Include a reference model, for `beta` or `kl_coef` above 0."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train low-rank adapters, not all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    dtype: Dtype = field(
        default="float32",
        metadata={
            "help": "Type of the policy's weights. TRL loads float32 unless `model_init_kwargs` names a `dtype`."
        },
    )
    reward_dtype: Dtype = field(
        default="float32",
        metadata={"help": "Type of the reward model's weights. It is float32 if training changed all weights."},
    )
    prompt_length: int = field(default=150, metadata={"help": "Tokens per prompt."})
    max_completion_length: int = field(default=320, metadata={"help": "Tokens per completion."})
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Completions per forward and backward pass."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Batches per update."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations to save memory."})
    use_vllm: bool = field(
        default=False, metadata={"help": "Generate with vLLM on the same GPU (`vllm_mode=colocate`)."}
    )
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Share of the GPU memory for vLLM."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "vLLM frees its memory while the policy trains."}
    )
    max_steps: int = field(default=300, metadata={"help": "Updates of PPO."})
    num_prompts: int = field(
        default=7473, metadata={"help": "Prompts for `fractal-rm sample`; the default is the size of GSM8K."}
    )
    samples: int = field(default=4, metadata={"help": "Responses to each prompt, to train the reward model."})
    teraflops: float | None = field(
        default=None,
        metadata={"help": "Measured 1e12 operations per second of training; default: 0.35 of the card's peak."},
    )
    generated_per_second: float | None = field(
        default=None, metadata={"help": "Measured tokens per second over all sequences; default: from the card."}
    )

    def __post_init__(self) -> None:
        if self.model and self.parameters:
            raise ValueError("`model` and `parameters` both name the policy's size. Give one of them.")
        check_ranges(self)
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` is {self.max_steps}. Give 1 or more.")
        rollouts = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rollouts % self.num_generations:
            raise ValueError(
                f"An update has {rollouts} completions (`per_device_train_batch_size` x `gradient_accumulation_steps`),"
                f" which is not a multiple of `num_generations` {self.num_generations}. Change one of them."
            )


def plan(argv: Sequence[str]) -> None:
    """Print memory by part, hours by stage, and what would help if the run does not fit."""
    (arguments,) = parse("plan", [PlanArguments], argv)
    gpu = read_gpu(arguments.gpu, arguments.teraflops)
    if arguments.model is None and arguments.parameters is None:
        _print_models(arguments, gpu)
        return
    run = read_run(arguments)
    stages = {"ppo": memory(run, gpu)} | ({"train": reward_training_memory(run)} if run.reward else {})
    cells = {part: [number_cell(_gigabytes(held.get(part))) for held in stages.values()] for part in stages["ppo"]}
    print_table([f"GB of {stage}" for stage in stages], cells, of="part")
    spent = stage_hours(arguments, run, gpu)
    print_table(["hours"], {stage: [f"{time:.1f}"] for stage, time in spent.items()}, of="stage")
    print(verdict(arguments, run, gpu))
    if run.reward and stages["train"]["total"] > gpu.usable * gpu.memory:
        print("Training the reward model does not fit: use smaller batches, gradient checkpointing or adapters for it.")
    print(
        "Formulas, checked at 135 M parameters (docs/speed.md); hours are right within a factor of two at best. "
        "After ten updates, `step_time` in the logs is more accurate."
    )


def read_gpu(name: str, teraflops: float | None) -> GPU:
    """A GPU by name or memory size, with measured operations per second if given; raises ValueError for other text."""
    known = {card.lower(): gpu for card, gpu in GPUS.items()}
    found, size = known.get(name.lower().replace(" ", "-")), _MEMORY.fullmatch(name.strip())
    if found is None and size is None:
        raise ValueError(f"`gpu` is {name!r}. Give its memory, such as 24GB, or one of {', '.join(GPUS)}.")
    if found is None:
        memory = float(size[1]) * GIGABYTE  # type: ignore[index]
        if memory <= 0:
            raise ValueError(f"`gpu` is {name!r}, which has no memory. Give a size such as 24GB.")
        larger = [gpu for gpu in GPUS.values() if gpu.memory >= memory]
        found = replace(larger[0] if larger else GPUS["H200"], memory=memory)
    return found if teraflops is None else replace(found, operations=teraflops * 1e12, used=1.0)


def read_run(arguments: PlanArguments) -> Run:
    """The run that the arguments describe; raises OSError if a folder is missing, ValueError if a size cannot be
    read."""
    policy = read_shape(arguments.model or str(arguments.parameters), is_size=arguments.model is None)
    reward: Shape | None = policy
    if arguments.reward_model == "none":
        reward = None
    elif arguments.reward_model != "policy":
        reward = read_shape(arguments.reward_model, is_size=is_size(arguments.reward_model))
    return make_run(arguments, policy, reward)


def make_run(arguments: PlanArguments, policy: Shape, reward: Shape | None) -> Run:
    """The run of a policy and a reward model under the command's options."""
    rollouts = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return Run(
        policy=policy,
        reward=reward,
        value=arguments.value_model,
        lora_rank=arguments.lora_r if arguments.use_peft else None,
        dtype=arguments.dtype,
        reward_dtype=arguments.reward_dtype,
        prompt=arguments.prompt_length,
        completion=arguments.max_completion_length,
        rollouts=rollouts,
        micro_batch=arguments.per_device_train_batch_size,
        checkpointing=arguments.gradient_checkpointing,
        reference=arguments.reference,
        vllm=arguments.vllm_gpu_memory_utilization if arguments.use_vllm else None,
        sleep=arguments.vllm_enable_sleep_mode,
    )


def is_size(name: str) -> bool:
    """Whether a model is given as a number of parameters."""
    return _SIZE.fullmatch(name.strip()) is not None


def read_shape(name: str, *, is_size: bool) -> Shape:
    """The sizes of a model, from a number of parameters or from the configuration of a folder or hub id.

    Raises OSError if a folder is missing, ValueError if a size or a configuration cannot be read.
    """
    if is_size:
        size = _SIZE.fullmatch(name.strip())
        if size is None or float(size[1]) == 0:
            raise ValueError(f"The size {name!r} is not a number of parameters. Give one such as 135M or 1.5B.")
        parameters = float(size[1]) * _UNITS[size[2].upper()]
        return MODELS[nearest_model(parameters)].scaled_to(parameters)
    check_models(name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files make libraries raise anything
        raise ValueError(
            f"The configuration of {name} cannot be read ({reason(error)}). Check the name, or give `parameters`."
        ) from error
    return shape_of(config, where=name)


def verdict(arguments: PlanArguments, run: Run, gpu: GPU) -> str:
    """Whether the run fits; if not, its largest part and what each option saves."""
    held = memory(run, gpu)
    total, room = held["total"], gpu.usable * gpu.memory
    of = f"{total / GIGABYTE:.1f} GB of {room / GIGABYTE:.1f} GB usable"
    if total <= room:
        return f"Fits: {of}."
    largest = max((part for part in held if part != "total"), key=lambda part: held[part])
    lines = [f"Does not fit: {of}; the largest part is {largest} ({held[largest] / GIGABYTE:.1f} GB). What would help:"]
    for name, value in _HELP:
        if getattr(arguments, name) == value:
            continue
        batches = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        also = {"gradient_accumulation_steps": batches} if name == "per_device_train_batch_size" else {}
        changed = make_run(replace(arguments, **{name: value}, **also), run.policy, run.reward)
        now = memory(changed, gpu)["total"]
        if now < 0.99 * total:
            flags = " ".join(f"--{key} {str(to).lower()}" for key, to in {name: value, **also}.items())
            lines.append(f"  {flags}: {now / GIGABYTE:.1f} GB{', fits' if now <= room else ''}")
    return "\n".join(lines)


def _gigabytes(size: float | None) -> float | None:
    return None if size is None else round(size / GIGABYTE, 2)


def stage_hours(arguments: PlanArguments, run: Run, gpu: GPU) -> dict[str, float]:
    """Hours of `sample`, `train` and `ppo` under the command's options."""
    return hours(
        run,
        gpu,
        updates=arguments.max_steps,
        sampled=arguments.num_prompts * arguments.samples,
        generated_per_second=arguments.generated_per_second,
    )


def _print_models(arguments: PlanArguments, gpu: GPU) -> None:
    """Print a line for each common model."""
    rows = {}
    for name, shape in MODELS.items():
        run = make_run(arguments, shape, None if arguments.reward_model == "none" else shape)
        total = memory(run, gpu)["total"]
        fits = "yes" if total <= gpu.usable * gpu.memory else "no"
        rows[name] = [f"{total / GIGABYTE:.1f}", fits, f"{sum(stage_hours(arguments, run, gpu).values()):.1f}"]
    print_table(["GB", f"fits {arguments.gpu}", "hours"], rows, of="model")
    rollouts = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    print(
        f"Memory of PPO, and hours of sampling, the reward model and {arguments.max_steps} updates of {rollouts} "
        f"completions with at most {arguments.max_completion_length} tokens. Formulas, right within a factor of two at "
        "best. `--parameters 1.5B` shows the parts, and what helps a run to fit."
    )
