"""Training data that need not fit in memory: the first rows as bags, and later rows that become bags when drawn.

All checks look at the first rows. Every later row must parse and be shaped like a row that was checked; the rest
(steps, lists, length in tokens) is checked when it is drawn.
"""

import hashlib
import json
import math
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from fractal_rm.data.bag import Bag
from fractal_rm.data.prompts import check_same_kind
from fractal_rm.data.readers import naming, read_row
from fractal_rm.data.rows import JsonLines
from fractal_rm.data.shapes import Columns
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import (
    Records,
    check_reasoning,
    check_records,
    check_stated,
    content_fingerprint,
    items_of,
    to_bags,
    warn_of_classes,
)
from fractal_rm.reward_training.stages import plan
from fractal_rm.scorers.settings import FractalSettings

# Rows that are bags before training begins. Checking and tokenizing them takes seconds, and 20 kB of memory per row.
FIRST_ROWS = 20_000
# Number of later rows that are sampled to check properties of all rows.
_SAMPLE = 1000
# Numbers of this size or more (ids, times) count as alike.
_LARGE = 128


@dataclass(frozen=True)
class LaterRows:
    """The rows after the first ones.

    Args:
        rows: All rows.
        places: Indices of the later ones.
        read: Makes the bags of a row from the row and its number, counted from 1.
        source: Name of the data in messages.
        fingerprint: Fingerprint of their content.
        skips_bad: Whether a row that cannot be read gives no bags instead of an error.
        template: The chat template that reads the prompts.

    Raises:
        TypeError: When a row is drawn that has a value of the wrong type; names the row.
        ValueError: When a row is drawn that cannot be read for another reason; names the row.
    """

    rows: Sequence[Any]
    places: Sequence[int]
    read: Callable[[Any, int], list[Bag]]
    source: str
    fingerprint: str
    skips_bad: bool = False
    template: str = ""

    def __len__(self) -> int:
        return len(self.places)

    def sample(self) -> list[Bag]:
        """Bags of some rows, spread evenly."""
        return [bag for index in range(0, len(self), max(len(self) // _SAMPLE, 1)) for bag in self.bags(index)]

    def bags(self, index: int) -> list[Bag]:
        """The bag of a row, or the two of a preference; without gold step labels."""
        place = self.places[index]
        try:
            bags = self.read(self.rows[place], place + 1)
            check_reasoning(bags, self.template, source=f"{self.source}, row {place + 1}")
        except (TypeError, ValueError):
            if not self.skips_bad:
                raise
            return []
        return bags


@dataclass(frozen=True)
class TrainingRows:
    """Training data.

    Args:
        first: Bags of the first rows.
        later: The other rows, None if there are no others.
    """

    first: list[Bag]
    later: LaterRows | None = None

    def name(self, of_first: str) -> str:
        """Fingerprint of all rows, given the fingerprint of the first ones."""
        if self.later is None:
            return of_first
        return hashlib.sha256(f"{of_first} {self.later.fingerprint}".encode()).hexdigest()[: len(of_first)]


def reads_everything(args: FractalConfig) -> bool:
    """Whether a configuration needs all rows before its first step.

    Embeddings, targets of priors, gold and pseudo-labels are computed for a whole data set, the base rate of EasyLLP is
    its mean label, and grouping rows by length needs all lengths.
    """
    weights = [value for name, value in vars(args).items() if name.endswith("_prior_weight")]
    return bool(
        args.scorer == "embedding"
        or len(plan(args)) > 1
        or args.instance_weight
        or args.easyllp_weight
        or any(weights)
        or args.train_sampling_strategy == "group_by_length"
    )


def training_rows(
    records: Records | TrainingRows,
    args: FractalConfig,
    settings: FractalSettings,
    *,
    source: str,
    columns: Columns | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> TrainingRows:
    """The first rows as bags ([`to_bags`]), and the others to be drawn.

    Raises:
        TypeError: As in `to_bags`.
        ValueError: As in `to_bags`; or if a later row cannot be parsed, or is shaped like no row before it and cannot
            be read.
    """
    if isinstance(records, TrainingRows):
        return records
    check_records(records, source)
    options: Any = {"source": source, "columns": columns, "on_bad_row": on_bad_row}
    rows: Any = records if hasattr(records, "__getitem__") and hasattr(records, "__len__") else list(records)
    if reads_everything(args) or len(rows) <= FIRST_ROWS:
        return TrainingRows(to_bags(rows, settings, **options))
    if isinstance(rows[0], Bag):
        bags = to_bags(rows, settings, source=source)
        items = [[bags[row] for row in item] for item in items_of(bags)]
        first = [bag for item in items[:FIRST_ROWS] for bag in item]
        later = range(FIRST_ROWS, len(items))
        name = content_fingerprint([bag for item in items[FIRST_ROWS:] for bag in item])
        return TrainingRows(first, LaterRows(items, later, _without_gold, source, name))
    warn_of_classes(rows, columns, source)
    stream = iter(rows)
    head = list(islice(stream, FIRST_ROWS))
    first = to_bags(head, settings, **options)
    read = RowReader(settings, source, columns, first[0])
    digest = None if isinstance(rows, JsonLines) else hashlib.blake2b(digest_size=8)
    label = (columns or Columns()).label or "label"
    shapes, places, bad = {_shape(row, label) for row in head}, array("q"), []
    for place, row in enumerate(stream, FIRST_ROWS):
        if digest is not None:
            digest.update(json.dumps(row, default=repr).encode())
        shape = _shape(row, label)
        try:
            if shape not in shapes:
                read(row, place + 1)
                shapes.add(shape)
            places.append(place)
        except (TypeError, ValueError) as error:
            if on_bad_row == "stop":
                raise
            bad.append(str(error))
    if bad:
        warnings.warn(f"{len(bad)} later rows of {source} are left out. First: {bad[0]}", stacklevel=2)
    name = digest.hexdigest() if digest is not None else rows.fingerprint()
    skips = on_bad_row == "skip"
    return TrainingRows(first, LaterRows(rows, places, read, source, name, skips) if places else None)


@dataclass(frozen=True)
class RowReader:
    """Bags of a later row, with the checks of [`to_bags`] and without gold step labels.

    Args:
        settings: How responses are cut, and what labels mean.
        source: Name of the data in messages.
        columns: Names of columns.
        first: The first bag of the data: all prompts are texts, or all are chats.
    """

    settings: FractalSettings
    source: str
    columns: Columns | None
    first: Bag

    def __call__(self, row: Any, number: int) -> list[Bag]:
        settings = self.settings
        check_stated(row, settings, f"{self.source}, row {number}")
        bags = read_row(
            row,
            settings.segmentation,
            source=self.source,
            row=number,
            columns=self.columns,
            num_grades=settings.num_grades,
        )
        with naming(self.source, number):
            check_same_kind(bags[0].prompt, self.first.prompt)
        return _without_gold(bags, number)


def _without_gold(bags: list[Bag], number: int) -> list[Bag]:
    return [replace(bag, step_labels=None) if bag.step_labels is not None else bag for bag in bags]


def _shape(row: Any, label: str) -> Any:
    """A key that is equal for rows that pass the same checks: names and kinds of their values, and the exact label."""
    if not isinstance(row, Mapping):
        return type(row)
    return tuple((name, _kind(value, exact=name == label)) for name, value in row.items())


def _kind(value: Any, *, exact: bool = False) -> Any:
    if isinstance(value, str):
        return value if exact else value == "" or value.isspace()
    if value is None or isinstance(value, bool):
        return value is None, value
    if isinstance(value, int | float):
        small = -_LARGE < value < _LARGE  # not NaN either
        return type(value), (math.floor(value), math.ceil(value)) if small else repr(value) if exact else None
    if isinstance(value, Mapping):
        return tuple((name, _kind(one)) for name, one in value.items())
    return type(value), frozenset(map(_kind, value)) if isinstance(value, list) else None
