"""Rows of AquaMuSe: answers to queries as summaries. [`corrupt_summaries`] makes bad ones."""

from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, load_rows, read_each
from fractal_rm.data.sentences import sentences


def read_aquamuse(data: Data, *, source: str | None = None) -> list[Bag]:
    """Bags of AquaMuSe: passages of Wikipedia that answer a query, as summaries of several web pages.

    A row has `query`, `input_urls` and `target`, as on the Hub. The official files hold the same columns as TFRecords,
    which are not read: load the Hub's copy, or write the records as JSON lines. The web pages are not part of the data.

    Label of a step (sentence) and of a response: 1. Bad summaries, with step 0 iff it was changed, come from
    `corrupt_summaries`. Aggregation `"min"`.

    Args:
        data: A `.jsonl` or `.json` file, or rows.
        source: Name of the data in error messages.

    Returns:
        One bag a summary; the prompt is the query.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a value has the wrong type.
        ValueError: If the file cannot be read, or a query or summary is missing.

    Source:
        Kulkarni et al., AQuaMuSe, 2020 (arXiv 2010.12694); github.com/google-research-datasets/aquamuse, which states
        no licence. The features are named as in `google-research-datasets/aquamuse` on the Hub.

    Example:
        >>> [bag] = read_aquamuse([{"query": "what do owls eat", "input_urls": [], "target": "Mice. Also frogs."}])
        >>> bag.steps, bag.label
        (['Mice.', 'Also frogs.'], 1.0)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        response = column(row, "target", str)
        spans = tuple(sentences(response))
        return [Bag(column(row, "query", str), response, spans, 1.0, (1.0,) * len(spans), id=str(number))]

    rows, source = load_rows(data, source)
    return read_each(rows, source, make)
