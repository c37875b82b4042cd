"""Several responses to each prompt: the prompt is read once, and finished responses leave the batch.

`generate` reads the prompt once for each response, and goes on with the whole batch until its longest response ends.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# Finished responses leave the batch when they are this share of it: leaving copies the cache.
_LEAVE_AT = 0.125


@torch.no_grad()
def sample_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int,
    greedy: bool = False,
    max_new_tokens: int = 96,
    seed: int = 0,
) -> list[list[str]]:
    """Responses to each prompt of one batch, without special tokens.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Texts; of like length, or the shorter ones are padded in vain.
        samples: Responses to each prompt.
        greedy: Take the likeliest token instead of sampling at temperature 1.
        max_new_tokens: Where a response is cut off.
        seed: Seed of the sampling; the global generator is not touched.

    Returns:
        For each prompt its responses.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(device)
    mask: Any = batch["attention_mask"]
    forward: Any = model
    cache = DynamicCache(config=model.config)
    was_training = model.training
    model.eval()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = forward(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(samples)
    logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    position = mask.sum(1, keepdim=True)
    ends = torch.tensor(_end_tokens(model, tokenizer), device=device)
    rows = torch.arange(len(mask), device=device)  # the response of each row of the batch
    written = torch.full((len(mask), max_new_tokens), int(ends[0]), device=device)
    finished = torch.zeros(len(mask), dtype=torch.bool, device=device)
    for place in range(max_new_tokens):
        if greedy:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
        written[rows[~finished], place] = tokens[~finished]
        finished = finished | torch.isin(tokens, ends)
        if finished.all() or place + 1 == max_new_tokens:
            break
        if finished.float().mean() >= _LEAVE_AT:
            kept = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, mask, position, tokens, finished = (x[kept] for x in (rows, mask, position, tokens, finished))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = forward(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        position = position + 1
    model.train(was_training)
    texts = tokenizer.batch_decode(_until_end(written.tolist(), set(ends.tolist())), skip_special_tokens=True)
    return [list(texts[start : start + samples]) for start in range(0, len(texts), samples)]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the tokenizer's, and others that the model names."""
    named: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    found = list(dict.fromkeys(int(i) for i in ids if isinstance(i, int)))
    if not found:
        raise ValueError("Neither the tokenizer nor the model names a token that ends a response. Set `eos_token`.")
    return found


def _until_end(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
