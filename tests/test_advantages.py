"""Advantages against closed forms and plain Python loops, and the laws every masked function keeps."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.credit.advantages import (
    GROUP_EPSILON,
    gae,
    global_advantages,
    group_step_advantages,
    step_lambdas,
    whiten,
)
from fractal_rm.credit.placement import place_outcome

unit = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@st.composite
def rollouts(draw):
    """Rewards, values and a mask with padding, holes (tool tokens) and rows without a real token."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))

    def table(element):
        return torch.tensor(
            draw(st.lists(st.lists(element, min_size=width, max_size=width), min_size=rows, max_size=rows))
        )

    number = st.floats(-3, 3)
    return table(number).double(), table(number).double(), table(st.booleans())


def gae_loop(rewards, values, mask, gamma, lam):
    """The recursion as it is written, over the real tokens of each row alone."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in reversed([t for t in range(mask.shape[1]) if mask[row, t]]):
            value = float(values[row, t])
            error = float(rewards[row, t]) + gamma * next_value - value
            next_advantage = error + gamma * lam * next_advantage
            advantages[row, t], returns[row, t] = next_advantage, next_advantage + value
            next_value = value
    return advantages, returns


@given(rollouts(), unit, unit)
def test_gae_is_the_plain_loop_over_real_tokens(batch, gamma, lam):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = gae_loop(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected[0])
    torch.testing.assert_close(returns, expected[1])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.95)])
def test_gae_of_thousands_of_tokens_is_the_plain_loop_in_single_precision(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 2, 3000, generator=generator)
    mask = torch.rand(2, 3000, generator=generator) > 0.1
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected, _ = gae_loop(rewards.double(), values.double(), mask, gamma, lam)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, expected.float(), rtol=1e-4, atol=1e-3)


@given(rollouts(), unit, st.data())
def test_gae_from_step_to_step_is_the_loop_over_steps(batch, lam, data):
    """One decision a step: what it earns is the sum of its tokens' rewards, its value that before its first token."""
    rewards, values, mask = batch
    ends = [[t for t in range(mask.shape[1]) if row[t] and data.draw(st.booleans())] for row in mask]
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=step_lambdas(ends, mask, lam))
    for row in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[row, t]]
        # The last step ends with the row, whether or not it is marked.
        borders = [-1, *[e for e in ends[row] if e != real[-1]], *real[-1:]]
        steps = [[t for t in real if a < t <= b] for a, b in itertools.pairwise(borders)]
        earned = torch.tensor([[float(sum(rewards[row, t] for t in step)) for step in steps]])
        before = torch.tensor([[float(values[row, step[0]]) for step in steps]])
        expected, _ = gae_loop(earned, before, torch.ones(1, len(steps), dtype=torch.bool), 1.0, lam)
        for step, advantage in zip(steps, expected[0].tolist(), strict=True):
            assert advantages[row, step[0]].item() == pytest.approx(advantage, abs=1e-4)


@given(rollouts(), unit)
def test_gae_with_lam_1_is_the_return_minus_the_value(batch, gamma):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    for row in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[row, t]]
        for k, t in enumerate(real):
            to_go = sum(gamma**j * float(rewards[row, u]) for j, u in enumerate(real[k:]))
            assert float(returns[row, t]) == pytest.approx(to_go)
            assert float(advantages[row, t]) == pytest.approx(to_go - float(values[row, t]))


@given(rollouts(), unit)
def test_gae_with_lam_0_is_the_one_step_error(batch, gamma):
    rewards, values, mask = batch
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=0.0)
    for row in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[row, t]]
        for k, t in enumerate(real):
            following = float(values[row, real[k + 1]]) if k + 1 < len(real) else 0.0
            error = float(rewards[row, t]) + gamma * following - float(values[row, t])
            assert float(advantages[row, t]) == pytest.approx(error)


@given(rollouts())
def test_an_outcome_on_the_last_token_is_the_same_scalar_on_every_token(batch):
    scalars, _, mask = batch
    rewards = place_outcome(scalars[:, 0], mask)
    advantages, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    expected = scalars[:, :1].expand(mask.shape).masked_fill(~mask, 0.0)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected)


def test_a_tool_output_in_the_middle_changes_nothing_for_the_tokens_around_it():
    rewards, values = torch.tensor([[0.5, 0.0, 1.0]]), torch.tensor([[0.25, 0.75, 0.5]])
    plain, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.8)
    mask = torch.tensor([[True, False, False, True, False, True]])
    with_tool, _ = gae(
        torch.tensor([[0.5, 7.0, 7.0, 0.0, 7.0, 1.0]]),
        torch.tensor([[0.25, 7.0, 7.0, 0.75, 7.0, 0.5]]),
        mask,
        gamma=0.9,
        lam=0.8,
    )
    torch.testing.assert_close(with_tool[mask], plain[0])
    assert not with_tool[~mask].any()


