"""Ordinal bags against enumeration over all gradings."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bags import logit_rows, pad

from fractal_rm.objectives.aggregation import bag_log_probs
from fractal_rm.objectives.bag_loss import instance_loss
from fractal_rm.objectives.grades import (
    expected_grades,
    ordinal_bag_loss,
    ordinal_instance_loss,
    ordinal_max_log_probs,
    ordinal_pseudo_labels,
)

few = settings(max_examples=40)
GRADES = 3
graded_rows = st.lists(
    st.lists(st.lists(st.floats(-6, 6), min_size=GRADES, max_size=GRADES), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def pad_grades(rows):
    _, mask = pad([[0.0] * len(row) for row in rows])
    logits = torch.zeros(*mask.shape, GRADES)
    for b, row in enumerate(rows):
        logits[b, : len(row)] = torch.tensor(row)
    return logits, mask


def step_log_probs(row):
    return torch.tensor(row, dtype=torch.float64).log_softmax(dim=1).tolist()


def gradings(row):
    """Each grading of a bag's steps with its log-likelihood."""
    log_probs = step_log_probs(row)
    for grades in itertools.product(range(GRADES), repeat=len(row)):
        yield grades, sum(log_probs[i][grade] for i, grade in enumerate(grades))


def enumerated_max(row):
    probs = [0.0] * GRADES
    for grades, log_likelihood in gradings(row):
        probs[max(grades)] += math.exp(log_likelihood)
    return probs


@few
@given(rows=graded_rows)
def test_the_distribution_of_the_highest_grade_is_the_enumerated_one(rows):
    logits, mask = pad_grades(rows)
    log_probs = ordinal_max_log_probs(logits, mask)
    for b, row in enumerate(rows):
        assert log_probs[b].tolist() == pytest.approx([math.log(p) for p in enumerated_max(row)], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(len(rows)))


@few
@given(rows=graded_rows, grade=st.sampled_from(range(GRADES)))
def test_the_bag_loss_is_the_cross_entropy_of_the_enumerated_distribution(rows, grade):
    logits, mask = pad_grades(rows)
    expected = [-math.log(enumerated_max(row)[grade]) for row in rows]
    for grades in (torch.full((len(rows),), grade), torch.full((len(rows),), float(grade))):
        assert ordinal_bag_loss(logits, grades, mask).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@few
@given(rows=logit_rows)
def test_with_two_grades_the_highest_is_the_noisy_or(rows):
    logits, mask = pad(rows)
    good, bad = bag_log_probs(logits, mask, aggregation="noisy_or")
    two_grades = torch.stack([torch.zeros_like(logits), logits], dim=2)
    log_probs = ordinal_max_log_probs(two_grades, mask)
    torch.testing.assert_close(log_probs, torch.stack([bad, good], dim=1), rtol=1e-3, atol=1e-5)


def test_bag_loss_gradients_agree_with_finite_differences():
    logits, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    grades = torch.tensor([1, 3])
    leaf = logits.clone().requires_grad_()
    ordinal_bag_loss(leaf, grades, mask).sum().backward()
    step = 1e-2
    for b, s, g in itertools.product(range(2), range(3), range(4)):
        nudge = torch.zeros_like(logits)
        nudge[b, s, g] = step
        up = ordinal_bag_loss(logits + nudge, grades, mask).sum()
        down = ordinal_bag_loss(logits - nudge, grades, mask).sum()
        assert leaf.grad[b, s, g].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=2e-3)


