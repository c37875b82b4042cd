"""The tasks of the comparison: which problems, how wrong the base policy is, how much is sampled and trained."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from fractal_rm.tasks.arithmetic.base_policy import make_tokenizer
from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems
from fractal_rm.tasks.arithmetic.variants import (
    AnyProblem,
    make_branching_problems,
    make_distracted_problems,
    read_problem,
    respond,
)

Kind = Literal["chain", "distracted", "branching"]
MAKERS = {"chain": make_problems, "distracted": make_distracted_problems, "branching": make_branching_problems}
# " ->" is one token too: a fifth fewer tokens to sample.
PIECES = "[0-9]+:| ?[0-9]| ?->| ?[A-Za-z']+|[^A-Za-z0-9]"
# Seeds of problems: of the policy's texts, then of each seed's own streams, far from one another.
_TEXTS, _STREAMS = 1_000_000, {"held_out": 0, "train": 1, "reward_model": 2}
SHORTEST = 2
LONGEST: dict[Kind, int] = {"chain": 16, "distracted": 7, "branching": 7}
TOKENS_PER_STEP = 7


@dataclass(frozen=True)
class Setting:
    """One task of the comparison.

    Args:
        name: Its name in the rows.
        kind: Which problems.
        min_steps: Fewest changes in a problem.
        max_steps: Most changes in a problem.
        wrong_share: Share of the facts that the base policy believes wrongly.
        updates: Policy updates of a run.
        responses: Labelled responses that a reward model learns from.
        reward_model_steps: Fewest and most changes in the problems of those responses; None: as the policy's.
        flipped: Share of outcome labels that are wrong, wherever somebody learns from one.
        strength: How often the base policy acts on a wrong belief. Less where problems are longer: a wrong result is
            right by luck once in ten times, and honest right answers must not be rarer than that.
        policy_texts: Responses with wrong beliefs that a base policy is fine-tuned on, enough for it to settle.
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

    @property
    def policy_name(self) -> str:
        """Settings of one name share their base policies."""
        return f"{self.kind}-{self.max_steps}-{round(100 * self.wrong_share)}-{round(100 * self.strength)}"

    @property
    def max_new_tokens(self) -> int:
        """Enough for every response that follows the form."""
        return TOKENS_PER_STEP * (self.max_steps + (3 if self.kind == "branching" else 0)) + 8

    def problems(self, stream: str, count: int, seed: int) -> list[AnyProblem]:
        """Problems of one of a seed's streams.

        Args:
            stream: `"held_out"`, `"train"` (the policy's prompts) or `"reward_model"`.
            count: How many.
            seed: The seed of the run.
        """
        lengths = (self.min_steps, self.max_steps)
        if stream == "reward_model":
            lengths = self.reward_model_steps or lengths
        made = MAKERS[self.kind](count, seed=10 * seed + _STREAMS[stream], min_steps=lengths[0], max_steps=lengths[1])
        return list(made)

    def label(self, prompt: str, response: str) -> float:
        """The outcome label that learners see: the checker's, wrong for a fixed share of responses.

        The same response to the same prompt always gets the same label.
        """
        right = read_problem(prompt).check_answer(response)
        if self.flipped:
            digest = hashlib.blake2b(f"{prompt}\0{response}".encode(), digest_size=4).digest()
            right ^= int.from_bytes(digest, "big") < self.flipped * 2**32
        return float(right)

    def outcome(self, prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        """TRL reward function: the outcome labels."""
        return [self.label(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def beliefs(self, number: int) -> Beliefs:
        """What the base policy of a number holds true."""
        return Beliefs(self.wrong_share, self.strength, seed=number)

    def texts(self, number: int, count: int) -> list[tuple[str, str]]:
        """Prompts and responses, with wrong beliefs, that a base policy is fine-tuned on; batches of like length."""
        rng = random.Random(f"texts-{self.policy_name}-{number}")
        problems = MAKERS[self.kind](count, seed=_TEXTS + number, min_steps=SHORTEST, max_steps=self.max_steps)
        return in_batches([(p.prompt, respond(p, self.beliefs(number), rng)) for p in problems], rng)


def form_texts(count: int) -> list[tuple[str, str]]:
    """Prompts and right responses of all kinds, from which the forms are learned: short problems first.

    A small model learns to look up changes much sooner on short problems, and has to see long ones to do it there.
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
        for text in in_batches([(p.prompt, respond(p, Beliefs(0.0), rng)) for p in lesson], rng)
    ]


def _mixed(count: int, longest: Mapping[Kind, int], seed: int) -> list[AnyProblem]:
    """Problems of all kinds, as many of each."""
    return [
        problem
        for kind, most in longest.items()
        for problem in MAKERS[kind](count // len(longest), seed=seed, min_steps=SHORTEST, max_steps=most)
    ]


def in_batches(texts: list[tuple[str, str]], rng: random.Random, size: int = 32) -> list[tuple[str, str]]:
    """Texts in batches of like length, the batches in random order."""
    texts = sorted(texts, key=lambda text: len(text[1]))
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    rng.shuffle(batches)
    return [text for batch in batches for text in batch]


def form_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for all kinds of problems."""
    rng = random.Random("tokenizer")
    problems = [p for make in MAKERS.values() for p in make(300, seed=-1, min_steps=SHORTEST, max_steps=18)]
    return make_tokenizer(texts=[p.prompt + respond(p, Beliefs(0.0), rng) for p in problems], pieces=PIECES)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("easy", "chain", 3, 6, 0.2, strength=0.8),
        Setting("medium", "chain", 6, 10, 0.3),
        Setting("hard", "chain", 10, 16, 0.4, reward_model_steps=(3, 8), strength=0.5),
        Setting("distractors", "distracted", 4, 7, 0.3),
        Setting("branching", "branching", 4, 7, 0.3),
        Setting("shift", "chain", 7, 10, 0.3, reward_model_steps=(3, 5)),
        Setting("noise_10", "chain", 3, 6, 0.2, strength=0.8, flipped=0.1),
        Setting("noise_20", "chain", 3, 6, 0.2, strength=0.8, flipped=0.2),
    )
}
# The six of the claim; the noise test stands beside them.
MAIN_SETTINGS = ("easy", "medium", "hard", "distractors", "branching", "shift")
