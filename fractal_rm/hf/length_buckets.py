"""Forward passes with little padding: responses of like length together, no wider than the longest of them.

TRL pads a rollout to its longest prompt and its longest response, and every model then reads that padding. Responses of
math problems differ much in length, and so do those of a policy that sometimes does not end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

# Parts of a batch: with more of them, little padding is left to save.
_PARTS = 4
# Fewest padded tokens in a part: with fewer, starting a forward pass costs more than the padding.
_TOKENS = {"cpu": 1024}
_TOKENS_ELSEWHERE = 16_384
# Of what scorers read, the tensors with a column for each token.
_BY_TOKEN = ("input_ids", "attention_mask", "step_ids")
# Sorting and joining cost something too.
_LEAST_SAVING = 0.05


def may_be_sorted(model: Any, accelerator: Accelerator) -> bool:
    """Whether a model may read parts of like length, each with its own padding.

    Not one with learned positions, only with rotary ones, of which differences matter: padding on the left would move a
    text elsewhere in each part, and its log-probability would depend on its neighbours. And not in one of several
    processes: they wait for each other at every forward pass, and the number of parts depends on the texts.

    Args:
        model: A transformers model, wrapped or not.
        accelerator: The trainer's.
    """
    if accelerator.num_processes > 1:
        return False
    config: Any = accelerator.unwrap_model(model).config
    return bool(getattr(config.get_text_config(), "rope_parameters", None))


class Part(NamedTuple):
    """Rows of a batch, and the columns that hold all that these rows hold."""

    rows: Tensor
    columns: slice

    def of(self, *texts: Tensor) -> list[Tensor]:
        """The part of tensors (B, W)."""
        return [text[self.rows, self.columns] for text in texts]


class LengthBuckets:
    """A batch of padded texts in parts.

    Args:
        attention_mask: True or 1 where there is text (B, W): prompts padded on the left, completions on the right.
        prompt_width: Columns of prompts, P. A part holds the last of them and at least one of completions.
        most_rows: Most rows of a part; None: all.
        sort: Whether parts may be of like length. Otherwise they are the rows in their order, and all columns.

    Attributes:
        parts: The parts; together they hold every row once.

    Example:
        >>> mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])  # two columns of prompts
        >>> parts = LengthBuckets(mask, 2)
        >>> torch.equal(parts.join([piece for part in parts.parts for piece in part.of(mask)]), mask)
        True
    """

    def __init__(
        self, attention_mask: Tensor, prompt_width: int, *, most_rows: int | None = None, sort: bool = True
    ) -> None:
        count, self._width = attention_mask.shape
        self._prompt_width = prompt_width
        batches = -(-count // (most_rows or count))
        everything = slice(0, self._width)
        self.parts = [Part(rows, everything) for rows in torch.arange(count).split(most_rows or count)]
        self._order: Tensor | None = None
        least = _TOKENS.get(attention_mask.device.type, _TOKENS_ELSEWHERE)
        number = min(_PARTS * batches, attention_mask.numel() // least, count)
        if sort and number > batches:
            self._sort(attention_mask.bool().cpu(), number)

    def _sort(self, mask: Tensor, number: int) -> None:
        """Take parts of like length, if that saves anything."""
        order = mask.sum(dim=1).argsort(stable=True)
        parts = [Part(rows, self._columns(mask[rows])) for rows in order.tensor_split(number)]
        padded = sum(len(part.rows) * (part.columns.stop - part.columns.start) for part in parts)
        if padded < (1.0 - _LEAST_SAVING) * mask.numel():
            self.parts, self._order = parts, order

    def _columns(self, mask: Tensor) -> slice:
        """The columns from the first to the last in which any of these rows has text."""
        used = mask.any(dim=0).nonzero().squeeze(1).tolist() or [self._prompt_width]
        return slice(min(used[0], self._prompt_width - 1), max(used[-1], self._prompt_width) + 1)

    def completion_width(self, part: Part) -> int:
        """Columns of completions in a part."""
        return part.columns.stop - self._prompt_width

    def in_order(self, pieces: Sequence[Tensor]) -> Tensor:
        """What was computed of the rows of each part (b, ...), in the order of the batch (B, ...)."""
        rows = torch.cat(list(pieces))
        return rows if self._order is None else rows[self._order.argsort().to(rows.device)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """What was computed of the parts, for the whole batch: 0 in the columns that a part has not.

        Args:
            pieces: One per part, in their order: (b, w, ...) for all its columns, or for its last ones alone.

        Returns:
            The same of the batch, in the order of its rows: (B, W, ...), or its last columns.
        """
        if self._order is None:
            return self.in_order(pieces)
        wide = []
        for part, piece in zip(self.parts, pieces, strict=True):
            right = self._width - part.columns.stop
            whole = piece.size(1) == part.columns.stop - part.columns.start
            left = part.columns.start if whole else 0
            wide.append(functional.pad(piece, (0, 0) * (piece.dim() - 2) + (left, right)))
        return self.in_order(wide)


def bucketed_step_logits(scorer: Any, inputs: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """A scorer's step logits (B, S, ...), computed part by part.

    Args:
        scorer: The scorer, wrapped or not.
        inputs: What it takes of a batch; texts are padded on the right.
        accelerator: The trainer's.
    """
    attention_mask = inputs.get("attention_mask")
    if attention_mask is None:  # embeddings
        return scorer(**inputs)
    parts = LengthBuckets(attention_mask, 1, sort=accelerator.num_processes == 1)

    def of(part: Part) -> dict[str, Tensor]:
        return {name: (part.of(x)[0] if name in _BY_TOKEN else x[part.rows]) for name, x in inputs.items()}

    return parts.in_order([scorer(**of(part)) for part in parts.parts])


def bucketed_log_probs(log_probs: Any, parts: LengthBuckets, model: Any, *texts: Tensor, **options: Any) -> Any:
    """TRL's log-probabilities and entropies, computed part by part.

    Args:
        log_probs: TRL's method.
        parts: The parts of the batch.
        model: The model.
        texts: Token ids and attention mask, (B, W) each.
        options: Further arguments of the method.

    Returns:
        Log-probabilities (B, T), entropies (B, T) or None, and None for what only mixtures of experts have.
    """
    results = [log_probs(model, *part.of(*texts), parts.completion_width(part), **options) for part in parts.parts]
    logps, entropies, _ = zip(*results, strict=True)
    return parts.join(logps), None if entropies[0] is None else parts.join(entropies), None
