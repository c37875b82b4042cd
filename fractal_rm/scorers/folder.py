"""Checks that a model folder is complete before anything is loaded.

Only JSON files and safetensors headers are read, which takes milliseconds for any model size.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fractal_rm.errors import reason
from fractal_rm.files import read_json

# Names of the number of layers in configurations.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Building deeper models takes minutes, even without weights.
_DEEPEST = 2_000
# A weight of a numbered layer: its stack and number.
_OF_A_LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers?|h|blocks?))\.(\d+)\.")
# Keys of `config.json` that may change: the block, names, and the precision, which an argument may set too.
_FREE_SETTINGS = ("fractal", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")
# Allowed modules of sentence encoders: others would be code from the folder, or would load more modules.
_TRUSTED_MODULES = re.compile(
    r"sentence_transformers\.([a-z_]+\.)*(Transformer|Pooling|Normalize|Dense|LayerNorm|Dropout|StaticEmbedding"
    r"|WeightedLayerPooling)"
)
# Files of sentence encoders with arguments for transformers, and the allowed ones: others could load code.
_ENCODER_SETTINGS = "sentence_*_config.json"
_ENCODER_ARGUMENTS = (
    "model_args",
    "model_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "config_args",
    "config_kwargs",
)
_ALLOWED_ARGUMENTS = {
    "add_pooling_layer", "attn_implementation", "do_lower_case", "dtype", "max_length", "model_max_length",
    "padding_side", "torch_dtype", "trust_remote_code", "use_fast",
}  # fmt: skip
# Keys of `tokenizer_config.json` that name files.
_TOKENIZER_FILES = ("tokenizer_file", "vocab_file", "merges_file", "spm_file")
# Arguments of `from_pretrained` that select the files of a hub id.
_HUB = ("revision", "token", "cache_dir", "local_files_only")


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that select files of a hub id: configuration, tokenizer and head must have the same revision."""
    return {name: kwargs[name] for name in _HUB if name in kwargs}


def check_model_folder(path: str | Path, advice: str) -> None:
    """Raise unless the files of a local model folder are complete and consistent; hub ids pass.

    Args:
        path: Folder, or hub id.
        advice: What to do if there is no model.

    Raises:
        ValueError: Names the file and the defect: a configuration that is missing, not an object or has impossible
            sizes; truncated or missing weights; a number of layers that does not match the weights; modules that are
            code from the folder; or settings that read files elsewhere or load code.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    files = {name: folder / name for name in ("config.json", "adapter_config.json", "modules.json")}
    if not any(file.is_file() for file in files.values()):
        raise ValueError(f"{path} is not a model folder: it has no config.json. {advice}")
    if files["modules.json"].is_file():
        _check_modules(files["modules.json"])
    for file in folder.glob(_ENCODER_SETTINGS):
        _check_encoder_settings(file)
    if (file := folder / "tokenizer_config.json").is_file():
        _check_tokenizer_files(file)
    config: Any = read_json(files["config.json"]) if files["config.json"].is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{files['config.json']} is {type(config).__name__}, not an object. Restore the model's file.")
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"{files['config.json']}: `transformers_weights` names another file of weights. Remove it, and name the "
            "file model.safetensors."
        )
    if (value := _foreign_kernel(config)) is not None:
        raise ValueError(
            f"{files['config.json']}: `attn_implementation` is {value[:80]!r}, code from the hub, which is never run. "
            "Remove it."
        )
    if (name := _undefined(config)) is not None:
        raise ValueError(f"{files['config.json']}: `{name}` is NaN. Restore the file that belongs to the weights.")
    depth = _depth(config, files["config.json"])
    names = _weight_names(folder)
    stacks: dict[str, set[str]] = {}
    for name in names:
        if found := _OF_A_LAYER.match(name):
            stacks.setdefault(found[1], set()).add(found[2])
    counts = sorted({len(numbers) for numbers in stacks.values()})
    extra = config.get("num_nextn_predict_layers")  # layers for multi-token prediction come last
    allowed = {depth, depth + extra} if depth is not None and isinstance(extra, int) else {depth}
    if depth is not None and counts and not allowed & set(counts):
        raise ValueError(
            f"{files['config.json']} says {depth:,} layers, but the weights next to it have {counts[-1]:,}. Restore "
            "the file that belongs to the weights."
        )


def _check_modules(file: Path) -> None:
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ValueError(f"{file} is not a list of modules. Restore the sentence encoder's file.")
    outside = next((one["path"] for one in modules if not _is_inside(one.get("path", ""))), None)
    if outside is not None:
        raise ValueError(f"{file} names the path {outside!r}, which is not in the folder. Restore the file.")
    for place in {file.parent / one.get("path", "") for one in modules}:
        _check_activation(place / "config.json")
        if place != file.parent and (place / "config.json").is_file():
            check_model_folder(place, "Restore the sentence encoder's files.")
    foreign = next((one for one in modules if not _TRUSTED_MODULES.fullmatch(str(one.get("type")))), None)
    if foreign is not None:
        raise ValueError(
            f"{file} names the module {foreign.get('type')!r}, which is code from the folder and is never run. Give "
            "an encoder built from modules of sentence-transformers that hold no others."
        )


def check_whole_model(path: str | Path) -> None:
    """Raise ValueError if a local folder holds an adapter, which would be added to its weights without a word."""
    if (file := Path(path) / "adapter_config.json").is_file():
        raise ValueError(
            f"{file}: the folder holds an adapter. Merge it first (`merge_and_unload()` of peft) and save the whole "
            "model, or remove the adapter's files."
        )


def _is_inside(name: Any) -> bool:
    """Whether a name is that of a file or folder in a folder, or the folder; links in it count as in it."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _check_activation(file: Path) -> None:
    """Raise ValueError if a module's activation function, which is imported by its name, is not one of torch."""
    found = read_json(file) if file.is_file() else {}
    name = found.get("activation_function") if isinstance(found, dict) else None
    if name is not None and not str(name).startswith("torch.nn."):
        raise ValueError(
            f"{file}: `activation_function` is {str(name)[:80]!r}, which would be imported and run. Give a class of "
            "torch.nn, such as 'torch.nn.Tanh'."
        )


