"""Turns models into scorers, and saves and loads scorers: a checkpoint is an ordinary Hugging Face folder.

The folder loads with plain `AutoModelForCausalLM` or `AutoModelForTokenClassification`; this package's own settings are
in the `fractal` block of `config.json`.
"""

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from fractal_rm.errors import reason
from fractal_rm.files import read_json
from fractal_rm.scorers.base import StepScorer
from fractal_rm.scorers.embedding import EmbeddingInputs, EmbeddingScorer, make_head
from fractal_rm.scorers.folder import (
    check_model_folder,
    check_whole_model,
    config_fingerprint,
    hub_options,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from fractal_rm.scorers.inputs import BagInputs, Processor, TokenInputs
from fractal_rm.scorers.likelihood import LikelihoodScorer
from fractal_rm.scorers.published import (
    PUBLISHED,
    Published,
    PublishedInputs,
    PublishedSettings,
    find_reading,
    load_published,
)
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings, tokenizer_fingerprint
from fractal_rm.scorers.templates import check_template
from fractal_rm.scorers.token import TokenScorer, token_classifier
from fractal_rm.versions import package_versions

# File of an embedding scorer's head, in the folder of its encoder.
HEAD_FILE = "head.safetensors"
# Number of head weights stored in the block: a random head will not match them.
_HEAD_SAMPLE = 16
# Half precision keeps two to three digits.
_HEAD_TOLERANCE = 1e-2
# Class names in `tokenizer_config.json` of tokenizers fully described by `tokenizer.json`.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Tokenizers without a limit report 1e30.
_NO_LIMIT = 10**9


def load_tokenizer(path: str | Path, kind: Any = AutoTokenizer, **hub: Any) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token: its own, or the end-of-text token, which the mask hides.

    Args:
        path: Folder or hub id.
        kind: Class to load it with.
        hub: How files are loaded from the hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: If the folder or hub id has no tokenizer, or the tokenizer has neither token.
    """
    try:
        tokenizer = kind.from_pretrained(path, trust_remote_code=False, **hub)
    except Exception as error:  # damaged files make libraries raise anything
        if not Path(path).exists():
            raise ValueError(
                f"There is no folder {path}, and the hub does not give its tokenizer ({reason(error)}). Check the path "
                "or hub id."
            ) from error
        _check_config(path)
        raise ValueError(
            f"{path} has no tokenizer that can be loaded ({reason(error)}). Save one there, or give `processing_class`."
        ) from error
    check_template(getattr(tokenizer, "chat_template", None), path)
    return with_padding(tokenizer)


def _check_config(path: str | Path) -> None:
    """Raise ValueError if the `config.json` of a folder, which selects its tokenizer, cannot be used."""
    if (Path(path) / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"{path}/config.json cannot be used ({reason(error)}). Restore the file that belongs to the weights."
            ) from error


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, with the end-of-text token as padding token if it has none.

    Raises:
        ValueError: If it has no end-of-text token either.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path} has neither a padding nor an end-of-text token. "
                "Set `tokenizer.pad_token`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str | Path, settings: FractalSettings, *, whole: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The backbone that the scorer needs; `kwargs`, such as `dtype`, are passed to `from_pretrained`.

    With `whole`, folder and model must have the same weights, including the head: none missing, none left over.

    Returns:
        The model, and the names of weights missing from the folder: at most the classification head.

    Raises:
        ValueError: If the folder or hub id is not a model of the kind that the scorer needs, or lacks weights of the
            language model itself.
    """
    is_token = settings.scorer == "token"
    if is_token:
        kwargs["num_labels"] = settings.num_grades or 1
    wanted = (AutoModelForTokenClassification if is_token else AutoModelForCausalLM).__name__
    check_model_folder(path, "Give a folder or hub id of a model.")
    check_whole_model(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub_options(kwargs))
        if not is_token and not is_causal(config):
            raise ValueError("it is not a causal language model")
        kind: Any = token_classifier(config) if is_token else AutoModelForCausalLM
        model, info = kind.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # damaged files make libraries raise anything
        raise ValueError(
            f"{path} cannot be loaded as an {wanted} for the {settings.scorer} scorer ({reason(error)}). "
            "Give the path or hub id of such a model, or choose the other scorer."
        ) from error
    missing = sorted(info["missing_keys"])
    body = f"{model.base_model_prefix}."
    lost = [name for name in missing if settings.scorer == "likelihood" or name.startswith(body)]
    check_complete(path, lost, f"an {wanted}")
    if whole and (missing or info["unexpected_keys"]):
        names, fault = (missing, "missing from the folder and would be random")
        if not missing:
            names, fault = sorted(info["unexpected_keys"]), "not of the model that config.json describes"
        raise ValueError(
            f"{path}: {len(names)} weights are {fault} (first: {names[0]}). Restore the safetensors file and the "
            "config.json that FractalTrainer saved."
        )
    check_finite(path, model)
    return model, missing


def check_complete(path: str | Path, missing: Collection[str], kind: str) -> None:
    """Raise ValueError if a folder lacks weights of its model: transformers draws them at random and only warns."""
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} weights are missing from the folder and would be random (first: {min(missing)}). "
            f"Give a folder with all weights of {kind}."
        )


