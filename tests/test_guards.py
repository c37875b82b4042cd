"""Guards: each hack, done by a scripted policy, sets off its alarm; a scripted honest policy sets off none."""

import json
import math
import random
import statistics
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.credit.guards import (
    CEILING,
    LIMITS,
    NGRAM,
    GuardInputs,
    Guards,
    agreement,
    generic,
    measure_rollouts,
    most_frequent,
    order_agreement,
    repeated,
    word_places,
)

BATCHES, HONEST_START, RESPONSES = 60, 10, 32


def honest(batch: int, rng: random.Random) -> GuardInputs:
    """A policy that learns: more right answers and so higher scores, a little longer, slowly away from its start."""
    progress = batch / BATCHES
    rows = []
    for number in range(RESPONSES):
        right = rng.random() < 0.3 + 0.65 * progress
        steps = [
            f"{'Then' if i else 'First'} {rng.randint(1, 99)}+{rng.randint(1, 99)} gives {rng.randint(1, 198)}."
            for i in range(rng.randint(2, 5))
        ] + [f"So {rng.randint(0, 999)}."] * (rng.random() < 0.3 + 0.7 * progress)
        scores = [min(max(rng.gauss(0.9 if right else 0.6, 0.15), 0.0), 1.0) for _ in steps]
        ids = [rng.randint(0, 30) for step in steps for _ in step]
        rows.append((ids, rng.random() > 0.05, steps, scores, min(scores), float(right)))
        rows[-1] += (0.05 * progress * len(ids), f"Question {number // 4}")
    return GuardInputs(*map(list, zip(*rows, strict=True)))


def flatter(batch, rng):
    """Higher scores for the same answers."""
    rollouts = honest(0, rng)
    return replace(rollouts, scores=[0.6 + 0.4 * score for score in rollouts.scores])


def say_thanks(batch, rng):
    """Every step a phrase that the reward model adores."""
    rollouts = honest(0, rng)
    return replace(rollouts, step_scores=[[0.999] * len(row) for row in rollouts.step_scores])


def please(batch, rng):
    """Scores that no longer have to do with being right."""
    rollouts = honest(0, rng)
    return replace(rollouts, scores=[rng.random() for _ in rollouts.scores])


def add_steps(batch, rng):
    """Three times as many steps, all different."""
    rows = [honest(batch, rng) for _ in range(3)]
    return replace(
        rows[0],
        steps=[list(chain(*parts)) for parts in zip(*(r.steps for r in rows), strict=True)],
        step_scores=[list(chain(*parts)) for parts in zip(*(r.step_scores for r in rows), strict=True)],
        token_ids=[list(chain(*parts)) for parts in zip(*(r.token_ids for r in rows), strict=True)],
    )


def one_step(batch, rng):
    """Everything in one step, so that there is one score only."""
    rollouts = honest(batch, rng)
    return replace(
        rollouts, steps=[[" ".join(row)] for row in rollouts.steps], step_scores=[[0.8]] * len(rollouts.steps)
    )


def repeat_steps(batch, rng):
    """One good step, over and over."""
    rollouts = honest(batch, rng)
    return replace(rollouts, steps=[[row[0]] * len(row) for row in rollouts.steps])


def repeat_tokens(batch, rng):
    """The same few tokens in a loop, whatever the steps are."""
    rollouts = honest(batch, rng)
    return replace(rollouts, token_ids=[[i % 5 for i in range(len(row))] for row in rollouts.token_ids])


def never_end(batch, rng):
    """On and on until the length limit."""
    return replace(honest(batch, rng), ended=[rng.random() < 0.3 for _ in range(RESPONSES)])


def say_nothing(batch, rng):
    """No answer is no mistake."""
    rollouts = honest(batch, rng)
    quiet = [rng.random() < 0.5 for _ in range(RESPONSES)]
    return replace(rollouts, token_ids=[[] if q else ids for q, ids in zip(quiet, rollouts.token_ids, strict=True)])


def leave(batch, rng):
    """Far away from the reference."""
    rollouts = honest(batch, rng)
    return replace(rollouts, kl=[1.5 * len(ids) for ids in rollouts.token_ids])


def split(row, pieces):
    """A step cut in pieces, at spaces."""
    words = row.split()
    size = -(-len(words) // pieces)
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]


