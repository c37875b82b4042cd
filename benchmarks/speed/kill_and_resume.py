"""Does a killed and resumed run equal a run that was never killed?

For each trainer, one run is undisturbed. Then, for each moment, a run of the same configuration is killed with SIGKILL,
half of them at a random moment and half while a checkpoint is being written, and is resumed until it is done. The rival
is the undisturbed run: every file of the last checkpoint (weights of policy and value model, optimizer, schedule,
random states, running statistics, whatever else a trainer keeps) is compared byte by byte, and so are the logs, without
their times.

    python -m benchmarks.speed.kill_and_resume --moments 10

Appends one row for each trainer and moment to `benchmarks/results/kill_and_resume.jsonl`; minutes on one core.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, TrainerState
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import killable
from benchmarks.common.places import RESULTS
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.hf.checkpoints import STATE, can_resume, last_checkpoint
from fractal_rm.hf.manifest import MANIFEST
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.scorers.checkpoint import make_scorer
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems

# Files that a trainer reads at the start and never changes, or writes for people: names of folders, versions, dates.
NOT_COMPARED = ("training_args.bin", "README.md", STATE, MANIFEST)
# Ends of the names of logged numbers that are times.
TIMES = ("step_time", "runtime", "per_second")
# Slow imports.
IMPORTED = [
    "fractal_rm.reward_training.trainer",
    "fractal_rm.ppo.trainer",
    "transformers.models.llama.modeling_llama",
]
SHARED: dict[str, Any] = {
    "save_strategy": "steps",
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def small(kind: type, seed: int, **changed: Any) -> Any:
    """A model of two layers and the tokens of the arithmetic task, with dropout: it asks the random state."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **changed,
        )
    )


def tokens_of_a_step(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """An outcome reward that needs no answer to be right: models of this size have none."""
    return [-0.1 * len(ids) for ids in completion_ids]


def ppo(folder: Path, steps: int) -> StepPPOTrainer:
    """PPO with everything that has a state: value model, running moments, adaptive KL, guards."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    policy = folder / "policy"
    if not (policy / "config.json").is_file():  # the reference is loaded from where the policy comes from
        small(LlamaForCausalLM, 0).save_pretrained(policy)
        tokenizer.save_pretrained(policy)
    settings = FractalSettings(scorer="token")
    judge = StepRewardModel(
        make_scorer(small(LlamaForTokenClassification, 1, num_labels=1), settings), tokenizer, settings
    )
    args = StepPPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_generations=2,
        num_iterations=2,
        max_completion_length=8,
        normalize_step_rewards=True,
        kl_coef=0.1,
        kl_target=0.5,
        guard_reference_batches=1,
        **SHARED,
    )
    prompts = Dataset.from_list([{"prompt": problem.prompt} for problem in make_problems(32, seed=0)])
    return StepPPOTrainer(
        str(policy), reward_model=judge, reward_funcs=tokens_of_a_step, args=args, train_dataset=prompts
    )


def fractal(folder: Path, steps: int) -> FractalTrainer:
    """The likelihood scorer, with a head of its own learning rate and a prior that decays."""
    rng, beliefs = random.Random(0), Beliefs(0.3)
    rows = [
        {"prompt": problem.prompt, "completion": beliefs.respond(problem, rng), "label": float(number % 2)}
        for number, problem in enumerate(make_problems(24, seed=0))
    ]
    args = FractalConfig(
        output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=4, max_length=128, **SHARED
    )
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    return FractalTrainer(small(LlamaForCausalLM, 0), args, train_dataset=rows, processing_class=tokenizer)


TRAINERS: dict[str, Callable[[Path, int], Any]] = {"step_ppo": ppo, "fractal": fractal}


def run(kind: str, folder: str, steps: int, held: Any, hold_after: float) -> None:
    """Train to the end, from the last checkpoint if there is one: what every process of this benchmark does.

    Args:
        kind: The trainer.
        folder: Of the run.
        steps: That it makes.
        held: An event, set when the process waits to be killed.
        hold_after: Time from which on no checkpoint is finished: the first one lacks its state, and waits.
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_state = TrainerState.save_to_json

    def hold(state: TrainerState, path: str) -> None:
        while time.time() >= hold_after:
            held.set()
            time.sleep(60)
        write_state(state, path)

    TrainerState.save_to_json = hold
    with contextlib.redirect_stdout(io.StringIO()):  # the logs are in the checkpoints
        TRAINERS[kind](Path(folder), steps).train(resume_from_checkpoint=can_resume(folder))


def start(kind: str, folder: Path, steps: int, hold_after: float = float("inf")) -> tuple[Any, Any]:
    """A process that trains, and the event that tells that it waits."""
    held = killable.CONTEXT.Event()
    process = killable.start(run, kind, str(folder), steps, held, hold_after, imported=IMPORTED)
    return process, held


def finish(kind: str, folder: Path, steps: int) -> float:
    """Let a run come to its end; its seconds."""
    process, _held = start(kind, folder, steps)  # an event lives as long as it is referenced
    return killable.finish(process, f"The run in {folder}")


def is_being_saved(folder: Path) -> bool:
    """Whether there is a checkpoint that has begun and has not ended."""
    return any(path.is_dir() and not (path / MANIFEST).is_file() for path in folder.glob("checkpoint-*"))


def kill(kind: str, folder: Path, steps: int, *, after: float, in_save: bool) -> dict[str, Any]:
    """Start (or resume) a run and kill it.

    Args:
        kind: The trainer.
        folder: Of the run.
        steps: That it wants to make.
        after: Seconds until then.
        in_save: Wait beyond that for the next checkpoint that is being written. It is not finished, however late this
            process sees it.

    Returns:
        The step of the last whole checkpoint, whether it was still running, whether a part of a checkpoint is left.
    """
    torn = set(folder.glob("checkpoint-*")) if is_being_saved(folder) else set()
    process, held = start(kind, folder, steps, time.time() + after if in_save else float("inf"))
    process.join(after)
    while in_save and process.is_alive() and not held.is_set():
        if any(not (path / MANIFEST).is_file() for path in set(folder.glob("checkpoint-*")) - torn):
            break
        time.sleep(0.0005)
    alive = process.is_alive()
    process.kill()
    process.join()
    last = last_checkpoint(folder)
    return {
        "killed": alive,
        "checkpoint_step": int(last.rpartition("-")[2]) if last else 0,
        "checkpoint_torn": is_being_saved(folder),
    }


def without_times(state: Path) -> dict[str, Any]:
    """The trainer's state, but for times, and for what it says of folders."""
    content = json.loads(state.read_text(encoding="utf-8"))
    content["log_history"] = [
        {name: value for name, value in row.items() if not name.endswith(TIMES)} for row in content["log_history"]
    ]
    return content


def differences(ours: Path, theirs: Path) -> list[str]:
    """Files in which two checkpoints differ."""
    names = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED}
        for folder in (ours, theirs)
    ]
    differ = sorted(str(name) for name in names[0] ^ names[1])
    differ += sorted(
        str(name) for name in names[0] & names[1] if (ours / name).read_bytes() != (theirs / name).read_bytes()
    )
    return differ + ([STATE] if without_times(ours / STATE) != without_times(theirs / STATE) else [])


