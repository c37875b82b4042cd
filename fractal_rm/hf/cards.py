"""Model cards: the README.md of a trained folder says what the model is, how it scored, and how to use it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fractal_rm.evaluation.intervals import Estimate, Measurement, estimates
from fractal_rm.scorers.inputs import Processor, spaces_texts, special_affixes
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.versions import package_versions


@dataclass
class RewardModelCard:
    """Model card of a step reward model, filled in as results become known."""

    base: str | None = None  # model that training started from: a path or hub id; None if it was built in code
    data: str = "given in Python"  # name of the training data
    labels: str = "not known"  # what its labels say, and how many there are
    metrics: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # for each split its metrics
    # For each split the metrics with an interval, which replace those in `metrics`.
    intervals: dict[str, Mapping[str, Estimate]] = field(default_factory=dict)
    measured: Measurement | None = None  # the last evaluation; its intervals are computed when a card is written
    choice: str | None = None  # how the configuration was chosen among others, with their results; None: it was given

    def evaluated(self, measured: Measurement) -> None:
        """Record the metrics of an evaluation; a card computes their intervals if it is written before the next one."""
        self.metrics["evaluation"], self.measured = measured.values, measured
        self.intervals.pop("evaluation", None)

    def forget_evaluation(self) -> None:
        """Drop the metrics of the last evaluation."""
        self.metrics.pop("evaluation", None)
        self.intervals.pop("evaluation", None)
        self.measured = None

    def text(self, settings: FractalSettings, processor: Processor) -> str:
        """The card, from the saved settings of the checkpoint."""
        if self.measured is not None:
            self.intervals["evaluation"], self.measured = estimates(self.measured), None
        task = {"likelihood": "text-generation", "token": "token-classification"}.get(settings.scorer)
        longest = f"{settings.max_length} tokens" if settings.max_length else "no limit"
        template = settings.prompt_template.encode("unicode_escape").decode()
        return f"""{_header(self.base, task, ("fractal-rm", "process-reward-model", "reward-model"))}
# Step reward model

Scores every step of a response, learned with `fractal_rm`.

| | |
|---|---|
| trained from | {_portable(self.base)} |
| data | {self.data} (fingerprint `{settings.data}`) |
| labels | {self.labels} |
| scorer | {settings.scorer} |
| response score | {settings.aggregation} of the step probabilities |
| steps | {settings.segmentation.method} |
| prompts | {"chats" if settings.chat else "texts" if settings.chat is False else "texts or chats"} |
| prompt template | `{template}` |
| longest input | {longest} |
| temperature | {settings.temperature:.4g} |
| a step is wrong below | {settings.threshold:.4g} |

{_metrics(self.metrics, self.intervals)}{_section("How its configuration was chosen", self.choice)}
## Use

Meant for ranking responses, for finding the first wrong step, and for dense rewards in reinforcement learning, on
prompts like those it was trained on.

```python
from fractal_rm import StepRewardModel

reward_model = StepRewardModel.from_pretrained("this-folder")
for scored in reward_model.score(prompts=["..."], responses=["..."]):
    print(scored.score, [(step.text, step.score) for step in scored.steps])
```

## Limits

- A score is a learned guess, not a proof. Nothing is known about prompts unlike the training data, other languages, or
  steps of another length or style.
- Step scores follow from labels on responses: which step spoilt a response is inferred. Without gold labels in the
  table above, nobody has checked how well.
- A policy trained on these scores will find their blind spots: keep an independent check of its answers.

{_without_this_package(settings, processor)}
{_versions()}
"""


def policy_card(
    *, base: str, rewards: str, data: str, settings: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]
) -> str:
    """Model card of a policy trained with `StepPPOTrainer`: rewards and prompts in words, metrics for each split."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""{_header(base, "text-generation", ("fractal-rm", "step-ppo", "trl"))}
# Policy trained with step rewards

Trained with `StepPPOTrainer` of `fractal_rm`.

| | |
|---|---|
| trained from | {_portable(base)} |
| rewards | {rewards} |
| prompts | {data} |
{rows}

{_metrics(metrics)}
{_versions()}
"""


def _section(title: str, text: str | None) -> str:
    """A section of a card; empty without a text."""
    return "" if text is None else f"\n## {title}\n\n{text}"


def _header(base: str | None, task: str | None, tags: tuple[str, ...]) -> str:
    lines = ["---", f"library_name: {'transformers' if task else 'sentence-transformers'}"]
    if task:
        lines.append(f"pipeline_tag: {task}")
    if base is not None and not Path(base).exists():  # a hub id
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _portable(path: str | None) -> str:
    """A hub id unchanged, a folder by its name."""
    if path is None:
        return "a model built in code"
    return Path(path).name if Path(path).exists() else path


def counted(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Drop a `total_flos` of 0 from metrics: the trainer did not count operations.

    Example:
        >>> counted({"total_flos": 0.0, "train_loss": 0.0})
        {'train_loss': 0.0}
    """
    return {name: value for name, value in metrics.items() if name != "total_flos" or value}


