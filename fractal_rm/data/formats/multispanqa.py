"""Official files of MultiSpanQA: paragraphs in which the spans that answer a question are marked."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.formats.reading import Data, column, read_each, stream_rows, texts, touches
from fractal_rm.data.sentences import sentences


def read_multispanqa(
    data: Data,
    *,
    source: str | None = None,
    negative_share: float = 0.5,
    seed: int = 0,
    limit: int | None = None,
) -> list[Bag]:
    """Bags of MultiSpanQA: paragraphs with marked spans that answer a question; some are cut so that no span is left.

    Official files: `train.json` and `valid.json`, an object with the list `data`. A row has `id`, `question` and
    `context` (lists of tokens) and `label` ("B", "I" or "O" for each token). The hidden `test.json` has no labels.

    The response is the tokens joined by spaces. Label of a step (sentence): 1 iff it has a token that is not "O".
    Label of a response: 1 iff any step is 1. A share of the rows is made negative: they are cut to their longest run of
    sentences without an answer token. A row without such a sentence is left unchanged, so slightly fewer are negative.
    Negative responses are shorter, so report the accuracy of length as the only feature.

    Args:
        negative_share: Share of the rows to cut; 0.5 as in FRACTAL.
        seed: Seed of the draw of these rows.
        limit: As in [`read_each`].

    Raises:
        ValueError: If a column is missing, or labels and tokens do not match.

    Source:
        Li et al., MultiSpanQA, NAACL 2022; github.com/haonan-li/MultiSpanQA, which states no licence (the text is
        Wikipedia's, CC BY-SA). Windows as FRACTAL (Makhija et al., ACL 2025) describes them.

    Example:
        >>> row = {"id": "a", "question": ["who", "?"], "context": "It rains . Eva and Max".split()}
        >>> [bag] = read_multispanqa([row | {"label": "O O O B O B".split()}], negative_share=0)
        >>> bag.steps, bag.step_labels
        (['It rains .', 'Eva and Max'], (0.0, 1.0))
    """
    if not 0 <= negative_share <= 1:
        raise ValueError(f"negative_share is {negative_share}; give a share from 0 to 1.")
    found, source = stream_rows(data, source, key="data")
    rows = list(found)  # the draw needs all rows, and the file is one object anyway
    cut = set(random.Random(seed).sample(range(1, len(rows) + 1), round(negative_share * len(rows))))

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        question, tokens = " ".join(texts(row, "question")), texts(row, "context")
        text, answers = _answer_tokens(tokens, texts(row, "label"))
        steps = sentences(text)
        gold = [int(touches(step, answers)) for step in steps]
        start, end = _longest_run_of_zeros(gold) if number in cut else (0, 0)
        if start < end:
            offset = steps[start][0]
            text, gold = text[offset : steps[end - 1][1]], gold[start:end]
            steps = [(left - offset, right - offset) for left, right in steps[start:end]]
        return [Bag(question, text, tuple(steps), max(gold, default=0), tuple(gold), id=column(row, "id", str))]

    return read_each(rows, source, make, limit=limit)


def _answer_tokens(tokens: Sequence[str], labels: Sequence[str]) -> tuple[str, list[Span]]:
    """The tokens joined by spaces, and the spans of those in an answer."""
    if len(tokens) != len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(tokens)} tokens; give one label for each token.")
    if unknown := set(labels) - {"B", "I", "O"}:
        raise ValueError(f"the labels include {min(unknown, key=str)!r}; give only 'B', 'I' and 'O'.")
    answers, start = [], 0
    for token, label in zip(tokens, labels, strict=True):
        if label != "O":
            answers.append((start, start + len(token)))
        start += len(token) + 1
    return " ".join(tokens), answers


def _longest_run_of_zeros(labels: Sequence[int]) -> Span:
    """The first of the longest runs, (0, 0) if there is none."""
    best, start = (0, 0), 0
    for end, label in enumerate([*labels, 1]):
        if label:
            best = max(best, (start, end), key=lambda run: run[1] - run[0])  # of equals, the earlier
            start = end + 1
    return best
