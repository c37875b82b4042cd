"""The scoring server as a process, and an untrained model for it."""

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

from fractal_rm.scorers.checkpoint import load_tokenizer, make_scorer, save_scorer
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

MEGABYTE = 1e6


class Server(NamedTuple):
    """A server that runs: its port, its process, the file of what it says."""

    port: int
    process: subprocess.Popen[str]
    log: Path

    def forget_peak(self) -> None:
        """Let the largest memory so far, `VmHWM`, be that of now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="utf-8")

    def memory(self, name: str) -> float:
        """Megabytes that the system counts for the process under a name such as `VmRSS`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / MEGABYTE

    def log_lines(self) -> int:
        """Lines that the server has said."""
        return len(self.log.read_bytes().splitlines())


@contextmanager
def serving(folder: Path, log: Path, descriptors: int = 256) -> Iterator[Server]:
    """The server of the command line with so many descriptors, which ends with the block."""
    command = [sys.executable, "-m", "fractal_rm.cli.main", "serve", "--model", str(folder), "--port", "0"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)),
        )
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/score", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"The server did not start: {log.read_text(encoding='utf-8')}")
        yield Server(int(found[1]), process, log)
    finally:
        process.kill()
        process.wait()


def save_model(folder: Path, **settings: Any) -> Path:
    """A reward model of the shipped policy, which nobody has trained."""
    block = FractalSettings(scorer="likelihood", **settings)
    policy: Any = AutoModelForCausalLM.from_pretrained(SHIPPED_POLICY, trust_remote_code=False)
    save_scorer(folder, make_scorer(policy, block), load_tokenizer(SHIPPED_POLICY), block)
    return folder
