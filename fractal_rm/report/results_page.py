"""A page with the table of a results file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fractal_rm.report.pages import write_page
from fractal_rm.report.tables import tabulate


def write_results_page(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, metrics: Sequence[str] | None = None, title: str = "Results"
) -> None:
    """Write rows of results as one HTML page that needs nothing but a browser.

    Args:
        path: Where to write the page.
        rows: Rows of `results.jsonl`, in the order in which lines shall appear.
        metrics: Names of the metrics to show, in order. None shows all.
        title: Heading of the page.

    Raises:
        ValueError: If there are no rows, or a metric in `metrics` is in none of them.
        OSError: If the page cannot be written.
    """
    write_page(path, "results.html.j2", title=title, table=tabulate(rows, metrics=metrics))
