"""Responses of a policy to prompts, by plain `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    greedy: bool = False,
    max_new_tokens: int = 96,
    batch_size: int = 512,
    seed: int | None = None,
) -> list[str]:
    """One response a prompt, without special tokens.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Texts.
        greedy: Take the likeliest token instead of sampling at temperature 1.
        max_new_tokens: Where a response is cut off.
        batch_size: Prompts in a batch; prompts of like length go together.
        seed: Seed of the sampling; the global generator is left as it was. None: draw from the global generator.

    Returns:
        Responses in the order of the prompts.
    """
    config = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
    )
    generator: Any = model
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = [""] * len(prompts)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left").to(
                model.device
            )
            batch.pop("token_type_ids", None)
            ids = generator.generate(**batch, generation_config=config)
            texts = tokenizer.batch_decode(ids[:, batch["input_ids"].size(1) :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                responses[i] = text
    model.train(was_training)
    return responses
