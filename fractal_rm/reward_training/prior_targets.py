"""Targets of the priors, computed once per data set before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fractal_rm.data.bag import Bag
from fractal_rm.objectives.priors import correlation_targets, cosine_targets, fit_likelihood_scale, likelihood_targets
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import known_or_nan
from fractal_rm.scorers.checkpoint import load_model, load_tokenizer, longest_input, make_scorer
from fractal_rm.scorers.embedding import EmbeddedBag, EmbeddingInputs
from fractal_rm.scorers.inputs import TokenInputs
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

_BATCH_SIZE = 32


def prior_targets(bags: Sequence[Bag], args: FractalConfig, *, model: Any, processor: Any) -> dict[str, list[Tensor]]:
    """Targets of the priors with nonzero weight, by name: a tensor per bag, (S,), or (S, S) for correlations.

    Args:
        bags: The training data.
        args: Gives the weights, and the encoder and reference model to load.
        model: The model to be trained, or its path: the reference model unless `args` names one.
        processor: The tokenizer or sentence encoder of the scorer.

    Raises:
        ValueError: If a prior lacks its encoder, its reference model or its column.
    """
    found: dict[str, list[Tensor]] = {}
    if args.cosine_prior_weight or args.negated_cosine_prior_weight or args.correlation_prior_weight:
        embedded = _embedded(bags, args, processor)
        if args.cosine_prior_weight:
            found["cosine"] = [cosine_targets(bag.steps, bag.contexts) for bag in embedded]
        if args.negated_cosine_prior_weight:
            found["negated_cosine"] = [1 - cosine_targets(bag.steps, bag.contexts) for bag in embedded]
        if args.correlation_prior_weight:
            found["correlation"] = [correlation_targets(bag.steps[None])[0] for bag in embedded]
    if args.teacher_prior_weight:
        if not any(bag.teacher_scores for bag in bags):
            raise ValueError(
                "The teacher prior found no step scores in the training data. Add a column `teacher_scores` with one "
                "number in [0, 1] for each step, or set `teacher_prior_weight=0`."
            )
        found["teacher"] = [known_or_nan(bag.teacher_scores, len(bag.step_spans)) for bag in bags]
    if args.likelihood_prior_weight:
        found["likelihood"] = _likelihoods(bags, args, model)
    return found


def _embedded(bags: Sequence[Bag], args: FractalConfig, processor: Any) -> list[EmbeddedBag]:
    if args.prior_encoder is not None:
        encoder = SentenceEncoder(args.prior_encoder, cache_dir=args.embedding_cache, dtype=args.encoder_dtype)
    elif isinstance(processor, SentenceEncoder):
        encoder = processor
    else:
        raise ValueError(
            "The cosine and correlation priors need a sentence encoder, but the scorer has none. Set `prior_encoder` "
            "to the path or hub id of a sentence-transformers model, or set their weights to 0."
        )
    return EmbeddingInputs(encoder).encode(bags)


def _likelihoods(bags: Sequence[Bag], args: FractalConfig, model: Any) -> list[Tensor]:
    """Mean log-probability of each step's tokens under the reference model, mapped to [0, 1]."""
    path = args.reference_model or model
    if not isinstance(path, str | Path) or (args.reference_model is None and args.scorer != "likelihood"):
        raise ValueError(
            "The likelihood prior needs a causal language model. Set `reference_model` to the path or hub id of one, "
            "or set `likelihood_prior_weight=0`."
        )
    log_probs = _mean_log_probs(bags, args, path)
    values = torch.cat(log_probs)
    location, scale = fit_likelihood_scale(values[~values.isnan()])
    return [likelihood_targets(row[None], location=location, scale=scale)[0] for row in log_probs]


@torch.no_grad()
def _mean_log_probs(bags: Sequence[Bag], args: FractalConfig, path: str | Path) -> list[Tensor]:
    """Mean log-probability of each step's tokens (S,) under a language model; NaN beyond its maximum length."""
    settings = FractalSettings(scorer="likelihood", reduction="mean", prompt_template=args.prompt_template)
    language_model, _ = load_model(path, settings, dtype=torch.float32)
    tokenizer = load_tokenizer(path)
    settings.max_length = longest_input(language_model, tokenizer)
    inputs = TokenInputs(tokenizer, settings)
    encoded = inputs.encode(bags)
    scorer = make_scorer(language_model, settings).eval().to(args.device)
    found = [torch.full((len(bag.step_spans),), torch.nan) for bag in bags]
    fitting = sorted((i for i, bag in enumerate(encoded) if bag.kept_steps), key=lambda i: encoded[i].length)
    for start in range(0, len(fitting), _BATCH_SIZE):
        rows = fitting[start : start + _BATCH_SIZE]
        batch = {name: x.to(args.device) for name, x in inputs.pad([encoded[i] for i in rows]).items()}
        for i, row in zip(rows, scorer(**batch).cpu(), strict=True):
            found[i][: encoded[i].kept_steps] = row[: encoded[i].kept_steps]
    return found
