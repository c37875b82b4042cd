"""The objective of a training stage: named loss terms, their weights, and their means over all processes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fractal_rm.objectives.bag_loss import bag_loss, easyllp_loss, instance_loss
from fractal_rm.objectives.grades import expected_grades, ordinal_bag_loss, ordinal_instance_loss
from fractal_rm.objectives.preferences import preference_loss
from fractal_rm.objectives.priors import correlation_prior, prior_weight, teacher_prior
from fractal_rm.reward_training.config import FractalConfig

# `joint`: response labels, gold steps and priors together. `gold`: only the gold fraction. `pseudo`: pseudo-labels.
StageKind = Literal["joint", "gold", "pseudo"]

# Priors whose targets are step probabilities, and their key in a batch.
STEP_PRIORS = ("cosine", "negated_cosine", "teacher", "likelihood", "hybrid")
# Grades of probability 0 or 1 have infinite logits.
_CERTAIN = 1e-6


def term_weights(args: FractalConfig, stage: StageKind, progress: float = 0.0) -> dict[str, float]:
    """Nonzero weights of the loss terms in a stage; priors may decay with the share `progress`."""
    if stage == "gold":
        return {"instance": 1.0}
    if stage == "pseudo":
        weights = {"pseudo": 1.0, "bag": args.pseudo_bag_weight, "preference": args.pseudo_bag_weight}
    else:
        weights = {
            "bag": args.bag_weight,
            "preference": args.bag_weight,
            "easyllp": args.easyllp_weight,
            "instance": args.instance_weight,
        }
        for name in (*STEP_PRIORS, "correlation"):
            weight = getattr(args, f"{name}_prior_weight")
            weights[f"{name}_prior"] = prior_weight(weight, progress, args.prior_schedule)
    return {name: weight for name, weight in weights.items() if weight > 0}


def loss_terms(
    logits: Tensor, batch: dict[str, Tensor], names: set[str], args: FractalConfig, *, base_rate: float
) -> dict[str, Tensor]:
    """Values of loss terms, one per bag or preference that the term applies to; a term without a target is left out.

    Args:
        logits: Step logits (B, S), or (B, S, G) for grades.
        batch: Tensors of [`~fractal_rm.reward_training.data.BagCollator`].
        names: Terms of [`term_weights`] to compute.
        args: Gives the aggregation and the form of each loss.
        base_rate: Share of good steps in the training data, for EasyLLP.
    """
    mask = batch["mask"]
    terms = _bag_terms(logits, batch, names, args, base_rate=base_rate)
    learn = instance_loss if args.num_grades is None else ordinal_instance_loss
    for name, target in (("instance", "step_labels"), ("pseudo", "pseudo_labels")):
        if name in names and target in batch:
            terms[name] = learn(logits, batch[target], mask)
    step_logits = logits if args.num_grades is None else _good_logits(logits)
    for name in STEP_PRIORS:
        if f"{name}_prior" in names and name in batch:
            terms[f"{name}_prior"] = teacher_prior(step_logits, batch[name], mask, distance=args.prior_distance)
    if "correlation_prior" in names and "correlation" in batch:
        terms["correlation_prior"] = correlation_prior(step_logits, batch["correlation"], mask)
    return terms


def _bag_terms(
    logits: Tensor, batch: dict[str, Tensor], names: set[str], args: FractalConfig, *, base_rate: float
) -> dict[str, Tensor]:
    """The terms of [`loss_terms`] on response labels: single responses and preferences."""
    mask, labels, chosen = batch["mask"], batch["bag_labels"], batch["chosen"]
    single, better, worse = chosen < 0, chosen == 1, chosen == 0
    terms: dict[str, Tensor] = {}
    if "bag" in names and single.any():
        terms["bag"] = _bag_loss(logits[single], labels[single], mask[single], args)
    if "preference" in names and not single.all():
        terms["preference"] = preference_loss(
            logits[better],
            mask[better],
            logits[worse],
            mask[worse],
            form=args.preference_loss,
            aggregation=args.aggregation,
            sharpness=args.sharpness,
        )
    if "easyllp" in names and single.any():  # a preference is not a share of good steps
        terms["easyllp"] = easyllp_loss(logits[single], labels[single], mask[single], base_rate=base_rate)
    return terms


def _bag_loss(logits: Tensor, labels: Tensor, mask: Tensor, args: FractalConfig) -> Tensor:
    if args.num_grades is not None:
        return ordinal_bag_loss(logits, labels, mask)
    return bag_loss(
        logits,
        labels,
        mask,
        aggregation=args.aggregation,
        sharpness=args.sharpness,
        label_noise=(args.missed_good, args.missed_bad),
    )


def _good_logits(logits: Tensor) -> Tensor:
    """Logits (B, S) of the expected grade as a share of the highest, from logits of grades (B, S, G)."""
    return torch.logit(expected_grades(logits) / (logits.size(-1) - 1), eps=_CERTAIN)


def mean_terms(terms: Mapping[str, Tensor], names: Sequence[str], accelerator: Accelerator) -> dict[str, Tensor]:
    """The mean of each loss term over the batch of all processes.

    A term may apply to a different number of rows in each process, even none, so `names` lists every term that any
    process may have. Gradients are averaged over processes, so each mean is this process's sum, divided by the count
    over all processes, times the number of processes.
    """
    if accelerator.num_processes == 1:
        return {name: term.mean() for name, term in terms.items()}
    counts = [float(terms[name].numel()) if name in terms else 0.0 for name in names]
    everyone: Any = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="mean")
    shares = dict(zip(names, everyone, strict=True))
    return {name: term.sum() / shares[name].clamp(min=1.0 / accelerator.num_processes) for name, term in terms.items()}


def logged_means(terms: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The mean of each term over all processes since the last log."""
    here = {name: (float(sum(part.sum() for part in parts)), sum(map(len, parts))) for name, parts in terms.items()}
    everyone = gather_object([here])
    names = dict.fromkeys(name for one in everyone for name in one)
    means = {}
    for name in names:
        totals = [one[name] for one in everyone if name in one]
        means[name] = sum(total for total, _ in totals) / max(sum(count for _, count in totals), 1)
    return means
