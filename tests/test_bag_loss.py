"""Losses against enumeration, and their gradients against finite differences."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.bags import enumerated, few, logit_rows, pad, sharpnesses

from fractal_rm.objectives.aggregation import AGGREGATIONS
from fractal_rm.objectives.bag_loss import bag_loss, easyllp_loss, instance_loss


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@few
@given(
    rows=logit_rows,
    label=st.sampled_from([0.0, 0.3, 1.0]),
    sharpness=sharpnesses,
    noise=st.sampled_from([(0.0, 0.0), (0.0, 0.2), (0.1, 0.0), (0.3, 0.6)]),
)
def test_bag_loss_is_the_cross_entropy_of_the_enumerated_probability(aggregation, rows, label, sharpness, noise):
    logits, mask = pad(rows)
    labels = torch.full((len(rows),), label)
    losses = bag_loss(logits, labels, mask, aggregation=aggregation, sharpness=sharpness, label_noise=noise)
    for loss, row in zip(losses.tolist(), rows, strict=True):
        truly = enumerated(row, aggregation, sharpness)
        p = min(max((1 - noise[0]) * truly + noise[1] * (1 - truly), 1e-12), 1 - 1e-12)
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


@pytest.mark.parametrize("noise", [(-0.1, 0.0), (1.0, 0.0), (0.5, 0.5), (math.nan, 0.0), (0.0, math.nan)])
def test_noise_rates_that_turn_labels_around_are_refused(noise):
    with pytest.raises(ValueError, match="Give two shares from 0 that sum to less than 1"):
        bag_loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool), label_noise=noise)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("noise", [(0.0, 0.0), (0.1, 0.2)])
def test_noise_bounds_the_loss_of_a_contradicted_label_and_keeps_gradients_finite(aggregation, noise):
    logits = torch.tensor([[1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    losses = bag_loss(logits, torch.tensor([0.0, 1.0]), mask, aggregation=aggregation, label_noise=noise)
    losses.sum().backward()
    assert torch.isfinite(logits.grad).all()
    if noise != (0.0, 0.0):
        torch.testing.assert_close(losses, -torch.tensor(noise).log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_easyllp_is_the_supervised_loss_on_average_over_independent_labels(base_rate, count):
    logits, mask = pad([torch.randn(count).mul(2).tolist()])
    surrogate = supervised = 0.0
    for labels in itertools.product([0.0, 1.0], repeat=count):
        weight = math.prod(base_rate if label else 1 - base_rate for label in labels)
        share = torch.tensor([sum(labels) / count])
        gold = torch.tensor([[*labels, math.nan]])
        surrogate += weight * easyllp_loss(logits, share, mask, base_rate=base_rate).item()
        supervised += weight * instance_loss(logits, gold, mask).item()
    assert surrogate == pytest.approx(supervised, rel=1e-4)


def test_a_base_rate_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"The base rate is 1\.5"):
        easyllp_loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool), base_rate=1.5)


@pytest.mark.parametrize("extreme", [1.0, 50.0, 1e4])
def test_padding_does_not_touch_easyllp_and_gradients_stay_finite(extreme):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    shares = torch.tensor([0.5, 1.0])
    logits = extreme * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    scrambled = logits.masked_fill(~mask, -1e4).requires_grad_()
    losses = easyllp_loss(scrambled, shares, mask, base_rate=0.4)
    torch.testing.assert_close(losses, easyllp_loss(logits, shares, mask, base_rate=0.4), rtol=0, atol=0)
    losses.sum().backward()
    assert torch.isfinite(scrambled.grad).all()
    assert not scrambled.grad[~mask].any()
