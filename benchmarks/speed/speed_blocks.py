"""One side of a speed comparison: training that stops after every block of updates and waits for a signal to continue.

Both sides of a comparison run in separate processes and environments, and only one works at a time. A side writes JSON
lines: one when it is ready, one after each block. It must run under old versions of TRL, so it imports nothing of this
package.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Enough(Exception):
    """The other end said so: training is over."""


class Line:
    """The line to the process that compares. What libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        """Send one message."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def wait(self) -> int:
        """Number of updates that the next block shall have.

        Raises:
            Enough: If there shall be none.
        """
        word = sys.stdin.readline().strip()
        if not word:
            raise Enough
        return int(word)


class PeakMemory:
    """Most memory that this process has held since it was made, in MiB: of the GPU, or resident on a CPU.

    Linux keeps the most that was ever resident, which would be that of the imports, but sets it back when asked. Where
    it cannot be set back, it is that of the whole process.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self.peak

    @property
    def peak(self) -> float:
        """In MiB."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        with contextlib.suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Blocks(TrainerCallback):
    """Stops a training after each block of optimizer steps.

    Args:
        line: To the process that compares.
        work: Units of work done so far (episodes, tokens), read at the ends of blocks.
    """

    def __init__(self, line: Line, work: Callable[[int], float]) -> None:
        self.line, self.work = line, work
        self.memory = PeakMemory()
        self.left, self.steps = 0, 0

    def _begin(self) -> None:
        self.left = self.line.wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._done, self._cpu, self._start = self.work(self.steps), time.process_time(), time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.say(ready=True)
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.line.say(
            seconds=time.perf_counter() - self._start,
            cpu_seconds=time.process_time() - self._cpu,
            work=self.work(self.steps) - self._done,
            memory=self.memory.peak,
            start_memory=self.memory.start,
        )
        self._begin()


class Stages:
    """Adds up the seconds that named functions take, each less what others of them take inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    def watch(self, owner: Any, function: str, stage: str) -> None:
        """Replace a function of a module, class or instance by one that is timed as part of a stage."""
        inner = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                took = time.perf_counter() - start
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, function, timed)
