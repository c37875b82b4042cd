"""The identity of a run and the contents of its checkpoints: `manifest.json`, the last file written.

The manifest has the size and the checksum of every other file, and the identity of the run: each setting that its
result depends on, and fingerprints of data and models. A checkpoint without a manifest was not finished; if its files
differ from its manifest, it is damaged; if its identity differs, it belongs to another run.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from fractal_rm.files import write_atomic

MANIFEST = "manifest.json"
# Manifests without a version, from the first releases, count as version 1.
MANIFEST_VERSION = 1
Identity = dict[str, Any]
# Rows hashed at a time, and values hashed at either end of a weight: this distinguishes models, but does not verify
# them.
_ROWS, _VALUES = 1000, 1024
# Settings that may change when a run is resumed: paths, logging and saving, and the machine.
_FREE_BEGINNINGS = ("eval_", "hub_", "log_", "logging_", "push_to_hub", "save_", "trackio_", "vllm_server_")
_FREE = {
    "ddp_timeout",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "embedding_cache",
    "enable_jit_checkpoint",
    "local_rank",
    "num_completions_to_print",
    "num_generations_eval",
    "num_train_epochs",  # with fewer epochs, training takes no further step
    "output_dir",
    "overwrite_output_dir",
    "per_device_eval_batch_size",
    "project",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "vllm_gpu_memory_utilization",
    "vllm_group_port",
}


# Files ----------------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, identity: Identity, files: Iterable[Path]) -> None:
    """Mark a folder as finished: sizes and checksums of its files, and the identity of its run."""
    listed = {str(path.relative_to(folder)): _described(path) for path in sorted(files)}
    content = {"format_version": MANIFEST_VERSION, "run": identity, "files": listed}
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if it is missing or unreadable."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = isinstance(found["run"], dict) and all(isinstance(one["bytes"], int) for one in found["files"].values())
        return found if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def unknown_version(manifest: dict[str, Any]) -> str | None:
    """Why this package cannot read a manifest's format, as part of a sentence; None if it can."""
    version = manifest.get("format_version", 1)
    if version == MANIFEST_VERSION:
        return None
    return f"its {MANIFEST} has format version {version!r}, and this package reads version {MANIFEST_VERSION}"


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, as part of a sentence; None if it is unchanged."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"its {MANIFEST} is missing or cannot be read"
    if (unknown := unknown_version(manifest)) is not None:
        return unknown
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != expected["bytes"]:
            return f"{name} has {found} of {expected['bytes']} bytes"
        if _described(path) != expected:
            return f"the content of {name} has changed"
    return None


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


# Identities -----------------------------------------------------------------------------------------------------------


def identity_of(args: TrainingArguments, materials: Mapping[str, Any]) -> Identity:
    """The identity of a run: the settings that affect its result, and fingerprints of data and models by name."""
    settings = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _FREE and not name.startswith(_FREE_BEGINNINGS)
    }
    if isinstance(args.deepspeed, str) and os.path.isfile(args.deepspeed):  # not encoded text
        settings["deepspeed_file"] = hashlib.blake2b(Path(args.deepspeed).read_bytes(), digest_size=8).hexdigest()
    return json.loads(json.dumps({**settings, **materials}, default=str))


def changes(before: Identity, now: Identity) -> list[str]:
    """What differs between two runs, as parts of a sentence; settings known to only one of them are ignored.

    `max_steps` may increase.

    Example:
        >>> changes({"seed": 0, "data": "a1", "max_steps": 4}, {"seed": 1, "data": "a1", "max_steps": 8})
        ['`seed` was 0 and is 1']
    """
    found = []
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        grown = name == "max_steps" and isinstance(old, int) and new >= old > 0
        if old != new and not grown:
            found.append(f"`{name}` was {old!r} and is {new!r}")
    return sorted(found)


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a model's weights, without adapters, which start at random."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            flat = getattr(weight, "to_local", lambda weight=weight: weight)().detach().flatten()
            for end in (flat[:_VALUES], flat[-_VALUES:]):
                digest.update(end.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def function_fingerprint(function: Any) -> str | None:
    """Fingerprint of the source of a user's function; None for other objects, and for functions of this package."""
    inner = inspect.unwrap(function)
    if not inspect.isroutine(inner) or (inner.__module__ or "").startswith("fractal_rm."):
        return None
    try:
        source = inspect.getsource(inner)
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return None
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def adapter_settings(model: Any) -> dict[str, Any] | None:
    """The configuration of a model's PEFT adapters; None without any."""
    found = {}
    for name, config in getattr(model, "peft_config", {}).items():
        settings = {key: sorted(x) if isinstance(x, set) else x for key, x in config.to_dict().items()}
        found[name] = {key: x for key, x in settings.items() if key not in ("base_model_name_or_path", "revision")}
    return found or None


def rows_fingerprint(rows: Any) -> str | None:
    """Fingerprint of the rows of a data set; None for streaming data, which cannot be read twice."""
    if not isinstance(rows, Dataset):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for batch in rows.with_format("arrow").iter(batch_size=_ROWS):
        table: Any = batch
        digest.update(json.dumps(table.to_pylist(), default=repr).encode())
    return digest.hexdigest()
