"""A step reward model from labels on whole responses, on `transformers.Trainer`."""

import os
from collections import defaultdict
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
from fractal_rm.bags import check_labels
from fractal_rm.losses import bag_loss, instance_loss
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import (
    StepScorer,
    head_weights,
    load_model,
    load_scorer,
    load_tokenizer,
    make_scorer,
    save_scorer,
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

    _tag_names = ("fractal-rm", "process-reward-model")
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
        for found in bags.values():
            check_labels(found)
        set_seed(args.seed)  # adapters and heads are made before Trainer seeds
        path = model if isinstance(model, str | Path) else model.config._name_or_path
        if isinstance(model, str | Path):
            # As TRL does: transformers would keep half precision, and small updates would be rounded away.
            model, _ = load_model(model, self.settings, dtype=torch.float32)
        tokenizer = processing_class or load_tokenizer(path)
        if any(not isinstance(bag.prompt, str) for bag in next(iter(bags.values()), [])[:1]) and (
            not tokenizer.chat_template
        ):
            raise ValueError(
                f"The prompts are chats, but the tokenizer of {path} has no chat template. Set "
                "`tokenizer.chat_template`, use a chat model's tokenizer, or give the prompts as text."
            )
        model.config.pad_token_id = tokenizer.pad_token_id
        datasets = {
            name: BagDataset(found, tokenizer, self.settings, source=f"{name} data") for name, found in bags.items()
        }
        if "train" in bags:
            self.settings.data = fingerprint(bags["train"])
            if joins_without_a_gap(bags["train"], self.settings):
                self._warn_about_joined_text()
        wrapped = model if peft_config is None else self._add_adapter(model, peft_config)
        super().__init__(
            model=make_scorer(wrapped, self.settings),
            args=args,
            data_collator=BagCollator(tokenizer.pad_token_id),
            train_dataset=datasets.get("train"),
            eval_dataset=datasets.get("eval"),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=self._metrics,
        )
        self.label_names = ["bag_labels", "step_labels"]
        # `compute_loss` averages each micro-batch itself; Trainer divides by their number.
        self.model_accepts_loss_kwargs = False
        self._terms: defaultdict[str, list[Tensor]] = defaultdict(list)

    @staticmethod
    def _warn_about_joined_text() -> None:
        import warnings

        warnings.warn(
            "Prompts run into responses without a space or newline, and they are scored as written. If that is not how "
            "the policy sees them, set `prompt_template`, for example '{prompt}\\n'.",
            stacklevel=3,
        )

    def _add_adapter(self, model: PreTrainedModel, peft_config: Any) -> nn.Module:
        from peft import get_peft_model

        if peft_config.task_type is None:
            # With the task known, PEFT trains the classification head as well and saves it.
            peft_config.task_type = "TOKEN_CLS" if self.settings.scorer == "token" else "CAUSAL_LM"
        return get_peft_model(model, peft_config)

    @property
    def scorer(self) -> StepScorer:
        """The scorer, without wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    def reward_model(self) -> StepRewardModel:
        """The model in training, ready to score."""
        return StepRewardModel(self.scorer, self.processing_class, self.settings)

    # Learning -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; the likelihood scorer's weight and bias are fitted first."""
        if not resume_from_checkpoint and isinstance(self.scorer, LikelihoodScorer):
            self._fit_scale(self.scorer)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _fit_scale(self, scorer: LikelihoodScorer) -> None:
        """Fit weight and bias to the bag labels, the language model as it is.

        A log-likelihood is never positive and its scale depends on the model, so starting at weight 1 and bias 0 would
        first teach the whole language model to move one offset.
        """
        data = self.train_dataset
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))  # type: ignore[arg-type]
        collected = []
        was_training = scorer.training
        scorer.eval()
        size = self.args.per_device_eval_batch_size
        for rows in order[:_SCALE_RESPONSES].split(size):
            batch = self._prepare_inputs(self.data_collator([data[int(i)] for i in rows]))  # type: ignore[index]
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

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted sum of the loss terms, each averaged over the bags of the batch."""
        logits = model(**{name: inputs[name] for name in _SCORER_INPUTS})
        mask = inputs["mask"]
        terms = {
            "bag": bag_loss(logits, inputs["bag_labels"], mask, aggregation=self.args.aggregation),
        }
        if self.args.instance_weight > 0:
            terms["instance"] = instance_loss(logits, inputs["step_labels"], mask)
        weights = {"bag": self.args.bag_weight, "instance": self.args.instance_weight}
        loss = sum(weights[name] * term.mean() for name, term in terms.items())
        for name, term in terms.items():
            self._terms[f"loss/{name}" if model.training else f"eval_loss/{name}"].append(term.detach().mean())
        return (loss, logits) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimizer; the scorer's own parameters get `head_learning_rate`."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            scorer = self.scorer
            own: list[Any] = [head_weights(scorer.base, self.settings)]
            if isinstance(scorer, LikelihoodScorer):
                own = [scorer.log_weight, scorer.bias]
            rate = self.args.head_learning_rate
            move_to_group(optimizer, own, 10 * self.args.learning_rate if rate is None else rate)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every named loss term since the last log."""
        prefix = "eval_loss/" if any(key.startswith("eval_") for key in logs) else "loss/"
        for name in [name for name in self._terms if name.startswith(prefix)]:
            logs[name] = torch.stack(self._terms.pop(name)).mean().item()
        super().log(logs, start_time)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        """Loss, step logits (B, S) and (bag labels, step labels, mask)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        labels = (inputs["bag_labels"], inputs["step_labels"], inputs["mask"].long())
        return (loss, None, None) if prediction_loss_only else (loss, logits.detach(), labels)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics on bag labels, and on gold step labels where the data has them."""
        bag_labels, step_labels, mask = prediction.label_ids  # type: ignore[misc]
        # Trainer pads shorter batches with -100, masks included: only 1 is a real step.
        steps = [row == 1 for row in mask]
        logits = [row[real] for row, real in zip(prediction.predictions, steps, strict=True)]
        gold = [row[real] for row, real in zip(step_labels, steps, strict=True)]
        return evaluate_logits(logits, bag_labels, gold, self.settings.aggregation)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        save_scorer(folder, self.scorer, self.processing_class, self.settings)
        if hasattr(self.scorer.model, "peft_config"):
            trainable = {name: p.detach().contiguous() for name, p in self.scorer.named_parameters() if p.requires_grad}
            save_file(trainable, folder / f"{_TRAINABLE_FILE}.tmp")
            os.replace(folder / f"{_TRAINABLE_FILE}.tmp", folder / _TRAINABLE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if hasattr(self.scorer.model, "peft_config"):
            self.scorer.load_state_dict(load_file(folder / _TRAINABLE_FILE), strict=False)
        else:
            saved, _, _ = load_scorer(folder)
            self.scorer.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # type: ignore[arg-type]


_SCORER_INPUTS = ("input_ids", "attention_mask", "step_ids", "step_ends", "mask")


def evaluate_logits(
    logits: list[np.ndarray], bag_labels: np.ndarray, step_labels: list[np.ndarray], aggregation: str
) -> dict[str, float]:
    """Bag metrics, and step metrics where gold step labels are known.

    Args:
        logits: Step logits of each bag, real steps only.
        bag_labels: Response labels (B,).
        step_labels: Gold step labels of each bag, NaN where unknown.
        aggregation: How step probabilities become a response probability.
    """
    from fractal_rm.aggregation import aggregate

    bag_probs = [
        aggregate(torch.tensor(row)[None], torch.ones(1, len(row), dtype=torch.bool), aggregation=aggregation)  # type: ignore[arg-type]
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
    """Give parameters a group of their own in an optimizer, without weight decay and with their own learning rate."""
    chosen = {id(parameter) for parameter in parameters if parameter.requires_grad}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    moved = [parameter for parameter in parameters if id(parameter) in chosen]
    if moved:
        optimizer.add_param_group({"params": moved, "lr": learning_rate, "weight_decay": 0.0})
