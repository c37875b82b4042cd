"""Tables from rows of `results.jsonl`: one line per arm, the mean over seeds, as Markdown or as a page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from fractal_rm.report.pages import write_page

GROUP_COLUMNS = ("benchmark", "arm", "dataset", "split")
MISSING = "—"


class Table(NamedTuple):
    """Header and cells of a table, as text."""

    header: list[str]
    cells: list[list[str]]  # one list per row, as long as the header
    numeric: int  # number of columns with numbers, counted from the right


def tabulate(rows: Iterable[Mapping[str, Any]], *, metrics: Sequence[str] | None = None) -> Table:
    """Gather rows of results into one line for each benchmark, arm, data set and split, in order of first appearance.

    Rows that differ only in the seed are averaged, with their standard deviation, and with the number of seeds where
    some lack a value. The file is append-only: of two rows with the same seed the later one counts. Grouping columns
    with the same value in every row are left out, except the arm. A metric that is missing, null or not finite shows as
    a dash.

    `metrics` are the names to show, in order; None: all, in order of first appearance. Raises ValueError if there are
    no rows, or no row has one of these metrics.

    Example:
        >>> rows = [{"arm": "outcome", "seed": seed, "metrics": {"accuracy": a}} for seed, a in ((0, 0.8), (1, 0.9))]
        >>> tabulate(rows)
        Table(header=['arm', 'seeds', 'accuracy'], cells=[['outcome', '2', '0.850 ± 0.071']], numeric=2)
    """
    rows = list(rows)
    if not rows:
        raise ValueError("There are no rows of results to tabulate. Run the command that writes them first.")
    present = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    chosen = present if metrics is None else list(metrics)
    unknown = [name for name in chosen if name not in present]
    if unknown:
        raise ValueError(f"No row has the metric {unknown[0]!r}. Choose from {present}.")
    columns = [
        column
        for column in GROUP_COLUMNS
        if any(column in row for row in rows) and (column == "arm" or len({str(row.get(column)) for row in rows}) > 1)
    ]
    groups: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_seed = groups.setdefault(tuple(_name(row.get(column)) for column in columns), {})
        by_seed[str(row.get("seed"))] = row["metrics"]
    show_seeds = any(len(by_seed) > 1 for by_seed in groups.values())
    cells = [
        [
            *key,
            *([str(len(by_seed))] if show_seeds else []),
            *(_mean([measured.get(name) for measured in by_seed.values()]) for name in chosen),
        ]
        for key, by_seed in groups.items()
    ]
    header = [*columns, *(["seeds"] if show_seeds else []), *chosen]
    return Table(header, cells, len(chosen) + show_seeds)


def markdown_table(rows: Iterable[Mapping[str, Any]], *, metrics: Sequence[str] | None = None) -> str:
    """The table of [`tabulate`] as Markdown, numbers aligned right, without a newline at the end.

    Example:
        >>> print(markdown_table([{"arm": "outcome", "seed": 0, "metrics": {"accuracy": 0.8, "rollouts": 4096}}]))
        | arm | accuracy | rollouts |
        |---|---:|---:|
        | outcome | 0.800 | 4,096 |
    """
    table = tabulate(rows, metrics=metrics)
    rules = ["---"] * (len(table.header) - table.numeric) + ["---:"] * table.numeric
    lines = [_markdown_line(table.header), f"|{'|'.join(rules)}|", *map(_markdown_line, table.cells)]
    return "\n".join(lines)


def write_results_page(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, metrics: Sequence[str] | None = None, title: str = "Results"
) -> None:
    """The table of [`tabulate`] as one HTML page that needs only a browser."""
    write_page(path, "results.html.j2", title=title, table=tabulate(rows, metrics=metrics))


def format_number(value: float | int | None) -> str:
    """A number as tables and pages show it.

    Counts have commas, measurements three decimals (four significant digits from 100 on); None is a dash.

    Example:
        >>> format_number(4096), format_number(0.98765), format_number(1234.5), format_number(None)
        ('4,096', '0.988', '1,234', '—')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _mean(values: Sequence[float | int | None]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return MISSING
    mean = format_number(known[0] if len(set(known)) == 1 else fmean(known))
    spread = f" ± {format_number(stdev(known))}" if len(set(known)) > 1 else ""
    count = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return mean + spread + count


def _name(value: Any) -> str:
    return MISSING if value is None else str(value)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"
