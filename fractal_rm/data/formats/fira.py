"""Official files of FiRA: snippets of web documents in which people graded and marked what answers a query."""

import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.formats.reading import PathLike, column, csv_rows, touches
from fractal_rm.data.readers import naming
from fractal_rm.data.sentences import sentences

FIRA_GRADES = 4

_LEVEL = re.compile(r"([0-3])(?:_|$)")
_RANGE = re.compile(r"(\d+)-(\d+)")
_NO_RANGES = "<no ranges selected>"


def read_fira(data: PathLike, *, source: str | None = None, limit: int | None = None) -> list[Bag]:
    """Bags of FiRA: snippets of web documents, in which several people graded and marked what answers a query.

    Official files, tab-separated with a header: `fira-trec19-raw-judgements.tsv` (`relevanceLevel` such as
    "2_GOOD_ANSWER", `relevanceCharacterRanges` such as "0-4;6-9", both ends included, or "<no ranges selected>",
    `documentId`, `queryId` and more), `documents.tsv` (`doc_id`, `doc_text`) and `queries.tsv` (`query_id`,
    `query_text`).

    Each judge gives the snippet a grade from 0 to 3. A word gets that grade if the judge marked the word or marked
    nothing at all, and otherwise 0. The grade of a word is the highest over all judges, the grade of a step (sentence)
    is the highest of its words, and the grade of a response is the highest of its steps.

    Args:
        data: File of the judgements, with `documents.tsv` and `queries.tsv` in the same folder.
        source: Name of the judgements in error messages.
        limit: Return at most this many bags, the first ones.

    Returns:
        One bag, with `num_grades` 4, for each judged pair of snippet and query, in the order of the judgements.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If a column, a document or a query is missing, or a grade or range cannot be read. Row 1 is the
            header.

    Source:
        Hofstätter et al., Fine-Grained Relevance Annotations, CIKM 2020 (arXiv 2008.05363);
        github.com/sebastian-hofstaetter/fira-trec-19-dataset (MIT licence). Grades as in FRACTAL (Makhija et al.,
        ACL 2025), whose public code reads only the first range of each judgement; here all ranges are read.
    """
    if not isinstance(data, str | os.PathLike):
        raise TypeError("FiRA is read from three files; give the path of the judgements.")
    judgements, source = Path(data), source or str(data)
    documents, queries = judgements.with_name("documents.tsv"), judgements.with_name("queries.tsv")
    texts = _two_columns(documents, "doc_id", "doc_text")
    questions = _two_columns(queries, "query_id", "query_text")
    graded: dict[tuple[str, str], list[tuple[int, list[Span]]]] = {}
    first_row: dict[tuple[str, str], int] = {}
    for number, row in csv_rows(judgements):
        with naming(source, number):
            pair = column(row, "queryId", str), column(row, "documentId", str)
            for name, known, where in zip(("query", "document"), (questions, texts), (queries, documents), strict=True):
                key = pair[name == "document"]
                if key not in known:
                    raise ValueError(f"{name} {key!r} is not in {where}; give the files of one release.")
            graded.setdefault(pair, []).append(_judgement(row, texts[pair[1]]))
            first_row.setdefault(pair, number)
    if not graded:
        raise ValueError(f"{source} has no rows; give at least one.")
    bags = []
    # Judgements of one snippet may be anywhere in the file, so all rows are read.
    for (query, document), judged in islice(graded.items(), limit):
        with naming(source, first_row[query, document]):
            text = texts[document]
            steps = sentences(text)
            grades = [max((grade for grade, ranges in judged if touches(step, ranges)), default=0) for step in steps]
            name = f"{query}-{document}"
            label = max(grades, default=0)
            bags.append(
                Bag(questions[query], text, tuple(steps), label, tuple(grades), num_grades=FIRA_GRADES, id=name)
            )
    return bags


def _two_columns(path: Path, key: str, value: str) -> dict[str, str]:
    found = {}
    for number, row in csv_rows(path):
        with naming(str(path), number):
            found[column(row, key, str)] = column(row, value, str)
    return found


def _judgement(row: Mapping[str, Any], text: str) -> tuple[int, list[Span]]:
    """The grade of a judgement, and the characters that it covers."""
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
    """Index of the character at a UTF-16 unit: the annotation tool ran in a browser, which counts UTF-16 units."""
    return len(text.encode("utf-16-le")[: 2 * unit].decode("utf-16-le", "ignore"))
