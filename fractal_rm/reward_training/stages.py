"""The stages of a training: gold fraction, response labels with priors, pseudo-labels.

[`FractalTrainer`] trains them one after the other. Here stands which stages a configuration asks for, what a finished
one leaves in its folder, and what its logits of the training data become: the hybrid prior, the choice of responses
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
# Responses whose posteriors are computed at once: under "mean" they take memory quadratic in the steps.
_CHUNK = 256
# Shares are decimal numbers: 7 % of 100 is 7, though 0.07 * 100 is a little more.
_DIGITS = 9


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        name: Folder of its checkpoints, in the output folder.
        kind: What it learns.
        reads_gold: Whether it may read the gold fraction.
    """

    name: str
    kind: StageKind
    reads_gold: bool = True


def plan(args: FractalConfig) -> list[Stage]:
    """The stages that a configuration asks for, in order."""
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
    """What a finished stage leaves in its folder: its state, the weights that it trained, and the logits to hand on."""

    state: TrainerState
    weights: dict[str, Tensor]
    logits: Tensor


def write_finished(folder: Path, stage: Finished, identity: Identity) -> None:
    """Write what a stage of a run leaves; the manifest comes last, and says that the stage is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    stage.state.save_to_json(str(folder / STATE))
    for name, tensors in ((_WEIGHTS, stage.weights), (_LOGITS, {"logits": stage.logits})):
        with replacing(folder / name) as file:
            save_file(tensors, file)
    write_manifest(folder, identity, (folder / name for name in (STATE, _WEIGHTS, _LOGITS)))


def read_finished(folder: Path) -> Finished | None:
    """What [`write_finished`] wrote; None if the stage is not finished, or its files are damaged, which is said."""
    if not (folder / MANIFEST).is_file():
        return None
    found = damage(folder)
    if found is not None:
        logger.warning("%s is damaged (%s): the stage goes on from its last checkpoint.", folder, found)
        return None
    state = TrainerState.load_from_json(str(folder / STATE))
    return Finished(state, load_file(folder / _WEIGHTS), load_file(folder / _LOGITS)["logits"])


def split_logits(logits: Tensor, data: BagDataset, num_grades: int | None) -> list[Tensor]:
    """Logits of all steps in one row -> logits (S,) or (S, G) of each bag."""
    width = num_grades or 1
    parts = logits.split([width * len(bag.step_spans) for bag in data.bags])
    return list(parts) if num_grades is None else [part.view(-1, width) for part in parts]


def withhold_gold(data: BagDataset) -> list[Tensor]:
    """Take the gold step labels out of the targets, and return them."""
    gold = data.targets["step_labels"]
    data.targets["step_labels"] = [torch.full_like(row, torch.nan) for row in gold]
    return gold


def reveal_gold(data: BagDataset, gold: Sequence[Tensor], order: Sequence[int], args: FractalConfig) -> None:
    """Put the gold step labels of a share of the bags that have some into the targets, the first of an order.

    Raises:
        ValueError: If no bag has gold step labels.
    """
    known = [row for row in order if not gold[row].isnan().all()]
    if not known:
        raise ValueError(
            "`instance_weight` and `gold_fraction` ask for gold step labels, and the training data has none. Add a "
            "column `step_labels`, or set `instance_weight=0`."
        )
    for row in known[: math.ceil(round(args.gold_fraction * len(known), _DIGITS))]:
        data.targets["step_labels"][row] = gold[row]


def most_uncertain(logits: Sequence[Tensor], num_grades: int | None) -> list[int]:
    """Bags by the mean entropy of their steps, largest first."""

    def entropy(row: Tensor) -> float:
        pairs = row if num_grades is not None else torch.stack([torch.zeros_like(row), row], dim=-1)
        return torch.distributions.Categorical(logits=pairs.float()).entropy().mean().item()

    values = [entropy(row) for row in logits]
    return sorted(range(len(values)), key=lambda row: -values[row])


def hybrid_targets(data: BagDataset, logits: Sequence[Tensor], num_grades: int | None) -> list[Tensor]:
    """What a model of the gold fraction thinks of the other bags; NaN where gold labels are known."""
    targets = []
    for gold, row in zip(data.targets["step_labels"], logits, strict=True):
        probs = row.sigmoid() if num_grades is None else expected_grades(row[None])[0] / (num_grades - 1)
        targets.append(probs if gold.isnan().all() else torch.full_like(gold, torch.nan))
    return targets


def step_targets(data: BagDataset, logits: Sequence[Tensor], args: FractalConfig) -> list[Tensor]:
    """Pseudo-labels of each bag (S,), gold labels where they may be read.

    `pseudo_labels` and `posteriors` label the other steps given the known gold labels, and take response labels to be
    wrong as often as `missed_good` and `missed_bad` say. Grades and preferences are always hard. They are labelled
    first, and gold labels then replace some of them, so their rule may break there.
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
