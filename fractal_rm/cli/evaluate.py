"""`fractal-rm evaluate`: labelled responses or a benchmark, one model or two."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fractal_rm.cli.arguments import (
    DATA_DIR_VARIABLE,
    ScoringArguments,
    benchmark_from_hub,
    find_file,
    find_split,
    read_published,
    read_rows,
)
from fractal_rm.cli.checks import (
    check_models,
    check_writable_files,
    load_reward_model,
    number_cell,
    print_table,
    report_contradictions,
    to_json,
)
from fractal_rm.cli.parser import parse
from fractal_rm.data.contradictions import contradictions
from fractal_rm.data.formats.index import check_meaning
from fractal_rm.data.shapes import Columns
from fractal_rm.evaluation.benchmarks import Benchmark, BenchmarkName, as_learned, measure, read_benchmark
from fractal_rm.evaluation.responses import choose_threshold, measure_responses, score_bags
from fractal_rm.evaluation.statistics import as_columns, differences, estimates
from fractal_rm.files import write_atomic
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.reward_training.data import to_bags


@dataclass(kw_only=True)
class EvaluateArguments(ScoringArguments):
    """Arguments of `fractal-rm evaluate`."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Rows with `label` and, where known, `step_labels`: a file, or a data set in `data_dir`; of a "
            "benchmark its official files, or none to take them from the hub."
        },
    )
    benchmark: BenchmarkName | None = field(
        default=None,
        metadata={
            "help": "Judge by the rule of a benchmark; `best_of_n` takes rows of sampled solutions with `prompt`, "
            "`response`, `label` (is it right?) and, for majority votes, `answer`."
        },
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "A second model, judged on the same responses: paired differences."}
    )
    split: str = field(default="test", metadata={"help": "Split, where `data` is the name of a data set."})
    output: str = field(default="metrics.json", metadata={"help": "Where to write the metrics."})
    threshold_file: str | None = field(
        default=None,
        metadata={
            "help": "Other rows with `label`, to choose the threshold on below which a step is called wrong; default: "
            "the threshold that the checkpoint remembers."
        },
    )
    tune_on: Literal["gsm8k", "math", "olympiadbench", "omnimath"] = field(
        default="gsm8k",
        metadata={"help": "processbench: the subset on whose gold labels a second threshold is chosen."},
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "best_of_n: regular expression whose first group is the final answer, where rows have no `answer`."
        },
    )
    outcome_model: str | None = field(
        default=None, metadata={"help": "best_of_n: a model that scores each response as one step, as a control."}
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Refuse rows that contradict each other, and a `threshold_file` with prompts of `data`."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": f"Folder of data sets by name; default: that of the environment's {DATA_DIR_VARIABLE}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("outcome_model", "answer_pattern"):
            if getattr(self, name) is not None and self.benchmark != "best_of_n":
                raise ValueError(f"`{name}` has an effect with `benchmark=best_of_n` only. Leave it out.")
        if self.benchmark is not None and self.columns != Columns():
            raise ValueError("Names of columns have no effect with `benchmark`, which knows its own. Leave them out.")
        if self.dataset_format is not None and self.benchmark is not None:
            raise ValueError("`dataset_format` has no effect with `benchmark`, which reads its own. Leave one out.")
        if self.threshold_file is not None and self.benchmark == "best_of_n":
            raise ValueError("`threshold_file` has no effect with `benchmark=best_of_n`. Leave it out.")


def evaluate(argv: Sequence[str]) -> None:
    """Measure one model, or compare two on the same responses; write `metrics.json` and print a table."""
    (arguments,) = parse("evaluate", [EvaluateArguments], argv)
    check_writable_files(arguments.output)
    check_models(arguments.model, arguments.compare_to, arguments.outcome_model)
    rows, source = _rows(arguments)
    report_contradictions(_shared_rows(arguments, rows, source), strict=arguments.strict)
    names = list(filter(None, (arguments.model, arguments.compare_to)))
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


def _shared_rows(arguments: EvaluateArguments, rows: list[Any], source: str) -> list[str]:
    """A sentence if rows that are measured on are those that the threshold is chosen on."""
    if arguments.threshold_file is None:
        return []
    path = find_file(arguments.threshold_file, arguments.data_dir)
    chosen_on = set(map(repr, read_rows(path, arguments.dataset_format, arguments.limit)))
    both = sum(repr(row) in chosen_on for row in rows)
    told = f"{source}: {both:,} of {len(rows):,} rows are in {path} too, by which the threshold is chosen."
    return [told] if both else []


def _rows(arguments: EvaluateArguments) -> tuple[list[Any], str]:
    """The rows to measure on, and what to call them."""
    if arguments.data is None:
        if arguments.dataset_format is not None:
            return read_published(arguments.dataset_format, arguments.split, arguments.limit)
        if arguments.benchmark is None:
            raise ValueError("There is nothing to measure on. Give `data`, or a `benchmark` that the hub has.")
        return benchmark_from_hub(arguments.benchmark, arguments.limit), f"{arguments.benchmark} (hub)"
    split = find_split(arguments.data, arguments.split, arguments.data_dir)
    path = split or find_file(arguments.data, arguments.data_dir)
    source = f"{arguments.data} ({arguments.split})" if split else path.name
    if path.is_dir():  # official files, one a subset
        ends = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
        files = sorted(file for file in path.iterdir() if file.name.endswith(ends))
        if not files:
            raise FileNotFoundError(f"{path} holds no .json or .jsonl file. Give a file, or a folder of the subsets.")
        return [row for file in files for row in read_rows(file, arguments.dataset_format, arguments.limit)], source
    return read_rows(path, arguments.dataset_format, arguments.limit), source


def _measure(name: str, rows: list[Any], source: str, arguments: EvaluateArguments, *, first: bool) -> Any:
    """What is measured of one model, with the speed of scoring."""
    model = load_reward_model(name, arguments.batch_size, arguments.published if first else None)
    threshold = _threshold(model, arguments)
    if arguments.dataset_format is not None:
        check_meaning(arguments.dataset_format, model.settings.aggregation)
    if arguments.benchmark is None:
        bags = to_bags(rows, model.settings, source=source, columns=arguments.columns)
        if first:
            told = contradictions(bags, meaning(model.settings.aggregation), source=source)
            report_contradictions(told, strict=arguments.strict)
        responses = Benchmark(bags, lambda scored, limit: measure_responses(scored, bags, limit))
        return measure(model, responses, threshold=threshold)
    outcome = None
    if arguments.outcome_model is not None and first:
        outcome = load_reward_model(arguments.outcome_model, arguments.batch_size)
    benchmark = read_benchmark(
        arguments.benchmark,
        rows,
        source=source,
        segmentation=model.segmentation,
        tuned_on=arguments.tune_on,
        answer_pattern=arguments.answer_pattern,
        outcome_model=outcome,
    )
    if benchmark.remark and first:
        print(benchmark.remark, file=sys.stderr)
    return measure(model, benchmark, threshold=threshold)


def _threshold(model: Any, arguments: EvaluateArguments) -> float | None:
    """The threshold chosen on the response labels of another file; None: the one that the model remembers."""
    if arguments.threshold_file is None:
        return None
    path = find_file(arguments.threshold_file, arguments.data_dir)
    rows = read_rows(path, arguments.dataset_format, arguments.limit)
    bags = to_bags(rows, model.settings, source=str(path), columns=arguments.columns)
    scored = score_bags(model, as_learned(model, bags))
    threshold = choose_threshold(scored, bags, aggregation=model.settings.aggregation)
    if math.isnan(threshold):
        raise ValueError(f"None of {len(bags)} responses of {path} could be scored. Give others.")
    return threshold


def _print(source: str, measured: list[Any], found: list[dict[str, Any]], gains: dict[str, Any]) -> None:
    """Counts, then a line a metric: the value with its interval, of two models also the difference."""
    columns = [source] if len(found) == 1 else ["model", "compare_to"]
    counts = dict.fromkeys(name for one in measured for name in one.counts)
    rows = {name: [number_cell(one.counts.get(name)) for one in measured] for name in counts}
    for name in dict.fromkeys(name for values in found for name in values):
        rows[name] = [_interval(values[name]) if name in values else "—" for values in found]
        rows[name] += [_interval(gains[name], signed=True)] if name in gains else []
    print_table([*columns, *(["difference"] if gains else [])], rows)


def _interval(estimate: Any, *, signed: bool = False) -> str:
    if math.isnan(estimate.value):
        return "—"
    sign = "+" if signed else ""
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.value:{sign}.3f}{ends}"
