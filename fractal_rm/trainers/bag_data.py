"""Records of a data set -> encoded bags that a trainer can batch."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.bags import Bag, truncate_bags
from fractal_rm.readers import read_bags
from fractal_rm.scorers.encoding import EncodedBag, encode, pad_encoded
from fractal_rm.scorers.settings import Settings

logger = logging.getLogger(__name__)
Records = Sequence[Bag] | Iterable[Mapping[str, Any]]


def to_bags(records: Records, settings: Settings, *, source: str) -> list[Bag]:
    """Bags from TRL's formats or this package's schema; bags pass through.

    Args:
        records: Rows or bags.
        settings: Gives segmentation and aggregation.
        source: Name of the data in messages.

    Raises:
        TypeError: For a reason of `read_bags`.
        ValueError: If the rows state another aggregation than the settings, a bag has a grade instead of a
            probability, or for a reason of `read_bags`.
    """
    rows: list[Any] = list(records)
    if rows and all(isinstance(row, Bag) for row in rows):
        graded = next((number for number, bag in enumerate(rows, 1) if bag.num_grades is not None), None)
        if graded is not None:
            raise ValueError(
                f"{source}, row {graded}: the label is a grade (`num_grades`), but a probability is learned here. "
                "Divide grades by the highest one and leave `num_grades` out."
            )
        return rows
    mine = "min" if settings.aggregation == "product" else settings.aggregation
    for number, row in enumerate(rows, 1):
        stated = row.get("aggregation") if isinstance(row, Mapping) else None
        if stated in ("min", "max", "mean") and stated != mine:
            raise ValueError(
                f"{source}, row {number}: the label is the {stated} of its steps, but `aggregation` is "
                f"{settings.aggregation!r}. Set `aggregation={stated}`, or use other data."
            )
    return read_bags(rows, settings.segmentation, source=source)


def fingerprint(bags: Sequence[Bag]) -> str:
    """A short name for the data: equal for equal bags in equal order."""
    digest = hashlib.sha256()
    for bag in bags:
        digest.update(json.dumps([bag.prompt, bag.response, bag.step_spans, bag.label]).encode())
    return digest.hexdigest()[:16]


def joins_without_a_gap(bags: Sequence[Bag], settings: Settings) -> bool:
    """Whether text prompts run into their responses without any white space between them."""
    if settings.prompt_template != "{prompt}":
        return False
    return all(
        isinstance(bag.prompt, str) and not bag.prompt[-1:].isspace() and not bag.response[:1].isspace()
        for bag in bags[:100]
    )


class BagDataset(torch.utils.data.Dataset):
    """Encoded bags with their labels; bags that do not fit are cut or dropped by the rule of `truncate_bags`.

    Args:
        bags: Labelled bags.
        tokenizer: The reward model's tokenizer.
        settings: Gives prompt template, maximal length and aggregation.
        source: Name of the data in log and error messages.

    Raises:
        ValueError: If a bag has no label, or no bag is left.
    """

    def __init__(
        self, bags: Sequence[Bag], tokenizer: PreTrainedTokenizerBase, settings: Settings, *, source: str
    ) -> None:
        unlabelled = next((number for number, bag in enumerate(bags, 1) if bag.label is None), None)
        if unlabelled is not None:
            raise ValueError(f"{source}, row {unlabelled}: the response has no label. Label or drop it.")
        encoded = self._encode(bags, tokenizer, settings)
        kept, count = truncate_bags(bags, [bag.kept_steps for bag in encoded], settings.aggregation)
        if not kept:
            raise ValueError(
                f"{source}: no response fits into `max_length={settings.max_length}` tokens with its label. Raise it."
            )
        if count.truncated + count.dropped:
            logger.warning("%s: %s", source, count)
            encoded = self._encode(kept, tokenizer, settings)
        self.bags, self.encoded, self.truncation = kept, encoded, count

    @staticmethod
    def _encode(bags: Sequence[Bag], tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[EncodedBag]:
        return encode(
            [bag.prompt for bag in bags],
            [bag.response for bag in bags],
            [bag.step_spans for bag in bags],
            tokenizer,
            settings,
        )

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # `input_ids` is named for transformers' length-grouped sampler.
        return {"input_ids": self.encoded[index].input_ids, "encoded": self.encoded[index], "bag": self.bags[index]}


@dataclass(frozen=True)
class BagCollator:
    """Pads rows of a [`BagDataset`] to the tensors of a scorer, with `bag_labels` (B,) and `step_labels` (B, S)."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad_encoded([row["encoded"] for row in rows], self.pad_token_id)
        batch["bag_labels"] = torch.tensor([row["bag"].label for row in rows], dtype=torch.float32)
        batch["step_labels"] = torch.full(batch["mask"].shape, torch.nan)
        for i, row in enumerate(rows):
            gold = row["bag"].step_labels or ()
            known = [torch.nan if label is None else label for label in gold]
            batch["step_labels"][i, : len(known)] = torch.tensor(known)
        return batch
