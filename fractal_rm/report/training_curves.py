"""The contents of a training report: panels of curves in sections, from the logs of runs. Drawing is elsewhere.

A metric that a run did not log has no line, and a metric that no run logged has no panel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fractal_rm.evaluation.intervals import interval_of_mean
from fractal_rm.report.training_history import ALARM, Run

GUARD = "guards/"
# With more points, a line looks like noise at the width of a panel, so neighbouring values are averaged.
MOST_POINTS = 200
OUTCOME = "guards/outcome"  # on the scale of P(response is good): known where outcomes lie in [0, 1]

# Title, and the metrics that it may show: of several, the one that most runs logged.
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
UPDATES = (
    ("Explained variance of the value model", "value/explained_variance"),
    ("Entropy per token, in nats", "entropy"),
    ("Share of tokens with a clipped ratio", "clip_ratio/region_mean"),
)
# The metrics that are shown; other kinds of training log none of them.
SHOWN = re.compile(
    r"((eval_)?rewards/.+/mean|guards/(?!outcome$|alarm/).+|completions/(mean_length|clipped_ratio)|steps/per_response"
    r"|kl(_reward/.+)?|value/explained_variance|clip_ratio/region_mean)$"
)
# Explanations of the alarms, by signal.
ALARMS = {
    "score_outcome_correlation": "Scores agree less with checked outcomes than at first, and outcomes are no better: "
    "the reward model has begun to prefer wrong responses.",
    "score_outcome_gap": "Scores rose and checked outcomes did not keep up: the policy writes steps that the reward "
    "model accepts and the checker does not. Accuracy may still rise; the rest of the rise in scores is not real.",
    "steps_per_response": "Responses have twice or half as many steps as at first: more steps may earn, or cost, more.",
    "tokens_per_step": "Steps are twice or half as long as at first: the text is now cut differently.",
    "repeated_steps": "More steps repeat an earlier one: repeating a good step may pay.",
    "repeated_ngrams": "More of the text repeats itself: repeating may pay.",
    "generic_steps": "More steps also occur word for word in responses to other prompts: they may be filler.",
    "confidence_markers": "More steps say `clearly`, `therefore` and the like: confident words may score well.",
    "step_order": "Words have moved within responses: another order may score well.",
    "truncated": "More completions are cut at the length limit: they no longer end.",
    "empty": "More completions are empty: an empty completion may cost least.",
    "kl_per_token": "The policy is far from the reference.",
    "ceiling_over_outcome": "More steps score at the ceiling than checked outcomes account for: the reward model's "
    "scores are saturated.",
    "unscored": "The reward model cannot judge many completions: raise its `max_length`, or lower "
    "`max_completion_length`.",
    "steps_beyond_limit": "Many steps are beyond the reward model's `max_length`: raise it, or shorten completions.",
}
# Titles of the other guard signals; a signal without a title is shown under its own name.
SIGNALS = {
    "guards/score_outcome_correlation": "Correlation of score and outcome",
    "guards/score_outcome_gap": "Score minus outcome",
    "guards/repeated_steps": "Share of repeated steps",
    "guards/repeated_ngrams": "Share of repeated 4-grams",
    "guards/generic_steps": "Share of steps that also occur for other prompts",
    "guards/confidence_markers": "Share of steps with a confidence marker",
    "guards/step_order": "Agreement with the usual order of words",
    "guards/empty": "Share of empty responses",
    "guards/steps_at_ceiling": "Share of steps at the ceiling",
    "guards/ceiling_over_outcome": "Steps at the ceiling minus outcome",
    "guards/unscored": "Share of responses not judged",
    "guards/steps_beyond_limit": "Share of steps beyond the limit",
}


# Sections in which a curve of zeros gets no plot: most shares stay at 0.
ZERO_AS_TEXT = ("guards", "length", "kl", "updates")


class Line(NamedTuple):
    """A curve over updates: of one run, or the mean of several."""

    name: str
    slot: int | None  # selects colour and marker; None: the look of a checked outcome
    updates: np.ndarray  # updates with a value (P,), ascending
    mean: np.ndarray  # values (P,)
    window: int  # number of neighbouring logged values averaged into a point
    low: np.ndarray | None  # lower end of the mean's 95 % interval (P,); None for one run
    high: np.ndarray | None


class Mark(NamedTuple):
    """An alarm in a panel: the slot of its run's line, and the update."""

    slot: int
    update: int


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes."""

    title: str
    keys: tuple[str, ...]  # the names under which it is logged
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)  # alarms about what is shown
    meaning: str = ""  # what these alarms mean; empty without any

    @property
    def is_zero(self) -> bool:
        """Whether all logged values are 0 and there was no alarm: a line of text then replaces the plot."""
        return not self.marks and not any(line.mean.any() for line in self.lines)


@dataclass(frozen=True)
class Section:
    """Panels that belong together."""

    name: str  # for the templates
    title: str
    panels: list[Panel]  # to be drawn
    zero: list[str]  # titles of the panels whose curves are 0 throughout


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by their name, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def common_updates(runs: Sequence[Run], key: str) -> list[int]:
    """The updates at which all runs logged a metric."""
    return sorted(set.intersection(*(set(run.metrics.get(key, {})) for run in runs)))


def make_line(name: str, slot: int | None, runs: Sequence[Run], key: str) -> Line | None:
    """The curve of a metric for a group of runs (seeds); None if no update is common to all of them.

    It is the mean at the updates that all runs have, so that no run enters or leaves along the line, with the interval
    of the mean if there are several runs.
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
    """Sort what runs logged into sections of panels; runs with the same name are seeds of one group.

    Raises ValueError if a run logs nothing that is shown, or the runs of a group have no update in common.
    """
    for run in runs:
        if not any(SHOWN.match(key) for key in run.metrics):
            logged = ", ".join(sorted(run.metrics)[:5]) or "nothing"
            raise ValueError(
                f"{run.file} in {run.folder} logs no reward, guard, length or KL, but {logged}: it is not from a PPO "
                "run. Give the output folder of `fractal-rm ppo`."
            )
    groups = by_name(runs)
    made = {
        ("outcome", "Outcome reward"): list(_outcomes(groups)),
        ("truth", "Reward model against truth"): list(_truths(groups)),
        ("guards", "Signs of reward hacking"): list(_guards(groups)),
        ("length", "Length"): list(_titled(groups, LENGTHS)),
        ("kl", "Distance from the reference policy"): list(_titled(groups, DIVERGENCES)),
        ("updates", "Updates"): list(_titled(groups, UPDATES)),
    }
    shown = {key for panels in made.values() for panel in panels for key in panel.keys}
    for name, group in groups.items():
        if not any(common_updates(group, key) for key in shown):
            raise ValueError(
                f"The {len(group)} runs called {name!r} have logged nothing at the same update. Give them the same "
                "`logging_steps`, or each its own name."
            )
    return [
        Section(
            name,
            title,
            [panel for panel in panels if not (panel.is_zero and name in ZERO_AS_TEXT)],
            [panel.title for panel in panels if panel.is_zero and name in ZERO_AS_TEXT],
        )
        for (name, title), panels in made.items()
        if panels
    ]


