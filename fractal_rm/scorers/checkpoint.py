"""Models to scorers, scorers to folders and back: a checkpoint is an ordinary Hugging Face folder.

The folder loads with plain `AutoModelForCausalLM` or `AutoModelForTokenClassification`; what only this package needs is
the `fractal` block of `config.json`.
"""

import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fractal_rm.results import package_versions
from fractal_rm.scorers.likelihood_scorer import LikelihoodScorer
from fractal_rm.scorers.settings import Settings, tokenizer_fingerprint
from fractal_rm.scorers.token_scorer import TokenScorer

StepScorer = LikelihoodScorer | TokenScorer
# Half precision keeps about three digits; a re-initialised head differs in the first.
_HEAD_TOLERANCE = 2e-2


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token: its own, or else the end-of-text token, which the mask hides."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str | Path, settings: Settings, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """The backbone that the scorer needs, and the names of weights that the folder did not hold.

    Raises:
        ValueError: If the folder is no model, or no model of the kind that the scorer needs.
    """
    if settings.scorer == "token":
        auto: Any = AutoModelForTokenClassification
        kwargs["num_labels"] = 1
    else:
        auto = AutoModelForCausalLM
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is no model folder: it holds no config.json. Give a folder or hub id of a model.")
    try:
        config = AutoConfig.from_pretrained(path)
        if settings.scorer == "likelihood" and (config.is_encoder_decoder or type(config) not in auto._model_mapping):
            raise ValueError("not a causal language model")
        model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be loaded as a {auto.__name__} for the {settings.scorer} scorer ({reason}). "
            "Give the path or hub id of such a model, or choose the other scorer."
        ) from error
    return model, sorted(info["missing_keys"])


def make_scorer(model: PreTrainedModel | nn.Module, settings: Settings) -> StepScorer:
    """Wrap a transformers (or PEFT) model as the scorer that the settings name."""
    if settings.scorer == "token":
        return TokenScorer(model)
    return LikelihoodScorer(model, reduction=settings.reduction, log_weight=settings.log_weight, bias=settings.bias)


def head_weights(model: PreTrainedModel, settings: Settings) -> torch.Tensor:
    """The weights that turn hidden states into scores: classification head, or output embeddings."""
    if settings.scorer == "likelihood":
        return model.get_output_embeddings().weight
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head.weight
    # Architectures that name it otherwise (or wrap it): the last linear layer with one output is the head.
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]


def _head_summary(model: PreTrainedModel, settings: Settings) -> dict[str, float]:
    weights = head_weights(model, settings).detach().double()
    return {"sum": weights.abs().sum().item(), "signed": weights.sum().item(), "norm": weights.norm().item()}


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` whose files are moved into `path` once all of them are written."""
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".writing-{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    yield temporary
    # config.json last: a folder with the block is a whole one.
    for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
        os.replace(file, path / file.name)
    temporary.rmdir()


def save_scorer(
    path: str | Path, scorer: StepScorer, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Settings:
    """Write model, tokenizer and the `fractal` block; PEFT adapters are merged into a copy first.

    Returns:
        The settings as saved, with learned weight and bias, fingerprints and versions.
    """
    model: Any = scorer.base
    if hasattr(scorer.model, "peft_config"):
        model = copy.deepcopy(scorer.model).merge_and_unload()  # type: ignore[operator]
    saved = copy.deepcopy(settings)
    if isinstance(scorer, LikelihoodScorer):
        saved.log_weight, saved.bias = scorer.log_weight.item(), scorer.bias.item()
    saved.tokenizer, saved.head = tokenizer_fingerprint(tokenizer), _head_summary(model, settings)
    saved.versions = {name: found for name, found in package_versions().items() if found}
    if not all(math.isfinite(value) for value in (saved.log_weight, saved.bias, *saved.head.values())):
        raise ValueError(f"The scorer holds values that are not finite; {path} is not written. Lower the learning rate.")
    with replaced_folder(Path(path)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"fractal": saved.to_dict()}, indent=2) + "\n")
    return saved


def load_scorer(path: str | Path, **kwargs: Any) -> tuple[StepScorer, PreTrainedTokenizerBase, Settings]:
    """Read a checkpoint and check that it is whole: block, tokenizer and head.

    Args:
        path: Folder or hub id of a checkpoint of this package.
        kwargs: Passed to `from_pretrained` of the model, such as `dtype`.

    Raises:
        ValueError: If the folder is no step reward model, its format version is unknown, its tokenizer is another one,
            or its head is missing or not the one that was trained.
    """
    where = str(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{where} is no model folder: it holds no config.json. Give a folder that FractalTrainer saved.")
    try:
        block = getattr(AutoConfig.from_pretrained(path), "fractal", None)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{where} is neither a model folder nor a hub id that can be reached ({reason}).") from error
    if block is None:
        raise ValueError(
            f"{where} is a model but no step reward model: its config.json has no `fractal` block. "
            "Train it with FractalTrainer first."
        )
    settings = Settings.from_dict(block, where=where)
    tokenizer = load_tokenizer(path)
    found = tokenizer_fingerprint(tokenizer)
    if found != settings.tokenizer:
        raise ValueError(
            f"{where}: the tokenizer is not the one the model was trained with (fingerprint {found}, expected "
            f"{settings.tokenizer}). Restore the tokenizer files that were saved with it."
        )
    model, missing = load_model(path, settings, **kwargs)
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} weights are missing from the folder and would be random (first: {missing[0]}). "
            "Restore the safetensors file that FractalTrainer saved."
        )
    summary = _head_summary(model, settings)
    if settings.head and any(
        not math.isclose(summary[key], settings.head[key], rel_tol=_HEAD_TOLERANCE, abs_tol=_HEAD_TOLERANCE * norm)
        for key, norm in (("norm", 0.0), ("sum", 0.0), ("signed", settings.head["sum"]))
    ):
        raise ValueError(
            f"{where}: the scoring head is not the one that was trained (norm {summary['norm']:.4g}, expected "
            f"{settings.head['norm']:.4g}). Restore the safetensors file that FractalTrainer saved."
        )
    return make_scorer(model.eval(), settings), tokenizer, settings
