"""Dense step rewards in slime: `--custom-advantage-function-path slime_steps.step_advantages`."""

import functools
from typing import Any

import torch
from step_rewards import from_environment, group_advantages, placed_scores
from transformers import AutoTokenizer

from fractal_rm.data.prompts import RenderedPrompt


@functools.cache
def _tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def step_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Write `advantages` and `returns`: each step against the steps of the same prompt's responses.

    Equal prompts form a group. If the responses to a prompt are on several ranks, each rank compares its own.

    Args:
        args: slime's; `hf_checkpoint` names the policy's tokenizer.
        rollout_data: `tokens` (prompt and response of each sample), `response_lengths` and `loss_masks`.

    Raises:
        ValueError: If `loss_masks` say that others wrote a part of a response, or nothing can be scored.
    """
    tokenizer = _tokenizer(args.hf_checkpoint)
    lengths = list(map(int, rollout_data["response_lengths"]))
    texts = [torch.as_tensor(row).tolist() for row in rollout_data["tokens"]]
    split = [(row[: len(row) - length], row[len(row) - length :]) for row, length in zip(texts, lengths, strict=True)]
    prompts = [RenderedPrompt(tokenizer.decode(prompt)) for prompt, _ in split]
    masks = [torch.as_tensor(mask).bool().cpu() for mask in rollout_data["loss_masks"]]
    written = [mask.tolist() for mask in masks]
    placed = placed_scores(prompts, [response for _, response in split], tokenizer, from_environment(), written)
    padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    advantages = group_advantages(placed, padded, [tuple(prompt) for prompt, _ in split])
    rows = [
        row[:length].to(like.device) for row, length, like in zip(advantages, lengths, _like(rollout_data), strict=True)
    ]
    rollout_data["advantages"], rollout_data["returns"] = rows, [row.clone() for row in rows]


def _like(rollout_data: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors on the device where slime expects advantages."""
    return [torch.as_tensor(mask) for mask in rollout_data.get("log_probs") or rollout_data["loss_masks"]]
