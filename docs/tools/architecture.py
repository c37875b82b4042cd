"""Measures the architecture: rooms and imports from the source, and the files that a value passes through.

    python docs/tools/architecture.py            prints the generated part of docs/architecture.md
    python docs/tools/architecture.py --write    writes that part of docs/architecture.md, and its picture

Imports are read with `ast` and need no library. They do not say which files a value passes through, so routes are
counted in a run: a tiny training under `sys.setprofile`, from one named event to another. `tests/test_imports.py` uses
the same functions.
"""

import argparse
import ast
import contextlib
import inspect
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "fractal_rm"
PAGE, PICTURE = REPOSITORY / "docs" / "architecture.md", REPOSITORY / "docs" / "figures" / "architecture.svg"
MARKS = ("<!-- Written by docs/tools/architecture.py -->", "<!-- Until here -->")

# Rooms of the package, top row first: a module imports from its own row or from rows above.
ROWS = (
    ("objectives", "credit", "files", "errors", "interrupts", "ranges", "versions"),
    ("data",),
    ("scorers", "tasks"),
    ("reward_model",),
    ("hf", "evaluation"),
    ("reward_training", "ppo"),
    ("report", "serving"),
    ("study",),
    ("cli",),
)
ROW_OF = {room: number for number, rooms in enumerate(ROWS) for room in rooms}

# The package before it was divided into rooms (commit 14d4937), counted by this script, and the aims.
COUNTS: dict[str, tuple[str, str]] = {
    "files from a label to the loss": ("15", "10"),
    "files from a response's text to the policy's loss": ("23", "14"),
    "files from a YAML key to its effect": ("5 to 9", "4"),
    "files from `fractal-rm compare` to a row, before the trainers": ("22", "14"),
    "largest flat folder of the package": ("45", "15"),
    "circular imports, upward imports": ("1, 2", "0, 0"),
    "lines of the package": ("23,389", "21,500"),
    "modules imported by exactly one other": ("43", "each an idea"),
}


