"""A bag checks itself, and truncation never changes what a label means."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.bag import Bag, TruncationCount, truncate_bag, truncate_bags, warn_of_equal_labels
from fractal_rm.data.segmentation import join_steps

CHAT = [{"role": "user", "content": "2+3*4?"}]
AGGREGATE = {"min": min, "product": min, "max": max, "mean": lambda labels: sum(labels) / len(labels)}


def make(label: Any = 1.0, steps=("3*4=12.", "2+12=14."), **options: Any) -> Bag:
    response, spans = join_steps(steps)
    return Bag("2+3*4?", response, tuple(spans), label, **options)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"prompt": 3}, TypeError, "the prompt is int; make it a text or a list of messages"),
        ({"prompt": []}, ValueError, "the prompt is a chat without messages"),
        ({"prompt": [{"role": "user"}]}, TypeError, "message 1 of the prompt is not a message"),
        (
            {"prompt": [*CHAT, {"role": "user", "content": None}]},
            TypeError,
            "the content of message 2 of the prompt is",
        ),
        ({"prompt": "a\ud83d"}, ValueError, "the prompt holds half of a surrogate pair at character 1"),
        ({"response": ""}, ValueError, "the response is empty; drop the row"),
        ({"response": " \n\t "}, ValueError, "the response is empty; drop the row"),
        ({"response": 3}, TypeError, r"the response is 3 \(int\), not text"),
        ({"response": "\udc00 two"}, ValueError, "the response holds half of a surrogate pair at character 0"),
        ({"step_spans": ()}, ValueError, "the response has no steps"),
        ({"step_spans": ((0, 3), (2, 5))}, ValueError, "overlap"),
        ({"step_spans": ((3, 5), (0, 2))}, ValueError, "in order"),
        ({"step_spans": ((0, 8),)}, ValueError, "leave the response of 7 characters"),
        ({"step_spans": ((-1, 3),)}, ValueError, "leave the response"),
        ({"step_spans": ((3, 3),)}, ValueError, "are empty"),
        ({"step_spans": ((0.0, 3.0),)}, TypeError, "not a pair of integers"),
        ({"step_spans": ((0, 3, 5),)}, TypeError, "not a pair of integers"),
        (
            {"label": 1.5},
            ValueError,
            r"the label is 1\.5, outside \[0, 1\]; rescale it \(--label_scale 1 5 maps 1 to 0 ",
        ),
        ({"label": -0.1}, ValueError, r"outside \[0, 1\]"),
        ({"label": 10**400}, ValueError, r"outside \[0, 1\]"),
        ({"label": float("inf")}, ValueError, r"outside \[0, 1\]"),
        ({"label": float("nan")}, ValueError, "the label is NaN; give a number, or drop the row"),
        ({"label": "good"}, TypeError, r"the label is 'good' \(str\); make it a number or null"),
        ({"label": 4, "num_grades": 4}, ValueError, "give a whole number from 0 to 3"),
        ({"label": 1.5, "num_grades": 4}, ValueError, "give a whole number from 0 to 3"),
        ({"label": float("inf"), "num_grades": 4}, ValueError, "give a whole number from 0 to 3"),
        ({"num_grades": 1}, ValueError, "give an integer of 2 or more"),
        ({"step_labels": (1,)}, ValueError, "there are 1 step labels for 2 steps; give one label for each"),
        ({"step_labels": (1, 0, 1)}, ValueError, "there are 3 step labels for 2 steps"),
        ({"step_labels": (1, 2)}, ValueError, r"the label of step 2 is 2, outside \[0, 1\]"),
        ({"step_labels": (float("nan"), 1)}, ValueError, "the label of step 1 is NaN"),
        ({"step_labels": (None, "no")}, TypeError, "the label of step 2 is 'no'"),
    ],
)
def test_a_bag_that_cannot_be_is_refused_with_one_sentence(changes, error, match):
    fields = {"prompt": "p", "response": "one two", "step_spans": ((0, 3), (4, 7)), "label": 1.0}
    with pytest.raises(error, match=match) as caught:
        Bag(**{**fields, **changes})
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert ". " not in sentence


def test_labels_keep_their_value_and_become_floats():
    bag = make(label=0.7, step_labels=[True, np.float32(0.25)])
    assert bag.label == 0.7
    assert bag.step_labels == (1.0, 0.25)
    assert [type(label) for label in (make(True).label, make(np.bool_(0)).label, make(torch.tensor(1)).label)] == [
        float
    ] * 3
    assert make(2, num_grades=3).label == 2.0
    assert make(None, step_labels=(None, 0)).step_labels == (None, 0.0)


def test_steps_are_the_texts_at_the_spans():
    spans: Any = [[1, 4], [7, 10]]
    bag = Bag(CHAT, " one\n\n two ", spans, None)
    assert bag.steps == ["one", "two"]
    assert bag.step_spans == ((1, 4), (7, 10))


def test_equal_labels_warn_with_the_consequence():
    with pytest.warns(
        UserWarning, match="All 3 responses have the label 1: the reward model can only learn to give every"
    ):
        warn_of_equal_labels([make(1), make(True), make(1.0)])


def test_labels_that_differ_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_equal_labels([make(1), make(0)])


hard = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6)
unknown = st.lists(st.booleans(), min_size=6, max_size=6)


@pytest.mark.parametrize("aggregation", AGGREGATE)
@given(truth=hard, known=unknown, kept=st.integers(0, 7))
def test_a_truncated_label_is_the_aggregate_of_the_steps_that_are_kept(aggregation, truth, known, kept):
    gold = tuple(label if seen else None for label, seen in zip(truth, known, strict=False))
    steps = [f"step {number}" for number in range(len(truth))]
    bag = make(AGGREGATE[aggregation](truth), steps, step_labels=gold)
    part = truncate_bag(bag, kept, aggregation)
    if kept >= len(truth):
        assert part is bag
    elif part is not None:
        assert part.steps == steps[:kept]
        assert part.response == "\n".join(steps[:kept])
        assert part.step_labels == gold[:kept]
        assert part.label == pytest.approx(AGGREGATE[aggregation](truth[:kept]))


@pytest.mark.parametrize("aggregation", ["min", "max", "mean", "product"])
@given(truth=hard, known=unknown, kept=st.integers(1, 5))
def test_a_bag_is_dropped_only_if_its_part_could_have_either_label(aggregation, truth, known, kept):
    """Oracle: all labelings of the steps that agree with the label and the gold labels; do their parts agree?"""
    gold = tuple(label if seen else None for label, seen in zip(truth, known, strict=False))
    bag = make(AGGREGATE[aggregation](truth), [f"step {number}" for number in range(len(truth))], step_labels=gold)
    if kept >= len(truth):
        return
    labelings = [
        labels
        for labels in itertools.product([0.0, 1.0], repeat=len(truth))
        if AGGREGATE[aggregation](labels) == bag.label
        # What is known of the steps that are cut off does not count, nor (for the mean) what only the label tells.
        and all(g in (None, label) for g, label in zip(gold[:kept], labels, strict=False))
    ]
    if aggregation == "mean":
        certain = None not in gold[:kept]
    else:
        certain = len({AGGREGATE[aggregation](labels[:kept]) for labels in labelings}) == 1
        # The label alone may tell that the last steps are the culprit; the rule is content with the gold labels.
        certain &= bag.label == (0.0 if aggregation == "max" else 1.0) or bag.label in gold[:kept]
    assert (truncate_bag(bag, kept, aggregation) is not None) == certain


@pytest.mark.parametrize(
    ("label", "gold", "aggregation", "expected"),
    [
        (1.0, None, "min", 1.0),
        (0.0, None, "min", "dropped"),
        (0.0, (1, 1, 0), "min", "dropped"),  # the wrong step is cut off
        (0.0, (1, 0, None), "min", 0.0),
        (0.4, (1, 0.4, 1), "min", "dropped"),
        (1.0, None, "product", 1.0),
        (0.0, None, "product", "dropped"),
        (0.0, None, "max", 0.0),
        (1.0, None, "max", "dropped"),
        (1.0, (0, 0, 1), "max", "dropped"),
        (1.0, (0, 1, None), "max", 1.0),
        (0.4, None, "max", "dropped"),
        (0.5, None, "mean", "dropped"),
        (0.5, (1, None, 0), "mean", "dropped"),
        (0.5, (0.25, 0.5, None), "mean", 0.375),
        (None, None, "min", None),
        (None, (1, 0, 1), "mean", None),
    ],
)
def test_the_truncation_rule_holds(label, gold, aggregation, expected):
    part = truncate_bag(make(label, ["a", "b", "c"], step_labels=gold), 2, aggregation)
    assert ("dropped" if part is None else part.label) == expected


@pytest.mark.parametrize(
    ("label", "gold", "aggregation", "expected"),
    [
        (3, None, "min", 3),
        (1, None, "min", "dropped"),
        (1, (2, 1, None), "min", 1),
        (0, None, "max", 0),
        (2, (0, 2, None), "max", 2),
        (2, None, "max", "dropped"),
        (2, (1, 3, 2), "mean", 2),
        (2, (2, 3, 1), "mean", "dropped"),  # no grade is 2.5
    ],
)
def test_the_truncation_rule_holds_for_grades(label, gold, aggregation, expected):
    part = truncate_bag(make(label, ["a", "b", "c"], step_labels=gold, num_grades=4), 2, aggregation)
    assert ("dropped" if part is None else part.label) == expected


def test_nothing_is_left_of_a_bag_whose_first_step_does_not_fit():
    assert truncate_bag(make(1.0), 0, "min") is None
    assert truncate_bag(make(None), 0, "min") is None


def test_the_gap_after_the_last_kept_step_is_cut_off():
    bag = Bag("p", "  one  \n two \n three", ((2, 5), (9, 12), (15, 20)), 1.0)
    part = truncate_bag(bag, 2, "min")
    assert part is not None
    assert part.response == "  one  \n two"


def test_impossible_truncations_are_refused():
    with pytest.raises(ValueError, match="kept_steps is -1; give 0 or more"):
        truncate_bag(make(), -1, "min")
    with pytest.raises(ValueError, match=r"Unknown aggregation 'native'\. Choose one of min, max, mean, product"):
        truncate_bag(make(), 1, "native")
    with pytest.raises(ValueError, match="1 entries in kept_steps for 2 bags"):
        truncate_bags([make(), make()], [1], "min")


def test_a_data_set_is_truncated_and_counted():
    bags = [make(1.0), make(0.0), make(1.0), make(0.0), make(1.0)]
    kept, count = truncate_bags(bags, [2, 2, 1, 1, 0], "min")
    assert [(bag.label, len(bag.steps)) for bag in kept] == [(1.0, 2), (0.0, 2), (1.0, 1)]
    assert count == TruncationCount(total=5, truncated=1, dropped=2)
    assert str(count) == (
        "3 of 5 responses are too long: 1 shortened to their first whole steps, 2 dropped because no step fits or the "
        "label would no longer hold."
    )


def test_a_preference_is_kept_whole_or_not_at_all():
    def pair(name):
        return [make(1.0, pair_id=name), make(0.0, pair_id=name)]

    kept, count = truncate_bags([*pair("a"), *pair("b"), make(1.0)], [1, 2, 2, 2, 1], "min")
    assert [bag.pair_id for bag in kept] == ["b", "b", None]
    assert count == TruncationCount(total=5, truncated=1, dropped=2)


def test_teacher_scores_are_probabilities_whatever_the_labels_are():
    assert make(teacher_scores=(1, None)).teacher_scores == (1.0, None)
    assert make(3, num_grades=4, teacher_scores=(0.3, 0.7)).teacher_scores == (0.3, 0.7)
    with pytest.raises(ValueError, match="there are 1 teacher scores for 2 steps; give one teacher score for each"):
        make(teacher_scores=(1,))
    with pytest.raises(ValueError, match=r"the teacher score of step 2 is 1\.5, outside \[0, 1\]"):
        make(teacher_scores=(1, 1.5))
    with pytest.raises(ValueError, match=r"the teacher score of step 1 is 2, outside \[0, 1\]"):
        make(3, num_grades=4, teacher_scores=(2, 1))


def test_teacher_scores_are_cut_with_their_steps():
    part = truncate_bag(make(steps=["a", "b", "c"], teacher_scores=(0.1, None, 0.3)), 2, "min")
    assert part is not None
    assert part.teacher_scores == (0.1, None)


@pytest.mark.parametrize("spans", [((0, 1), (1, 3)), ((-1, 1), (1, 2)), ((0, 1), (2, 2))])
def test_steps_lie_in_the_response(spans):
    with pytest.raises(ValueError, match="step"):
        Bag("p", "ab", spans, 1.0)
