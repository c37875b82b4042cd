"""The study: one run, in which an arm trains a policy on a task with a seed, and all runs in one or several processes.

A policy is measured at fixed numbers of rollouts, and each measurement is a row. A run that has its last row is done.
"""

import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import datasets
import torch
import torch.nn.functional as F
import transformers
import yaml
from filelock import FileLock
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerState

from fractal_rm.evaluation.results import ResultsFile, has_row
from fractal_rm.files import made_once, write_atomic
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.study.arms import ARMS, LEARNING_RATES, OUTCOME_ONLY, Arm, Assets, Options, load_policy
from fractal_rm.study.rivals import WholeResponseReward
from fractal_rm.study.statistics import BENCHMARK, latest
from fractal_rm.tasks.arithmetic.conditions import CONDITIONS
from fractal_rm.tasks.task import Problem, Task, sample_responses, unseen

# The same for all arms; the rest is what `arms.py` names. The baseline of step scores is that of the rows there are: an
# arm with the one of `StepPPOConfig` names it.
PPO_SETTINGS: Options = {
    "center": "batch",
    "num_generations": 8,
    "num_iterations": 1,
    "value_learning_rate": 1e-3,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
    "temperature": 1.0,
    "beta": 0.0,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
# Shares of the updates after which a policy is measured.
POINTS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
# Held-out responses from which the distance to the base policy is estimated.
KL_RESPONSES = 64
# Seed of the samples: every arm and evaluation draws with the same one.
SAMPLING_SEED = 7
BATCH = 256

Metrics = dict[str, Any]
One = TypeVar("One")
# Trials use seeds that are never reported; they differ in their problems, samples and reward models.
TUNING_SEED = 1000


@dataclass(frozen=True)
class Budget:
    """How much a run does.

    Args:
        rollouts_per_update: Completions in an update.
        held_out: Problems that a policy is measured on.
        updates: Policy updates; None: the task's.
        points: Shares of the updates after which the policy is measured, beside the start.
    """

    rollouts_per_update: int = 64
    held_out: int = 256
    updates: int | None = None
    points: tuple[float, ...] = POINTS


def run_arm(arm: Arm, options: Options, assets: Assets, budget: Budget, report: Callable[[Metrics], None]) -> None:
    """Train a policy with an arm's rewards and report its metrics at each evaluation point, the start included.

    Args:
        arm: Where rewards come from.
        options: Settings of [`StepPPOConfig`] that were chosen for it.
        assets: Policy and reward models.
        budget: How much to do.
        report: Takes the metrics of each point.
    """
    task, kind = assets.task, arm.judge
    updates = budget.updates or task.updates
    judge = assets.reward_model(kind) if kind else None
    held_out = task.problems("held_out", budget.held_out, assets.seed)
    count = updates * budget.rollouts_per_update // PPO_SETTINGS["num_generations"]
    problems = unseen(task.problems("train", 2 * count, assets.seed), {problem.prompt for problem in held_out})
    cost, (reference, tokenizer), clock = assets.cost(kind), load_policy(assets.policy()), Clock()
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        trainer = make_trainer(
            arm,
            PPO_SETTINGS
            | {"max_completion_length": task.max_new_tokens}
            | options
            | {"max_steps": updates, "per_device_train_batch_size": budget.rollouts_per_update, "seed": assets.seed},
            assets.policy(),
            judge,
            assets.outcome(arm, judge),
            [problem.prompt for problem in problems[:count]],
            Path(folder),
            # A model that learns on goes on with the responses that it was trained on, too.
            responses=assets.bags(kind) if kind and options.get("rm_update_every") else None,
        )
        steps = sorted({max(round(share * updates), 1) for share in budget.points})

        def evaluate(step: int) -> None:
            with clock.stopped():
                model: Any = trainer.model
                if step:
                    # Greedy decoding in the middle and at the end: it is as dear as sampling.
                    greedy = step in (steps[-1] / 2, steps[-1])
                    found, texts = measure(model, tokenizer, task, held_out, greedy=greedy)
                else:
                    found, texts = measure_start(assets, budget.held_out)
                prompts, some = [problem.prompt for problem in held_out], slice(KL_RESPONSES)
                logprobs = [response_logprobs(m, tokenizer, prompts[some], texts[some]) for m in (model, reference)]
                found |= {
                    "rollouts": step // trainer.num_iterations * budget.rollouts_per_update,
                    "rm_score": mean_score(judge, prompts, texts),
                    "kl": (logprobs[0] - logprobs[1]).mean().item(),
                    "alarms": trainer.alarms.guards.raised,
                    "seconds": clock.seconds,
                }
                found.pop("step_accuracy_greedy", None)
                report(found | cost)

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Evaluations(steps, evaluate))
        trainer.train()


