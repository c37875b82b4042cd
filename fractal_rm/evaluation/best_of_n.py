"""Best-of-n: how often the highest-scoring of n sampled solutions is right.

With N samples per question, the best of n < N is averaged over all subsets of n, in closed form, without sampling
noise. Ties are shared equally, so an uninformative score gives the share of right solutions.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.contradictions import prompt_key
from fractal_rm.data.patterns import compiled
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.intervals import Measurement
from fractal_rm.evaluation.statistics import Statistic, mean_of
from fractal_rm.objectives.aggregation import GOOD
from fractal_rm.tasks.answers import group_answers, last_message_text, read_answer

# Maximum number of subsets per question for votes, which have no closed form.
VOTE_DRAWS = 500


@dataclass(frozen=True)
class Questions:
    """Sampled solutions, grouped by their question.

    Args:
        bags: The solutions; their label says whether the final answer is right.
        groups: The solutions of each question, as indices into `bags`.
        answers: The final answer of each solution, None if it states none; None if no answers are known.
    """

    bags: list[Bag]
    groups: list[list[int]]
    answers: list[str | None] | None

    @property
    def right(self) -> np.ndarray:
        """Whether each solution is right (N,)."""
        return np.array([float(bag.label or 0.0) >= GOOD for bag in self.bags])


def read_questions(
    rows: Iterable[Mapping[str, Any]],
    segmentation: Segmentation,
    *,
    source: str = "data",
    answer_pattern: str | None = None,
) -> Questions:
    """Questions from rows of sampled solutions, in any order.

    Args:
        rows: Rows with `prompt`, `response` (or `completion`, or `steps`), `label` (is the final answer right?) and,
            for majority votes, `answer`. Rows with equal prompts belong to one question.
        segmentation: How responses are cut into steps.
        source: Name of the data in messages.
        answer_pattern: A regular expression whose first group is the final answer; its last match in the response
            counts. It replaces the column `answer`. Without both, the answers that responses state
            ([`~fractal_rm.tasks.answers.read_answer`]), if any does.

    Raises:
        ValueError: If a label is missing, or a row is wrong, or the pattern is not a regular expression with a group.
    """
    given = list(rows)
    bags = read_bags(given, segmentation, source=source)
    for number, bag in enumerate(bags, 1):
        if bag.pair_id is not None:
            raise ValueError(
                f"{source}, row {number}: preferences are not sampled solutions; give one response per row."
            )
    groups: dict[str, list[int]] = {}
    for place, bag in enumerate(bags):
        groups.setdefault(prompt_key(bag.prompt), []).append(place)
    return Questions(bags, list(groups.values()), _answers(given, bags, answer_pattern))


def _answers(rows: Sequence[Mapping[str, Any]], bags: Sequence[Bag], pattern: str | None) -> list[str | None] | None:
    if pattern is None:
        if not any(row.get("answer") is not None for row in rows):
            stated = [read_answer(bag.response) for bag in bags]
            return stated if any(stated) else None
        return [None if row.get("answer") is None else str(row["answer"]).strip() for row in rows]
    try:
        search = compiled(pattern)
    except ValueError as error:
        raise ValueError(f"`answer_pattern`: {error}") from None
    if search.groups < 1:
        raise ValueError(f"`answer_pattern` {pattern!r} has no group. Put the answer in parentheses: `Answer: (.*)`.")
    found = [[match[1] for match in search.finditer(last_message_text(bag.response))] for bag in bags]
    return [matches[-1].strip() if matches and matches[-1] is not None else None for matches in found]


def solution_scores(scored: Sequence[StepScores]) -> dict[str, np.ndarray]:
    """Scores of solutions (N,) by several aggregations of their step scores; -inf where nothing was scored.

    The readings: `own` (the model's aggregation), `min`, `product`, `mean` and `last`.
    """
    steps = [np.array(result.step_scores, dtype=float) for result in scored]
    own = np.array([-math.inf if math.isnan(result.score) else result.score for result in scored])
    with np.errstate(divide="ignore"):  # a score of 0 is the lowest possible
        readings = {
            "min": [np.min(row) if len(row) else -math.inf for row in steps],
            # Sums of logarithms, because products of many scores underflow to 0.
            "product": [np.log(row).sum() if len(row) else -math.inf for row in steps],
            "mean": [np.mean(row) if len(row) else -math.inf for row in steps],
            "last": [row[-1] if len(row) else -math.inf for row in steps],
        }
    return {"own": own} | {name: np.array(values) for name, values in readings.items()}


def best_of(scores: np.ndarray, right: np.ndarray, n: int) -> float:
    """Chance that the solution with the highest score (N,) among n drawn without replacement is right (N,).

    Returns:
        The exact average over all subsets of n; tied best solutions are chosen equally often.

    Example:
        >>> best_of(np.array([0.9, 0.5, 0.4, 0.1]), np.array([True, False, False, False]), 2)  # in 3 of 6 pairs
        0.5
    """
    place = np.unique(scores, return_inverse=True)[1]
    up_to = np.cumsum(np.bincount(place))
    total = math.comb(len(scores), n)
    # The highest score of the subset is at most this one / exactly this one.
    at_most = [math.comb(int(count), n) / total for count in up_to]
    exactly = np.diff([0.0, *at_most])
    share = np.bincount(place, weights=right.astype(float)) / np.bincount(place)
    return float(exactly @ share)


def pass_at(right: np.ndarray, n: int) -> float:
    """Chance that at least one of n drawn solutions is right: the upper bound of any choice.

    Source:
        Chen et al., "Evaluating Large Language Models Trained on Code", 2021: the unbiased estimator of pass@k.

    Example:
        >>> pass_at(np.array([True, False, False, False]), 2)
        0.5
    """
    return 1 - math.comb(int((~right).sum()), n) / math.comb(len(right), n)


def majority_of(answers: Sequence[str | None], right: np.ndarray, n: int) -> float:
    """Chance that the most frequent answer (N,) among n solutions drawn without replacement is right (N,).

    Equal answers count together, however they are written ([`~fractal_rm.tasks.answers.same_answer`]): `0.5` and `1/2`.
    None has no vote. Ties are shared equally among answers, or among solutions if there is no answer.

    Returns:
        The average over all subsets, or over 500 drawn ones if there are more.

    Example:
        >>> majority_of(["7", "7", "8"], np.array([True, True, False]), 3)
        1.0
    """
    groups = group_answers(answers)
    silence = len({group for group in groups if group is not None})
    place = np.array([silence if group is None else group for group in groups])
    if math.comb(len(right), n) <= VOTE_DRAWS:
        drawn = np.array(list(itertools.combinations(range(len(right)), n)))
    else:
        drawn = np.random.default_rng(0).random((VOTE_DRAWS, len(right))).argsort(1)[:, :n]
    votes = np.zeros((len(drawn), silence + 1))
    good = np.zeros_like(votes)
    rows = np.arange(len(drawn))[:, None]
    np.add.at(votes, (rows, place[drawn]), 1.0)
    np.add.at(good, (rows, place[drawn]), right[drawn])
    silent = votes[:, :-1].sum(1) == 0
    votes[~silent, -1] = 0  # solutions without an answer have no vote, unless none has an answer
    share = np.divide(good, votes, out=np.zeros_like(good), where=votes > 0)
    winners = votes == votes.max(1, keepdims=True)
    return float(((share * winners).sum(1) / winners.sum(1)).mean())


def sizes_of(questions: Questions) -> list[int]:
    """The n to report: powers of two up to the largest number of solutions of a question, and that number.

    Example:
        >>> [bag] = read_questions([{"prompt": "1+1?", "response": "2", "label": 1}], Segmentation()).bags
        >>> sizes_of(Questions([bag] * 6, [[0, 1, 2, 3, 4, 5]], None))
        [1, 2, 4, 6]
    """
    most = max((len(group) for group in questions.groups), default=0)
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | ({most} if most else set()))


def measure_best_of_n(
    scored: Sequence[StepScores],
    questions: Questions,
    *,
    outcome: Sequence[StepScores] | None = None,
) -> Measurement:
    """Best-of-n of step scores, with baselines that need no step scores, and an outcome model as a control.

    Returns:
        For every n of [`sizes_of`]: `own@n`, `min@n`, `product@n`, `mean@n`, `last@n` (readings of the step scores),
        `majority@n` where answers are known, `outcome@n` where an outcome model is given, and `pass@n`, the ceiling;
        all are accuracies over questions, which are the items that intervals are drawn over. Counts: questions,
        solutions, and for every n the questions with fewer solutions, which are left out at that n (`skipped@n`).

    Raises:
        ValueError: If there are no questions.
    """
    if not questions.groups:
        raise ValueError("There are no questions to choose solutions for. Give some.")
    readings = solution_scores(scored)
    if outcome is not None:
        readings["outcome"] = solution_scores(outcome)["own"]
    right = questions.right
    answers, sizes = questions.answers, sizes_of(questions)
    ways: dict[str, Callable[[list[int], int], float]] = {
        name: lambda group, n, scores=scores: best_of(scores[group], right[group], n)
        for name, scores in readings.items()
    }
    if answers is not None:
        ways["majority"] = lambda group, n: majority_of([answers[place] for place in group], right[group], n)
    ways["pass"] = lambda group, n: pass_at(right[group], n)
    statistics: dict[str, Statistic] = {
        f"{name}@{n}": mean_of([way(group, n) if len(group) >= n else math.nan for group in questions.groups])
        for n in sizes
        for name, way in ways.items()
    }
    counts: dict[str, float] = {
        "questions": len(questions.groups),
        "responses": len(questions.bags),
        "unscored": sum(math.isnan(result.score) for result in scored),
        "truncated": sum(result.truncated_steps > 0 for result in scored),
    }
    if answers is not None:
        counts["without_answer"] = sum(answer is None for answer in answers)
    counts |= {f"skipped@{n}": short for n in sizes if (short := sum(len(group) < n for group in questions.groups))}
    return Measurement(len(questions.groups), statistics, counts)
