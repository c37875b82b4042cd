"""Official files of QA-Feedback: sentences marked as irrelevant, and preferences between answers."""

from collections.abc import Mapping
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, column, read_each, stream_rows, touches
from fractal_rm.data.sentences import sentences

_ERROR_TYPE = "Irrelevant"
# The pairs of predictions that a row compares, in the order of its column `preference`.
_PAIRS = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))


def read_qa_feedback(data: Data, *, source: str | None = None, limit: int | None = None) -> list[Bag]:
    """Bags of QA-Feedback, fine-grained: long answers in which people marked spans with errors.

    Official files: `train_feedback.json` and `dev_feedback.json`. A row has `question`, `passages` (each a title, then
    sentences), `prediction 1` (the only answer that was marked) and `feedback.errors`: spans with `error type`, `start`
    and `end` (characters, the end excluded).

    Label of a step (sentence): 0 iff a span of the type "Irrelevant" overlaps it; other types count as good. Label of a
    response: the share of good steps (aggregation `"mean"`).

    Returns:
        One bag for each row. The prompt is the question followed by the passages; the id is the number of the row.

    Raises:
        ValueError: If a column is missing, or a span is empty or outside the answer.

    Source:
        Wu et al., Fine-Grained Human Feedback, NeurIPS 2023 (arXiv 2306.01693); github.com/allenai/FineGrainedRLHF
        (Apache-2.0). Labels as in FRACTAL (Makhija et al., ACL 2025).

    Example:
        >>> error = {"error type": "Irrelevant", "start": 9, "end": 13}
        >>> row = {"question": "Who?", "passages": [], "prediction 1": "Eva did. Max sat."}
        >>> read_qa_feedback([row | {"feedback": {"errors": [error]}}])[0].step_labels
        (1.0, 0.0)
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        response = column(row, "prediction 1", str)
        feedback = column(row, "feedback", Mapping)
        spans = [_span(error, response) for error in column(feedback, "errors", list, within="feedback.")]
        irrelevant = [(start, end) for kind, start, end in spans if kind == _ERROR_TYPE]
        steps = sentences(response)
        gold = [float(not touches(step, irrelevant)) for step in steps]
        label = sum(gold) / len(gold) if gold else None  # a bag refuses an answer without steps
        return [Bag(_prompt(row), response, tuple(steps), label, tuple(gold), id=str(number))]

    return read_each(data, source, make, limit=limit)


def _span(error: Mapping[str, Any], response: str) -> tuple[str, int, int]:
    start, end = (column(error, name, int, within="feedback.errors.") for name in ("start", "end"))
    if not 0 <= start < end <= len(response):
        found = f"{start} to {end}"
        raise ValueError(f"the span {found} is empty or outside the answer of {len(response)} characters; drop it.")
    return column(error, "error type", str, within="feedback.errors."), start, end


def _prompt(row: Mapping[str, Any]) -> str:
    """The question, then each passage on a separate line after its title, with white space reduced to one space."""
    parts = [column(row, "question", str)]
    for number, passage in enumerate(column(row, "passages", list), 1):
        if not isinstance(passage, list) or not passage or not all(isinstance(text, str) for text in passage):
            raise TypeError(f"passage {number} is not a list of a title and sentences; give the official columns.")
        title, *text = passage
        parts.append(f"[{title}] {' '.join(' '.join(text).split())}")
    return "\n\n".join(parts)


def read_qa_preferences(data: Data, *, source: str | None = None, limit: int | None = None) -> list[Bag]:
    """Bags of QA-Feedback, preferences: which of two answers to a question people prefer.

    Official files and columns: as in [`read_qa_feedback`], with `prediction 1` to `prediction 4`, and `preference`: one
    number for each of the pairs 1-2, 1-3, 1-4, 2-3, 2-4, 3-4, which is 1 if the first answer is better, 2 if the second
    is, and 0 for a tie.

    Label of a response: 1 for the chosen and 0 for the rejected answer of a pair; ties are left out. Steps have no
    labels. Aggregation `"mean"`.

    Returns:
        Two bags with one `pair_id` for each comparison, the chosen answer first. The id is the row and the answer.

    Raises:
        ValueError: If a column is missing, or `preference` is not six numbers from 0 to 2.

    Source:
        As in [`read_qa_feedback`], with the same licence.

    Example:
        >>> row = {"question": "Who?", "passages": [], "preference": [2, 0, 0, 0, 0, 0]}
        >>> row |= {f"prediction {number}": f"Answer {number}." for number in range(1, 5)}
        >>> [(bag.response, bag.label) for bag in read_qa_preferences([row])]
        [('Answer 2.', 1.0), ('Answer 1.', 0.0)]
    """
    rows, source = stream_rows(data, source)

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        preferences = column(row, "preference", list)
        if len(preferences) != len(_PAIRS) or any(preferred not in (0, 1, 2) for preferred in preferences):
            raise ValueError(f"preference is {preferences}; give 0, 1 or 2 for each of the {len(_PAIRS)} pairs.")
        prompt, bags = _prompt(row), []
        for pair, preferred in zip(_PAIRS, preferences, strict=True):
            if preferred == 0:
                continue
            chosen, rejected = pair if preferred == 1 else pair[::-1]
            for answer, label in ((chosen, 1.0), (rejected, 0.0)):
                response = column(row, f"prediction {answer}", str)
                steps, pair_id = tuple(sentences(response)), f"{source}:{number}:{pair[0]}-{pair[1]}"
                bags.append(Bag(prompt, response, steps, label, id=f"{number}-{answer}", pair_id=pair_id))
        return bags

    return read_each(rows, source, make, limit=limit)
