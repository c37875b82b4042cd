"""Records of a data set -> encoded bags that a trainer can batch."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fractal_rm.data.bag import Bag, truncate_bags
from fractal_rm.data.prompts import REASONING_KEYS, is_chat, yields_names
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import common_gap
from fractal_rm.data.shapes import Columns
from fractal_rm.objectives.aggregation import GOOD, meaning
from fractal_rm.scorers.inputs import BagInputs
from fractal_rm.scorers.settings import FractalSettings

logger = logging.getLogger(__name__)
Records = Sequence[Bag] | Iterable[Mapping[str, Any]]


def to_bags(
    records: Records,
    settings: FractalSettings,
    *,
    source: str,
    columns: Columns | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
) -> list[Bag]:
    """Bags from TRL's formats, this package's schema and what `read_row` knows; bags pass through.

    Raises:
        TypeError: As in `read_bags`.
        ValueError: If the rows state another aggregation than the settings, or a bag has no label or another number of
            grades; or as in `read_bags`.
    """
    check_records(records, source)
    warn_of_classes(records, columns, source)
    rows: list[Any] = list(records)
    if rows and all(isinstance(row, Bag) for row in rows):
        unlabelled = next((n for n, bag in enumerate(rows, 1) if bag.label is None), None)
        if unlabelled is not None:
            raise ValueError(f"{source}, row {unlabelled}: the response has no label. Label or drop it.")
        graded = next((n for n, bag in enumerate(rows, 1) if bag.num_grades != settings.num_grades), None)
        if graded is not None:
            raise ValueError(
                f"{source}, row {graded}: the bag has num_grades={rows[graded - 1].num_grades}, but the configuration "
                f"has num_grades={settings.num_grades}. Make them equal; or map grades to [0, 1], the lowest to 0 and "
                "the highest to 1, and leave `num_grades` out of both."
            )
        return rows
    for number, row in enumerate(rows, 1):
        check_stated(row, settings, f"{source}, row {number}")
    bags = read_bags(
        rows,
        settings.segmentation,
        source=source,
        columns=columns,
        num_grades=settings.num_grades,
        on_bad_row=on_bad_row,
    )
    if len(bags) == len(rows):
        _check_joints(rows, bags, settings, source)
    return bags


def check_records(records: Any, source: str) -> None:
    """Raise TypeError if data is given as something that yields names or characters, not rows."""
    if yields_names(records):
        raise TypeError(
            f"{source} is a {type(records).__name__}, not a list of rows. Give rows: one split of a DatasetDict, "
            "`frame.to_dict('records')` of a data frame, `read_jsonl(path)` of a file."
        )


def warn_of_classes(records: Any, columns: Columns | None, source: str) -> None:
    """Warn about labels that are named classes: only the names tell which class is good."""
    features = getattr(getattr(records, "dataset", records), "features", None) or {}
    names = getattr(features.get((columns or Columns()).label or "label"), "names", None) or []
    if any(name.lower() not in ("0", "1", "true", "false") for name in names):
        told = ", ".join(f"{number} is {name!r}" for number, name in enumerate(names))
        warnings.warn(
            f"{source}: the labels are classes ({told}), and 1 is read as good. If another one is, map the labels.",
            stacklevel=3,
        )


def check_stated(row: Any, settings: FractalSettings, where: str) -> None:
    """Raise ValueError if the aggregation that a row states, or that its derived label has, is not the settings'."""
    mine = meaning(settings.aggregation)
    stated = row.get("aggregation") if isinstance(row, Mapping) else None
    if stated in ("min", "max", "mean") and stated != mine:
        raise ValueError(
            f"{where}: the label is the {stated} of its steps, but `aggregation` is {settings.aggregation!r}. Set "
            f"`aggregation={stated}`, or use other data."
        )
    if mine != "min" and isinstance(row, Mapping) and "completions" in row and row.get("label") is None:
        raise ValueError(
            f"{where}: without `label` the response's label would be the minimum of its steps', but `aggregation` is "
            f"{settings.aggregation!r}. Add a column `label`."
        )


def _check_joints(rows: Sequence[Any], bags: Sequence[Bag], settings: FractalSettings, source: str) -> None:
    """Raise ValueError if listed steps would be joined by another separator than steps in the texts of other rows."""
    listed = [("steps" in row or "completions" in row) and not {"completion", "response"} & set(row) for row in rows]
    texts = [bag for bag, is_list in zip(bags, listed, strict=True) if not is_list]
    gap, joint = common_gap((bag.response, bag.step_spans) for bag in texts), settings.segmentation.joint
    if any(listed) and gap is not None and gap != joint:
        raise ValueError(
            f"{source}, row {listed.index(True) + 1}: the steps of this row would be joined by {joint!r}, but in "
            f"{len(texts)} rows that are texts steps are mostly {gap!r} apart. Add the text to this row as a column "
            "`response`, or train on rows of one kind."
        )


