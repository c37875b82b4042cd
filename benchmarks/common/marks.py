"""Tables in documents, each between two marks."""


def replace_table(document: str, name: str, table: str) -> str:
    """Put a table between its two marks in a document: `<!-- table: name -->` and `<!-- end of table: name -->`.

    Raises:
        ValueError: If the document does not hold the two marks exactly once, in this order.

    Example:
        >>> replace_table("<!-- table: a -->old<!-- end of table: a -->", "a", "new")
        '<!-- table: a -->\\nnew\\n<!-- end of table: a -->'
    """
    start, end = f"<!-- table: {name} -->", f"<!-- end of table: {name} -->"
    if document.count(start) != 1 or document.count(end) != 1 or document.index(end) < document.index(start):
        raise ValueError(f"The document needs the line {start!r} once and, below it, {end!r} once. Add them.")
    before, rest = document.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
