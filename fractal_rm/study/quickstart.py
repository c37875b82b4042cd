"""The whole pipeline on the arithmetic task: response labels -> step scores -> PPO with dense rewards -> a report.

Every stage leaves its result in the output folder and is skipped if that exists, so a stopped run continues where it
was. Reward models see only outcomes; evaluation alone reads the exact step checker.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fractal_rm.data.readers import read_jsonl
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.files import read_json, write_atomic
from fractal_rm.hf.checkpoints import STATE, last_checkpoint, resume_or_clear
from fractal_rm.hf.progress import RichProgress
from fractal_rm.ranges import check_ranges
from fractal_rm.report import plots
from fractal_rm.report.quickstart_report import summarize, write_report
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.study.arms import Arm, Options, label_responses, load_policy
from fractal_rm.study.run import Evaluations, make_trainer, measure, quiet
from fractal_rm.tasks.arithmetic.conditions import ShippedArithmetic
from fractal_rm.tasks.task import Split, unseen

console = Console()
# What a training has measured so far, next to its checkpoints.
_POINTS = "points.json"

ARMS = (Arm("dense+outcome", steps="fractal", outcome=True), Arm("outcome", outcome=True))


@dataclass
class Amounts:
    """How much work each stage does."""

    responses: int
    updates: int
    evaluate_every: int
    held_out: int = 512
    validation: int = 1000
    ppo_prompts: int = 20_000
    rollouts_per_update: int = 64


AMOUNTS = {
    "small": Amounts(responses=6144, updates=60, evaluate_every=6),
    "full": Amounts(responses=16_384, updates=240, evaluate_every=12, held_out=1024),
}


# The same for both arms; chosen on seeds other than the default one (docs/quickstart.md).
PPO_SETTINGS: Options = {
    "center": "batch",  # as in the published rows
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

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder of models, results and report."})
    seed: int = field(default=0, metadata={"help": "Seed of data, models and training."})
    budget: Literal["small", "full"] = field(
        default="small",
        metadata={
            "help": "How much to train. `small`: minutes on two cores. `full`: longer training, smoother curves."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)


class Quickstart:
    """One run: its arguments, folder and problems.

    `amounts` replaces the budget of the arguments (tests run tiny ones). The report is about the first two `arms`;
    benchmarks add others.
    """

    def __init__(
        self, arguments: QuickstartArguments, amounts: Amounts | None = None, arms: Sequence[Arm] = ARMS
    ) -> None:
        self.task, self.arms = ShippedArithmetic(), arms
        self.arguments, self.amounts = arguments, amounts or AMOUNTS[arguments.budget]
        self.folder = Path(arguments.output_dir)
        counts: dict[Split, int] = {
            "reward_model": self.amounts.responses,
            "validation": self.amounts.validation,
            "train": self.amounts.ppo_prompts,
        }
        self.held_out = self.task.problems("held_out", self.amounts.held_out, arguments.seed)
        known = {problem.prompt for problem in self.held_out}
        self.problems = {
            split: unseen(self.task.problems(split, count, arguments.seed), known) for split, count in counts.items()
        }
        self.results = ResultsFile(self.folder / "results.jsonl")

    # Stages -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run all stages; finished ones are skipped."""
        self._claim_folder()
        stages: list[tuple[str, str, Callable[[], None]]] = [
            ("policy", "Copying the small policy with wrong beliefs that the package ships", self.take_policy),
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
                console.print(f"[dim]{number}/{len(stages)}  {title}: already done[/dim]")
                continue
            console.print(f"[bold]{number}/{len(stages)}[/bold]  {title} ...")
            start = time.perf_counter()
            self._check_claim()
            try:
                stage()
            finally:
                self._check_claim()  # a clearer error than a stage's about missing files
            seconds = time.perf_counter() - start
            write_atomic(seconds_file, json.dumps({"seconds": seconds}))
            console.print(f"      {seconds:.0f} s")
        self.report()

    def _claim_folder(self) -> None:
        """Raise ValueError if the folder belongs to another run, so that no stage mixes two seeds."""
        mine = {"seed": self.arguments.seed, "budget": asdict(self.amounts)}
        file = self.folder / "quickstart.json"
        (self.folder / "done").mkdir(parents=True, exist_ok=True)
        if file.is_file() and read_json(file) != mine:
            raise ValueError(
                f"{self.folder} holds a run with another seed or budget. Choose another `--output_dir`, or delete it."
            )
        write_atomic(file, json.dumps(mine))

    def _check_claim(self) -> None:
        """Raise FileNotFoundError if the folder no longer exists."""
        if not (self.folder / "quickstart.json").is_file():
            raise FileNotFoundError(f"{self.folder} was removed while the quickstart ran in it. Start it again.")

    def take_policy(self) -> None:
        """Copy the base policy, whose mistakes are beliefs; `tasks/arithmetic/base_policy.py` says how it was made."""
        target = self.folder / "policy"
        try:
            shutil.copytree(self.task.base_policy(0, self.folder), target, dirs_exist_ok=True)
        except shutil.Error as error:  # a list of all files that failed
            why = error.args[0][0][-1]
            raise OSError(f"{target} could not be written ({why}). Free space, and run the command again.") from error

    def sample(self) -> None:
        """Write training responses with outcome labels, and validation responses that also have gold step labels."""
        files: list[tuple[Split, str]] = [("reward_model", "responses"), ("validation", "validation")]
        for offset, (split, name) in enumerate(files):
            rows = []
            with quiet():
                found = label_responses(
                    self.task, self.folder / "policy", self.problems[split], 1000 * self.arguments.seed + offset
                )
            for problem, response, label in found:
                row: dict[str, Any] = {"prompt": problem.prompt, "label": label}
                if split == "reward_model":
                    row["completion"] = response
                else:  # steps and gold labels, for evaluation only
                    row["steps"] = [line.strip() for line in response.split("\n") if line.strip()]
                    row["step_labels"] = [float(good) for good in problem.check_steps(response) or ()]
                rows.append(json.dumps(row))
            write_atomic(self.folder / f"{name}.jsonl", "\n".join(rows) + "\n")

    def train_reward_model(self) -> None:
        """Train the likelihood scorer on outcome labels; only its evaluation reads step labels."""
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
            progress = RichProgress(trainer, "reward model")  # replaces other output from here on
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
        """PPO from the base policy; the arms differ only in their rewards."""
        points = self.train_policy(arm, PPO_SETTINGS)
        write_atomic(self.folder / "ppo" / arm.name / "curve.json", json.dumps(points))
        for point in points:
            seconds = point["seconds"]
            metrics = {key: value for key, value in point.items() if key != "seconds"}
            self._append(arm.name, "held_out", metrics | self._step_metrics(), seconds)
        for checkpoint in (self.folder / "ppo" / arm.name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def train_policy(
        self, arm: Arm, settings: Options, at_end: Callable[[Any], dict[str, float]] | None = None
    ) -> list[dict[str, float]]:
        """Train a policy, save it, and measure it at fixed numbers of rollouts: the points of its learning curve.

        Stopped training continues from its last checkpoint; one is written with every measurement. `settings`, of
        [`StepPPOConfig`], are the same for all arms; `at_end` adds metrics to the last point.
        """
        amounts, folder = self.amounts, self.folder / "ppo" / arm.name
        resume = resume_or_clear(folder)
        with quiet():
            trainer = make_trainer(
                arm,
                settings
                | dict(arm.options)
                | {
                    "per_device_train_batch_size": amounts.rollouts_per_update,
                    "max_steps": amounts.updates,
                    "seed": self.arguments.seed,
                    "save_strategy": "steps",
                    "save_steps": amounts.evaluate_every,
                    "save_total_limit": 2,
                },
                self.folder / "policy",
                self.folder / "reward_model" if arm.steps else None,
                self.task.outcome,
                [problem.prompt for problem in self.problems["train"]],
                folder,
            )
            points = self._points_so_far(folder, trainer.num_iterations) if resume else []
            start = time.perf_counter() - (points[-1]["seconds"] if points else 0.0)
            tokenizer = load_policy(self.folder / "policy")[1]

            def evaluate(step: int) -> None:
                rollouts = step // trainer.num_iterations * amounts.rollouts_per_update
                found, _ = measure(trainer.model, tokenizer, self.task, self.held_out)
                del found["response_tokens"]
                points.append({"rollouts": rollouts, **found, "seconds": time.perf_counter() - start})
                write_atomic(folder / _POINTS, json.dumps(points))

            every = range(amounts.evaluate_every, amounts.updates + 1, amounts.evaluate_every)
            trainer.add_callback(Evaluations(every, evaluate))
            with RichProgress(trainer, arm.name):
                trainer.train(resume_from_checkpoint=resume)
            trainer.save_model()
            if at_end is not None:
                points[-1] |= at_end(trainer)
        return points

    def _points_so_far(self, folder: Path, iterations: int) -> list[dict[str, float]]:
        """What was measured up to the checkpoint from which training continues."""
        points = json.loads((folder / _POINTS).read_text(encoding="utf-8"))
        step = json.loads((Path(str(last_checkpoint(folder))) / STATE).read_text(encoding="utf-8"))["global_step"]
        return [point for point in points if point["rollouts"] <= step // iterations * self.amounts.rollouts_per_update]

    # Pieces -------------------------------------------------------------------------------------------------------

    def _append(self, arm: str, split: str, metrics: dict[str, Any], seconds: float) -> None:
        """Add a row, unless a stopped run has already written it."""
        key = arm, split, metrics.get("rollouts")
        if any((row["arm"], row["split"], row["metrics"].get("rollouts")) == key for row in self.results.rows()):
            return
        self.results.append(
            benchmark="quickstart",
            arm=arm,
            dataset=self.task.name,
            seed=self.arguments.seed,
            split=split,
            metrics=metrics,
            config={"budget": asdict(self.amounts), "ppo": PPO_SETTINGS},
            seconds=seconds,
        )

    def _step_metrics(self) -> dict[str, float]:
        """Step metrics of the reward model, repeated in the rows of the arms."""
        metrics = [row["metrics"] for row in self.results.rows() if row["arm"] == "reward_model"][-1]
        return {key: metrics[key] for key in ("step_auc", "within_bag_auc")}

    def report(self) -> None:
        """Write `report.html` and `picture.png` from the results of the stages."""
        with quiet():
            report = summarize(self.folder, [arm.name for arm in self.arms], self.arguments.seed, self.arguments.budget)
        runs = {arm: [curve] for arm, curve in report.curves.items()}
        plots.save_picture(self.folder / "picture.png", runs, report.examples, baseline="outcome")
        write_report(self.folder / "report.html", report)
        for name, value, note in report.headlines:
            console.print(f"  {name}: [bold]{value}[/bold] ({note})")
        for finding in report.findings:
            console.print(f"  {finding}")
        console.print(f"Report: [bold]{self.folder / 'report.html'}[/bold]  rows: {self.results.path}")
