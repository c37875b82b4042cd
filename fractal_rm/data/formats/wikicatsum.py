"""Official files of WikiCatSum: lead sections of Wikipedia as summaries. [`corrupt_summaries`] makes bad ones."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.reading import Data, check_file, column, load_rows, read_each, texts
from fractal_rm.data.segmentation import join_steps

# Marks of WikiCatSum's files: between sentences, behind a title, behind a paragraph.
_SENTENCE, _TITLE, _PARAGRAPH = "<SNT>", "<EOT>", "<EOP>"


def read_wikicatsum(data: Data, *, source: str | None = None) -> list[Bag]:
    """Bags of WikiCatSum: lead sections of Wikipedia articles as summaries of web pages on animals, companies, films.

    Official files of a domain: `train.src` (a line a text: perhaps a title and "<EOT>", paragraphs with "<EOP>" between
    them) and `train.tgt` (a line a summary, "<SNT>" between its sentences), and so for `valid` and `test`. On the Hub,
    in `GEM/wiki_cat_sum`, rows with `title`, `paragraphs` and `summary`, whose `text` is the sentences.

    Label of a step (sentence) and of a response: 1, a person wrote it. Bad summaries, with step 0 iff it was changed,
    come from `corrupt_summaries`. Aggregation `"min"`.

    Args:
        data: The `.src` file, with the `.tgt` file of the same name beside it; or rows as on the Hub.
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

    if isinstance(data, str | os.PathLike) and Path(data).suffix == ".src":
        source = source or str(data)
        data = _paired_lines(Path(data), Path(data).with_suffix(".tgt"))
    rows, source = load_rows(data, source)
    return read_each(rows, source, make)


def _paired_lines(documents: Path, summaries: Path) -> list[dict[str, Any]]:
    sides = []
    for path in (documents, summaries):
        check_file(path)
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
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
