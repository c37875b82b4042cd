"""Trains a step reward model from labels on whole responses, on `transformers.Trainer`."""

import copy
import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
    TrainerCallback,
    set_seed,
)

from fractal_rm.data.bag import Bag, warn_of_equal_labels
from fractal_rm.data.prompts import check_learned_kind, is_chat
from fractal_rm.data.segmentation import common_gap, warn_of_uncut_responses
from fractal_rm.evaluation.intervals import estimates
from fractal_rm.evaluation.responses import choose_threshold, evaluate_scores, measure_responses, score_bags
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.files import replacing, write_atomic
from fractal_rm.hf.cards import RewardModelCard
from fractal_rm.hf.checkpoints import can_resume, named_write_errors
from fractal_rm.hf.denormals import flush_denormals
from fractal_rm.hf.length_buckets import bucketed_step_logits
from fractal_rm.hf.manifest import adapter_settings, model_fingerprint
from fractal_rm.hf.parallelism import check_unsharded
from fractal_rm.hf.runs import Run, lent, train_output
from fractal_rm.objectives.calibration import fit_temperature
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import (
    BagCollator,
    BagDataset,
    Records,
    check_reasoning,
    content_fingerprint,
    describe_labels,
    fingerprint,
    say_unread_gold,
    to_bags,
    warn_of_joined_text,
)
from fractal_rm.reward_training.large_data import TrainingRows, training_rows
from fractal_rm.reward_training.logit_metrics import by_item, collected_bags, measure_logits
from fractal_rm.reward_training.model_setup import make_trainable, model_name, move_to_group
from fractal_rm.reward_training.objective import StageKind, logged_means, loss_terms, mean_terms, term_weights
from fractal_rm.reward_training.prior_targets import prior_targets
from fractal_rm.reward_training.stages import (
    Finished,
    Stage,
    hybrid_targets,
    most_uncertain,
    plan,
    read_finished,
    revealed_gold,
    split_logits,
    step_targets,
    write_finished,
)
from fractal_rm.reward_training.trials import (
    QUIET,
    TRIALS_FILE,
    Choice,
    Trial,
    best_beyond_noise,
    check_trials,
    response_score,
    try_configurations,
)
from fractal_rm.scorers.base import StepScorer
from fractal_rm.scorers.checkpoint import (
    head_parameters,
    load_scorer,
    make_inputs,
    processor_fingerprint,
    save_scorer,
)
from fractal_rm.scorers.folder import weights_fingerprint
from fractal_rm.scorers.likelihood import LikelihoodScorer
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

logger = logging.getLogger(__name__)
# Trainable weights of a PEFT run, unmerged: resuming needs them, and the ordinary folder has merged weights only.
_TRAINABLE_FILE = "trainable.safetensors"
# Responses on which the likelihood scorer's weight and bias are fitted before training; enough for two numbers.
_SCALE_RESPONSES = 256


