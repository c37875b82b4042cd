"""`fractal-rm evaluate`: labelled responses or a benchmark, one model or two."""

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fractal_rm.cli.checks import (
    check_models,
    check_own_files,
    kept_beside,
    load_reward_model,
    number_cell,
    print_table,
    report_contradictions,
    to_json,
    writing_files,
)
from fractal_rm.cli.options.arguments import (
    DATA_DIR_VARIABLE,
    ScoringArguments,
    benchmark_from_hub,
    find_file,
    find_split,
    read_official,
    read_rows,
)
from fractal_rm.cli.options.parser import parse
from fractal_rm.data.bag import Bag
from fractal_rm.data.contradictions import contradictions
from fractal_rm.data.formats.index import check_meaning
from fractal_rm.data.readers import JSON_ENDINGS
from fractal_rm.data.rows import has_ending
from fractal_rm.data.segmentation import warn_of_uncut_responses
from fractal_rm.data.shapes import Columns
from fractal_rm.evaluation.benchmarks import SPEED, Benchmark, BenchmarkName, as_learned, measure, read_benchmark
from fractal_rm.evaluation.intervals import Measurement, as_columns, differences, estimates
from fractal_rm.evaluation.responses import choose_threshold, measure_responses, score_bags
from fractal_rm.files import write_atomic
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.reward_training.data import to_bags


