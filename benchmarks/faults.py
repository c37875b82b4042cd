"""Does a command that is killed at any moment, and run again, end with the result of an undisturbed run?

Each command runs once undisturbed. Then, chain after chain, the same command is killed with SIGKILL three times and
runs to its end: one kill at a random moment, one while it prepares, one while it is most vulnerable (it writes a
checkpoint, embeds, or appends rows). The rival is the undisturbed run: weights are compared byte by byte, rows without
their times; nothing may be left over or occur twice.

    python -m benchmarks.faults --kills 30

Appends a row for each chain to `benchmarks/results/faults.jsonl`, and continues with the chains that have no row; about
an hour on an idle core.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import killable
from benchmarks.common.places import RESULTS, default_encoder
from fractal_rm.cli.main import main as fractal_rm
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.study.arms import ARMS
from fractal_rm.study.quickstart import Amounts, Quickstart, QuickstartArguments
from fractal_rm.study.study import write_chosen
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems

# Kills in a chain, before the command runs to its end.
KILLS = ("random", "preparing", "writing")
# Names of files and folders that only a killed process leaves.
LEFT_OVER = ("**/*.partial", "**/.writing-*", "**/running/*", "**/*.tmp")
TIMES = ("seconds", "finished_at", "command", "commit")
TINY = Amounts(
    responses=192, updates=2, evaluate_every=1, held_out=16, rollouts_per_update=16, validation=48, ppo_prompts=64
)
IMPORTED = ["fractal_rm.cli.train", "fractal_rm.cli.ppo", "fractal_rm.cli.sample", "fractal_rm.study.quickstart"]
TRAINING = ["--max_steps", "4", "--save_steps", "1", "--logging_steps", "1", "--report_to", "none", "--bf16", "false"]
TRAINING += ["--use_cpu", "true", "--disable_tqdm", "true", "--resume_from_checkpoint", "true"]


@dataclass
class Command:
    """A command under test.

    Args:
        run: Does its work in a folder, from where an earlier process stopped.
        prepare: Makes its input.
        writes: Names of files by whose change one sees that it writes.
        results: Files of rows.
    """

    run: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    writes: tuple[str, ...] = ("checkpoint-*/*",)
    results: tuple[str, ...] = field(default=())


def command_line(name: str, *flags: str, **paths: str) -> Callable[[Path], Any]:
    """A command that writes into the folder; `paths` are flags with names in it."""

    def run(folder: Path) -> None:
        placed = [word for flag, path in paths.items() for word in (f"--{flag}", str(folder / path))]
        status = fractal_rm([name, *flags, *placed])
        if status:
            raise SystemExit(status)

    return run


def write_responses(folder: Path) -> None:
    """Labelled responses, for `train`."""
    rng, beliefs = random.Random(0), Beliefs(0.3)
    rows = [
        {"prompt": problem.prompt, "completion": beliefs.respond(problem, rng), "label": float(number % 2)}
        for number, problem in enumerate(make_problems(48, seed=0))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_settings(folder: Path) -> None:
    """Settings of two arms, for `compare`."""
    (folder / "smoke").mkdir(parents=True, exist_ok=True)
    arms = {name: ARMS[name].trials[0] for name in ("outcome_grpo", "fractal")}
    write_chosen(folder / "smoke" / "chosen.yaml", arms, "a benchmark")


def quickstart(folder: Path) -> None:
    """The whole pipeline at a size that proves nothing."""
    Quickstart(QuickstartArguments(output_dir=str(folder)), TINY).run()


def commands() -> dict[str, Command]:
    """All commands that leave work behind; training on embeddings where an encoder is installed."""
    small = ["--model", str(SHIPPED_POLICY)]
    prompts = ["--task", "arithmetic", "--num_problems", "32", "--num_eval_problems", "4"]
    rollouts = ["--reward_function", "exact_answer", "--per_device_train_batch_size", "4", "--num_generations", "2"]
    rollouts += ["--per_device_eval_batch_size", "4", "--max_completion_length", "8"]
    found = {
        "train": Command(
            command_line("train", *small, *TRAINING, output_dir="out", train_file="train.jsonl"), write_responses
        ),
        "ppo": Command(command_line("ppo", *small, *TRAINING, *prompts, *rollouts, output_dir="out")),
        "sample": Command(
            command_line(
                "sample", *small, "--task", "arithmetic", "--num_prompts", "24", "--samples", "2", "--batch_size", "4",
                "--dtype", "float32", output="responses.jsonl",
            ),
            writes=("responses.jsonl",),
            results=("responses.jsonl",),
        ),
        "compare": Command(
            command_line(
                "compare", "--smoke", "true", "--settings", "easy", "--seeds", "1", "--arms", "outcome_grpo", "fractal",
                output_dir="",
            ),
            write_settings,
            writes=("smoke/results.jsonl",),
            results=("smoke/results.jsonl",),
        ),
        "quickstart": Command(quickstart, writes=("ppo/*/checkpoint-*/*", "results.jsonl"), results=("results.jsonl",)),
    }  # fmt: skip
    encoder = default_encoder()
    if encoder is not None:
        flags = ["--model", encoder, "--scorer", "embedding", *TRAINING]
        found["train_embedding"] = Command(
            command_line("train", *flags, output_dir="out", train_file="train.jsonl", embedding_cache="cache"),
            write_responses,
            writes=("cache/**/*",),
        )
    return found


# Processes ------------------------------------------------------------------------------------------------------------


def work(name: str, folder: str) -> None:
    """What every process of this benchmark does."""
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "200"
    with contextlib.redirect_stdout(io.StringIO()):
        commands()[name].run(Path(folder))


def start(name: str, folder: Path) -> Any:
    """A process of a command."""
    return killable.start(work, name, str(folder), imported=IMPORTED)


def finish(name: str, folder: Path) -> float:
    """Let a command come to its end; its seconds."""
    return killable.finish(start(name, folder), f"`{name}` in {folder}")


def seen(folder: Path, patterns: tuple[str, ...]) -> set[tuple[str, int]]:
    """Files with their sizes."""
    found = set()
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.add((str(path), path.stat().st_size))
    return found


def kill(name: str, folder: Path, how: str, seconds: float) -> bool:
    """Start a command and kill it; whether it was still running."""
    writes = tuple(f"out/{pattern}" if name in ("train", "ppo") else pattern for pattern in commands()[name].writes)
    before, process = seen(folder, writes), start(name, folder)
    if how != "writing":
        process.join(seconds)
    while how == "writing" and process.is_alive() and seen(folder, writes) == before:
        time.sleep(0.0005)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


# What is left ---------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    """Checksums of the weights that a command left."""
    files = [path for path in folder.rglob("*.safetensors") if "cache" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def rows(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Rows without their times, sorted."""
    found = [row for name in files for row in read_results(folder / name)]
    return sorted(json.dumps(_timeless(row), sort_keys=True) for row in found)


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _timeless(x) for key, x in value.items() if not key.endswith(TIMES)}


