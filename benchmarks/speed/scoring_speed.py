"""Question: what does StepRewardModel.score cost beyond the forward pass, and what does one pass per response save?

Rivals: a bare forward pass over the same tokens in the same batches, tokenized beforehand; scoring every prefix of a
response separately, as most step reward models are used.

    python -m benchmarks.speed.scoring_speed

All in one process, in alternated blocks. Rows go to `benchmarks/results/scoring_speed.jsonl`. Beside the ratios: how
many times more tokens prefixes have (`tokens_ratio`), and how long it takes to find the policy tokens where the steps
of a response end (`alignment_ms`).
"""

import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.speed.alternation import alternate, record
from benchmarks.speed.peers import measured_models, speed_parser
from benchmarks.speed.speed_blocks import PeakMemory
from fractal_rm.credit.placement import completion_text, step_end_tokens, token_end_characters
from fractal_rm.data.bag import Bag
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems

BATCH = 32
ARMS = ("bare_forward", "per_prefix", "alignment")


class Task:
    """Work that is done some times in a block, in this process.

    Args:
        work: What one time is worth, in the unit of the comparison.
        function: Does it once.
    """

    def __init__(self, work: float, function: Callable[[], Any]) -> None:
        self.work, self.function = work, function

    def block(self, updates: int) -> dict[str, Any]:
        """As [`alternation.Side.block`]."""
        memory, cpu, start = PeakMemory(), time.process_time(), time.perf_counter()
        for _ in range(updates):
            self.function()
        if memory.cuda:
            torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "work": self.work * updates,
            "memory": memory.peak,
            "start_memory": memory.start,
        }


class Scoring:
    """A reward model, responses, and the ways to score them.

    Args:
        path: Of the reward model.
        count: Responses.
        device: Where to score.
        longest: Most steps of a response.
    """

    def __init__(self, path: Path, count: int, device: str, longest: int = 10) -> None:
        self.reward_model = StepRewardModel.from_pretrained(path, device=device, batch_size=BATCH)
        rng = random.Random("scoring_speed")
        problems = make_problems(count, seed=2, min_steps=2, max_steps=longest)
        self.prompts = [problem.prompt for problem in problems]
        self.responses = [Beliefs().respond(problem, rng) for problem in problems]
        steps = [response.split("\n") for response in self.responses]
        self.prefixes = [
            (prompt, "\n".join(lines[:end]))
            for prompt, lines in zip(self.prompts, steps, strict=True)
            for end in range(1, len(lines) + 1)
        ]
        self.tokens, self.batches = self._tokenize(self.prompts, self.responses)
        self.prefix_tokens, _ = self._tokenize(*map(list, zip(*self.prefixes, strict=True)))

    def _tokenize(self, prompts: list[str], responses: list[str]) -> tuple[int, list[dict[str, torch.Tensor]]]:
        """Number of tokens, and batches of like length on the device."""
        model = self.reward_model
        rows = zip(prompts, responses, strict=True)
        bags = model._inputs.encode([Bag(prompt, text, tuple(model.segmentation(text)), None) for prompt, text in rows])
        bags.sort(key=lambda bag: bag.length)
        device = next(model.scorer.parameters()).device
        batches = []
        for start in range(0, len(bags), BATCH):
            batch = model._inputs.pad(bags[start : start + BATCH])
            batches.append({name: batch[name].to(device) for name in ("input_ids", "attention_mask")})
        return sum(bag.length for bag in bags), batches

    def score(self) -> None:
        """Text in, scores of all steps out."""
        self.reward_model.score(self.prompts, self.responses, progress=False)

    @torch.no_grad()
    def bare_forward(self) -> None:
        """The model alone, on tokens that are there already."""
        for batch in self.batches:
            self.reward_model.scorer.base(**batch, use_cache=False)

    def per_prefix(self) -> None:
        """Every step by itself, at the end of its own text."""
        prompts, responses = zip(*self.prefixes, strict=True)
        self.reward_model.score(prompts, responses, progress=False)

    def alignment(self, repeats: int) -> dict[str, float]:
        """Milliseconds a response to find the policy tokens where steps end, from the sampled ids on; wall and CPU."""
        tokenizer: Any = self.reward_model.tokenizer
        sampled = tokenizer(self.responses)["input_ids"]
        spans = [scored.spans for scored in self.reward_model.score(self.prompts, self.responses, progress=False)]
        found = []
        for _ in range(repeats):
            cpu, start = time.process_time(), time.perf_counter()
            for ids, steps in zip(sampled, spans, strict=True):
                completion_text(ids, tokenizer)
                step_end_tokens(token_end_characters(ids, tokenizer), steps)
            found.append((time.perf_counter() - start, time.process_time() - cpu))
        wall, used = (1000 * median(column) / len(sampled) for column in zip(*found, strict=True))
        return {"alignment_ms": wall, "alignment_cpu_ms": used}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each size."""
    description = "Responses and tokens a second that a step reward model scores."
    parser = speed_parser(description, "scoring_speed", ARMS, sizes=["0.35M", "5M"])
    parser.add_argument("--updates", type=int, default=1, help="Times that all responses are scored in a block.")
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--longest", type=int, default=10, help="Most steps of a response; the shortest have two.")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.blocks, given.responses, given.sizes = 1, 16, ["0.2M"]
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    results = ResultsFile(given.results)
    for split, models, described in measured_models(given):
        scoring = Scoring(models / "reward_model", given.responses, given.device, given.longest)
        settings = ("responses", "longest", "blocks", "updates", "device", "threads")
        fields: dict[str, Any] = {
            "benchmark": "scoring_speed",
            "split": split,
            "config": described | {"batch": BATCH} | {name: getattr(given, name) for name in settings},
        }
        rivals = {"bare_forward": (scoring.tokens, scoring.bare_forward)}
        rivals["per_prefix"] = (given.responses, scoring.per_prefix)
        for arm in given.arms or ARMS:
            start = time.perf_counter()
            if arm == "alignment":
                metrics = scoring.alignment(given.blocks)
            else:
                work, rival = rivals[arm]
                sides = Task(work, scoring.score), Task(work, rival)
                metrics = alternate(*sides, blocks=given.blocks, updates=given.updates)
            if arm == "per_prefix":
                metrics["tokens_ratio"] = scoring.prefix_tokens / scoring.tokens
                metrics["ratio_over_tokens_ratio"] = metrics["ratio"] / metrics["tokens_ratio"]
            record(results, arm=arm, metrics=metrics, seconds=time.perf_counter() - start, **fields)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
