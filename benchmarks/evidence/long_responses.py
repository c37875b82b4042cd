"""Question: which response reward still separates responses with many steps?

Simulated: every step is good with a probability around .88, which varies from step to step; a reward model that knows
this probability rewards the responses of a group of 8, and GRPO turns these rewards into advantages. Rewards: the
product of the steps (what `FractalReward` gives with `aggregation="product"`), its logarithm (`scale="log"`), their
minimum, their mean. The result is the mean size of an advantage: about .77 if the scale of the rewards does not matter.

    python -m benchmarks.evidence.long_responses

A row for each reward goes to `benchmarks/results/long_responses.jsonl`.
"""

import time

import torch
from torch import Tensor

from benchmarks.common.places import RESULTS
from fractal_rm.credit.advantages import GROUP_EPSILON
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.objectives.aggregation import Aggregation, bag_log_probs

BENCHMARK = "long_responses"
LENGTHS = (5, 10, 20, 40, 80, 150, 300)
GROUP, GROUPS, SEED = 8, 500, 0
# A beta distribution: its mean, and its number of pseudo-observations (a standard deviation of .07).
MEAN, CONCENTRATION = 0.88, 20.0


def rewards(steps: int) -> dict[str, Tensor]:
    """Rewards of simulated responses (groups, 8), by their names."""
    torch.manual_seed(SEED)
    beta = torch.distributions.Beta(MEAN * CONCENTRATION, (1 - MEAN) * CONCENTRATION)
    logits = beta.sample((GROUPS * GROUP, steps)).logit()
    mask = torch.ones(logits.shape, dtype=torch.bool)
    aggregations: tuple[Aggregation, ...] = ("product", "min", "mean")
    logs = {name: bag_log_probs(logits, mask, aggregation=name)[0] for name in aggregations}
    found = {name: log.exp() for name, log in logs.items()} | {"log of product": logs["product"]}
    return {name: reward.view(GROUPS, GROUP) for name, reward in found.items()}


def advantage_size(reward: Tensor) -> float:
    """Mean size of GRPO's advantages of rewards (groups, 8)."""
    centred = reward - reward.mean(dim=1, keepdim=True)
    return float((centred / (reward.std(dim=1, keepdim=True) + GROUP_EPSILON)).abs().mean())


def main() -> None:
    """Append a row for each kind of reward."""
    start, results = time.monotonic(), ResultsFile(RESULTS / f"{BENCHMARK}.jsonl")
    by_length = {steps: rewards(steps) for steps in LENGTHS}
    for name in by_length[LENGTHS[0]]:
        results.append(
            benchmark=BENCHMARK,
            arm=name,
            dataset="simulated",
            seed=SEED,
            split="groups",
            metrics={f"{steps} steps": advantage_size(found[name]) for steps, found in by_length.items()},
            config={"mean": MEAN, "concentration": CONCENTRATION, "group": GROUP, "groups": GROUPS},
            seconds=time.monotonic() - start,
        )


if __name__ == "__main__":
    main()
