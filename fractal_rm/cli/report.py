"""`fractal-rm report`: tables from rows of results.jsonl, or curves from runs of PPO."""

import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fractal_rm.cli.checks import check_matplotlib, check_own_files, writing_files
from fractal_rm.cli.options.parser import parse
from fractal_rm.evaluation.results import read_results
from fractal_rm.files import write_atomic
from fractal_rm.report.tables import markdown_table, write_results_page
from fractal_rm.report.training_history import read_runs
from fractal_rm.report.training_report import save_training_figure, write_training_report


@dataclass
class ReportArguments:
    """Arguments of `fractal-rm report`."""

    results: str | None = field(default=None, metadata={"help": "A `results.jsonl`, for tables. Give this or `runs`."})
    runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "PPO runs, for their curves: each DIR or NAME=DIR. DIR is the `output_dir` of `fractal-rm ppo` or "
            "a checkpoint; runs with the same NAME, such as seeds, become a mean with an interval."
        },
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Output file: .html, or for results also .md. Results without it are printed."},
    )
    figure: str | None = field(
        default=None, metadata={"help": "With `runs`: save the curves as a picture, .png or .svg."}
    )
    metrics: list[str] | None = field(
        default=None, metadata={"help": "With `results`: metrics to show, in this order; default: all."}
    )
    title: str | None = field(default=None, metadata={"help": "Heading; default: `Results` or `Training`."})

    def __post_init__(self) -> None:
        check_own_files(results=self.results, output=self.output, figure=self.figure)
        if (self.results is None) == (self.runs is None):
            raise ValueError("Give either `results`, a results.jsonl for tables, or `runs`, folders for curves.")
        for name, needs in (("figure", "runs"), ("metrics", "results")):
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(f"`{name}` has an effect only with `{needs}`. Leave it out.")
        if self.runs is not None and self.output is None and self.figure is None:
            raise ValueError(
                "`runs` become a page or a picture. Give `output` (.html), `figure` (.png or .svg), or both."
            )
        endings = (".html",) if self.runs is not None else (".md", ".html")
        if self.output is not None and not self.output.endswith(endings):
            raise ValueError(f"`output` is {self.output}. Give a name that ends in {' or '.join(endings)}.")
        if self.figure is not None and not self.figure.endswith((".png", ".svg")):
            raise ValueError(f"`figure` is {self.figure}. Give a name that ends in .png or .svg.")


def report(argv: Sequence[str]) -> None:
    """Write the page, picture or table that the arguments request."""
    (arguments,) = parse("report", [ReportArguments], argv)
    with writing_files(arguments.output, arguments.figure):
        if arguments.runs is not None:
            _report_runs(arguments.runs, arguments.output, arguments.figure, arguments.title or "Training")
        else:
            _report_results(arguments.results, arguments.output, arguments.metrics, arguments.title or "Results")


def _report_runs(entries: list[str], output: str | None, figure: str | None, title: str) -> None:
    check_matplotlib()  # before the work, not after
    runs = read_runs(entries)
    if output is not None:
        write_training_report(output, runs, title=title)
    if figure is not None:
        save_training_figure(figure, runs)
    print(f"Wrote {' and '.join(filter(None, (output, figure)))}.")


def _report_results(results: str, output: str | None, metrics: list[str] | None, title: str) -> None:
    if not Path(results).is_file():
        raise FileNotFoundError(f"There is no file {results}. Give the path of a results.jsonl.")
    rows = read_results(results)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("metrics"), dict):
            raise ValueError(f"{results}, row {number} holds no metrics. Give rows that this package wrote.")
        for name, value in row["metrics"].items():
            # Others become floats, which hold no integer of hundreds of digits.
            if not (value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)):
                shown = reprlib.repr(value)
                raise ValueError(f"{results}, row {number}: the metric {name!r} is {shown}. Give a number, or null.")
    table = markdown_table(rows, metrics=metrics)
    if output is None:
        print(table)
        return
    if output.endswith(".md"):
        write_atomic(output, f"# {title}\n\n{table}\n")
    else:
        write_results_page(output, rows, metrics=metrics, title=title)
    print(f"{output} holds the table.")
