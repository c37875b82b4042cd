"""PRMBench by its official rule: PRMScore, over all steps and by kind of inserted error.

A step that scores below the threshold is predicted wrong. PRMScore is the average of two F1 scores of this prediction:
one with right steps as positives, one with wrong steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.formats.prmbench import read_prmbench
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.intervals import Measurement
from fractal_rm.evaluation.responses import gold_labels, known_steps, measure_responses, ranking_of
from fractal_rm.evaluation.statistics import Statistic, average_of, bag_aucs, mean_of, ratio_of
from fractal_rm.objectives.aggregation import GOOD

# Kinds of error under the paper's three headings. The last kind has no error: it is another right solution.
CATEGORIES = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
KINDS = tuple(kind for kinds in CATEGORIES.values() for kind in kinds)
# Name of the unmodified solutions, which the official score leaves out.
UNCHANGED = ("correct", "original")


class Solutions(NamedTuple):
    """Solutions of PRMBench and the kind of error of each."""

    bags: list[Bag]
    kinds: list[str]


def read_solutions(rows: Iterable[Mapping[str, Any]], *, source: str = "data") -> Solutions:
    """Solutions from rows in the official format (as the Hub has them) or in this package's schema.

    Args:
        rows: Rows of `prmbench_preview.jsonl`; or with `prompt`, `steps`, `step_labels` and `meta.classification`.
        source: Name of the data in messages.

    Raises:
        ValueError: If a column is missing, or the kind of an error is unknown.

    Warns:
        UserWarning: If official rows name an error step that the solution does not have; they are left out.
    """
    given = list(rows)
    if given and "modified_process" in given[0]:
        bags = read_prmbench(given, source=source)
        kinds = [
            next((kind for kind in (*KINDS, *UNCHANGED) if str(bag.id).startswith(f"{kind}_")), bag.id) for bag in bags
        ]
    else:
        bags = read_bags(given, Segmentation("given"), source=source)
        kinds = [(row.get("meta") or {}).get("classification") for row in given]
    for number, kind in enumerate(kinds, 1):
        if kind not in KINDS and kind not in UNCHANGED:
            raise ValueError(f"{source}, solution {number}: unknown kind of error {kind!r}; use {', '.join(KINDS)}.")
    return Solutions(bags, [str(kind) for kind in kinds])


def measure_prmbench(scored: Sequence[StepScores], solutions: Solutions, threshold: float) -> Measurement:
    """PRMScore of step scores, over all and by heading and kind.

    Args:
        scored: Scores of each solution.
        solutions: The solutions.
        threshold: A step that scores below it is predicted wrong. An unscored step is not.

    Returns:
        `prmscore` over the steps of all changed solutions, its two parts `f1_right_steps` and `f1_wrong_steps`, and
        `prmscore_<heading>`, `prmscore_<kind>`, `within_bag_auc_<kind>`; for `multi_solutions`, which has no wrong
        steps, `accuracy_multi_solutions`, the share of its steps that are not predicted wrong; and the ranking metrics
        of [`measure_responses`]. Counts: solutions of each kind.

    Raises:
        ValueError: If there are no solutions.

    Source:
        Song et al., PRMBench, 2025 (arXiv 2501.03124), and its public code: sums over steps, the unchanged solutions
        left out. Its code gives -1 where no score is defined; here it is NaN.
    """
    if not solutions.bags:
        raise ValueError("There are no solutions of PRMBench to measure on. Give some.")
    kinds = np.array(solutions.kinds)
    calls = call_counts(scored, solutions.bags, threshold)
    changed = ~np.isin(kinds, UNCHANGED)
    statistics = prmscore_of(calls, changed)
    for heading, members in CATEGORIES.items():
        if np.isin(kinds, members).any():
            statistics[f"prmscore_{heading}"] = prmscore_of(calls, np.isin(kinds, members))["prmscore"]
    aucs = bag_aucs(*known_steps(scored, solutions.bags))
    for kind in KINDS:
        chosen = kinds == kind
        if not chosen.any():
            continue
        if kind == "multi_solutions":
            right = calls * chosen[:, None]
            statistics[f"accuracy_{kind}"] = ratio_of(right[:, 0], right[:, 0] + right[:, 1])
            continue
        statistics[f"prmscore_{kind}"] = prmscore_of(calls, chosen)["prmscore"]
        statistics[f"within_bag_auc_{kind}"] = mean_of(np.where(chosen, aucs, np.nan))
    general = measure_responses(scored, solutions.bags, threshold)
    statistics |= ranking_of(general)
    counts = {**general.counts, "threshold": threshold}
    counts |= {
        f"responses_{kind}": int((kinds == kind).sum()) for kind in (*KINDS, *UNCHANGED) if (kinds == kind).any()
    }
    return Measurement(len(solutions.bags), statistics, counts)


def call_counts(scored: Sequence[StepScores], bags: Sequence[Bag], threshold: float) -> np.ndarray:
    """Counts of predictions for the steps of each response: (N, 4).

    The columns: right steps called right and called wrong, wrong steps called right and called wrong.
    """
    counts = np.zeros((len(bags), 4))
    for row, result, bag in zip(counts, scored, bags, strict=True):
        gold = gold_labels(bag)
        called_wrong = np.zeros(len(gold), dtype=bool)
        called_wrong[: len(result.steps)] = np.array(result.step_scores) < threshold
        for wrong in (False, True):
            kind = (gold < GOOD) if wrong else (gold >= GOOD)
            row[2 * wrong : 2 * wrong + 2] = (kind & ~called_wrong).sum(), (kind & called_wrong).sum()
    return counts


def prmscore_of(calls: np.ndarray, chosen: np.ndarray) -> dict[str, Statistic]:
    """PRMScore and its two parts over the chosen responses (N,), from the counts of [`call_counts`] (N, 4)."""
    right_kept, right_called, wrong_kept, wrong_called = (calls * chosen[:, None]).T
    mistaken = right_called + wrong_kept
    right = ratio_of(2 * right_kept, 2 * right_kept + mistaken)
    found = ratio_of(2 * wrong_called, 2 * wrong_called + mistaken)

    def wrong(weights: np.ndarray) -> np.ndarray:
        # Without a wrong step there is none to find, whatever was predicted.
        return np.where(weights @ (wrong_kept + wrong_called) == 0, np.nan, found(weights))

    f1_wrong = Statistic(len(calls), wrong)
    return {"prmscore": average_of([right, f1_wrong]), "f1_right_steps": right, "f1_wrong_steps": f1_wrong}
