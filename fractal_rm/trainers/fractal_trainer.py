"""A step reward model from labels on whole responses, on `transformers.Trainer`."""

import os
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from fractal_rm import metrics
from fractal_rm.aggregation import Aggregation, aggregate
from fractal_rm.bags import Bag, check_labels
from fractal_rm.losses import bag_loss, instance_loss
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import (
    StepScorer,
    head_parameters,
    load_model,
    load_scorer,
    load_tokenizer,
    longest_input,
    make_scorer,
    pad_token_id,
    save_scorer,
    with_padding,
)
from fractal_rm.scorers.likelihood_scorer import LikelihoodScorer
from fractal_rm.trainers.bag_data import BagCollator, BagDataset, Records, fingerprint, joins_without_a_gap, to_bags
from fractal_rm.trainers.fractal_config import FractalConfig
from fractal_rm.trainers.model_setup import add_adapter, check_vocabulary, model_source, move_to_group

# Trainable weights of a PEFT run, unmerged: what resuming needs and the ordinary folder cannot hold.
_TRAINABLE_FILE = "trainable.safetensors"
# Responses on which weight and bias of the likelihood scorer are fitted before training; two numbers need no more.
_SCALE_RESPONSES = 256


class FractalTrainer(Trainer):
    """Trains a step reward model from response labels.

    Args:
        model: Path, hub id or instance of a causal language model (`scorer="likelihood"`) or of any backbone that
            `AutoModelForTokenClassification` knows (`scorer="token"`).
        args: The configuration.
        train_dataset: Rows in one of TRL's formats (prompt + completion + label, prompt + chosen + rejected, stepwise
            supervision) or in this package's schema, or [`Bag`] objects.
        eval_dataset: The same; gold step labels in it are used for metrics.
        processing_class: The tokenizer; default: the model's own.
        peft_config: A `peft` configuration; the saved folder holds the merged model.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.

    Raises:
        ValueError: On data or a model that cannot be used; the sentence says what, where, and what to do.
    """

    args: FractalConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: FractalConfig,
        train_dataset: Records | None = None,
        eval_dataset: Records | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.settings = args.settings()
        bags = {
            name: to_bags(records, self.settings, source=f"{name} data")
            for name, records in (("train", train_dataset), ("eval", eval_dataset))
            if records is not None
        }
        if "train" in bags:
            check_labels(bags["train"])
            if args.instance_weight == 0:  # gold labels are not read: not even to tell which long responses to keep
                bags["train"] = [replace(bag, step_labels=None) for bag in bags["train"]]
        set_seed(args.seed)  # adapters and heads are made before Trainer seeds
        tokenizer = with_padding(processing_class) if processing_class else load_tokenizer(model_source(model))
        if isinstance(model, str | Path):
            # As TRL does: transformers would keep half precision, and small updates would be rounded away.
            model, _ = load_model(model, self.settings, dtype=torch.float32)
        check_vocabulary(model, tokenizer)
        model.config.pad_token_id = pad_token_id(tokenizer)
        if self.settings.max_length is None:
            self.settings.max_length = longest_input(model, tokenizer)
        self._tokenizer = tokenizer
        datasets = {name: self._encoded(found, f"{name} data") for name, found in bags.items()}
        if "train" in bags:
            self.settings.data = fingerprint(bags["train"])
            if joins_without_a_gap(bags["train"], self.settings):
                self._warn_about_joined_text()
        wrapped = model if peft_config is None else add_adapter(model, peft_config, self.settings)
        super().__init__(
            model=make_scorer(wrapped, self.settings),
            args=args,
            data_collator=BagCollator(pad_token_id(tokenizer)),
            train_dataset=datasets.get("train"),
            eval_dataset=datasets.get("eval"),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=self._metrics,
        )
        self._terms: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def _encoded(self, bags: list[Bag], source: str) -> BagDataset:
        return BagDataset(bags, self._tokenizer, self.settings, source=source)

    @staticmethod
    def _warn_about_joined_text() -> None:
        warnings.warn(
            "Prompts run into responses without a space or newline, and they are scored as written. If that is not how "
            "the policy sees them, set `prompt_template`, for example '{prompt}\\n'.",
            stacklevel=3,
        )

    @property
    def scorer(self) -> StepScorer:
        """The scorer, without wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    def reward_model(self) -> StepRewardModel:
        """The model in training, ready to score."""
        return StepRewardModel(self.scorer, self._tokenizer, self.settings)

    # Learning -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; the likelihood scorer's weight and bias are fitted first."""
        if not resume_from_checkpoint and isinstance(self.scorer, LikelihoodScorer) and self.train_dataset is not None:
            self._fit_scale(self.scorer, self.train_dataset)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _fit_scale(self, scorer: LikelihoodScorer, data: Any) -> None:
        """Fit weight and bias to the bag labels of some responses."""
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))
        rows = order[:_SCALE_RESPONSES].split(self.args.per_device_eval_batch_size)
        batches = [self._prepare_inputs(self.data_collator([data[int(i)] for i in part])) for part in rows]
        training = scorer.training
        scorer.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = [scorer(**{name: batch[name] for name in _SCORER_INPUTS}) for batch in batches]
        scorer.train(training)
        scorer.fit_scale(
            logits,
            [batch["bag_labels"] for batch in batches],
            [batch["mask"] for batch in batches],
            aggregation=self.settings.aggregation,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the loss terms, each averaged over the bags of the batch."""
        logits = model(**{name: inputs[name] for name in _SCORER_INPUTS})
        mask = inputs["mask"]
        terms = {
            "bag": bag_loss(logits, inputs["bag_labels"], mask, aggregation=self.settings.aggregation),
        }
        if self.args.instance_weight > 0:
            terms["instance"] = instance_loss(logits, inputs["step_labels"], mask)
        weights = {"bag": self.args.bag_weight, "instance": self.args.instance_weight}
        loss = sum(weights[name] * term.mean() for name, term in terms.items())
        for name, term in terms.items():
            self._terms["loss" if model.training else "eval", name].append(term.detach())
        return (loss, logits) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimizer; the scorer's own parameters get `head_learning_rate`."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            rate = self.args.head_learning_rate
            rate = 10 * self.args.learning_rate if rate is None else rate
            move_to_group(optimizer, head_parameters(self.scorer, self.settings), rate)
            return optimizer
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every named loss term, averaged over the bags since the last log or of the evaluation."""
        total = next((name for name in logs if name.endswith("loss") and name != "train_loss"), None)
        for kind, term in list(self._terms):
            if total is not None and kind == ("loss" if total == "loss" else "eval"):
                logs[f"{total}/{term}"] = torch.cat(self._terms.pop((kind, term))).mean().item()
        super().log(logs, start_time)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `transformers.Trainer`; `evaluate` takes records too."""
        for key in [key for key in self._terms if key[0] == "eval"]:
            del self._terms[key]  # of a prediction, which logs nothing
        if eval_dataset is not None and not isinstance(eval_dataset, str | BagDataset):
            eval_dataset = self._encoded(to_bags(eval_dataset, self.settings, source="eval data"), "eval data")
        return super().get_eval_dataloader(eval_dataset)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, step logits (B, S) and (bag labels, step labels, mask)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        labels = (inputs["bag_labels"], inputs["step_labels"], inputs["mask"].long())
        return (loss, None, None) if prediction_loss_only else (loss, logits.detach(), labels)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics on bag labels, and on gold step labels where the data has them."""
        labels: Any = prediction.label_ids
        bag_labels, step_labels, mask = labels
        # Trainer pads shorter batches with -100, masks included: only 1 is a real step.
        steps = [row == 1 for row in mask]
        logits = [row[real] for row, real in zip(prediction.predictions, steps, strict=True)]
        gold = [row[real] for row, real in zip(step_labels, steps, strict=True)]
        return evaluate_logits(logits, bag_labels, gold, self.settings.aggregation)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        save_scorer(folder, self.scorer, self._tokenizer, self.settings)
        if self.scorer.is_adapted:
            trainable = {name: p.detach().contiguous() for name, p in self.scorer.named_parameters() if p.requires_grad}
            save_file(trainable, folder / f"{_TRAINABLE_FILE}.tmp")
            os.replace(folder / f"{_TRAINABLE_FILE}.tmp", folder / _TRAINABLE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.scorer.is_adapted:
            self.scorer.load_state_dict(load_file(folder / _TRAINABLE_FILE), strict=False)
        else:
            saved, _, _ = load_scorer(folder)
            self.scorer.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


_SCORER_INPUTS = ("input_ids", "attention_mask", "step_ids", "step_ends", "mask")


def evaluate_logits(
    logits: list[np.ndarray], bag_labels: np.ndarray, step_labels: list[np.ndarray], aggregation: Aggregation
) -> dict[str, float]:
    """Bag metrics, and step metrics where gold step labels are known.

    Args:
        logits: Step logits of each bag, real steps only.
        bag_labels: Response labels (B,).
        step_labels: Gold step labels of each bag, NaN where unknown.
        aggregation: How step probabilities become a response probability.

    Returns:
        Those of [`~fractal_rm.metrics.bag_metrics`]; `step_auc` and `within_bag_auc` if any gold step label is known.
    """
    bag_probs = [
        aggregate(torch.tensor(row)[None], torch.ones(1, len(row), dtype=torch.bool), aggregation=aggregation)
        .sigmoid()
        .item()
        for row in logits
    ]
    results = metrics.bag_metrics(bag_probs, bag_labels)
    if any(not np.isnan(row).all() for row in step_labels):
        results["step_auc"] = metrics.step_auc(logits, step_labels)
        results["within_bag_auc"] = metrics.within_bag_auc(logits, step_labels)
    return results