@pytest.mark.parametrize("extreme", [50.0, 1e4])
def test_a_grade_that_no_step_is_likely_to_have_costs_in_proportion_and_keeps_its_gradient(extreme):
    logits = (extreme * torch.tensor([[[1.0, 0.0, -1.0]] * 3])).requires_grad_()
    loss = ordinal_bag_loss(logits, torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2 * extreme - math.log(3), rel=1e-5)
    torch.testing.assert_close(logits.grad, torch.tensor([[[1 / 3, 0.0, -1 / 3]] * 3]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("extreme", [50.0, 1e4])
@pytest.mark.parametrize("grade", [0, 1, 2])
def test_extreme_logits_keep_finite_losses_and_gradients(extreme, grade):
    corners = torch.tensor(list(itertools.product([-extreme, 0.0, extreme], repeat=3)))
    logits = torch.stack([corners, corners.flip(0)], dim=1).requires_grad_()
    loss = ordinal_bag_loss(logits, torch.full((27,), grade), torch.ones(27, 2, dtype=torch.bool))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


@few
@given(rows=graded_rows)
def test_instance_loss_equals_the_mean_over_known_steps(rows):
    logits, mask = pad_grades(rows)
    grades = torch.where(torch.rand(mask.shape) < 0.3, torch.nan, torch.randint(GRADES, mask.shape).float())
    losses = ordinal_instance_loss(logits, grades, mask)
    for b, row in enumerate(rows):
        known = zip(step_log_probs(row), grades[b].tolist(), strict=False)
        terms = [-log_probs[int(grade)] for log_probs, grade in known if grade == grade]
        assert losses[b].item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-4, abs=1e-6)


def test_with_two_grades_the_instance_loss_is_the_binary_one():
    logits, labels, mask = torch.randn(2, 3), torch.randint(2, (2, 3)).float(), torch.ones(2, 3, dtype=torch.bool)
    two_grades = torch.stack([torch.zeros_like(logits), logits], dim=2)
    torch.testing.assert_close(ordinal_instance_loss(two_grades, labels, mask), instance_loss(logits, labels, mask))


def test_expected_grades_weigh_grades_by_their_probability():
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.7], [1.0, 1e-9, 1e-9]]]))
    assert expected_grades(logits)[0].tolist() == pytest.approx([1.6, 0.0], abs=1e-6)


@settings(max_examples=100)
@given(rows=graded_rows, grade=st.sampled_from(range(GRADES)))
def test_no_grading_with_the_bag_grade_is_more_likely_than_the_pseudo_labels(rows, grade):
    logits, mask = pad_grades(rows)
    labels = ordinal_pseudo_labels(logits, torch.full((len(rows),), float(grade)), mask)
    assert torch.equal(labels.isnan(), ~mask)
    for found, row in zip(labels.tolist(), rows, strict=True):
        own = tuple(int(label) for label in found[: len(row)])
        likelihoods = {grades: value for grades, value in gradings(row) if max(grades) == grade}
        assert likelihoods[own] >= max(likelihoods.values()) - 1e-5


def test_the_raised_step_is_the_one_that_loses_least_and_not_the_one_with_the_largest_probability():
    # Grade 1 has probability .4 in the first step, which gives up .55 for it, and .3 in the second, which gives up .31.
    probs = torch.tensor([[[0.55, 0.40, 0.05], [0.31, 0.30, 0.39]]])
    labels = ordinal_pseudo_labels(probs.log(), torch.tensor([1]), torch.ones(1, 2, dtype=torch.bool))
    assert labels.tolist() == [[0.0, 1.0]]


@few
@given(rows=graded_rows, noise=st.sampled_from([-1e4, 7.0, 1e4]))
def test_padding_changes_nothing_and_has_no_gradient(rows, noise):
    logits, mask = pad_grades(rows)
    grades = torch.randint(GRADES, (len(rows),))
    step_grades = torch.randint(GRADES, mask.shape).float()
    scrambled = logits.masked_fill(~mask[:, :, None], noise)
    scrambled[..., 0] = torch.where(mask, scrambled[..., 0], -noise)
    for loss, labels in ((ordinal_bag_loss, grades), (ordinal_instance_loss, step_grades)):
        leaf = scrambled.clone().requires_grad_()
        losses = loss(leaf, labels, mask)
        torch.testing.assert_close(losses, loss(logits, labels, mask), rtol=0, atol=0)
        losses.sum().backward()
        assert not leaf.grad[~mask].any()
        assert torch.isfinite(leaf.grad).all()
        order = torch.randperm(len(rows))
        torch.testing.assert_close(loss(logits[order], labels[order], mask[order]), losses[order].detach())
    pseudo = ordinal_pseudo_labels(scrambled, grades, mask)
    torch.testing.assert_close(pseudo, ordinal_pseudo_labels(logits, grades, mask), rtol=0, atol=0, equal_nan=True)


def test_padding_may_come_first():
    logits, grades = torch.randn(1, 2, GRADES), torch.tensor([1])
    padded = torch.cat([torch.full((1, 1, GRADES), 9.0), logits], dim=1)
    plain, mask = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[False, True, True]])
    torch.testing.assert_close(ordinal_bag_loss(padded, grades, mask), ordinal_bag_loss(logits, grades, plain))


@pytest.mark.parametrize("function", [ordinal_bag_loss, ordinal_pseudo_labels])
def test_an_empty_bag_is_named_by_ordinal_functions(function):
    with pytest.raises(ValueError, match="first: row 0"):
        function(torch.zeros(1, 1, 3), torch.tensor([1]), torch.zeros(1, 1, dtype=torch.bool))
