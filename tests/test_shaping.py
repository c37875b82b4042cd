"""Shaping: what each form pays, its bounds, and what no number of steps can change."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.credit.advantages import gae
from fractal_rm.credit.kl import ADAPTIVE_KL_GAIN, AdaptiveKL, kl_estimates
from fractal_rm.credit.moments import RunningMoments
from fractal_rm.credit.shaping import LOG_ODDS_EPSILON, limit_step_rewards, shape_step_scores

FORMS = ["raw", "centered", "log_odds", "delta", "min_form", "first_mistake"]
LARGEST_LOG_ODDS = math.log((1 - LOG_ODDS_EPSILON) / LOG_ODDS_EPSILON)
BOUNDS = {"raw": (0, 1), "centered": (-1, 1), "log_odds": (-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)}
probability = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-9]))
responses = st.lists(st.lists(probability, max_size=6), min_size=1, max_size=5)


def pad(rows: list[list[float]], width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max([width, *map(len, rows)])
    scores = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
    return scores.reshape(len(rows), width), torch.tensor(
        [[i < len(row) for i in range(width)] for row in rows], dtype=torch.bool
    ).reshape(len(rows), width)


def shape(rows: list[list[float]], **options) -> list[list[float]]:
    scores, mask = pad(rows)
    shaped = shape_step_scores(scores, mask, **options).tolist()
    return [values[: len(row)] for values, row in zip(shaped, rows, strict=True)]


def total(row: list[float], *, length_neutral="none", **options) -> float:
    """What one response earns, all else being equal: against a threshold, not against itself."""
    scores, mask = pad([row])
    shaped = shape_step_scores(scores, mask, center="threshold", **options)
    return float(limit_step_rewards(shaped, mask, length_neutral=length_neutral).sum())


# What each form pays --------------------------------------------------------------------------------------------------


@given(responses, st.floats(0, 1))
def test_each_form_is_its_plain_loop(rows, threshold):
    flat = [score for row in rows for score in row]
    mean = statistics.fmean(flat) if flat else 0.0
    expected = {
        "raw": lambda row, t: row[t],
        "centered": lambda row, t: row[t] - mean,
        "log_odds": lambda row, t: max(
            min(math.log(row[t]) - math.log1p(-row[t]) if 0 < row[t] < 1 else 99.0 * (row[t] - 0.5), LARGEST_LOG_ODDS),
            -LARGEST_LOG_ODDS,
        ),
        "delta": lambda row, t: row[t] - (row[t - 1] if t else threshold),
        "min_form": lambda row, t: min(row[t:]) - (min(row[t + 1 :]) if t + 1 < len(row) else 0.0),
        "first_mistake": lambda row, t: -math.prod(row[:t]) * (1 - row[t]),
    }
    for form in FORMS:
        shaped = shape(rows, shaping=form, threshold=threshold, center="batch")
        for row, values in zip(rows, shaped, strict=True):
            assert values == pytest.approx([expected[form](row, t) for t in range(len(row))], abs=1e-9)


@given(responses)
def test_rewards_stay_within_the_bounds_of_their_form(rows):
    for form in FORMS:
        low, high = BOUNDS.get(form, (-1, 1))
        assert all(low - 1e-9 <= value <= high + 1e-9 for row in shape(rows, shaping=form) for value in row)


@given(responses, st.floats(0, 1))
def test_differences_telescope_to_the_last_score(rows, threshold):
    for row, values in zip(rows, shape(rows, shaping="delta", threshold=threshold), strict=True):
        if row:
            assert sum(values) == pytest.approx(row[-1] - threshold, abs=1e-9)


@given(responses)
def test_the_first_mistake_costs_what_the_product_of_all_steps_lacks(rows):
    for row, values in zip(rows, shape(rows, shaping="first_mistake"), strict=True):
        assert sum(values) == pytest.approx(math.prod(row) - 1, abs=1e-9)


def test_only_the_first_mistake_is_charged_where_labels_are_certain():
    assert shape([[1.0, 1.0, 0.0, 1.0, 0.0]], shaping="first_mistake") == [[0.0, 0.0, -1.0, 0.0, 0.0]]


@given(responses, st.integers(0, 3))
def test_the_return_of_the_min_form_is_the_least_score_to_come(rows, padding):
    # Without a discount and without a value model: a token for each step, so that rewards lie where steps are.
    scores, mask = pad(rows, max(map(len, rows)) + padding)
    rewards = shape_step_scores(scores, mask, shaping="min_form")
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    for row, values in zip(rows, returns.tolist(), strict=True):
        assert values[: len(row)] == pytest.approx([min(row[t:]) for t in range(len(row))], abs=1e-9)


@given(st.lists(st.lists(probability, max_size=4), min_size=4, max_size=4))
def test_centering_by_the_group_leaves_each_group_a_mean_of_0(rows):
    shaped = shape(rows, shaping="centered", center="group", group_size=2)
    for group in (shaped[:2], shaped[2:]):
        assert sum(map(sum, group)) == pytest.approx(0.0, abs=1e-9)
    batch = shape(rows, shaping="centered", center="batch")
    assert shape(rows, shaping="centered", center="group", group_size=4) == batch


@given(responses, st.integers(0, 3))
def test_centering_by_the_response_leaves_each_response_a_sum_of_0_whatever_stands_beside_it(rows, padding):
    for row, values in zip(rows, shape(rows, shaping="centered", center="response"), strict=True):
        mean = statistics.fmean(row) if row else 0.0
        assert values == pytest.approx([score - mean for score in row], abs=1e-9)
        assert sum(values) == pytest.approx(0.0, abs=1e-9)
    scores, mask = pad(rows, max(map(len, rows)) + padding)
    assert torch.equal(shape_step_scores(scores, mask), shape_step_scores(scores, mask, center="group", group_size=1))


def test_centering_by_the_threshold_does_not_look_at_other_responses():
    alone = shape([[0.9, 0.1]], shaping="centered", center="threshold", threshold=0.4)
    beside = shape([[0.9, 0.1], [1.0]], shaping="centered", center="threshold", threshold=0.4)
    assert alone[0] == beside[0] == pytest.approx([0.5, -0.3])


@given(responses, st.sampled_from([math.nan, math.inf, -7.0]))
def test_what_stands_at_padding_changes_nothing_and_gets_no_gradient(rows, noise):
    scores, mask = pad(rows, max(map(len, rows)) + 2)
    for form in FORMS:
        noisy = scores.masked_fill(~mask, noise).requires_grad_()
        shaped = shape_step_scores(noisy, mask, shaping=form)
        assert not shaped[~mask].any()
        limited = limit_step_rewards(shaped, mask, clip=0.7, length_neutral="mean")
        plain = limit_step_rewards(shape_step_scores(scores, mask, shaping=form), mask, clip=0.7, length_neutral="mean")
        assert torch.equal(limited, plain)
        assert not limited[~mask].any()
        (gradient,) = torch.autograd.grad(limited.square().sum(), noisy)
        assert not gradient[~mask].any()
        assert gradient.isfinite().all()


@given(responses, st.randoms())
def test_permuting_responses_permutes_their_rewards(rows, rng):
    order = rng.sample(range(len(rows)), len(rows))
    for form in FORMS:
        shaped = shape(rows, shaping=form)
        for values, i in zip(shape([rows[i] for i in order], shaping=form), order, strict=True):
            assert values == pytest.approx(shaped[i], abs=1e-12)


# Bounds and length ----------------------------------------------------------------------------------------------------


@given(responses, st.floats(0.01, 2))
def test_clipped_rewards_stay_within_the_clip_and_the_others_are_kept(rows, clip):
    scores, mask = pad(rows)
    shaped = shape_step_scores(scores, mask, shaping="log_odds")
    limited = limit_step_rewards(shaped, mask, clip=clip)
    assert (limited.abs() <= clip).all()
    inside = shaped.abs() <= clip
    assert torch.equal(limited[inside], shaped[inside])


@given(
    st.lists(probability, max_size=5),
    st.lists(st.floats(0.5, 1), min_size=1, max_size=5),
    st.sampled_from(["centered", "log_odds"]),
)
def test_appending_good_steps_never_raises_a_total_that_is_capped(row, good, form):
    before = total(row, shaping=form, length_neutral="cap")
    assert total([*row, *good], shaping=form, length_neutral="cap") == pytest.approx(before, abs=1e-9)
    assert before <= 0


@given(st.lists(probability, min_size=1, max_size=5), st.lists(st.floats(0.5, 1), min_size=1, max_size=5))
def test_appending_good_steps_never_raises_the_total_of_the_min_form(row, good):
    assert total([*row, *good], shaping="min_form") <= total(row, shaping="min_form") + 1e-9


@given(
    st.lists(probability, min_size=1, max_size=5), st.integers(1, 4), st.sampled_from(["raw", "centered", "log_odds"])
)
def test_a_mean_earns_nothing_by_writing_the_same_steps_again_and_no_more_than_the_best_step(row, times, form):
    once = total(row, shaping=form, length_neutral="mean")
    assert total(row * (times + 1), shaping=form, length_neutral="mean") == pytest.approx(once, abs=1e-9)
    longer = total([*row, *[max(row)] * times], shaping=form, length_neutral="mean")
    assert longer <= total([max(row)], shaping=form) + 1e-9


def test_without_a_limit_good_steps_are_paid_for_again_and_again():
    assert total([0.9] * 10, shaping="centered") == pytest.approx(10 * total([0.9], shaping="centered"))
    assert total([0.9] * 10, shaping="centered", length_neutral="mean") == pytest.approx(0.4)
    # What a mean does not prevent, and a cap does: hiding a bad step among good ones.
    hidden, shown = [0.1, 0.9, 0.9], [0.1]
    assert total(hidden, shaping="centered", length_neutral="mean") > total(shown, shaping="centered")
    assert total(hidden, shaping="centered", length_neutral="cap") == total(shown, shaping="centered")


# Running statistics ---------------------------------------------------------------------------------------------------

batches = st.lists(st.lists(st.floats(-100, 100), max_size=6), max_size=6)


@given(batches)
def test_running_moments_are_those_of_everything_at_once(parts):
    moments = RunningMoments()
    for part in parts:
        moments.update(torch.tensor(part, dtype=torch.float64))
    flat = [value for part in parts for value in part]
    assert moments.count == len(flat)
    assert moments.mean == pytest.approx(statistics.fmean(flat) if flat else 0.0, abs=1e-9)
    spread = statistics.stdev(flat) if len(flat) > 1 else 0.0
    assert moments.std == pytest.approx(spread if spread**2 > 1e-8 else 1.0, rel=1e-6)


@given(batches, batches)
def test_running_moments_go_on_from_a_saved_state_to_the_last_bit(before, after):
    whole, first = RunningMoments(), RunningMoments()
    for part in before:
        whole.update(torch.tensor(part, dtype=torch.float64))
        first.update(torch.tensor(part, dtype=torch.float64))
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for part in after:
        whole.update(torch.tensor(part, dtype=torch.float64))
        resumed.update(torch.tensor(part, dtype=torch.float64))
    assert resumed.state_dict() == whole.state_dict()


def test_a_large_mean_does_not_swallow_the_spread():
    moments = RunningMoments()
    for part in ([1e8, 1e8 + 1], [1e8 + 2]):
        moments.update(torch.tensor(part, dtype=torch.float64))
    assert moments.std == pytest.approx(1.0)


# KL -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_both_estimators_have_the_kl_divergence_as_their_mean(logits, ref_logits):
    policy = torch.tensor(logits).log_softmax(dim=0)
    reference = torch.tensor(ref_logits[: len(logits)]).log_softmax(dim=0)
    exact = float((policy.exp() * (policy - reference)).sum())
    mask = torch.ones(1, len(logits), dtype=torch.bool)
    for estimator in ("k1", "k3"):
        estimates = kl_estimates(policy[None], reference[None], mask, estimator=estimator)
        assert float((policy.exp() * estimates[0]).sum()) == pytest.approx(exact, abs=1e-4)
        assert estimator == "k1" or (estimates > -1e-6).all()


def test_extreme_or_masked_log_probabilities_give_finite_kl():
    logprobs = torch.tensor([[-1e4, 0.0, math.nan]])
    reference = torch.tensor([[0.0, -1e4, -math.inf]])
    mask = torch.tensor([[True, True, False]])
    for estimator in ("k1", "k3"):
        estimates = kl_estimates(logprobs, reference, mask, estimator=estimator)
        assert estimates.isfinite().all()
        assert estimates[0, 2] == 0


def test_an_adaptive_coefficient_settles_at_its_target_and_a_fixed_one_stays():
    kl = AdaptiveKL(0.01, target=6.0)
    for _ in range(2000):
        kl.update(0.6 / kl.coef)  # a policy that moves away less, the more it costs
    assert 0.6 / kl.coef == pytest.approx(6.0, rel=0.01)
    fixed = AdaptiveKL(0.01)
    fixed.update(100.0)
    assert fixed.coef == 0.01


@pytest.mark.parametrize(("kl", "factor"), [(6.6, 1 + 0.1 * ADAPTIVE_KL_GAIN), (600.0, 1.02), (-5.0, 0.98), (6.0, 1.0)])
def test_the_coefficient_moves_by_a_tenth_of_the_clipped_relative_error(kl, factor):
    adaptive = AdaptiveKL(1.0, target=6.0)
    adaptive.update(kl)
    assert adaptive.coef == pytest.approx(factor)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_rows_that_are_not_whole_groups_are_named():
    with pytest.raises(ValueError, match="3 responses are not whole groups of 2"):
        shape([[0.5]] * 3, shaping="centered", center="group", group_size=2)


def test_a_clip_of_nothing_is_refused():
    scores, mask = pad([[0.5]])
    with pytest.raises(ValueError, match=r"The clip of step rewards is -1\.0\. Give a number above 0"):
        limit_step_rewards(scores, mask, clip=-1.0)
