"""`fractal-rm <command>`: parse, call, print.

Exit status 0; or not 0 and one sentence on standard error: what was wrong, where, what to do. A traceback is for our
own bugs.
"""

import contextlib
import difflib
import json
import linecache
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from fractal_rm import __version__

BAD_INPUT, INTERRUPTED = 2, 130
# Packages whose complaints are about what they were given. An error that is raised elsewhere is a bug.
_COMPLAINANTS = ("fractal_rm", "transformers", "trl", "peft", "datasets", "huggingface_hub", "accelerate")
# Bad rows that `score` names on the screen; all of them are in its output.
_NAMED_ROWS = 10


def quickstart(argv: Sequence[str]) -> int:
    """The whole pipeline on arithmetic word problems: CPU, minutes, no network."""
    from fractal_rm.cli.checks import check_writable_folder
    from fractal_rm.cli.parser import parse
    from fractal_rm.study.quickstart import QuickstartArguments, run_quickstart

    (arguments,) = parse("quickstart", [QuickstartArguments], argv)
    check_writable_folder(arguments.output_dir)
    run_quickstart(arguments)
    return 0


def train(argv: Sequence[str]) -> int:
    """Train a step reward model from response labels."""
    from fractal_rm.cli.train import train

    train(argv)
    return 0


