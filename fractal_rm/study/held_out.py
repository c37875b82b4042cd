"""What a policy is worth on held-out problems, its score by a reward model, and its distance from its start."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fractal_rm.files import made_once, write_atomic
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import Assets
from fractal_rm.study.rivals import WholeResponseReward
from fractal_rm.tasks.group_sampling import sample_groups
from fractal_rm.tasks.task import Problem, Task, sample_responses

# Seed of the samples: every arm and evaluation draws with the same one.
SAMPLING_SEED = 7
BATCH = 256
# Logits that are in memory at a time: with a large vocabulary fewer responses make a batch.
_MOST_LOGITS = 2**28

Metrics = dict[str, Any]


def measure(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], *, greedy: bool = True, draws: int = 1
) -> tuple[Metrics, list[str]]:
    """Accuracy on held-out problems, of answers and of steps, and the sampled responses.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        task: Gives the longest response.
        problems: Held-out problems.
        greedy: Also decode greedily, which doubles the work; otherwise these metrics are None.
        draws: Sampled responses to each problem. With several, `solved` says how many of each problem's `draws` are
            right, and there is no greedy decoding.

    Returns:
        Metrics, those of greedy decoding with `_greedy` behind their names; the first sampled response to each problem.
    """
    found: Metrics = {"accuracy_greedy": None, "step_accuracy_greedy": None}
    prompts = [problem.prompt for problem in problems]
    drawn: list[list[str]] = []
    for suffix in ("_greedy", "") if greedy and draws == 1 else ("",):
        if draws == 1:
            longest, seed = task.max_new_tokens, SAMPLING_SEED
            texts = sample_responses(
                model, tokenizer, prompts, greedy=suffix == "_greedy", max_new_tokens=longest, seed=seed
            )
            drawn = [[text] for text in texts]
        else:
            drawn = _draw(model, tokenizer, prompts, draws, task.max_new_tokens)
        right = [[p.check_answer(text) for text in texts] for p, texts in zip(problems, drawn, strict=True)]
        found[f"accuracy{suffix}"] = mean([mean(of_problem) for of_problem in right])
        if draws > 1:
            found |= {"draws": draws, "solved": [sum(of_problem) for of_problem in right]}
        checked = [p.check_steps(text) for p, texts in zip(problems, drawn, strict=True) for text in texts]
        steps = [good for flags in checked if flags is not None for good in flags]
        found[f"step_accuracy{suffix}"] = mean(steps) if None not in checked else None
    flat = [text for texts in drawn for text in texts]
    found["response_tokens"] = mean([len(ids) for ids in tokenizer(flat)["input_ids"]])
    return found, [texts[0] for texts in drawn]


def _draw(model: Any, tokenizer: Any, prompts: Sequence[str], draws: int, longest: int) -> list[list[str]]:
    """Some responses to each prompt, prompts of like length together."""
    drawn: list[list[str]] = [[] for _ in prompts]
    order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, BATCH // (2 * draws))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        texts = sample_groups(
            model,
            tokenizer,
            [prompts[i] for i in rows],
            samples=draws,
            max_new_tokens=longest,
            seed=SAMPLING_SEED + start,
        )
        for i, found in zip(rows, texts, strict=True):
            drawn[i] = found
    return drawn


def measure_start(assets: Assets, count: int, draws: int = 1) -> tuple[Metrics, list[str]]:
    """What the base policy is worth on held-out problems, and its sampled responses: the start of every arm.

    Args:
        assets: Keep them.
        count: How many problems.
        draws: Sampled responses to each.
    """

    def make(folder: Path) -> None:
        problems = assets.task.problems("held_out", count, assets.seed)
        found, texts = measure(*assets.load_policy(), assets.task, problems, draws=draws)
        write_atomic(folder / "start.json", json.dumps({"metrics": found, "texts": texts}))

    folder = made_once(assets.own / (f"start-{count}" if draws == 1 else f"start-{count}-{draws}"), make)
    saved = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    return saved["metrics"], saved["texts"]


def mean_score(judge: StepRewardModel | None, prompts: list[str], texts: list[str]) -> float | None:
    """Mean response score by what rewards the policy; None without it."""
    if judge is None:
        return None
    if judge.settings.segmentation.method == "given":
        return mean(WholeResponseReward(judge)(prompts, texts))
    scored = judge.score(prompts, texts, progress=False)
    return mean([result.score for result in scored if result.error is None])


@torch.no_grad()
def response_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Log-probability (B,) of each response that follows its prompt directly, the end of text included, in nats."""
    found = []
    was_training = model.training
    model.eval()
    longest = max(len(a) + len(b) for a, b in zip(prompts, responses, strict=True))  # characters: no fewer than tokens
    size = max(1, min(BATCH, _MOST_LOGITS // (longest * len(tokenizer))))
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
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
