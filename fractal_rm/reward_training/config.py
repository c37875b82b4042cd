"""Configuration of [`FractalTrainer`]."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from fractal_rm.data.segmentation import Method, Segmentation, Thinking
from fractal_rm.hf.runs import RunConfig
from fractal_rm.objectives.aggregation import Aggregation, meaning
from fractal_rm.objectives.preferences import PreferenceForm
from fractal_rm.objectives.priors import Distance, Schedule
from fractal_rm.ranges import check_ranges
from fractal_rm.scorers.settings import FractalSettings, HeadType, Reduction, ScorerKind


@dataclass
class FractalConfig(RunConfig, TrainingArguments):
    """Configuration of [`FractalTrainer`]: only what it adds to [`~transformers.TrainingArguments`].

    `learning_rate` defaults to 5e-5 as in transformers; small models trained from scratch need about 1e-3.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
    ]  # JSON on the command line

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Always False: the collator needs all columns that the trainer prepared."}
    )
    scorer: ScorerKind = field(
        default="likelihood",
        metadata={
            "help": "What scores a step: `likelihood` (a causal LM; weight * log-likelihood of the step + bias), "
            "`token` (a token classification head at the step's last token; any backbone) or `embedding` (a head on a "
            "frozen sentence encoder)."
        },
    )
    aggregation: Aggregation = field(
        default="min",
        metadata={
            "help": "How steps combine into a response score: `min` (the worst step decides), `max` (the best one "
            "decides), `mean`, `product` (every step must be good), `noisy_or` (one good step is enough), `softmin` or "
            "`softmax` (smooth `min` and `max`, see `sharpness`)."
        },
    )
    sharpness: float = field(
        default=1.0,
        metadata={"help": "How close `softmin` and `softmax` are to `min` and `max`."},
    )
    num_grades: int | None = field(
        default=None,
        metadata={"help": "Number of grades of ordinal labels, 0 to `num_grades - 1`. None: labels say good or bad."},
    )
    segmentation: Method = field(
        default="lines", metadata={"help": "How responses are cut into steps; steps in the data are kept."}
    )
    separator: str | None = field(default=None, metadata={"help": "Text between steps, for `segmentation=separator`."})
    pattern: str | None = field(
        default=None, metadata={"help": "Regular expression between steps, for `segmentation=pattern`."}
    )
    language: str = field(
        default="en", metadata={"help": "Language code of the responses, for `segmentation=sentences`."}
    )
    thinking: Thinking = field(
        default="score",
        metadata={
            "help": "Whether text in `<think> ... </think>` is cut into steps (`score`) or read without being cut "
            "(`skip`)."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template in addition to the messages, such as `enable_thinking`; stored in "
            "the checkpoint. `StepPPOTrainer` adds the policy's."
        },
    )
    prompt_template: str = field(
        default="{prompt}",
        metadata={"help": "Text with `{prompt}` in the prompt's place; the response follows directly."},
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of prompt and response together; whole steps beyond it are left out and counted. "
            "None: the model's maximum."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Switch off the model's dropout, as TRL's reward trainers do; dropout of adapters "
            "(`lora_dropout`) and of the embedding scorer's head stays on."
        },
    )
    reduction: Reduction = field(
        default="sum", metadata={"help": "Likelihood scorer: add or average the log-probabilities of a step's tokens."}
    )
    head_type: HeadType = field(
        default="pair",
        metadata={
            "help": "Embedding scorer: `pair` (compares a step with the prompt; docs/disaggregation.md), `mlp` (the "
            "paper's head: both embeddings concatenated) or `set` (a small transformer over the steps of a response)."
        },
    )
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Precision of the sentence encoder: `auto` is the precision of its weights; `bfloat16` is several "
            "times faster on GPUs and newer CPUs."
        },
    )
    embedding_cache: str | None = field(
        default=None,
        metadata={
            "help": "Cache folder of embeddings. None: the environment variable FRACTAL_RM_CACHE, else "
            "~/.cache/fractal_rm."
        },
    )
    bag_weight: float = field(
        default=1.0, metadata={"help": "Weight of the bag loss (response labels) and of the preference loss."}
    )
    preference_loss: PreferenceForm = field(
        default="bradley_terry",
        metadata={
            "help": "Loss of preferences: `bradley_terry` (on aggregated logits) or `ratio` (the paper's: the chosen "
            "response's share of the sum of both probabilities)."
        },
    )
    missed_good: float = field(
        default=0.0,
        metadata={"help": "Share of good responses labelled bad; the bag loss corrects for it."},
    )
    missed_bad: float = field(
        default=0.0,
        metadata={"help": "Share of bad responses labelled good; the bag loss corrects for it."},
    )
    easyllp_weight: float = field(
        default=0.0, metadata={"help": "Weight of the EasyLLP loss, for labels that are shares of good steps."}
    )
    instance_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss on gold step labels. 0: gold labels are not read."}
    )
    gold_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the responses whose gold step labels are read, if `instance_weight` is above 0."},
    )
    gold_selection: Literal["random", "uncertainty"] = field(
        default="random",
        metadata={
            "help": "How these responses are chosen: at random, or as the ones whose steps a first model, trained "
            "without gold labels, is least sure of."
        },
    )
    prior_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub id of the sentence encoder of the cosine and correlation priors. None: the embedding "
            "scorer's encoder."
        },
    )
    cosine_prior_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cosine prior: steps close to the prompt are good."}
    )
    negated_cosine_prior_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the cosine prior with the sign of the paper's released code; an ablation."},
    )
    correlation_prior_weight: float = field(
        default=0.0, metadata={"help": "Weight of the correlation prior: similar steps get similar scores."}
    )
    teacher_prior_weight: float = field(
        default=0.0, metadata={"help": "Weight of the teacher prior: the column `teacher_scores` of the data."}
    )
    likelihood_prior_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the likelihood prior: steps that `reference_model` finds likely are good."},
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "Path or hub id of the causal LM of the likelihood prior. None: `model`, before training."},
    )
    hybrid_prior_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the hybrid prior: a model that is first fitted on the gold fraction alone."},
    )
    prior_distance: Distance = field(
        default="cross_entropy",
        metadata={"help": "Distance between scores and prior targets (the correlation prior has its own)."},
    )
    prior_schedule: Schedule = field(
        default="constant", metadata={"help": "Whether priors keep their weight or decay to 0 during training."}
    )
    pseudo_labels: Literal["none", "hard", "soft"] = field(
        default="none",
        metadata={
            "help": "Train again, on inferred step labels: `hard` (the most likely ones that agree with the response "
            "labels) or `soft` (probabilities given the response label)."
        },
    )
    pseudo_rounds: int = field(
        default=1, metadata={"help": "Maximum number of pseudo-label rounds; they end early when no label changes."}
    )
    pseudo_start: Literal["fresh", "warm"] = field(
        default="fresh",
        metadata={"help": "Where a round starts: `fresh` from the untrained weights, `warm` from the previous round."},
    )
    pseudo_bag_weight: float = field(
        default=0.0, metadata={"help": "Weight of the bag loss in pseudo-label rounds; 0 in the paper."}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the scorer's own parameters; they are its weight and bias, or its head. None: "
            "ten times `learning_rate`, because they start untrained while the backbone is pretrained."
        },
    )

    def __post_init__(self) -> None:
        self.settings()  # raises its own errors
        check_ranges(self)
        self.check_amounts()
        self.check_objects()
        self.check_compilation()
        super().__post_init__()
        # Without an accelerator, torch warns about every data loader that pins memory.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.remove_unused_columns = False
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "`neftune_noise_alpha` works for language models only: it does not reach a scorer's embeddings. Leave "
                "it out."
            )
        if self.bag_weight == self.instance_weight == self.easyllp_weight == 0:
            raise ValueError(
                "`bag_weight`, `instance_weight` and `easyllp_weight` are all 0: nothing would be learned. Set one."
            )
        if self.gold_selection == "uncertainty" and self.bag_weight == self.easyllp_weight == 0:
            raise ValueError(
                "`gold_selection='uncertainty'` needs a model that has learned from response labels first, but "
                "`bag_weight` and `easyllp_weight` are 0. Set one, or leave `gold_selection` out."
            )
        if self.hybrid_prior_weight and not (self.instance_weight and self.gold_fraction):
            raise ValueError("`hybrid_prior_weight` needs gold step labels. Set `instance_weight` and `gold_fraction`.")
        binary = [name for name in ("easyllp_weight", "missed_good", "missed_bad") if getattr(self, name)]
        if self.num_grades is not None and binary:
            raise ValueError(
                f"`{binary[0]}` is {getattr(self, binary[0])} with `num_grades={self.num_grades}`, but it needs "
                "labels that say good or bad. Set it to 0, or leave `num_grades` out."
            )
        noisy = [name for name in ("missed_good", "missed_bad") if getattr(self, name)]
        if noisy and self.pseudo_labels != "none" and meaning(self.aggregation) == "mean":
            raise ValueError(
                f"`{noisy[0]}` is {getattr(self, noisy[0])} with `pseudo_labels={self.pseudo_labels}` under "
                f"`aggregation={self.aggregation}`, where a label is a share of good steps, not right or wrong. Set "
                "it to 0, or choose another aggregation."
            )

    def settings(self) -> FractalSettings:
        """The part of this configuration that the checkpoint stores."""
        shared = FractalConfig.__annotations__.keys() & FractalSettings.__annotations__.keys()
        values: dict[str, Any] = {name: getattr(self, name) for name in shared}
        values["chat_template_kwargs"] = self.chat_template_kwargs or {}
        values["segmentation"] = Segmentation(
            self.segmentation,
            separator=self.separator,
            pattern=self.pattern,
            language=self.language,
            thinking=self.thinking,
        )
        return FractalSettings(**values)
