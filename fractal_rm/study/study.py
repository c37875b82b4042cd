"""The study: which runs there are, which of them are done, and running the rest in one or several processes."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from filelock import FileLock

from fractal_rm.evaluation.results import ResultsFile, has_row
from fractal_rm.files import write_atomic
from fractal_rm.study.arms import ARMS, LEARNING_RATES, OUTCOME_ONLY, Arm, Options
from fractal_rm.study.assets import Assets, recipes
from fractal_rm.study.runner import Budget, quiet, run_arm, run_units
from fractal_rm.study.statistics import BENCHMARK, latest
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS
from fractal_rm.tasks.task import Task

# Trials use seeds that are never reported; they differ in their problems, samples and reward models.
TUNING_SEED = 1000
# Tasks on which the arms beyond the core run too: long problems, and those on which step scores can be gamed.
FURTHER = ("medium", "branching")
FURTHER_SEEDS = 5


class Unit(NamedTuple):
    """One run; `trial` is the number of a configuration on the tuning seed, None in the study itself."""

    task: str
    seed: int
    arm: str
    trial: int | None = None


@dataclass(frozen=True)
class Study:
    """What is compared, how much is done, and where it goes.

    Args:
        results: The file of rows.
        work: Folder of policies and reward models.
        budget: Of a run.
        chosen: Options of each arm.
        tasks: The tasks by their names.
        arms: The arms by their names.
        split: What rows that are not trials say of the problems that they are measured on.
        reward_model_steps: Optimizer steps of a reward model; -1: as many as its epochs have.
    """

    results: Path
    work: Path
    budget: Budget
    chosen: Mapping[str, Options]
    tasks: Mapping[str, Task] = field(default_factory=lambda: CONDITIONS)
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    split: str = "held_out"
    reward_model_steps: int = -1

    def _options(self, unit: Unit) -> Options:
        return self.chosen[unit.arm] if unit.trial is None else self.arms[unit.arm].trials[unit.trial]

    def _budget(self, unit: Unit) -> Budget:
        task, arm = self.tasks[unit.task], self.arms[unit.arm]
        updates = self.budget.updates or task.updates
        if arm.times:
            updates *= arm.times
        elif arm.like:
            updates += task.responses // self.budget.rollouts_per_update
        return replace(self.budget, updates=updates)

    def config(self, unit: Unit) -> dict[str, Any]:
        """What a run is made with, as its rows say it; a row has also whether it is the `last` one of its run."""
        task, kind = self.tasks[unit.task], self.arms[unit.arm].judge
        config = {**self._options(unit), "budget": asdict(self._budget(unit)), "trial": unit.trial}
        recipe = recipes(task.flipped).get(kind or "")
        policy = {"policy": unit.seed % task.policies}
        return (config if recipe is None else config | {"reward_model": recipe}) | policy

    def is_done(self, unit: Unit, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last evaluation of a run with these settings has its row."""
        last = self.config(unit) | {"last": True}
        return has_row(rows, dataset=unit.task, seed=unit.seed, arm=unit.arm, config=last)

    def run(self, unit: Unit) -> None:
        """Do a run, unless it is done; one that was stopped half-way starts again, its rows replace the old ones.

        A second process that comes to the same run waits for the first.
        """
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "-".join(map(str, unit))):
            if not self.is_done(unit, self.rows()):
                self._run(unit)

    def _run(self, unit: Unit) -> None:
        start = time.monotonic()
        assets = Assets(self.work, self.tasks[unit.task], unit.seed, max_steps=self.reward_model_steps)
        budget, results, config = self._budget(unit), ResultsFile(self.results), self.config(unit)
        final = (budget.updates or 0) * budget.rollouts_per_update

        def report(metrics: dict[str, Any]) -> None:
            results.append(
                benchmark=BENCHMARK,
                arm=unit.arm,
                dataset=unit.task,
                seed=unit.seed,
                split=self.split if unit.trial is None else "tuning",
                metrics=metrics,
                config=config | {"last": metrics["rollouts"] == final},
                seconds=time.monotonic() - start,
            )

        with quiet():
            run_arm(self.arms[unit.arm], self._options(unit), assets, budget, report)
        print(f"{unit.task} seed {unit.seed} {unit.arm}: {time.monotonic() - start:.0f} s", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, those of other processes included."""
        return ResultsFile(self.results).rows()

    def run_all(self, units: Sequence[Unit], jobs: int) -> None:
        """Do the runs that are not done, in their order.

        Args:
            units: The runs.
            jobs: Processes, each with one thread.
        """
        rows = self.rows()
        run_units(self.run, [unit for unit in units if not self.is_done(unit, rows)], jobs)

    def values(self, tasks: Sequence[str], arm: str, trials: Sequence[int]) -> list[float]:
        """Accuracy of an arm's trials, averaged over evaluations and tasks.

        Args:
            tasks: Where the trials ran, with as many evaluations each.
            arm: Its name.
            trials: Their numbers.

        Raises:
            ValueError: If a trial has no rows.
        """
        rows = [row for row in latest(self.rows(), split="tuning") if row["arm"] == arm and row["metrics"]["rollouts"]]
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
            return fmean(max(self.values(tasks, arm, trials_at(arm, rate))) for arm in OUTCOME_ONLY)

        return max(LEARNING_RATES, key=value)

    def choose(self, tasks: Sequence[str], arms: Sequence[str], rate: float) -> dict[str, Options]:
        """The options of each arm whose trial had the highest accuracy; of equal ones the last.

        Args:
            tasks: Where the trials ran.
            arms: Whose trials are compared.
            rate: The learning rate of the study; an arm with `own_rate` chooses among all.

        Raises:
            ValueError: If a trial has no rows.
        """
        found = {}
        for arm in arms:
            rates = LEARNING_RATES if ARMS[arm].own_rate else (rate,)
            trials = [trial for one in rates for trial in trials_at(arm, one)]
            _, best = max(zip(self.values(tasks, arm, trials), trials, strict=True))
            found[arm] = ARMS[arm].trials[best]
        return found


def check_arms(names: Iterable[str]) -> None:
    """Refuse names that no arm has.

    Args:
        names: Names of arms.

    Raises:
        ValueError: If there is no such arm.
    """
    unknown = next((name for name in names if name not in ARMS), None)
    if unknown is not None:
        raise ValueError(f"There is no arm {unknown!r}. Choose from {', '.join(ARMS)}.")


def study_units(tasks: Sequence[str], arms: Sequence[str], seeds: int) -> list[Unit]:
    """All runs: core arms first, then seed by seed, so that partial results are balanced.

    Args:
        tasks: Names of tasks, the most important first.
        arms: Names of arms.
        seeds: How many seeds the core arms have; the others have at most five, on two tasks or those they name.
    """
    core = [Unit(task, seed, arm) for seed in range(seeds) for task in tasks for arm in arms if ARMS[arm].core]
    further = [
        Unit(task, seed, arm)
        for seed in range(min(seeds, FURTHER_SEEDS))
        for task in tasks
        for arm in arms
        if not ARMS[arm].core and task in (ARMS[arm].conditions or FURTHER)
    ]
    return core + further


def trials_at(arm: str, rate: float) -> list[int]:
    """Numbers of an arm's trials with a learning rate."""
    return [number for number, trial in enumerate(ARMS[arm].trials) if trial["learning_rate"] == rate]


def tuning_units(tasks: Sequence[str], arms: Sequence[str], rates: Sequence[float]) -> list[Unit]:
    """The trials of arms with some learning rates, on each of the tasks."""
    return [
        Unit(task, TUNING_SEED, arm, trial)
        for task in tasks
        for arm in arms
        for rate in rates
        for trial in trials_at(arm, rate)
    ]


def read_chosen(path: Path, arms: Sequence[str]) -> dict[str, Options]:
    """Options of arms from the file that the tuning wrote; a longer arm has the options of the arm that it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it lacks an arm.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. Give `chosen` the file of settings, or run with `--tune true`.")
    chosen = yaml.safe_load(path.read_text(encoding="utf-8"))
    tuned = {arm: ARMS[arm].like or arm for arm in arms}
    lacking = [arm for arm in tuned.values() if arm not in chosen]
    if lacking:
        raise ValueError(f"{path} has no settings of {lacking[0]}. Run with `--tune true --arms {' '.join(lacking)}`.")
    return {arm: chosen[like] for arm, like in tuned.items()}


def write_chosen(path: Path, chosen: Mapping[str, Options], command: str) -> None:
    """Write the options of arms; other arms in the file stay."""
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {**(before or {}), **chosen}
    ordered = {name: dict(known[name]) for name in ARMS if name in known}
    write_atomic(path, f"# Written by: {command}\n{yaml.safe_dump(ordered, sort_keys=False)}")
