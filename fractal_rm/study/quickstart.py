"""The whole pipeline on the arithmetic task: response labels -> step scores -> PPO with dense rewards -> a report.

Every stage leaves its result in the output folder and is skipped when it is there already, so a run that was stopped
goes on where it was. Reward models see outcomes only; the exact step checker is read by evaluation alone.
"""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState

from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.files import write_atomic
from fractal_rm.hf.progress import RichProgress
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.report import plots
from fractal_rm.report.quickstart_report import write_report
from fractal_rm.report.quickstart_summary import summarize
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import exact_answer, make_problems
from fractal_rm.tasks.sampling import sample_responses

console = Console()


@dataclass(frozen=True)
class Arm:
    """One way to reward the policy; everything else is the same in all arms."""

    name: str
    dense: bool
    outcome: bool
    settings: dict[str, Any] = field(default_factory=dict)


ARMS = (Arm("dense+outcome", dense=True, outcome=True), Arm("outcome", dense=False, outcome=True))


@dataclass
class Budget:
    """How much work each stage does."""

    responses: int
    updates: int
    evaluate_every: int
    held_out: int = 512
    validation: int = 1000
    ppo_prompts: int = 20_000
    rollouts_per_update: int = 64


BUDGETS = {
    "small": Budget(responses=6144, updates=60, evaluate_every=6),
    "full": Budget(responses=16_384, updates=240, evaluate_every=12, held_out=1024),
}


# The same for both arms; chosen on seeds other than the default one (docs/quickstart.md).
PPO_SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 64,
    "num_iterations": 1,
    "learning_rate": 6e-4,
    "value_learning_rate": 1e-3,
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
    "temperature": 1.0,
    "beta": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 20,
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,  # at this size half precision costs accuracy and saves nothing
}


