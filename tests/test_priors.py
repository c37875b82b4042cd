"""Priors against numpy and plain loops, and the laws every masked function keeps."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.bags import logit_rows, pad

from fractal_rm.objectives.bag_loss import instance_loss
from fractal_rm.objectives.priors import (
    MIN_LIKELIHOOD_SCALE,
    correlation_prior,
    correlation_targets,
    cosine_targets,
    fit_likelihood_scale,
    likelihood_targets,
    prior_weight,
    teacher_prior,
)

few = settings(max_examples=40)


def test_cosine_targets_are_the_cosines_of_numpy():
    steps, contexts = torch.randn(4, 5), torch.randn(4, 5)
    for x, y, target in zip(steps.numpy(), contexts.numpy(), cosine_targets(steps, contexts), strict=True):
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert target.item() == pytest.approx((1 + cosine) / 2, abs=1e-6)


def test_a_step_that_says_what_the_context_says_is_believed_good():
    contexts, steps = torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[2.0, 4.0], [-1.0, -2.0]])
    assert cosine_targets(steps, contexts).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_correlation_targets_are_the_correlations_of_numpy():
    steps = 3 + torch.randn(2, 4, 6)
    targets = correlation_targets(steps)
    for b in range(2):
        assert targets[b].numpy() == pytest.approx((1 + np.corrcoef(steps[b].numpy())) / 2, abs=1e-6)


@pytest.mark.parametrize("size", [0.0, 0.1, -7.3, 1e4])
def test_a_vector_without_direction_says_nothing(size):
    steps = torch.randn(1, 3, 7)
    steps[0, 1] = size  # constant: its mean is off by rounding
    correlations = correlation_targets(steps)
    assert correlations[0, 1].tolist() == [0.5, 0.5, 0.5]
    assert torch.isfinite(correlations).all()
    zero = torch.zeros(1, 1, 7)
    assert cosine_targets(zero[0].expand(3, 7), steps[0]).tolist() == [0.5, 0.5, 0.5]
    assert cosine_targets(steps[0], zero[0].expand(3, 7)).tolist() == [0.5, 0.5, 0.5]


def test_targets_stay_in_the_unit_interval_where_rounding_would_leave_it():
    steps = torch.randn(1, 1, 50).expand(1, 40, 50) * torch.randn(1, 40, 1)
    assert correlation_targets(steps).min() >= 0
    assert correlation_targets(steps).max() <= 1
    assert cosine_targets(steps[0], steps[0].roll(1, dims=0)).max() <= 1


def test_likelihood_targets_are_probabilities_and_keep_what_is_unknown():
    targets = likelihood_targets(torch.tensor([[-3.0, math.nan, -1.0]]), location=-2.0, scale=0.5)
    assert targets[0, [0, 2]].tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])
    assert targets[0, 1].isnan()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="Give a number of nats above 0"):
        likelihood_targets(torch.zeros(1, 1), location=0.0, scale=scale)


def test_the_fitted_scale_of_normal_values_is_their_standard_deviation():
    values = -2 + 0.7 * torch.randn(20_000)
    location, scale = fit_likelihood_scale(values)
    assert location == pytest.approx(-2, abs=0.02)
    assert scale == pytest.approx(0.7, rel=0.03)
    spoilt = torch.cat([values, torch.full((200,), -1e6), torch.tensor([math.nan, -math.inf])])
    assert fit_likelihood_scale(spoilt) == pytest.approx((location, scale), rel=0.05)
    assert fit_likelihood_scale(values.tolist()) == pytest.approx((location, scale), rel=1e-6)


def test_equal_values_have_the_least_scale():
    assert fit_likelihood_scale([-1.0, -1.0]) == (-1.0, MIN_LIKELIHOOD_SCALE)


def test_a_likelihood_prior_without_values_is_refused():
    with pytest.raises(ValueError, match="None of 1 log-probabilities is finite"):
        fit_likelihood_scale([math.nan])


@few
@given(rows=logit_rows)
def test_the_absolute_distance_is_averaged_over_known_targets(rows):
    logits, mask = pad(rows)
    targets = torch.where(torch.rand(logits.shape) < 0.3, torch.nan, torch.rand(logits.shape))
    losses = teacher_prior(logits, targets, mask, distance="absolute")
    for b, row in enumerate(rows):
        gaps = [abs(1 / (1 + math.exp(-x)) - t) for x, t in zip(row, targets[b].tolist(), strict=False) if t == t]
        assert losses[b].item() == pytest.approx(sum(gaps) / max(len(gaps), 1), abs=1e-5)


def test_the_cross_entropy_with_a_teacher_is_the_instance_loss_on_its_probabilities():
    logits, targets, mask = torch.randn(3, 4), torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(teacher_prior(logits, targets, mask), instance_loss(logits, targets, mask))


def test_the_cross_entropy_pulls_each_step_to_its_target():
    targets = torch.tensor([[0.2, 0.9]])
    logits = torch.log(targets / (1 - targets)).requires_grad_()
    teacher_prior(logits, targets, torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert logits.grad.abs().max() < 1e-6


@few
@given(rows=logit_rows)
def test_the_correlation_prior_is_the_sum_over_ordered_pairs(rows):
    logits, mask = pad(rows)
    targets = torch.rand(*logits.shape, logits.shape[1])
    losses = correlation_prior(logits, targets, mask)
    for b, row in enumerate(rows):
        p = [1 / (1 + math.exp(-x)) for x in row]
        total = 0.0
        for i, j in itertools.product(range(len(p)), repeat=2):
            t = targets[b, i, j].item()
            total += abs((1 - p[i]) * (1 - p[j]) - t) * abs(p[i] * p[j] - t)
        assert losses[b].item() == pytest.approx(total / len(p), rel=1e-4, abs=1e-5)


def test_correlated_steps_want_equal_labels():
    mask, targets = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, 2)
    equal, opposite = torch.tensor([[20.0, 20.0]]), torch.tensor([[20.0, -20.0]])
    assert correlation_prior(equal, targets, mask) < 1e-6
    assert correlation_prior(opposite, targets, mask) > 0.9


@pytest.mark.parametrize("extreme", [1.0, 50.0, 1e4])
@pytest.mark.parametrize(
    ("loss", "target_axes"),
    [
        (teacher_prior, 2),
        (lambda *args: teacher_prior(*args, distance="absolute"), 2),
        (correlation_prior, 3),
    ],
)
def test_padding_touches_no_prior_and_gradients_stay_finite(loss, target_axes, extreme):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logits = extreme * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    targets = torch.rand((2, 3, 3)[:target_axes])
    clean = loss(logits, targets, mask)
    padding = ~mask if target_axes == 2 else ~(mask[:, :, None] & mask[:, None])
    scrambled = logits.masked_fill(~mask, -1e4).requires_grad_()
    losses = loss(scrambled, targets.masked_fill(padding, math.nan), mask)
    torch.testing.assert_close(losses, clean, rtol=0, atol=0)
    losses.sum().backward()
    assert torch.isfinite(scrambled.grad).all()
    assert not scrambled.grad[~mask].any()
    order = torch.tensor([1, 0])
    torch.testing.assert_close(loss(logits[order], targets[order], mask[order]), clean[order])


@pytest.mark.parametrize("loss", [teacher_prior, lambda *args: teacher_prior(*args, distance="absolute")])
def test_a_bag_without_known_targets_costs_nothing(loss):
    assert loss(torch.ones(1, 2), torch.full((1, 2), math.nan), torch.ones(1, 2, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("distance", ["cross_entropy", "absolute"])
def test_an_empty_bag_is_named_by_the_prior(distance):
    empty = torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="first: row 0"):
        teacher_prior(torch.zeros(1, 1), torch.zeros(1, 1), empty, distance=distance)
    with pytest.raises(ValueError, match="first: row 0"):
        correlation_prior(torch.zeros(1, 1), torch.zeros(1, 1, 1), empty)


def test_decaying_weights_start_at_the_weight_and_end_at_zero():
    halfway = {"constant": 0.4, "linear": 0.2, "cosine": 0.2}
    for schedule, middle in halfway.items():
        assert prior_weight(0.4, 0.0, schedule) == pytest.approx(0.4)
        assert prior_weight(0.4, 0.5, schedule) == pytest.approx(middle)
        assert prior_weight(0.4, 1.0, schedule) == (0.4 if schedule == "constant" else 0.0)
        assert prior_weight(0.4, 1.01, schedule) == prior_weight(0.4, 1.0, schedule)
    falling = [prior_weight(1.0, i / 10, "cosine") for i in range(11)]
    assert falling == sorted(falling, reverse=True)


def test_unknown_choices_are_named():
    # beartype speaks first in tests, the functions themselves in use.
    with pytest.raises(Exception, match="squared"):
        teacher_prior(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), distance="squared")
    with pytest.raises(Exception, match="step"):
        prior_weight(1.0, 0.5, "step")
