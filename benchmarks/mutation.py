"""Do the tests fail when a line of the pure rooms is wrong?

Draws places of `objectives`, `credit`, `data` and `evaluation` at random, changes one thing at each with an operator of
cosmic-ray, and runs the examples and the test files of the module. Rival: no change, with which these tests must pass.

    python -m benchmarks.mutation --share 0.05 --seed 1

Appends a row for each module to `benchmarks/results/mutation.jsonl`: about two processor seconds per mutant. How:

- Every place has the same probability, however many operators fit it; one of them is drawn.
- Arithmetic is exchanged with arithmetic, bitwise with bitwise, and `is` with `is not`: exchanging `+` with `<<`, or
  `==` with `is`, fails everywhere or nowhere, and says nothing about tests. Annotations are left alone.
- A mutant is killed if a test fails, or if it needs more than a minute of processor time.
- A surviving mutant shows that the tests pass. If none survives, the tests that killed run again without a change.

Libraries are imported once. Each mutant runs in a fork that reads the changed source instead of the file: no file is
edited. Tests that start further processes see the unchanged code.
"""

import argparse
import ast
import difflib
import gc
import importlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.common.places import REPOSITORY, RESULTS
from fractal_rm.evaluation.results import ResultsFile

ROOMS = ("objectives", "credit", "data", "evaluation")

# Test files of a module, the quickest first, where they are not `test_<module>.py` alone.
TESTS = {
    "credit/kl": ("shaping", "trl_parity"),
    "credit/moments": ("shaping",),
    "data/contradictions": ("bad_corpus",),
    "data/patterns": ("bad_corpus",),
    "data/prompts": ("agents",),
    "data/rows": ("large_data", "readers"),
    "data/sentences": ("segmentation",),
    "data/shapes": ("shapes", "readers"),
    "data/formats/fira": ("retrieval_sets",),
    "data/formats/index": ("datasets_docs", "formats_hub"),
    "data/formats/math_shepherd": ("math_sets",),
    "data/formats/multispanqa": ("retrieval_sets",),
    "data/formats/prm800k": ("math_sets",),
    "data/formats/prmbench": ("math_sets", "prmbench"),
    "data/formats/processbench": ("math_sets", "formats_hub"),
    "data/formats/qa_feedback": ("qa_sets",),
    "data/formats/reading": ("retrieval_sets", "math_sets", "qa_sets"),
    "data/formats/table_files": ("shapes",),
    "evaluation/benchmarks": ("formats_hub",),
    "evaluation/kept_scores": ("kept_work",),
    "evaluation/responses": ("evaluate",),
    "evaluation/score_rows": ("evaluate",),
}
# Imported before the first fork, because they take longer than most test files.
LIBRARIES = ("transformers.trainer", "trl.trainer.grpo_trainer", "datasets", "peft", "sklearn.metrics", "hypothesis")

ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
BITWISE = {"BitAnd", "BitOr", "BitXor"}
IDENTITY = {"Is", "IsNot"}

# A mutant may loop or wait forever, or ask for all memory. On a busy machine one processor second takes many seconds.
PROCESSOR_SECONDS, WALL_SECONDS, MEMORY = 60, 3600, 8 * 2**30


class Change(NamedTuple):
    """One change of a source: an operator of cosmic-ray and which of the places that it fits."""

    operator: str
    occurrence: int


class Mutant(NamedTuple):
    """A changed source, and what was changed in words."""

    source: str
    said: str


def modules() -> list[str]:
    """Modules of the rooms, as paths without suffix: `credit/kl`."""
    package = REPOSITORY / "fractal_rm"
    paths = [path for room in ROOMS for path in sorted((package / room).rglob("*.py"))]
    return [path.relative_to(package).with_suffix("").as_posix() for path in paths if path.stem != "__init__"]


def file_of(module: str) -> Path:
    """The source file of a module."""
    return REPOSITORY / "fractal_rm" / f"{module}.py"


def tests_of(module: str) -> list[str]:
    """What pytest runs for a module: the examples of its docstrings, then its test files."""
    files = [f"tests/test_{name}.py" for name in TESTS.get(module, (module.rsplit("/")[-1],))]
    missing = [file for file in files if not (REPOSITORY / file).is_file()]
    if missing:
        raise ValueError(f"The tests of {module}, {missing}, do not exist. Name its test files in `TESTS`.")
    return [str(file_of(module).relative_to(REPOSITORY)), *files]


def is_drawn(operator: str) -> bool:
    """Whether an operator makes mutants that say something about tests; see the head of this module."""
    family, *kinds = operator.removeprefix("core/").split("_")
    if family == "ReplaceBinaryOperator":
        return set(kinds) <= ARITHMETIC or set(kinds) <= BITWISE
    if family == "ReplaceComparisonOperator":
        return set(kinds) <= IDENTITY or not set(kinds) & IDENTITY
    if family == "ReplaceUnaryOperator":
        return kinds[0] == "Delete"
    return family not in ("VariableInserter", "VariableReplacer")  # these want names


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end, as (line, column)."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or n.lineno, n.end_col_offset or 0)) for n in found if n is not None
    ]


