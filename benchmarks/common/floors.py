"""Step scores that need no learning: baselines that any trained scorer has to beat.

Each rule gives the steps of a response scores in [0, 1]; a response scores as the mean of its steps.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch.nn.functional as F

from fractal_rm.data.bag import Bag, Step, StepScores
from fractal_rm.scorers.embedding import EmbeddingInputs
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

Rule = Callable[[Bag], Sequence[float]]
# Characters of a step that scores 0.5 by its length; any number gives the same order.
_USUAL_LENGTH = 100


def at_random(seed: int) -> Rule:
    """A rule that draws every score."""
    generator = np.random.default_rng(seed)
    return lambda bag: generator.random(len(bag.steps)).tolist()


def constant(bag: Bag) -> list[float]:
    """Every step is good."""
    return [1.0] * len(bag.steps)


def position(bag: Bag) -> list[float]:
    """Early steps are good, and so are responses of few steps."""
    return [1 / (1 + index) for index in range(len(bag.steps))]


def short(bag: Bag) -> list[float]:
    """Short steps are good."""
    return [_USUAL_LENGTH / (_USUAL_LENGTH + len(step)) for step in bag.steps]


def few_new_words(bag: Bag) -> list[float]:
    """Steps are good whose words and numbers stand in the prompt."""
    asked = words(str(bag.prompt))
    return [len(words(step) & asked) / max(1, len(words(step))) for step in bag.steps]


def words(text: str) -> set[str]:
    """Words and numbers of a text, without case.

    Example:
        >>> sorted(words("2 pens, 2 Pens!"))
        ['2', 'pens']
    """
    return set("".join(c if c.isalnum() else " " for c in text.lower()).split())


def copied(outcomes: Mapping[str | None, float] | None = None) -> Rule:
    """Every step scores as the outcome of its response.

    Args:
        outcomes: Outcome by id of the bag; None: the bag's label.
    """
    return lambda bag: [float(bag.label or 0.0) if outcomes is None else outcomes[bag.id]] * len(bag.steps)


def cosine(encoder: SentenceEncoder) -> Rule:
    """Steps are good whose embedding is close to the prompt's."""
    inputs = EmbeddingInputs(encoder)

    def rule(bag: Bag) -> list[float]:
        (embedded,) = inputs.encode([bag])
        cosines = F.cosine_similarity(embedded.steps, embedded.contexts, dim=1)
        return ((1 + cosines.clamp(-1.0, 1.0)) / 2).tolist()  # rounding can leave the range

    return rule


def of_grades(rule: Rule, num_grades: int, *, is_grade: bool) -> Rule:
    """A rule for grades that count from right to wrong, as shares of the highest.

    Args:
        rule: A rule that gives good steps high scores, or grades.
        num_grades: How many grades there are.
        is_grade: Whether the rule gives grades.
    """
    if is_grade:
        return lambda bag: [grade / (num_grades - 1) for grade in rule(bag)]
    return lambda bag: [1 - score for score in rule(bag)]


def score_by(rule: Rule, bags: Sequence[Bag]) -> list[StepScores]:
    """Scores of bags by a rule."""
    scored = []
    for bag in bags:
        values = list(rule(bag))
        steps = [Step(text, *span, value) for text, span, value in zip(bag.steps, bag.step_spans, values, strict=True)]
        scored.append(StepScores(bag.response, steps, float(np.mean(values))))
    return scored
