"""Bags of random logits, and sums over all labelings of their steps."""

import itertools
import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

# Every property runs once for each aggregation.
few = settings(max_examples=25)

sharpnesses = st.sampled_from([0.25, 1.0, 3.0])

logit_rows = st.lists(st.lists(st.floats(-8, 8), min_size=1, max_size=6), min_size=1, max_size=4)


def pad(rows):
    width = max(map(len, rows)) + 1  # at least one column of padding in every row
    logits = torch.zeros(len(rows), width, dtype=torch.float32)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        logits[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return logits, mask


def labelings_with(rule, probs):
    """Probability that `rule` holds of independent step labels, by summing over all labelings."""
    return sum(
        math.prod(p if label else 1 - p for p, label in zip(probs, labels, strict=True))
        for labels in itertools.product([0, 1], repeat=len(probs))
        if rule(labels)
    )


def enumerated(row, aggregation, sharpness=1.0):
    """P(bag good) by summing over all labelings, or by the definition, in double precision."""
    x, r = np.array(row, dtype=float), sharpness
    p = 1 / (1 + np.exp(-x))
    if aggregation in ("product", "noisy_or"):
        return labelings_with(all if aggregation == "product" else any, p.tolist())
    logits = {
        "softmin": lambda: np.average(x, weights=np.exp(-r * x)),
        "softmax": lambda: np.average(x, weights=np.exp(r * x)),
    }
    if aggregation in logits:
        return float(1 / (1 + np.exp(-logits[aggregation]())))
    return float({"min": p.min, "max": p.max, "mean": p.mean}[aggregation]())


def log_likelihood(labels, row):
    return sum(-math.log1p(math.exp(-x if z else x)) for z, x in zip(labels, row, strict=True))
