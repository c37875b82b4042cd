"""What a policy is worth: accuracy on held-out problems, by the checker, and how far it has gone from its start."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fractal_rm.study.settings import Setting
from fractal_rm.tasks.arithmetic.variants import AnyProblem
from fractal_rm.tasks.sampling import sample_responses

# Seed of the samples: every arm and evaluation draws with the same one.
SAMPLING_SEED = 7
BATCH = 256


def measure(
    model: Any, tokenizer: Any, setting: Setting, problems: Sequence[AnyProblem], *, greedy: bool = True
) -> tuple[dict[str, float | None], list[str]]:
    """Accuracy on held-out problems, and the sampled responses.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        setting: Gives the longest response.
        problems: Held-out problems.
        greedy: Also decode greedily, which doubles the work.
    """
    found: dict[str, float | None] = {"accuracy_greedy": None}
    texts: list[str] = []
    for name, is_greedy in (("accuracy_greedy", True), ("accuracy", False))[0 if greedy else 1 :]:
        texts = sample_responses(
            model,
            tokenizer,
            [problem.prompt for problem in problems],
            greedy=is_greedy,
            max_new_tokens=setting.max_new_tokens,
            batch_size=BATCH,
            seed=SAMPLING_SEED,
        )
        found[name] = mean([problem.check_answer(text) for problem, text in zip(problems, texts, strict=True)])
    steps = [good for problem, text in zip(problems, texts, strict=True) for good in problem.check_steps(text)]
    found["step_accuracy"] = mean(steps)
    found["response_tokens"] = mean([len(ids) for ids in tokenizer(texts)["input_ids"]])
    return found, texts


@torch.no_grad()
def response_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Log-probability (B,) of each response, the end of text included, in nats.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts.
        responses: Texts that follow them directly.
    """
    found = []
    was_training = model.training
    model.eval()
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        heads, tails = (tokenizer(list(texts[rows]))["input_ids"] for texts in (prompts, responses))
        ids = [torch.tensor([*head, *tail, tokenizer.eos_token_id]) for head, tail in zip(heads, tails, strict=True)]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        starts, ends = torch.tensor([len(head) for head in heads]), torch.tensor([len(row) for row in ids])
        places = torch.arange(batch.size(1))
        mask = (places >= starts[:, None]) & (places < ends[:, None])
        # Padding stands on the right, where a causal model does not see it.
        logits = model(input_ids=batch, attention_mask=(places < ends[:, None]).long()).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        found.append(-nll.masked_fill(~mask[:, 1:], 0.0).sum(dim=1))
    model.train(was_training)
    return torch.cat(found)


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / max(len(values), 1)