def check_reasoning(bags: Sequence[Bag], template: str | None, *, source: str) -> None:
    """Raise if messages of prompts have thoughts outside their content that the chat template does not read.

    Args:
        bags: Bags, in the order of their rows.
        template: The chat template; None: there is none.
        source: Name of the data in messages.

    Raises:
        ValueError: Names the row and the key.
    """
    for number, bag in enumerate(bags, 1):
        messages: Sequence[Mapping[str, Any]] = bag.prompt if is_chat(bag.prompt) else ()
        keys = [key for message in messages for key in REASONING_KEYS if str(message.get(key) or "").strip()]
        unread = next((key for key in keys if key not in (template or "")), None)
        if unread is not None:
            raise ValueError(
                f"{source}, response {number}: a message of the prompt has {unread!r}, which the chat template does "
                "not read. Write it into the content, or remove it."
            )


def say_unread_gold(bags: Sequence[Bag]) -> None:
    """Log that training does not read the gold step labels of its data."""
    count = sum(any(label is not None for label in bag.step_labels or ()) for bag in bags)
    if count:
        logger.warning(
            "%d of %d responses have gold step labels, which are not read. Set `instance_weight` above 0 to learn from "
            "them.",
            count,
            len(bags),
        )


def fingerprint(bags: Sequence[Bag]) -> str:
    """Fingerprint of the data: equal for equal bags in the same order."""
    digest = hashlib.sha256()
    for bag in bags:
        digest.update(json.dumps([bag.prompt, bag.response, bag.step_spans, bag.label]).encode())
    return digest.hexdigest()[:16]


def content_fingerprint(bags: Sequence[Bag]) -> str:
    """Fingerprint of all fields of the bags, including gold step labels and teacher scores."""
    digest = hashlib.blake2b(digest_size=8)
    for bag in bags:
        digest.update(repr(bag).encode())
    return digest.hexdigest()


def describe_labels(bags: Sequence[Bag], args: Any, *, later: int = 0) -> str:
    """The labels of the training data, for the model card; `args` says whether gold step labels were read.

    Later rows are not bags yet, so only their number is given.

    Example:
        >>> from types import SimpleNamespace
        >>> bags = [Bag("2+2?", "4", ((0, 1),), label=1.0), Bag("2+2?", "5", ((0, 1),), label=0.0)]
        >>> describe_labels(bags, SimpleNamespace(instance_weight=0.0))
        '2 responses in 2 steps with one label each, 1 of them good; no gold step labels'
    """
    steps = sum(len(bag.step_spans) for bag in bags)
    pairs = len({bag.pair_id for bag in bags} - {None})
    if pairs:
        told = f"{len(bags):,} responses in {steps:,} steps, {pairs:,} preferences"
    elif bags[0].num_grades is not None:
        told = f"{len(bags):,} responses in {steps:,} steps with a grade of 0 to {bags[0].num_grades - 1} each"
    else:
        good = sum(bag.label is not None and bag.label >= GOOD for bag in bags)
        told = f"{len(bags):,} responses in {steps:,} steps with one label each, {good:,} of them good"
    gold = f"gold step labels of {args.gold_fraction:.3g} of them" if args.instance_weight else "no gold step labels"
    return f"{told}; {gold}" + (f"; and {later:,} rows like them" if later else "")


def warn_of_joined_text(bags: Sequence[Bag], settings: FractalSettings) -> None:
    """Warn if text prompts run into their responses without any white space between them."""
    if settings.prompt_template == "{prompt}" and all(
        not is_chat(bag.prompt) and not bag.prompt[-1:].isspace() and not bag.response[:1].isspace()
        for bag in bags[:100]
    ):
        warnings.warn(
            "Prompts run into responses without a space or newline, and they are scored as written. If that is not how "
            "the policy sees them, set `prompt_template`, for example '{prompt}\\n'.",
            stacklevel=3,
        )


class Later(Protocol):
    """Rows that become bags when they are drawn."""

    def __len__(self) -> int: ...

    def bags(self, index: int, /) -> list[Bag]:
        """The bag of a row, or the two of a preference, the chosen response first; none if the row is left out."""
        ...


