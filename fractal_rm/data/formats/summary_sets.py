"""Official files of summaries: WikiCatSum and AquaMuSe. All are good; [`corrupt_summaries`] makes the bad ones."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.files import Data, PathLike, check_file, column, load_rows, read_each, texts
from fractal_rm.data.formats.tfrecord import read_texts
from fractal_rm.data.segmentation import join_steps
from fractal_rm.data.sentences import sentences

# Marks of WikiCatSum's files: between sentences, behind a title, behind a paragraph.
_SENTENCE, _TITLE, _PARAGRAPH = "<SNT>", "<EOT>", "<EOP>"


def read_wikicatsum(data: Data, summaries: PathLike | None = None, *, source: str | None = None) -> list[Bag]:
    """Bags of WikiCatSum: lead sections of Wikipedia articles as summaries of web pages on animals, companies, films.

    Official files of a domain: `train.src` (a line a text: perhaps a title and "<EOT>", paragraphs with "<EOP>" between
    them) and `train.tgt` (a line a summary, "<SNT>" between its sentences), and so for `valid` and `test`. On the Hub,
    in `GEM/wiki_cat_sum`, rows with `title`, `paragraphs` and `summary`, whose `text` is the sentences.

    Label of a step (sentence) and of a response: 1, a person wrote it. Bad summaries, with step 0 iff it was changed,
    come from `corrupt_summaries`. Aggregation `"min"`.

    Args:
        data: The `.src` file, or rows as on the Hub.
        summaries: The `.tgt` file, if `data` is a `.src` file.
        source: Name of the data in error messages.

    Returns:
        One bag a summary; the prompt is title and paragraphs, a line each.

    Raises:
        FileNotFoundError: If a file is not there.
        TypeError: If a value has the wrong type.
        ValueError: If the files do not have one line for the other, or a summary is empty.

    Source:
        Perez-Beltrachini et al., Generating Summaries with Topic Templates, ACL 2019 (arXiv 1906.04687);
        datashare.ed.ac.uk/handle/10283/3368 (CC BY-SA 3.0). The marks are those of the authors' code,
        github.com/lauhaide/WikiCatSum; the files themselves were not at hand.

    Example:
        >>> row = {"title": "owl", "paragraphs": ["Owls hunt."], "summary": {"text": ["It hunts .", "It flies ."]}}
        >>> read_wikicatsum([row])[0].steps
        ['It hunts .', 'It flies .']
    """

    def make(row: Mapping[str, Any], number: int) -> list[Bag]:
        summary = column(row, "summary", (Mapping, list))
        # `datasets` gives a sequence of objects as an object of lists or as a list of objects.
        if isinstance(summary, list):
            summary = {"text": [column(part, "text", str, within="summary.") for part in summary]}
        response, spans = join_steps(texts(summary, "text", within="summary."), " ")
        title = column(row, "title", str) if row.get("title") else None
        prompt = "\n".join([*([title] if title else []), *texts(row, "paragraphs")])
        gold = (1.0,) * len(spans)
        return [Bag(prompt, response, tuple(spans), 1.0, gold, id=str(row.get("gem_id") or number))]

    if summaries is not None:
        if not isinstance(data, str | os.PathLike):
            raise TypeError("Rows bring their own summaries; give `summaries` with a .src file only.")
        source = source or str(data)
        data = _paired_lines(data, summaries)
    rows, source = load_rows(data, source)
    return read_each(rows, source, make)


def _paired_lines(documents: PathLike, summaries: PathLike) -> list[dict[str, Any]]:
    sides = []
    for path in (documents, summaries):
        check_file(Path(path))
        try:
            with Path(path).open(encoding="utf-8", newline="\n") as file:
                sides.append([line.rstrip("\r\n") for line in file])
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8; download it again.") from None
    if len(sides[0]) != len(sides[1]):
        found = f"{documents} has {len(sides[0])} lines and {summaries} {len(sides[1])}"
        raise ValueError(f"{found}; give the two files of one split.")
    rows = []
    for text, summary in zip(*sides, strict=True):
        title, _, body = text.rpartition(_TITLE)
        row = {"title": title.strip(), "paragraphs": _parts(body, _PARAGRAPH)}
        rows.append(row | {"summary": {"text": _parts(summary.replace(_PARAGRAPH, _SENTENCE), _SENTENCE)}})
    return rows


def _parts(text: str, mark: str) -> list[str]:
    return [part.strip() for part in text.split(mark) if part.strip()]


def read_aquamuse(data: Data, *, source: str | None = None) -> list[Bag]:
    """Bags of AquaMuSe: passages of Wikipedia that answer a query, as summaries of several web pages.

    Official files: TFRecords such as `v2/abstractive/dev/release-set-tf-examples-00000-of-00050`, with the features
    `query`, `input_urls` and `target`; on the Hub, rows with these columns. The web pages are not part of the data.

    Label of a step (sentence) and of a response: 1. Bad summaries, with step 0 iff it was changed, come from
    `corrupt_summaries`. Aggregation `"min"`.

    Args:
        data: A TFRecord file, a folder of them (read in the order of their names), a `.jsonl` file, or rows.
        source: Name of the data in error messages.

    Returns:
        One bag a summary; the prompt is the query.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a value has the wrong type.
        ValueError: If a file is damaged, or a query or summary is missing.

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

    if isinstance(data, str | os.PathLike) and not str(data).endswith((".jsonl", ".json", ".gz")):
        source = source or str(data)
        data = _records(Path(data))
    rows, source = load_rows(data, source)
    return read_each(rows, source, make)


def _records(path: Path) -> list[dict[str, Any]]:
    """Records of a file, or of the files of a folder."""
    files = sorted(part for part in path.iterdir() if part.is_file()) if path.is_dir() else [path]
    rows = []
    for file in files:
        check_file(file)
        rows += [{name: texts[0] for name, texts in record.items() if texts} for record in read_texts(file)]
    return rows
