"""Forward passes with little padding: a batch is split into length buckets, each as wide as its longest text.

TRL pads a rollout to its longest prompt and its longest response, and every model then reads that padding. Responses to
math problems differ much in length, more so if the policy sometimes fails to end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

# Maximum number of buckets per batch: more would save little more padding.
_PARTS = 4
# Fewest padded tokens in a bucket: below, starting a forward pass costs more than the padding.
_TOKENS = {"cpu": 1024}
_TOKENS_ELSEWHERE = 16_384
# Scorer inputs with one column per token.
_BY_TOKEN = ("input_ids", "attention_mask", "step_ids")
# Minimum share of padded tokens to save, because sorting and joining also cost time.
_LEAST_SAVING = 0.05


def may_be_sorted(model: Any, accelerator: Accelerator) -> bool:
    """Whether a transformers model, wrapped or not, may read length buckets, each with its own padding on the left.

    Only models with rotary positions may, where differences of positions matter: with learned positions, a text's
    log-probability would depend on the padding of its bucket. Several processes may not: they wait for each other at
    every forward pass, and the number of buckets depends on the texts.
    """
    if accelerator.num_processes > 1:
        return False
    config: Any = accelerator.unwrap_model(model).config
    return bool(getattr(config.get_text_config(), "rope_parameters", None))


class Part(NamedTuple):
    """A length bucket: rows of a batch, and the columns that hold all of their text."""

    rows: Tensor
    columns: slice

    def of(self, *texts: Tensor) -> list[Tensor]:
        """These rows and columns of tensors (B, W)."""
        return [text[self.rows, self.columns] for text in texts]


class LengthBuckets:
    """A batch of padded texts, split into length buckets.

    Args:
        attention_mask: True or 1 where there is text (B, W): prompts padded on the left, completions on the right.
        prompt_width: Columns of prompts, P. A bucket holds the last of them and at least one column of completions.
        most_rows: Most rows of a bucket; None: all.
        sort: Whether to sort rows by length. Otherwise buckets keep the order of the rows, and all columns.

    Attributes:
        parts: The buckets; together they hold every row once.

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
        if sort and number >= batches:
            self._sort(attention_mask.bool().cpu(), number)

    def _sort(self, mask: Tensor, number: int) -> None:
        """Sort the rows into buckets, if that saves enough."""
        order = mask.sum(dim=1).argsort(stable=True)
        parts = [Part(rows, self._columns(mask[rows])) for rows in order.tensor_split(number)]
        padded = sum(len(part.rows) * (part.columns.stop - part.columns.start) for part in parts)
        if padded < (1.0 - _LEAST_SAVING) * mask.numel():
            self.parts, self._order = parts, order

    def _columns(self, mask: Tensor) -> slice:
        """The columns from the first to the last with text in any of these rows."""
        used = mask.any(dim=0).nonzero().squeeze(1).tolist() or [self._prompt_width]
        return slice(min(used[0], self._prompt_width - 1), max(used[-1], self._prompt_width) + 1)

    def completion_width(self, part: Part) -> int:
        """Columns of completions in a bucket."""
        return part.columns.stop - self._prompt_width

    def in_order(self, pieces: Sequence[Tensor]) -> Tensor:
        """Results for the rows of each bucket (b, ...), in the order of the batch (B, ...)."""
        rows = torch.cat(list(pieces))
        return rows if self._order is None else rows[self._order.argsort().to(rows.device)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join the results of the buckets to results of the whole batch, in the order of its rows; 0 in columns outside
        a bucket.

        `pieces` has one tensor per bucket, (b, w, ...) for all of its columns or only for its last ones. The result is
        (B, W, ...), or its last columns.
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
    """A scorer's step logits (B, S, ...), computed bucket by bucket; texts are padded on the right."""
    attention_mask = inputs.get("attention_mask")
    if attention_mask is None:  # embeddings
        return scorer(**inputs)
    parts = LengthBuckets(attention_mask, 1, sort=accelerator.num_processes == 1)

    def of(part: Part) -> dict[str, Tensor]:
        return {name: (part.of(x)[0] if name in _BY_TOKEN else x[part.rows]) for name, x in inputs.items()}

    return parts.in_order([scorer(**of(part)) for part in parts.parts])


def bucketed_log_probs(log_probs: Any, parts: LengthBuckets, model: Any, *texts: Tensor, **options: Any) -> Any:
    """TRL's log-probabilities (B, T) and entropies (B, T) or None, from token ids and mask (B, W), bucket by bucket.

    The third result, TRL's mixture-of-experts loss, is None.
    """
    results = [log_probs(model, *part.of(*texts), parts.completion_width(part), **options) for part in parts.parts]
    logps, entropies, _ = zip(*results, strict=True)
    return parts.join(logps), None if entropies[0] is None else parts.join(entropies), None


def completion_log_probs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    width: int,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    learn_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, None]:
    """Log-probabilities (B, T) and entropies (B, T) of the last `width` tokens, with logits only of these.

    On a CPU, TRL's kernel computes logits of the prompts too, in float32 tiles, which costs time and memory if the
    vocabulary is large.

    Args:
        model: A causal language model.
        input_ids: Prompts and completions (B, P + T).
        attention_mask: 1 where there is text (B, P + T).
        width: Columns of completions, T.
        temperature: Logits are divided by it.
        compute_entropy: Whether to compute entropies in nats; otherwise they are None.
        learn_entropy: Whether entropies have a gradient.

    Returns:
        Log-probabilities in nats, entropies, and None, as TRL's method; 0 at padding.
    """
    # A tensor copies the states; an integer slices them, and then torch copies frozen bfloat16 weights for each row.
    # Counted from the end: prompt tuning puts tokens before the text.
    places = torch.arange(-width - 1, -1, device=input_ids.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=places).logits
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature  # each copy is large
    log_probs = scaled.log_softmax(-1)
    padding = attention_mask[:, -width:] == 0
    chosen = log_probs.gather(-1, input_ids[:, -width:, None])[..., 0].masked_fill(padding, 0.0)
    entropies = None
    if compute_entropy:
        with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):
            entropies = torch.stack([-(row.exp() * row).sum(-1) for row in log_probs]).masked_fill(padding, 0.0)
    return chosen, entropies, None