def early_ends(runs: Sequence[Run]) -> list[str]:
    """One sentence for each group whose lines end early because one of its runs does."""
    sentences = []
    for name, group in by_name(runs).items():
        first, last = (choose(group, key=lambda run: run.last_update) for choose in (min, max))
        if first.last_update < last.last_update:
            sentences.append(
                f"The lines of {name} end at update {first.last_update:,}, where {first.folder} ends; {last.folder} "
                f"continues to {last.last_update:,}. Give it its own name to see all of it."
            )
    return sentences


def _panel(groups: Mapping[str, list[Run]], title: str, key: str) -> Iterator[Panel]:
    """The panel of a metric with one line per group; nothing if no group has one."""
    made = (make_line(name, slot, runs, key) for slot, (name, runs) in enumerate(groups.items()))
    lines = [line for line in made if line is not None]
    if lines:
        signal = key.removeprefix(GUARD)
        marks = {
            Mark(slot, update)
            for slot, runs in enumerate(groups.values())
            for run in runs
            for update in run.metrics.get(ALARM + signal, {})
        }
        yield Panel(title, (key,), lines, sorted(marks), ALARMS.get(signal, "") if marks else "")


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
    """Whether the total of a run equals what one function returned."""
    total, one = (run.metrics.get(f"{prefix}{key}", {}) for key in ("reward", f"rewards/{name}/mean"))
    return all(math.isclose(total[at], one[at], rel_tol=1e-6, abs_tol=1e-9) for at in total.keys() & one.keys())


def _truths(groups: Mapping[str, list[Run]]) -> Iterator[Panel]:
    """For each group and source of step rewards, its score and the checked outcome of the same responses."""
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
