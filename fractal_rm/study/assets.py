"""Base policies, labelled responses and reward models of a task and a seed: made once, kept in the work folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.files import made_once, seconds_of, write_atomic
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.study.rivals import (
    ImplicitReward,
    ImplicitRewardModel,
    ResultTokenModel,
    ScriptedRewardModel,
    copy_label,
    oracle,
    random_steps,
    result_spans,
)
from fractal_rm.tasks.task import Problem, Task, sample_responses, unseen

Recipe = dict[str, Any]
# Policies are measured on at most as many problems, none of which a reward model has seen.
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
# Of wrong chains one in ten ends on the right answer by luck: the bag loss knows it.
FRACTAL: Recipe = {"missed_bad": 0.1}
# The implicit process reward: as many steps on as many responses as the others. `beta` tells its recipes from theirs.
IMPLICIT: Recipe = {"learning_rate": 3e-4, "beta": 0.1, "epochs": 16, "batch_size": 32}


def recipes(flipped: float = 0.0) -> dict[str, Recipe]:
    """What each kind of reward model is trained with.

    `result_token` reads of each step what it states and not what it does, `response` is one step a response,
    `supervised` is named for what it reads.

    Args:
        flipped: Share of the task's outcome labels that are wrong. `fractal_flips` alone is told.

    Example:
        >>> recipe = recipes(flipped=0.2)["fractal_flips"]
        >>> recipe["missed_good"], round(recipe["missed_bad"], 3)  # a wrong chain: lucky and kept, or not and flipped
        (0.2, 0.26)
    """
    luck = FRACTAL["missed_bad"]
    changes: dict[str, Recipe] = {
        "fractal": FRACTAL,
        "fractal_bag": {},
        "fractal_flips": {"missed_good": flipped, "missed_bad": luck * (1 - flipped) + (1 - luck) * flipped},
        "fractal_priors": {**FRACTAL, "likelihood_prior_weight": 0.3, "prior_schedule": "linear"},
        "fractal_pseudo": {**FRACTAL, "pseudo_labels": "soft", "pseudo_bag_weight": 1.0, "pseudo_start": "warm"},
        "result_token": FRACTAL,
        "response": {"segmentation": "given"},
        "supervised": {"bag_weight": 0.0, "instance_weight": 1.0},
        "lca": {**FRACTAL, "aggregation": "softmin"},
    }
    return {kind: TRAINING | change for kind, change in changes.items()} | {"implicit": IMPLICIT}


def label_responses(
    task: Task, policy: Path, problems: Sequence[Problem], seed: int
) -> list[tuple[Problem, str, float]]:
    """Sampled responses of a policy with their outcome labels; empty responses are left out.

    Args:
        task: Gives the labels and the longest response.
        policy: Folder of the policy.
        problems: One response each.
        seed: Seed of the sampling.

    Returns:
        Problem, response and label.
    """
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
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Assets:
    """What the arms of a task and a seed share.

    Args:
        folder: The work folder.
        task: The task.
        seed: The seed of the run.
        recipes: What each kind of reward model is trained with; None: [`recipes`] of the task.
        max_steps: Optimizer steps of a reward model; -1: as many as its epochs have.
    """

    def __init__(
        self, folder: Path, task: Task, seed: int, recipes: Mapping[str, Recipe] | None = None, max_steps: int = -1
    ) -> None:
        self.task, self.seed, self.max_steps = task, seed, max_steps
        self.recipes = globals()["recipes"](task.flipped) if recipes is None else recipes
        self.policies, self.own = folder / "policies", folder / task.name / f"seed-{seed}"

    def policy(self) -> Path:
        """Folder of the base policy."""
        return self.task.base_policy(self.seed % self.task.policies, self.policies)

    def labelled(self) -> Path:
        """Folder with responses of the base policy and their outcome labels in `rows.jsonl`."""

        def make(folder: Path) -> None:
            held_out = {problem.prompt for problem in self.task.problems("held_out", HELD_OUT, self.seed)}
            problems = unseen(self.task.problems("reward_model", self.task.responses, self.seed), held_out)
            found = label_responses(self.task, self.policy(), problems, self.seed)
            rows = [{"prompt": problem.prompt, "response": text, "label": label} for problem, text, label in found]
            write_atomic(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

        self.policy()  # before the clock starts
        return made_once(self.own / "labelled", make)

    def bags(self, kind: str) -> list[Bag]:
        """Training data of a kind of reward model; gold step labels are made for `supervised` only."""
        cut, bags = Segmentation("lines"), []
        for line in (self.labelled() / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            spans = tuple(cut(row["response"]))
            if kind == "response":
                spans = ((spans[0][0], spans[-1][1]),)
            if kind == "result_token":
                spans = result_spans(row["response"])
            gold = None
            if kind == "supervised":
                gold = tuple(oracle(self.task)(row["prompt"], [row["response"][a:b] for a, b in spans]))
            bags.append(Bag(row["prompt"], row["response"], spans, row["label"], step_labels=gold))
        return bags

    def reward_model_folder(self, kind: str) -> Path:
        """Folder of a trained reward model: another recipe, another folder."""
        recipe = self.recipes[kind]

        def make(folder: Path) -> None:
            bags = self.bags(kind)
            if "beta" in recipe:
                training = dict(recipe)
                model = ImplicitReward(self.policy(), training.pop("beta"), self.seed)
                model.train(bags, **training, max_steps=None if self.max_steps < 0 else self.max_steps)
                model.save(folder)
                return
            options: Recipe = {**recipe, "max_steps": self.max_steps, "seed": self.seed}
            if "likelihood_prior_weight" in options:
                options["reference_model"] = str(self.policy())
            config = FractalConfig(output_dir=str(folder), **options)
            trainer = FractalTrainer(self.policy(), config, train_dataset=bags)
            trainer.train()
            trainer.save_model()

        self.labelled()  # before the clock starts
        digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=4).hexdigest()
        return made_once(self.own / f"reward_model-{kind}-{digest}", make)

    def reward_model(self, kind: str) -> StepRewardModel:
        """A reward model of a kind, or a rule in its place."""
        rules = {"oracle": oracle(self.task), "random_steps": random_steps, "copy_label": copy_label(self.task.label)}
        if kind in rules:
            return ScriptedRewardModel(rules[kind])
        folder, recipe = self.reward_model_folder(kind), self.recipes[kind]
        if "beta" in recipe:
            trained = ImplicitReward(self.policy(), recipe["beta"], self.seed, trained=folder)
            return ImplicitRewardModel(trained, recipe["learning_rate"], recipe["batch_size"])
        model = ResultTokenModel if kind == "result_token" else StepRewardModel
        return model.from_pretrained(folder, device="cpu", batch_size=64)

    def cost(self, kind: str | None) -> dict[str, float]:
        """Rollouts and processor seconds that a reward model took, its responses included; 0 for rules."""
        if kind is None or kind not in self.recipes:
            return {"rm_rollouts": 0, "rm_seconds": 0.0}
        folders = (self.labelled(), self.reward_model_folder(kind))
        return {"rm_rollouts": self.task.responses, "rm_seconds": sum(seconds_of(folder) for folder in folders)}