class BagDataset(torch.utils.data.Dataset):
    """Encoded bags with their labels; bags that do not fit are cut or dropped by the rule of `truncate_bags`.

    An item is a response, or the two of a preference, so that a batch has both or neither. Later rows are further
    items, encoded when they are drawn; a row that does not fit is replaced by the next one that does.

    Args:
        bags: Labelled bags.
        inputs: How text becomes the scorer's input.
        settings: Gives maximal length and aggregation.
        source: Name of the data in log and error messages.
        reads_gold: Whether gold step labels may tell which long responses keep their label when they are cut.
        later: Later rows, if any.

    Attributes:
        bags: The remaining bags.
        encoded: Their encodings.
        targets: Targets of their steps, by name: a tensor for each bag, (S,) or (S, S), NaN where unknown.
        items: The bags of each item.

    Raises:
        ValueError: If a preference comes with grades, or no bag is left.
    """

    def __init__(
        self,
        bags: Sequence[Bag],
        inputs: BagInputs,
        settings: FractalSettings,
        *,
        source: str,
        reads_gold: bool = True,
        later: Later | None = None,
    ) -> None:
        self._inputs, self._settings, self._source, self.later = inputs, settings, source, later
        self._check_grades(bags)
        encoded = inputs.encode(bags)
        fitting = [bag.kept_steps for bag in encoded]
        kept, count = truncate_bags(bags, fitting, settings.aggregation, reads_gold=reads_gold)
        if not kept:
            raise ValueError(
                f"{source}: no response fits into `max_length={settings.max_length}` tokens with its label. Raise it."
            )
        if count.truncated + count.dropped:
            logger.warning("%s: %s", source, count)
            encoded = inputs.encode(kept)
        self.bags, self.encoded, self.truncation = kept, encoded, count
        self.targets: dict[str, list[Tensor]] = {"step_labels": [gold_targets(bag) for bag in kept]}
        self.items = items_of(kept)

    def __len__(self) -> int:
        return len(self.items) + len(self.later or ())

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)  # ends an iteration
        if index >= len(self.items):
            return self._later_item(index - len(self.items))
        rows = self.items[index]
        targets = {name: [values[row] for row in rows] for name, values in self.targets.items()}
        return _item([self.bags[row] for row in rows], [self.encoded[row] for row in rows], targets)

    def _later_item(self, index: int) -> dict[str, Any]:
        assert self.later is not None
        for place in (*range(index, len(self.later)), *range(index)):
            bags = self.later.bags(place)
            if not bags:
                continue
            self._check_grades(bags)
            encoded = self._inputs.encode(bags)
            kept, count = truncate_bags(bags, [bag.kept_steps for bag in encoded], self._settings.aggregation)
            if count.truncated + count.dropped:
                logger.debug("%s: %s", self._source, count)
                encoded = self._inputs.encode(kept)
            if kept:
                return _item(kept, encoded, {"step_labels": [gold_targets(bag) for bag in kept]})
        raise ValueError(
            f"{self._source}: no later row fits into `max_length={self._settings.max_length}` tokens with its label. "
            "Raise it."
        )

    def _check_grades(self, bags: Sequence[Bag]) -> None:
        if self._settings.num_grades is not None and any(bag.pair_id for bag in bags):
            raise ValueError(
                f"{self._source}: preferences say nothing about grades. Leave `num_grades` out, or drop them."
            )


def _item(bags: Sequence[Bag], encoded: Sequence[Any], targets: dict[str, list[Tensor]]) -> dict[str, Any]:
    # `input_ids` is named for transformers' length-grouped sampler, which takes its length.
    return {
        "input_ids": range(max(bag.length for bag in encoded)),
        "encoded": encoded,
        "labels": [bag.label for bag in bags],
        "targets": targets,
    }


def items_of(bags: Sequence[Bag]) -> list[list[int]]:
    """Rows of the bags of each item: one, or the two of a preference, the chosen response first."""
    pairs: dict[str, list[int]] = {}
    for row, bag in enumerate(bags):
        pairs.setdefault(bag.pair_id or f"row {row}", []).append(row)
    return [sorted(rows, key=lambda row: -float(bags[row].label or 0.0)) for rows in pairs.values()]


def gold_targets(bag: Bag) -> Tensor:
    """Gold step labels (S,), NaN where unknown."""
    return known_or_nan(bag.step_labels, len(bag.step_spans))


def known_or_nan(values: Sequence[float | None] | None, count: int) -> Tensor:
    """Values of steps (S,), NaN for None."""
    return torch.tensor([torch.nan if value is None else value for value in values or [None] * count])


@dataclass(frozen=True)
class BagCollator:
    """Pads items of a [`BagDataset`] to tensors.

    The tensors are the scorer's inputs, `bag_labels` (B,), each target (B, S) or (B, S, S) with NaN at padding, and
    `chosen` (B,): 1 for the chosen response of a preference, 0 for the rejected one, -1 for other responses.
    """

    inputs: BagInputs

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.inputs.pad([bag for item in items for bag in item["encoded"]])
        batch["bag_labels"] = torch.tensor([label for item in items for label in item["labels"]], dtype=torch.float32)
        sides = [side for item in items for side in ([-1] if len(item["labels"]) == 1 else [1, 0])]
        batch["chosen"] = torch.tensor(sides)
        depth = batch["mask"].size(1)
        for name in items[0]["targets"]:
            rows = [values for item in items for values in item["targets"][name]]
            batch[name] = torch.full((len(rows), *(depth for _ in rows[0].shape)), torch.nan)
            for padded, values in zip(batch[name], rows, strict=True):
                padded[tuple(slice(size) for size in values.shape)] = values
        return batch
