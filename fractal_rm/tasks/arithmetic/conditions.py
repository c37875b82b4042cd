"""Conditions of the arithmetic task: kinds of problems, wrong beliefs of the base policy, noise of the labels."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fractal_rm.files import made_once
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY, make_tokenizer, train_on_texts
from fractal_rm.tasks.arithmetic.problems import (
    AnyProblem,
    Beliefs,
    Problem,
    exact_answer,
    make_branching_problems,
    make_distracted_problems,
    make_problems,
    read_problem,
)
from fractal_rm.tasks.task import Split, Task

ConditionName = Literal["easy", "medium", "hard", "distractors", "branching", "shift", "noise_10", "noise_20"]
Kind = Literal["chain", "distracted", "branching"]
MAKERS = {"chain": make_problems, "distracted": make_distracted_problems, "branching": make_branching_problems}
# " ->" is one token too: a fifth fewer tokens to sample.
PIECES = "[0-9]+:| ?[0-9]| ?->| ?[A-Za-z']+|[^A-Za-z0-9]"
# Seeds of problems: for the policy's texts, then for each seed's splits, far apart.
_TEXTS = 1_000_000
_SPLITS: dict[Split, int] = {"held_out": 0, "train": 1, "reward_model": 2, "validation": 3}
_SHIPPED_SPLITS: dict[Split, int] = {"held_out": 0, "reward_model": 1, "validation": 2, "train": 3}
SHORTEST = 2
LONGEST: dict[Kind, int] = {"chain": 16, "distracted": 7, "branching": 7}
TOKENS_PER_STEP = 7
BELIEF_LEARNING_RATE = 2e-3


class ShippedArithmetic(Task):
    """Chains of 3 to 6 changes, and the base policy that the package ships."""

    name = "arithmetic"
    max_new_tokens = 96
    outcome = staticmethod(exact_answer)  # type: ignore[assignment]

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """Problems of a split."""
        return make_problems(count, seed=10 * seed + _SHIPPED_SPLITS[split])

    def read(self, prompt: str) -> Problem:
        """The problem of a prompt."""
        return Problem.from_prompt(prompt)

    def base_policy(self, number: int, work: Path) -> Path:
        """The shipped policy; `base_policy.py` says how it was made."""
        return SHIPPED_POLICY


@dataclass(frozen=True)
class Condition(Task):
    """The arithmetic task with problems of a kind and length, and its own base policies.

    Args:
        name: Its name in the rows.
        kind: Kind of problems.
        min_steps: Fewest changes in a problem.
        max_steps: Most changes in a problem.
        wrong_share: Share of the facts that the base policy believes wrongly.
        updates: Policy updates of a run.
        responses: Labelled responses that a reward model learns from.
        reward_model_steps: Fewest and most changes in the problems of these responses; None: as the policy's.
        flipped: Share of wrong outcome labels, wherever they are used for learning.
        strength: How often the base policy acts on a wrong belief. Lower for longer problems: a wrong chain ends right
            by chance one time in ten, and truly right answers must not be rarer than that.
        policy_texts: Responses with wrong beliefs that a base policy is fine-tuned on, enough for it to settle.
        form_texts: Responses from which the model that all base policies start from learns the forms.
        hidden_size: Width of the policy.
        policies: Base policies, which differ in their beliefs and weights.
    """

    name: str
    kind: Kind
    min_steps: int
    max_steps: int
    wrong_share: float
    updates: int = 40
    responses: int = 1024
    reward_model_steps: tuple[int, int] | None = None
    flipped: float = 0.0
    strength: float = 0.6
    policy_texts: int = 8192
    form_texts: int = 98304
    hidden_size: int = 64
    policies: int = 2

    @property
    def policy_name(self) -> str:
        """Conditions with the same policy name share their base policies."""
        return f"{self.kind}-{self.max_steps}-{round(100 * self.wrong_share)}-{round(100 * self.strength)}"

    @property
    def max_new_tokens(self) -> int:
        """Enough for every response that follows the form."""
        return TOKENS_PER_STEP * (self.max_steps + (3 if self.kind == "branching" else 0)) + 8

    def small(self) -> "Condition":
        """The same condition at a tiny size for smoke tests; nothing is learned."""
        return replace(self, form_texts=384, policy_texts=64, hidden_size=16, responses=48)

    def problems(self, split: Split, count: int, seed: int) -> list[AnyProblem]:
        """Problems of a split."""
        lengths = (self.min_steps, self.max_steps)
        if split == "reward_model":
            lengths = self.reward_model_steps or lengths
        made = MAKERS[self.kind](count, seed=10 * seed + _SPLITS[split], min_steps=lengths[0], max_steps=lengths[1])
        return list(made)

    def read(self, prompt: str) -> AnyProblem:
        """The problem of a prompt."""
        return read_problem(prompt)

    def beliefs(self, number: int) -> Beliefs:
        """The beliefs of the base policy with a number."""
        return Beliefs(self.wrong_share, self.strength, seed=number)

    def texts(self, number: int, count: int) -> list[tuple[str, str]]:
        """Prompts and responses, with wrong beliefs, to fine-tune a base policy on, in batches of similar length."""
        rng, beliefs = random.Random(f"texts-{self.policy_name}-{number}"), self.beliefs(number)
        problems = MAKERS[self.kind](count, seed=_TEXTS + number, min_steps=SHORTEST, max_steps=self.max_steps)
        return in_batches([(p.prompt, beliefs.respond(p, rng)) for p in problems], rng)

    def base_policy(self, number: int, work: Path) -> Path:
        """A base policy: the model of the forms, fine-tuned on responses with wrong beliefs."""

        def make_forms(folder: Path) -> None:
            print("Training the model that all base policies start from. This takes minutes, once.", flush=True)
            texts = form_texts(self.form_texts)
            train_on_texts(folder, texts, form_tokenizer(), hidden_size=self.hidden_size, in_order=True)

        def make(folder: Path) -> None:
            start = made_once(work / "forms", make_forms)
            print(f"Training base policy {number} of {self.name}.", flush=True)
            train_on_texts(
                folder,
                self.texts(number, self.policy_texts),
                AutoTokenizer.from_pretrained(start, trust_remote_code=False),
                seed=number,
                in_order=True,
                start=start,
                learning_rate=BELIEF_LEARNING_RATE,
            )

        return made_once(work / f"{self.policy_name}-{number}", make)


def form_texts(count: int) -> list[tuple[str, str]]:
    """Prompts and right responses of all kinds, from which the forms are learned: short problems first.

    A small model learns to look up changes much sooner on short problems, but must see long ones to do it there too.
    """
    rng = random.Random("forms")
    lessons: list[list[AnyProblem]] = [
        list(make_problems(count // 4, seed=_TEXTS - 1, min_steps=SHORTEST, max_steps=4)),
        _mixed(count // 4, {"chain": 7, "distracted": 7, "branching": 7}, seed=_TEXTS - 2),
        _mixed(count // 2, LONGEST, seed=_TEXTS - 3),
    ]
    return [
        text
        for lesson in lessons
        for text in in_batches([(p.prompt, Beliefs(0.0).respond(p, rng)) for p in lesson], rng)
    ]


def _mixed(count: int, longest: Mapping[Kind, int], seed: int) -> list[AnyProblem]:
    """Problems of all kinds in equal numbers."""
    return [
        problem
        for kind, most in longest.items()
        for problem in MAKERS[kind](count // len(longest), seed=seed, min_steps=SHORTEST, max_steps=most)
    ]


def in_batches(texts: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """Texts in batches of 32 of similar length, the batches in random order."""
    texts = sorted(texts, key=lambda text: len(text[1]))
    batches = [texts[start : start + 32] for start in range(0, len(texts), 32)]
    rng.shuffle(batches)
    return [text for batch in batches for text in batch]


def form_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for all kinds of problems."""
    rng = random.Random("tokenizer")
    problems = [p for make in MAKERS.values() for p in make(300, seed=-1, min_steps=SHORTEST, max_steps=18)]
    return make_tokenizer(texts=[p.prompt + Beliefs(0.0).respond(p, rng) for p in problems], pieces=PIECES)


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("easy", "chain", 3, 6, 0.2, strength=0.8),
        Condition("medium", "chain", 6, 10, 0.3),
        Condition("hard", "chain", 10, 16, 0.4, reward_model_steps=(3, 8), strength=0.5),
        Condition("distractors", "distracted", 4, 7, 0.3),
        Condition("branching", "branching", 4, 7, 0.3),
        Condition("shift", "chain", 7, 10, 0.3, reward_model_steps=(3, 5)),
        Condition("noise_10", "chain", 3, 6, 0.2, strength=0.8, flipped=0.1),
        Condition("noise_20", "chain", 3, 6, 0.2, strength=0.8, flipped=0.2),
    )
}
