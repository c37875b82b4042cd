"""The arms of the comparison and their parts: base policies, labelled responses and reward models.

An arm defines where the reward comes from, and which settings compete for it on the tuning seed. Whatever the arms of a
task and a seed share is made once and stored in the work folder ([`Assets`]).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import Segmentation, Span
from fractal_rm.files import made_once, seconds_of, write_atomic
from fractal_rm.hf.progress import bar_on_terminal
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.study.rivals import Rule, ScriptedRewardModel, one_by_one, oracle, random_steps
from fractal_rm.tasks.task import Problem, Task, sample_responses, unseen

Options = dict[str, Any]
Recipe = dict[str, Any]
# Tried by the outcome-only arms; all arms then use the rate that suits these best, and each tunes two more settings.
LEARNING_RATES = (4e-4, 8e-4, 1.6e-3)
# How the credit of a step's reward decays: from token to token, or from step to step.
LAMBDAS = (
    {"advantage": "gae", "lam": 0.95, "step_lam": None},
    {"advantage": "gae", "step_lam": 0.2},
)
# With one score per response: GRPO's baseline with and without scaling, or a value model with two lambdas.
SCALES = (
    {"advantage": "group", "scale_rewards": "group"},
    {"advantage": "group", "scale_rewards": "none"},
)
VALUES = ({"advantage": "gae", "lam": 0.95}, {"advantage": "gae", "lam": 1.0})


@dataclass(frozen=True)
class Arm:
    """One way to reward the policy; everything else is the same in all arms."""

    name: str  # in the rows of results
    steps: str | None = None  # what scores steps: a kind of reward model ([`Assets`]), a rule (`rivals.py`), or None
    outcome: bool = False  # the checker's outcome labels are a reward
    response_model: bool = False  # a reward model of whole responses is the outcome reward
    # The outcome reward is the step reward model's response score: the same judge as with step rewards, at the end.
    scalar: bool = False
    variants: tuple[Options, Options] = LAMBDAS  # two competing settings
    options: tuple[tuple[str, Any], ...] = ()  # the same in all trials

    @property
    def judge(self) -> str | None:
        """What scores responses or their steps: a kind of reward model or a rule; None: the outcome alone."""
        return "response" if self.response_model else self.steps

    @property
    def scores_responses(self) -> bool:
        """Whether the outcome reward is a reward model's score of the whole response."""
        return self.response_model or self.scalar

    @property
    def trials(self) -> list[Options]:
        """The settings that compete on the tuning seed: each variant with each learning rate."""
        return [
            {**dict(self.options), **variant, "learning_rate": rate}
            for rate in LEARNING_RATES
            for variant in self.variants
        ]


LEARNING_ON = (("rm_update_every", 4), ("rm_learning_rate", 5e-4))
OUTCOME_ONLY = ("outcome_grpo", "outcome_ppo")
ArmName = Literal[
    "outcome_grpo",
    "outcome_ppo",
    "fractal",
    "fractal_mix",
    "fractal_online",
    "orm",
    "supervised",
    "oracle",
    "random_steps",
]
CEILING = "supervised"

ARMS = {
    arm.name: arm
    for arm in (
        Arm("outcome_grpo", outcome=True, variants=SCALES),
        Arm("outcome_ppo", outcome=True, variants=VALUES),
        Arm("fractal", steps="fractal"),
        Arm("fractal_mix", steps="fractal", outcome=True),
        Arm("fractal_online", steps="fractal", outcome=True, options=LEARNING_ON),
        # Scores whole responses as outcome-only arms do, so it may use the better of their settings.
        Arm("orm", response_model=True, variants=(SCALES[0], VALUES[1])),
        Arm("supervised", steps="supervised"),
        Arm("oracle", steps="oracle"),
        Arm("random_steps", steps="random_steps"),
    )
}


# The trial of each arm that the tuning of docs/evidence.md chose, for studies without a file of settings.
TUNED = {
    "outcome_grpo": 2,
    "outcome_ppo": 3,
    "fractal": 3,
    "fractal_mix": 3,
    "fractal_online": 3,
    "orm": 2,
    "supervised": 3,
    "oracle": 3,
    "random_steps": 3,
}


# Policies and reward models ------------------------------------------------------------------------------------------

# The same for all arms. `center` is what existing rows were made with; an arm with the default of `StepPPOConfig` sets
# it.
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
# Maximum number of problems that policies are measured on; no reward model has seen them.
HELD_OUT = 1024
TRAINING: Recipe = {
    "aggregation": "product",
    "learning_rate": 3e-4,
    "head_learning_rate": 5e-2,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 16,
    "per_device_train_batch_size": 32,
    "train_sampling_strategy": "group_by_length",
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "report_to": [],
    "use_cpu": True,
}
# One wrong chain in ten ends in the right answer by luck; the bag loss accounts for it.
FRACTAL: Recipe = {"missed_bad": 0.1}


def label_responses(
    task: Task, policy: Path, problems: Sequence[Problem], seed: int
) -> list[tuple[Problem, str, float]]:
    """A policy's sampled responses, one per problem, as (problem, response, outcome label); empty ones are left out."""
    model, tokenizer = load_policy(policy)
    prompts = [problem.prompt for problem in problems]
    texts = sample_responses(model, tokenizer, prompts, max_new_tokens=task.max_new_tokens, seed=seed)
    return [
        (problem, text, task.label(problem.prompt, text))
        for problem, text in zip(problems, texts, strict=True)
        if text.strip()
    ]


