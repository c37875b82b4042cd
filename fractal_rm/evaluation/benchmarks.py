"""Evaluates a reward model on a benchmark: read its data, score it in one pass, measure accuracy and speed."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.prompts import is_chat
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.best_of_n import measure_best_of_n, read_questions
from fractal_rm.evaluation.intervals import Measurement
from fractal_rm.evaluation.prmbench import measure_prmbench, read_solutions
from fractal_rm.evaluation.processbench import TUNED_ON, measure_processbench, missing_cases, read_cases
from fractal_rm.evaluation.responses import score_bags
from fractal_rm.reward_model import StepRewardModel

# What [`measure`] reports about scoring itself.
SPEED = ("seconds", "responses_per_second")
BenchmarkName = Literal["processbench", "prmbench", "best_of_n"]


@dataclass(frozen=True)
class Benchmark:
    """A loaded benchmark: the responses to score, and how to evaluate the scores.

    Args:
        bags: The responses.
        measure: Maps scores and the threshold below which a step counts as wrong to a measurement.
        remark: A caveat about the data for readers of the numbers; None if there is none.
    """

    bags: list[Bag]
    measure: Callable[[Sequence[StepScores], float], Measurement]
    remark: str | None = None


def read_benchmark(
    name: BenchmarkName,
    rows: Iterable[Mapping[str, Any]],
    *,
    source: str = "data",
    segmentation: Segmentation | None = None,
    tuned_on: str = TUNED_ON,
    answer_pattern: str | None = None,
    outcome_model: StepRewardModel | None = None,
) -> Benchmark:
    """Read the data of a benchmark.

    Args:
        name: Which benchmark.
        rows: Its rows, in the official format or in this package's schema.
        source: Name of the data in messages.
        segmentation: How unsegmented responses are cut into steps; used by best-of-n only.
        tuned_on: ProcessBench: the subset on which the second threshold is chosen.
        answer_pattern: Best-of-n: a regular expression whose first group is the final answer.
        outcome_model: Best-of-n: a model that scores whole responses, as a control.

    Raises:
        ValueError: If the rows do not suit the benchmark; TypeError for a value of the wrong type.
    """
    if name == "processbench":
        cases = read_cases(rows, source=source)
        return Benchmark(
            cases.bags,
            lambda scored, threshold: measure_processbench(scored, cases, threshold, tuned_on=tuned_on),
            missing_cases(cases),
        )
    if name == "prmbench":
        solutions = read_solutions(rows, source=source)
        return Benchmark(solutions.bags, lambda scored, threshold: measure_prmbench(scored, solutions, threshold))
    questions = read_questions(rows, segmentation or Segmentation(), source=source, answer_pattern=answer_pattern)
    outcome = None if outcome_model is None else score_whole(outcome_model, questions.bags)
    return Benchmark(questions.bags, lambda scored, _: measure_best_of_n(scored, questions, outcome=outcome))


def measure(reward_model: StepRewardModel, benchmark: Benchmark, *, threshold: float | None = None) -> Measurement:
    """Score the responses of a benchmark in one pass and measure; `seconds` and `responses_per_second` measure scoring.

    Args:
        reward_model: The model. If it was trained on chats, prompts that are texts become chats of one message.
        benchmark: What to score and to measure.
        threshold: A step that scores below it counts as wrong; default: the model's stored threshold.
    """
    bags = as_learned(reward_model, benchmark.bags)
    start = time.perf_counter()
    scored = score_bags(reward_model, bags)
    seconds = time.perf_counter() - start
    measured = benchmark.measure(scored, reward_model.settings.threshold if threshold is None else threshold)
    speed = dict(zip(SPEED, (seconds, len(bags) / seconds), strict=True))
    return replace(measured, counts={**measured.counts, **speed})


def as_learned(reward_model: StepRewardModel, bags: Sequence[Bag]) -> list[Bag]:
    """Bags with prompts of the kind that the model was trained on: a text becomes a chat of one user message.

    A chat is not converted to a text: the model's own check reports it.
    """
    if not reward_model.settings.chat:
        return list(bags)
    return [
        bag if is_chat(bag.prompt) else replace(bag, prompt=[{"role": "user", "content": bag.prompt}]) for bag in bags
    ]


def score_whole(outcome_model: StepRewardModel, bags: Sequence[Bag]) -> list[StepScores]:
    """Scores of responses as one step each, as an outcome model gives."""
    whole = [
        replace(bag, step_spans=((bag.step_spans[0][0], bag.step_spans[-1][1]),), step_labels=None, teacher_scores=None)
        for bag in bags
    ]
    return score_bags(outcome_model, as_learned(outcome_model, whole))
