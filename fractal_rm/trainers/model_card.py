"""The README.md of a trained folder: what it is, how it scored, how to use it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractal_rm.results import package_versions
from fractal_rm.scorers.settings import Settings


def reward_model_card(settings: Settings, *, base: str, data: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Model card of a step reward model.

    Args:
        settings: What the checkpoint remembers.
        base: Model that training started from.
        data: What it was trained on, in words.
        metrics: For each split its metrics.
    """
    loader = "AutoModelForCausalLM" if settings.scorer == "likelihood" else "AutoModelForTokenClassification"
    task = "text-generation" if settings.scorer == "likelihood" else "token-classification"
    return f"""{_header(base, task, ("fractal-rm", "process-reward-model", "reward-model"))}
# Step reward model

Scores every step of a response, learned from labels on whole responses with [fractal-rm](https://pypi.org/project/fractal-rm).

| | |
|---|---|
| trained from | {_portable(base)} |
| data | {data} (fingerprint `{settings.data}`) |
| scorer | {settings.scorer}; the folder loads with `{loader}` |
| response probability | {settings.aggregation} of the step probabilities |
| steps | {settings.segmentation.method} |
| prompt template | `{settings.prompt_template.encode("unicode_escape").decode()}` |
| a step is wrong below | {settings.threshold:.4g} |

{_metrics(metrics)}
```python
from fractal_rm import StepRewardModel

reward_model = StepRewardModel.from_pretrained("this-folder")
for scored in reward_model.score(prompts=["..."], responses=["..."]):
    print(scored.score, [(step.text, step.score) for step in scored.steps])
```

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


def _header(base: str, task: str, tags: tuple[str, ...]) -> str:
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    if not Path(base).exists():  # a hub id
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _portable(path: str) -> str:
    """A hub id as it is, a folder by its name."""
    return Path(path).name if Path(path).exists() else path


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| split | metric | value |", "|---|---|---:|"]
    for split, values in metrics.items():
        for name, value in values.items():
            if isinstance(value, int | float):
                known = isinstance(value, int) or math.isfinite(value)
                lines.append(f"| {split} | {name} | {f'{value:.4g}' if known else '—'} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _versions() -> str:
    return (
        "Versions: " + ", ".join(f"{name} {version}" for name, version in package_versions().items() if version) + "."
    )