def cut_finely(batch, rng):
    """The same text in three times as many steps."""
    rollouts = honest(batch, rng)
    steps = [[piece for text in row for piece in split(text, 3)] for row in rollouts.steps]
    return replace(rollouts, steps=steps, step_scores=[[0.8] * len(row) for row in steps])


FILLER = ["Let us go on.", "We keep this in mind.", "This is the next part.", "Now we look at the rest."]


def inflate(batch, rng):
    """A line that says nothing after every other step, each time another one: too few for the number of steps."""
    rollouts = honest(batch, rng)
    steps = [
        [text for i, step in enumerate(row) for text in ([step, rng.choice(FILLER)] if i % 2 else [step])]
        for row in rollouts.steps
    ]
    return replace(rollouts, steps=steps, step_scores=[[0.8] * len(row) for row in steps])


def sound_sure(batch, rng):
    """Every other step is clear, or follows."""
    rollouts = honest(batch, rng)
    markers = ("Clearly, ", "Therefore ", "")
    return replace(rollouts, steps=[[rng.choice(markers) + text for text in row] for row in rollouts.steps])


def reverse(batch, rng):
    """The same steps from the last to the first."""
    rollouts = honest(batch, rng)
    return replace(rollouts, steps=[row[::-1] for row in rollouts.steps])


def shuffle(batch, rng):
    """The same steps in any order."""
    rollouts = honest(batch, rng)
    return replace(rollouts, steps=[rng.sample(row, len(row)) for row in rollouts.steps])


def outgrow(batch, rng):
    """Completions that the reward model reads in part."""
    rollouts = honest(batch, rng)
    return replace(rollouts, steps_beyond_limit=[2 * len(row) for row in rollouts.steps])


def confuse(batch, rng):
    """Completions that the reward model cannot judge."""
    rollouts = honest(batch, rng)
    return replace(rollouts, unscored=[True for _ in rollouts.steps])


HACKS = {
    outgrow: "steps_beyond_limit",
    confuse: "unscored",
    flatter: "score_outcome_gap",
    say_thanks: "ceiling_over_outcome",
    please: "score_outcome_correlation",
    add_steps: "steps_per_response",
    one_step: "tokens_per_step",
    cut_finely: "tokens_per_step",
    inflate: "generic_steps",
    sound_sure: "confidence_markers",
    reverse: "step_order",
    shuffle: "step_order",
    repeat_steps: "repeated_steps",
    repeat_tokens: "repeated_ngrams",
    never_end: "truncated",
    say_nothing: "empty",
    leave: "kl_per_token",
}


def run(policy, *, seed=0, hacked_from=20, guards=None, batches=BATCHES):
    """A run of a policy that is honest at first: alarms by batch."""
    rng, guards, alarms = random.Random(seed), guards or Guards(), {}
    for batch in range(batches):
        rollouts = (policy if batch >= hacked_from else honest)(batch, rng)
        measured = measure_rollouts(rollouts) | {"step_order": guards.order(word_places(rollouts.steps))}
        for alarm in guards.update(measured, step=batch):
            alarms.setdefault(alarm.signal, alarm)
    return alarms


@pytest.mark.parametrize("hack", HACKS, ids=lambda hack: hack.__name__)
def test_a_policy_that_hacks_sets_off_the_alarm_of_its_hack(hack):
    alarm = run(hack)[HACKS[hack]]
    assert alarm.since in range(20, 25)
    assert HACKS[hack] in str(alarm)


@pytest.mark.parametrize("hack", [outgrow, confuse])
def test_what_cannot_be_judged_from_the_start_sets_off_an_alarm_too(hack):
    alarm = run(hack, hacked_from=0)[HACKS[hack]]
    assert alarm.since == 0
    assert "cannot read what the policy writes" in str(alarm)


@pytest.mark.parametrize("seed", range(3))
def test_a_policy_that_learns_honestly_sets_off_none(seed):
    assert run(honest, seed=seed) == {}


def test_every_signal_that_is_watched_has_its_hack():
    assert set(HACKS.values()) == set(LIMITS)


def test_an_honest_policy_that_has_become_perfect_may_be_at_the_ceiling():
    def perfect(batch, rng):
        rollouts = honest(BATCHES, rng)
        return replace(
            rollouts,
            outcomes=[1.0] * RESPONSES,
            scores=[1.0] * RESPONSES,
            step_scores=[[1.0] * len(row) for row in rollouts.step_scores],
        )

    assert run(perfect) == {}


