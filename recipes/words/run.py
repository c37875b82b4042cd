"""The whole recipe, command by command: policy, labelled responses, reward model, PPO.

    python recipes/words/run.py                                   # the small budget, on a CPU (`make words`)
    python recipes/words/run.py --budget full --device cuda       # all arms and seeds, on one large GPU

Every command is printed before it runs. A stopped run continues where it was; finished parts are not repeated.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.interrupts import Interrupted, handled, interrupt

RECIPE = Path(__file__).parent


@dataclass(frozen=True)
class Amounts:
    """Amounts of a budget.

    Args:
        prompts: Prompts whose responses the reward model learns from, eight each.
        judged: Held-out prompts on which the reward model is evaluated, eight responses each.
        study: Flags of `study.py`.
        tuned: Whether learning rates are chosen by trials first.
    """

    prompts: int
    judged: int
    study: str
    tuned: bool = False


BUDGETS = {
    "small": Amounts(
        prompts=60,
        judged=16,
        study="--updates 6 --rollouts 32 --held_out 40 --draws 2 --seeds 1 --arms outcome_grpo dense_outcome "
        "--learning_rate 6e-4",
    ),
    "full": Amounts(prompts=800, judged=150, study="--updates 40 --rollouts 128 --seeds 5", tuned=True),
}


@dataclass(frozen=True)
class Step:
    """A command, and the file that shows that it has finished.

    Args:
        name: What it does.
        command: The command after `python`.
        done: A file that exists when it has finished; None: the command itself continues where it stopped.
        threads: Of each process, on a CPU.
    """

    name: str
    command: tuple[str, ...]
    done: Path | None = None
    threads: int = field(default=1)


def steps(base: Path, work: Path, amounts: Amounts, device: str, threads: int) -> list[Step]:
    """The commands in their order.

    Args:
        base: Folder of the base model.
        work: Folder of all results.
        amounts: How much is done.
        device: `cpu` or `cuda`.
        threads: Of a stage that is one process.
    """
    policy, solutions, reward_model = work / "policy" / "model", work / "solutions", work / "reward_model"
    sample = ("-m", "fractal_rm.cli.main", "sample", "--model", str(policy), "--task", "reasoning_gym")
    sample += ("--task_name", "gsm_symbolic", "--max_new_tokens", "120", "--batch_size", "256")
    train = ["-m", "fractal_rm.cli.main", "train", "--config", str(RECIPE / "reward_model.yaml")]
    train += ["--model", str(policy), "--data_dir", str(work), "--output_dir", str(reward_model)]
    if device == "cuda":
        train += ["--use_cpu", "false"]
    else:  # the same batches in parts need less memory
        train += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
        train += ["--per_device_eval_batch_size", "8"]
    if any(reward_model.glob("checkpoint-*")):
        train += ["--resume_from_checkpoint", "true"]
    # Runs one after another (no `--jobs`): two at once would need twice the memory.
    study = (str(RECIPE / "study.py"), "--work", str(work), *amounts.study.split())
    adapter = (str(RECIPE / "policy.py"), "--model", str(base), "--output_dir", str(work / "policy"))

    def responses(split: str, count: int, file: Path, *flags: str) -> Step:
        command = (*sample, "--split", split, "--num_prompts", str(count), "--output", str(file), *flags)
        return Step(f"responses of the policy ({split})", command, threads=threads)

    held_out, judged = work / "held_out.jsonl", ("--gold_steps", "true")
    return [
        Step(
            "the fine-tuned policy, from its adapter",
            (*adapter, "--adapter", str(RECIPE / "adapter"), "--solutions", "0"),
            policy / "config.json",
        ),
        responses("reward_model", amounts.prompts, solutions / "train.jsonl"),
        responses("validation", amounts.judged, solutions / "validation.jsonl", *judged),
        responses("held_out", amounts.judged, held_out, *judged),
        Step("the reward model, from right and wrong answers", tuple(train), reward_model / "config.json", threads),
        Step("what the policy is worth", (str(RECIPE / "measure.py"), str(held_out))),
        *([Step("learning rates", (*study, "--tune"))] if amounts.tuned else []),
        Step("PPO", study),
    ]


def run_step(step: Step, device: str) -> tuple[int, dict[str, float]]:
    """Run a command to its end.

    Returns:
        Its exit status, and what it took: `minutes`, `processor_minutes` and `peak_gb`, its peak memory.
    """
    beside = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = os.environ | {"OMP_NUM_THREADS": str(step.threads)} | beside
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *step.command], env=environment)
    try:
        with handled(interrupt):
            _, status, used = os.wait4(process.pid, 0)
    except Interrupted as end:
        if end.number == signal.SIGTERM:  # Ctrl-C reaches the command by itself
            process.terminate()
        process.wait()  # it saves its work first
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, {
        "minutes": (time.monotonic() - start) / 60,
        "processor_minutes": (used.ru_utime + used.ru_stime) / 60,
        "peak_gb": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("runs/words/smollm2-135m"), help="folder of the base model")
    parser.add_argument("--work", type=Path, default=Path("runs/words"), help="folder of all results, by budget")
    parser.add_argument("--budget", choices=list(BUDGETS), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dry_run", action="store_true", help="show the commands and run none")
    arguments = parser.parse_args(argv)
    base, work, amounts = arguments.model, arguments.work / arguments.budget, BUDGETS[arguments.budget]
    if not (base / "config.json").is_file():
        sys.exit(f"run: {base} holds no model. Run `make words-model` first, or give `--model`.")
    # More threads help little: a forward pass of this model is many small steps.
    threads = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    start, costs = time.monotonic(), ResultsFile(work / "run.jsonl")
    for number, step in enumerate(steps(base, work, amounts, arguments.device, threads), 1):
        print(f"\n[{number}, {(time.monotonic() - start) / 60:.0f} min] {step.name}", flush=True)
        print("  python " + " ".join(step.command), flush=True)
        if arguments.dry_run:
            continue
        if step.done is not None and step.done.is_file():
            print("  finished before", flush=True)
            continue
        try:
            code, used = run_step(step, arguments.device)
        except Interrupted as end:
            print(f"run: interrupted in step {number} ({step.name}). Start again to continue from there.")
            sys.exit(end.status)
        if code:
            sys.exit(f"run: step {number} ({step.name}) ended with status {code}. Start again to continue from there.")
        costs.append(
            benchmark="words_run",
            arm=step.name,
            dataset="gsm_symbolic",
            seed=None,
            split=arguments.budget,
            metrics=used,
            config={"device": arguments.device, "threads": step.threads},
            seconds=60 * used["minutes"],
        )
    if not arguments.dry_run:
        print("\n" + cost(costs.path) + "\n\n" + summary(work / "words.jsonl"))


def cost(rows: Path) -> str:
    """What each step took; of a step that was stopped, its last part."""
    lines = [f"{'minutes':>7}  {'processor':>9}  {'peak, GB':>8}  step"]
    for row in {row["arm"]: row for row in read_results(rows)}.values():
        numbers = row["metrics"]
        lines.append(
            f"{numbers['minutes']:7.1f}  {numbers['processor_minutes']:9.1f}  {numbers['peak_gb']:8.2f}  {row['arm']}"
        )
    return "\n".join(lines)


def summary(results: Path) -> str:
    """Accuracy of each arm before and after.

    Args:
        results: Rows of the study.
    """
    lines = ["arm                  start   end   (held-out accuracy, %)"]
    points: dict[str, list[float]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "rollouts" in row["metrics"] and row["split"] == "held_out":
            points.setdefault(row["arm"], []).append(100 * row["metrics"]["accuracy"])
    lines += [f"{arm:<20} {values[0]:5.1f} {values[-1]:5.1f}" for arm, values in points.items()]
    return "\n".join([*lines, f"{results} holds the rows."])


if __name__ == "__main__":
    main()