def differences(name: str, killed: Path, whole: Path) -> dict[str, list[str]]:
    """What a killed command has made otherwise, written twice, or left over."""
    files = commands()[name].results
    ours, theirs = digests(killed), digests(whole)
    mine, expected = Counter(rows(killed, files)), Counter(rows(whole, files))
    return {
        "weights": sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)),
        "rows": sorted((mine - expected) + (expected - mine)),
        "left_over": sorted(str(path.relative_to(killed)) for pattern in LEFT_OVER for path in killed.glob(pattern)),
    }


def measure(results: ResultsFile, name: str, work_folder: Path, chain: int, seconds: float) -> dict[str, Any]:
    """Kill a command as often as a chain does, let it end, compare it with the whole one, and append the row."""
    rng, began = random.Random(f"{name} {chain}"), time.perf_counter()
    folder = work_folder / f"chain-{chain}"
    commands()[name].prepare(folder)
    moments = {"random": rng.uniform(0.2, 1.0) * seconds, "preparing": rng.uniform(0.0, 0.2) * seconds, "writing": 0.0}
    order = rng.sample(KILLS, len(KILLS))
    killed = [kill(name, folder, how, moments[how]) for how in order]
    finish(name, folder)
    differ = differences(name, folder, work_folder / "whole")
    shutil.rmtree(folder)
    return results.append(
        benchmark="faults",
        arm=name,
        dataset="arithmetic",
        seed=chain,
        split="train",
        metrics={
            "kills": sum(killed),
            "equal": int(not any(differ.values())),
            **{k: len(v) for k, v in differ.items()},
        },
        config={"order": order, "moments": moments, "differ": differ},
        seconds=time.perf_counter() - began,
    )


def main() -> None:
    """Run the benchmark and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often each command is killed while it runs")
    parser.add_argument("--commands", nargs="+", choices=list(commands()), default=list(commands()))
    parser.add_argument("--results", default=str(RESULTS / "faults.jsonl"))
    arguments = parser.parse_args()
    results, seconds = ResultsFile(arguments.results), {}
    with tempfile.TemporaryDirectory() as place:
        while left := [name for name in arguments.commands if kills(results, name) < arguments.kills]:
            for name in left:  # in turn: a stopped benchmark has tried all of them
                folder = Path(place) / name
                if name not in seconds:
                    commands()[name].prepare(folder / "whole")
                    seconds[name] = finish(name, folder / "whole")
                row = measure(results, name, folder, chains(results, name), seconds[name])
                print(name, row["seed"], row["metrics"], flush=True)


def _rows_of(results: ResultsFile, name: str) -> list[dict[str, Any]]:
    return [row for row in results.rows() if row["arm"] == name]


def chains(results: ResultsFile, name: str) -> int:
    """Chains of kills of a command that have rows: the number of the next one."""
    return len(_rows_of(results, name))


def kills(results: ResultsFile, name: str) -> int:
    """How often a command was killed so far, while it ran."""
    return sum(row["metrics"]["kills"] for row in _rows_of(results, name))


if __name__ == "__main__":
    main()
