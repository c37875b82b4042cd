"""Scores saved on disk while a command works, so that a stopped command can continue."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from fractal_rm.data.bag import Step, StepScores
from fractal_rm.files import naming_file
from fractal_rm.reward_model import StepRewardModel

# Number of responses scored between two writes.
CHUNK = 256


class KeptScores:
    """A reward model that saves every score to a file and reuses saved scores.

    The key of a score is a digest of the model's files, the prompt, the response and its steps, so other inputs or
    models never get it.

    Args:
        model: Scores what is not in the file.
        path: The file; several models may share it.
        name: Folder or hub id of the model.

    Attributes:
        reused: Responses whose scores came from an earlier run.
    """

    def __init__(self, model: StepRewardModel, path: Path, name: str) -> None:
        self._model, self.path, self.reused = model, path, 0
        files = sorted(one for one in Path(name).glob("*") if one.is_file())
        self._name = [name, *((one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files)]
        self._known: dict[str, StepScores] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                key, row = json.loads(line)
            except ValueError:  # truncated by a killed process
                continue
            self._known[key] = StepScores(**row | {"steps": [Step(**step) for step in row["steps"]]})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def score(
        self, prompts: Sequence[Any], responses: Sequence[Any], *, spans: Sequence[Any], **options: Any
    ) -> list[StepScores]:
        """Scores as [`~fractal_rm.reward_model.StepRewardModel.score`] gives them; `error` has rows of a chunk."""
        keys = [self._key(row) for row in zip(prompts, responses, spans, strict=True)]
        reused = sum(key in self._known for key in keys)
        self.reused += reused
        console = Console(stderr=True)
        if reused:
            told = f"{reused:,} of {len(keys):,} responses have scores already, in {self.path}."
            console.print(told, markup=False, highlight=False, soft_wrap=True)
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        # Group similar lengths, as within a call: chunks of mixed lengths need more padding.
        missing.sort(key=lambda i: len(responses[i]))
        starts = range(0, len(missing), CHUNK)
        if len(starts) > 1:  # one bar over all chunks, instead of one in each
            options["progress"] = False
        for start in track(starts, description="Scoring", console=console, disable=len(starts) <= 1):
            chunk = missing[start : start + CHUNK]
            asked = ([values[i] for i in chunk] for values in (prompts, responses))
            found = self._model.score(*asked, spans=[spans[i] for i in chunk], **options)
            self._keep({keys[i]: one for i, one in zip(chunk, found, strict=True)})
        return [self._known[key] for key in keys]

    def forget(self) -> None:
        """Delete the file: the work is done."""
        self.path.unlink(missing_ok=True)

    def _key(self, row: tuple[Any, ...]) -> str:
        return hashlib.blake2b(json.dumps([self._name, row]).encode(), digest_size=16).hexdigest()

    def _keep(self, found: dict[str, StepScores]) -> None:
        self._known |= found
        lines = "".join(json.dumps([key, asdict(one)]) + "\n" for key, one in found.items())
        with naming_file(self.path), self.path.open("ab") as file:  # the first line break ends a truncated line
            file.write(b"\n" + lines.encode())