@dataclass
class QuickstartArguments:
    """Arguments of `fractal-rm quickstart`."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where models, rows and report go."})
    seed: int = field(default=0, metadata={"help": "Seed of data, models and training."})
    budget: Literal["small", "full"] = field(
        default="small", metadata={"help": "`small`: minutes on two cores. `full`: longer training, smoother curves."}
    )


class Quickstart:
    """One run: its arguments, folder, problems and clock.

    Args:
        arguments: What to run and where.
        budget: Replaces the budget that the arguments name (tests run a tiny one).
        arms: Rewards to compare; the report is about the first two (benchmarks add others).
    """

    def __init__(
        self, arguments: QuickstartArguments, budget: Budget | None = None, arms: Sequence[Arm] = ARMS
    ) -> None:
        self.arms = arms
        self.arguments, self.budget = arguments, budget or BUDGETS[arguments.budget]
        self.folder = Path(arguments.output_dir)
        seed = arguments.seed
        counts = {
            "held_out": self.budget.held_out,
            "train": self.budget.responses,
            "validation": self.budget.validation,
            "ppo": self.budget.ppo_prompts,
        }
        streams = {name: make_problems(count, seed=10 * seed + i) for i, (name, count) in enumerate(counts.items())}
        held_out = {problem.prompt for problem in streams["held_out"]}
        self.problems = {
            name: [p for p in problems if name == "held_out" or p.prompt not in held_out]
            for name, problems in streams.items()
        }
        self.results = ResultsFile(self.folder / "results.jsonl")

    # Stages -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All stages, the finished ones skipped."""
        self._claim_folder()
        stages: list[tuple[str, str, Callable[[], None]]] = [
            ("policy", "Taking the small policy with wrong beliefs that the package ships", self.take_policy),
            ("responses.jsonl", "Sampling responses, labelled by their outcome", self.sample),
            ("reward_model", "Training the step reward model from outcomes", self.train_reward_model),
            *(
                (
                    f"ppo/{arm.name}",
                    f"PPO with {arm.name.replace('+', ' + ')} rewards",
                    lambda arm=arm: self.train_ppo(arm),
                )
                for arm in self.arms
            ),
        ]
        for number, (name, title, stage) in enumerate(stages, 1):
            seconds_file = self.folder / "done" / f"{name.replace('/', '-')}.json"
            if seconds_file.is_file():
                console.print(f"[dim]{number}/{len(stages)}  {title}: done before[/dim]")
                continue
            console.print(f"[bold]{number}/{len(stages)}[/bold]  {title} ...")
            start = time.perf_counter()
            stage()
            seconds = time.perf_counter() - start
            write_atomic(seconds_file, json.dumps({"seconds": seconds}))
            console.print(f"      {seconds:.0f} s")
        self.report()

    def _claim_folder(self) -> None:
        """Refuse a folder that belongs to another run, so that no stage mixes with another seed's."""
        mine = {"seed": self.arguments.seed, "budget": asdict(self.budget)}
        file = self.folder / "quickstart.json"
        (self.folder / "done").mkdir(parents=True, exist_ok=True)
        if file.is_file() and json.loads(file.read_text()) != mine:
            raise ValueError(
                f"{self.folder} holds a run with another seed or budget. Choose another `--output_dir`, or delete it."
            )
        write_atomic(file, json.dumps(mine))

    def take_policy(self) -> None:
        """The base policy, whose mistakes are beliefs; `tasks/arithmetic/base_policy.py` says how it was made."""
        shutil.copytree(SHIPPED_POLICY, self.folder / "policy", dirs_exist_ok=True)

    def sample(self) -> None:
        """Training responses with outcome labels; validation responses with gold step labels beside them."""

        model, tokenizer = self._policy()
        for offset, (split, name) in enumerate((("train", "responses"), ("validation", "validation"))):
            problems = self.problems[split]
            responses = sample_responses(
                model, tokenizer, [p.prompt for p in problems], seed=1000 * self.arguments.seed + offset
            )
            rows = []
            for problem, response in zip(problems, responses, strict=True):
                if not response.strip():
                    continue
                row: dict[str, Any] = {"prompt": problem.prompt, "label": float(problem.check_answer(response))}
                if split == "train":
                    row["completion"] = response
                else:  # steps and gold labels, for evaluation only
                    row["steps"] = [line.strip() for line in response.split("\n") if line.strip()]
                    row["step_labels"] = [float(good) for good in problem.check_steps(response)]
                rows.append(json.dumps(row))
            write_atomic(self.folder / f"{name}.jsonl", "\n".join(rows) + "\n")

    def train_reward_model(self) -> None:
        """The likelihood scorer on outcome labels; step labels are read by the evaluation after it."""

        start = time.perf_counter()
        with quiet():
            trainer = FractalTrainer(
                model=self.folder / "policy",
                args=FractalConfig(
                    output_dir=str(self.folder / "reward_model"),
                    aggregation="product",
                    learning_rate=1e-3,
                    head_learning_rate=5e-2,
                    lr_scheduler_type="cosine",
                    num_train_epochs=2,
                    per_device_train_batch_size=32,
                    per_device_eval_batch_size=128,
                    train_sampling_strategy="group_by_length",
                    seed=self.arguments.seed,
                    save_strategy="no",
                    report_to=[],
                    logging_steps=100,
                ),
                train_dataset=read_jsonl(self.folder / "responses.jsonl"),
                eval_dataset=read_jsonl(self.folder / "validation.jsonl"),
            )
            progress = RichProgress(trainer, "reward model")  # from here on nothing else speaks
            before = trainer.evaluate()
            with progress:
                trainer.train()
            after = trainer.evaluate()
            trainer.save_model()
        seconds = time.perf_counter() - start
        for arm, found in (("likelihood_before_training", before), ("reward_model", after)):
            metrics = {
                key.removeprefix("eval_"): value
                for key, value in found.items()
                if key.endswith(("_auc", "_accuracy", "_ece"))
            }
            self._append(arm, "validation", metrics, seconds)

    def train_ppo(self, arm: Arm) -> None:
        """PPO from the base policy; the arms differ in their rewards only."""

        folder = self.folder / "ppo" / arm.name
        shutil.rmtree(folder, ignore_errors=True)  # what a stopped run left
        budget = self.budget
        with quiet():
            trainer = StepPPOTrainer(
                model=str(self.folder / "policy"),
                reward_model=self.folder / "reward_model" if arm.dense else None,
                reward_funcs=[exact_answer] if arm.outcome else None,
                args=StepPPOConfig(
                    output_dir=str(folder),
                    **(PPO_SETTINGS | arm.settings),
                    per_device_train_batch_size=budget.rollouts_per_update,
                    max_steps=budget.updates,
                    seed=self.arguments.seed,
                ),
                train_dataset=datasets.Dataset.from_list([{"prompt": p.prompt} for p in self.problems["ppo"]]),
            )
            curve = LearningCurve(self, trainer)
            trainer.add_callback(curve)
            with RichProgress(trainer, arm.name):
                trainer.train()
            trainer.save_model()
        write_atomic(folder / "curve.json", json.dumps(curve.points))
        for point in curve.points:
            seconds = point["seconds"]
            metrics = {key: value for key, value in point.items() if key != "seconds"}
            self._append(arm.name, "held_out", metrics | self._step_metrics(), seconds)

    # Pieces -------------------------------------------------------------------------------------------------------

    def _policy(self) -> tuple[Any, Any]:

        with quiet():
            folder = self.folder / "policy"
            return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def _append(self, arm: str, split: str, metrics: dict[str, Any], seconds: float) -> None:
        """Add a row, unless a run that was stopped has written it already."""
        key = {"arm": arm, "split": split, "rollouts": metrics.get("rollouts")}
        for row in read_results(self.results.path) if self.results.path.is_file() else []:
            if {"arm": row["arm"], "split": row["split"], "rollouts": row["metrics"].get("rollouts")} == key:
                return
        self.results.append(
            benchmark="quickstart",
            arm=arm,
            dataset="arithmetic",
            seed=self.arguments.seed,
            split=split,
            metrics=metrics,
            config={"budget": asdict(self.budget), "ppo": PPO_SETTINGS},
            seconds=seconds,
        )

    def _step_metrics(self) -> dict[str, float]:
        """Step metrics of the reward model, repeated in the rows of the arms."""
        rows = [row for row in read_results(self.results.path) if row["arm"] == "reward_model"]
        return {key: rows[-1]["metrics"][key] for key in ("step_auc", "within_bag_auc")}

    def report(self) -> None:
        """`report.html` and `picture.png` from what the stages left."""
        with quiet():
            report = summarize(self.folder, [arm.name for arm in self.arms], self.arguments.seed, self.arguments.budget)
        plots.save_picture(self.folder / "picture.png", report.curves, report.examples, baseline="outcome")
        write_report(self.folder / "report.html", report)
        for name, value, note in report.headlines:
            console.print(f"  {name}: [bold]{value}[/bold] ({note})")
        for finding in report.findings:
            console.print(f"  {finding}")
        console.print(f"Report: [bold]{self.folder / 'report.html'}[/bold]  rows: {self.results.path}")


