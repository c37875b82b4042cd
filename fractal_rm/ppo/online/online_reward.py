"""A reward model that keeps learning: its bag-loss training continues on the policy's own responses and their outcomes.

A frozen reward model was trained on the responses of an earlier policy. As the policy changes, scores and outcomes
drift apart. If outcomes can be checked, every rollout is a labelled bag: this module keeps the recent ones, trains on
them every few rollout batches, and rolls back an update that lowers held-out AUC.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.files import write_atomic
from fractal_rm.objectives.aggregation import GOOD
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.online.replay import ReplayBuffer, draw, is_held_out, outcome_labels
from fractal_rm.ppo.online.updater import RewardModelUpdater
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.data import BagDataset, Records, content_fingerprint, to_bags
from fractal_rm.scorers.checkpoint import load_scorer

_MODEL_FOLDER = "reward_model"
_STATE_FOLDER = "online_reward"
_OPTIMIZER_FILE, _REPLAY_FILE = "optimizer.safetensors", "replay.jsonl"
# Minimum number of good and of bad held-out responses for an AUC that can judge an update.
FEWEST_OF_A_KIND = 8


@dataclass
class Report:
    """The result of an update, the same on every process."""

    judged: bool  # whether held-out responses could evaluate it; if not, nothing is learned
    kept: bool  # whether the update was kept
    metrics: dict[str, float]


@dataclass
class Counters:
    """Counts of events since the start of the run."""

    batches: int = 0
    kept: int = 0
    rolled_back: int = 0
    skipped: int = 0


class OnlineReward:
    """Keeps labelled rollouts and updates a reward model on them every `rm_update_every` rollout batches.

    An update is evaluated by the AUC of held-out responses before and after it: recent rollouts and, if given, original
    training responses, weighted as the two are mixed in training. If that mean falls, weights and optimizer state are
    restored bit for bit. Its random seeds are separate from training.

    With several processes, the main process learns from all rollouts and broadcasts the weights.

    `reward_model` learns in place. `original` are labelled responses that it was trained on, to mix in; None: rollouts
    only. `weights` holds the weight of each reward function, 0 for the step reward model itself.

    Raises:
        ValueError: If there are no outcomes to learn from, the original data has rows other than single labelled
            responses, the reward model would be overwritten, or [`RewardModelUpdater`] refuses it.
    """

    def __init__(
        self,
        reward_model: StepRewardModel,
        args: StepPPOConfig,
        original: Records | None,
        weights: Tensor,
        accelerator: Accelerator,
    ) -> None:
        _check_outcomes(weights)
        _check_folder(reward_model, Path(str(args.output_dir)) / _MODEL_FOLDER)
        self.reward_model, self.args, self.accelerator = reward_model, args, accelerator
        self.learner = RewardModelUpdater(
            reward_model,
            learning_rate=args.rm_learning_rate,
            batch_size=args.reward_model_batch_size or reward_model.batch_size,
            max_grad_norm=args.max_grad_norm,
        )
        self.replay = ReplayBuffer(args.rm_replay_size, args.rm_holdout_share)
        self.original = self.original_held_out = None
        if original is not None:
            self.original, self.original_held_out = self._split(original)
        self.counters = Counters()

    def _split(self, records: Records) -> tuple[BagDataset, BagDataset]:
        """Original responses for training and for evaluation, split by prompt as rollouts are."""
        source = "reward_model_dataset"
        bags = [replace(bag, step_labels=None) for bag in to_bags(records, self.reward_model.settings, source=source)]
        pair = next((number for number, bag in enumerate(bags, 1) if bag.pair_id is not None), None)
        if pair is not None:
            raise ValueError(
                f"{source}, row {pair}: a preference cannot be mixed with outcomes. Give single responses with labels."
            )
        self.reward_model.check_prompts([bag.prompt for bag in bags])
        sides: dict[bool, list[Bag]] = {False: [], True: []}
        for bag in bags:
            sides[is_held_out(bag.prompt, self.args.rm_holdout_share)].append(bag)
        if not all(sides.values()):
            raise ValueError(
                f"{source}: of {len(bags)} responses {len(sides[True])} are held out; some must be held out, but not "
                "all. Give more prompts, or another `rm_holdout_share`."
            )
        learned, held_out = (self.learner.encode(sides[side], source) for side in (False, True))
        return learned, held_out

    @property
    def original_data(self) -> str | None:
        """Fingerprint of the original responses; None without any."""
        if self.original is None or self.original_held_out is None:
            return None
        return content_fingerprint([*self.original.bags, *self.original_held_out.bags])

    # Rollouts -----------------------------------------------------------------------------------------------------

    def take(self, batch: RolloutBatch, scored: Sequence[StepScores]) -> dict[str, float]:
        """Keep a rollout batch, and update the reward model if an update is due; returns metrics of the update.

        The scores of this batch do not change: an update affects later batches only. Completions that the model could
        not score completely are left out. Raises ValueError if an outcome is outside [0, 1].
        """
        labels = outcome_labels(batch.function_rewards, batch.function_weights).tolist()
        bags = [
            Bag(prompt, row.response, tuple(row.spans), label=label)
            for prompt, row, label in zip(batch.prompts, scored, labels, strict=True)
            if row.steps and not row.error and not row.truncated_steps and not math.isnan(label)
        ]
        self.replay.add(gather_object(bags))
        self.counters.batches += 1
        if self.counters.batches % self.args.rm_update_every:
            return {}
        return self._count(self._everywhere())

    def _everywhere(self) -> Report:
        """Update on the main process, and broadcast the weights."""
        report = self.update() if self.accelerator.is_main_process else None
        if self.accelerator.num_processes > 1:
            (report,) = broadcast_object_list([report])
            with torch.no_grad():
                for parameter in self.learner.parameters:
                    theirs: Any = broadcast(parameter.detach().clone())
                    parameter.copy_(theirs)
        assert report is not None
        return report

    def _count(self, report: Report) -> dict[str, float]:
        """Count an update, and return its metrics to log."""
        if not report.judged:
            self.counters.skipped += 1
        elif report.kept:
            self.counters.kept += 1
        else:
            self.counters.rolled_back += 1
        numbers = report.metrics | {"skipped": float(self.counters.skipped)}
        return {f"rm_update/{name}": value for name, value in numbers.items()}

    # Updates ------------------------------------------------------------------------------------------------------

    def judges(self) -> dict[str, tuple[BagDataset, float]]:
        """Held-out sets that can evaluate an update, each with its weight: sets with enough good and bad responses."""
        share = self.args.rm_original_share if self.original_held_out else 0.0
        found: dict[str, tuple[BagDataset, float]] = {}
        if _tells(self.replay.held_out):
            found[""] = self.learner.encode(list(self.replay.held_out), "held-out rollouts"), 1.0 - share
        if self.original_held_out and _tells(self.original_held_out.bags):
            found["original_"] = self.original_held_out, share
        return found

    def update(self) -> Report:
        """Train on the kept rollouts, and roll back if held-out AUC falls. Global random generators do not advance.

        Without good and bad held-out responses nothing is learned, because the update could not be evaluated.
        """
        judges = self.judges()
        weight = sum(share for _, share in judges.values())
        if not self.replay.learned or not weight:
            return Report(judged=False, kept=False, metrics={})
        seed = self.args.seed + self.counters.batches
        device = self.learner.parameters[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout
            before = {name: self.learner.bag_auc(data) for name, (data, _) in judges.items()}
            snapshot = self.learner.snapshot()
            loss = self.learner.learn(self._batches(torch.Generator().manual_seed(seed)))
            after = {name: self.learner.bag_auc(data) for name, (data, _) in judges.items()}
        gain = sum(share * (after[name] - before[name]) for name, (_, share) in judges.items()) / weight
        kept = math.isfinite(loss) and gain >= 0  # NaN does not count as a gain
        if not kept:
            self.learner.restore(snapshot)
        metrics = {"loss": loss, "kept": float(kept), "replay_size": float(len(self.replay.learned))}
        for name in judges:
            metrics |= {f"{name}bag_auc_before": before[name], f"{name}bag_auc_after": after[name]}
        return Report(judged=True, kept=kept, metrics=metrics)

    def _batches(self, generator: torch.Generator) -> list[list[dict[str, Any]]]:
        """Items of every batch: rollouts, and a share of original responses."""
        steps, size = self.args.rm_update_steps, self.args.rm_batch_size
        old = min(round(self.args.rm_original_share * size), size - 1) if self.original else 0
        recent = list(self.replay.learned)
        rows = draw(len(recent), steps * (size - old), generator)
        encoded = self.learner.encode([recent[row] for row in rows], "rollouts")
        sources = [[encoded[i] for i in range(len(encoded))]]
        if self.original and old:
            sources.append([self.original[i] for i in draw(len(self.original), steps * old, generator)])
        return [[item for items in sources for item in items[step::steps]] for step in range(steps)]

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The counters, for JSON."""
        return asdict(self.counters)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved counters."""
        self.counters = Counters(**state)

    def save(self, folder: Path, *, resumable: bool) -> None:
        """Write the reward model into a checkpoint, and with `resumable` its optimizer and the kept rollouts."""
        self.reward_model.save_pretrained(folder / _MODEL_FOLDER)
        if resumable:
            (folder / _STATE_FOLDER).mkdir(exist_ok=True)
            self.learner.save_optimizer(folder / _STATE_FOLDER / _OPTIMIZER_FILE)
            write_atomic(folder / _STATE_FOLDER / _REPLAY_FILE, self.replay.to_jsonl())

    def load(self, folder: Path) -> None:
        """Restore what [`save`] wrote; raises ValueError if a file is missing."""
        state = folder / _STATE_FOLDER
        needed = (folder / _MODEL_FOLDER / "config.json", state / _OPTIMIZER_FILE, state / _REPLAY_FILE)
        missing = [file for file in needed if not file.is_file()]
        if missing:
            raise ValueError(
                f"{missing[0]} is missing, so the reward model cannot continue learning. Resume from a checkpoint of "
                "a run with `rm_update_every`, or start again without `resume_from_checkpoint`."
            )
        saved, _, _ = load_scorer(folder / _MODEL_FOLDER)
        self.learner.scorer.load_state_dict(saved.state_dict())
        self.learner.load_optimizer(state / _OPTIMIZER_FILE)
        self.replay.load_jsonl((state / _REPLAY_FILE).read_text(encoding="utf-8"))


def _tells(bags: Sequence[Bag] | Any) -> bool:
    """Whether there are enough good and bad responses for an AUC."""
    good = sum(float(bag.label or 0.0) >= GOOD for bag in bags)
    return min(good, len(bags) - good) >= FEWEST_OF_A_KIND


def _check_outcomes(weights: Tensor) -> None:
    if (weights < 0).any() or not (weights > 0).any():
        raise ValueError(
            "`rm_update_every` learns from outcomes, and there are no `reward_funcs` with a weight above 0 (weights "
            "must not be negative). Give a function that checks outcomes (`outcome_weight=0` keeps it out of the "
            "policy's reward), or set `rm_update_every=0`."
        )


def _check_folder(reward_model: StepRewardModel, target: Path) -> None:
    model: Any = reward_model.scorer.model
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if source and Path(source).resolve() == target.resolve():
        raise ValueError(
            f"`rm_update_every` would write the reward model that it learns over the one it starts from, {source}. "
            "Choose another `output_dir`."
        )
