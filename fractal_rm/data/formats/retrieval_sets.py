"""Official files of retrieval: FiRA and MultiSpanQA.

A response is as relevant as its most relevant step: aggregation `"max"`.
"""

import csv
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.files import Data, PathLike, check_file, column, load_rows, read_each, texts
from fractal_rm.data.readers import naming
from fractal_rm.data.segmentation import Span
from fractal_rm.data.sentences import sentences

FIRA_GRADES = 4

_LEVEL = re.compile(r"([0-3])(?:_|$)")
_RANGE = re.compile(r"(\d+)-(\d+)")
_NO_RANGES = "<no ranges selected>"


def read_fira(judgements: PathLike, documents: PathLike, queries: PathLike) -> list[Bag]:
    """Bags of FiRA: snippets of web documents, in which several people graded and marked what answers a query.

    Official files, tab-separated with a header: `fira-trec19-raw-judgements.tsv` (`relevanceLevel` such as
    "2_GOOD_ANSWER", `relevanceCharacterRanges` such as "0-4;6-9", both ends included, or "<no ranges selected>",
    `documentId`, `queryId` and more), `documents.tsv` (`doc_id`, `doc_text`) and `queries.tsv` (`query_id`,
    `query_text`).

    From each judge, a word gets the snippet's grade, 0 to 3, if the judge marked the word or marked nothing, else 0.
    The grade of a word is the highest that any judge gives it, that of a step (sentence) the highest of its words, that
    of a response the highest of its steps.

    Args:
        judgements: File of the judgements.
        documents: File of the snippets.
        queries: File of the queries.

    Returns:
        One bag, with `num_grades` 4, for each snippet and query that was judged, in the order of the judgements.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a column, a document or a query is missing, or a grade or range cannot be read. Row 1 is the
            header.

    Source:
        Hofstätter et al., Fine-Grained Relevance Annotations, CIKM 2020 (arXiv 2008.05363);
        github.com/sebastian-hofstaetter/fira-trec-19-dataset (MIT licence). Grades as in FRACTAL (Makhija et al.,
        ACL 2025), which reads only the first range of each judgement in its public code; all are read here.
    """
    texts = _two_columns(documents, "doc_id", "doc_text")
    questions = _two_columns(queries, "query_id", "query_text")
    graded: dict[tuple[str, str], list[tuple[int, list[Span]]]] = {}
    first_row: dict[tuple[str, str], int] = {}
    for number, row in _table(judgements):
        with naming(str(judgements), number):
            pair = column(row, "queryId", str), column(row, "documentId", str)
            for name, known, where in zip(("query", "document"), (questions, texts), (queries, documents), strict=True):
                key = pair[name == "document"]
                if key not in known:
                    raise ValueError(f"{name} {key!r} is not in {where}; give the files of one release.")
            graded.setdefault(pair, []).append(_judgement(row, texts[pair[1]]))
            first_row.setdefault(pair, number)
    if not graded:
        raise ValueError(f"{judgements} has no rows; give at least one.")
    bags = []
    for (query, document), judged in graded.items():
        with naming(str(judgements), first_row[query, document]):
            text = texts[document]
            steps = sentences(text)
            grades = [max((grade for grade, ranges in judged if _touches(step, ranges)), default=0) for step in steps]
            name = f"{query}-{document}"
            label = max(grades, default=0)
            bags.append(
                Bag(questions[query], text, tuple(steps), label, tuple(grades), num_grades=FIRA_GRADES, id=name)
            )
    return bags


def _table(path: PathLike) -> list[tuple[int, dict[str, str]]]:
    """Rows of a tab-separated file by the names of its header, with their numbers; the header is row 1."""
    check_file(Path(path))
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is no tab-separated file in UTF-8; download it again.") from None
    return list(enumerate(rows, 2))


def _two_columns(path: PathLike, key: str, value: str) -> dict[str, str]:
    found = {}
    for number, row in _table(path):
        with naming(str(path), number):
            found[column(row, key, str)] = column(row, value, str)
    return found


