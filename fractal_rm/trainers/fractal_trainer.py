"""A step reward model from labels on whole responses, on `transformers.Trainer`."""

import copy
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
    head_module,
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
        tokenizer = with_padding(processing_class) if processing_class else load_tokenizer(_path(model))
        if isinstance(model, str | Path):
            # As TRL does: transformers would keep half precision, and small updates would be rounded away.
            model, _ = load_model(model, self.settings, dtype=torch.float32)
        _check_vocabulary(model, tokenizer)
        model.config.pad_token_id = pad_token_id(tokenizer)
        if self.settings.max_length is None:
            self.settings.max_length = longest_input(model, tokenizer)
        self._tokenizer = tokenizer
        datasets = {name: self._encoded(found, f"{name} data") for name, found in bags.items()}
        if "train" in bags:
            self.settings.data = fingerprint(bags["train"])
            if joins_without_a_gap(bags["train"], self.settings):
                self._warn_about_joined_text()
        wrapped = model if peft_config is None else self._add_adapter(model, peft_config)
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
        # `compute_loss` averages each micro-batch itself; Trainer divides by their number.
        self.model_accepts_loss_kwargs = False
        self._terms: defaultdict[str, list[Tensor]] = defaultdict(list)

    def _encoded(self, bags: list[Bag], source: str) -> BagDataset:
        return BagDataset(bags, self._tokenizer, self.settings, source=source)

    @staticmethod
    def _warn_about_joined_text() -> None:
        warnings.warn(
            "Prompts run into responses without a space or newline, and they are scored as written. If that is not how "
            "the policy sees them, set `prompt_template`, for example '{prompt}\\n'.",
            stacklevel=3,
        )

    def _add_adapter(self, model: PreTrainedModel, peft_config: Any) -> nn.Module:
        from peft import get_peft_model

        if peft_config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` is a {type(peft_config).__name__}, which puts tokens before the text and cannot be "
                "merged into the saved model. Use one that adapts weights, such as `LoraConfig`."
            )
        peft_config = copy.copy(peft_config)
        # With the task known, PEFT trains the classification head as well.
        peft_config.task_type = "TOKEN_CLS" if self.settings.scorer == "token" else "CAUSAL_LM"
        if self.settings.scorer == "token" and getattr(peft_config, "target_modules", None) == "all-linear":
            # All but the head, which is trained as a whole: PEFT knows that for causal models only.
            head = head_module(model, self.settings)
            peft_config.exclude_modules = [name for name, module in model.named_modules() if module is head]
        adapted: Any = get_peft_model(model, peft_config)
        return adapted

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
        """Fit weight and bias to the bag labels, the language model as it is.

        A log-likelihood is never positive and its scale depends on the model, so starting at weight 1 and bias 0 would
        first teach the whole language model to move one offset.
        """
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))
        collected = []
        was_training = scorer.training
        scorer.eval()
        size = self.args.per_device_eval_batch_size
        for rows in order[:_SCALE_RESPONSES].split(size):
            batch = self._prepare_inputs(self.data_collator([data[int(i)] for i in rows]))
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = scorer(**{name: batch[name] for name in _SCORER_INPUTS})
                # Undo the initial scale: what is left is the log-likelihood.
                likelihoods = (logits - scorer.bias) / scorer.log_weight.exp()
            collected.append((likelihoods, batch["mask"], batch["bag_labels"]))
        scorer.train(was_training)
        optimizer = torch.optim.LBFGS([scorer.log_weight, scorer.bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = [
                bag_loss(scorer.log_weight.exp() * x + scorer.bias, y, mask, aggregation=self.args.aggregation)
                for x, mask, y in collected
            ]
            # A weak pull towards weight 1 keeps the fit finite where labels are separable.
            loss = torch.cat(losses).mean() + 1e-3 * scorer.log_weight**2 + 1e-4 * scorer.bias**2
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()

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
            self._terms[f"loss/{name}" if model.training else f"eval_loss/{name}"].append(term.detach())
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
        """Adds every named loss term, averaged over the bags since the last log."""
        prefix = "eval_loss/" if any(key.startswith("eval_") for key in logs) else "loss/"
        for name in [name for name in self._terms if name.startswith(prefix)]:
            logs[name] = torch.cat(self._terms.pop(name)).mean().item()
        super().log(logs, start_time)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `transformers.Trainer`; `evaluate` takes records too."""
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


def _path(model: str | Path | PreTrainedModel) -> str | Path:
    """Where a model came from."""
    if isinstance(model, str | Path):
        return model
    if not model.config._name_or_path:
        raise ValueError(
            "The model does not come from a folder, so its tokenizer is not known. Give `processing_class`."
        )
    return model.config._name_or_path


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model knows {known}. Use the model's own tokenizer, "
            "or call `model.resize_token_embeddings(len(tokenizer))`."
        )


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


def move_to_group(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float) -> None:
    """Give parameters a group of their own in an optimizer, without weight decay and with their own learning rate.

    Args:
        optimizer: The optimizer; it has made no step yet.
        parameters: Some of its parameters; frozen ones stay out.
        learning_rate: Theirs.
    """
    chosen = {id(parameter) for parameter in parameters if parameter.requires_grad}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    moved = [parameter for parameter in parameters if id(parameter) in chosen]
    if moved:
        optimizer.add_param_group({"params": moved, "lr": learning_rate, "weight_decay": 0.0})
