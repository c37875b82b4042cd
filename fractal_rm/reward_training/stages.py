"""The stages of a training: gold fraction, response labels with priors, pseudo-labels.

[`FractalTrainer`] trains them in sequence. This module says which stages a configuration has, what a finished stage
saves in its folder, and how its logits on the training data are used: for the hybrid prior, the choice of responses
worth gold labels, or pseudo-labels.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState

from fractal_rm.files import replacing
from fractal_rm.hf.checkpoints import STATE
from fractal_rm.hf.manifest import MANIFEST, Identity, damage, write_manifest
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.objectives.grades import expected_grades, ordinal_pseudo_labels
from fractal_rm.objectives.preferences import preference_pseudo_labels
from fractal_rm.objectives.pseudo_labels import posteriors, pseudo_labels
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import BagDataset
from fractal_rm.reward_training.objective import StageKind

logger = logging.getLogger(__name__)
_LOGITS, _WEIGHTS = "step_logits.safetensors", "weights.safetensors"
# Responses whose posteriors are computed at once: under "mean" their memory is quadratic in the number of steps.
_CHUNK = 256
# Shares are decimal numbers: 7 % of 100 is 7, although 0.07 * 100 is slightly more in floating point.
_DIGITS = 9


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Args:
        name: Name of its checkpoint folder in the output folder.
        kind: What it learns.
        reads_gold: Whether it may read the gold fraction.
    """

    name: str
    kind: StageKind
    reads_gold: bool = True


def plan(args: FractalConfig) -> list[Stage]:
    """The stages of a configuration, in order."""
    stages = []
    if args.gold_selection == "uncertainty" and args.instance_weight and args.gold_fraction < 1:
        stages.append(Stage("stage-selection", "joint", reads_gold=False))
    if args.hybrid_prior_weight:
        stages.append(Stage("stage-gold", "gold"))
    stages.append(Stage("stage-joint", "joint"))
    if args.pseudo_labels != "none":
        stages += [Stage(f"stage-pseudo-{number}", "pseudo") for number in range(1, args.pseudo_rounds + 1)]
    return stages


class Finished(NamedTuple):
    """What a finished stage saves in its folder: its state, the trained weights, and the logits for the next stage."""

    state: TrainerState
    weights: dict[str, Tensor]
    logits: Tensor


def write_finished(folder: Path, stage: Finished, identity: Identity) -> None:
    """Write the results of a stage; the manifest is written last and marks the stage as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    stage.state.save_to_json(str(folder / STATE))
    for name, tensors in ((_WEIGHTS, stage.weights), (_LOGITS, {"logits": stage.logits})):
        with replacing(folder / name) as file:
            save_file(tensors, file)
    write_manifest(folder, identity, (folder / name for name in (STATE, _WEIGHTS, _LOGITS)))


def read_finished(folder: Path) -> Finished | None:
    """What [`write_finished`] wrote; None if the stage is not finished, or (with a warning) its files are damaged."""
    if not (folder / MANIFEST).is_file():
        return None
    found = damage(folder)
    if found is not None:
        logger.warning("%s is damaged (%s): the stage resumes from its last checkpoint.", folder, found)
        return None
    state = TrainerState.load_from_json(str(folder / STATE))
    return Finished(state, load_file(folder / _WEIGHTS), load_file(folder / _LOGITS)["logits"])


def split_logits(logits: Tensor, data: BagDataset, num_grades: int | None) -> list[Tensor]:
    """Concatenated logits of all steps -> logits (S,) or (S, G) of each bag."""
    width = num_grades or 1
    parts = logits.split([width * len(bag.step_spans) for bag in data.bags])
    return list(parts) if num_grades is None else [part.view(-1, width) for part in parts]


def revealed_gold(gold: Sequence[Tensor], order: Sequence[int], args: FractalConfig) -> list[Tensor]:
    """Gold step labels (S,) for a share of the bags that have any, the first ones in an order; NaN for the others.

    Raises:
        ValueError: If no bag has gold step labels.
    """
    known = [row for row in order if not gold[row].isnan().all()]
    if not known:
        raise ValueError(
            "`instance_weight` and `gold_fraction` need gold step labels, but the training data has none. Add a "
            "column `step_labels`, or set `instance_weight=0`."
        )
    read = set(known[: math.ceil(round(args.gold_fraction * len(known), _DIGITS))])
    return [labels if row in read else torch.full_like(labels, torch.nan) for row, labels in enumerate(gold)]


def most_uncertain(logits: Sequence[Tensor], num_grades: int | None) -> list[int]:
    """Bags sorted by the mean entropy of their steps, largest first."""

    def entropy(row: Tensor) -> float:
        pairs = row if num_grades is not None else torch.stack([torch.zeros_like(row), row], dim=-1)
        return torch.distributions.Categorical(logits=pairs.float()).entropy().mean().item()

    values = [entropy(row) for row in logits]
    return sorted(range(len(values)), key=lambda row: -values[row])


def hybrid_targets(data: BagDataset, logits: Sequence[Tensor], num_grades: int | None) -> list[Tensor]:
    """Predictions for the other bags by a model of the gold fraction; NaN where gold labels are known."""
    targets = []
    for gold, row in zip(data.targets["step_labels"], logits, strict=True):
        probs = row.sigmoid() if num_grades is None else expected_grades(row[None])[0] / (num_grades - 1)
        targets.append(probs if gold.isnan().all() else torch.full_like(gold, torch.nan))
    return targets


def step_targets(data: BagDataset, logits: Sequence[Tensor], args: FractalConfig) -> list[Tensor]:
    """Pseudo-labels of each bag (S,), with gold labels where they may be read.

    `pseudo_labels` and `posteriors` label the other steps given the known gold labels, with the label noise of
    `missed_good` and `missed_bad`. Grades and preferences are always hard. They are labelled first and gold labels then
    replace some of them, so the result may not satisfy the response label.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    scores = pad(list(logits), batch_first=True).float()
    mask = pad([torch.ones(len(row), dtype=torch.bool) for row in logits], batch_first=True)
    gold = pad(data.targets["step_labels"], batch_first=True, padding_value=torch.nan)
    labels = torch.tensor([float(bag.label or 0.0) for bag in data.bags])
    if args.num_grades is not None:
        found = ordinal_pseudo_labels(scores, labels, mask)
        found = torch.where(gold.isnan(), found, gold)
    else:
        rule = posteriors if args.pseudo_labels == "soft" else pseudo_labels
        parts = zip(*(part.split(_CHUNK) for part in (scores, labels, mask, gold)), strict=True)
        noise = (args.missed_good, args.missed_bad)
        found = torch.cat(
            [
                rule(x, y, real, aggregation=args.aggregation, gold=known, label_noise=noise)
                for x, y, real, known in parts
            ]
        )
    pairs = [rows for rows in data.items if len(rows) == 2]
    if pairs:
        better, worse = (torch.tensor(side) for side in zip(*pairs, strict=True))
        sides = preference_pseudo_labels(
            scores[better], mask[better], scores[worse], mask[worse], aggregation=meaning(args.aggregation)
        )
        for rows, side in zip((better, worse), sides, strict=True):
            found[rows] = torch.where(gold[rows].isnan(), side, gold[rows])
    return [row[real] for row, real in zip(found, mask, strict=True)]
