"""Logs of PPO runs, read from disk: each metric at each update, and the alarms of the guards."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal_rm.files import read_json
from fractal_rm.hf.checkpoints import STATE, last_checkpoint

METRICS_FILE = "metrics.json"
# Prefix of the metric that logs a signal's alarm.
ALARM = "guards/alarm/"


@dataclass(frozen=True)
class Run:
    """The log of one training."""

    name: str  # runs with the same name are seeds of one group
    folder: str  # as it was given
    file: str  # the file that was read there
    metrics: Mapping[str, Mapping[int, float]]  # finite values of each metric by update

    @property
    def last_update(self) -> int:
        """The last update with a log."""
        return max(update for curve in self.metrics.values() for update in curve)

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """Update and signal of each alarm, in the order in which they were raised."""
        return sorted(
            (update, key.removeprefix(ALARM))
            for key, curve in self.metrics.items()
            if key.startswith(ALARM)
            for update in curve
        )


def read_runs(entries: Sequence[str]) -> list[Run]:
    """Read runs, in the order given.

    Args:
        entries: `NAME=DIR`, or `DIR` with the folder's name: an output folder of `fractal-rm ppo` or a trainer, or a
            checkpoint. An entry that is an existing folder counts as DIR even if it contains `=`.

    Raises:
        OSError: If a folder does not exist.
        ValueError: If a folder has no log or is given twice, or names are ambiguous.
    """
    named = [_name_and_folder(entry) for entry in entries]
    places = Counter(Path(os.path.realpath(folder)) for _, folder, _ in named)
    twice = next((folder for _, folder, _ in named if places[Path(os.path.realpath(folder))] > 1), None)
    if twice is not None:
        raise ValueError(f"`runs` names the folder {twice} twice. Give each run once.")
    names = Counter(name for name, _, _ in named)
    for name, folder, is_given in named:
        if names[name] > 1 and not is_given:
            raise ValueError(
                f"{names[name]} runs are called {name!r}, {folder} by its folder only. Give each as NAME=DIR, with the "
                "same name for runs that differ only in the seed, and another name for others."
            )
    runs = []
    for name, folder, _ in named:
        file, history = _find_history(Path(folder))
        runs.append(Run(name, folder, file.relative_to(folder).as_posix(), metrics_by_update(history)))
    return runs


def metrics_by_update(history: Sequence[Any]) -> dict[str, dict[int, float]]:
    """The values of each metric by update, from a trainer's `log_history`.

    Values that are not finite are left out; if a resumed run logged an update twice, the later value counts.

    Example:
        >>> metrics_by_update([{"reward": 0.5, "step": 10}, {"reward": None, "kl": 0.1, "step": 20}])
        {'reward': {10: 0.5}, 'kl': {20: 0.1}}
    """
    found: dict[str, dict[int, float]] = {}
    for entry in history:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("step"), int):
            continue
        for key, value in entry.items():
            if key not in ("step", "epoch") and type(value) in (int, float) and math.isfinite(value):
                found.setdefault(key, {})[entry["step"]] = float(value)
    return found


def _name_and_folder(entry: str) -> tuple[str, str, bool]:
    """Name, folder, and whether the name was given."""
    name, equals, folder = entry.partition("=")
    is_given = bool(equals) and not Path(entry).is_dir()
    if is_given and not (name and folder):
        raise ValueError(f"`runs` holds {entry!r}. Give NAME=DIR, or the folder alone.")
    folder = folder if is_given else entry
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give `runs` the output folders of `fractal-rm ppo`.")
    return (name if is_given else Path(os.path.realpath(folder)).name), folder, is_given


def _find_history(folder: Path) -> tuple[Path, list[Any]]:
    """The log of a finished run, of a checkpoint, or of the last checkpoint of an unfinished run."""
    for file, key in _logs_in(folder):
        content = read_json(file) if file.is_file() else None
        history = content.get(key) if isinstance(content, dict) else None
        if isinstance(history, list):
            return file, history
    raise ValueError(
        f"{folder} has no {METRICS_FILE} with a history, no {STATE} and no complete checkpoint. Give the output folder "
        "of a PPO run that has ended or written a checkpoint (`save_steps`)."
    )


def _logs_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files that may hold a log, with its key; the last checkpoint is verified only if it is needed."""
    yield folder / METRICS_FILE, "history"
    yield folder / STATE, "log_history"
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        yield Path(checkpoint) / STATE, "log_history"
