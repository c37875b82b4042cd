"""Aggregation against enumeration over all labelings, and the laws every masked function keeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.aggregation import AGGREGATIONS, aggregate, bag_log_probs, log1mexp

logit_rows = st.lists(st.lists(st.floats(-8, 8), min_size=1, max_size=6), min_size=1, max_size=4)


def pad(rows):
    width = max(map(len, rows)) + 1  # at least one column of padding in every row
    logits = torch.zeros(len(rows), width, dtype=torch.float32)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        logits[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return logits, mask


def enumerated(row, aggregation):
    """P(bag good) by summing over all labelings (product), or by the definition on probabilities."""
    probs = [1 / (1 + math.exp(-x)) for x in row]
    if aggregation == "product":
        return sum(
            math.prod(p if label else 1 - p for p, label in zip(probs, labels, strict=True))
            for labels in itertools.product([0, 1], repeat=len(row))
            if min(labels) == 1
        )
    return {"min": min, "max": max, "mean": lambda p: sum(p) / len(p)}[aggregation](probs)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(rows=logit_rows)
def test_the_bag_probability_is_the_enumerated_one(aggregation, rows):
    logits, mask = pad(rows)
    good, bad = bag_log_probs(logits, mask, aggregation=aggregation)
    expected = torch.tensor([enumerated(row, aggregation) for row in rows])
    torch.testing.assert_close(good.exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bad.exp(), 1 - expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(rows=logit_rows, noise=st.floats(-50, 50))
def test_scrambling_padding_changes_nothing_and_gradients_there_are_zero(aggregation, rows, noise):
    logits, mask = pad(rows)
    scrambled = logits.masked_fill(~mask, noise).requires_grad_()
    result = aggregate(scrambled, mask, aggregation=aggregation)
    torch.testing.assert_close(result, aggregate(logits, mask, aggregation=aggregation), rtol=0, atol=0)
    result.sum().backward()
    assert torch.equal(scrambled.grad[~mask], torch.zeros_like(scrambled.grad[~mask]))
    assert torch.isfinite(scrambled.grad).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(rows=logit_rows)
def test_permuting_bags_permutes_the_output(aggregation, rows):
    logits, mask = pad(rows)
    order = torch.randperm(len(rows))
    permuted = aggregate(logits[order], mask[order], aggregation=aggregation)
    torch.testing.assert_close(permuted, aggregate(logits, mask, aggregation=aggregation)[order], rtol=0, atol=0)


def test_a_padded_score_never_wins_the_min_nor_the_max():
    logits = torch.tensor([[1.0, 2.0, -100.0, 100.0]])
    mask = torch.tensor([[True, True, False, False]])
    assert aggregate(logits, mask, aggregation="min").item() == 1.0
    assert aggregate(logits, mask, aggregation="max").item() == 2.0


def test_a_thousand_confident_steps_keep_a_finite_product_and_gradient():
    logits = torch.full((1, 1000), 30.0, requires_grad=True)
    good, bad = bag_log_probs(logits, torch.ones(1, 1000, dtype=torch.bool), aggregation="product")
    (good + bad).sum().backward()
    assert torch.isfinite(bad).all()
    assert torch.isfinite(logits.grad).all()


def test_an_empty_bag_is_named():
    mask = torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match=r"1 of 2 bags have no steps \(first: row 1\)"):
        aggregate(torch.zeros(2, 1), mask)


def test_an_unknown_aggregation_is_named():
    with pytest.raises(Exception, match="median"):  # beartype speaks first in tests, the function itself in use
        aggregate(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), aggregation="median")


@given(st.floats(-80, -1e-6))
def test_log1mexp_agrees_with_double_precision(value):
    expected = math.log1p(-math.exp(value)) if value < -1 else math.log(-math.expm1(value))
    assert log1mexp(torch.tensor([value])).item() == pytest.approx(expected, rel=1e-3, abs=1e-30)
