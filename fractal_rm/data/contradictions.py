"""Contradictions between rows: each kind with its count, as a sentence."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.prompts import Prompt

# A mean of labels may be rounded in the data.
_ROUNDED = 0.01


def prompt_key(prompt: Prompt | Any) -> str:
    """A text that is equal for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def contradictions(bags: Sequence[Bag], meaning: str, *, source: str) -> list[str]:
    """Sentences about rows that cannot all be true.

    Args:
        bags: The rows of one file.
        meaning: The meaning of labels: `"min"`, `"max"` or `"mean"` of the step labels.
        source: Name of the file.

    Example:
        >>> bags = [Bag("1+1?", "2.", ((0, 2),), label=label) for label in (0.0, 1.0)]
        >>> contradictions(bags, "min", source="rows.jsonl")
        ['rows.jsonl: 1 response has both labels (first: row 2).']
    """
    labels: dict[tuple[str, str], set[float | None]] = defaultdict(set)
    pairs: dict[str, list[Bag]] = defaultdict(list)
    texts: dict[str, set[tuple[str, str]]] = defaultdict(set)
    firsts: dict[str, str] = {}
    counts: Counter[str] = Counter()

    def found(kind: str, row: int, bag: Bag) -> None:
        counts[kind] += 1
        firsts.setdefault(kind, f"id {bag.id}" if bag.id is not None else f"row {row}")

    for row, bag in enumerate(bags, 1):
        key = (prompt_key(bag.prompt), bag.response)
        if bag.pair_id is not None:
            pairs[bag.pair_id].append(bag)
            if [one.response for one in pairs[bag.pair_id]] == [bag.response] * 2:
                found("preference", row, bag)
        else:
            if len(labels[key] | {bag.label}) == 2 and bag.label not in labels[key]:
                found("response", row, bag)
            labels[key].add(bag.label)
        if bag.id is not None:
            if len(texts[bag.id] | {key}) == 2 and key not in texts[bag.id]:
                found("id", row, bag)
            texts[bag.id].add(key)
        if _disagrees(bag, meaning):
            found("label", row, bag)
    told = {
        "response": ("response has both labels", "responses have several labels"),
        "label": (
            f"label is not the {meaning} of its step labels",
            f"labels are not the {meaning} of their step labels",
        ),
        "preference": ("preference has equal answers", "preferences have equal answers"),
        "id": ("id names different rows", "ids name different rows"),
    }
    return [
        f"{source}: {counts[kind]:,} {words[counts[kind] > 1]} (first: {firsts[kind]})."
        for kind, words in told.items()
        if counts[kind]
    ]


def _disagrees(bag: Bag, meaning: str) -> bool:
    """Whether a label contradicts its step labels, whatever the unknown ones are."""
    if bag.label is None or not bag.step_labels or bag.pair_id is not None:
        return False
    known = [label for label in bag.step_labels if label is not None]
    whole = len(known) == len(bag.step_labels)
    if meaning == "mean":
        return whole and abs(sum(known) / len(known) - bag.label) > _ROUNDED
    if not known:
        return False
    extreme = min(known) if meaning == "min" else max(known)
    if whole:
        return extreme != bag.label
    return bag.label > extreme if meaning == "min" else bag.label < extreme


def shared_prompts(first: Sequence[Any], second: Sequence[Any], *, names: tuple[str, str]) -> list[str]:
    """A sentence if two files share prompts.

    Args:
        first: Prompts for training, or for choosing a threshold.
        second: Prompts for evaluation.
        names: Names of the two files.

    Example:
        >>> shared_prompts(["1+1?"], ["1+1?", "2+2?"], names=("train.jsonl", "test.jsonl"))
        ['test.jsonl: 1 of 2 prompts are in train.jsonl too: measurements on them prove nothing.']
    """
    known = set(map(prompt_key, first))
    asked = set(map(prompt_key, second))
    both = len(known & asked)
    if not both:
        return []
    return [
        f"{names[1]}: {both:,} of {len(asked):,} prompts are in {names[0]} too: measurements on them prove nothing."
    ]
