"""What do 7B and 70B policies need on 8 and 64 GPUs, and do the formulas hold where they can be measured?

The plan is computed by `scale_formulas.py`: nothing of that size has been run. Three things are checked here:
`StepPPOTrainer` trains a small policy and value model for a step, and the bytes of weights, gradients and optimizer are
compared with the formulas; a larger model is trained in a separate process, and the growth of its resident memory is
compared; the CPU time of a training step is compared with that of a forward pass (3, without checkpointing).

    python -m benchmarks.speed.scale_plan
    python -m benchmarks.tables      # the tables of docs/scale.md

Appends one row for each plan and each measurement to `benchmarks/results/scale_plan.jsonl`.
"""

import argparse
import contextlib
import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.common.places import RESULTS
from benchmarks.speed.scale_formulas import (
    FLOAT32_ADAM,
    FLOAT32_GRADIENT,
    FLOAT32_WEIGHT,
    LLAMA_7B,
    LLAMA_70B,
    Plan,
    Work,
    memory,
    seconds,
)
from benchmarks.speed.scale_page import MEMORY, TIME
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.plan import BACKWARD, FORWARD, GPU, Shape
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

GIGABYTE = 1e9
SMALL = Shape(layers=2, hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=384)
# Large enough that its state is visible above the memory of the libraries.
MIDDLE = Shape(layers=6, hidden=512, intermediate=1408, heads=8, kv_heads=4, vocabulary=8192)
POLICIES = {"7B": LLAMA_7B, "70B": LLAMA_70B}
# Name of a plan -> layout of the policy, whether it has a separate value model, whether it has a reference.
PLANS: dict[str, tuple[Plan, bool, bool]] = {
    "ddp, gae": ("ddp", True, False),
    "lora ddp, gae": ("lora", True, True),
    "zero2, group": ("zero2", False, False),
    "fsdp2, group": ("fsdp2", False, False),
    "fsdp2, group, reference": ("fsdp2", False, True),
}


def planned(size: str, gpus: int, name: str) -> dict[str, Any]:
    """Gigabytes and seconds of a plan, and whether it fits."""
    plan, has_value, reference = PLANS[name]
    policy, reward, work, gpu = POLICIES[size], LLAMA_7B, Work(), GPU()
    value = policy if has_value else None
    held = memory(policy, reward, plan, gpus, work, gpu, value=value, reference=reference)
    spent = seconds(policy, reward, gpus, work, gpu, value=value, reference=reference)
    return {
        **{f"{part}_gb": held[part] / GIGABYTE for part in MEMORY},
        **{f"{part}_s": spent[part] for part in TIME},
        "fits": int(held["total"] <= gpu.usable * gpu.memory),
    }


def config(shape: Shape, **options: Any) -> LlamaConfig:
    """The configuration of a shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **options,
    )


def count_bytes() -> dict[str, float]:
    """Bytes that a step of `StepPPOTrainer` keeps, against the formulas for float32."""
    tokenizer, shape = AutoTokenizer.from_pretrained(SHIPPED_POLICY), SMALL
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        args = StepPPOConfig(
            output_dir=work,
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            num_generations=2,
            max_completion_length=8,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = StepPPOTrainer(
            LlamaForCausalLM(config(shape)),
            reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["1 + 1 =\n"] * 8}),
            processing_class=tokenizer,
        )
        trainer.train()
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    # The value model has a separate head without a bias.
    value = shape.backbone + sum(p.numel() for p in trainer.value_model.score.parameters())
    return {
        "policy_weight_bytes": float(sum(p.nbytes for p in trainer.model.parameters())),
        "policy_weight_formula": float(FLOAT32_WEIGHT * shape.parameters),
        "value_weight_bytes": float(sum(p.nbytes for p in trainer.value_model.parameters())),
        "value_weight_formula": float(FLOAT32_WEIGHT * value),
        "optimizer_bytes": float(sum(tensor.nbytes for tensor in moments)),
        "optimizer_formula": float(FLOAT32_ADAM * (shape.parameters + value)),
    }


def measure_training(queue: Any) -> None:
    """Resident memory and processor time of a plain training step, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(2, 300, (2, 64))
    torch.ones(64, 64).matmul(torch.ones(64, 64)).sum()  # memory that the libraries allocate once
    before = resident()
    model = LlamaForCausalLM(config(MIDDLE))
    optimizer = torch.optim.AdamW(model.parameters())
    forward, training = [], []
    for _ in range(5):
        start = time.process_time()
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
        middle = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        forward.append(middle - start)
        training.append(time.process_time() - middle)
        optimizer.step()
    state = [tensor for held in optimizer.state.values() for tensor in held.values() if tensor.dim()]
    held = sum(p.nbytes + p.grad.nbytes for p in model.parameters() if p.grad is not None)
    per_parameter = FLOAT32_WEIGHT + FLOAT32_GRADIENT + FLOAT32_ADAM
    formula = per_parameter * MIDDLE.parameters
    queue.put(
        {
            "state_bytes": float(held + sum(tensor.nbytes for tensor in state)),
            "state_formula": float(formula),
            "resident_over_formula": (resident() - before) / formula,
            "training_over_forward": statistics.median(training) / statistics.median(forward),
            "training_over_forward_formula": (FORWARD + BACKWARD) / FORWARD,
        }
    )


def resident() -> float:
    """Bytes of the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measured_in_a_process() -> dict[str, float]:
    """What [`measure_training`] finds."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_training, args=(queue,))
    process.start()
    found = queue.get(timeout=600)
    process.join()
    return found


def main() -> None:
    """Append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(RESULTS / "scale_plan.jsonl"))
    results = ResultsFile(parser.parse_args().results)
    for size in POLICIES:
        for gpus in (8, 64):
            for name in PLANS:
                add(results, f"{gpus} GPUs: {name}", planned(size, gpus, name), 0.0, size)
    for arm, measure in (("bytes", count_bytes), ("training", measured_in_a_process)):
        start = time.perf_counter()
        found = measure()
        add(results, arm, found, time.perf_counter() - start)


def add(results: ResultsFile, arm: str, metrics: dict[str, Any], spent: float, size: str | None = None) -> None:
    """Append a row: of a plan for a size of policies, or of a measurement."""
    results.append(
        benchmark="scale_plan",
        arm=arm,
        dataset=size or "none",
        seed=None,
        split="plan" if size else "measured",
        metrics=metrics,
        config={"work": vars(Work()), "gpu": vars(GPU())} if size else {},
        seconds=spent,
    )


if __name__ == "__main__":
    main()