def test_gae_of_no_tokens_is_empty():
    empty = torch.zeros(2, 0)
    assert [x.shape for x in gae(empty, empty, empty.bool())] == [(2, 0), (2, 0)]


def test_half_precision_is_computed_in_single_precision():
    rewards, mask = torch.full((1, 300), 1.0, dtype=torch.bfloat16), torch.ones(1, 300, dtype=torch.bool)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, lam=1.0)
    assert advantages[0, 0] == 300.0  # bfloat16 would stop counting at 256
    assert whiten(rewards, mask).dtype == torch.float32


@given(rollouts(), st.sampled_from([math.nan, math.inf, -7.0]), st.booleans())
def test_scrambling_masked_tokens_changes_nothing_and_gradients_there_are_zero(batch, noise, shift_mean):
    rewards, values, mask = batch
    noisy_rewards, noisy_values = (x.masked_fill(~mask, noise).requires_grad_() for x in (rewards, values))
    results = [*gae(noisy_rewards, noisy_values, mask), whiten(noisy_rewards, mask, shift_mean=shift_mean)]
    expected = [*gae(rewards, values, mask), whiten(rewards, mask, shift_mean=shift_mean)]
    for result, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(result, plain, rtol=0, atol=0)
        assert not result[~mask].any()
    torch.stack(results).square().sum().backward()
    for x in (noisy_rewards, noisy_values):
        assert x.grad is not None
        assert not x.grad[~mask].any()
        assert x.grad.isfinite().all()


@given(rollouts(), st.randoms())
def test_permuting_rows_permutes_the_advantages(batch, rng):
    rewards, values, mask = batch
    order = rng.sample(range(len(mask)), len(mask))
    advantages, returns = gae(rewards, values, mask)
    permuted = gae(rewards[order], values[order], mask[order])
    torch.testing.assert_close(permuted[0], advantages[order])
    torch.testing.assert_close(permuted[1], returns[order])
    torch.testing.assert_close(whiten(rewards[order], mask[order]), whiten(rewards, mask)[order])


@given(rollouts())
def test_whitened_tokens_have_mean_0_and_deviation_1(batch):
    x, _, mask = batch
    x = x + torch.arange(x.numel()).reshape(x.shape)  # some spread in every row
    whitened = whiten(x, mask)
    if mask.sum() > 1:
        assert float(whitened[mask].mean()) == pytest.approx(0.0, abs=1e-9)
        if x[mask].std() > 0.1:
            assert float(whitened[mask].std()) == pytest.approx(1.0, rel=1e-5)
            kept = whiten(x, mask, shift_mean=False)[mask]
            torch.testing.assert_close(kept, whitened[mask] + x[mask].mean())


@given(rollouts())
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_processes_is_whitening_of_their_rows_together(shift_mean, batch):
    x, _, mask = batch
    totals: list[torch.Tensor] = []
    together = whiten(x, mask, shift_mean=shift_mean, all_reduce=lambda total: totals.append(total) or total)
    parts: list[list[torch.Tensor]] = []
    for rows in (slice(0, 1), slice(1, None)):  # two processes, which learn of each other by sums only
        seen, known = [], iter(totals)
        apart = whiten(
            x[rows],
            mask[rows],
            shift_mean=shift_mean,
            all_reduce=lambda total, seen=seen, known=known: (seen.append(total), next(known))[1],
        )
        torch.testing.assert_close(apart, together[rows])
        parts.append(seen)
    for here, there, total in zip(*parts, totals, strict=True):
        torch.testing.assert_close(here + there, total)


