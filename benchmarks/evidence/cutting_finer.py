"""Question: does a completion earn more step reward if it is split, padded, repeated or reordered?

Rivals: every form of step rewards other than the default. A reward model scores sampled responses unchanged and
changed: every line split at a space, a line of filler after each line, the first line twice, all lines in reverse. In a
batch where one response is changed and the others are not, the sum of its step rewards is compared with the sum before
the change, for each form. Nothing is sampled or trained.

    fractal-rm sample --model policy --task arithmetic --split held_out --output samples.jsonl
    python -m benchmarks.evidence.cutting_finer --reward_model rm --samples samples.jsonl --dataset arithmetic

A row for each form goes to `benchmarks/results/cutting_finer.jsonl`.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.places import RESULTS
from fractal_rm.cli.options.arguments import read_rows
from fractal_rm.data.bag import StepScores
from fractal_rm.data.prompts import read_completion
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rewards import step_rewards
from fractal_rm.reward_model import StepRewardModel

BENCHMARK = "cutting_finer"
FILLER = ("Let us go on.", "We keep this in mind.", "This is the next part.")
# Rewards that differ by less are equal up to rounding.
ROUNDING = 1e-9

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "batch": {"center": "batch"},
    "group": {"center": "group"},
    "threshold": {"center": "threshold"},
    "mean": {"center": "batch", "length_neutral": "mean"},
    "cap": {"center": "batch", "length_neutral": "cap"},
    "raw": {"shaping": "raw"},
    "log_odds": {"shaping": "log_odds"},
    "delta": {"shaping": "delta"},
    "min_form": {"shaping": "min_form", "step_lam": 1.0},
    "first_mistake": {"shaping": "first_mistake"},
}


def in_halves(line: str) -> list[str]:
    """A line cut at the space nearest to its middle; one without a space stays whole.

    Example:
        >>> in_halves("3 apples and 4 pears"), in_halves("7")
        (['3 apples', 'and 4 pears'], ['7'])
    """
    spaces = [place for place, letter in enumerate(line.strip()) if letter == " "]
    if not spaces:
        return [line]
    middle = min(spaces, key=lambda place: abs(place - len(line.strip()) / 2))
    return [half for half in (line.strip()[:middle].rstrip(), line.strip()[middle:].lstrip()) if half]


def padded(steps: Sequence[str]) -> list[str]:
    """A line of filler after each step but the last, which may be the answer."""
    return [
        text
        for number, step in enumerate(steps)
        for text in ([step, FILLER[number % len(FILLER)]] if number < len(steps) - 1 else [step])
    ]


CUTS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "halves": lambda steps: [half for step in steps for half in in_halves(step)],
    "filler": padded,
    "repeated": lambda steps: [steps[0], *steps],
    "reversed": lambda steps: list(reversed(steps)),
}


def groups_of(rows: Sequence[Mapping[str, Any]], size: int, limit: int) -> list[Mapping[str, Any]]:
    """The first responses to each prompt, in whole groups of a size, up to a number of responses.

    Raises:
        ValueError: If no prompt has as many responses.
    """
    ordered = sorted(rows, key=lambda row: str(row["prompt"]))
    groups = [list(islice(group, size)) for _, group in groupby(ordered, key=lambda row: str(row["prompt"]))]
    whole = [group for group in groups if len(group) == size]
    if not whole:
        raise ValueError(f"No prompt has {size} responses. Give a smaller `--group_size`, or more samples.")
    return list(chain.from_iterable(whole[: max(limit // size, 1)]))


def score_cuts(
    reward_model: StepRewardModel, rows: Sequence[Mapping[str, Any]], group_size: int
) -> tuple[list[Mapping[str, Any]], dict[str, list[list[float]]]]:
    """Step scores of responses as they are and in each cut.

    Args:
        reward_model: Scores steps.
        rows: `prompt`, `completion` (or `response`) and perhaps `label`, in whole groups.
        group_size: A group of which some response cannot be scored whole, in some cut, is left out.

    Returns:
        The rows that were scored; scores of each response, by cut, `""` being the response as it is.
    """
    texts = [read_completion(row["completion"] if "completion" in row else row["response"]) for row in rows]
    steps = [[text[a:b] for a, b in reward_model.segmentation(text)] for text in texts]
    cuts = {"": list, **CUTS}
    given = [i for i, row in enumerate(steps) if row]
    found: dict[str, dict[int, StepScores]] = {}
    for name, cut in cuts.items():
        scored = reward_model.score([rows[i]["prompt"] for i in given], [cut(steps[i]) for i in given])
        found[name] = dict(zip(given, scored, strict=True))

    def is_whole(i: int) -> bool:
        return all(i in one and one[i].error is None and not one[i].truncated_steps for one in found.values())

    kept = [
        i
        for first in range(0, len(rows), group_size)
        if all(map(is_whole, range(first, first + group_size)))
        for i in range(first, first + group_size)
    ]
    return [rows[i] for i in kept], {name: [one[i].step_scores for i in kept] for name, one in found.items()}


def sums_in_batches(
    scores: Sequence[Sequence[float]], changed: Sequence[Sequence[float]], args: StepPPOConfig, batch: int, group: int
) -> Iterator[tuple[float, float]]:
    """The sum of each response's step rewards as it is, and with its own scores changed and those of others not.

    Args:
        scores: Step scores of each response.
        changed: Those of the same response cut anew.
        args: The form.
        batch: Responses in a rollout batch, whole groups.
        group: Responses to a prompt.
    """
    for first in range(0, len(scores), batch):
        rows = list(scores[first : first + batch])
        before = step_rewards(rows, args, group_size=group)
        for i in range(len(rows)):
            after = step_rewards([*rows[:i], changed[first + i], *rows[i + 1 :]], args, group_size=group)
            yield sum(before[i]), sum(after[i])


def measure(
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Sequence[Sequence[float]]],
    args: StepPPOConfig,
    batch: int,
    group: int,
) -> dict[str, float]:
    """For each cut the share of responses that earn more for it, and the mean change, that of wrong ones beside it."""
    found: dict[str, float] = {"responses": len(rows)}
    wrong = [i for i, row in enumerate(rows) if row.get("label") is not None and row["label"] < 0.5]
    for name in CUTS:
        sums = list(sums_in_batches(scores[""], scores[name], args, batch, group))
        changes = [after - before if abs(after - before) > ROUNDING else 0.0 for before, after in sums]
        found |= {
            f"{name}_rising": fmean(change > 0 for change in changes),
            f"{name}_change": fmean(changes),
            f"{name}_change_wrong": fmean(changes[i] for i in wrong) if wrong else float("nan"),
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Append a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model", required=True, help="Folder or hub id.")
    parser.add_argument("--samples", type=Path, required=True, help="What `fractal-rm sample` wrote.")
    parser.add_argument("--dataset", required=True, help="What the rows say they were measured on.")
    parser.add_argument("--limit", type=int, default=512, help="Most responses.")
    parser.add_argument("--group_size", type=int, default=8, help="Responses to a prompt.")
    parser.add_argument("--batch_size", type=int, default=64, help="Responses in a rollout batch.")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{BENCHMARK}.jsonl")
    arguments = parser.parse_args(argv)
    group, batch = arguments.group_size, arguments.batch_size
    if batch % group:
        parser.error(f"A batch of {batch} is not whole groups of {group}.")
    start, results = time.monotonic(), ResultsFile(arguments.results)
    rows = groups_of(read_rows(arguments.samples, None, None), group, arguments.limit)
    reward_model = StepRewardModel.from_pretrained(arguments.reward_model)
    kept, scores = score_cuts(reward_model, rows, group)
    for name, options in FORMS.items():
        # The device does not matter here: a CPU, so the script runs on any machine.
        args = StepPPOConfig("unused", use_cpu=True, bf16=False, report_to=[], **options)
        results.append(
            benchmark=BENCHMARK,
            arm=name,
            dataset=arguments.dataset,
            seed=None,
            split="samples",
            metrics=measure(kept, scores, args, batch, group) | {"left_out": len(rows) - len(kept)},
            config={
                **options,
                "shaping": args.shaping,
                "center": args.center,
                "batch": batch,
                "group": group,
                "scorer": reward_model.settings.scorer,
                "aggregation": reward_model.settings.aggregation,
            },
            seconds=time.monotonic() - start,
        )


if __name__ == "__main__":
    main()
