"""`fractal-rm score`: the steps of the responses in a file, each with its score."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fractal_rm.cli.checks import check_models, check_own_files, kept_beside, load_reward_model, writing_files
from fractal_rm.cli.options.arguments import ScoringArguments, read_rows
from fractal_rm.cli.options.parser import parse
from fractal_rm.evaluation.score_rows import add_second_model, score_rows
from fractal_rm.files import write_atomic
from fractal_rm.report.terminal import show_steps
from fractal_rm.report.viewer import write_viewer

# Maximum number of bad rows shown on the screen; the output has all of them.
_NAMED_ROWS = 10


@dataclass(kw_only=True)
class ScoreArguments(ScoringArguments):
    """Arguments of `fractal-rm score`."""

    input: str = field(
        metadata={
            "help": "Rows with `prompt` and `response` (or `completion`, or `steps`), and optionally `id`, `label` and "
            "`step_labels`; a .jsonl or .json file (also .gz), .parquet, .arrow, .csv or .tsv, or a folder that "
            "`datasets` saved."
        }
    )
    output: str = field(
        metadata={"help": "File of scores, one line for each response. A stopped run continues from OUTPUT.part."}
    )
    html: str | None = field(default=None, metadata={"help": "Write a page that shows the scored responses."})
    show: int = field(default=0, metadata={"help": "Print this many responses with coloured steps."})
    compare_to: str | None = field(
        default=None, metadata={"help": "A second step reward model, for scores of the same steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_own_files(input=self.input, output=self.output, html=self.html)


def score(argv: Sequence[str]) -> None:
    """Write one line of scores for each response, and a page on request."""
    (arguments,) = parse("score", [ScoreArguments], argv)
    with writing_files(arguments.output, arguments.html):
        _score(arguments)


def _score(arguments: ScoreArguments) -> None:
    check_models(arguments.model, arguments.compare_to)
    rows = list(read_rows(Path(arguments.input), arguments.dataset_format, arguments.limit))
    kept = kept_beside(arguments.output)
    reward_model = load_reward_model(arguments.model, arguments.batch_size, arguments.published, keep=kept)
    records = score_rows(reward_model, rows, source=arguments.input, columns=arguments.columns)
    if arguments.compare_to is not None:
        add_second_model(records, load_reward_model(arguments.compare_to, arguments.batch_size, keep=kept))
    errors = [record["error"] for record in records if record["error"]]
    if len(errors) == len(records):
        raise ValueError(f"None of {len(records)} responses could be scored. First: {errors[0]}")
    for error in errors[:_NAMED_ROWS]:
        print(error, file=sys.stderr)
    if len(errors) > _NAMED_ROWS:
        print(f"... and {len(errors) - _NAMED_ROWS} more, see {arguments.output}.", file=sys.stderr)
    write_atomic(arguments.output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    if kept is not None:
        reward_model.forget()
    threshold = reward_model.settings.threshold
    if arguments.html is not None:
        names = (arguments.model, arguments.compare_to) if arguments.compare_to is not None else None
        title = f"Step scores of {Path(arguments.input).name}"
        write_viewer(arguments.html, records, title=title, threshold=threshold, models=names)
    show_steps(records[: arguments.show], threshold=threshold)
    page = f", {arguments.html} shows them" if arguments.html else ""
    print(
        f"Scored {len(records) - len(errors)} of {len(records)} responses: {arguments.output} holds the scores{page}."
    )
