"""Results on disk: one measurement per line, with everything needed to reproduce it.

Rows are only ever added. A process that is killed while it writes leaves at most one torn line, which readers skip with
a warning and later rows do not touch.
"""

import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fractal_rm.data.rows import bounded_lines
from fractal_rm.files import parse_json
from fractal_rm.versions import package_versions


class ResultsFile:
    """An append-only file of results.

    Args:
        path: The file, usually `results.jsonl`. Missing folders are made with the first row.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.jsonl"
        >>> file = ResultsFile(path)
        >>> row = file.append(benchmark="demo", arm="dense", dataset="toy", seed=0, split="test",
        ...                   metrics={"accuracy": 0.75}, config={}, seconds=1.5)
        >>> read_results(path)[0]["metrics"]
        {'accuracy': 0.75}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Recorded when the run starts, because the files may change while it runs.
        self._commit = current_commit()

    def append(
        self,
        *,
        benchmark: str,
        arm: str,
        dataset: str,
        seed: int | None,
        split: str,
        metrics: Mapping[str, Any],
        config: Mapping[str, Any],
        seconds: float,
    ) -> dict[str, Any]:
        """Write one measurement as one line, in one write, and wait until it is on disk.

        A NaN or infinite metric (or config value) becomes null, because JSON lacks such numbers; it is read as None.

        Args:
            benchmark: The question that is asked.
            arm: Name of the compared system.
            dataset: Data set of the measurement.
            seed: Seed of the run, None if nothing was random.
            split: Part of the data set.
            metrics: Numbers by name.
            config: The settings that matter, as plain values, paths, numpy or torch scalars.
            seconds: Wall-clock time that the measurement took.

        Returns:
            The row as [`read_results`] gives it back.

        Raises:
            TypeError: If a metric or a setting cannot be written as JSON; nothing is written then.
        """
        row = {
            "benchmark": benchmark,
            "arm": arm,
            "dataset": dataset,
            "seed": seed,
            "split": split,
            "metrics": plain(metrics, "metrics"),
            "config": plain(config, "config"),
            "command": portable_command(sys.argv),
            "commit": self._commit,
            "versions": package_versions(),
            "machine": machine(),
            "seconds": round(float(seconds), 3),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a torn line: end it, so that this row starts on a new line
                    line = b"\n" + line
            try:
                written = file.write(line)
                os.fsync(file.fileno())
            except OSError as error:
                raise OSError(
                    f"{self.path}: no row was written ({error.strerror}). Free space and run again."
                ) from error
            if written != len(line):
                raise OSError(f"{self.path}: the disk is full, so the row is incomplete. Free space and run again.")
        return json.loads(line)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, including other processes' rows."""
        return read_results(self.path) if self.path.is_file() else []

    def has(self, **fields: Any) -> bool:
        """Whether a measurement has its row; see [`has_row`]."""
        return has_row(self.rows(), **fields)


def has_row(rows: Iterable[Mapping[str, Any]], **fields: Any) -> bool:
    """Whether one of the rows has these fields, with these values as a row stores them.

    Example:
        >>> has_row([{"arm": "dense", "seed": 0, "config": {"sizes": [1, 2]}}], arm="dense", config={"sizes": (1, 2)})
        True
    """
    wanted = plain(fields, "fields")
    return any(all(row[name] == value for name, value in wanted.items()) for row in rows)


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows of a file that [`ResultsFile`] wrote, in the order of writing; a metric that was not finite is None.

    Raises:
        ValueError: If a line is neither a row nor the torn beginning of one; it names the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.jsonl"
        >>> _ = path.write_text('{"benchmark": "demo", "metrics": {"auc": null}}')
        >>> read_results(path)
        [{'benchmark': 'demo', 'metrics': {'auc': None}}]
    """
    rows = []
    with Path(path).open("rb") as file:
        lines = list(bounded_lines(file, path))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"{path}, line {number}")
        except ValueError:  # invalid JSON, or truncated inside a character
            if not line.startswith(b"{") or _is_whole(line):
                raise
            warnings.warn(
                f"{path}, line {number} is torn, by a run that was killed while writing: skipped. "
                "Run that measurement again and remove the line.",
                stacklevel=2,
            )
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a result but {type(row).__name__}. Remove the line.")
        rows.append(row)
    return rows


def _is_whole(line: bytes) -> bool:
    """Whether a line is complete JSON (such as one with a duplicate name) and not torn."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def portable_command(argv: Sequence[str]) -> str:
    """A command line for a shell, made of `sys.argv`, without this machine's folders.

    Paths under the working folder or its parent become relative, paths under the home folder start with `~`, and any
    other absolute path is reduced to its last name.

    Example:
        >>> portable_command(["/opt/venv/bin/fractal-rm", "train", "--output_dir=/data/runs/rm"])
        'fractal-rm train --output_dir=rm'
    """
    program, *arguments = argv or [""]
    path = Path(program)
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # a module that `python -m` runs has one
    if spec is not None and spec.origin == program:
        words = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif path.name == "__main__.py":
        words = ["python", "-m", path.parent.name]
    elif path.suffix == ".py":
        words = ["python", _portable_path(program)]
    else:
        words = [path.name or "python"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words.append(name + equals + _portable_path(value) if equals else _portable_path(argument))
    return shlex.join(words)


def _portable_path(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    here, home = Path.cwd(), Path.home()
    if path.is_relative_to(here) or (here.parent != Path(here.anchor) and path.is_relative_to(here.parent)):
        return Path(os.path.relpath(path, here)).as_posix()
    if path.is_relative_to(home):
        return "~/" + path.relative_to(home).as_posix()
    return path.name


@functools.cache
def current_commit() -> str | None:
    """Commit of the running code, with the suffix `-dirty` if files of the package differ from it.

    None if the package does not run from a git checkout.
    """
    package = Path(__file__).resolve().parents[1]
    # Inside a git hook these variables name the hook's repository, which may be another one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    try:
        # A package installed inside someone's checkout is not part of it.
        if git("ls-files", "--error-unmatch", str(Path(__file__).resolve())).returncode:
            return None
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("-dirty" if git("diff", "--quiet", "HEAD", "--", ".").returncode else "")
    except OSError:  # git is not installed
        return None


@functools.cache
def machine() -> dict[str, Any]:
    """Names of processor and GPU (None without one) and the number of cores this process may use."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": cores, "gpu": gpu}


def plain(value: Any, name: str) -> Any:
    """A value that JSON can hold: NaN and infinite numbers become None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return _portable_path(os.fspath(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        return plain(value.item(), name)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(
        f"{name} is {type(value).__name__}, which a result cannot hold. Pass numbers, text, lists or dicts."
    )