def places(source: str) -> list[list[Change]]:
    """Each place of a source where something can be changed, with the changes that fit it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, types = list(ast_nodes(get_ast(source))), annotated(source)
    found: defaultdict[tuple[str, tuple[int, int]], list[Change]] = defaultdict(list)
    for name in sorted(filter(is_drawn, operator_names())):
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in types):
                    found[name.split("_")[0], start].append(Change(name, occurrence))
                occurrence += 1
    return [found[place] for place in sorted(found)]


def draw(source: str, found: Sequence[Sequence[Change]], count: int, rng: random.Random) -> list[Mutant]:
    """Mutants at places drawn without putting back; a change that is no Python is passed over."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    drawn: list[Mutant] = []
    for place in rng.sample(found, len(found)):
        if len(drawn) == count:
            break
        change = rng.choice(place)
        mutated = mutate_code(source, get_operator(change.operator)(), change.occurrence)
        try:
            compile(mutated, "a mutant", "exec")
        except SyntaxError:
            continue
        drawn.append(Mutant(mutated, said(source, mutated)))
    return drawn


def said(source: str, mutated: str) -> str:
    """The lines that differ, before and after."""
    before, after = source.splitlines(), mutated.splitlines()
    for what, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if what != "equal":
            old, new = (" / ".join(line.strip() for line in lines) for lines in (before[i:j], after[k:m]))
            return f"line {i + 1}: {old} -> {new}"
    return "nothing"


def read_instead(file: Path, source: str) -> None:
    """From now on this process imports a source in place of a file's, and does not take it from the cache."""
    get_data = SourceFileLoader.get_data

    def changed(self: SourceFileLoader, path: str) -> bytes:
        asked = Path(path)
        if asked == file:
            return source.encode()
        if asked.parent == file.parent / "__pycache__" and asked.name.startswith(f"{file.stem}."):
            raise OSError(f"{path} holds the unchanged module")
        return get_data(self, path)

    SourceFileLoader.get_data = changed  # type: ignore[method-assign]
    sys.dont_write_bytecode = True


class Ended(NamedTuple):
    """How tests ended: pytest's status or minus the signal that ended it, and the first test or file that failed."""

    status: int
    failed: str


def run_tests(tests: Sequence[str], file: Path | None = None, source: str = "") -> Ended:
    """Run tests in a fork, with a source in place of a file's or without."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                status = _in_fork(tests, file, source, folder)
            except BaseException:
                status = int(pytest.ExitCode.INTERNAL_ERROR)
            os._exit(status)
        _, status = os.waitpid(child, 0)
        named = Path(folder, "failed.txt")
        failed = named.read_text().partition("\n")[0] if named.is_file() else ""
    return Ended(os.waitstatus_to_exitcode(status), failed)


class _Failures:
    """A plugin of pytest that writes the names of what fails into a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


def _in_fork(tests: Sequence[str], file: Path | None, source: str, folder: str) -> int:
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    signal.alarm(WALL_SECONDS)
    silence = os.open(os.path.join(folder, "said.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for name in [name for name in sys.modules if name.split(".")[0] in ("fractal_rm", "benchmarks")]:
        del sys.modules[name]
    if file is not None:
        read_instead(file, source)
    imported_early = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    # Pytest would itself read the files that it is given, to rewrite their assertions, and bypass the mutant.
    options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "-W", imported_early]
    options.append(f"--basetemp={folder}/tests")
    return int(pytest.main([*options, *tests], plugins=[_Failures(f"{folder}/failed.txt")]))


def measure(results: ResultsFile, module: str, share: float, seed: int) -> dict[str, Any]:
    """Run a module's tests with each mutant of a share of its places, at least one, and append the row."""
    began, file, tests = time.perf_counter(), file_of(module), tests_of(module)
    source = file.read_text(encoding="utf-8")
    if run_tests(tests, file, f"raise RuntimeError\n{source}").status == 0:
        raise RuntimeError(f"The tests of {module} do not see a module that cannot be imported, so they see no mutant.")
    found = places(source)
    mutants = draw(source, found, max(1, round(share * len(found))), random.Random(f"{seed} {module}"))
    ended = [run_tests(tests, file, mutant.source) for mutant in mutants]
    survivors = [mutant.said for mutant, end in zip(mutants, ended, strict=True) if end.status == 0]
    # A file that cannot be imported runs as itself: the module's examples import it.
    killers = sorted({end.failed if "::" in end.failed else tests[0] for end in ended})
    if not survivors and run_tests(killers).status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise ValueError(f"{killers} fail without a change, so what they kill says nothing. Mend them first.")
    late = sum(end.status in (-signal.SIGXCPU, -signal.SIGALRM) for end in ended)
    return results.append(
        benchmark="mutation",
        arm=module,
        dataset="fractal_rm",
        seed=seed,
        split="test",
        metrics={"places": len(found), "mutants": len(ended), "killed": len(ended) - len(survivors), "too_long": late},
        config={"share": share, "tests": tests, "survivors": survivors},
        seconds=time.perf_counter() - began,
    )


def main() -> None:
    """Draw mutants of each module, run them, and append the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.05, help="share of the places of each module, 1: all of them")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn")
    parser.add_argument("--modules", nargs="+", choices=modules(), default=modules())
    parser.add_argument("--results", default=str(RESULTS / "mutation.jsonl"))
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # forks collect only their own garbage
    results = ResultsFile(arguments.results)
    for module in arguments.modules:
        if not results.has(arm=module, seed=arguments.seed):
            row = measure(results, module, arguments.share, arguments.seed)
            print(module, row["seconds"], row["metrics"], *row["config"]["survivors"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
