"""The stages of a training: gold fraction, response labels with priors, pseudo-labels; each resumable.

A stage hands on one thing: the logits that its model gives to the steps of the training data. They become the hybrid
prior, the choice of responses worth gold labels, or pseudo-labels.
"""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState, set_seed

from fractal_rm.files import replacing
from fractal_rm.hf.checkpoints import STATE, finish_if_complete, last_checkpoint, train_output
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.objectives.grades import expected_grades, ordinal_pseudo_labels
from fractal_rm.objectives.preferences import preference_pseudo_labels
from fractal_rm.objectives.pseudo_labels import posteriors, pseudo_labels
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import BagDataset
from fractal_rm.reward_training.objective import StageKind

if TYPE_CHECKING:
    from fractal_rm.reward_training.trainer import FractalTrainer

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


def train_in_stages(trainer: "FractalTrainer", *, resume: bool, **kwargs: Any) -> Any:
    """Train stage after stage, each in its own folder.

    Args:
        trainer: Its model is at the start of the training.
        resume: Skip stages that are finished, and go on with the last checkpoint of the one that is not.
        kwargs: Passed to `Trainer.train`.

    Returns:
        What `Trainer.train` returns for the last stage; the trainer's log history then holds all stages.
    """
    args, data = trainer.args, trainer.data
    output, start = Path(str(args.output_dir)), _trainable(trainer)
    result, history, handed = None, [], []
    if not resume:
        _clear(trainer, output)
    for stage in plan(args):
        if stage.kind == "pseudo":
            labels = step_targets(data, handed, args)
            if _equal(labels, data.targets.get("pseudo_labels")):
                logger.info("Pseudo-labels did not change: %s and later rounds are left out.", stage.name)
                break
            data.targets["pseudo_labels"] = labels
        if stage.kind != "pseudo" or args.pseudo_start == "fresh":
            trainer.scorer.load_state_dict(start, strict=False)
        folder = output / stage.name
        if resume and (folder / _LOGITS).is_file():
            result, logits = _load_finished(trainer, folder)
        else:
            checkpoint = last_checkpoint(folder) if resume else None
            result, logits = _train(trainer, stage, folder, checkpoint, **kwargs)
        history += [entry | {"stage": stage.name} for entry in trainer.state.log_history]
        handed = split_logits(logits, data, args.num_grades)
        if not stage.reads_gold:
            reveal_gold(data, trainer.withheld, most_uncertain(handed, args.num_grades), args)
        if stage.kind == "gold":
            data.targets["hybrid"] = hybrid_targets(data, handed, args.num_grades)
    trainer.state.log_history = history
    return result


def _clear(trainer: "FractalTrainer", output: Path) -> None:
    """Remove the stages of an earlier run, which are no part of this one."""
    if trainer.is_world_process_zero():
        for stage in plan(trainer.args):
            shutil.rmtree(output / stage.name, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _load_finished(trainer: "FractalTrainer", folder: Path) -> tuple[Any, Tensor]:
    """What [`_train`] returned for the stage that wrote the folder; the trainer is as it was then."""
    trainer.scorer.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
    trainer.state = TrainerState.load_from_json(str(folder / STATE))
    return train_output(trainer.state), load_file(folder / _LOGITS)["logits"]


def _train(
    trainer: "FractalTrainer", stage: Stage, folder: Path, checkpoint: str | None, **kwargs: Any
) -> tuple[Any, Tensor]:
    """Train a stage in its folder; what `Trainer.train` returns, and the logits to hand on in one row."""
    args = trainer.args
    output, args.output_dir = args.output_dir, str(folder)
    # A stage must not depend on whether the ones before it ran in this process.
    set_seed(args.seed)
    trainer.optimizer = trainer.lr_scheduler = None
    try:
        result = finish_if_complete(trainer, checkpoint) or trainer.train_stage(stage, checkpoint, **kwargs)
    finally:
        args.output_dir = output
    logits = torch.cat([row.flatten() for row in trainer.step_logits(trainer.data)]).cpu()
    _finish(trainer, folder, logits)
    return result, logits


def _finish(trainer: "FractalTrainer", folder: Path, logits: Tensor) -> None:
    """Write what the stage hands on, the logits last: their file says that the stage is finished."""
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        trainer.state.save_to_json(str(folder / STATE))
        for name, tensors in ((_WEIGHTS, _trainable(trainer)), (_LOGITS, {"logits": logits})):
            with replacing(folder / name) as file:
                save_file(tensors, file)
    trainer.accelerator.wait_for_everyone()


def _trainable(trainer: "FractalTrainer") -> dict[str, Tensor]:
    """Copies of the weights that training changes."""
    named = trainer.scorer.named_parameters()
    return {name: weights.detach().cpu().clone() for name, weights in named if weights.requires_grad}


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
    return [
        torch.full_like(gold, torch.nan) if not gold.isnan().all() else _probs(row, num_grades)
        for gold, row in zip(data.targets["step_labels"], logits, strict=True)
    ]


def _probs(logits: Tensor, num_grades: int | None) -> Tensor:
    if num_grades is None:
        return logits.sigmoid()
    return expected_grades(logits[None])[0] / (num_grades - 1)


def step_targets(data: BagDataset, logits: Sequence[Tensor], args: FractalConfig) -> list[Tensor]:
    """Pseudo-labels of each bag (S,), gold labels where they are known.

    Under `pseudo_labels` and `posteriors` the other steps are those that gold labels leave likely, and response labels
    are wrong as often as `missed_good` and `missed_bad` say. Grades and
    preferences are labelled first and gold is laid over them, so their rule may break where gold labels are known.
    Grades and preferences are always hard.

    Args:
        data: The training data; its gold targets are those that may be read.
        logits: Step logits of each bag.
        args: Says which kind, and the aggregation.
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


def _equal(labels: Sequence[Tensor], others: Sequence[Tensor] | None) -> bool:
    return others is not None and all(torch.equal(a, b) for a, b in zip(labels, others, strict=True))
