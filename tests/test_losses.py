"""Losses against enumeration, and their gradients against finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_aggregation import enumerated, logit_rows, pad

from fractal_rm.aggregation import AGGREGATIONS
from fractal_rm.losses import bag_loss, instance_loss


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(rows=logit_rows, label=st.sampled_from([0.0, 0.3, 1.0]))
def test_bag_loss_is_the_cross_entropy_of_the_enumerated_probability(aggregation, rows, label):
    logits, mask = pad(rows)
    losses = bag_loss(logits, torch.full((len(rows),), label), mask, aggregation=aggregation)
    for loss, row in zip(losses.tolist(), rows, strict=True):
        p = min(max(enumerated(row, aggregation), 1e-12), 1 - 1e-12)
        assert loss == pytest.approx(-label * math.log(p) - (1 - label) * math.log(1 - p), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_bag_loss_gradients_agree_with_finite_differences(aggregation):
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 4), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    labels = torch.tensor([0.0, 0.7, 1.0])
    leaf = logits.clone().requires_grad_()
    bag_loss(leaf, labels, mask, aggregation=aggregation).sum().backward()
    step = 1e-2
    for b in range(3):
        for s in range(4):
            nudge = torch.zeros_like(logits)
            nudge[b, s] = step
            up = bag_loss(logits + nudge, labels, mask, aggregation=aggregation).sum()
            down = bag_loss(logits - nudge, labels, mask, aggregation=aggregation).sum()
            assert leaf.grad[b, s].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=2e-3)


def test_the_hard_minimum_sends_its_gradient_to_the_worst_step_only():
    logits = torch.tensor([[3.0, -1.0, 2.0]], requires_grad=True)
    bag_loss(logits, torch.tensor([0.0]), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert logits.grad[0].nonzero().flatten().tolist() == [1]


def test_a_soft_label_is_not_truncated_to_an_integer():
    logits, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    leaf = logits.clone().requires_grad_()
    bag_loss(leaf, torch.tensor([0.7]), mask).sum().backward()
    assert leaf.grad.item() == pytest.approx(0.5 - 0.7)


@given(rows=logit_rows)
def test_instance_loss_equals_the_mean_over_known_steps(rows):
    logits, mask = pad(rows)
    labels = torch.where(torch.rand(logits.shape) < 0.3, torch.nan, torch.rand(logits.shape).round())
    losses = instance_loss(logits, labels, mask)
    for b, row in enumerate(rows):
        known = [(x, labels[b, s].item()) for s, x in enumerate(row) if not math.isnan(labels[b, s].item())]
        terms = [math.log1p(math.exp(-x)) if y else math.log1p(math.exp(x)) for x, y in known]
        assert losses[b].item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-4, abs=1e-6)


@given(rows=logit_rows)
def test_scrambling_padding_changes_no_instance_loss(rows):
    logits, mask = pad(rows)
    labels = torch.rand(logits.shape).round()
    scrambled = logits.masked_fill(~mask, 55.0).requires_grad_()
    losses = instance_loss(scrambled, labels.masked_fill(~mask, 0.0), mask)
    torch.testing.assert_close(losses, instance_loss(logits, labels, mask))
    losses.sum().backward()
    assert not scrambled.grad[~mask].any()


def test_an_empty_bag_is_named_by_the_instance_loss():
    with pytest.raises(ValueError, match="first: row 0"):
        instance_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool))