def _metrics(
    metrics: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Mapping[str, Estimate]] | None = None
) -> str:
    """A table of numbers; intervals have a separate column."""
    rows, known = [], intervals or {}
    for split in dict.fromkeys([*metrics, *known]):
        shown = counted(metrics.get(split, {}))
        values = {name: (_number(value), "") for name, value in shown.items() if _number(value)}
        for name, (value, low, high) in known.get(split, {}).items():
            ends = f"[{low:.4g}, {high:.4g}]" if math.isfinite(low) else ""
            values[name] = (_number(value), ends)
        rows += [f"| {split} | {name} | {value} | {ends} |" for name, (value, ends) in values.items()]
    head = ["| split | metric | value | 95 % interval |", "|---|---|---:|---|"]
    return "\n".join([*head, *rows]) + "\n" if rows else ""


def _number(value: Any) -> str:
    """A number in four digits; an empty text for other values."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4g}" if math.isfinite(value) else "—"


def _versions() -> str:
    return (
        "Versions: " + ", ".join(f"{name} {version}" for name, version in package_versions().items() if version) + "."
    )


# Reading step scores with transformers only ---------------------------------------------------------------------------

_HEADING = "## Without fractal-rm"

_START = '''import torch
from transformers import {loader}, {tokenizer}

folder = "this-folder"
tokenizer = {tokenizer}.from_pretrained(folder)
model = {loader}.from_pretrained(folder).eval()
settings = model.config.fractal


def score_steps(prompt, pieces):
    """P(step is good) of each step. `pieces`: the response, cut after each step: ["3*4=12.", "\\\\n2+12=14."]."""
    {text}
    ids = {prefix}tokenizer(text, add_special_tokens=False)["input_ids"]
'''

_TOKEN = """    ends = []
    for piece in pieces:  # a step is read at its last token
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        ends.append(len(ids) - 1)
    with torch.no_grad():
        logits = model(torch.tensor([ids{suffix}])).logits[0, ends].float() / settings["temperature"]
    {probs}
"""

_LIKELIHOOD = """    members = []
    for piece in pieces:  # a step's tokens hold part of it, not only the white space before it
        gap = len(piece) - len(piece.lstrip())
        found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        inside = [i for i, (_, end) in enumerate(found["offset_mapping"]) if end > gap]
        members.append([len(ids) + i for i in inside if len(ids) + i > 0])
        ids += found["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids{suffix}])).logits[0].float().log_softmax(-1)
    steps = [torch.stack([log_probs[i - 1, ids[i]] for i in step]).{reduction}() for step in members]
    logits = torch.tensor(settings["log_weight"]).exp() * torch.stack(steps) + settings["bias"]
    return (logits / settings["temperature"]).sigmoid().tolist()
"""

_GRADES = "return (logits.softmax(-1) @ torch.arange(logits.size(-1)).float() / (logits.size(-1) - 1)).tolist()"


def _without_this_package(settings: FractalSettings, processor: Processor) -> str:
    """A section of a model card: code that gives the same step scores, or why transformers alone cannot."""
    if isinstance(processor, SentenceEncoder):
        return f"{_HEADING}\n\nThe folder loads with sentence-transformers; its scoring head needs fractal-rm.\n"
    if spaces_texts(processor):
        return (
            f"{_HEADING}\n\nThe folder loads with transformers. This tokenizer puts a space before every text, but "
            "steps must not have one: to tokenize a response as in training, use fractal-rm.\n"
        )
    prefix, suffix = ([], []) if settings.chat else special_affixes(processor)
    if settings.chat:
        text = "text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)"
    else:
        text = 'text = settings["prompt_template"].replace("{prompt}", prompt)'
    start = _START.format(
        loader="AutoModelForCausalLM" if settings.scorer == "likelihood" else "AutoModelForTokenClassification",
        tokenizer="PreTrainedTokenizerFast" if processor.is_fast else "AutoTokenizer",
        text=text,
        prefix=f"{prefix} + " if prefix else "",
    )
    suffix = f" + {suffix}" if suffix else ""
    if settings.scorer == "likelihood":
        body = _LIKELIHOOD.format(suffix=suffix, reduction=settings.reduction)
    else:
        probs = "return logits[:, 0].sigmoid().tolist()" if settings.num_grades is None else _GRADES
        body = _TOKEN.format(suffix=suffix, probs=probs)
    limit = "" if settings.max_length is None else f" Leave out last steps beyond {settings.max_length} tokens."
    return f"{_HEADING}\n\nThe same step scores from transformers alone.{limit}\n\n```python\n{start}{body}```\n"