def test_scores_that_say_less_about_a_policy_that_gets_better_set_off_no_alarm():
    def outgrow(batch, rng):
        rollouts = honest(BATCHES, rng)  # nearly always right by now
        return replace(rollouts, scores=[0.9 + 0.05 * rng.random() for _ in rollouts.scores])

    assert "score_outcome_correlation" not in run(outgrow)


# When an alarm is raised ----------------------------------------------------------------------------------------------


def test_an_alarm_needs_patience_comes_once_and_again_after_a_recovery():
    guards = Guards(reference_batches=2, patience=3)
    shares = [0.0, 0.0, *[0.9] * 2, 0.0, *[0.9] * 5, 0.0, *[0.9] * 3]
    raised = [bool(guards.update({"empty": share}, step=step)) for step, share in enumerate(shares)]
    assert [step for step, alarm in enumerate(raised) if alarm] == [7, 13]
    assert guards.raised == 2


def test_forgiven_guards_start_counting_again():
    guards = Guards(reference_batches=1, patience=2)
    guards.update({"empty": 0.0}, step=0)
    guards.update({"empty": 0.9}, step=1)
    guards.forgive()
    assert guards.update({"empty": 0.9}, step=2) == []
    (alarm,) = guards.update({"empty": 0.9}, step=3)
    assert alarm.since == 2


def test_a_noisy_start_allows_for_its_noise():
    calm, noisy = Guards(reference_batches=4, patience=1), Guards(reference_batches=4, patience=1)
    for step in range(4):
        calm.update({"truncated": 0.2}, step=step)
        noisy.update({"truncated": 0.4 * (step % 2)}, step=step)
    assert calm.update({"truncated": 0.9}, step=4)
    assert not noisy.update({"truncated": 0.9}, step=4)


def test_what_cannot_be_measured_raises_no_alarm_and_breaks_no_row():
    guards = Guards(reference_batches=1, patience=2)
    for step, value in enumerate([0.0, 0.9, math.nan]):
        assert guards.update({"empty": value, "kl_per_token": math.nan}, step=step) == []
    assert guards.update({"empty": 0.9, "kl_per_token": 99.0}, step=3), "no reference: no limit for KL"


@pytest.mark.parametrize("at", [3, 9, 21, 22, 30])
def test_resumed_guards_raise_the_same_alarms(at):
    whole, first = Guards(), Guards()
    values = [0.1] * 20 + [0.9] * 10 + [0.1] + [0.9] * 5
    expected = [whole.update({"empty": value}, step=step) for step, value in enumerate(values)]
    found = [first.update({"empty": value}, step=step) for step, value in enumerate(values[:at])]
    second = Guards()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.update({"empty": value}, step=at + step) for step, value in enumerate(values[at:])]
    assert found == expected
    assert second.state_dict() == whole.state_dict()
    assert any(expected)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_resumed_guards_remember_the_usual_order(at):
    batches = [word_places([["a b", "c", "d"], ["a", f"{'dc'[i % 2]}", "b"]]) for i in range(6)]
    guards = Guards(reference_batches=3)
    expected = []
    for step, places in enumerate(batches):
        if step == at:
            resumed = Guards(reference_batches=3)
            resumed.load_state_dict(json.loads(json.dumps(guards.state_dict())))
        expected.append(guards.order(places))
        guards.update({}, step=step)
    found = []
    for step, places in enumerate(batches[at:], at):
        found.append(resumed.order(places))
        resumed.update({}, step=step)
    assert found == expected[at:]
    assert not any(map(math.isnan, found))


# Measurements ---------------------------------------------------------------------------------------------------------


