"""Preference losses against their formulas in double precision, and pseudo-labels against all pairs of labelings."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bags import enumerated, log_likelihood, pad

from fractal_rm.objectives.aggregation import AGGREGATIONS
from fractal_rm.objectives.preferences import preference_loss, preference_pseudo_labels

few = settings(max_examples=25)
FORMS = ("bradley_terry", "ratio")
response = st.lists(st.floats(-4, 4), min_size=1, max_size=5)
pairs = st.lists(st.tuples(response, response), min_size=1, max_size=3)


def padded(rows):
    chosen, rejected = zip(*rows, strict=True)
    return *pad(chosen), *pad(rejected)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@few
@given(rows=pairs)
def test_the_loss_is_the_cross_entropy_of_the_formula(form, aggregation, rows):
    losses = preference_loss(*padded(rows), form=form, aggregation=aggregation)
    for loss, (chosen, rejected) in zip(losses.tolist(), rows, strict=True):
        c, r = enumerated(chosen, aggregation), enumerated(rejected, aggregation)
        p = c / (c + r) if form == "ratio" else sigmoid(math.log(c / (1 - c)) - math.log(r / (1 - r)))
        assert loss == pytest.approx(-math.log(p), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_learning_a_preference_raises_the_chosen_and_lowers_the_rejected_scores(form, aggregation):
    mask = torch.ones(1, 2, dtype=torch.bool)
    chosen, rejected = torch.tensor([[0.1, 0.2]]).requires_grad_(), torch.tensor([[0.2, 0.1]]).requires_grad_()
    preference_loss(chosen, mask, rejected, mask, form=form, aggregation=aggregation).sum().backward()
    assert chosen.grad.sum() < 0 < rejected.grad.sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("extreme", [1.0, 50.0, 1e4])
def test_padding_touches_nothing_and_gradients_stay_finite(form, aggregation, extreme):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    chosen = extreme * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    rejected = chosen.flip(0)
    clean = preference_loss(chosen, mask, rejected, mask.flip(0), form=form, aggregation=aggregation)
    c = chosen.masked_fill(~mask, 1e4).requires_grad_()
    r = rejected.masked_fill(~mask.flip(0), -1e4).requires_grad_()
    losses = preference_loss(c, mask, r, mask.flip(0), form=form, aggregation=aggregation)
    torch.testing.assert_close(losses, clean, rtol=0, atol=0)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    for leaf, real in ((c, mask), (r, mask.flip(0))):
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[~real].any()


def test_an_unknown_form_is_named():
    with pytest.raises(Exception, match="hinge"):  # beartype speaks first in tests, the function itself in use
        preference_loss(*padded([([1.0], [0.0])]), form="hinge")


@pytest.mark.parametrize("rule", ["min", "max", "mean"])
@settings(max_examples=30)
@given(rows=pairs)
def test_no_labels_with_the_preference_are_more_likely_than_the_pseudo_labels(rule, rows):
    found = preference_pseudo_labels(*padded(rows), aggregation=rule)
    share = {"min": min, "max": max, "mean": lambda z: sum(z) / len(z)}[rule]
    for b, (chosen, rejected) in enumerate(rows):
        candidates = {
            (share(a), share(c)): log_likelihood(a, chosen) + log_likelihood(c, rejected)
            for a, c in best_labelings(chosen, rejected, share)
        }
        own = [tuple(labels[b, : len(row)].tolist()) for labels, row in zip(found, (chosen, rejected), strict=True)]
        assert share(own[0]) > share(own[1])
        likelihood = log_likelihood(own[0], chosen) + log_likelihood(own[1], rejected)
        assert likelihood >= max(value for (a, c), value in candidates.items() if a > c) - 1e-6


def best_labelings(chosen, rejected, share):
    """For every pair of aggregated labels, the most likely pair of labelings, by trying all labelings of each side."""

    def best_by_label(row):
        best = {}
        for labels in itertools.product([0, 1], repeat=len(row)):
            current = best.get(share(labels))
            if current is None or log_likelihood(labels, row) > log_likelihood(current, row):
                best[share(labels)] = labels
        return best.values()

    return itertools.product(best_by_label(chosen), best_by_label(rejected))


def test_a_preference_that_the_model_shares_leaves_its_labels_alone():
    chosen, rejected = padded([([3.0, -1.0], [-2.0, -3.0, 2.0])])[::2]
    masks = padded([([3.0, -1.0], [-2.0, -3.0, 2.0])])[1::2]
    a, b = preference_pseudo_labels(chosen, masks[0], rejected, masks[1])
    assert a[0, :2].tolist() == [1.0, 0.0]  # 1/2 is more than 1/3
    assert b[0, :3].tolist() == [0.0, 0.0, 1.0]


def test_padding_of_preference_labels_is_nan_and_changes_nothing():
    chosen, chosen_mask, rejected, rejected_mask = padded([([1.0, 2.0], [0.5]), ([-1.0], [2.0, 3.0, -2.0])])
    for rule in ("min", "max", "mean"):
        clean = preference_pseudo_labels(chosen, chosen_mask, rejected, rejected_mask, aggregation=rule)
        noisy = preference_pseudo_labels(
            chosen.masked_fill(~chosen_mask, 99.0),
            chosen_mask,
            rejected.masked_fill(~rejected_mask, -99.0),
            rejected_mask,
            aggregation=rule,
        )
        torch.testing.assert_close(noisy, clean, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(clean[0].isnan(), ~chosen_mask)
        assert torch.equal(clean[1].isnan(), ~rejected_mask)


def test_an_empty_response_of_a_pair_is_named():
    full, empty = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    for masks in ((full, empty), (empty, full)):
        for function in (preference_loss, preference_pseudo_labels):
            with pytest.raises(ValueError, match="first: row 0"):
                function(torch.zeros(1, 1), masks[0], torch.zeros(1, 1), masks[1])
