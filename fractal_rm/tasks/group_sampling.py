"""Several responses to each prompt: the prompt is read once, and finished responses leave the batch.

`generate` reads the prompt once for each response, continues the full batch until its longest response ends, and draws
a random number for each entry of the vocabulary. On a CPU that dominates the time of a small model.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# Finished responses leave the batch once they are this share of it, because removing them copies the cache.
_LEAVE_AT = 0.125


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
        prompts: Texts.
        samples: Responses to each prompt.
        greedy: Take the likeliest token instead of sampling at temperature 1.
        max_new_tokens: Where a response is cut off.
        seed: Seed of the sampling; the global generator is not touched.

    Returns:
        For each prompt its responses.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = sample_group_ids(
        model,
        tokenizer,
        tokenizer(list(prompts))["input_ids"],  # type: ignore[arg-type]
        samples=samples,
        temperature=0.0 if greedy else 1.0,
        max_new_tokens=max_new_tokens,
        generator=generator,
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [list(texts[start : start + samples]) for start in range(0, len(texts), samples)]


@torch.no_grad()
def sample_group_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Token ids of responses to each prompt of one batch.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompt_ids: Token ids of the prompts; sort by length, because shorter prompts are padded.
        samples: Responses to each prompt.
        temperature: Logits are divided by it; 0 takes the likeliest token.
        max_new_tokens: Where a response is cut off.
        generator: Source of randomness on the model's device; None: the global one.

    Returns:
        Responses with their end token, in the order of the prompts: `samples` to each.
    """
    device = model.device
    batch = tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt", padding_side="left").to(device)  # type: ignore[arg-type]
    mask: Any = batch["attention_mask"]
    cache = DynamicCache(config=model.config)
    known = inspect.signature(model.forward).parameters  # transformers before 5.24 has the other name
    state: Any = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    was_training = model.training
    model.eval()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        # A tensor copies the states; an integer slices them, and then torch on a CPU copies frozen bfloat16 weights of
        # the head once for each row: 1.8 GB and seconds for 32 rows of a model with 135 M parameters.
        logits_to_keep=torch.tensor([mask.size(1) - 1], device=device),
        **state,
    ).logits[:, -1]
    cache.batch_repeat_interleave(samples)
    logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    position = mask.sum(1, keepdim=True)
    ends = torch.tensor(_end_tokens(model, tokenizer), device=device)
    rows = torch.arange(len(mask), device=device)  # the response of each row of the batch
    written = torch.full((len(mask), max_new_tokens), int(ends[0]), device=device)
    finished = torch.zeros(len(mask), dtype=torch.bool, device=device)
    for place in range(max_new_tokens):
        tokens = logits.argmax(-1) if temperature == 0 else _draw(logits.float() / temperature, generator)
        written[rows[~finished], place] = tokens[~finished]
        finished = finished | torch.isin(tokens, ends)
        if finished.all() or place + 1 == max_new_tokens:
            break
        if finished.float().mean() >= _LEAVE_AT:
            kept = (~finished).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, mask, position, tokens, finished = (x[kept] for x in (rows, mask, position, tokens, finished))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position,
            **state,
        ).logits[:, -1]
        position = position + 1
    model.train(was_training)
    return _until_end(written.tolist(), set(ends.tolist()))


def rollout_in_groups(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
    """`rollout_func` of TRL's `GRPOTrainer`, for policies that sample on a CPU.

    Args:
        prompts: Texts; each is repeated for its completions, one after the other.
        trainer: The trainer.

    Returns:
        `prompt_ids` and `completion_ids`; `logprobs` is None.

    Raises:
        ValueError: If prompts are chats, or the trainer uses sampling options other than a temperature.
    """
    args = trainer.args
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`rollout_in_groups` needs text prompts. Leave it out for chats.")
    if args.top_p != 1 or args.top_k or args.min_p or args.repetition_penalty != 1 or args.generation_kwargs:
        raise ValueError(
            "`rollout_in_groups` supports only a temperature. Leave it out, or leave out other sampling options."
        )
    samples = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    tokenizer = trainer.processing_class
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    completion_ids = sample_group_ids(
        trainer.accelerator.unwrap_model(trainer.model),
        tokenizer,
        prompt_ids[::samples],
        samples=samples,
        temperature=args.temperature,
        max_new_tokens=args.max_completion_length,
    )
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a token from the softmax of each row (B, V), by its cumulative distribution.

    `torch.multinomial` draws a random number for each entry of the vocabulary.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    chance = torch.rand(total.shape, generator=generator, device=logits.device) * total
    # `right`: a token of probability 0 is never drawn, even if the random number is exactly 0.
    return torch.searchsorted(cumulative, chance, right=True)[:, 0].clamp(max=logits.size(-1) - 1)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the tokenizer's, and others that the model names."""
    named: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    found = list(dict.fromkeys(int(i) for i in ids if isinstance(i, int)))
    if not found:
        raise ValueError("Neither the tokenizer nor the model names a token that ends a response. Set `eos_token`.")
    return found


def _until_end(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    return [row[: next((i for i, token in enumerate(row, 1) if token in ends), len(row))] for row in rows]