@contextmanager
def complete_models() -> Iterator[None]:
    """Inside the context, models that other libraries load must be complete too: raises as [`check_complete`]."""
    before: Any = vars(PreTrainedModel)["from_pretrained"]

    def load_complete(cls: type, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded = before.__func__(cls, path, *args, output_loading_info=True, **kwargs)
        check_complete(path, loaded[1]["missing_keys"], f"a {cls.__name__}")
        return loaded if output_loading_info else loaded[0]

    PreTrainedModel.from_pretrained = classmethod(load_complete)  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = before


def check_finite(path: str | Path, model: nn.Module) -> None:
    """Raise ValueError if a weight of a loaded model is NaN or infinite."""
    if broken := _not_finite(model):
        raise ValueError(
            f"{path}: the weight {broken[0]} has NaN or infinite values. Restore its file, or train it again."
        )


def _not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that have NaN or infinite values; weights on the meta device have no values."""
    weights = [(name, weight) for name, weight in model.state_dict().items() if isinstance(weight, Tensor)]
    real = [(name, weight) for name, weight in weights if weight.is_floating_point() and not weight.is_meta]
    return [name for name, weight in real if not weight.isfinite().all()]


def is_causal(config: Any) -> bool:
    """Whether a configuration belongs to a causal model, in which no token sees a later one."""
    causal, masked = (auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMaskedLM))
    encoder = type(config) in masked and not getattr(config, "is_decoder", False)
    return type(config) in causal and not encoder and not config.is_encoder_decoder


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Maximum number of tokens of a model and its tokenizer; None if unknown."""
    limits = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [int(limit) for limit in limits if limit and limit < _NO_LIMIT]
    return min(known, default=None)


def make_inputs(processor: Processor, settings: FractalSettings) -> BagInputs:
    """The input encoder of the scorer that a tokenizer or sentence encoder belongs to."""
    if isinstance(processor, SentenceEncoder):
        return EmbeddingInputs(processor)
    return (PublishedInputs if isinstance(settings, PublishedSettings) else TokenInputs)(processor, settings)


def make_scorer(model: nn.Module, settings: FractalSettings) -> StepScorer:
    """Wrap a transformers (or PEFT) model as the scorer that the settings name."""
    if settings.scorer == "token":
        return TokenScorer(model, num_grades=settings.num_grades)
    return LikelihoodScorer(model, reduction=settings.reduction, log_weight=settings.log_weight, bias=settings.bias)


def head_module(model: nn.Module, settings: FractalSettings) -> nn.Module:
    """The layer that turns hidden states into scores: the classification head, or the output embeddings."""
    if settings.scorer == "likelihood":
        language_model: Any = model
        return language_model.get_output_embeddings()
    for name in ("score", "classifier"):
        if isinstance(head := getattr(model, name, None), nn.Module):
            return head
    # Architectures with another name for it: the last linear layer is the head.
    outputs = settings.num_grades or 1
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == outputs][-1]


