"""A frozen sentence encoder whose embeddings are computed once and cached on disk."""

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from fractal_rm.errors import reason
from fractal_rm.files import remove_abandoned, replacing
from fractal_rm.scorers.folder import check_model_folder, check_whole_model
from fractal_rm.scorers.settings import tokenizer_fingerprint

# Names the folder of the cache; an empty value switches it off.
CACHE_VARIABLE = "FRACTAL_RM_CACHE"
# Weights are numbers: a folder's own settings could ask for a pickle, which is code.
_SAFE_WEIGHTS = {"weights_only": True}
# Texts between two writes, so that a killed run loses at most a few minutes.
_CHUNK_TEXTS = 4096
_BATCH_SIZE = 64
# 64-bit words in a text's key: 128 bits do not collide by accident.
_KEY_WORDS = 2


class SentenceEncoder:
    """Embeddings of texts by any `sentence-transformers` model, cached on disk.

    The cache is keyed by the model's weights and the text, so all runs of a sweep share it, and several processes may
    write to it at once. Embeddings are rounded to half precision whether or not they are cached: a score must not
    depend on what ran before.

    Args:
        path: Folder or hub id of a model.
        cache_dir: Folder of the cache. None: the environment variable `FRACTAL_RM_CACHE`, else `~/.cache/fractal_rm`;
        `""`: no cache.
        dtype: `"auto"` (as the weights are stored), `"float32"` or `"bfloat16"`: the last is several times faster on
            GPUs and on CPUs with instructions for it. The cache keeps precisions separate.
        device: Where to encode; None: a GPU if there is one.
        hub: How files are loaded from the hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ImportError: If `sentence-transformers` is not installed.
        ValueError: If it cannot load the path.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache_dir: str | Path | None = None,
        dtype: str = "auto",
        device: str | None = None,
        hub: dict[str, Any] | None = None,
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                'sentence-transformers is not installed. Run `pip install "fractal-rm[encoder]"`.'
            ) from error
        check_model_folder(path, "Give the folder or hub id of a sentence-transformers model.")
        check_whole_model(path)
        try:
            renamed = {"cache_folder" if name == "cache_dir" else name: value for name, value in (hub or {}).items()}
            self.model = SentenceTransformer(
                str(path),
                device=device,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype, **_SAFE_WEIGHTS},
                **renamed,
            )
        except Exception as error:  # damaged files make libraries raise anything
            raise ValueError(
                f"{path} cannot be loaded as a sentence-transformers model ({reason(error)}). "
                "Give the folder or hub id of one."
            ) from error
        self.name_or_path = str(path)
        self.fingerprint = _fingerprint(self.model)
        if cache_dir is None:
            cache_dir = os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "fractal_rm")
        self._folder = Path(cache_dir) / "embeddings" / self.fingerprint if str(cache_dir) else None
        self._known: dict[bytes, np.ndarray] = {}
        self._read: set[str] = set()

    @property
    def size(self) -> int:
        """Size of an embedding."""
        return len(self.embed(["a"])[0])

    def embed(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Embeddings (N, D) of texts, float32 on the CPU.

        Args:
            texts: The texts; equal texts are encoded once.
            progress: Show a progress bar over uncached texts, if there are many.
        """
        if self._folder is None:  # without a cache, memory must not grow either
            self._known.clear()
        keys = [hashlib.sha256(text.encode()).digest()[: 8 * _KEY_WORDS] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if missing:
            self._read_cache()
            missing = {key: text for key, text in missing.items() if key not in self._known}
        # Texts of similar length share a batch, and the longest come first, so that running out of memory shows at
        # once.
        waiting = sorted(missing, key=lambda key: -len(missing[key]))
        chunks: Any = range(0, len(waiting), _CHUNK_TEXTS)
        if progress and len(chunks) > 1:
            from rich.progress import track

            chunks = track(chunks, description=f"Embedding {len(waiting)} texts")
        for start in chunks:
            part = waiting[start : start + _CHUNK_TEXTS]
            found = self.model.encode(
                [missing[key] for key in part], batch_size=_BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True
            )
            rows = np.asarray(found, dtype=np.float16)
            self._known.update(zip(part, rows, strict=True))
            self._write_cache(part, rows)
        if not keys:
            return torch.empty(0, self.size)
        return torch.from_numpy(np.stack([self._known[key] for key in keys])).float()

    def save(self, path: str | Path) -> None:
        """Save the model so that `sentence-transformers` and plain transformers load it."""
        self.model.save_pretrained(str(path), create_model_card=False)

    def _read_cache(self) -> None:
        """Read what this or another process has written since."""
        if self._folder is None or not self._folder.is_dir():
            return
        remove_abandoned(self._folder, "*.safetensors")  # every file has a new name, so no later write replaces them
        for file in sorted(self._folder.glob("*.safetensors")):
            if file.name in self._read:
                continue
            try:
                shard = load_file(file)
                keys = [row.tobytes() for row in shard["keys"]]
                self._known.update(zip(keys, shard["embeddings"], strict=True))
            except (SafetensorError, KeyError, ValueError, FileNotFoundError):
                file.unlink(missing_ok=True)  # damaged, or removed by another process for that: encode its texts again
            self._read.add(file.name)

    def _write_cache(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        if self._folder is None:
            return
        name = f"{uuid.uuid4().hex}.safetensors"
        words = np.frombuffer(b"".join(keys), dtype=np.int64).reshape(-1, _KEY_WORDS)
        with replacing(self._folder / name) as file:
            save_file({"keys": words, "embeddings": rows}, file)
        self._read.add(name)


def _fingerprint(model: Any) -> str:
    """Fingerprint of a model's computation: weights, modules with their options, tokenizer, and maximum length."""
    # A module's options beyond its weights, such as which tokens it pools.
    modules = [(type(one).__name__, sorted(getattr(one, "get_config_dict", dict)().items())) for one in model]
    digest = hashlib.sha256(f"{model.max_seq_length} {model.default_prompt_name} {modules}".encode())
    # Static embeddings come with a tokenizer of the `tokenizers` library.
    tokenizer: Any = model.tokenizer
    rules = tokenizer.to_str() if hasattr(tokenizer, "to_str") else tokenizer_fingerprint(tokenizer)
    digest.update(rules.encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
