"""`fractal-rm evaluate`: labelled responses or a benchmark, one model or two."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fractal_rm.cli.arguments import EvaluateArguments
from fractal_rm.cli.checks import check_model, check_writable_file, load_reward_model, to_json
from fractal_rm.cli.data_files import find_file, find_split
from fractal_rm.cli.parser import parse


def evaluate(argv: Sequence[str]) -> None:
    """Measure one model, or compare two on the same responses; write `metrics.json` and print a table.

    Args:
        argv: Arguments of the command.

    Raises:
        OSError: If a file or folder is not there or cannot be written.
        TypeError: If a value of a row has the wrong type.
        ValueError: If an argument, a model or a row is wrong.
    """
    (arguments,) = parse("evaluate", [EvaluateArguments], argv)
    check_writable_file(arguments.output)
    for model in (arguments.model, arguments.compare_to, arguments.outcome_model):
        if model is not None:
            check_model(model)
    rows, source = _rows(arguments)
    from fractal_rm.evaluation.statistics import as_columns, differences, estimates
    from fractal_rm.files import write_atomic

    names = [arguments.model, *([arguments.compare_to] if arguments.compare_to is not None else [])]
    measured = [_measure(name, rows, source, arguments, first=i == 0) for i, name in enumerate(names)]
    found = [estimates(one) for one in measured]
    written = [{**one.counts, **as_columns(values), **one.curves} for one, values in zip(measured, found, strict=True)]
    record: dict[str, Any] = {"benchmark": arguments.benchmark, "data": source, "model": arguments.model, **written[0]}
    gains = differences(*measured) if len(measured) == 2 else {}
    if gains:
        record["compare_to"] = {"model": arguments.compare_to, **written[1]}
        record["difference"] = as_columns(gains)
    write_atomic(arguments.output, to_json(record))
    _print(source, measured, found, gains)
    print(f"{arguments.output} holds these numbers.")


def _rows(arguments: EvaluateArguments) -> tuple[list[Any], str]:
    """The rows to measure on, and what to call them."""
    from fractal_rm.data.readers import read_jsonl

    if arguments.data is None:
        if arguments.benchmark is None:
            raise ValueError("There is nothing to measure on. Give `data`, or a `benchmark` that the hub has.")
        from fractal_rm.evaluation.benchmarks import rows_from_hub

        return rows_from_hub(arguments.benchmark, limit=arguments.limit), f"{arguments.benchmark} (hub)"
    split = find_split(arguments.data, arguments.split, arguments.data_dir)
    path = split or find_file(arguments.data, arguments.data_dir)
    source = f"{arguments.data} ({arguments.split})" if split else path.name
    if path.is_dir():  # official files, one a subset
        ends = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
        files = sorted(file for file in path.iterdir() if file.name.endswith(ends))
        if not files:
            raise FileNotFoundError(f"{path} holds no .json or .jsonl file. Give a file, or a folder of the subsets.")
        return [row for file in files for row in read_jsonl(file)[: arguments.limit]], source
    return read_jsonl(path)[: arguments.limit], source


def _measure(name: str, rows: list[Any], source: str, arguments: EvaluateArguments, *, first: bool) -> Any:
    """What is measured of one model, with the speed of scoring."""
    from fractal_rm.evaluation.benchmarks import Task, measure, read_task
    from fractal_rm.evaluation.responses import measure_responses
    from fractal_rm.reward_training.data import to_bags

    model = load_reward_model(name, arguments.batch_size)
    threshold = _threshold(model, arguments)
    if arguments.benchmark is None:
        bags = to_bags(rows, model.settings, source=source)
        task = Task(bags, lambda scored, limit: measure_responses(scored, bags, limit))
        return measure(model, task, threshold=threshold)
    outcome = None
    if arguments.outcome_model is not None and first:
        outcome = load_reward_model(arguments.outcome_model, arguments.batch_size)
    task = read_task(
        arguments.benchmark,
        rows,
        source=source,
        segmentation=model.segmentation,
        tuned_on=arguments.tune_on,
        answer_pattern=arguments.answer_pattern,
        outcome_model=outcome,
    )
    if task.remark and first:
        print(task.remark, file=sys.stderr)
    return measure(model, task, threshold=threshold)


def _threshold(model: Any, arguments: EvaluateArguments) -> float | None:
    """The threshold chosen on the response labels of another file; None: the one that the model remembers."""
    if arguments.threshold_file is None:
        return None
    from fractal_rm.data.readers import read_jsonl
    from fractal_rm.evaluation.benchmarks import as_learned
    from fractal_rm.evaluation.responses import choose_threshold, score_bags
    from fractal_rm.reward_training.data import to_bags

    path = find_file(arguments.threshold_file, arguments.data_dir)
    bags = to_bags(read_jsonl(path)[: arguments.limit], model.settings, source=str(path))
    scored = score_bags(model, as_learned(model, bags))
    threshold = choose_threshold(scored, bags, aggregation=model.settings.aggregation)
    if math.isnan(threshold):
        raise ValueError(f"None of {len(bags)} responses of {path} could be scored. Give others.")
    return threshold


def _print(source: str, measured: list[Any], found: list[dict[str, Any]], gains: dict[str, Any]) -> None:
    """Counts, then a line a metric: the value with its interval, of two models also the difference."""
    table = Table()
    table.add_column("metric")
    columns = [source] if len(found) == 1 else ["model", "compare_to"]
    for column in (*columns, *(["difference"] if gains else [])):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(name for one in measured for name in one.counts):
        cells = [_count(one.counts.get(name)) for one in measured]
        table.add_row(name, *cells, *([""] if gains else []))
    for name in dict.fromkeys(name for values in found for name in values):
        cells = [_interval(values[name]) if name in values else "—" for values in found]
        table.add_row(name, *cells, *([_interval(gains[name], signed=True)] if name in gains else []))
    Console().print(table, markup=False)


def _count(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _interval(estimate: Any, *, signed: bool = False) -> str:
    if math.isnan(estimate.value):
        return "—"
    sign = "+" if signed else ""
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.value:{sign}.3f}{ends}"