def _judgement(row: Mapping[str, Any], text: str) -> tuple[int, list[Span]]:
    """The grade of a judgement and the characters it is about."""
    level, ranges = column(row, "relevanceLevel", str), column(row, "relevanceCharacterRanges", str)
    grade = _LEVEL.match(level)
    if grade is None:
        raise ValueError(f"relevanceLevel is {level!r}; give a grade from 0 to 3, such as '2_GOOD_ANSWER'.")
    if ranges in (_NO_RANGES, ""):
        return int(grade[1]), [(0, len(text))]
    spans = []
    for part in ranges.split(";"):
        found = _RANGE.fullmatch(part.strip())
        if found is None or int(found[1]) > int(found[2]):
            raise ValueError(f"relevanceCharacterRanges has {part!r}; give ranges such as '0-4;6-9'.")
        spans.append((_character(text, int(found[1])), _character(text, int(found[2]) + 1)))
        if spans[-1][0] >= len(text):
            raise ValueError(f"range {part!r} is outside the document; give the files of one release.")
    return int(grade[1]), spans


def _character(text: str, unit: int) -> int:
    """Where a UTF-16 unit lies in a text: the annotation tool ran in a browser, which counts these."""
    return len(text.encode("utf-16-le")[: 2 * unit].decode("utf-16-le", "ignore"))


def _touches(step: Span, ranges: Sequence[Span]) -> bool:
    return any(start < step[1] and end > step[0] for start, end in ranges)


def read_multispanqa(data: Data, *, source: str | None = None, negative_share: float = 0.5, seed: int = 0) -> list[Bag]:
    """Bags of MultiSpanQA: paragraphs in which the spans that answer a question are marked, some cut to hold none.

    Official files: `train.json` and `valid.json`, an object with the list `data`. A row has `id`, `question` and
    `context` (lists of tokens) and `label` ("B", "I" or "O" a token). The hidden `test.json` has no labels.

    The response is the tokens joined by spaces. Label of a step (sentence): 1 iff it holds a token that is not "O".
    Label of a response: 1 iff a step is 1. A share of the rows become negative: they are cut to their longest run of
    sentences without any answer token. A row without such a sentence stays as it is, so slightly fewer are negative.
    Negative responses are shorter: report what length alone achieves.

    Args:
        data: A file, or rows.
        source: Name of the data in error messages.
        negative_share: Share of the rows to cut; 0.5 as in FRACTAL.
        seed: Draws these rows.

    Returns:
        One bag a row.

    Raises:
        TypeError: If a value has the wrong type.
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
    rows, source = load_rows(data, source, key="data")
    cut = set(random.Random(seed).sample(range(1, len(rows) + 1), round(negative_share * len(rows))))

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        question, tokens = " ".join(texts(row, "question")), texts(row, "context")
        text, answers = _answer_tokens(tokens, texts(row, "label"))
        steps = sentences(text)
        gold = [int(_touches(step, answers)) for step in steps]
        start, end = _longest_run_of_zeros(gold) if number in cut else (0, 0)
        if start < end:
            offset = steps[start][0]
            text, gold = text[offset : steps[end - 1][1]], gold[start:end]
            steps = [(left - offset, right - offset) for left, right in steps[start:end]]
        return [Bag(question, text, tuple(steps), max(gold, default=0), tuple(gold), id=column(row, "id", str))]

    return read_each(rows, source, make)


def _answer_tokens(tokens: Sequence[str], labels: Sequence[str]) -> tuple[str, list[Span]]:
    """The tokens joined by spaces, and the spans of those in an answer."""
    if len(tokens) != len(labels):
        raise ValueError(f"there are {len(labels)} labels for {len(tokens)} tokens; give one each.")
    if unknown := set(labels) - {"B", "I", "O"}:
        raise ValueError(f"the labels hold {min(unknown, key=str)!r}; give 'B', 'I' and 'O'.")
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
