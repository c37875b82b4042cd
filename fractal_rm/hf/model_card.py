"""The README.md of a trained folder: what it is, how it scored, how to use it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fractal_rm.evaluation.results import package_versions
from fractal_rm.evaluation.statistics import Estimate, Measurement, estimates
from fractal_rm.hf.card_code import without_this_package
from fractal_rm.scorers.inputs import Processor
from fractal_rm.scorers.settings import FractalSettings


@dataclass
class RewardModelCard:
    """Model card of a step reward model, filled in as its facts become known.

    Args:
        base: Model that training started from: a path or hub id; None if it was made in code.
        data: Name of the training data.
        labels: What its labels say, and how many there are.
        metrics: For each split its metrics.
        intervals: For each split the metrics that have an interval; they are shown in place of those in `metrics`.
        measured: The last evaluation; its intervals are computed when a card is written.
    """

    base: str | None = None
    data: str = "given in Python"
    labels: str = "not known"
    metrics: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    intervals: dict[str, Mapping[str, Estimate]] = field(default_factory=dict)
    measured: Measurement | None = None

    def evaluated(self, measured: Measurement) -> None:
        """Take the metrics of an evaluation; their intervals are computed if a card is written before the next one."""
        self.metrics["evaluation"], self.measured = measured.values, measured
        self.intervals.pop("evaluation", None)

    def text(self, settings: FractalSettings, processor: Processor) -> str:
        """The card.

        Args:
            settings: What the checkpoint remembers, as saved.
            processor: Its tokenizer or sentence encoder.
        """
        if self.measured is not None:
            self.intervals["evaluation"], self.measured = estimates(self.measured), None
        task = {"likelihood": "text-generation", "token": "token-classification"}.get(settings.scorer)
        longest = f"{settings.max_length} tokens" if settings.max_length else "no limit"
        template = settings.prompt_template.encode("unicode_escape").decode()
        return f"""{_header(self.base, task, ("fractal-rm", "process-reward-model", "reward-model"))}
# Step reward model

Scores every step of a response, learned with [fractal-rm](https://pypi.org/project/fractal-rm).

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

{_metrics(self.metrics, self.intervals)}
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

- A score is a learned guess, no proof. Nothing is known about prompts unlike the training data, other languages, or
  steps of another length or style.
- Step scores follow from labels on responses: which step spoilt a response is inferred. Without gold labels in the
  table above, nobody has checked how well.
- A policy that is trained on these scores will find what they overlook: keep an independent check of its answers.

{without_this_package(settings, processor)}
{_versions()}
"""


def policy_card(
    *, base: str, rewards: str, data: str, settings: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]
) -> str:
    """Model card of a policy trained with `StepPPOTrainer`.

    Args:
        base: Policy that training started from.
        rewards: Its rewards, in words.
        data: Its prompts, in words.
        settings: Names and values of the settings that matter.
        metrics: For each split its metrics.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""{_header(base, "text-generation", ("fractal-rm", "step-ppo", "trl"))}
# Policy trained with step rewards

Trained with `StepPPOTrainer` of [fractal-rm](https://pypi.org/project/fractal-rm).

| | |
|---|---|
| trained from | {_portable(base)} |
| rewards | {rewards} |
| prompts | {data} |
{rows}

{_metrics(metrics)}
{_versions()}
"""


def _header(base: str | None, task: str | None, tags: tuple[str, ...]) -> str:
    lines = ["---", f"library_name: {'transformers' if task else 'sentence-transformers'}"]
    if task:
        lines.append(f"pipeline_tag: {task}")
    if base is not None and not Path(base).exists():  # a hub id
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _portable(path: str | None) -> str:
    """A hub id as it is, a folder by its name."""
    if path is None:
        return "a model made in code"
    return Path(path).name if Path(path).exists() else path


def _metrics(
    metrics: Mapping[str, Mapping[str, Any]], intervals: Mapping[str, Mapping[str, Estimate]] | None = None
) -> str:
    """A table of numbers; those with an interval have it in a column of its own."""
    rows, known = [], intervals or {}
    for split in dict.fromkeys([*metrics, *known]):
        values = {name: (_number(value), "") for name, value in metrics.get(split, {}).items() if _number(value)}
        for name, (value, low, high) in known.get(split, {}).items():
            ends = f"[{low:.4g}, {high:.4g}]" if math.isfinite(low) else ""
            values[name] = (_number(value), ends)
        rows += [f"| {split} | {name} | {value} | {ends} |" for name, (value, ends) in values.items()]
    head = ["| split | metric | value | 95 % interval |", "|---|---|---:|---|"]
    return "\n".join([*head, *rows]) + "\n" if rows else ""


def _number(value: Any) -> str:
    """A number in four digits, nothing for what is none."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4g}" if math.isfinite(value) else "—"


def _versions() -> str:
    return (
        "Versions: " + ", ".join(f"{name} {version}" for name, version in package_versions().items() if version) + "."
    )
