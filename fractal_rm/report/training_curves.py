"""What a training report shows: panels of curves in sections, from the logs of runs. Nothing is drawn here.

What a run does not log has no line, and what no run logs has no panel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fractal_rm.evaluation.statistics import interval_of_mean
from fractal_rm.report.training_history import ALARM, Run

GUARD = "guards/"
# A line of more points is a block of noise, as wide as panels are: neighbouring values of a run become their mean.
MOST_POINTS = 200
OUTCOME = "guards/outcome"  # on the scale of P(response is good): known where outcomes lie in [0, 1]

# Title, and the names under which it may be logged: of several the one that most runs have.
LENGTHS = (
    ("Tokens per response", "completions/mean_length"),
    ("Steps per response", "guards/steps_per_response", "steps/per_response"),
    ("Tokens per step", "guards/tokens_per_step"),
    ("Share cut at the length limit", "guards/truncated", "completions/clipped_ratio"),
)
DIVERGENCES = (
    ("KL per token, in nats", "guards/kl_per_token"),
    ("KL per response, in nats", "kl_reward/per_completion"),
    ("Coefficient of KL in the reward", "kl_reward/coef"),
    ("KL per token in the loss, in nats", "kl"),
)
# What is shown of a log; a training of something else logs none of it.
SHOWN = re.compile(
    r"((eval_)?rewards/.+/mean|guards/(?!outcome$|alarm/).+|completions/(mean_length|clipped_ratio)|steps/per_response"
    r"|kl(_reward/.+)?)$"
)
# Signals of guards that have no place above; one that is not named here is shown under its own name.
SIGNALS = {
    "guards/score_outcome_correlation": "Correlation of score and outcome",
    "guards/score_outcome_gap": "Score minus outcome",
    "guards/repeated_steps": "Share of repeated steps",
    "guards/repeated_ngrams": "Share of repeated 4-grams",
    "guards/generic_steps": "Share of steps that other prompts' responses hold",
    "guards/confidence_markers": "Share of steps with a confidence marker",
    "guards/step_order": "Agreement with the usual order of words",
    "guards/empty": "Share of empty responses",
    "guards/steps_at_ceiling": "Share of steps at the ceiling",
    "guards/ceiling_over_outcome": "Steps at the ceiling, less outcome",
    "guards/unscored": "Share of responses not judged",
    "guards/steps_beyond_limit": "Share of steps beyond the limit",
}


class Line(NamedTuple):
    """A curve over updates: of one run, or the mean of several.

    Attributes:
        name: What it is of.
        slot: Its place among the looks of lines; None: that of a checked outcome.
        updates: Where there are values (P,), ascending.
        mean: The values (P,).
        window: How many neighbouring logged values make a point, by their mean; they are those up to its update.
        low: Lower end of the mean's 95 % interval (P,); None for one run.
        high: Upper end.
    """

    name: str
    slot: int | None
    updates: np.ndarray
    mean: np.ndarray
    window: int
    low: np.ndarray | None
    high: np.ndarray | None


class Mark(NamedTuple):
    """An alarm in a panel: the look of its run's line, and the update."""

    slot: int
    update: int


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes.

    Attributes:
        title: What is shown.
        keys: The names under which it is logged.
        lines: The curves.
        marks: Alarms about what is shown.
    """

    title: str
    keys: tuple[str, ...]
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """Panels that belong together.

    Attributes:
        name: For templates.
        title: Heading.
        panels: The panels, one at least.
    """

    name: str
    title: str
    panels: list[Panel]


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by their name, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def common_updates(runs: Sequence[Run], key: str) -> list[int]:
    """The updates at which all runs have logged a metric."""
    return sorted(set.intersection(*(set(run.metrics.get(key, {})) for run in runs)))


def make_line(name: str, slot: int | None, runs: Sequence[Run], key: str) -> Line | None:
    """The curve of a metric for a group of runs, which are seeds; None if there is no update that all of them have.

    It is the mean at the updates that all runs have, so that no run comes in or drops out along the line, with the
    interval of the mean if there are several runs. `slot` is its place among the looks of lines; None: that of a
    checked outcome.
    """
    updates = common_updates(runs, key)
    if not updates:
        return None
    values = np.array([[run.metrics[key][update] for update in updates] for run in runs])
    window = -(-len(updates) // MOST_POINTS)
    starts = np.arange(0, len(updates), window)
    ends = np.append(starts[1:], len(updates))
    values = np.add.reduceat(values, starts, axis=1) / (ends - starts)
    low, high = interval_of_mean(values) if len(runs) > 1 else (None, None)
    return Line(name, slot, np.array(updates)[ends - 1], values.mean(axis=0), window, low, high)


def make_sections(runs: Sequence[Run]) -> list[Section]:
    """Sort what runs logged into sections of panels; runs of one name are seeds of one group.

    Raises:
        ValueError: If a run logs nothing that is shown, or the runs of a group have no update in common.
    """
    for run in runs:
        if not any(SHOWN.match(key) for key in run.metrics):
            logged = ", ".join(sorted(run.metrics)[:5]) or "nothing"
            raise ValueError(
                f"{run.file} in {run.folder} logs no reward, guard, length or KL, but {logged}: it is of no PPO run. "
                "Give the output folder of `fractal-rm ppo`."
            )
    groups = by_name(runs)
    sections = [
        Section("outcome", "Outcome reward", list(_outcomes(groups))),
        Section("truth", "Reward model against truth", list(_truths(groups))),
        Section("guards", "Signs of reward hacking", list(_guards(groups))),
        Section("length", "Length", list(_titled(groups, LENGTHS))),
        Section("kl", "Distance from the reference policy", list(_titled(groups, DIVERGENCES))),
    ]
    shown = {key for section in sections for panel in section.panels for key in panel.keys}
    for name, group in groups.items():
        if not any(common_updates(group, key) for key in shown):
            raise ValueError(
                f"The {len(group)} runs called {name!r} have logged nothing at the same update. Log them alike "
                "(`logging_steps`), or give each a name of its own."
            )
    return [section for section in sections if section.panels]


def early_ends(runs: Sequence[Run]) -> list[str]:
    """One sentence for each group whose lines end early, since one of its runs does."""
    sentences = []
    for name, group in by_name(runs).items():
        first, last = (choose(group, key=lambda run: run.last_update) for choose in (min, max))
        if first.last_update < last.last_update:
            sentences.append(
                f"The lines of {name} end at update {first.last_update:,}, where {first.folder} does; "
                f"{last.folder} goes on to {last.last_update:,}. To see all of it, give it a name of its own."
            )
    return sentences


def _panel(groups: Mapping[str, list[Run]], title: str, key: str) -> Iterator[Panel]:
    """The panel of a metric with a line a group, if any has one."""
    made = (make_line(name, slot, runs, key) for slot, (name, runs) in enumerate(groups.items()))
    lines = [line for line in made if line is not None]
    if lines:
        alarm = ALARM + key.removeprefix(GUARD)
        marks = {
            Mark(slot, update)
            for slot, runs in enumerate(groups.values())
            for run in runs
            for update in run.metrics.get(alarm, {})
        }
        yield Panel(title, (key,), lines, sorted(marks))


def _titled(groups: Mapping[str, list[Run]], titles: Sequence[tuple[str, ...]]) -> Iterator[Panel]:
    for title, *keys in titles:
        counts = {key: sum(key in run.metrics for runs in groups.values() for run in runs) for key in keys}
        yield from _panel(groups, title, max(keys, key=counts.__getitem__))


def _all_keys(groups: Mapping[str, list[Run]]) -> list[str]:
    return list(dict.fromkeys(key for runs in groups.values() for run in runs for key in run.metrics))


def _functions(keys: Sequence[str], prefix: str) -> list[str]:
    """Names of functions from keys like `prefix<name>/mean`."""
    return [key[len(prefix) : -len("/mean")] for key in keys if key.startswith(prefix) and key.endswith("/mean")]


def _outcomes(groups: Mapping[str, list[Run]]) -> Iterator[Panel]:
    keys = _all_keys(groups)
    dense = set(_functions(keys, "step_rewards/"))
    for prefix, where in (("eval_", "held out"), ("", "training")):
        names = [name for name in _functions(keys, f"{prefix}rewards/") if name not in dense]
        for name in names:
            yield from _panel(groups, f"{name}, {where}", f"{prefix}rewards/{name}/mean")
        runs = [run for group in groups.values() for run in group]
        if len(names) > 1 or (names and not all(_is_copy(run, prefix, names[0]) for run in runs)):
            yield from _panel(groups, f"Weighted sum, {where}", f"{prefix}reward")


def _is_copy(run: Run, prefix: str, name: str) -> bool:
    """Whether the total of a run is nothing but what one function gave."""
    total, one = (run.metrics.get(f"{prefix}{key}", {}) for key in ("reward", f"rewards/{name}/mean"))
    return all(math.isclose(total[at], one[at], rel_tol=1e-6, abs_tol=1e-9) for at in total.keys() & one.keys())


def _truths(groups: Mapping[str, list[Run]]) -> Iterator[Panel]:
    """For each group and each source of step rewards what it says, and the checked outcome of the same responses."""
    sources = _functions(_all_keys(groups), "step_rewards/")
    for slot, (name, runs) in enumerate(groups.items()):
        for source in sources:
            key = f"rewards/{source}/mean"
            score = make_line("score", slot, runs, key)
            if score is not None:
                title = name if len(sources) == 1 else f"{name}: {source}"
                truth = make_line("checked outcome", None, runs, OUTCOME)
                keys = (key,) if truth is None else (key, OUTCOME)
                yield Panel(title, keys, [score] if truth is None else [score, truth])


def _guards(groups: Mapping[str, list[Run]]) -> Iterator[Panel]:
    elsewhere = {OUTCOME, *(key for _, *keys in (*LENGTHS, *DIVERGENCES) for key in keys)}
    others = [key for key in _all_keys(groups) if key.startswith(GUARD) and key not in elsewhere and key not in SIGNALS]
    for key in (*SIGNALS, *(key for key in others if not key.startswith(ALARM))):
        yield from _panel(groups, SIGNALS.get(key, key.removeprefix(GUARD)), key)