def test_one_token_or_none_has_no_spread_to_whiten():
    one = torch.tensor([[False, True]])
    x = torch.tensor([[3.0, 5.0]])
    assert whiten(x, one).tolist() == [[0.0, 0.0]]
    assert whiten(x, one, shift_mean=False).tolist() == [[0.0, 5.0]]
    assert whiten(x, torch.zeros_like(one)).tolist() == [[0.0, 0.0]]
    assert whiten(torch.full((1, 2), 2.0), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


@st.composite
def grouped_steps(draw):
    """Rows of steps with distinct ends in rising order, some of them not placeable."""
    group_size, width = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    rewards, ends, lengths = [], [], []
    for _ in range(group_size * draw(st.integers(1, 3))):
        row = draw(st.lists(st.integers(0, width + 1), unique=True, max_size=5).map(sorted))
        ends.append([end if draw(st.integers(0, 4)) else None for end in row])
        rewards.append([draw(st.floats(-2, 2)) for _ in row])
        lengths.append(draw(st.integers(0, width)))
    return rewards, ends, torch.arange(width) < torch.tensor(lengths)[:, None], group_size


@given(grouped_steps(), unit, st.booleans())
def test_group_advantages_are_those_of_a_plain_loop(batch, gamma, scale):
    rewards, ends, mask, group_size = batch
    result = group_step_advantages(rewards, ends, mask, group_size, gamma=gamma, scale=scale)
    expected = torch.zeros(mask.shape)
    for row in range(len(mask)):
        group = range(row // group_size * group_size, row // group_size * group_size + group_size)
        placed = {
            r: [
                (reward, end)
                for reward, end in zip(rewards[r], ends[r], strict=True)
                if end is not None and end < mask.shape[1] and mask[r, end]
            ]
            for r in group
        }
        pool = [reward for r in group for reward, _ in placed[r]]
        spread = statistics.stdev(pool) + 1e-4 if scale and len(pool) > 1 else 1.0
        for t in range(mask.shape[1]):
            later = [(reward - statistics.fmean(pool)) / spread for reward, end in placed[row] if end >= t]
            if mask[row, t]:
                expected[row, t] = sum(gamma**j * reward for j, reward in enumerate(later))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_group_advantages_worked_by_hand():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    rewards, ends = [[1.0, 0.0], [1.0, 2.0]], [[1, 3], [0, 2]]  # mean 1
    assert group_step_advantages(rewards, ends, mask, 2, gamma=1.0, scale=False).tolist() == [
        [-1.0, -1.0, -1.0, -1.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 0.0],
    ]
    assert group_step_advantages(rewards, ends, mask, 2, gamma=0.0, scale=False).tolist() == [
        [0.0, 0.0, -1.0, -1.0, 0.0],
        [0.0, 1.0, 1.0, 0.0, 0.0],
    ]


def test_one_step_per_response_is_the_group_advantage_of_a_scalar_reward():
    scalars = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 2.0])
    mask = torch.ones(6, 4, dtype=torch.bool)
    result = group_step_advantages([[r] for r in scalars.tolist()], [[3]] * 6, mask, 3, gamma=1.0, scale=True)
    groups = scalars.view(2, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(result, expected.view(6, 1).expand(6, 4))


def test_steps_that_end_on_one_token_add_up_as_their_rewards_do():
    mask = torch.ones(2, 3, dtype=torch.bool)
    result = group_step_advantages([[2.0, 2.0, 0.0], [0.0]], [[1, 1, 2], [2]], mask, 2, gamma=0.0, scale=False)
    assert result.tolist() == [[2.0, 2.0, -1.0], [-1.0, -1.0, -1.0]]


def test_a_tool_output_inside_a_step_gets_no_advantage():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    result = group_step_advantages([[1.0], [0.0]], [[2], [2]], mask, 2, gamma=1.0, scale=False)
    assert result.tolist() == [[0.5, 0.0, 0.5], [-0.5, -0.5, -0.5]]


def test_equal_rewards_in_a_group_give_no_advantage_even_when_scaled():
    mask = torch.ones(2, 3, dtype=torch.bool)
    result = group_step_advantages([[0.1, 0.1], [0.1]], [[0, 2], [1]], mask, 2, gamma=1.0, scale=True)
    torch.testing.assert_close(result, torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_shifting_all_rewards_of_a_group_changes_nothing_and_other_groups_do_not_matter():
    mask = torch.ones(4, 3, dtype=torch.bool)
    ends = [[0, 2], [1], [2], [0]]
    result = group_step_advantages([[1.0, 0.0], [0.5], [2.0], [1.0]], ends, mask, 2, gamma=1.0, scale=True)
    shifted = group_step_advantages([[4.0, 3.0], [3.5], [-9.0], [5.0]], ends, mask, 2, gamma=1.0, scale=True)
    torch.testing.assert_close(result[:2], shifted[:2])


@pytest.mark.parametrize("baseline", ["step", "token"])
def test_a_group_is_divided_by_the_deviation_of_its_rewards_not_of_what_the_baseline_leaves(baseline):
    rewards, ends, mask = [[1.0, 0.0], [0.5]], [[0, 3], [2]], torch.ones(2, 4, dtype=torch.bool)
    plain, scaled = (
        group_step_advantages(rewards, ends, mask, 2, gamma=1.0, scale=scale, baseline=baseline)
        for scale in (False, True)
    )
    torch.testing.assert_close(scaled, plain / (statistics.stdev([1.0, 0.0, 0.5]) + GROUP_EPSILON))


def test_rows_that_are_not_whole_groups_are_named():
    mask = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="3 completions are not whole groups of 2"):
        group_step_advantages([[1.0]] * 3, [[0]] * 3, mask, 2, gamma=1.0, scale=False)
    with pytest.raises(ValueError, match="whole groups of 0"):
        group_step_advantages([[1.0]] * 3, [[0]] * 3, mask, 0, gamma=1.0, scale=False)


def test_step_ends_out_of_order_are_named():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="Step ends of row 1 decrease"):
        group_step_advantages([[1.0], [1.0, 0.0]], [[0], [2, 1]], mask, 2, gamma=1.0, scale=False)


