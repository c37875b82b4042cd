"""Trainings that `test_processes.py` runs in one process and in two: the same batches, split.

As a script: two processes of one group, as `accelerate launch` makes them, after imports that both share. Each trains
every case, and the first writes what came out.
"""

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.hf import length_buckets
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from support.models import byte_tokenizer, make_model, sums
from support.stand_ins import preferences, solutions
from support.step_ppo import (
    EOS,
    GUARDED,
    RAGGED,
    count_of_a,
    make,
    reward_model,
    value_model,
)

PROCESSES = 2 if __name__ == "__main__" else 1


def rollouts(*, silent: Sequence[int] = ()) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` that gives row n of the batch of all processes the same completion, whoever holds it.

    In rollouts whose numbers are `silent` nobody says anything.
    """
    calls = itertools.count()

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        call = next(calls)
        first = trainer.accelerator.process_index * len(prompts) + 3 * call
        rows = [list(RAGGED[(first + row) % len(RAGGED)]) for row in range(len(prompts))]
        rows = [[EOS]] * len(prompts) if call in silent else rows
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": rows,
            "logprobs": [[0.0] * len(ids) for ids in rows],
        }

    return rollout


def ppo(folder: Path, batch: int, **changed: Any) -> dict[str, torch.Tensor]:
    """Weights of policy and value model after a few updates, running statistics, and what was logged of the steps."""
    if changed.get("kl_coef"):  # the reference is loaded from where the policy comes from
        changed["model"] = str(folder / "policy")
    options = {"reward_model": reward_model(), "reward_funcs": count_of_a, "rollout_func": rollouts(), "max_steps": 4}
    trainer = make(
        folder, trainer=StepPPOTrainer, **options | {"per_device_train_batch_size": batch // PROCESSES} | changed
    )
    trainer.train()
    models = {"policy": trainer.model, "value": trainer.value_model}
    result = {
        f"{name}.{key}": tensor.detach().clone()
        for name, model in models.items()
        if model is not None
        for key, tensor in trainer.accelerator.unwrap_model(model).state_dict().items()
    }
    moments = trainer.shaper.moments[trainer.sources[0].name]
    watched = ("steps/per_response", "guards/alarm/empty")
    logged = [row[name] for row in trainer.state.log_history for name in watched if name in row]
    return result | {
        "moments": torch.tensor([moments.mean, moments.std, trainer.kl_coefficient.coef]),
        "logged": torch.tensor(logged),
    }


def fractal(folder: Path, rows: list[Any], **changed: Any) -> dict[str, torch.Tensor]:
    """Weights of the reward model after an epoch."""
    args = FractalConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8 // PROCESSES,
        learning_rate=1e-2,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=256,
        **changed,
    )
    trainer = FractalTrainer(
        make_model("likelihood", "llama"), args, train_dataset=rows, processing_class=byte_tokenizer()
    )
    trainer.train()
    logged = [row["loss/bag"] for row in trainer.state.log_history if "loss/bag" in row]
    result = {name: tensor.detach().clone() for name, tensor in trainer.scorer.state_dict().items()}
    return result | {"logged": torch.tensor(logged)}


def mixed() -> list[Any]:
    """Labelled responses and preferences, unevenly spread: some processes hold one kind only."""
    labelled = read_bags(solutions(12), Segmentation())
    pairs = read_bags(preferences(12), Segmentation())
    return [*labelled[:9], *pairs[:10], *labelled[9:], *pairs[10:]]


GAE = {"num_iterations": 2, "normalize_step_rewards": True, "whiten_rewards": True, "kl_coef": 0.1, "kl_target": 0.5}
SAVING = {"save_strategy": "steps", "save_steps": 2, "num_generations": 2}
CASES: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "gae": lambda folder: ppo(folder, 8, value_model=value_model(), **GAE),
    "gae in one pass": lambda folder: ppo(folder, 8, value_model=value_model(), kl_coef=0.1),
    "gae with accumulation": lambda folder: ppo(folder, 4, value_model=value_model(), gradient_accumulation_steps=2),
    "groups over two processes": lambda folder: ppo(
        folder, 4, num_generations=4, advantage="group", center="group", missing_eos_penalty=0.3
    ),
    "global": lambda folder: ppo(folder, 8, advantage="global", whiten_advantages=False),
    "an alarm and a rollback": lambda folder: ppo(
        folder / "rollback", 8, rollout_func=rollouts(silent=(4, 5)), on_alarm="rollback", **GUARDED | SAVING
    ),
    "bags": lambda folder: fractal(folder, sums(24)),
    "bags and preferences": lambda folder: fractal(folder, mixed()),
}


def train_all(folder: Path) -> None:
    """Train every case and write its weights, as `<case>.safetensors`."""
    for name, train in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(length_buckets._TOKENS, "cpu", 16)  # one process reads in parts, two must not
            result = train(folder)
        if int(os.environ.get("RANK", "0")) == 0:
            save_file({key: tensor.contiguous() for key, tensor in result.items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    second = os.fork()
    rank = 0 if second else 1
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    # By a file: two launches at once cannot want the same port.
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/group", rank=rank, world_size=2)
    train_all(work)
    # Threads of gloo that outlive the interpreter call into it and abort: two of sixty launches of a small training.
    PartialState().destroy_process_group()
    if rank == 0:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
