"""Question: do the formulas of `fractal-rm plan` hold for a model of 135 M parameters, where they can be measured?

Each arm is a separate process on a CPU. It trains `StepPPOTrainer` with a reward model of the same size for some
updates: the growth of resident memory to its peak, and the CPU seconds of an update without generation, are compared
with the formulas. A bare forward pass gives the CPU's operations per second, as `--teraflops` does for a GPU. Without
checkpointing, the bytes that a forward pass stores for the backward pass are counted tensor by tensor.

    python -m benchmarks.speed.plan_check --model FOLDER --split 135M
    python -m benchmarks.tables      # the table of docs/speed.md

Appends one row for each arm to `benchmarks/results/plan_check.jsonl`.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig

from benchmarks.speed.alternation import record
from benchmarks.speed.peers import measured_models, speed_parser
from benchmarks.speed.speed_blocks import PeakMemory
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.plan import FORWARD, GPU, Run, activation_bytes, memory, operations, seconds, shape_of
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.tasks.arithmetic.problems import exact_answer, make_problems

RANK = 16
PATIENCE = 1800  # seconds that an arm may take


class Arm(NamedTuple):
    """What is trained, and how."""

    lora: bool
    checkpointing: bool
    value: Literal["own", "none"] = "none"


ARMS = {
    "all weights": Arm(lora=False, checkpointing=False),
    "all weights, checkpointing": Arm(lora=False, checkpointing=True),
    "lora": Arm(lora=True, checkpointing=False),
    "lora, checkpointing": Arm(lora=True, checkpointing=True),
    "lora, value model": Arm(lora=True, checkpointing=True, value="own"),
}


def make_trainer(arm: Arm, models: Path, folder: str, given: argparse.Namespace) -> StepPPOTrainer:
    """A trainer of an arm: one micro-batch an update."""
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, task_type="CAUSAL_LM") if arm.lora else None
    has_value = arm.value == "own"
    args = StepPPOConfig(
        output_dir=folder,
        max_steps=given.updates + 1,
        learning_rate=1e-9,  # the policy does not change, so all updates are alike
        per_device_train_batch_size=given.rollouts,
        gradient_accumulation_steps=1,
        num_generations=1 if has_value else 2,
        advantage="gae" if has_value else "group",
        max_completion_length=given.response_length,
        gradient_checkpointing=arm.checkpointing,
        model_init_kwargs={"dtype": given.dtype},
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return StepPPOTrainer(
        str(models / "policy"),
        reward_model=str(models / "reward_model"),
        reward_funcs=exact_answer,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [problem.prompt for problem in make_problems(64, seed=0)]}),
        peft_config=adapters,
        value_peft_config=adapters if has_value else None,
    )


class Updates:
    """Processor seconds of each update of a trainer, without generation, and the widths of its rollouts."""

    def __init__(self, trainer: Any) -> None:
        self.seconds: list[float] = []
        self.widths: list[tuple[int, int]] = []
        generate, step = trainer._generate, trainer.training_step
        generating = 0.0

        def timed_generate(*arguments: Any, **named: Any) -> Any:
            nonlocal generating
            start = time.process_time()
            found = generate(*arguments, **named)
            generating = time.process_time() - start
            return found

        def timed_step(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            loss = step(*arguments, **named)
            self.seconds.append(time.process_time() - start - generating)
            tokens = trainer.last_rollout.tokens
            self.widths.append((tokens["prompt_ids"].size(1), tokens["completion_ids"].size(1)))
            return loss

        trainer._generate, trainer.training_step = timed_generate, timed_step


def kept_bytes(model: Any, run: Run) -> float:
    """Bytes of the tensors that a forward pass over a micro-batch keeps for the backward pass, without weights."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # memory that is reused would be counted once
        return tensor

    alive: list[torch.Tensor] = []
    ids = torch.zeros(run.micro_batch, run.length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return float(sum(kept.values()))


@torch.no_grad()
def operations_per_second(model: Any, run: Run) -> float:
    """What a bare forward pass over a micro-batch reaches, by processor time."""
    ids = torch.zeros(run.micro_batch, run.length, dtype=torch.long)
    spent = []
    for _ in range(3):
        start = time.process_time()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        spent.append(time.process_time() - start)
    return FORWARD * operations(run.policy) * ids.numel() / min(spent)


def measure(arm: Arm, models: Path, given: argparse.Namespace) -> dict[str, float]:
    """An arm's measurements, the formulas, and their ratios; the first update is not counted."""
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        held = PeakMemory()
        trainer: Any = make_trainer(arm, models, folder, given)
        updates = Updates(trainer)
        trainer.train()
        peak = 2**20 * (held.peak - held.start)
    shape = shape_of(trainer.policy.config, where=str(models))
    run = Run(
        policy=shape,
        reward=shape,
        value=arm.value,
        lora_rank=RANK if arm.lora else None,
        dtype=given.dtype,
        reward_dtype=given.dtype,
        computed=given.dtype,
        prompt=max(prompt for prompt, _ in updates.widths),
        completion=max(completion for _, completion in updates.widths),
        rollouts=given.rollouts,
        micro_batch=given.rollouts,
        generated=given.rollouts,
        checkpointing=arm.checkpointing,
    )
    trainer.optimizer.zero_grad()
    policy = trainer.policy.train()
    kept = {}
    if not arm.checkpointing:
        counted = kept_bytes(policy, run)
        kept = {"kept_mb": counted / 1e6, "kept_over_formula": counted / activation_bytes(shape, run)}
    gpu = GPU(operations=operations_per_second(policy.eval(), run), used=1.0)
    planned = seconds(run, gpu, generated_per_second=1.0)
    total, spent = memory(run, gpu)["total"], min(updates.seconds[1:])
    formula = planned["total"] - planned["generate"]
    return {
        "peak_gb": peak / 1e9,
        "formula_gb": total / 1e9,
        "peak_over_formula": peak / total,
        **kept,
        "update_s": spent,
        "formula_s": formula,
        "seconds_over_formula": spent / formula,
    }


def answer(queue: Any, *arguments: Any) -> None:
    """[`measure`] in a process of its own."""
    queue.put(measure(*arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the arms that the command line names."""
    description = "Memory and time of a PPO update, against the formulas of the plan."
    parser = speed_parser(description, "plan_check", list(ARMS))
    parser.add_argument("--updates", type=int, default=2, help="Beside the first, which is not counted.")
    parser.add_argument("--rollouts", type=int, default=4, help="In an update, and trained on at once.")
    parser.add_argument("--response-length", type=int, default=24, help="Most tokens of a response.")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.updates, given.rollouts, given.response_length, given.sizes = 1, 2, 8, ["0.2M"]
    results, context = ResultsFile(given.results), multiprocessing.get_context("spawn")
    for split, models, described in measured_models(given):
        for name in given.arms or ARMS:
            start, queue = time.perf_counter(), context.Queue()
            process = context.Process(target=answer, args=(queue, ARMS[name], models, given))
            process.start()
            metrics = queue.get(timeout=PATIENCE)
            process.join()
            settings = ("rollouts", "response_length", "updates", "device", "dtype", "threads")
            record(
                results,
                arm=name,
                metrics=metrics,
                benchmark="plan_check",
                split=split,
                config=described | {"lora_rank": RANK} | {setting: getattr(given, setting) for setting in settings},
                seconds=time.perf_counter() - start,
            )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
