"""Base class of tasks: problems by split, checkers of answers and of steps, base policies.

[`sample_responses`] samples a policy's responses with plain `generate`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# `train` has the prompts of the policy, `reward_model` the prompts of a reward model's labelled responses.
Split = Literal["train", "reward_model", "validation", "held_out"]


class Problem(Protocol):
    """A prompt, and checkers of its responses."""

    @property
    def prompt(self) -> str:
        """The text that the policy sees."""
        ...

    def check_answer(self, response: str) -> bool:
        """Whether the final answer is right: the outcome."""
        ...

    def check_steps(self, response: str) -> Sequence[bool] | None:
        """Whether each line that is not blank is right; None: the task cannot tell."""
        ...


class Task(ABC):
    """A task that policies are trained on.

    Attributes:
        name: Its name in the rows.
        max_new_tokens: Maximum number of tokens of a response.
        updates: Policy updates of a run if its budget does not set them.
        responses: Labelled responses that a reward model learns from.
        flipped: Share of wrong labels among the outcome labels that models learn from.
        policies: Number of base policies; seeds use them in turn.
    """

    name: str
    max_new_tokens: int
    updates: int = 40
    responses: int = 1024
    flipped: float = 0.0
    policies: int = 1

    @abstractmethod
    def problems(self, split: Split, count: int, seed: int) -> list[Any]:
        """Problems of a split ([`Problem`]); the same arguments give the same list.

        Args:
            split: Name of the split.
            count: Number of problems.
            seed: The seed of the run.
        """

    @abstractmethod
    def read(self, prompt: str) -> Problem:
        """The problem of a prompt."""

    @abstractmethod
    def base_policy(self, number: int, work: Path) -> Path:
        """Folder of a base policy, which is trained in the work folder if it does not exist.

        Args:
            number: Number of the policy, below `policies`.
            work: A folder for policies of all tasks.
        """

    def label(self, prompt: str, response: str) -> float:
        """The outcome label that models learn from: the checker's, but wrong for a fixed share of responses.

        The same response to the same prompt always gets the same label.
        """
        right = self.read(prompt).check_answer(response)
        if self.flipped:
            digest = hashlib.blake2b(f"{prompt}\0{response}".encode(), digest_size=4).digest()
            right ^= int.from_bytes(digest, "big") < self.flipped * 2**32
        return float(right)

    def outcome(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        """TRL reward function: the outcome labels."""
        return [self.label(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def unseen(problems: Sequence[Any], held_out: Collection[str]) -> list[Any]:
    """The problems whose prompts are not among the held-out ones, on which policies are measured."""
    return [problem for problem in problems if problem.prompt not in held_out]


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
    """One response per prompt, without special tokens.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Texts.
        greedy: Take the likeliest token instead of sampling at temperature 1.
        max_new_tokens: Where a response is cut off.
        batch_size: Prompts in a batch; prompts of similar length share a batch.
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