def head_parameters(scorer: StepScorer, settings: FractalSettings) -> list[nn.Parameter]:
    """Trainable parameters without pretraining: weight and bias of the log-likelihood, or the whole head."""
    if isinstance(scorer, LikelihoodScorer):
        return [scorer.log_weight, scorer.bias]
    if isinstance(scorer, EmbeddingScorer):
        return list(scorer.parameters())
    return [parameter for parameter in head_module(scorer.base, settings).parameters() if parameter.requires_grad]


def _head_sample(model: nn.Module, settings: FractalSettings) -> list[float]:
    """A sample of the head's weights, evenly spaced."""
    weights = next(head_module(model, settings).parameters()).detach().flatten()
    count = min(_HEAD_SAMPLE, len(weights))
    places = [i * (len(weights) - 1) // max(count - 1, 1) for i in range(count)]
    return weights[torch.tensor(places, device=weights.device)].float().tolist()


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder inside `path`; its files are moved into `path` once all are written."""
    path.mkdir(parents=True, exist_ok=True)
    for killed in path.glob(".writing-*"):
        shutil.rmtree(killed, ignore_errors=True)
    temporary = path / f".writing-{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        written = {file.name for file in temporary.iterdir()}
        for stale in path.glob("model*.safetensors*"):
            if stale.name not in written:  # of a model that was sharded differently
                stale.unlink()
        # config.json last: a folder with the block is complete.
        for name in sorted(written, key=lambda name: name == "config.json"):
            if (path / name).is_dir():  # a sentence encoder's subfolders: a folder cannot replace a non-empty one
                shutil.rmtree(path / name)
            os.replace(temporary / name, path / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_finite_weights(model: nn.Module, where: str | Path) -> None:
    """Raise ValueError if a weight is NaN or infinite, before it is written."""
    if broken := _not_finite(model):
        raise ValueError(
            f"{len(broken)} weights are NaN or infinite (first: {broken[0]}), so {where} is not written. Lower "
            "`learning_rate`, and resume from a checkpoint."
        )


def processor_fingerprint(processor: Processor) -> str:
    """Fingerprint of how a tokenizer or sentence encoder reads text."""
    return processor.fingerprint if isinstance(processor, SentenceEncoder) else tokenizer_fingerprint(processor)


def save_scorer(
    path: str | Path, scorer: StepScorer, processor: Processor, settings: FractalSettings
) -> FractalSettings:
    """Write model, tokenizer and the `fractal` block; PEFT adapters are merged into a copy first.

    For an embedding scorer, the folder is the sentence encoder's folder plus a file with the head.

    Returns:
        The settings as saved, with learned weight and bias, fingerprints and versions.

    Raises:
        ValueError: If the scorer has NaN or infinite weights, or is a published model.
    """
    if isinstance(settings, PublishedSettings):
        raise ValueError(
            f"This is the published model {settings.published.name}, which cannot be saved to {path}: keep its own "
            "folder."
        )
    model = copy.deepcopy(scorer.model).merge_and_unload() if scorer.is_adapted else scorer.base
    saved = copy.deepcopy(settings)
    if isinstance(scorer, LikelihoodScorer):
        saved.log_weight, saved.bias = scorer.log_weight.item(), scorer.bias.item()
    encodes = isinstance(processor, SentenceEncoder)
    saved.tokenizer = processor_fingerprint(processor)
    saved.vocabulary = _vocabulary(processor)
    saved.head = _head_sample(model, settings)
    saved.versions = {name: found for name, found in package_versions().items() if found}
    check_finite_weights(scorer, path)
    with replaced_folder(Path(path)) as folder:
        if encodes:
            processor.save(folder)
            weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
            save_file(weights, folder / HEAD_FILE)
        else:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        file = folder / "config.json"  # missing in encoders without a transformer, such as static embeddings
        saved.weights = weights_fingerprint([folder / HEAD_FILE] if encodes else _weight_files(folder))
        config = json.loads(file.read_text()) if file.is_file() else {}
        saved.config = config_fingerprint(config)
        file.write_text(json.dumps(config | {"fractal": saved.to_dict()}, indent=2) + "\n")
    return saved


def load_scorer(
    path: str | Path, *, device: Any = None, published: str | Published | None = None, **kwargs: Any
) -> tuple[StepScorer, Processor, FractalSettings]:
    """Load a checkpoint and check that it is complete: block, tokenizer and head.

    Args:
        path: Folder or hub id of a checkpoint of this package, or of a published process reward model.
        published: How a published model is read, if its configuration and name do not identify it:
            [`~fractal_rm.scorers.published.find_reading`].
        device: Device of a sentence encoder; None: its default. The caller moves the scorer itself.
        kwargs: Passed to `from_pretrained` of the model, such as `dtype`; an embedding scorer only takes the arguments
            that select files of a hub id.

    Returns:
        Scorer (in evaluation mode), its tokenizer or sentence encoder, and settings.

    Raises:
        ValueError: If the folder is not a step reward model, its format version is unknown, its tokenizer differs, or
            its head is missing or not the trained one.
    """
    check_model_folder(path, "Give a folder that FractalTrainer saved.")
    check_whole_model(path)
    hub = hub_options(kwargs)
    try:
        config = PreTrainedConfig.get_config_dict(path, **hub)[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is neither a model folder nor a hub id that can be reached ({reason(error)}). "
            "Give a folder that FractalTrainer saved."
        ) from error
    block = config.get("fractal")
    if block is None:
        reading = find_reading(path, config, published)
        if reading is None:
            raise ValueError(
                f"{path} is a model but not a step reward model: its config.json has no `fractal` block. Train it "
                "with FractalTrainer first, or, for a published reward model, give `published` "
                f"({', '.join(PUBLISHED)})."
            )
        # If the files name no family-specific tokenizer class, load the tokenizer as they describe it; AutoTokenizer
        # would go by the model type.
        named = get_tokenizer_config(path, **hub).get("tokenizer_class")
        tokenizer = load_tokenizer(path, PreTrainedTokenizerFast if named in _GENERIC else AutoTokenizer, **hub)
        scorer, settings = load_published(path, reading, tokenizer, **kwargs)
        check_finite(path, scorer)
        return scorer, tokenizer, settings
    if published is not None:
        raise ValueError(
            f"{path} was trained by FractalTrainer, and its checkpoint says how it is read. Leave out `published`."
        )
    settings = FractalSettings.from_dict(block, where=str(path))
    if settings.config is not None and (found := config_fingerprint(config)) != settings.config:
        raise ValueError(
            f"{path}/config.json: the model's settings are not the saved ones (fingerprint {found}, expected "
            f"{settings.config}). Restore the file; if you changed it on purpose, remove `config` from its `fractal` "
            "block."
        )
    if settings.scorer == "embedding":
        return *_load_embedding_scorer(path, settings, device, hub), settings
    tokenizer = load_tokenizer(path, **hub)
    if tokenizer_fingerprint(tokenizer) != settings.tokenizer or _is_other(tokenizer, settings):
        # For some architectures AutoTokenizer overrides the files; the files say what training used.
        tokenizer = load_tokenizer(path, PreTrainedTokenizerFast, **hub)
    found = tokenizer_fingerprint(tokenizer)
    if found != settings.tokenizer:
        raise ValueError(
            f"{path}: the tokenizer or its chat template is not the one the model was trained with (fingerprint "
            f"{found}, expected {settings.tokenizer}). Restore the tokenizer files that were saved with it."
        )
    _check_vocabulary(path, tokenizer, settings)
    model, _ = load_model(path, settings, whole=True, use_safetensors=True, **kwargs)
    _check_head(path, model, settings)
    _check_weights(path, _weight_files(path, **hub), settings)
    return make_scorer(model, settings).eval(), tokenizer, settings


def _load_embedding_scorer(
    path: str | Path, settings: FractalSettings, device: Any, hub: dict[str, Any]
) -> tuple[EmbeddingScorer, SentenceEncoder]:
    """The head and the encoder of a folder, or of a hub id."""
    # A policy's responses never repeat, so a cache would only grow.
    encoder = SentenceEncoder(path, cache_dir="", device=None if device is None else str(device), hub=hub)
    if encoder.fingerprint != settings.tokenizer:
        raise ValueError(
            f"{path}: the sentence encoder is not the one the head was trained on (fingerprint {encoder.fingerprint}, "
            f"expected {settings.tokenizer}). Restore the files that were saved with it."
        )
    _check_vocabulary(path, encoder, settings)
    scorer = make_head(settings.head_type, encoder.size, settings.num_grades or 1)
    try:
        file = str(cached_file(str(path), HEAD_FILE, **hub))
        scorer.model.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path}: the head in {HEAD_FILE} is missing or different ({reason(error)}). Restore the file that "
            "FractalTrainer saved."
        ) from error
    check_finite(path, scorer.model)
    _check_head(path, scorer.model, settings)
    _check_weights(path, [Path(file)], settings)
    return scorer.eval(), encoder


def _check_head(path: str | Path, model: nn.Module, settings: FractalSettings) -> None:
    """Raise ValueError unless the head equals the saved one, up to half-precision rounding."""
    if settings.head is None:
        return
    found, saved = torch.tensor(_head_sample(model, settings)), torch.tensor(settings.head)
    least = _HEAD_TOLERANCE * saved.abs().mean().item()
    if len(found) != len(saved) or not torch.allclose(found, saved, rtol=_HEAD_TOLERANCE, atol=least):
        raise ValueError(
            f"{path}: the scoring head is not the trained one. Restore the safetensors file that FractalTrainer saved."
        )


def _weight_files(path: str | Path, **hub: Any) -> list[Path]:
    """The safetensors files of a folder or hub id, sorted by name."""
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
    if single := cached_file(str(path), SAFE_WEIGHTS_NAME, **quiet):
        return [Path(single)]
    index: Any = read_json(str(cached_file(str(path), SAFE_WEIGHTS_INDEX_NAME, **hub)))
    return [Path(str(cached_file(str(path), name, **hub))) for name in sorted(set(index["weight_map"].values()))]


def _check_weights(path: str | Path, files: list[Path], settings: FractalSettings) -> None:
    """Raise ValueError unless the weight files equal the saved ones, bit for bit."""
    if settings.weights is not None and (found := weights_fingerprint(files)) != settings.weights:
        raise ValueError(
            f"{path}: the weights are not the saved ones (fingerprint {found}, expected {settings.weights}). Restore "
            "their files; if you changed them on purpose, remove `weights` from the `fractal` block of config.json."
        )


def _vocabulary(processor: Processor) -> str | None:
    """Fingerprint of the tokens of a tokenizer, or of a sentence encoder's tokenizer."""
    tokenizer: Any = processor.model.tokenizer if isinstance(processor, SentenceEncoder) else processor
    return vocabulary_fingerprint(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _is_other(processor: Processor, settings: FractalSettings) -> bool:
    return settings.vocabulary is not None and _vocabulary(processor) != settings.vocabulary


def _check_vocabulary(path: str | Path, processor: Processor, settings: FractalSettings) -> None:
    if _is_other(processor, settings):
        raise ValueError(
            f"{path}: the tokenizer's tokens or merges differ from the ones the model was trained with. Restore the "
            "tokenizer files that were saved with it."
        )