# Imports --------------------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One import: the file and line it stands in, and the dotted name it asks for."""

    path: Path
    line: int
    name: str


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its name inside it (`ppo.trainer`; a folder's `__init__.py` has the folder's name).

    The package's own `__init__.py` is left out: it lists public names of every row, and loads them when they are used.
    """
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands (in a function, under `TYPE_CHECKING`), as absolute names."""
    inside = path.relative_to(package.parent).with_suffix("").parts[:-1]  # the package that `from . import` means
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            folder = package.parent / module.replace(".", "/")
            for alias in node.names:  # `from fractal_rm.data import bag` asks for the module fractal_rm.data.bag
                is_module = (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").is_file()
                whole = is_module or module == package.name
                yield Import(path, node.lineno, f"{module}.{alias.name}" if whole else module)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    known = modules(package)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for found in imports_of(path, package):
            target = found.name.removeprefix(f"{package.name}.")
            while target and target != found.name and target not in known:
                target = target.rpartition(".")[0]
            if target in known and target != name:
                graph[name].add(target)
    return graph


def room_of(module: str) -> str:
    """The first part of a module's name.

    Example:
        >>> room_of("data.formats.hub"), room_of("reward_model")
        ('data', 'reward_model')
    """
    return module.partition(".")[0]


def room_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, targets))
    return {room: targets - {room} for room, targets in rooms.items()}


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Everything that a node leads to; itself only if it is on a circle."""
    seen: set[str] = set()
    waiting = [*graph.get(start, ())]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that all lead to one another.

    Example:
        >>> circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})
        [['b', 'c']]
    """
    reach = {node: reachable(graph, node) for node in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def upward_imports(package: Path) -> list[str]:
    """One sentence for each import of a room that stands in a row below the importing one."""
    found = []
    for path in modules(package).values():
        room = room_of(".".join(path.relative_to(package).with_suffix("").parts))
        for one in imports_of(path, package):
            top, _, rest = one.name.partition(".")
            target = room_of(rest)
            if top == package.name and ROW_OF.get(target, 0) > ROW_OF.get(room, len(ROWS)):
                where = f"{path.relative_to(package)}:{one.line} imports {one.name}"
                found.append(f"{where}: `{target}` stands in a row below `{room}`.")
    return found


def only_importers(graph: Mapping[str, set[str]]) -> dict[str, str]:
    """Modules that exactly one other module imports -> that one."""
    importers = {name: [one for one, targets in graph.items() if name in targets] for name in graph}
    return {name: found[0] for name, found in importers.items() if len(found) == 1}


def lines_of(package: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py"))


def largest_folder(package: Path) -> tuple[str, int]:
    """The folder with the most modules side by side, `__init__.py` among them."""
    counts = Counter(path.parent.relative_to(package.parent).as_posix() for path in package.rglob("*.py"))
    return max(counts.items(), key=lambda item: (item[1], item[0]))


# Routes: the files that a value passes ------------------------------------------------------------------------------

# An event: `("call" or "return", qualified name of a function)`.
Event = tuple[str, str]

# Files that run during a route although the value does not pass through them, with reasons. All others count.
BESIDE: dict[str, dict[str, str]] = {
    "label": {
        "reward_training/config.py": "reads no data",
        "ranges.py": "checks options",
        "scorers/folder.py": "checks the files of the model",
        "files.py": "reads the configuration of the model; these records are in memory",
        "reward_training/model_setup.py": "makes the model, before the data",
        "reward_training/stages.py": "decides which stages there are",
        "reward_training/prior_targets.py": "priors are off: it returns at once",
        "objectives/priors.py": "priors are off: their weight is 0",
        "scorers/settings.py": "what the checkpoint will say",
        "scorers/templates.py": "checks options of chat templates; these records are texts",
        "scorers/checkpoint.py": "loads the model",
        "scorers/base.py": "the base class of scorers",
        "hf/checkpoints.py": "checkpoints",
        "hf/finite.py": "looks at the loss, changes nothing",
        "hf/manifest.py": "checkpoints",
        "hf/runs.py": "stops and resumes",
        "interrupts.py": "signals",
        "hf/denormals.py": "a flag of the CPU",
        "hf/parallelism.py": "refuses sharded models",
    },
    "completion": {
        "credit/guards.py": "watches rollouts, changes none",
        "credit/moments.py": "what the guards compare with; shaping uses it with `normalize_step_rewards` only",
        "ppo/alarms.py": "acts on what the guards saw",
        "hf/finite.py": "looks at the loss, changes nothing",
        "hf/parallelism.py": "asks how the model is sharded",
    },
    "key": {},
    "compare": dict.fromkeys(
        ("ppo", "reward_training", "hf", "credit", "objectives", "scorers", "reward_model.py"),
        "belongs to the trainers",
    ),
}
# Options with one effect each. Options that many parts read (`aggregation`) have no single route.
KEYS = {
    "train": ("bag_weight", "missed_bad", "head_learning_rate"),
    "ppo": ("shaping", "lam", "step_weight", "vf_coef", "whiten_rewards"),
}


def functions_run(
    run: Callable[[], object], package: Path, ends: Event | Path, begins: Event | None = None
) -> list[CodeType]:
    """The functions of the package that run between two events, in the order of their first call.

    Args:
        run: What is run, to its end.
        package: Folder of the package.
        ends: The event that ends the route, or a file that then has something in it.
        begins: The event that begins it; None: at once.

    Raises:
        RuntimeError: If the route does not begin or end.
    """
    folder = f"{package}{os.sep}"
    seen: dict[CodeType, None] = {}
    state = "waiting" if begins else "on"

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal state
        if event not in ("call", "return"):
            return
        code = frame.f_code
        here = (event, code.co_qualname)
        if state == "waiting":
            if here != begins:
                return
            state = "on"
        ours = code.co_filename.startswith(folder)
        # A function, not the body of a module or class; a comprehension belongs to its function.
        if ours and code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<"):
            seen.setdefault(code)
        if here == ends or (isinstance(ends, Path) and ours and event == "return" and _has_content(ends)):
            state = "over"
            sys.setprofile(None)  # the rest of the run does not matter

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        sys.setprofile(watch)
        try:
            run()
        finally:
            sys.setprofile(None)
    if state != "over":
        raise RuntimeError(f"The route from {begins or 'the start'} to {ends} is {state}: give events that happen.")
    return list(seen)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def files_of(functions: Sequence[CodeType], package: Path, beside: Mapping[str, str]) -> list[str]:
    """The files of functions, in order, without those beside the way (files, or rooms)."""
    files = dict.fromkeys(Path(code.co_filename).relative_to(package).as_posix() for code in functions)
    return [file for file in files if file not in beside and file.partition("/")[0] not in beside]


def names_key(code: CodeType, key: str) -> bool:
    """Whether a function has a key as attribute, parameter, argument or string.

    Example:
        >>> names_key((lambda args: args.lam).__code__, "lam"), names_key((lambda lam: 0).__code__, "gamma")
        (True, False)
    """
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    constants = [part for one in code.co_consts for part in (one if isinstance(one, tuple) else [one])]
    nested = [one for one in code.co_consts if isinstance(one, CodeType)]
    named = key in code.co_names or key in parameters or key in constants
    return named or any(names_key(one, key) for one in nested if one.co_name.startswith("<"))


class Runs:
    """Tiny trainings in a folder, whose routes are counted.

    Args:
        folder: Where models and data go.
        package: Folder of the package that is imported as `fractal_rm`.
    """

    def __init__(self, folder: Path, package: Path = PACKAGE) -> None:
        sys.path.insert(0, str(REPOSITORY / "tests"))
        try:
            from support import fixed_seed_runs
        finally:
            sys.path.remove(str(REPOSITORY / "tests"))
        self.small, self.folder, self.package = fixed_seed_runs, folder, package
        self.policy = fixed_seed_runs.save_policy(folder / "policy")

    def label(self) -> list[str]:
        """From the records that enter `FractalTrainer` to the first value of the loss."""

        def run() -> None:
            args = self.small.FractalConfig(
                output_dir=str(self.folder / "label"), scorer="likelihood", max_steps=1, **self.small.QUIET
            )
            self.small.FractalTrainer(self.policy, args=args, train_dataset=self.small.sums(16)).train()

        ends = ("return", "FractalTrainer.compute_loss")
        found = functions_run(run, self.package, ends, begins=("call", "FractalTrainer.__init__"))
        return files_of(found, self.package, BESIDE["label"])

    def completion(self) -> list[str]:
        """From the moment that TRL has the completions to the first value of the policy's loss."""
        begins, ends = ("return", "GRPOTrainer._generate"), ("return", "GRPOTrainer.compute_loss")
        found = functions_run(lambda: self.small.ppo(self.folder), self.package, ends, begins)
        return files_of(found, self.package, BESIDE["completion"])

    def compare(self) -> list[str]:
        """From the start of `fractal-rm compare` to the first row in its file."""
        out, chosen = self.folder / "compare", self.folder / "chosen.yaml"
        chosen.write_text(json.dumps({"fractal": {"learning_rate": 1e-3}}))
        argv = f"compare --smoke true --settings easy --arms fractal --seeds 1 --output_dir {out} --chosen {chosen}"
        found = functions_run(lambda: self._main(argv.split()), self.package, out / "smoke" / "results.jsonl")
        return files_of(found, self.package, BESIDE["compare"])

    def keys(self) -> dict[str, list[str]]:
        """For each key of `KEYS`, the files between the command and its effect.

        These are the files of the command through which the configuration passes, of the configuration's class, of the
        trainer, and all files with a function that runs and names the key.
        """
        quiet = dict(self.small.QUIET, report_to="none", max_steps=1)
        rows, prompts = self.folder / "rows.jsonl", self.folder / "prompts.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in self.small.sums(16)))
        prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in self.small.sums(16)))
        model = str(self.folder / "key_rm")
        small = self.small
        options = {
            "train": {"train_file": str(rows), "output_dir": model, "scorer": "token"},
            "ppo": {
                "train_file": str(prompts),
                "output_dir": str(self.folder / "key_ppo"),
                "reward_model": model,
                "num_generations": 4,
                "per_device_train_batch_size": 8,
                "max_completion_length": 16,
                "learning_rate": 1e-2,  # warmer than TRL's default would be for a model of this size
            },
        }
        found = {}
        for command, trainer, config, loss in (
            ("train", small.FractalTrainer, small.FractalConfig, "FractalTrainer.compute_loss"),
            ("ppo", small.StepPPOTrainer, small.StepPPOConfig, "GRPOTrainer.compute_loss"),
        ):
            file = self.folder / f"{command}.yaml"
            file.write_text(json.dumps({"model": self.policy, **quiet, **options[command]}))
            arguments = [command, "--config", str(file)]
            functions = functions_run(lambda: self._main(arguments), self.package, ("return", loss))  # noqa: B023
            carrying = [code for code in functions if code.co_name in ("main", "parse", command)]
            beside = BESIDE["key"]
            always = files_of(carrying, self.package, beside)
            always += [Path(inspect.getfile(one)).relative_to(self.package).as_posix() for one in (config, trainer)]
            for key in KEYS[command]:
                named = files_of([code for code in functions if names_key(code, key)], self.package, beside)
                found[key] = list(dict.fromkeys([*always, *named]))
        return found

    @staticmethod
    def _main(argv: list[str]) -> None:
        from fractal_rm.cli.main import main

        if main(argv):
            raise RuntimeError(f"`fractal-rm {' '.join(argv)}` failed.")


