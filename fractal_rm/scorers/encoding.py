"""Prompt, response and step spans -> token ids that know which step each token belongs to.

The response is tokenized in pieces that are cut where steps end, the same way in training and in scoring. So no token
straddles the end of a step, a step's score never sees what follows it (causal models), and scoring a whole response
gives each step the score it would have had as the end of a shorter one, for every tokenizer. Nothing is inserted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fractal_rm.bags import Prompt
from fractal_rm.scorers.settings import Settings
from fractal_rm.segmentation import Span


@dataclass(frozen=True)
class EncodedBag:
    """Token ids of one prompt and response.

    Args:
        input_ids: Prompt and response tokens, special tokens included.
        step_ids: For each token the index of the step it belongs to, -1 for none (prompt, gaps, special tokens).
        step_ends: For each kept step the position of its last token.
        num_steps: Steps of the response before truncation.
    """

    input_ids: list[int]
    step_ids: list[int]
    step_ends: list[int]
    num_steps: int

    @property
    def kept_steps(self) -> int:
        """Whole steps that fit into `max_length`."""
        return len(self.step_ends)


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> str:
    """The text that precedes the response: the template filled in, or the chat template of the tokenizer.

    Raises:
        ValueError: If the prompt is a chat and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt_template.replace("{prompt}", prompt)
    if not tokenizer.chat_template:
        raise ValueError(
            "The prompts are chats, but the tokenizer has no chat template. Set `tokenizer.chat_template`, "
            "use a chat model's tokenizer, or give the prompts as text."
        )
    return tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special token ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def encode(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    spans: Sequence[Sequence[Span]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> list[EncodedBag]:
    """Tokenize prompts with responses, keeping track of steps.

    A step's tokens are those that hold one of its characters; the gap before it (a newline, a separator) belongs to no
    step. Text after the last step is only white space or a separator and is left out.

    Args:
        prompts: Texts or chats.
        responses: Texts, as written.
        spans: Character spans of the steps of each response.
        tokenizer: The reward model's tokenizer.
        settings: Gives prompt template and `max_length`.

    Returns:
        One [`EncodedBag`] for each row; `step_ends` is empty where not even the first step fits.
    """
    pieces: list[str] = []
    for prompt, response, steps in zip(prompts, responses, spans, strict=True):
        pieces.append(prompt_text(prompt, tokenizer, settings.prompt_template))
        starts = [0, *(end for _, end in steps)]
        pieces.extend(response[start:end] for start, (_, end) in zip(starts, steps, strict=False))
    tokens = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    offsets = tokens["offset_mapping"] if tokenizer.is_fast else [None] * len(pieces)
    prefix, suffix = special_affixes(tokenizer)

    encoded, position = [], 0
    for prompt, steps in zip(prompts, spans, strict=True):
        before, after = (prefix, suffix) if isinstance(prompt, str) else ([], [])
        room = None if settings.max_length is None else settings.max_length - len(after)
        ids = [*before, *tokens["input_ids"][position]]
        step_ids, step_ends = [-1] * len(ids), []
        previous_end = 0
        for index, (start, end) in enumerate(steps):
            piece = tokens["input_ids"][position + 1 + index]
            if room is not None and len(ids) + len(piece) > room:
                break
            gap, previous_end = start - previous_end, end
            ends = offsets[position + 1 + index]
            ids.extend(piece)
            step_ids.extend([index if ends is None or ends[i][1] > gap else -1 for i in range(len(piece))])
            step_ends.append(len(ids) - 1)
        position += 1 + len(steps)
        encoded.append(EncodedBag([*ids, *after], step_ids + [-1] * len(after), step_ends, len(steps)))
    return encoded


def pad_encoded(bags: Sequence[EncodedBag], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded tensors for a scorer.

    Returns:
        `input_ids` and `attention_mask` (B, T), `step_ids` (B, T) with -1 outside steps, `step_ends` (B, S) with 0 at
        padding, `mask` (B, S), True where a step is real.
    """
    width = max(len(bag.input_ids) for bag in bags)
    depth = max(bag.kept_steps for bag in bags)
    batch = {
        "input_ids": torch.full((len(bags), width), pad_token_id),
        "attention_mask": torch.zeros(len(bags), width, dtype=torch.long),
        "step_ids": torch.full((len(bags), width), -1),
        "step_ends": torch.zeros(len(bags), depth, dtype=torch.long),
        "mask": torch.zeros(len(bags), depth, dtype=torch.bool),
    }
    for row, bag in enumerate(bags):
        length, steps = len(bag.input_ids), bag.kept_steps
        batch["input_ids"][row, :length] = torch.tensor(bag.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["step_ids"][row, :length] = torch.tensor(bag.step_ids)
        batch["step_ends"][row, :steps] = torch.tensor(bag.step_ends)
        batch["mask"][row, :steps] = True
    return batch