@dataclass(kw_only=True)
class EvaluateArguments(ScoringArguments):
    """Arguments of `fractal-rm evaluate`."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Labelled rows: a file, or a data set in `data_dir`. They have `label` and, if known, "
            "`step_labels`. A benchmark takes its official files, or loads them from the hub."
        },
    )
    benchmark: BenchmarkName | None = field(
        default=None,
        metadata={
            "help": "Benchmark whose rule is used. `best_of_n` takes sampled solutions with `prompt`, `response`, "
            "`label` (is it right?) and, for majority votes, `answer`."
        },
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "A second model on the same responses, for paired differences."}
    )
    split: str = field(default="test", metadata={"help": "Split, if `data` names a data set."})
    limit: int | None = field(default=None, metadata={"help": "At most this many rows, drawn at random with `seed`."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows that `limit` draws."})
    output: str = field(
        default="metrics.json",
        metadata={"help": "File of the metrics. A stopped run continues from OUTPUT.part."},
    )
    threshold_file: str | None = field(
        default=None,
        metadata={
            "help": "Other labelled rows, to choose the threshold on. A step that scores below it is called wrong; "
            "default: the threshold stored in the checkpoint."
        },
    )
    tune_on: Literal["gsm8k", "math", "olympiadbench", "omnimath"] = field(
        default="gsm8k",
        metadata={"help": "Subset of processbench whose gold labels choose a second threshold."},
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "best_of_n: regular expression for the final answer (its first group), if rows have no `answer`."
        },
    )
    outcome_model: str | None = field(
        default=None, metadata={"help": "best_of_n: control that scores responses as one step."}
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Refuse rows that contradict each other, and a `threshold_file` with prompts of `data`."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": f"Folder that holds data sets by name; default: the environment variable {DATA_DIR_VARIABLE}."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_own_files(data=self.data, output=self.output)
        check_own_files(threshold_file=self.threshold_file, output=self.output)
        if self.tune_on != "gsm8k" and self.benchmark != "processbench":
            raise ValueError("`tune_on` has an effect only with `benchmark=processbench`. Leave it out.")
        for name in ("outcome_model", "answer_pattern"):
            if getattr(self, name) is not None and self.benchmark != "best_of_n":
                raise ValueError(f"`{name}` has an effect only with `benchmark=best_of_n`. Leave it out.")
        if self.benchmark is not None and self.columns != Columns():
            raise ValueError("Column names have no effect with `benchmark`, which fixes them. Leave them out.")
        if self.dataset_format is not None and self.benchmark is not None:
            raise ValueError("`dataset_format` has no effect with `benchmark`, which fixes it. Leave one out.")
        if self.threshold_file is not None and self.benchmark == "best_of_n":
            raise ValueError("`threshold_file` has no effect with `benchmark=best_of_n`. Leave it out.")


def evaluate(argv: Sequence[str]) -> None:
    """Measure one model, or compare two on the same responses; write `metrics.json` and print a table."""
    (arguments,) = parse("evaluate", [EvaluateArguments], argv)
    with writing_files(arguments.output):
        _measure_all(arguments)


def _measure_all(arguments: EvaluateArguments) -> None:
    check_models(arguments.model, arguments.compare_to, arguments.outcome_model)
    rows, source = _rows(arguments)
    report_contradictions(_shared_rows(arguments, rows, source), strict=arguments.strict)
    names = list(filter(None, (arguments.model, arguments.compare_to)))
    measured, bags = [], []
    for i, name in enumerate(names):
        one, bags = _measure(name, rows, source, arguments, first=i == 0)
        measured.append(one)
    found = [estimates(one) for one in measured]
    written = [{**one.counts, **as_columns(values), **one.curves} for one, values in zip(measured, found, strict=True)]
    record: dict[str, Any] = {"benchmark": arguments.benchmark, "data": source, "model": arguments.model, **written[0]}
    gains = differences(*measured) if len(measured) == 2 else {}
    if gains:
        record["compare_to"] = {"model": arguments.compare_to, **written[1]}
        record["difference"] = as_columns(gains)
    write_atomic(arguments.output, to_json(record))
    if (kept := kept_beside(arguments.output)) is not None:
        kept.unlink(missing_ok=True)
    _print(source, measured, found, gains)
    for sentence in why_absent(found[0], bags) if arguments.benchmark is None else ():
        print(sentence)
    print(f"{arguments.output} holds these numbers.")


def _shared_rows(arguments: EvaluateArguments, rows: list[Any], source: str) -> list[str]:
    """A sentence if evaluation rows are also used to choose the threshold."""
    if arguments.threshold_file is None:
        return []
    path = find_file(arguments.threshold_file, arguments.data_dir)
    chosen_on = set(map(repr, read_rows(path, arguments.dataset_format, arguments.limit)))
    both = sum(repr(row) in chosen_on for row in rows)
    told = f"{source}: {both:,} of {len(rows):,} rows are also in {path}, on which the threshold is chosen."
    return [told] if both else []


def _rows(arguments: EvaluateArguments) -> tuple[list[Any], str]:
    """The rows to evaluate, and their name in messages."""

    def drawn(rows: Sequence[Any]) -> list[Any]:
        return draw(rows, arguments.limit, arguments.seed, whole_prompts=arguments.benchmark == "best_of_n")

    if arguments.data is None:
        if arguments.dataset_format is not None:
            rows, source = read_official(arguments.dataset_format, arguments.split)
            return drawn(rows), source
        if arguments.benchmark is None:
            raise ValueError("There is no data to evaluate on. Give `data`, or a `benchmark` that the hub has.")
        subsets = benchmark_from_hub(arguments.benchmark)
        return [row for rows in subsets for row in drawn(rows)], f"{arguments.benchmark} (hub)"
    split = find_split(arguments.data, arguments.split, arguments.data_dir)
    if split is None and arguments.split != "test":
        raise ValueError(
            f"`split` is {arguments.split!r}, but `data_dir` has no such split of {arguments.data}. Leave `split` out "
            "if `data` is a file."
        )
    path = split or find_file(arguments.data, arguments.data_dir)
    source = f"{arguments.data} ({arguments.split})" if split else path.name
    files = [path]
    if path.is_dir():  # official files, one per subset
        files = sorted(file for file in path.iterdir() if has_ending(file, JSON_ENDINGS))
        if not files:
            raise FileNotFoundError(f"{path} has no .json or .jsonl file. Give a file, or a folder of the subsets.")
    return [row for file in files for row in drawn(read_rows(file, arguments.dataset_format, None))], source


def draw(rows: Sequence[Any], limit: int | None, seed: int, *, whole_prompts: bool = False) -> list[Any]:
    """Rows drawn at random, in their order, so that a sorted file keeps all of its labels.

    The two bags of a preference stay together; with `whole_prompts`, so do all rows of a prompt.

    Example:
        >>> draw([{"prompt": i} for i in range(100)], 3, seed=0)
        [{'prompt': 8}, {'prompt': 11}, {'prompt': 23}]
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        group = getattr(row, "pair_id", None) or (json.dumps(row["prompt"]) if whole_prompts else place)
        groups.setdefault(group, []).append(place)
    order, taken = list(groups.values()), []
    random.Random(seed).shuffle(order)
    for places in order:
        if not taken or len(taken) + len(places) <= limit:
            taken += places
    return [rows[place] for place in sorted(taken)]