def load_policy(folder: Path) -> tuple[Any, Any]:
    """A policy and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class Assets:
    """What the arms of a task and a seed share, in the work folder.

    `max_steps` are optimizer steps of a reward model; -1: all of its epochs.
    """

    # Rules that can replace a reward model, for a task.
    rules: ClassVar[Mapping[str, Callable[[Task], Rule]]] = {"oracle": oracle, "random_steps": lambda _: random_steps}
    # Settings of [`StepPPOConfig`] that are the same for all arms, and the rollouts per backward pass.
    ppo: ClassVar[Options] = PPO_SETTINGS
    micro_batch: ClassVar[int] = 4096

    def __init__(self, folder: Path, task: Task, seed: int, max_steps: int = -1) -> None:
        self.task, self.seed, self.max_steps = task, seed, max_steps
        self.policies, self.own = folder / "policies", folder / task.name / f"seed-{seed}"

    @classmethod
    def recipes(cls, task: Task) -> dict[str, Recipe]:
        """Training options of each kind of reward model.

        `response` reads a response as one step; `supervised` also reads gold step labels.
        """
        changes: dict[str, Recipe] = {
            "fractal": FRACTAL,
            "response": {"segmentation": "given"},
            "supervised": {"bag_weight": 0.0, "instance_weight": 1.0},
        }
        return {kind: TRAINING | change for kind, change in changes.items()}

    def policy(self) -> Path:
        """Folder of the base policy."""
        return self.task.base_policy(self.seed % self.task.policies, self.policies)

    def load_policy(self) -> tuple[Any, Any]:
        """The base policy and its tokenizer."""
        return load_policy(self.policy())

    def trainer_arguments(self, options: Options) -> dict[str, Any]:
        """Further arguments of [`StepPPOTrainer`] for an arm's settings, such as adapters."""
        return {}

    def trained(self, arm: Arm) -> Path:
        """Where the policy of a run is stored, if its checkpoints are."""
        return self.own / "trained" / arm.name

    def labelled(self) -> Path:
        """Folder with the base policy's responses and their outcome labels in `rows.jsonl`."""

        def make(folder: Path) -> None:
            print(f"Sampling labelled responses of {self.task.name}, seed {self.seed}.", flush=True)
            held_out = {problem.prompt for problem in self.task.problems("held_out", HELD_OUT, self.seed)}
            problems = unseen(self.task.problems("reward_model", self.task.responses, self.seed), held_out)
            found = label_responses(self.task, self.policy(), problems, self.seed)
            rows = [{"prompt": problem.prompt, "response": text, "label": label} for problem, text, label in found]
            write_atomic(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

        self.policy()  # before the clock starts
        return made_once(self.own / "labelled", make)

    def spans(self, kind: str, response: str) -> tuple[Span, ...]:
        """The steps that a kind of reward model reads: lines, or the whole response."""
        lines = tuple(Segmentation("lines")(response))
        return ((lines[0][0], lines[-1][1]),) if kind == "response" else lines

    def bags(self, kind: str) -> list[Bag]:
        """Training data of a kind of reward model; only `supervised` gets gold step labels."""
        bags = []
        for line in (self.labelled() / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            spans, gold = self.spans(kind, row["response"]), None
            if kind == "supervised":
                gold = tuple(oracle(self.task)(row["prompt"], [row["response"][a:b] for a, b in spans]))
            bags.append(Bag(row["prompt"], row["response"], spans, row["label"], step_labels=gold))
        return bags

    def train_reward_model(self, kind: str, folder: Path, **options: Any) -> None:
        """Train a reward model of a kind in an empty folder; `options` override its recipe."""
        options = {**self.recipes(self.task)[kind], "max_steps": self.max_steps, "seed": self.seed, **options}
        config = FractalConfig(output_dir=str(folder), **options)
        print(f"Making the reward model `{kind}` of {self.task.name}, seed {self.seed}.", flush=True)
        trainer = FractalTrainer(self.policy(), config, train_dataset=self.bags(kind))
        trainer.remove_callback(PrinterCallback)  # `Study` prints a line for each run
        with bar_on_terminal(trainer, f"reward model {kind}"):
            trainer.train()
        trainer.save_model()

    def reward_model_folder(self, kind: str) -> Path:
        """Folder of a trained reward model, which depends on its recipe."""
        self.labelled()  # before the clock starts
        recipe = json.dumps(self.recipes(self.task)[kind], sort_keys=True)
        digest = hashlib.blake2b(recipe.encode(), digest_size=4).hexdigest()
        return made_once(
            self.own / f"reward_model-{kind}-{digest}", lambda folder: self.train_reward_model(kind, folder)
        )

    def reward_model(self, kind: str) -> StepRewardModel:
        """A reward model of a kind, or the rule that replaces it."""
        if kind in self.rules:
            return ScriptedRewardModel(one_by_one(self.rules[kind](self.task)))
        return StepRewardModel.from_pretrained(self.reward_model_folder(kind), device="cpu", batch_size=64)

    def outcome(self, arm: Arm, judge: StepRewardModel | None) -> Callable[..., list[float]]:
        """The outcome reward of an arm: the task's, unless a subclass derives one from the judge."""
        return self.task.outcome

    def cost(self, kind: str | None) -> dict[str, float]:
        """Rollouts and CPU seconds spent on a reward model, including its responses; 0 for rules."""
        if kind is None or kind not in self.recipes(self.task):
            return {"rm_rollouts": 0, "rm_seconds": 0.0}
        folders = (self.labelled(), self.reward_model_folder(kind))
        return {"rm_rollouts": self.task.responses, "rm_seconds": sum(seconds_of(folder) for folder in folders)}