class FractalTrainer(Run):
    """Trains a step reward model from response labels.

    Args:
        model: Path, hub id or instance of a causal language model (`scorer="likelihood"`) or of any backbone that
            `AutoModelForTokenClassification` knows (`scorer="token"`); path or hub id of a sentence-transformers model,
            or a [`~fractal_rm.scorers.sentence_encoder.SentenceEncoder`] (`scorer="embedding"`).
        args: The configuration.
        train_dataset: Rows in one of TRL's formats (prompt + completion + label, prompt + chosen + rejected, stepwise
            supervision) or in this package's schema, or [`Bag`] objects; or [`TrainingRows`]. After the first 20,000
            rows, a row is read and tokenized when it is drawn, unless the configuration
            [`~fractal_rm.reward_training.large_data.reads_everything`].
        eval_dataset: The same; gold step labels in it are used for metrics.
        processing_class: The tokenizer; default: the model's own.
        peft_config: A `peft` configuration; the saved folder holds the merged model.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.

    Raises:
        TypeError: If `args` is another configuration.
        ValueError: If data or a model cannot be used; the message says what, where, and what to do.

    Attributes:
        choice: The trials that this trainer's configuration was chosen from; None if it was given.
    """

    args: FractalConfig
    choice: Choice | None = None

    def __init__(
        self,
        model: str | Path | PreTrainedModel | SentenceEncoder,
        args: FractalConfig,
        train_dataset: Records | TrainingRows | None = None,
        eval_dataset: Records | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, FractalConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}, which lacks the options of step reward models. Give "
                "`FractalConfig(...)`, which has the options of `TrainingArguments` under the same names."
            )
        args.check_evaluation(eval_dataset)
        self.settings = args.settings()
        if optimizers != (None, None) and len(plan(args)) > 1:
            raise ValueError(
                f"`optimizers` was given, but training has {len(plan(args))} stages, and each needs its own. Leave it "
                "out, or configure a single stage."
            )
        bags: dict[str, list[Bag]] = {}
        later = None
        if train_dataset is not None:
            self._rows = training_rows(train_dataset, args, self.settings, source="train data")
            bags["train"], later = self._rows.first, self._rows.later
        if eval_dataset is not None:
            bags["eval"] = to_bags(eval_dataset, self.settings, source="eval data")
        self.eval_bags = bags.get("eval")
        if "train" in bags:
            warn_of_equal_labels([*bags["train"], *(later.sample() if later else ())])
            cut = [(bag.response, bag.step_spans) for bag in bags["train"]]
            warn_of_uncut_responses(cut, self.settings.segmentation)
            self.settings.joint = common_gap(cut)
            if args.instance_weight == 0:
                say_unread_gold(bags["train"])
                # Not even to decide which long responses to keep.
                bags["train"] = [replace(bag, step_labels=None) for bag in bags["train"]]
        set_seed(args.seed)  # adapters and heads are created before Trainer sets the seed
        scorer, self.processor, self.settings = make_trainable(
            model, args, self.settings, processing_class, peft_config
        )
        template = getattr(self.processor, "chat_template", None)
        for name, found in bags.items():
            check_reasoning(found, str(template or ""), source=f"{name} data")
        later = later and replace(later, template=str(template or ""))
        self.inputs = make_inputs(self.processor, self.settings)
        self._base_rate = 0.5
        self.card = RewardModelCard(base=model_name(model))
        # Gold labels decide which long responses to keep, unless only some of them may be read.
        datasets = {}
        if "train" in bags:
            reads_gold = args.gold_fraction == 1
            datasets["train"] = self._encoded(bags["train"], "train data", reads_gold=reads_gold, later=later)
        if "eval" in bags:
            datasets["eval"] = self._encoded(bags["eval"], "eval data")
        if "train" in bags:
            self.settings.data = self._rows.name(fingerprint(bags["train"]))
            self.card.labels = describe_labels(bags["train"], args, later=len(later or ()))
            kinds = {is_chat(bag.prompt) for bag in bags["train"]}
            self.settings.chat = kinds.pop() if len(kinds) == 1 else None  # trained on both kinds, it accepts both
            check_learned_kind((bag.prompt for bag in bags.get("eval", [])), self.settings.chat, where="eval data, ")
            if args.scorer != "embedding":
                warn_of_joined_text(bags["train"], self.settings)
            self._prepare(datasets["train"], model, args)
        super().__init__(
            model=scorer,
            args=args,
            data_collator=BagCollator(self.inputs),
            train_dataset=datasets.get("train"),
            eval_dataset=datasets.get("eval"),
            processing_class=None if isinstance(self.processor, SentenceEncoder) else self.processor,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=self._metrics,
        )
        check_unsharded(self)
        self._terms: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._stage: StageKind = "joint"

    @classmethod
    def choose(
        cls,
        trials: int,
        model: str | Path | PreTrainedModel | SentenceEncoder,
        args: FractalConfig,
        train_dataset: Records,
        eval_dataset: Records | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        on_trial: Callable[[Trial], None] | None = None,
    ) -> "FractalTrainer":
        """Try the first configurations of a small list, and return a trainer with the one that suits the data best.

        They differ in aggregation, priors, pseudo-labels, learning rates and epochs. They are compared by response
        labels of the evaluation data or, if there are few, by five-fold cross-validation on all data. Step labels are
        not used. The first is the plain bag loss; another one replaces it if it is better by more than a standard
        error.

        Each finished trial has a row in `trials.jsonl` in the output folder. With the same configuration, model and
        data, a stopped choice continues where it was, and a finished one trains nothing. Trials keep no checkpoints and
        log nothing.

        Args:
            trials: How many configurations of the list to try.
            model: As for the trainer; an instance is copied for each trial.
            args: What trials have in common. `aggregation` says what labels mean; trials vary the aggregation within
                that meaning.
            train_dataset: As for the trainer.
            eval_dataset: As for the trainer.
            processing_class: As for the trainer.
            peft_config: As for the trainer.
            callbacks: Callbacks of the returned trainer.
            on_trial: Called after each trial.

        Returns:
            A trainer with the winner's configuration, not trained yet; its card names the winner and lists the trials.

        Raises:
            ValueError: If there are fewer configurations than `trials`, the configuration sets what trials vary, or the
                data cannot compare them, because all labels are equal or there are too few.
        """
        settings, folder = args.settings(), Path(str(args.output_dir))
        train_bags = to_bags(train_dataset, settings, source="train data")
        eval_bags = None if eval_dataset is None else to_bags(eval_dataset, settings, source="eval data")
        judge = check_trials(trials, args, train_bags, eval_bags)

        def fresh() -> tuple[Any, Any]:
            return copy.deepcopy(model) if isinstance(model, nn.Module) else model, copy.deepcopy(peft_config)

        def score(config: FractalConfig, known: list[Bag], held_out: list[Bag]) -> list[float]:
            start, adapters = fresh()
            place = folder / "trial"  # folder of the stages; nothing in it is kept
            shutil.rmtree(place, ignore_errors=True)
            quiet = replace(config, output_dir=str(place), **QUIET)
            trainer = cls(start, quiet, known, held_out, processing_class, adapters)
            trainer.train()
            trainer.calibrate()
            shutil.rmtree(place, ignore_errors=True)
            return [response_score(scored, config) for scored in score_bags(trainer.reward_model(), held_out)]

        rows = ResultsFile(folder / TRIALS_FILE)
        name = model_name(model) or ""
        tried = try_configurations(trials, args, judge, score, rows, model=name, on_trial=on_trial)
        choice = best_beyond_noise(tried, judge)
        start, adapters = fresh()
        options = replace(args, **choice.chosen.options)
        trainer = cls(start, options, train_bags, eval_bags, processing_class, adapters, callbacks)
        trainer.choice, trainer.card.choice = choice, choice.text
        return trainer

    def materials(self) -> dict[str, Any]:
        train: Any = self.train_dataset
        return {
            "train_data": None if train is None else self._rows.name(content_fingerprint(train.bags)),
            # Only if it decides which weights are kept.
            **({"eval_data": content_fingerprint(self.eval_bags or [])} if self.args.load_best_model_at_end else {}),
            "model": model_fingerprint(self.scorer),
            "tokenizer": processor_fingerprint(self.processor),
            "adapter": adapter_settings(self.scorer.model),
            "prior_models": {
                name: weights_fingerprint(sorted(Path(path).rglob("*.safetensors")))
                for name in ("prior_encoder", "reference_model")
                if (path := getattr(self.args, name)) is not None and Path(path).is_dir()
            },
        }

    def _encoded(self, bags: list[Bag], source: str, **options: Any) -> BagDataset:
        return BagDataset(bags, self.inputs, self.settings, source=source, **options)

    def _prepare(self, data: BagDataset, model: Any, args: FractalConfig) -> None:
        """Step targets of the training data: prior targets, and the gold labels that may be read."""
        self.data = data
        data.targets |= prior_targets(data.bags, args, model=model, processor=self.processor)
        shares = [bag.label for bag in data.bags if bag.label is not None and bag.pair_id is None]
        self._base_rate = float(np.mean(shares)) if shares else 0.5
        if args.instance_weight:
            self.withheld = data.targets["step_labels"]
            data.targets["step_labels"] = [torch.full_like(row, torch.nan) for row in self.withheld]
            drawn = np.random.default_rng(args.seed).permutation(len(data.bags)).tolist()
            if plan(args)[0].reads_gold:
                data.targets["step_labels"] = revealed_gold(self.withheld, drawn, args)

    @property
    def scorer(self) -> StepScorer:
        """The scorer, without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def reward_model(self) -> StepRewardModel:
        """The model in training, ready to score."""
        return StepRewardModel(self.scorer, self.processor, self.settings)

    # Learning -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; [`FractalTrainer.finish`] then calibrates and measures what was learned.

        A configuration with several stages (hybrid prior, pseudo-labels, choice of gold labels by uncertainty) trains
        each in a separate folder; with `resume_from_checkpoint=True`, finished stages are skipped.
        """
        stages = plan(self.args)
        if len(stages) > 1 and resume_from_checkpoint not in (None, False, True, ""):
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint}, but there are {len(stages)} stages, each with "
                "its own checkpoints. Give true to continue where the run stopped."
            )
        self.begin(resume_from_checkpoint)
        with flush_denormals(self.accelerator.device):
            if len(stages) > 1:
                result = self._train_in_stages(stages, resume=bool(resume_from_checkpoint), **kwargs)
            else:
                result = self._train_stage(stages[0], resume_from_checkpoint, **kwargs)
        if self.train_dataset is not None:
            responses = self.data.truncation.total + len(self.data.later or ())
            self.card.metrics["train"] = {"responses": responses, **result.metrics}
        return result

    def _train_in_stages(self, stages: Sequence[Stage], *, resume: bool, **kwargs: Any) -> Any:
        """Train stage after stage, each in its own folder; the log history then has all stages.

        A stage passes its step logits on the training data to the next. With `resume`, finished stages are skipped, and
        an unfinished one resumes from its last checkpoint.
        """
        args, data = self.args, self.data
        output, start = Path(str(args.output_dir)), self._trainable()
        result, history, handed = None, [], []
        if not resume:
            if self.is_world_process_zero():
                for stage in stages:
                    shutil.rmtree(output / stage.name, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        for stage in stages:
            if stage.kind == "pseudo":
                labels = step_targets(data, handed, args)
                before = data.targets.get("pseudo_labels")
                if before is not None and all(map(torch.equal, labels, before)):
                    logger.info("Pseudo-labels did not change: %s and later rounds are skipped.", stage.name)
                    break
                data.targets["pseudo_labels"] = labels
            if stage.kind != "pseudo" or args.pseudo_start == "fresh":
                self.scorer.load_state_dict(start, strict=False)
            folder = output / stage.name
            finished = read_finished(folder) if resume else None
            if finished is None:
                result, logits = self._train_in_folder(stage, folder, resume and can_resume(folder), **kwargs)
            else:
                self.state, weights, logits = finished
                self.scorer.load_state_dict(weights, strict=False)
                result = train_output(self.state)
            history += [entry | {"stage": stage.name} for entry in self.state.log_history]
            handed = split_logits(logits, data, args.num_grades)
            if not stage.reads_gold:
                order = most_uncertain(handed, args.num_grades)
                data.targets["step_labels"] = revealed_gold(self.withheld, order, args)
            if stage.kind == "gold":
                data.targets["hybrid"] = hybrid_targets(data, handed, args.num_grades)
        self.state.log_history = history
        return result

    def _train_in_folder(self, stage: Stage, folder: Path, resume: bool, **kwargs: Any) -> tuple[Any, Tensor]:
        """Train a stage in its folder; returns the result of `Trainer.train`, and the concatenated logits for the next
        stage."""
        set_seed(self.args.seed)  # a stage must not depend on whether earlier stages ran in this process
        self.optimizer = self.lr_scheduler = None
        with lent(self.args, output_dir=str(folder)):
            result = self._train_stage(stage, resume, **kwargs)
        logits = torch.cat([row.flatten() for row in self.step_logits(self.data)]).cpu()
        if self.is_world_process_zero():
            write_finished(folder, Finished(self.state, self._trainable(), logits), self.identity)
        self.accelerator.wait_for_everyone()
        return result, logits

    def _trainable(self) -> dict[str, Tensor]:
        """Copies of the trainable weights."""
        named = self.scorer.named_parameters()
        form = torch.contiguous_format  # as safetensors requires
        return {name: x.detach().cpu().clone(memory_format=form) for name, x in named if x.requires_grad}

    def _train_stage(self, stage: Stage, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train one stage from the current weights; fit the likelihood scorer's weight and bias first."""
        self._stage = stage.kind
        everything = self.train_dataset
        goes_on = resume_from_checkpoint or (stage.kind == "pseudo" and self.args.pseudo_start == "warm")
        if stage.kind == "gold":
            gold = self.data.targets["step_labels"]
            known = [i for i, rows in enumerate(self.data.items) if any(not gold[row].isnan().all() for row in rows)]
            self.train_dataset = torch.utils.data.Subset(self.data, known)
        try:
            if not goes_on and isinstance(self.scorer, LikelihoodScorer) and everything is not None:
                self._fit_scale(self.scorer, everything)
            return self.go_on(resume_from_checkpoint, str(self.args.output_dir), **kwargs)
        finally:
            self.train_dataset = everything

    def _fit_scale(self, scorer: LikelihoodScorer, data: Any) -> None:
        """Fit weight and bias to the bag labels of some responses."""
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))
        batches = self._logits([data[int(i)] for i in order[:_SCALE_RESPONSES]])
        scorer.fit_scale(
            [logits for logits, _ in batches],
            [batch["bag_labels"] for _, batch in batches],
            [batch["mask"] for _, batch in batches],
            aggregation=self.settings.aggregation,
            sharpness=self.settings.sharpness,
            label_noise=(self.args.missed_good, self.args.missed_bad),
        )

    def _logits(self, items: list[dict[str, Any]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Step logits of items in evaluation mode, batch by batch, together with the batch."""
        scorer, size = self.scorer, self.args.per_device_eval_batch_size
        training = scorer.training
        scorer.eval()
        batches = []
        for start in range(0, len(items), size):
            batch = self._prepare_inputs(self.data_collator(items[start : start + size]))
            with torch.no_grad(), self.compute_loss_context_manager():
                batches.append((scorer(**{name: batch[name] for name in scorer.inputs}), batch))
        scorer.train(training)
        return batches

    def step_logits(self, data: BagDataset) -> list[Tensor]:
        """Logits (S,) or (S, G) of the steps of each bag, in evaluation mode."""
        found: dict[int, Tensor] = {}
        rows = iter(row for item in data.items for row in item)
        for logits, batch in self._logits([data[i] for i in range(len(data))]):
            for row_logits, real in zip(logits.cpu(), batch["mask"].cpu(), strict=True):
                found[next(rows)] = row_logits[real]
        return [found[row] for row in range(len(data.bags))]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the loss terms, each averaged over the bags or preferences of the batch.

        In evaluation there are no priors and no pseudo-labels: the loss is on the labels of the data.
        """
        texts = {name: inputs[name] for name in self.scorer.inputs}
        logits = bucketed_step_logits(model, texts, self.accelerator)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        weights = term_weights(self.args, self._stage if model.training else "joint", progress)
        terms = loss_terms(logits, inputs, set(weights), self.args, base_rate=self._base_rate)
        if model.training:
            means = mean_terms(terms, list(weights), self.accelerator)
        else:  # evaluation pads its last batch, so processes stay in sync
            means = {name: term.mean() for name, term in terms.items()}
        # A batch without anything to learn still needs a gradient, or other processes would wait for it.
        loss = sum(weights[name] * mean for name, mean in means.items()) if means else 0.0 * logits.nan_to_num().sum()
        if model.training:
            self.finite.check_loss(loss, inputs)
        for name, term in terms.items():
            self._terms["loss" if model.training else "eval", name].append(term.detach())
        return (loss, logits) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimizer; the scorer's own parameters get `head_learning_rate`."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            rate = self.args.head_learning_rate
            rate = 10 * self.args.learning_rate if rate is None else rate
            move_to_group(optimizer, head_parameters(self.scorer, self.settings), rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every named loss term, averaged over the bags since the last log or over the evaluation."""
        total = next((name for name in logs if name.endswith("loss") and name != "train_loss"), None)
        if total is not None:
            wanted = "loss" if total == "loss" else "eval"
            seen = {term: self._terms.pop((kind, term)) for kind, term in list(self._terms) if kind == wanted}
            logs |= {f"{total}/{term}": mean for term, mean in logged_means(seen).items()}
        super().log(logs, start_time)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in `transformers.Trainer`; `evaluate` takes records too."""
        for key in [key for key in self._terms if key[0] == "eval"]:
            del self._terms[key]  # from a prediction, which logs nothing
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
        """Loss, step logits (items, S, 2) and (bag labels, step labels, mask, chosen), laid out by [`by_item`]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, logits = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        labels = (inputs["bag_labels"], inputs["step_labels"], inputs["mask"].long(), inputs["chosen"])
        return loss, by_item(logits.detach(), inputs["chosen"]), tuple(by_item(x, inputs["chosen"]) for x in labels)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics on bag labels, and on gold step labels if the data has them."""
        measured = measure_logits(collected_bags(prediction), self.settings)
        self.card.evaluated(measured)
        return measured.values

    def calibrate(self) -> float:
        """Fit the temperature to the response labels of the evaluation data, as [`FractalTrainer.finish`] does.

        Returns:
            The temperature; 1 for grades and preferences, whose labels do not determine probabilities.

        Raises:
            ValueError: If there is no evaluation data.
        """
        data: Any = self.eval_dataset
        if data is None:
            raise ValueError("There is no evaluation data to calibrate on. Give `eval_dataset`.")
        if self.settings.num_grades is None and all(len(rows) == 1 for rows in data.items):
            pad, rows = torch.nn.utils.rnn.pad_sequence, self.step_logits(data)
            mask = pad([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
            labels, settings = torch.tensor([float(bag.label) for bag in data.bags]), self.settings
            settings.temperature = fit_temperature(
                pad(rows, batch_first=True),
                labels,
                mask,
                aggregation=settings.aggregation,
                sharpness=settings.sharpness,
            )
        return self.settings.temperature

    def finish(self, test_dataset: Records | None = None, *, data: str | None = None) -> dict[str, Mapping[str, Any]]:
        """Calibrate the model on the evaluation data, evaluate it, and complete its card. Call it before `save_model`.

        Temperature and threshold are fitted to the response labels of the evaluation data, and the checkpoint stores
        them; gold step labels are used for metrics only. `train` does not call this, because it changes the scale of
        the scores and costs a forward pass over the held-out data: the caller decides when the model is final.
        `fractal-rm train` calls it.

        Args:
            test_dataset: More held-out rows, only for metrics.
            data: Name of the training data, for the card.

        Returns:
            The metrics of the splits `train`, `eval` and `test`, as far as given. Without evaluation
            data the temperature stays 1 and the threshold 0.5.

        Raises:
            ValueError: If the test data cannot be read or has prompts of another kind than the training data.
        """
        splits = {} if self.eval_bags is None else {"eval": self.eval_bags}
        if test_dataset is not None:
            splits["test"] = to_bags(test_dataset, self.settings, source="test data")
        if "eval" in splits:
            self.calibrate()
            self.card.forget_evaluation()  # the same data, evaluated before calibration
        scored = {split: score_bags(self.reward_model(), bags) for split, bags in splits.items()}
        for split, found in scored.items():
            if not all(math.isfinite(score) for one in found for score in one.step_scores):
                raise ValueError(
                    f"The model gives NaN or infinite scores to steps of the {split} data: the training has diverged. "
                    "Lower `learning_rate`."
                )
        if "eval" in splits:
            threshold = choose_threshold(scored["eval"], splits["eval"], aggregation=self.settings.aggregation)
            if not math.isnan(threshold):
                self.settings.threshold = threshold
        self.card.data = data or self.card.data
        for split, results in scored.items():
            self.card.metrics[split] = evaluate_scores(results, splits[split], self.settings.threshold)
            found = estimates(measure_responses(results, splits[split], self.settings.threshold))
            self.card.intervals[split] = {k: v for k, v in found.items() if k in self.card.metrics[split]}
        return dict(self.card.metrics)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return  # another process writes
        folder = Path(output_dir or str(self.args.output_dir))
        with named_write_errors(f"The reward model in {folder}"):
            saved = save_scorer(folder, self.scorer, self.processor, self.settings)
            write_atomic(folder / "README.md", self.card.text(saved, self.processor))
            if self.scorer.is_adapted:
                with replacing(folder / _TRAINABLE_FILE) as file:
                    save_file(self._trainable(), file)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the reward model's card instead of the one of `transformers.Trainer`."""
        if self.is_world_process_zero():
            text = self.card.text(self.settings, self.processor)
            write_atomic(Path(str(self.args.output_dir)) / "README.md", text)

    def pending_logs(self) -> list[Any]:
        return [[*key, [part.tolist() for part in parts]] for key, parts in self._terms.items()]

    def restore_pending_logs(self, pending: list[Any]) -> None:
        for kind, term, parts in pending:
            self._terms[kind, term] = [torch.tensor(part) for part in parts]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.scorer.is_adapted:
            self.scorer.load_state_dict(load_file(folder / _TRAINABLE_FILE), strict=False)
        else:
            saved, _, _ = load_scorer(folder)
            self.scorer.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
