"""PRMBench: PRMScore against scikit-learn's F1, its categories, a scripted oracle and both formats of its rows."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.intervals import estimates
from fractal_rm.evaluation.prmbench import KINDS, Solutions, measure_prmbench, read_solutions


def official(kind: str, number: int, errors: list[int]) -> dict:
    """A row as published."""
    return {
        "idx": f"prm_test_p1_{number}",
        "classification": kind,
        "original_question": f"Question {number}?",
        "modified_question": f"Question {number}, changed?",
        "original_process": ["One.", "Two."],
        "modified_process": ["One.", "Two.", "Three.", "Four."],
        "error_steps": errors,
    }


def some_solutions() -> Solutions:
    """Two solutions of each kind, and the unchanged ones that come with `redundency`."""
    return read_solutions(
        [official(kind, i, [] if kind == "multi_solutions" else [2 + i, 4]) for kind in KINDS for i in range(2)]
    )


def scores(solutions: Solutions, rule) -> list[StepScores]:
    found = []
    for bag in solutions.bags:
        values = rule(bag)
        steps = [Step("", *span, value) for span, value in zip(bag.step_spans, values, strict=False)]
        found.append(StepScores(bag.response, steps, min(values, default=math.nan), len(bag.step_spans) - len(steps)))
    return found


def values_of(scored, solutions, threshold=0.5) -> dict[str, float]:
    measured = measure_prmbench(scored, solutions, threshold)
    return {**measured.counts, **{name: found.value for name, found in estimates(measured, draws=2).items()}}


def test_a_scripted_oracle_gets_one_everywhere():
    solutions = some_solutions()
    found = values_of(scores(solutions, lambda bag: list(bag.step_labels)), solutions)
    scored = [value for name, value in found.items() if name.startswith(("prmscore", "f1", "accuracy", "within"))]
    assert len(scored) == 1 + 3 + 8 + 2 + 1 + 8 + 2
    assert set(scored) == {1.0}


def test_prmscore_is_the_average_of_scikit_learns_two_f1_scores():
    solutions = some_solutions()
    rng = np.random.default_rng(0)
    scored = scores(solutions, lambda bag: rng.random(len(bag.steps)).tolist())
    found = values_of(scored, solutions, 0.6)

    def expected(kinds):
        rows = [i for i, kind in enumerate(solutions.kinds) if kind in kinds]
        gold = [label for i in rows for label in solutions.bags[i].step_labels]
        called = [float(score >= 0.6) for i in rows for score in scored[i].step_scores]
        return np.mean([f1_score(gold, called, pos_label=kind) for kind in (0, 1)])

    assert found["prmscore"] == pytest.approx(expected(KINDS))  # the unchanged solutions stay out
    assert found["prmscore_simplicity"] == pytest.approx(expected(("redundency", "circular")))
    assert found["prmscore_deception"] == pytest.approx(expected(("deception",)))


def test_a_constant_gets_its_known_value():
    solutions = some_solutions()
    found = values_of(scores(solutions, lambda bag: [0.9] * len(bag.steps)), solutions)
    # 72 steps, 32 of them wrong (2 of 4 in 16 solutions): all are called right.
    assert found["f1_right_steps"] == pytest.approx(2 * 40 / (2 * 40 + 32))
    assert (found["f1_wrong_steps"], found["accuracy_multi_solutions"]) == (0.0, 1.0)
    assert found["prmscore"] == pytest.approx(found["f1_right_steps"] / 2)
    assert (found["responses_correct"], found["responses"]) == (2, 20)


def test_steps_that_were_not_scored_are_not_called_wrong():
    solutions = read_solutions([official("circular", 0, [4])])
    found = values_of(scores(solutions, lambda bag: [0.9, 0.9]), solutions)
    assert (found["f1_wrong_steps"], found["truncated"]) == (0.0, 1)


def test_the_package_schema_gives_the_same_solutions():
    rows = [
        {
            "prompt": "1?",
            "steps": ["a", "b"],
            "step_labels": [1, 0],
            "label": 0,
            "meta": {"classification": "circular"},
        },
        {
            "prompt": "1?",
            "steps": ["a", "b"],
            "step_labels": [1, 1],
            "label": 1,
            "meta": {"classification": "original"},
        },
    ]
    solutions = read_solutions(rows)
    assert solutions.kinds == ["circular", "original"]
    found = values_of(scores(solutions, lambda bag: list(bag.step_labels)), solutions)
    assert (found["prmscore"], found["prmscore_circular"], found["responses_original"]) == (1.0, 1.0, 1)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"data, solution 1: unknown kind of error None; use redundency, "):
        read_solutions([{"prompt": "1?", "steps": ["a"], "step_labels": [1], "label": 1}])
    with pytest.raises(ValueError, match="There are no solutions of PRMBench"):
        measure_prmbench([], Solutions([], []), 0.5)


def test_real_rows_have_every_kind(data_dir):
    solutions = read_solutions(read_jsonl(data_dir / "prmbench" / "test.jsonl.gz"))
    assert set(solutions.kinds) == {*KINDS, "original"}
    oracle = scores(solutions, lambda bag: [1.0 if gold is None else gold for gold in bag.step_labels])
    assert values_of(oracle, solutions)["prmscore"] == 1.0
