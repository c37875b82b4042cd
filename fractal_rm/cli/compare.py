"""`fractal-rm compare`: dense against outcome-only rewards on the arithmetic settings."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fractal_rm.cli.checks import check_matplotlib, check_writable_folder
from fractal_rm.cli.options.parser import parse
from fractal_rm.evaluation.results import portable_command
from fractal_rm.files import write_atomic
from fractal_rm.ranges import check_ranges
from fractal_rm.study.arms import ArmName
from fractal_rm.study.page import draw_curves, sentences, tables
from fractal_rm.study.run import Budget
from fractal_rm.study.study import Study, write_chosen
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS, ConditionName

# Long chains and another form of problem: a learning rate that suits one may be too high for the other.
TUNING_TASKS = ("medium", "branching")
# Trials take this share of a run's updates and are measured in the middle and at the end.
TUNING_SHARE, TUNING_POINTS = 0.6, (0.5, 1.0)
SMOKE_BUDGET = Budget(rollouts_per_update=16, held_out=8, updates=2, points=(1.0,))
SMOKE_STEPS = 2
REPORT = (
    "Every arm trains the same base policies on the same prompts, with the same number of rollouts. The first table "
    "compares each arm with the better of the outcome-only arms: accuracy is in % of held-out problems; differences "
    "are in points, paired over seeds, with 95 % bootstrap intervals if there are several seeds. The second table is "
    "the share of held-out problems that are solved at the end: interquartile mean over seeds, with the number of "
    "seeds in parentheses."
)
_FIRST_LOOK = "For a first look: --settings easy --arms outcome_ppo fractal_mix --seeds 2."


@dataclass
class CompareArguments:
    """Arguments of `fractal-rm compare`."""

    output_dir: str = field(
        default="runs/compare", metadata={"help": "Folder of base policies, reward models and results."}
    )
    results: str | None = field(
        default=None, metadata={"help": "File of results, one per line; default: `results.jsonl` in `output_dir`."}
    )
    chosen: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with the options of each arm; default: `chosen.yaml` in `output_dir`, which `tune` "
            "writes, or else the options that docs/evidence.md uses."
        },
    )
    settings: list[ConditionName] | None = field(
        default=None,
        metadata={"help": f"Settings of the task. Default: all; with `tune` {' and '.join(TUNING_TASKS)}."},
    )
    arms: list[ArmName] | None = field(
        default=None,
        metadata={
            "help": "Rewards to compare. Default: all. `outcome_ppo` is the outcome alone, `fractal_mix` adds step "
            "scores. In a clone, `python -m benchmarks.evidence.dense_vs_outcome` has the other rivals of "
            "docs/evidence.md."
        },
    )
    seeds: int = field(default=10, metadata={"help": f"Seeds of each arm. {_FIRST_LOOK}"})
    jobs: int = field(default=1, metadata={"help": "Processes, each with one thread."})
    tune: bool = field(
        default=False,
        metadata={
            "help": "Instead of the study, run the trials of each arm on the tuning seed and write the best "
            "to `chosen`."
        },
    )
    smoke: bool = field(default=False, metadata={"help": "A tiny study, to check that everything runs."})

    def __post_init__(self) -> None:
        check_ranges(self)


def compare(argv: Sequence[str]) -> None:
    """Compare rewards on the arithmetic settings, with the same policies, prompts, rollouts and updates for all."""
    (arguments,) = parse("compare", [CompareArguments], argv)
    run_comparison(arguments)


def run_comparison(arguments: CompareArguments, kind: type[Study] = Study) -> list[dict[str, Any]]:
    """Tune, or run what the study still lacks, and write and print the results. Benchmarks pass another `kind`."""
    folder = Path(arguments.output_dir, *(["smoke"] if arguments.smoke else []))  # separate from real results
    check_writable_folder(folder)
    results = Path(arguments.results or folder / "results.jsonl")
    chosen_file = Path(arguments.chosen or folder / "chosen.yaml")
    check_matplotlib()  # before the work, not after
    tuned_on = arguments.settings or TUNING_TASKS
    budget = Budget()
    if arguments.smoke:
        budget = SMOKE_BUDGET
    elif arguments.tune:
        budget = Budget(updates=round(TUNING_SHARE * CONDITIONS[tuned_on[0]].updates), points=TUNING_POINTS)
    study = kind(results, folder, budget, {})
    if arguments.smoke:
        tasks = {name: one.small() for name, one in CONDITIONS.items()}
        study = replace(study, tasks=tasks, reward_model_steps=SMOKE_STEPS)
    arms = arguments.arms or list(study.arms)
    study.check_arms(arms)
    if arguments.tune:
        arms = [name for name in arms if study.tuned_as(name) == name]
        write_chosen(chosen_file, study.tune(tuned_on, arms, arguments.jobs), portable_command(sys.argv))
        print(f"{chosen_file} holds the settings of {len(arms)} arms.")
        return study.rows()
    given = arguments.chosen is not None or chosen_file.is_file()
    study = study.with_chosen(chosen_file, arms) if given else study.with_tuned(arms)
    units = study.units(arguments.settings or list(CONDITIONS), arms, arguments.seeds)
    rows = study.rows()
    done = sum(study.is_done(unit, rows) for unit in units)
    hint = "" if arguments.settings or arguments.arms else f" {_FIRST_LOOK}"
    takes = "a minute or more each, after minutes for base policies and reward models"
    if arguments.smoke:
        takes = "seconds each, too small to learn anything"
    before = f" ({done} already done)" if done else ""
    print(f"{len(units)} runs{before}, {takes}. The same command continues after Ctrl-C.{hint}", flush=True)
    study.run_all(units, arguments.jobs)
    rows = study.rows()
    made = [f"## {name}\n\n{table}" for name, table in tables(rows, study.arms).items()]
    drawn = ["![Learning curves](curves.png)"] if draw_curves(folder / "curves.png", rows) else []
    page = ["# Dense against outcome-only rewards", REPORT, *drawn, *made]
    write_atomic(folder / "report.md", "\n\n".join(page) + "\n")
    for sentence in sentences(rows):
        print(sentence)
    print(f"{folder / 'report.md'} has the tables, {folder / 'curves.png'} the curves, {results} the rows.")
    return rows