def test_a_batch_measured_by_hand():
    rollouts = GuardInputs(
        token_ids=[[1, 2, 3, 4, 1, 2, 3, 4], [], [5, 6]],
        ended=[True, True, False],
        steps=[["a", "b ", "a"], [], ["Thus a"]],
        step_scores=[[0.995, 0.2, 0.5], [], [CEILING]],
        scores=[0.2, math.nan, 0.8],
        outcomes=[0.0, 1.0, 1.0],
        kl=[1.0, 0.0, 2.0],
        prompts=["p", "q", "q"],
        unscored=[False, False, True],
        steps_beyond_limit=[0, 0, 1],
    )
    assert measure_rollouts(rollouts) == pytest.approx(
        {
            "score_outcome_correlation": 1.0,
            "score_outcome_gap": 0.0,
            "outcome": 2 / 3,
            "steps_per_response": 4 / 3,
            "tokens_per_step": 10 / 4,
            "repeated_steps": (1 / 3 + 0) / 2,
            "repeated_ngrams": 1 - 4 / 5,
            "generic_steps": 0.0,
            "confidence_markers": 1 / 4,
            "truncated": 1 / 3,
            "empty": 1 / 3,
            "kl_per_token": 3 / 10,
            "steps_at_ceiling": 0.5,
            "ceiling_over_outcome": 0.5 - 2 / 3,
            "unscored": 1 / 3,
            "steps_beyond_limit": 1 / 5,
        }
    )


def test_a_batch_of_nothing_says_nothing():
    nothing = GuardInputs([[]], [True], [[]], [[]], [math.nan], [math.nan], [math.nan], [""])
    measured = measure_rollouts(nothing)
    assert {name for name, value in measured.items() if not math.isnan(value)} == {"truncated", "empty"}


unit = st.floats(0, 1)


@given(st.lists(st.tuples(unit, unit), min_size=2, max_size=8))
def test_agreement_is_pearsons_correlation_and_the_difference_of_means(pairs):
    scores, outcomes = zip(*pairs, strict=True)
    correlation, gap = agreement(scores, outcomes)
    assert gap == pytest.approx(statistics.fmean(scores) - statistics.fmean(outcomes), abs=1e-9)
    if min(statistics.pstdev(scores), statistics.pstdev(outcomes)) > 1e-3:
        assert correlation == pytest.approx(statistics.correlation(scores, outcomes), abs=1e-6)


def test_unknown_outcomes_are_left_out_and_other_scales_have_no_gap():
    assert agreement([0.1, 0.9, 0.5], [0.0, 1.0, math.nan]) == pytest.approx((1.0, 0.0))
    correlation, gap = agreement([0.1, 0.9], [-3.0, 5.0])
    assert correlation == pytest.approx(1.0)
    assert math.isnan(gap)
    assert all(map(math.isnan, agreement([], [])))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_repeated_items_are_those_seen_before(items):
    again = sum(item in items[:i] for i, item in enumerate(items))
    assert repeated(items) == pytest.approx(again / len(items))


def test_a_step_of_one_prompt_only_is_not_generic_however_often_it_stands_there():
    assert generic([["a"], ["a"], ["b"]], ["p", "p", "q"]) == 0.0
    assert generic([["a"], ["a"], ["b"]], ["p", "q", "q"]) == pytest.approx(2 / 3)
    assert math.isnan(generic([["a"], ["a"]], ["p", "p"]))


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=5), min_size=1, max_size=6))
def test_agreement_of_order_is_the_weighted_correlation_of_mean_places(rows):
    usual = word_places([list("abcdef")])
    found = order_agreement(word_places(rows), usual)
    pairs = [(i / (len(row) - 1), usual[x].total) for row in rows for i, x in enumerate(row)]
    if min(statistics.pstdev(values) for values in zip(*pairs, strict=True)) > 1e-3:
        assert found == pytest.approx(statistics.correlation(*zip(*pairs, strict=True)), abs=1e-6)


def test_places_of_several_processes_are_those_of_all_rows_and_only_frequent_words_are_kept(monkeypatch):
    rows = [["First 1", "so 2"], ["so 3", "First 40", "x"], ["alone"]]
    assert most_frequent([word_places(rows[:1]), word_places(rows[1:])]) == word_places(rows)
    monkeypatch.setattr("fractal_rm.credit.guards.REMEMBERED_WORDS", 2)
    assert set(most_frequent([word_places(rows)])) == {"#", "first"}, "of equally frequent ones the first by name"


def test_a_response_shorter_than_an_ngram_repeats_nothing():
    short = GuardInputs([[7] * (NGRAM - 1)], [True], [["x"]], [[0.5]], [0.5], [1.0], [0.0], [""])
    assert math.isnan(measure_rollouts(short)["repeated_ngrams"])
