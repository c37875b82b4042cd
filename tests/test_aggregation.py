"""Aggregation against enumeration over all labelings, and the laws every masked function keeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.bags import enumerated, few, logit_rows, pad, sharpnesses

from fractal_rm.objectives.aggregation import (
    AGGREGATIONS,
    MEANINGS,
    REMOVED,
    aggregate,
    bag_log_probs,
    log1mexp,
    meaning,
)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@few
@given(rows=logit_rows, sharpness=sharpnesses)
def test_the_bag_probability_is_the_enumerated_one(aggregation, rows, sharpness):
    logits, mask = pad(rows)
    good, bad = bag_log_probs(logits, mask, aggregation=aggregation, sharpness=sharpness)
    expected = torch.tensor([enumerated(row, aggregation, sharpness) for row in rows])
    torch.testing.assert_close(good.exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bad.exp(), 1 - expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@few
@given(rows=logit_rows, sharpness=sharpnesses)
def test_every_aggregation_but_the_two_exact_ones_lies_between_the_extreme_steps(aggregation, rows, sharpness):
    logits, mask = pad(rows)
    values = aggregate(logits, mask, aggregation=aggregation, sharpness=sharpness)
    low = aggregate(logits, mask, aggregation="min") - 1e-3
    high = aggregate(logits, mask, aggregation="max") + 1e-3
    assert (values <= high).all() or aggregation == "noisy_or"
    assert (values >= low).all() or aggregation == "product"


@pytest.mark.parametrize(("soft", "hard"), [("softmin", "min"), ("softmax", "max")])
@few
@given(rows=logit_rows)
def test_a_sharp_aggregation_is_the_extreme_step(soft, hard, rows):
    logits, mask = pad(rows)
    sharp, _ = bag_log_probs(logits, mask, aggregation=soft, sharpness=1e3)
    extreme, _ = bag_log_probs(logits, mask, aggregation=hard)
    torch.testing.assert_close(sharp, extreme, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("one", "other"), [("min", "max"), ("product", "noisy_or"), ("softmin", "softmax")])
@few
@given(rows=logit_rows, sharpness=sharpnesses)
def test_mirrored_aggregations_exchange_good_and_bad(one, other, rows, sharpness):
    logits, mask = pad(rows)
    good, bad = bag_log_probs(logits, mask, aggregation=one, sharpness=sharpness)
    mirrored = bag_log_probs(-logits, mask, aggregation=other, sharpness=sharpness)
    torch.testing.assert_close(mirrored, (bad, good), rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sure_labels_are_aggregated_by_the_rule_that_the_aggregation_softens(aggregation):
    mask = torch.ones(1, 3, dtype=torch.bool)
    for labels in itertools.product([0.0, 1.0], repeat=3):
        logits = 60 * torch.tensor([labels]) - 30
        rule = {"min": min, "max": max, "mean": lambda z: sum(z) / len(z)}[meaning(aggregation)]
        good, _ = bag_log_probs(logits, mask, aggregation=aggregation, sharpness=8.0)
        assert good.exp().item() == pytest.approx(rule(labels), abs=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("extreme", [50.0, 1e4])
def test_extreme_logits_keep_finite_values_and_gradients(aggregation, extreme):
    logits = torch.tensor([[-extreme, extreme], [extreme, extreme], [-extreme, -extreme], [0.0, extreme]])
    leaf = logits.requires_grad_()
    mask = torch.ones(4, 2, dtype=torch.bool)
    for values in bag_log_probs(leaf, mask, aggregation=aggregation, sharpness=2.0):
        (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()


def test_sure_steps_keep_the_digits_of_their_doubt():
    doubt = 1e-5  # logsumexp - log(count) would give 1.0e-5 with an error of 1e-6
    logits = torch.full((1, 3), math.log((1 - doubt) / doubt))
    good, bad = bag_log_probs(logits, torch.ones(1, 3, dtype=torch.bool), aggregation="mean")
    assert -good.item() == pytest.approx(doubt, rel=1e-4)
    assert bad.exp().item() == pytest.approx(doubt, rel=1e-4)


def test_a_product_of_sure_steps_keeps_the_digits_of_its_doubt():
    logits = torch.full((1, 3), 40.0)  # 1 - p is below what a float32 keeps beside 1
    _, bad = bag_log_probs(logits, torch.ones(1, 3, dtype=torch.bool), aggregation="product")
    assert bad.item() == pytest.approx(math.log(3) - 40, rel=1e-6)


def test_each_aggregation_has_a_meaning():
    assert tuple(MEANINGS) == AGGREGATIONS


def test_a_meaning_is_asked_of_known_aggregations_only():
    with pytest.raises(ValueError, match=r"Unknown aggregation 'median'\. Choose one of min, max"):
        meaning("median")


@pytest.mark.parametrize(("removed", "advice"), REMOVED.items())
def test_a_removed_aggregation_names_what_to_use_instead(removed, advice):
    assert advice in AGGREGATIONS
    with pytest.raises(ValueError, match=f"The aggregation '{removed}' was removed; use '{advice}'"):
        meaning(removed)


@pytest.mark.parametrize("sharpness", [0.0, -1.0, math.inf, math.nan])
def test_a_sharpness_that_is_no_finite_positive_number_is_refused(sharpness):
    with pytest.raises(ValueError, match="Give a finite number above 0"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), sharpness=sharpness)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@few
@given(rows=logit_rows, noise=st.sampled_from([-1e4, -3.0, 50.0]))
def test_scrambling_padding_changes_nothing_and_gradients_there_are_zero(aggregation, rows, noise):
    logits, mask = pad(rows)
    scrambled = logits.masked_fill(~mask, noise).requires_grad_()
    result = aggregate(scrambled, mask, aggregation=aggregation)
    torch.testing.assert_close(result, aggregate(logits, mask, aggregation=aggregation), rtol=0, atol=0)
    result.sum().backward()
    assert torch.equal(scrambled.grad[~mask], torch.zeros_like(scrambled.grad[~mask]))
    assert torch.isfinite(scrambled.grad).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@few
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