def _measure(
    name: str, rows: list[Any], source: str, arguments: EvaluateArguments, *, first: bool
) -> tuple[Measurement, list[Bag]]:
    """The measurement of one model; without the speed if scores of a stopped run were reused."""
    published, kept = arguments.published if first else None, kept_beside(arguments.output)
    model = load_reward_model(name, arguments.batch_size, published, keep=kept)
    threshold = _threshold(model, arguments)
    if arguments.dataset_format is not None:
        check_meaning(arguments.dataset_format, model.settings.aggregation)
    if arguments.benchmark is None:
        bags = to_bags(rows, model.settings, source=source, columns=arguments.columns)
        if first:
            told = contradictions(bags, meaning(model.settings.aggregation), source=source)
            report_contradictions(told, strict=arguments.strict)
        benchmark = Benchmark(bags, lambda scored, limit: measure_responses(scored, bags, limit))
    else:
        benchmark = _benchmark(model, rows, source, arguments, first=first)
    if first:
        warn_of_uncut_responses([(bag.response, bag.step_spans) for bag in benchmark.bags], model.segmentation)
    measured = measure(model, benchmark, threshold=threshold)
    if kept is not None and model.reused:
        counts = {name: value for name, value in measured.counts.items() if name not in SPEED}
        measured = replace(measured, counts=counts)
    return measured, benchmark.bags


def _benchmark(model: Any, rows: list[Any], source: str, arguments: EvaluateArguments, *, first: bool) -> Benchmark:
    """The benchmark that the arguments name, read for a model."""
    assert arguments.benchmark is not None
    outcome = None
    if arguments.outcome_model is not None and first:
        kept = kept_beside(arguments.output)
        outcome = load_reward_model(arguments.outcome_model, arguments.batch_size, keep=kept)
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
    return benchmark


def _threshold(model: Any, arguments: EvaluateArguments) -> float | None:
    """The threshold chosen on the response labels of another file; None: the one stored in the checkpoint."""
    if arguments.threshold_file is None:
        return None
    path = find_file(arguments.threshold_file, arguments.data_dir)
    rows = draw(read_rows(path, arguments.dataset_format, None), arguments.limit, arguments.seed)
    bags = to_bags(rows, model.settings, source=str(path), columns=arguments.columns)
    scored = score_bags(model, as_learned(model, bags))
    threshold = choose_threshold(scored, bags, aggregation=model.settings.aggregation)
    if math.isnan(threshold):
        raise ValueError(f"None of {len(bags)} responses of {path} could be scored. Give others.")
    return threshold


def why_absent(found: Mapping[str, Any], bags: Sequence[Bag]) -> list[str]:
    """Sentences about undefined and missing metrics: what the rows lack."""
    sentences = []
    responses = [name for name, one in found.items() if name.startswith("bag_") and math.isnan(one.value)]
    labels = {bag.label for bag in bags}
    if responses and len(labels) == 1:
        label = labels.pop()
        which = "no label" if label is None else f"the label {label:g}"
        every = f"All {len(bags)} responses have" if len(bags) > 1 else "The only response has"
        sentences.append(f"Not measured: {', '.join(responses)}. {every} {which}.")
    known = [label for bag in bags for label in bag.step_labels or () if label is not None]
    steps = [name for name, one in found.items() if not name.startswith("bag_") and math.isnan(one.value)]
    if not known:
        sentences.append("No step metrics: no row has `step_labels`.")
    elif steps and len(set(known)) == 1:
        sentences.append(f"Not measured: {', '.join(steps)}. All {len(known)} step labels are {known[0]:g}.")
    elif steps:
        sentences.append(
            f"Not measured: {', '.join(steps)}. They need responses with a wrong step, and responses with only right "
            "steps, all labelled."
        )
    return sentences


def _print(source: str, measured: list[Any], found: list[dict[str, Any]], gains: dict[str, Any]) -> None:
    """Print counts, then each metric with its interval and, for two models, the difference."""
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