def make_trainer(
    arm: Arm,
    options: Options,
    policy: Path,
    judge: StepRewardModel | Path | None,
    outcome: Callable[..., list[float]],
    prompts: Sequence[str],
    folder: Path,
    *,
    responses: Any = None,
) -> StepPPOTrainer:
    """The trainer of an arm.

    Args:
        arm: Where rewards come from.
        options: Settings of [`StepPPOConfig`].
        policy: Folder of the base policy.
        judge: What scores responses or their steps.
        outcome: The outcome reward, for arms that have one.
        prompts: Of the training.
        folder: Where the trainer writes.
        responses: Labelled responses, for a reward model that learns on.
    """
    functions: list[Any] = [outcome] if arm.outcome else []
    if arm.response_model and isinstance(judge, StepRewardModel):
        functions.append(WholeResponseReward(judge))
    return StepPPOTrainer(
        model=str(policy),
        reward_model=None if arm.response_model else judge,
        reward_funcs=functions or None,
        args=StepPPOConfig(output_dir=str(folder), **options),
        reward_model_dataset=responses,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )


class Evaluations(TrainerCallback):
    """Evaluates a policy before its training and after some updates.

    Args:
        steps: Numbers of the updates.
        evaluate: Takes the number of updates so far.
    """

    def __init__(self, steps: Iterable[int], evaluate: Callable[[int], None]) -> None:
        self.steps, self.evaluate = frozenset(steps), evaluate

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.evaluate(0)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.evaluate(state.global_step)


class Clock:
    """Processor seconds of a training since its first evaluation, without those of evaluations."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what is done in the block."""
        if self._since is not None:
            self.seconds += time.process_time() - self._since
        yield
        self._since = time.process_time()


# What a policy is worth ----------------------------------------------------------------------------------------------


def measure(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Problem], *, greedy: bool = True
) -> tuple[Metrics, list[str]]:
    """Accuracy on held-out problems, of answers and of steps, and the sampled responses.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        task: Gives the longest response.
        problems: Held-out problems.
        greedy: Also decode greedily, which doubles the work; otherwise these metrics are None.

    Returns:
        Metrics, those of greedy decoding with `_greedy` behind their names; the sampled responses.
    """
    found: Metrics = {"accuracy_greedy": None, "step_accuracy_greedy": None}
    texts: list[str] = []
    for suffix in ("_greedy", "") if greedy else ("",):
        texts = sample_responses(
            model,
            tokenizer,
            [problem.prompt for problem in problems],
            greedy=suffix == "_greedy",
            max_new_tokens=task.max_new_tokens,
            seed=SAMPLING_SEED,
        )
        found[f"accuracy{suffix}"] = mean([p.check_answer(text) for p, text in zip(problems, texts, strict=True)])
        checked = [p.check_steps(text) for p, text in zip(problems, texts, strict=True)]
        steps = [good for flags in checked if flags is not None for good in flags]
        found[f"step_accuracy{suffix}"] = mean(steps) if None not in checked else None
    found["response_tokens"] = mean([len(ids) for ids in tokenizer(texts)["input_ids"]])
    return found, texts


