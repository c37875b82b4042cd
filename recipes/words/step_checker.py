"""Evaluates the step checker: the share of right lines that it accepts, and of planted errors that it finds.

    python recipes/words/step_checker.py --results benchmarks/results/words.jsonl

A planted error changes one number of one line of a reference solution: the result of its calculation, an operand that
is copied wrongly (with the result that follows from it), or the final answer. It counts as found if its line is the
first that the checker calls wrong.
"""

import argparse
import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence

from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.tasks.equations import numbers
from fractal_rm.tasks.gym import GymProblem, GymTask

# A calculation of two numbers that can be rewritten with another operand.
SIMPLE = re.compile(r"(?<![\d./*+-])(?<![*+/-] )(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)(?![\d.%]| ?[-+*/=])")
NUMBER = re.compile(r"(?<![\d.,])\d+")


def plant(problem: GymProblem, kind: str, rng: random.Random) -> tuple[str, int] | None:
    """A solution with one error and the number of its line; None if it has no place for one of this kind."""
    lines = str(problem.solution).split("\n")
    if kind == "answer":
        wrong = int(problem.answer) + rng.choice((-10, -2, -1, 1, 2, 10))
        return "\n".join([*lines[:-1], f"#### {wrong}"]), len(lines) - 1
    places = [i for i, line in enumerate(lines[:-1]) if "=" in line and (kind == "result" or SIMPLE.search(line))]
    if not places:
        return None
    place = rng.choice(places)
    line = lines[place]
    if kind == "result":
        head, _, tail = line.rpartition("=")
        found = NUMBER.search(tail)
        if found is None:
            return None
        lines[place] = f"{head}={tail[: found.start()]}{changed(int(found[0]), rng)}{tail[found.end() :]}"
    else:
        found = SIMPLE.search(line)
        a, b, c = int(found[1]), int(found[3]), int(found[4])  # type: ignore[index]
        a = changed(a, rng)
        result = {"+": a + b, "-": a - b, "*": a * b}[found[2]]  # type: ignore[index]
        if result in (c, -c) or result < 0 or result in numbers(str(problem.solution)):
            return None  # no error, or one that no checker by results can see
        lines[place] = f"{line[: found.start()]}{a} {found[2]} {b} = {result}{line[found.end() :]}"  # type: ignore[index,union-attr]
    return "\n".join(lines), place


def changed(number: int, rng: random.Random) -> int:
    """Another number: near, or with one digit changed."""
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "123456789" if d != digits[place]])
    return rng.choice((number + rng.choice((1, 2, 10)), int("".join(digits))))


def measure(task: GymTask, count: int, seed: int) -> tuple[dict[str, float], list[str]]:
    """Shares of right lines and of found errors, with the missed cases."""
    rng = random.Random(seed)
    problems = list(itertools.islice(task.draws(seed, count), count))  # the library's own, with defects
    right = total = 0
    missed: list[str] = []
    found: dict[str, list[bool]] = {"result": [], "operand": [], "answer": []}
    for problem in problems:
        flags = problem.check_steps(str(problem.solution)) or []
        right, total = right + sum(flags), total + len(flags)
        if not all(flags):
            missed.append(f"reference: {str(problem.solution).split(chr(10))[flags.index(False)]}")
        for kind, hits in found.items():
            planted = plant(problem, kind, rng) if all(flags) else None
            if planted is not None:
                flags_then = problem.check_steps(planted[0]) or []
                hits.append(False in flags_then and flags_then.index(False) == planted[1])
                if not hits[-1]:
                    missed.append(f"{kind}: {planted[0].split(chr(10))[planted[1]]}")
    metrics = {"right_lines": right / total, "lines": float(total)}
    for kind, hits in found.items():
        metrics |= {f"found_{kind}": sum(hits) / len(hits), f"planted_{kind}": float(len(hits))}
    every = [hit for hits in found.values() for hit in hits]
    return metrics | {"found": sum(every) / len(every)}, missed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--problems", type=int, default=1000, help="of each part of gsm_symbolic")
    parser.add_argument("--show", type=int, default=10, help="missed cases to print")
    parser.add_argument("--results", help="append a row for each part to this file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name in ("gsm_symbolic", "gsm_symbolic_unseen", "gsm_symbolic_hard"):
        start = time.monotonic()
        try:
            metrics, missed = measure(GymTask(name), arguments.problems, arguments.seed)
        except (ImportError, ValueError) as error:
            sys.exit(f"step_checker: {error}")
        print(
            f"{name}: {metrics['right_lines']:.2%} of {metrics['lines']:.0f} reference lines right; found of planted "
            f"errors: {metrics['found']:.2%} (result {metrics['found_result']:.2%}, operand "
            f"{metrics['found_operand']:.2%}, answer {metrics['found_answer']:.2%})"
        )
        shapes = Counter(re.sub(r"\d+", "0", re.sub(r"[A-Z]\w+", "X", case)) for case in missed)
        for case, times in [(case, shapes[re.sub(r"\d+", "0", re.sub(r"[A-Z]\w+", "X", case))]) for case in missed][
            : arguments.show
        ]:
            print(f"  {times} x  {case}")
        if arguments.results:
            ResultsFile(arguments.results).append(
                benchmark="words",
                arm="step_checker",
                dataset=name,
                seed=arguments.seed,
                split="draws",
                metrics=metrics,
                config={"problems": arguments.problems},
                seconds=time.monotonic() - start,
            )


if __name__ == "__main__":
    main()
