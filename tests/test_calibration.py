"""The temperature: recovered where it is known, optimal where it is not, and never a loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from support.bags import logit_rows, pad

from fractal_rm.objectives.aggregation import AGGREGATIONS, bag_log_probs
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.objectives.calibration import fit_temperature


def mean_loss(logits, labels, mask, temperature, aggregation):
    return bag_loss(logits / temperature, labels, mask, aggregation=aggregation).double().mean().item()


@pytest.mark.parametrize("aggregation", ["min", "max", "mean", "product", "softmin"])
@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_is_found_again(aggregation, truth):
    calibrated, mask = 2 * torch.randn(2000, 3), torch.rand(2000, 3) < 0.8
    mask[:, 0] = True
    labels = bag_log_probs(calibrated, mask, aggregation=aggregation)[0].exp()  # soft labels: no sampling noise
    assert fit_temperature(calibrated * truth, labels, mask, aggregation=aggregation) == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_temperature_is_as_good_as_the_one_that_scipy_finds(aggregation):
    logits, mask = 3 * torch.randn(40, 4), torch.ones(40, 4, dtype=torch.bool)
    labels = (torch.rand(40) < 0.5).float()
    found = fit_temperature(logits, labels, mask, aggregation=aggregation)
    rival = minimize_scalar(
        lambda log_t: mean_loss(logits, labels, mask, math.exp(log_t), aggregation), bounds=(-5, 5), method="bounded"
    )
    assert mean_loss(logits, labels, mask, found, aggregation) <= rival.fun + 1e-5


@settings(max_examples=15)
@given(rows=logit_rows, aggregation=st.sampled_from(AGGREGATIONS))
def test_no_data_makes_the_temperature_worse_than_none(rows, aggregation):
    logits, mask = pad(rows)
    labels = torch.arange(len(rows)).remainder(2).float()
    temperature = fit_temperature(logits, labels, mask, aggregation=aggregation)
    assert math.exp(-5) - 1e-6 <= temperature <= math.exp(5) + 1e-3
    fitted, plain = (mean_loss(logits, labels, mask, t, aggregation) for t in (temperature, 1.0))
    assert fitted <= plain


@pytest.mark.parametrize("labels", [[1.0, 1.0, 1.0], [0.0, 0.0, math.nan], [math.nan] * 3, [0.3, 0.3, 0.3]])
def test_labels_that_are_all_equal_or_unknown_leave_the_logits_alone(labels):
    assert fit_temperature(torch.randn(3, 2), torch.tensor(labels), torch.ones(3, 2, dtype=torch.bool)) == 1.0


def test_unknown_labels_and_padding_change_nothing():
    logits, mask = 3 * torch.randn(30, 3), torch.rand(30, 3) < 0.7
    mask[:, 0] = True
    labels = (torch.rand(30) < 0.5).float()
    labels[5] = math.nan
    known = ~labels.isnan()
    clean = fit_temperature(logits[known], labels[known], mask[known])
    assert fit_temperature(logits.masked_fill(~mask, 77.0), labels, mask) == clean


def test_an_empty_bag_is_named_by_the_fit():
    with pytest.raises(ValueError, match="first: row 0"):
        fit_temperature(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1, dtype=torch.bool))