def score(argv: Sequence[str]) -> int:
    """Score the steps of the responses in a file."""
    from fractal_rm.cli.arguments import ScoreArguments
    from fractal_rm.cli.checks import check_model, check_writable_file, load_reward_model
    from fractal_rm.cli.parser import parse

    (arguments,) = parse("score", [ScoreArguments], argv)
    for output in (arguments.output, arguments.html):
        if output is not None:
            check_writable_file(output)
    for model in (arguments.model, arguments.compare_to):
        if model is not None:
            check_model(model)
    from fractal_rm.cli.data_files import read_rows
    from fractal_rm.evaluation.score_rows import add_second_model, score_rows
    from fractal_rm.files import write_atomic
    from fractal_rm.report.terminal import show_steps
    from fractal_rm.report.viewer import write_viewer

    rows = read_rows(Path(arguments.input), arguments.dataset_format, arguments.limit)
    reward_model = load_reward_model(arguments.model, arguments.batch_size)
    records = score_rows(reward_model, rows, source=arguments.input)
    if arguments.compare_to is not None:
        add_second_model(records, load_reward_model(arguments.compare_to, arguments.batch_size))
    errors = [record["error"] for record in records if record["error"]]
    if len(errors) == len(records):
        raise ValueError(f"None of {len(records)} responses could be scored. First: {errors[0]}")
    for error in errors[:_NAMED_ROWS]:
        print(error, file=sys.stderr)
    if len(errors) > _NAMED_ROWS:
        print(f"... and {len(errors) - _NAMED_ROWS} more, see {arguments.output}.", file=sys.stderr)
    write_atomic(arguments.output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    if arguments.html is not None:
        names = (arguments.model, arguments.compare_to) if arguments.compare_to is not None else None
        title, threshold = f"Step scores of {Path(arguments.input).name}", reward_model.settings.threshold
        write_viewer(arguments.html, records, title=title, threshold=threshold, models=names)
    show_steps(records[: arguments.show], threshold=reward_model.settings.threshold)
    page = f", {arguments.html} shows them" if arguments.html else ""
    print(
        f"Scored {len(records) - len(errors)} of {len(records)} responses: {arguments.output} holds the scores{page}."
    )
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Judge a step reward model on labelled responses or a benchmark, or compare two."""
    from fractal_rm.cli.evaluate import evaluate

    evaluate(argv)
    return 0


def ppo(argv: Sequence[str]) -> int:
    """Train a policy with PPO on step rewards, outcome rewards, or both."""
    from fractal_rm.cli.ppo import ppo

    ppo(argv)
    return 0


def compare(argv: Sequence[str]) -> int:
    """Dense against outcome-only rewards on arithmetic settings, over paired seeds."""
    from fractal_rm.cli.compare import compare

    compare(argv)
    return 0


def serve(argv: Sequence[str]) -> int:
    """Answer requests for step scores over HTTP."""
    from fractal_rm.cli.arguments import ServeArguments
    from fractal_rm.cli.checks import check_model, load_reward_model
    from fractal_rm.cli.parser import parse

    (arguments,) = parse("serve", [ServeArguments], argv)
    check_model(arguments.model)
    try:
        from fractal_rm.serving.limits import Limits
        from fractal_rm.serving.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ImportError(f"The server needs {error.name}. Install it: `pip install 'fractal-rm[serve]'`.") from error
    limits = Limits(**{name: getattr(arguments, name) for name in Limits.__dataclass_fields__})
    reward_model = load_reward_model(arguments.model, arguments.batch_size)
    with contextlib.suppress(KeyboardInterrupt):  # how a server is ended
        serve(
            reward_model,
            name=arguments.model,
            host=arguments.host,
            port=arguments.port,
            limits=limits,
            wait=arguments.wait,
            ends=arguments.ends or (),
        )
    return 0


def report(argv: Sequence[str]) -> int:
    """Tables from rows of results.jsonl, or curves from runs of PPO."""
    from fractal_rm.cli.arguments import ReportArguments
    from fractal_rm.cli.checks import check_writable_file
    from fractal_rm.cli.parser import parse

    (arguments,) = parse("report", [ReportArguments], argv)
    for output in (arguments.output, arguments.figure):
        if output is not None:
            check_writable_file(output)
    if arguments.runs is not None:
        _report_runs(arguments.runs, arguments.output, arguments.figure, arguments.title or "Training")
    else:
        _report_results(arguments.results, arguments.output, arguments.metrics, arguments.title or "Results")
    return 0


def _report_runs(entries: list[str], output: str | None, figure: str | None, title: str) -> None:
    from fractal_rm.report.plots import require_matplotlib

    require_matplotlib()
    from fractal_rm.report.training_history import read_runs
    from fractal_rm.report.training_report import save_training_figure, write_training_report

    runs = read_runs(entries)
    if output is not None:
        write_training_report(output, runs, title=title)
    if figure is not None:
        save_training_figure(figure, runs)
    print(f"Wrote {' and '.join(filter(None, (output, figure)))}.")


def _report_results(results: str, output: str | None, metrics: list[str] | None, title: str) -> None:
    if not Path(results).is_file():
        raise FileNotFoundError(f"{results} is no file. Give the path of a results.jsonl.")
    from fractal_rm.evaluation.results import read_results
    from fractal_rm.files import write_atomic
    from fractal_rm.report.results_page import write_results_page
    from fractal_rm.report.tables import markdown_table

    rows = read_results(results)
    bad = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get("metrics"), dict)), None)
    if bad is not None:
        raise ValueError(f"{results}, row {bad} holds no metrics. Give rows that this package wrote.")
    table = markdown_table(rows, metrics=metrics)
    if output is None:
        print(table)
        return
    if output.endswith(".md"):
        write_atomic(output, f"# {title}\n\n{table}\n")
    else:
        write_results_page(output, rows, metrics=metrics, title=title)
    print(f"{output} holds the table.")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command for command in (quickstart, train, score, evaluate, ppo, compare, serve, report)
}


def usage() -> str:
    """What `fractal-rm --help` prints."""
    lines = [f"  {name:<12}{(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fractal-rm <command> [--config file.yaml] [--any_flag value ...]",
            "",
            "Labels on whole responses go in; a reward model that scores every step comes out.",
            "",
            *lines,
            "",
            "`fractal-rm <command> --help` lists the arguments of a command; flags beat the file.",
        ]
    )


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is a complaint about what somebody gave, and not a bug.

    It is if the operating system says so, or if it stands in a `raise` statement of a package that checks its input.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | TypeError | ImportError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename).parts
    raised = linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise ")
    return raised and any(package in path for package in _COMPLAINANTS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Command and arguments; default: those of the process.

    Returns:
        Exit status: 0, 2 for bad input, 130 after an interruption.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", "--version"):
        print(f"fractal-rm {__version__}" if name == "--version" else usage())
        return 0
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda message, *where, **line: f"Warning: {message}\n"
    try:
        if name not in COMMANDS:
            found = difflib.get_close_matches(name, COMMANDS, n=1)
            advice = f"Did you mean `{found[0]}`?" if found else f"Choose one of {', '.join(COMMANDS)}."
            raise ValueError(f"{f'Unknown command {name!r}' if name else 'There is no command'}. {advice}")
        with warnings.catch_warnings():
            # Nothing that whoever runs a command could change: an argument of TRL that transformers has renamed, and a
            # default of transformers that does nothing without a GPU.
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing.* is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
            return COMMANDS[name](rest)
    except SystemExit as end:  # argparse, after --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(
            "Interrupted. Training goes on from its last checkpoint with --resume_from_checkpoint true.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        if not is_bad_input(error):
            raise
        print(f"fractal-rm: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    finally:
        warnings.formatwarning = formatwarning


if __name__ == "__main__":
    sys.exit(main())