class LearningCurve(TrainerCallback):
    """Held-out accuracy of the policy, sampled and greedy, at fixed numbers of rollouts."""

    def __init__(self, run: Quickstart, trainer: StepPPOTrainer) -> None:
        self.run, self.trainer, self.points = run, trainer, []
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._measure(0)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.run.budget.evaluate_every == 0:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        problems = self.run.problems["held_out"]
        model, tokenizer = self.trainer.model, self.trainer._tokenizer
        point: dict[str, float] = {
            "rollouts": step // self.trainer.num_iterations * self.run.budget.rollouts_per_update
        }
        for name, greedy in (("", False), ("_greedy", True)):
            responses = sample_responses(model, tokenizer, [p.prompt for p in problems], greedy=greedy, seed=7)
            right = [p.check_answer(r) for p, r in zip(problems, responses, strict=True)]
            steps = [good for p, r in zip(problems, responses, strict=True) for good in p.check_steps(r)]
            point[f"accuracy{name}"] = sum(right) / len(right)
            point[f"step_accuracy{name}"] = sum(steps) / max(len(steps), 1)
        self.points.append(point | {"seconds": time.perf_counter() - self.start})


def run_quickstart(arguments: QuickstartArguments) -> None:
    """The command `fractal-rm quickstart`."""
    plots.require_matplotlib()  # before minutes of work, not after
    Quickstart(arguments).run()


class quiet:
    """Silences the libraries' own bars and notes while our progress is shown; errors still come through."""

    def __enter__(self) -> None:
        notes = transformers.utils.logging
        self._before = notes.get_verbosity(), notes.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        notes.set_verbosity_error()
        notes.disable_progress_bar()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exception: Any) -> None:
        self._warnings.__exit__(*exception)
        verbosity, bars, quiet_data = self._before
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if not quiet_data:
            datasets.enable_progress_bars()