def main() -> None:
    """Run the benchmark and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10, help="how often each trainer is killed")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", default=str(RESULTS / "kill_and_resume.jsonl"))
    arguments = parser.parse_args()
    results, rng = ResultsFile(arguments.results), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as work:
        lasts: dict[str, float] = {}
        for kind in TRAINERS:
            finish(kind, Path(work) / kind / "whole", arguments.steps)  # the server's start is not part of a run
            lasts[kind] = finish(kind, Path(work) / kind / "timed", arguments.steps)
        for moment in range(arguments.moments):
            share = rng.random()
            for kind in TRAINERS:
                row = measure(results, kind, Path(work) / kind, arguments.steps, moment, share * lasts[kind])
                print(kind, moment, row["metrics"], flush=True)


def measure(results: ResultsFile, kind: str, work: Path, steps: int, moment: int, after: float) -> dict[str, Any]:
    """Kill a run, resume it, compare it with the one in `work/whole`, and append the row."""
    folder, began, in_save = work / f"killed-{moment}", time.perf_counter(), bool(moment % 2)
    while True:
        found = kill(kind, folder, steps, after=after, in_save=in_save)
        if found["killed"]:
            break
        after /= 2  # it ended before it could be killed: this machine is faster now
        shutil.rmtree(folder)
    finish(kind, folder, steps)
    differ = differences(folder / f"checkpoint-{steps}", work / "whole" / f"checkpoint-{steps}")
    return results.append(
        benchmark="kill_and_resume",
        arm=kind,
        dataset="arithmetic",
        seed=moment,
        split="train",
        metrics={"equal": int(not differ), "files_that_differ": len(differ), **found},
        config={"steps": steps, "killed_after": after, "in_save": in_save, "differ": differ},
        seconds=time.perf_counter() - began,
    )


if __name__ == "__main__":
    main()
