"""Pseudo-labels and posteriors against brute force over all labelings."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.bags import log_likelihood, pad

from fractal_rm.objectives.aggregation import AGGREGATIONS
from fractal_rm.objectives.pseudo_labels import posteriors, pseudo_labels

RULES = ("min", "max", "mean")
few = settings(max_examples=40)

# A step: its logit, and what is known of it.
steps = st.tuples(st.floats(-6, 6), st.sampled_from([math.nan, math.nan, 0.0, 1.0]))
rows_of_steps = st.lists(st.lists(steps, min_size=1, max_size=7), min_size=1, max_size=3)
bag_label = st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0])


def padded(rows):
    logits, mask = pad([[x for x, _ in row] for row in rows])
    gold, _ = pad([[z for _, z in row] for row in rows])
    return logits, mask, gold.masked_fill(~mask, math.nan)


def agrees(labels, rule, y):
    if rule == "mean":
        return sum(labels) == math.floor(y * len(labels) + 0.5)
    return {"min": min, "max": max}[rule](labels) == (y >= 0.5)


def admissible(row, rule, y):
    """The labelings that agree with gold and with the bag label; with gold alone if none agrees with both."""
    with_gold = [
        labels
        for labels in itertools.product([0, 1], repeat=len(row))
        if all(math.isnan(z) or z == label for label, (_, z) in zip(labels, row, strict=True))
    ]
    return [labels for labels in with_gold if agrees(labels, rule, y)] or with_gold


def enumerated_posterior(row, rule, y):
    """Each step's probability of being good, by summing the likelihood of admissible labelings."""
    labelings = np.array(admissible(row, rule, y))
    weights = np.exp([log_likelihood(labels, [x for x, _ in row]) for labels in labelings])
    return weights @ labelings / weights.sum()


@pytest.mark.parametrize("rule", RULES)
@few
@given(rows=rows_of_steps, y=bag_label)
@example(rows=[[(0.1 * i - 0.3, math.nan) for i in range(10)]], y=0.0)
@example(rows=[[(0.1 * i + 0.3, math.nan) for i in range(10)]], y=0.0)
@example(rows=[[(0.1 * i - 1.3, math.nan) for i in range(10)]], y=1.0)
def test_no_admissible_labeling_is_more_likely_than_the_pseudo_labels(rule, rows, y):
    logits, mask, gold = padded(rows)
    labels = pseudo_labels(logits, torch.full((len(rows),), y), mask, aggregation=rule, gold=gold)
    for found, row in zip(labels.tolist(), rows, strict=True):
        own = tuple(found[: len(row)])
        candidates = admissible(row, rule, y)
        assert own in candidates
        x = [x for x, _ in row]
        assert log_likelihood(own, x) >= max(log_likelihood(labels, x) for labels in candidates) - 1e-6


@pytest.mark.parametrize("rule", RULES)
@few
@given(rows=rows_of_steps, y=bag_label)
def test_posteriors_are_the_enumerated_ones(rule, rows, y):
    logits, mask, gold = padded(rows)
    probs = posteriors(logits, torch.full((len(rows),), y), mask, aggregation=rule, gold=gold)
    for found, row in zip(probs.tolist(), rows, strict=True):
        if rule == "mean":
            expected = enumerated_posterior(row, rule, y)
        else:
            expected = y * enumerated_posterior(row, rule, 1.0) + (1 - y) * enumerated_posterior(row, rule, 0.0)
        assert found[: len(row)] == pytest.approx(expected.tolist(), abs=1e-6)


# Shares of good responses labelled bad, and of bad ones labelled good.
noises = st.tuples(st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([0.0, 0.2, 0.5]))


def with_noise(row, rule, y, noise):
    """Labelings that agree with gold, and the log-likelihood of each together with that of the bag label, 0 or 1."""
    with_gold = [
        labels
        for labels in itertools.product([0, 1], repeat=len(row))
        if all(math.isnan(z) or z == label for label, (_, z) in zip(labels, row, strict=True))
    ]
    of_label = {(1, 0): noise[0], (1, 1): 1 - noise[0], (0, 1): noise[1], (0, 0): 1 - noise[1]}
    found = []
    for labels in with_gold:
        share = of_label[int({"min": min, "max": max}[rule](labels)), int(y)]
        likelihood = log_likelihood(labels, [x for x, _ in row])
        found.append(likelihood + math.log(share) if share else -math.inf)
    if max(found) == -math.inf:  # gold labels contradict the bag label, and win
        found = [log_likelihood(labels, [x for x, _ in row]) for labels in with_gold]
    return with_gold, np.array(found)


@pytest.mark.parametrize("rule", ["min", "max"])
@few
@given(rows=rows_of_steps, y=st.sampled_from([0.0, 1.0]), noise=noises)
@example(rows=[[(-2.0, math.nan), (3.0, math.nan)]], y=1.0, noise=(0.0, 0.2))
@example(rows=[[(2.0, math.nan), (3.0, math.nan)]], y=0.0, noise=(0.4, 0.0))
def test_pseudo_labels_of_noisy_labels_are_the_likeliest_labelings(rule, rows, y, noise):
    logits, mask, gold = padded(rows)
    labels = pseudo_labels(logits, torch.full((len(rows),), y), mask, aggregation=rule, gold=gold, label_noise=noise)
    for found, row in zip(labels.tolist(), rows, strict=True):
        labelings, likelihoods = with_noise(row, rule, y, noise)
        assert likelihoods[labelings.index(tuple(found[: len(row)]))] >= likelihoods.max() - 1e-5