# Baselines of a group -------------------------------------------------------------------------------------------------

BASELINES = ["step", "token"]


def placed_steps(rewards, ends, mask):
    """Plain Python: (row, number, reward, tokens) of each placed step."""
    found = []
    for row in range(len(mask)):
        last, number = -1, 0
        for reward, end in zip(rewards[row], ends[row], strict=True):
            if end is not None and end < mask.shape[1] and mask[row, end]:
                found.append((row, number, reward, int(mask[row, last + 1 : end + 1].sum()), end))
                last, number = end, number + 1
    return found


@given(grouped_steps(), st.sampled_from(BASELINES))
def test_each_baseline_is_its_definition(batch, baseline):
    rewards, ends, mask, group_size = batch
    result = group_step_advantages(rewards, ends, mask, group_size, gamma=0.0, scale=False, baseline=baseline)
    steps = placed_steps(rewards, ends, mask)
    for row, _, reward, tokens, end in steps:
        group = [s for s in steps if s[0] // group_size == row // group_size]
        if baseline == "token":
            expected = reward - tokens * sum(s[2] for s in group) / sum(s[3] for s in group)
        else:
            expected = reward - statistics.fmean(s[2] for s in group)
        assert float(result[row, end]) == pytest.approx(expected, abs=1e-5)


@given(grouped_steps(), st.sampled_from(BASELINES))
def test_what_a_group_gains_it_loses(batch, baseline):
    rewards, ends, mask, group_size = batch
    result = group_step_advantages(rewards, ends, mask, group_size, gamma=0.0, scale=False, baseline=baseline)
    gained = [0.0] * len(mask)
    for row, _, _, _, end in placed_steps(rewards, ends, mask):
        gained[row // group_size] += float(result[row, end])
    assert gained == pytest.approx([0.0] * len(mask), abs=1e-4)


def test_one_step_responses_are_compared_with_the_mean_by_each_baseline():
    scalars = torch.tensor([1.0, 0.0, 3.0, 2.0])
    for baseline in BASELINES:
        result = group_step_advantages(
            [[r] for r in scalars.tolist()],
            [[2]] * 4,
            torch.ones(4, 3, dtype=torch.bool),
            4,
            gamma=1.0,
            scale=False,
            baseline=baseline,
        )
        torch.testing.assert_close(result, (scalars - scalars.mean())[:, None].expand(4, 3))


def first_tokens(rewards, ends, baseline):
    """What each response gains in total: its first token's advantage without a discount."""
    mask = torch.ones(len(ends), 12, dtype=torch.bool)
    result = group_step_advantages(rewards, ends, mask, len(ends), gamma=1.0, scale=False, baseline=baseline)
    return result[:, 0].tolist()


def test_cutting_the_same_text_into_more_steps_gains_nothing_per_token_but_does_per_step():
    whole = ([[0.6], [0.2]], [[11], [11]])
    cut = ([[0.2, 0.2, 0.2], [0.2]], [[3, 7, 11], [11]])
    assert first_tokens(*whole, "token") == pytest.approx(first_tokens(*cut, "token"))
    assert first_tokens(*whole, "step") != pytest.approx(first_tokens(*cut, "step"))


def test_a_short_answer_is_favoured_by_a_baseline_per_step_where_steps_lose_and_not_per_token():
    # Equal steps of four tokens each: the answer with one step is worth as much as the answer with three.
    rewards, ends = [[0.5], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9]], [[3], [3, 7, 11], [3, 7, 11]]
    short, same, _ = first_tokens(rewards, ends, "step")
    assert short > same + 0.3, "the trap: three equal steps below the mean lose three times as much"
    mask = torch.ones(3, 12, dtype=torch.bool)
    by_token = group_step_advantages(rewards, ends, mask, 3, gamma=0.0, scale=False, baseline="token")
    assert by_token[0, 0] == by_token[1, 0], "a first step is judged alike, whatever follows"


# The global baseline --------------------------------------------------------------------------------------------------


@given(rollouts(), unit, st.booleans())
def test_global_advantages_are_whitened_returns(batch, gamma, scale):
    rewards, values, mask = batch
    result = global_advantages(rewards, mask, gamma=gamma, scale=scale)
    returns, _ = gae_loop(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    real = returns[mask]
    assert not result[~mask].any()
    if len(real) < 2:
        assert not result.any()
        return
    expected = real - real.mean()
    if scale and real.std() > 0.1:
        expected = expected / real.std()
    elif scale:
        return
    torch.testing.assert_close(result[mask], expected, rtol=1e-5, atol=1e-7)