def measure_start(assets: Assets, count: int) -> tuple[Metrics, list[str]]:
    """What the base policy is worth on held-out problems, and its sampled responses: the start of every arm.

    Args:
        assets: Keep them.
        count: How many problems.
    """

    def make(folder: Path) -> None:
        problems = assets.task.problems("held_out", count, assets.seed)
        found, texts = measure(*load_policy(assets.policy()), assets.task, problems)
        write_atomic(folder / "start.json", json.dumps({"metrics": found, "texts": texts}))

    folder = made_once(assets.own / f"start-{count}", make)
    saved = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    return saved["metrics"], saved["texts"]


def mean_score(judge: StepRewardModel | None, prompts: list[str], texts: list[str]) -> float | None:
    """Mean response score by what rewards the policy; None without it."""
    if judge is None:
        return None
    if judge.settings.segmentation.method == "given":
        return mean(WholeResponseReward(judge)(prompts, texts))
    scored = judge.score(prompts, texts, progress=False)
    return mean([result.score for result in scored if result.error is None])


@torch.no_grad()
def response_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Log-probability (B,) of each response, the end of text included, in nats.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts.
        responses: Texts that follow them directly.
    """
    found = []
    was_training = model.training
    model.eval()
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        heads, tails = (tokenizer(list(texts[rows]))["input_ids"] for texts in (prompts, responses))
        ids = [torch.tensor([*head, *tail, tokenizer.eos_token_id]) for head, tail in zip(heads, tails, strict=True)]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        starts, ends = torch.tensor([len(head) for head in heads]), torch.tensor([len(row) for row in ids])
        places = torch.arange(batch.size(1))
        mask = (places >= starts[:, None]) & (places < ends[:, None])
        # Padding stands on the right, where a causal model does not see it.
        logits = model(input_ids=batch, attention_mask=(places < ends[:, None]).long()).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        found.append(-nll.masked_fill(~mask[:, 1:], 0.0).sum(dim=1))
    model.train(was_training)
    return torch.cat(found)


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / max(len(values), 1)


# Many runs -----------------------------------------------------------------------------------------------------------


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
        assets: How their reward models are made.
        split: What rows that are not trials say of the problems that they are measured on.
        reward_model_steps: Optimizer steps of a reward model; -1: as many as its epochs have.
    """

    results: Path
    work: Path
    budget: Budget
    chosen: Mapping[str, Options]
    tasks: Mapping[str, Task] = field(default_factory=lambda: CONDITIONS)
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    assets: type[Assets] = Assets
    split: str = "held_out"
    reward_model_steps: int = -1

    # Which runs there are --------------------------------------------------------------------------------------------

    def units(self, tasks: Sequence[str], arms: Sequence[str], seeds: int) -> list[Unit]:
        """All runs of the study: seed by seed, so that partial results are balanced.

        Args:
            tasks: Names of tasks, the most important first.
            arms: Names of arms.
            seeds: How many seeds.
        """
        return [Unit(task, seed, arm) for seed in range(seeds) for task in tasks for arm in arms]

    def updates(self, unit: Unit) -> int:
        """Policy updates of a run."""
        return self.budget.updates or self.tasks[unit.task].updates

    def tuned_as(self, arm: str) -> str:
        """The arm whose trials choose the options of an arm: its own."""
        return arm

    def rates(self, arm: str, rate: float) -> Sequence[float]:
        """Learning rates of the trials of an arm: the one of the study."""
        return (rate,)

    def trials_at(self, arm: str, rates: Sequence[float]) -> list[int]:
        """Numbers of the trials of an arm with these learning rates."""
        trials = self.arms[arm].trials
        return [number for rate in rates for number, trial in enumerate(trials) if trial["learning_rate"] == rate]

    def check_arms(self, names: Iterable[str]) -> None:
        """Refuse names that no arm has.

        Raises:
            ValueError: If there is no such arm.
        """
        unknown = next((name for name in names if name not in self.arms), None)
        if unknown is not None:
            raise ValueError(
                f"There is no arm {unknown!r}. Choose from {', '.join(self.arms)}. The further rivals of "
                "docs/evidence.md are run by `python -m benchmarks.evidence.dense_vs_outcome` in a clone."
            )

    # Runs ------------------------------------------------------------------------------------------------------------

    def _options(self, unit: Unit) -> Options:
        return self.chosen[unit.arm] if unit.trial is None else self.arms[unit.arm].trials[unit.trial]

    def _budget(self, unit: Unit) -> Budget:
        return replace(self.budget, updates=self.updates(unit))

    def config(self, unit: Unit) -> dict[str, Any]:
        """What a run is made with, as its rows say it; a row has also whether it is the `last` one of its run."""
        task, kind = self.tasks[unit.task], self.arms[unit.arm].judge
        config = {**self._options(unit), "budget": asdict(self._budget(unit)), "trial": unit.trial}
        recipe = self.assets.recipes(task).get(kind or "")
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
        assets = self.assets(self.work, self.tasks[unit.task], unit.seed, self.reward_model_steps)
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

    # Tuning ----------------------------------------------------------------------------------------------------------

    def tune(self, tasks: Sequence[str], arms: Sequence[str], jobs: int) -> dict[str, Options]:
        """Run the trials of arms on the tuning seed: first those that choose the learning rate, then those with it.

        Args:
            tasks: Where the trials run.
            arms: Names of arms that have trials of their own.
            jobs: Processes, each with one thread.

        Returns:
            The options of each arm.
        """
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
            return fmean(max(self.values(tasks, arm, self.trials_at(arm, [rate]))) for arm in OUTCOME_ONLY)

        return max(LEARNING_RATES, key=value)

    def choose(self, tasks: Sequence[str], arms: Sequence[str], rate: float) -> dict[str, Options]:
        """The options of each arm whose trial had the highest accuracy; of equal ones the last.

        Args:
            tasks: Where the trials ran.
            arms: Whose trials are compared.
            rate: The learning rate of the study.

        Raises:
            ValueError: If a trial has no rows.
        """
        found = {}
        for arm in arms:
            trials = self.trials_at(arm, self.rates(arm, rate))
            _, best = max(zip(self.values(tasks, arm, trials), trials, strict=True))
            found[arm] = self.arms[arm].trials[best]
        return found

    def with_chosen(self, path: Path, arms: Sequence[str]) -> "Study":
        """The same study with the options that the tuning wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it lacks an arm.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is no file. Give `chosen` the file of settings, or run with `--tune true`."
            )
        chosen = yaml.safe_load(path.read_text(encoding="utf-8"))
        tuned = {arm: self.tuned_as(arm) for arm in arms}
        lacking = [arm for arm in tuned.values() if arm not in chosen]
        if lacking:
            raise ValueError(
                f"{path} has no settings of {lacking[0]}. Run with `--tune true --arms {' '.join(lacking)}`."
            )
        own = {arm: {} if like == arm else dict(self.arms[arm].options) for arm, like in tuned.items()}
        return replace(self, chosen={arm: chosen[like] | own[arm] for arm, like in tuned.items()})


def write_chosen(path: Path, chosen: Mapping[str, Options], command: str) -> None:
    """Write the options of arms; other arms in the file stay."""
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {name: dict(options) for name, options in {**(before or {}), **chosen}.items()}
    write_atomic(path, f"# Written by: {command}\n{yaml.safe_dump(known, sort_keys=False)}")


def run_units(run: Callable[[One], Any], units: Sequence[One], jobs: int) -> None:
    """Do runs in their order, in one or several processes.

    Args:
        run: Does one; it can be pickled if there are several processes.
        units: The runs.
        jobs: Processes, each with one thread.
    """
    if jobs == 1:
        torch.set_num_threads(1)
        for unit in units:
            run(unit)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.imap_unordered(run, units, chunksize=1):
            pass


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' own bars and notes; errors still come through."""
    notes = transformers.utils.logging
    before = notes.get_verbosity(), notes.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notes.set_verbosity(before[0])
        if before[1]:
            notes.enable_progress_bar()
        if not before[2]:
            datasets.enable_progress_bars()