@pytest.mark.parametrize("rule", ["min", "max"])
@few
@given(rows=rows_of_steps, y=bag_label, noise=noises)
def test_posteriors_of_noisy_labels_are_the_enumerated_ones(rule, rows, y, noise):
    logits, mask, gold = padded(rows)
    probs = posteriors(logits, torch.full((len(rows),), y), mask, aggregation=rule, gold=gold, label_noise=noise)
    for found, row in zip(probs.tolist(), rows, strict=True):
        expected = 0.0
        for label, weight in ((1.0, y), (0.0, 1 - y)):  # a soft label mixes what the two say
            labelings, likelihoods = with_noise(row, rule, label, noise)
            weights = np.exp(likelihoods - likelihoods.max())
            expected = expected + weight * (weights @ np.array(labelings) / weights.sum())
        assert found[: len(row)] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
def test_label_noise_that_cannot_be_is_refused(infer):
    logits, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sum to less than 1"):
        infer(logits, torch.ones(1), mask, label_noise=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"a share of good steps, not right or wrong"):
        infer(logits, torch.ones(1), mask, aggregation="mean", label_noise=(0.0, 0.1))


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
@pytest.mark.parametrize("rule", RULES)
@few
@given(rows=rows_of_steps, y=bag_label, noise=st.sampled_from([-1e4, 1e4, math.nan]))
def test_padding_changes_nothing_and_is_nan(infer, rule, rows, y, noise):
    logits, mask, gold = padded(rows)
    labels = torch.full((len(rows),), y)
    clean = infer(logits, labels, mask, aggregation=rule, gold=gold)
    scrambled = infer(logits.masked_fill(~mask, noise), labels, mask, aggregation=rule, gold=gold.masked_fill(~mask, 1))
    torch.testing.assert_close(scrambled, clean, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(clean.isnan(), ~mask)


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
@pytest.mark.parametrize("rule", RULES)
@few
@given(rows=rows_of_steps)
def test_permuting_bags_permutes_the_labels(infer, rule, rows):
    logits, mask, gold = padded(rows)
    y, order = torch.rand(len(rows)), torch.randperm(len(rows))
    permuted = infer(logits[order], y[order], mask[order], aggregation=rule, gold=gold[order])
    plain = infer(logits, y, mask, aggregation=rule, gold=gold)
    torch.testing.assert_close(permuted, plain[order], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_smooth_aggregation_is_labelled_by_the_rule_it_softens(infer, aggregation):
    rule = {"noisy_or": "max", "softmax": "max", "max": "max", "mean": "mean"}
    logits, mask = torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    y = torch.tensor([0.0, 1.0, 0.4, 0.6])
    soft = infer(logits, y, mask, aggregation=aggregation)
    assert torch.equal(soft, infer(logits, y, mask, aggregation=rule.get(aggregation, "min")))


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gold", [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
def test_a_bag_whose_steps_are_all_known_keeps_them_whatever_its_label(infer, rule, gold):
    mask = torch.ones(2, 3, dtype=torch.bool)
    known = torch.tensor([gold, gold])
    assert torch.equal(infer(torch.randn(2, 3), torch.tensor([0.0, 1.0]), mask, aggregation=rule, gold=known), known)


def test_a_step_at_one_half_counts_as_good_unless_the_label_forbids_it():
    mask, logits = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.0, -1.0]])
    assert pseudo_labels(logits, torch.zeros(1), mask, aggregation="min").tolist() == [[1.0, 0.0]]
    assert pseudo_labels(logits, torch.ones(1), mask, aggregation="max").tolist() == [[1.0, 0.0]]
    assert pseudo_labels(logits, torch.zeros(1), mask, aggregation="max").tolist() == [[0.0, 0.0]]


def test_of_equal_steps_the_first_one_is_called():
    steps, mask = torch.ones(1, 20), torch.ones(1, 20, dtype=torch.bool)
    first = [[1.0] + [0.0] * 19]
    assert (1.0 - pseudo_labels(steps, torch.zeros(1), mask, aggregation="min")).tolist() == first
    assert pseudo_labels(-steps, torch.ones(1), mask, aggregation="max").tolist() == first
    assert pseudo_labels(steps, torch.tensor([1 / 20]), mask, aggregation="mean").tolist() == first


def test_half_a_step_is_rounded_up():
    logits, mask = torch.tensor([[0.0, 2.0, 1.0, -1.0, -2.0]]), torch.ones(1, 5, dtype=torch.bool)
    assert pseudo_labels(logits, torch.tensor([0.5]), mask, aggregation="mean").tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("size", [20.0, 1e4])
def test_almost_sure_steps_share_the_blame_of_a_bad_bag(size):
    mask, y = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1)
    # The three steps are equally and almost surely good, yet one is not: each is bad with probability 1/3.
    assert posteriors(torch.full((1, 3), size), y, mask)[0].tolist() == pytest.approx([2 / 3] * 3, abs=1e-6)
    mirrored = posteriors(torch.full((1, 3), -size), 1 - y, mask, aggregation="max")
    assert mirrored[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)
    share = posteriors(torch.full((1, 3), size), y + 1 / 3, mask, aggregation="mean")
    assert share[0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_posteriors_of_a_long_bag_add_up_to_its_number_of_good_steps():
    logits, mask = 30 * torch.randn(2, 200), torch.ones(2, 200, dtype=torch.bool)
    probs = posteriors(logits, torch.tensor([0.3, 0.9]), mask, aggregation="mean")
    assert probs.sum(dim=1).tolist() == pytest.approx([60, 180], rel=1e-5)


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
def test_targets_carry_no_gradient(infer):
    logits = torch.randn(2, 3, requires_grad=True)
    assert not infer(logits, torch.zeros(2), torch.ones(2, 3, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("infer", [pseudo_labels, posteriors])
def test_an_empty_bag_is_named_by_the_inference(infer):
    with pytest.raises(ValueError, match="first: row 0"):
        infer(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1, dtype=torch.bool))