# What is written ------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table in Markdown."""
    rule = ["---:" if number in right else "---" for number in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def rooms_table(package: Path) -> str:
    """Rooms from the top row down: what each is, and how large."""
    known, rows = modules(package), []
    for room in ROW_OF:
        paths = [path for name, path in known.items() if room_of(name) == room]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        said = ast.get_docstring(ast.parse(known[room].read_text(encoding="utf-8"))) or BOXES.get(room, ("",))[0]
        rows.append([f"`{room}`", said.splitlines()[0].rstrip("."), str(len(paths)), f"{lines:,}"])
    return table(["room", "contents", "files", "lines"], rows, right=(2, 3))


def static_counts(package: Path) -> dict[str, str]:
    """The counts that come from the source alone."""
    graph = import_graph(package)
    rounds = circles(graph) + circles(room_graph(graph))
    folder, files = largest_folder(package)
    return {
        "largest flat folder of the package": f"{files} (`{folder}`)",
        "circular imports, upward imports": f"{len(rounds)}, {len(upward_imports(package))}",
        "lines of the package": f"{lines_of(package):,}",
        "modules imported by exactly one other": str(len(only_importers(graph))),
    }


def route_counts(runs: Runs) -> tuple[dict[str, str], str]:
    """The counts of routes, and the routes themselves as a list in Markdown."""
    label, completion, keys, compare = runs.label(), runs.completion(), runs.keys(), runs.compare()
    lengths = sorted({len(files) for files in keys.values()})
    span = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    names = list(COUNTS)
    counts = dict(zip(names, map(str, (len(label), len(completion), span, len(compare))), strict=False))
    longest = max(keys, key=lambda key: len(keys[key]))
    titles = [*names[:2], f"files from a YAML key to its effect, `{longest}`", names[3]]
    listed = [
        f"- {title}: " + ", ".join(f"`{file}`" for file in files)
        for title, files in zip(titles, (label, completion, keys[longest], compare), strict=True)
    ]
    return counts, "\n".join(listed)


def block(package: Path, runs: Runs) -> str:
    """The generated part of the page."""
    routes, listed = route_counts(runs)
    counts = routes | static_counts(package)
    rows = [[name, before, wanted, counts[name]] for name, (before, wanted) in COUNTS.items()]
    return "\n\n".join(
        [rooms_table(package), table(["", "before", "aim", "now"], rows, right=(1, 2, 3)), "The routes:", listed]
    )


# The picture: boxes in rows, arrows from importing rooms up to imported ones. An arrow that follows from two others is
# left out. Colours follow the reader's mode; the background is drawn, so the picture also suits a page in another mode.
_WIDTH, _BOX, _ROW, _MARGIN = 900, (158, 46), 92, 24
_STYLE = """
  .ground { fill: #ffffff } .box { fill: #f6f4fb; stroke: #5b3a8e; stroke-width: 1.5 }
  .name { fill: #1c1e21; font-weight: 600; font-size: 15px } .note { fill: #5d636b; font-size: 11px }
  .arrow { fill: none; stroke: #6f747b; stroke-width: 1.3; marker-end: url(#head) } .head { fill: #6f747b }
  text { font-family: 'DejaVu Sans', Verdana, sans-serif; text-anchor: middle }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #16181c } .box { fill: #241d33; stroke: #b79bea }
    .name { fill: #f0eee8 } .note { fill: #a9afb8 } .arrow { stroke: #8f959d } .head { fill: #8f959d }
  }
""".strip("\n")
# The text of a box below the room's name, and its position as a share of the width: arrows that pass rows run up in the
# column of the room they lead to, which is kept free.
BOXES = {
    "objectives": ("what is learned", 0.12),
    "credit": ("scores to advantages", 0.74),
    "data": ("records to bags", 0.26),
    "scorers": ("text to step logits", 0.26),
    "tasks": ("problems and checkers", 0.9),
    "reward_model": ("StepRewardModel", 0.51),
    "hf": ("shared by both trainers", 0.12),
    "evaluation": ("metrics, benchmarks", 0.33),
    "reward_training": ("FractalTrainer", 0.33),
    "ppo": ("StepPPOTrainer", 0.74),
    "report": ("pages, plots, tables", 0.12),
    "serving": ("HTTP server, client", 0.51),
    "study": ("dense against outcome", 0.74),
    "cli": ("one module a command", 0.62),
}


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """A graph without edges that follow from two or more others.

    Example:
        >>> reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()})
        {'a': {'b'}, 'b': {'c'}, 'c': set()}
    """
    reach = {node: reachable(graph, node) for node in graph}
    return {
        node: {one for one in targets if not any(one in reach[other] for other in targets - {one})}
        for node, targets in graph.items()
    }


def picture(package: Path) -> str:
    """The rooms and their imports as SVG."""
    rooms = room_graph(import_graph(package))
    graph = {room: targets & BOXES.keys() for room, targets in rooms.items() if room in BOXES}
    width, height = _BOX
    places = {room: (round(_WIDTH * BOXES[room][1]), _MARGIN + height // 2 + ROW_OF[room] * _ROW) for room in BOXES}
    total = 2 * _MARGIN + height + (len(ROWS) - 1) * _ROW
    parts = [f'<rect class="ground" width="{_WIDTH}" height="{total}" rx="8"/>']
    for room, targets in sorted(reduced(graph).items()):
        for target in sorted(targets):
            parts.append(_arrow(places[room], places[target]))
    for room, (x, y) in places.items():
        parts += [
            f'<rect class="box" x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="7"/>',
            f'<text class="name" x="{x}" y="{y - 2}">{room}</text>',
            f'<text class="note" x="{x}" y="{y + 15}">{BOXES[room][0]}</text>',
        ]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0.5 L8 4 L0 7.5 z"/></marker>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {total}" width="{_WIDTH}" height="{total}">\n'
        f"<title>Rooms of fractal_rm and what they import</title>\n<style>\n{_STYLE}\n</style>\n"
        f"<defs>{head}</defs>\n{body}\n</svg>\n"
    )


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        side = 1 if x1 > x0 else -1
        return f'<path class="arrow" d="M{x0 + side * _BOX[0] // 2} {y0} L{x1 - side * (_BOX[0] // 2 + 2)} {y1}"/>'
    y0, y1 = y0 - _BOX[1] // 2, y1 + _BOX[1] // 2 + 2
    gap = _ROW - _BOX[1] - 12  # the last bit is straight, for the head
    return f'<path class="arrow" d="M{x0} {y0} C{x0} {y0 - gap} {x1} {y0} {x1} {y0 - gap} V{y1}"/>'


def with_block(page: str, text: str) -> str:
    """A page with its generated part replaced."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}"


def generated(page: str) -> str:
    """The generated part of a page."""
    return page.partition(MARKS[0])[2].partition(MARKS[1])[0].strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/architecture.md and its picture")
    arguments = parser.parse_args(argv)
    sys.path.insert(0, str(REPOSITORY))
    with tempfile.TemporaryDirectory() as folder:
        text = block(PACKAGE, Runs(Path(folder)))
    print(text)
    graph = import_graph(PACKAGE)
    for found in circles(graph) + circles(room_graph(graph)):
        print(f"Circle: {' -> '.join(found)}")
    for sentence in upward_imports(PACKAGE):
        print(f"Upward: {sentence}")
    for module, importer in sorted(only_importers(graph).items()):
        print(f"One importer: {module} <- {importer}")
    if arguments.write:
        from fractal_rm.files import write_atomic

        write_atomic(PAGE, with_block(PAGE.read_text(encoding="utf-8"), text))
        write_atomic(PICTURE, picture(PACKAGE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