def _check_encoder_settings(file: Path) -> None:
    """Raise ValueError if a sentence encoder passes arguments to transformers that could load code or pickles."""
    found = read_json(file)
    for part in _ENCODER_ARGUMENTS:
        given = found.get(part) if isinstance(found, dict) else None
        names = given.keys() - _ALLOWED_ARGUMENTS if isinstance(given, dict) else ()
        if names or _foreign_kernel(given) is not None:
            name = min(names, default="attn_implementation")
            raise ValueError(
                f"{file}: `{part}` sets `{name}`, which could load files or code from elsewhere. Remove it."
            )


def _check_tokenizer_files(file: Path) -> None:
    """Raise ValueError if a tokenizer reads files that are not in its folder."""
    found = read_json(file)
    for key in _TOKENIZER_FILES if isinstance(found, dict) else ():
        name = found.get(key)
        if name is not None and not _is_inside(name):
            raise ValueError(f"{file}: `{key}` is {str(name)[:80]!r}, a file outside of the folder. Remove the key.")


def _foreign_kernel(value: Any) -> str | None:
    """An attention implementation that is loaded from the hub, in a configuration or a part of it; None without one."""
    for key, one in value.items() if isinstance(value, dict) else ():
        if str(key).endswith("attn_implementation"):
            named = one.values() if isinstance(one, dict) else [one]
            if found := next((str(name) for name in named if "/" in str(name)), None):
                return found
        elif (found := _foreign_kernel(one)) is not None:
            return found
    return None


def _undefined(value: Any, name: str = "") -> str | None:
    """Name of the first NaN in a configuration; None if there is none. Infinity is the usual value of some limits."""
    if isinstance(value, float) and math.isnan(value):
        return name
    items = value if isinstance(value, list) else []
    inner = value.items() if isinstance(value, dict) else [(name, one) for one in items]
    return next((found for key, one in inner if (found := _undefined(one, key)) is not None), None)


def _depth(config: Mapping[str, Any], file: Path) -> int | None:
    """The number of layers in a configuration (of its text part if it is multimodal); None if not given."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for name in _DEPTHS:
            value = part.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _DEEPEST:
                raise ValueError(
                    f"{file}: `{name}` is {str(value)[:40]}. Give a whole number from 1 to {_DEEPEST:,} that matches "
                    "the weights."
                )
            return value
    return None


def _weight_names(folder: Path) -> list[str]:
    """Names of all tensors in the safetensors files that transformers would read; checks each file."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return safetensors_names(single)
    if not index.is_file():
        return []
    content = read_json(index)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index} has no `weight_map` of names. Restore the file.")
    found: list[str] = []
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not in the folder. Restore the file.")
        found += safetensors_names(folder / name)
    if lost := sorted(set(placed) - set(found)):
        raise ValueError(
            f"{folder}: {len(lost)} weights of {index.name} are in no file (first: {lost[0]}). Restore it."
        )
    return found


def safetensors_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, whose header must describe every byte of it.

    Raises:
        ValueError: If the file is empty, truncated, longer than its header says, or not a safetensors file.
    """
    try:
        with safe_open(file, framework="np") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({file.stat().st_size:,} bytes; {reason(error)}). Copy or "
            "download it again."
        ) from None
    if not names:
        raise ValueError(f"{file} has no weights. Copy or download it again.")
    return names


def weights_fingerprint(files: Iterable[Path]) -> str:
    """Fingerprint of the bytes of weight files: any changed bit changes it."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Fingerprint of a model's `config.json`, without this package's block and keys that do not affect scores."""
    settings = {name: value for name, value in config.items() if name not in _FREE_SETTINGS and name[:1] != "_"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of a tokenizer's ids and merges: swapping two tokens changes it."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    # Depending on its version, `tokenizers` writes a merge as a text or as a pair.
    pairs = [one.split(" ", 1) if isinstance(one, str) else one for one in merges or []]
    return hashlib.sha256(json.dumps([tokens, pairs]).encode()).hexdigest()[:16]
