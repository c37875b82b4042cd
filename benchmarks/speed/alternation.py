"""Two sides, alternated in one run: blocks A B, B A, A B ..., and the ratio of their speeds with its spread."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from benchmarks.speed.peers import environment
from fractal_rm.evaluation.results import ResultsFile

DRAWS = 2000
PATIENCE = 60  # seconds that a side has to end


class Worker(Protocol):
    """What works in blocks."""

    def block(self, updates: int) -> dict[str, Any]:
        """Do some updates; see [`Side.block`]."""
        ...


class Side:
    """A process that works in blocks when it is told to.

    Args:
        name: For messages.
        module: What it runs, as `python -m` takes it.
        arguments: Its arguments.
        python: The interpreter, of the environment that it needs.

    Entering it waits until it is ready, so that two sides can get ready at the same time.

    Raises:
        RuntimeError: If it ends by itself; the sentence holds the end of what it said.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], *, python: Path | None = None) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(),
        )

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-2000:].strip()
            self._close()
            raise RuntimeError(f"{self.name} ended with status {self._process.returncode}. It said:\n{said}")
        return json.loads(answer)

    def block(self, updates: int) -> dict[str, Any]:
        """Do some updates.

        Args:
            updates: How many.

        Returns:
            What the side measured: `seconds`, `cpu_seconds`, `work`, `memory`, `start_memory`.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(f"{updates}\n")
        self._process.stdin.flush()
        return self._listen()

    def __enter__(self) -> "Side":
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        """End the process: a side that reads no further number of updates ends by itself."""
        with self._process, self._errors:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()


def alternate(ours: Worker, rival: Worker, *, blocks: int, updates: int) -> dict[str, float]:
    """Let two sides work in turns and compare them.

    The first block of each is not counted: caches and thread pools are made in it. Who goes first changes every round.

    Args:
        ours: One side.
        rival: The other.
        blocks: Blocks of each that count.
        updates: Updates in a block.

    Returns:
        See [`compare`]; `cpu_time_ratio`, the same by the time that the processor gave each, which other work on the
        machine disturbs less; `peak_memory_ratio`, and the memory behind it in MiB.
    """
    measured: dict[str, list[dict[str, Any]]] = {"ours": [], "rival": []}
    sides = {"ours": ours, "rival": rival}
    for number in range(blocks + 1):
        for name in ("ours", "rival") if number % 2 else ("rival", "ours"):
            found = sides[name].block(updates)
            if number:
                measured[name].append(found)
    peaks = {name: max(block["memory"] for block in found) for name, found in measured.items()}
    speeds = compare(
        [block["work"] / block["seconds"] for block in measured["ours"]],
        [block["work"] / block["seconds"] for block in measured["rival"]],
    )
    cpu = [
        (mine["work"] / mine["cpu_seconds"]) / (theirs["work"] / theirs["cpu_seconds"])
        for mine, theirs in zip(measured["ours"], measured["rival"], strict=True)
    ]
    return speeds | {
        "cpu_time_ratio": median(cpu),
        "peak_memory_ratio": peaks["ours"] / peaks["rival"],
        "ours_peak_mb": peaks["ours"],
        "rival_peak_mb": peaks["rival"],
        "ours_start_mb": measured["ours"][0]["start_memory"],
        "rival_start_mb": measured["rival"][0]["start_memory"],
    }


def compare(ours: Sequence[float], rival: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """The median ratio of paired speeds, with a bootstrap interval of 95 % over the pairs.

    Args:
        ours: Speeds of the blocks of one side.
        rival: Those of the other side's blocks, each next to the one of the same place.
        seed: Seed of the bootstrap.

    Returns:
        `ours`, `rival` (medians), `ratio`, `ratio_low`, `ratio_high`.

    Example:
        >>> compare([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        {'ours': 4.0, 'rival': 2.0, 'ratio': 2.0, 'ratio_low': 2.0, 'ratio_high': 2.0}
    """
    ratios = np.array([mine / theirs for mine, theirs in zip(ours, rival, strict=True)])
    draws = np.random.default_rng(seed).integers(len(ratios), size=(DRAWS, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return {
        "ours": median(ours),
        "rival": median(rival),
        "ratio": float(np.median(ratios)),
        "ratio_low": float(low),
        "ratio_high": float(high),
    }


def record(file: ResultsFile, *, arm: str, metrics: dict[str, Any], **fields: Any) -> None:
    """Append a row about the arithmetic task and show it.

    Args:
        file: Of the benchmark.
        arm: The rival, or what was measured.
        metrics: What was found.
        fields: The other fields of a row: `benchmark`, `split`, `config`, `seconds`.
    """
    file.append(arm=arm, metrics=metrics, dataset="arithmetic", seed=0, **fields)
    print(f"{arm}, {fields['split']}: " + ", ".join(f"{key} {value:.3g}" for key, value in metrics.items()), flush=True)
