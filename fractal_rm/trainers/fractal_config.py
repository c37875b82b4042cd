"""Configuration of [`FractalTrainer`]."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from fractal_rm.scorers.settings import Settings
from fractal_rm.segmentation import Segmentation


@dataclass
class FractalConfig(TrainingArguments):
    """Configuration of [`FractalTrainer`]: only what it adds to [`~transformers.TrainingArguments`].

    `learning_rate` defaults to 5e-5 as in transformers; small models trained from scratch want about 1e-3.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Always False: the collator needs all that the trainer prepared."}
    )
    scorer: Literal["likelihood", "token"] = field(
        default="likelihood",
        metadata={
            "help": "How a model gives step logits: `likelihood` (a causal LM; weight * log-likelihood of the step + "
            "bias) or `token` (a token classification head read where the step ends; any backbone)."
        },
    )
    aggregation: Literal["min", "max", "mean", "product"] = field(
        default="min", metadata={"help": "How step probabilities become a response probability."}
    )
    segmentation: Literal["lines", "sentences", "separator", "pattern", "given"] = field(
        default="lines", metadata={"help": "How responses are cut into steps, unless the data brings steps."}
    )
    separator: str | None = field(
        default=None, metadata={"help": "What stands between steps, for `segmentation=separator`."}
    )
    pattern: str | None = field(
        default=None, metadata={"help": "Regular expression between steps, for `segmentation=pattern`."}
    )
    prompt_template: str = field(
        default="{prompt}",
        metadata={"help": "Text in which `{prompt}` stands for the prompt; the response follows directly."},
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of prompt and response together; whole steps beyond it are left out and counted. "
            "None: as many as the model takes."
        },
    )
    reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "Likelihood scorer: add or average the log-probabilities of a step's tokens."}
    )
    bag_weight: float = field(default=1.0, metadata={"help": "Weight of the bag loss (response labels)."})
    instance_weight: float = field(
        default=0.0, metadata={"help": "Weight of the instance loss (gold step labels); 0 = gold labels are not read."}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the scorer's own parameters (weight and bias, or the classification head). "
            "None: ten times `learning_rate`, because they start from nothing while the backbone is pretrained."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Without an accelerator torch warns about every loader that is told to pin memory.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.remove_unused_columns = False
        for name in ("bag_weight", "instance_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}. A loss weight is 0 (off) or more.")
        if self.bag_weight == self.instance_weight == 0:
            raise ValueError("`bag_weight` and `instance_weight` are both 0: nothing would be learned. Set one.")
        if self.head_learning_rate is not None and not 0 <= self.head_learning_rate < math.inf:
            raise ValueError(f"`head_learning_rate` is {self.head_learning_rate}. Give 0 or more, or leave it out.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length} tokens, too few for a prompt and a step. Raise it.")
        self.settings()  # raises its own sentences

    def settings(self) -> Settings:
        """What the checkpoint will remember of this configuration."""
        return Settings(
            scorer=self.scorer,
            aggregation=self.aggregation,
            segmentation=Segmentation(self.segmentation, separator=self.separator, pattern=self.pattern),
            prompt_template=self.prompt_template,
            max_length=self.max_length,
            reduction=self.reduction,
        )
