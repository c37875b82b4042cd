"""What a checkpoint stores in addition to its weights: the `fractal` block of `config.json`."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.errors import reason
from fractal_rm.objectives.aggregation import Aggregation, meaning
from fractal_rm.objectives.bag_loss import check_label_noise
from fractal_rm.ranges import check_ranges, check_types
from fractal_rm.scorers.templates import check_template_options

ScorerKind = Literal["likelihood", "token", "embedding"]
Reduction = Literal["sum", "mean"]
HeadType = Literal["pair", "mlp", "set"]
FORMAT_VERSION = 1
# Current version of how text is read; older checkpoints keep the rules they were trained with.
READING = 2

_CHOICES = {
    "scorer": get_args(ScorerKind),
    "reduction": get_args(Reduction),
    "head_type": get_args(HeadType),
}

# Probe text with what tokenizers treat differently: digits, operators, capitals, white space, LaTeX, a multi-byte
# character.
_PROBE = "Step 1: 3.14 * x = \\frac{1}{2}\n\nSo, the  answer is  -42 \u2713."


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of how a tokenizer splits text and writes chats: equal for equal behaviour on a probe text."""
    ids = tokenizer(_PROBE)["input_ids"]
    return hashlib.sha256(f"{len(tokenizer)} {ids} {tokenizer.chat_template}".encode()).hexdigest()[:16]


@dataclass
class FractalSettings:
    """The `fractal` block: how text becomes tokens, and how logits become scores.

    Args:
        scorer: How the model gives step logits.
        aggregation: How step probabilities become a response probability.
        segmentation: How a response is cut into steps.
        prompt_template: Text with `{prompt}` in the prompt's place; the response follows it directly.
        max_length: Maximum number of tokens, including the prompt. Whole steps beyond it are left out, counted and
            logged.
        sharpness: How close a soft aggregation is to the extreme it softens.
        missed_good: Share of good responses wrongly labelled bad; training and online updates correct for it.
        missed_bad: Share of bad responses wrongly labelled good, corrected for in the same way.
        num_grades: How many grades a step can have, 0 to `num_grades - 1`; None: a step is good or not.
        head_type: Embedding scorer: `"pair"` (a step compared with its context), `"mlp"` (the paper's) or `"set"`
            (steps see each other).
        reduction: Likelihood scorer: whether a step's log-probabilities are added or averaged.
        log_weight: Likelihood scorer: logarithm of the factor of the log-likelihood, learned.
        bias: Likelihood scorer: offset of the log-likelihood, learned.
        temperature: Divides the step logits before the sigmoid; 1 until calibrated.
        threshold: A step that scores below it counts as wrong; chosen on validation data.
        tokenizer: Fingerprint of the tokenizer or sentence encoder.
        vocabulary: Fingerprint of its tokens and merges; None in checkpoints of earlier versions.
        weights: Fingerprint of the files of the weights; None in checkpoints of earlier versions.
        config: Fingerprint of the model's own settings in `config.json`; None in checkpoints of earlier versions.
        head: Some of the scoring head's weights, to detect a missing or random head at load.
        chat: Whether the prompts of the training data were chats; None: unknown, or both chats and texts.
        chat_template_kwargs: Arguments of the chat template in addition to the messages, such as `enable_thinking`.
        joint: Text between steps given as a list; None: the segmentation's default.
        reading: Version of the rules for tokenization: 2, or 1 for older checkpoints. In version 1, control tokens
            written as text become control tokens.
        data: Fingerprint of the training data.
        versions: Package versions at saving.
        format_version: Version of this block.
    """

    scorer: ScorerKind = "likelihood"
    aggregation: Aggregation = "min"
    segmentation: Segmentation = field(default_factory=Segmentation)
    prompt_template: str = "{prompt}"
    max_length: int | None = None
    sharpness: float = 1.0
    missed_good: float = 0.0
    missed_bad: float = 0.0
    num_grades: int | None = None
    head_type: HeadType = "pair"
    reduction: Reduction = "sum"
    log_weight: float = 0.0
    bias: float = 0.0
    temperature: float = 1.0
    threshold: float = 0.5
    tokenizer: str | None = None
    vocabulary: str | None = None
    weights: str | None = None
    config: str | None = None
    head: list[float] | None = None
    chat: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    joint: str | None = None
    reading: int = READING
    data: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Choose one of {', '.join(values)}.")
        meaning(self.aggregation)  # names an unknown or removed one
        check_ranges(self)
        if self.reading not in range(1, READING + 1):
            raise ValueError(f"`reading` is {self.reading}. This package supports 1 to {READING}.")
        check_label_noise((self.missed_good, self.missed_bad))
        check_template_options(self.chat_template_kwargs)
        if self.num_grades is not None and self.scorer == "likelihood":
            raise ValueError(
                f"`num_grades` is {self.num_grades} with the {self.scorer} scorer. Use the token or the embedding one."
            )
        if self.num_grades is not None and self.aggregation != "max":
            raise ValueError(
                f"`num_grades` is {self.num_grades} with `aggregation={self.aggregation}`. Grades are aggregated by "
                "their maximum: set `aggregation=max`, or divide grades by the highest one and leave `num_grades` out."
            )
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"`prompt_template` is {self.prompt_template!r}, without a place for the prompt. "
                "Write `{prompt}` in it."
            )

    def to_dict(self) -> dict[str, Any]:
        """The block as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], *, where: str) -> "FractalSettings":
        """Read the block of a folder (`where`), without unknown keys.

        Raises:
            ValueError: Names the folder, the defect and what to do.
        """
        file = f"{where}/config.json"
        version = block.get("format_version") if isinstance(block, Mapping) else None
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"{file}: the `fractal` block has format version {version!r}; this package reads version "
                f"{FORMAT_VERSION}. Install the fractal-rm version that wrote it, or train the model again."
            )
        unknown = sorted(set(block) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"{file}: the `fractal` block has unknown keys {unknown}. Install the fractal-rm version that wrote it."
            )
        try:
            values: dict[str, Any] = {"reading": 1, **block}
            check_types(cls, values)
            segmentation = {"version": 1} | values.get("segmentation", {})
            check_types(Segmentation, segmentation, within="segmentation.")
            values["segmentation"] = Segmentation(**segmentation)
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: the `fractal` block cannot be used ({reason(error)}). Train the model again."
            ) from error
