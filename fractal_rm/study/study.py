"""The study: its runs, their rows in a file, and their execution in one or several processes.

Each measurement of a run is a row. A run is done once its last measurement has a row. On a separate seed, trials choose
the options of each arm.
"""

import math
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

import torch
import yaml
from filelock import FileLock, Timeout

from fractal_rm.errors import did_you_mean
from fractal_rm.evaluation.results import ResultsFile, has_row
from fractal_rm.files import read_yaml, write_atomic
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ranges import RANGES
from fractal_rm.study.arms import ARMS, LEARNING_RATES, OUTCOME_ONLY, TUNED, Arm, Assets, Options
from fractal_rm.study.run import Budget, quiet, run_arm
from fractal_rm.study.statistics import BENCHMARK, latest
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS
from fractal_rm.tasks.task import Task

One = TypeVar("One")
# Trials use a seed that is never reported: its problems, samples and reward models are different ones.
TUNING_SEED = 1000


class Unit(NamedTuple):
    """One run; `trial` numbers a configuration on the tuning seed, and is None in the study itself."""

    task: str
    seed: int
    arm: str
    trial: int | None = None


@dataclass(frozen=True)
class Study:
    """A comparison of arms over tasks and seeds, with its files."""

    results: Path  # file of result rows
    work: Path  # folder of policies and reward models
    budget: Budget  # of each run
    chosen: Mapping[str, Options]  # options of each arm
    tasks: Mapping[str, Task] = field(default_factory=lambda: CONDITIONS)
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    assets: type[Assets] = Assets  # makes policies and reward models
    split: str = "held_out"  # split named in the rows; rows of trials have `tuning`
    reward_model_steps: int = -1  # optimizer steps of a reward model; -1: all of its epochs
    benchmark: str = BENCHMARK  # named in the rows

    # Which runs there are --------------------------------------------------------------------------------------------

    def units(self, tasks: Sequence[str], arms: Sequence[str], seeds: int) -> list[Unit]:
        """All runs of the study, seed by seed, so that partial results are balanced; the first tasks come first."""
        return [Unit(task, seed, arm) for seed in range(seeds) for task in tasks for arm in arms]

    def updates(self, unit: Unit) -> int:
        """Policy updates of a run."""
        return self.budget.updates or self.tasks[unit.task].updates

    def tuned_as(self, arm: str) -> str:
        """The arm whose trials choose the options of this arm: the arm itself."""
        return arm

    def rates(self, arm: str, rate: float) -> Sequence[float]:
        """Learning rates of the trials of an arm: only the study's."""
        return (rate,)

    def trials_at(self, arm: str, rates: Sequence[float]) -> list[int]:
        """Numbers of the trials of an arm with these learning rates."""
        trials = self.arms[arm].trials
        return [number for rate in rates for number, trial in enumerate(trials) if trial["learning_rate"] == rate]

    def check_arms(self, names: Iterable[str]) -> None:
        """Raise ValueError if an arm does not exist."""
        unknown = next((name for name in names if name not in self.arms), None)
        if unknown is not None:
            raise ValueError(
                f"There is no arm {unknown!r}.{did_you_mean(unknown, self.arms)} Choose from {', '.join(self.arms)}."
            )

    # Runs ------------------------------------------------------------------------------------------------------------

    def _options(self, unit: Unit) -> Options:
        return self.chosen[unit.arm] if unit.trial is None else self.arms[unit.arm].trials[unit.trial]

    def _budget(self, unit: Unit) -> Budget:
        return replace(self.budget, updates=self.updates(unit))

    def config(self, unit: Unit) -> dict[str, Any]:
        """Settings of a run, as its rows store them; rows also say whether they are the `last` of their run."""
        task, kind = self.tasks[unit.task], self.arms[unit.arm].judge
        budget = asdict(self._budget(unit))
        if budget["draws"] == 1:  # older rows lack this field
            del budget["draws"]
        config = {**self._options(unit), "budget": budget, "trial": unit.trial}
        recipe = self.assets.recipes(task).get(kind or "")
        policy = {"policy": unit.seed % task.policies}
        return (config if recipe is None else config | {"reward_model": recipe}) | policy

    def is_done(self, unit: Unit, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last evaluation of a run with these settings has its row."""
        last = self.config(unit) | {"last": True}
        return has_row(rows, dataset=unit.task, seed=unit.seed, arm=unit.arm, config=last)

    def run(self, unit: Unit, *, wait: bool = True) -> None:
        """Do a run, unless it is done. A stopped run resumes from its checkpoint; without one, it starts again.

        If another process is doing it, wait for that process, or leave the run to it.
        """
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / "-".join(map(str, unit)))
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return
        try:
            if not self.is_done(unit, self.rows()):
                self._run(unit)
        finally:
            lock.release()

    def _running(self, unit: Unit) -> Path:
        """Where a run writes until it is done."""
        return self.work / "running" / "-".join(map(str, unit))

    def _run(self, unit: Unit) -> None:
        start = time.monotonic()
        assets = self.assets(self.work, self.tasks[unit.task], unit.seed, self.reward_model_steps)
        budget, results, config = self._budget(unit), ResultsFile(self.results), self.config(unit)
        final = (budget.updates or 0) * budget.rollouts_per_update
        folder = self._running(unit)

        def report(metrics: dict[str, Any]) -> None:
            row = {"arm": unit.arm, "dataset": unit.task, "seed": unit.seed}
            row["config"] = config | {"last": metrics["rollouts"] == final}
            here = (one for one in results.rows() if one["metrics"].get("rollouts") == metrics["rollouts"])
            if has_row(here, **row):  # by a run that was stopped between its row and its checkpoint
                return
            split = self.split if unit.trial is None else "tuning"
            seconds = time.monotonic() - start
            results.append(benchmark=self.benchmark, split=split, metrics=metrics, seconds=seconds, **row)

        with quiet():
            run_arm(self.arms[unit.arm], self._options(unit), assets, budget, report, folder)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{unit.task} seed {unit.seed} {unit.arm}: {time.monotonic() - start:.0f} s", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, including rows of other processes."""
        return ResultsFile(self.results).rows()

    def run_all(self, units: Sequence[Unit], jobs: int) -> None:
        """Do the remaining runs in order, in `jobs` processes with one thread each.

        Runs that other processes are doing come last: wait for them, and take them over if their process was killed.
        """
        for wait in (False, True):
            rows = self.rows()
            done = {unit for unit in units if self.is_done(unit, rows)}
            for unit in done:  # killed between its last row and its clean-up
                shutil.rmtree(self._running(unit), ignore_errors=True)
            run_units(partial(self.run, wait=wait), [unit for unit in units if unit not in done], jobs)

    # Tuning ----------------------------------------------------------------------------------------------------------

    def tune(self, tasks: Sequence[str], arms: Sequence[str], jobs: int) -> dict[str, Options]:
        """Run the trials of arms on the tuning seed, first those for the learning rate; returns the options of each
        arm."""
        self.run_all(self.tuning_units(tasks, {arm: LEARNING_RATES for arm in OUTCOME_ONLY}), jobs)
        rate = self.choose_rate(tasks)
        self.run_all(self.tuning_units(tasks, {arm: self.rates(arm, rate) for arm in arms}), jobs)
        return self.choose(tasks, arms, rate)

    def tuning_units(self, tasks: Sequence[str], rates: Mapping[str, Sequence[float]]) -> list[Unit]:
        """The trials of arms with some learning rates, on each of the tasks."""
        return [
            Unit(task, TUNING_SEED, arm, trial)
            for task in tasks
            for arm, mine in rates.items()
            for trial in self.trials_at(arm, mine)
        ]

    def values(self, tasks: Sequence[str], arm: str, trials: Sequence[int]) -> list[float]:
        """Accuracy of each trial of an arm, averaged over evaluations and tasks, which have equally many evaluations.

        Raises ValueError if a trial has no rows.
        """
        rows = latest(self.rows(), split="tuning", benchmark=self.benchmark)
        rows = [row for row in rows if row["arm"] == arm and row["metrics"]["rollouts"]]
        found = []
        for trial in trials:
            points: list[float] = []
            for task in tasks:
                mine = [row for row in rows if (row["dataset"], row["config"]["trial"]) == (task, trial)]
                if not mine:
                    raise ValueError(f"Trial {trial} of {arm} on {task} has no rows. Run the tuning to its end.")
                points += [row["metrics"]["accuracy"] for row in mine]
            found.append(fmean(points))
        return found

    def choose_rate(self, tasks: Sequence[str]) -> float:
        """The learning rate of the best trial of each outcome-only arm, averaged over these arms."""

        def value(rate: float) -> float:
            return fmean(max(self.values(tasks, arm, self.trials_at(arm, [rate]))) for arm in OUTCOME_ONLY)

        return max(LEARNING_RATES, key=value)

    def choose(self, tasks: Sequence[str], arms: Sequence[str], rate: float) -> dict[str, Options]:
        """The options of each arm's trial with the highest accuracy at the rate; of equal ones, the last."""
        found = {}
        for arm in arms:
            trials = self.trials_at(arm, self.rates(arm, rate))
            _, best = max(zip(self.values(tasks, arm, trials), trials, strict=True))
            found[arm] = self.arms[arm].trials[best]
        return found

    def with_tuned(self, arms: Sequence[str]) -> "Study":
        """The same study with the built-in options, those that the tuning of docs/evidence.md chose.

        Raises ValueError if an arm has none.
        """
        lacking = [arm for arm in arms if arm not in TUNED]
        if lacking:
            raise ValueError(f"No settings of {lacking[0]} are built in. Give `chosen`, a file that has them.")
        return replace(self, chosen={arm: self.arms[arm].trials[TUNED[arm]] for arm in arms})

    def with_chosen(self, path: Path, arms: Sequence[str]) -> "Study":
        """The same study with the options that tuning wrote.

        Raises FileNotFoundError if the file is missing, ValueError if it lacks an arm.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not a file. Give `chosen` the file of settings, or run with `--tune true`."
            )
        chosen = read_chosen(path)
        tuned = {arm: self.tuned_as(arm) for arm in arms}
        lacking = [arm for arm in tuned.values() if arm not in chosen]
        if lacking:
            raise ValueError(
                f"{path} has no settings of {lacking[0]}. Run with `--tune true --arms {' '.join(lacking)}`."
            )
        own = {arm: {} if like == arm else dict(self.arms[arm].options) for arm, like in tuned.items()}
        return replace(self, chosen={arm: chosen[like] | own[arm] for arm, like in tuned.items()})


def read_chosen(path: Path) -> dict[str, Options]:
    """The options of arms in a file that [`write_chosen`] wrote.

    Raises ValueError if it holds no options, unknown ones, or values of the wrong type.
    """
    found = read_yaml(path)
    known = {one.name: one for one in fields(StepPPOConfig)}
    hints = get_type_hints(StepPPOConfig)  # argument parsers change the `type` of fields
    for arm, options in found.items():
        if not isinstance(arm, str) or not isinstance(options, dict):
            raise ValueError(f"{path}: {arm!r} has {type(options).__name__} in place of options. Write `name: value`.")
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"{path}: {arm} has the option {name!r}, which StepPPOConfig does not know. Fix it.")
            if value is None and type(None) in get_args(hints[name]):
                continue
            default = known[name].default
            number = isinstance(default, int | float) and not isinstance(default, bool)
            if number and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{path}: `{name}` of {arm} is {value!r}. Give a number.")
            if number and not (value in RANGES[name] if name in RANGES else math.isfinite(cast(float, value))):
                raise ValueError(f"{path}: `{name}` of {arm} is {value!r}. Give {RANGES.get(name, 'a finite number')}.")
    return found


def write_chosen(path: Path, chosen: Mapping[str, Options], command: str) -> None:
    """Write the options of arms; other arms in the file stay."""
    before = read_chosen(path) if path.is_file() and path.stat().st_size else {}
    known = {name: dict(options) for name, options in {**before, **chosen}.items()}
    write_atomic(path, f"# Written by: {command}\n{yaml.safe_dump(known, sort_keys=False)}")


def run_units(run: Callable[[One], Any], units: Sequence[One], jobs: int) -> None:
    """Do runs in order, in one or several processes with one thread each; `run` and its units must be picklable."""
    if jobs == 1:
        torch.set_num_threads(1)
        for unit in units:
            run(unit)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_start_worker) as pool:
        for _ in pool.imap_unordered(run, units, chunksize=1):
            pass


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
