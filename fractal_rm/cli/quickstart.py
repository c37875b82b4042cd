"""`fractal-rm quickstart`: the whole pipeline on the arithmetic task."""

from collections.abc import Sequence

from fractal_rm.cli.checks import check_matplotlib, writing_folder
from fractal_rm.cli.options.parser import parse
from fractal_rm.study.quickstart import Quickstart, QuickstartArguments


def quickstart(argv: Sequence[str]) -> None:
    """Run every stage that the output folder does not hold yet."""
    (arguments,) = parse("quickstart", [QuickstartArguments], argv)
    with writing_folder(arguments.output_dir):
        check_matplotlib()  # before minutes of work, not after
        Quickstart(arguments).run()
