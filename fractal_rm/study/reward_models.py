"""Base policies, labelled responses and reward models of a setting and a seed: made once, kept in the work folder.

Each folder is written under another name and moved into place when it is whole, so a run that was killed finds either
all of it or nothing.
"""

import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import Segmentation, Span
from fractal_rm.files import write_atomic
from fractal_rm.reward_model import StepRewardModel, StepScores
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.study.held_out import measure
from fractal_rm.study.implicit import ImplicitReward
from fractal_rm.study.scripted_scores import ScriptedRewardModel, copy_label, oracle, random_steps
from fractal_rm.study.settings import Setting, form_texts, form_tokenizer
from fractal_rm.tasks.arithmetic.base_policy import train_on_texts
from fractal_rm.tasks.sampling import sample_responses

# How many different base policies (beliefs, weights) a setting has; seeds take turns.
POLICIES = 2
BELIEF_LEARNING_RATE = 2e-3
# Policies are measured on at most as many problems, none of which a reward model has seen.
HELD_OUT = 1024
TRAINING: dict[str, Any] = {
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
FRACTAL: dict[str, Any] = {"missed_bad": 0.1}
# What each kind of reward model changes; `result_token` reads of each step what it states and not what it does,
# `response` is one step a response, `supervised` is named for what it reads.
KINDS: dict[str, dict[str, Any]] = {
    "fractal": FRACTAL,
    "fractal_bag": {},
    "fractal_priors": {**FRACTAL, "likelihood_prior_weight": 0.3, "prior_schedule": "linear"},
    "fractal_pseudo": {**FRACTAL, "pseudo_labels": "soft", "pseudo_bag_weight": 1.0, "pseudo_start": "warm"},
    "result_token": FRACTAL,
    "response": {"segmentation": "given"},
    "supervised": {"bag_weight": 0.0, "instance_weight": 1.0},
    "lca": {**FRACTAL, "aggregation": "softmin"},
}
# What the implicit process reward is trained with: as many steps on as many responses as the others.
IMPLICIT: dict[str, dict[str, Any]] = {
    "implicit": {"learning_rate": 3e-4, "beta": 0.1, "epochs": 16, "batch_size": 32},
}
RESULT = re.compile(r"(?:->|:)( \d)$", re.MULTILINE)


def training_recipe(kind: str, flipped: float = 0.0) -> dict[str, Any] | None:
    """What a kind of reward model is trained with; None for a rule, which is not.

    Args:
        kind: Its name.
        flipped: Share of the setting's outcome labels that are wrong. `fractal_flips` alone is told.

    Example:
        >>> recipe = training_recipe("fractal_flips", flipped=0.2)
        >>> recipe["missed_good"], round(recipe["missed_bad"], 3)  # a wrong chain: lucky and kept, or not and flipped
        (0.2, 0.26)
    """
    if kind in IMPLICIT:
        return IMPLICIT[kind]
    if kind == "fractal_flips":
        luck = FRACTAL["missed_bad"]
        return TRAINING | {"missed_good": flipped, "missed_bad": luck * (1 - flipped) + (1 - luck) * flipped}
    return TRAINING | KINDS[kind] if kind in KINDS else None


@dataclass(frozen=True)
class Size:
    """How much the parts take, so that tests can take less.

    Args:
        form_texts: Responses from which one model learns the forms.
        texts: Responses with wrong beliefs that a base policy is fine-tuned on; None: those of the setting.
        hidden_size: Width of the policy.
        responses: Labelled responses of a reward model; None: those of the setting.
        max_steps: Optimizer steps of a reward model; -1: as many as its epochs have.
    """

    form_texts: int = 98304
    texts: int | None = None
    hidden_size: int = 64
    responses: int | None = None
    max_steps: int = -1


class Assets:
    """What the arms of a setting and a seed share.

    Args:
        folder: The work folder.
        setting: The task.
        seed: The seed of the run.
        size: How much to train.
    """

    def __init__(self, folder: Path, setting: Setting, seed: int, size: Size) -> None:
        self.setting, self.seed, self.size = setting, seed, size
        self.policy_number = seed % POLICIES
        self.policies, self.own = folder / "policies", folder / setting.name / f"seed-{seed}"
        self.responses = size.responses or setting.responses

    # The base policy ----------------------------------------------------------------------------------------------

    def policy(self) -> Path:
        """Folder of the base policy."""

        def make(folder: Path) -> None:
            start = self._forms()
            train_on_texts(
                folder,
                self.setting.texts(self.policy_number, self.size.texts or self.setting.policy_texts),
                AutoTokenizer.from_pretrained(start),
                seed=self.policy_number,
                in_order=True,
                start=start,
                learning_rate=BELIEF_LEARNING_RATE,
            )

        return made_once(self.policies / f"{self.setting.policy_name}-{self.policy_number}", make)

    def _forms(self) -> Path:
        """Folder of the model that has learned the forms and the true facts: all base policies start from it."""

        def make(folder: Path) -> None:
            texts = form_texts(self.size.form_texts)
            train_on_texts(folder, texts, form_tokenizer(), hidden_size=self.size.hidden_size, in_order=True)

        return made_once(self.policies / "forms", make)

    def load_policy(self) -> tuple[Any, Any]:
        """The base policy and its tokenizer."""
        folder = self.policy()
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def start(self, count: int) -> tuple[dict[str, float | None], list[str]]:
        """What the base policy is worth on held-out problems, and its sampled responses: the start of every arm.

        Args:
            count: How many problems.
        """

        def make(folder: Path) -> None:
            found, texts = measure(
                *self.load_policy(), self.setting, self.setting.problems("held_out", count, self.seed)
            )
            write_atomic(folder / "start.json", json.dumps({"metrics": found, "texts": texts}))

        saved = json.loads((made_once(self.own / f"start-{count}", make) / "start.json").read_text(encoding="utf-8"))
        return saved["metrics"], saved["texts"]

    # Labelled responses -------------------------------------------------------------------------------------------

    def labelled(self) -> Path:
        """Folder with responses of the base policy and their outcome labels in `rows.jsonl`."""

        def make(folder: Path) -> None:
            model, tokenizer = self.load_policy()
            held_out = {problem.prompt for problem in self.setting.problems("held_out", HELD_OUT, self.seed)}
            problems = self.setting.problems("reward_model", self.responses, self.seed)
            prompts = [problem.prompt for problem in problems if problem.prompt not in held_out]
            texts = sample_responses(
                model, tokenizer, prompts, max_new_tokens=self.setting.max_new_tokens, seed=self.seed
            )
            rows = [
                {
                    "prompt": prompt,
                    "response": text,
                    "label": self.setting.label(prompt, text),
                }
                for prompt, text in zip(prompts, texts, strict=True)
                if text.strip()
            ]
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
                gold = tuple(oracle(row["prompt"], [row["response"][a:b] for a, b in spans]))
            bags.append(Bag(row["prompt"], row["response"], spans, row["label"], step_labels=gold))
        return bags

    # Reward models ------------------------------------------------------------------------------------------------

    def reward_model_folder(self, kind: str) -> Path:
        """Folder of a trained reward model: another recipe, another folder."""
        recipe = training_recipe(kind, self.setting.flipped) or {}

        def make(folder: Path) -> None:
            bags = self.bags(kind)
            if kind in IMPLICIT:
                training = dict(recipe)
                model = ImplicitReward(self.policy(), training.pop("beta"), self.seed)
                model.train(bags, **training, max_steps=None if self.size.max_steps < 0 else self.size.max_steps)
                model.save(folder)
                return
            options: dict[str, Any] = {**recipe, "max_steps": self.size.max_steps, "seed": self.seed}
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
        rules = {"oracle": oracle, "random_steps": random_steps, "copy_label": copy_label(self.setting.label)}
        if kind in rules:
            return ScriptedRewardModel(rules[kind])
        folder = self.reward_model_folder(kind)
        if kind in IMPLICIT:
            recipe = IMPLICIT[kind]
            trained = ImplicitReward(self.policy(), recipe["beta"], self.seed, trained=folder)
            return ImplicitRewardModel(trained, recipe["learning_rate"], recipe["batch_size"])
        model = ResultTokenModel if kind == "result_token" else StepRewardModel
        return model.from_pretrained(folder, device="cpu", batch_size=64)

    def cost(self, kind: str | None) -> dict[str, float]:
        """Rollouts and processor seconds that a reward model took, its responses included; 0 for rules."""
        if kind is None or training_recipe(kind) is None:
            return {"rm_rollouts": 0, "rm_seconds": 0.0}
        folders = (self.labelled(), self.reward_model_folder(kind))
        return {"rm_rollouts": self.responses, "rm_seconds": sum(seconds_of(folder) for folder in folders)}


def result_spans(response: str) -> tuple[Span, ...]:
    """The results that a response states, one a line; its lines where it states none.

    Example:
        >>> text = "1: add 4 -> 7\\nAnswer: 7"
        >>> [text[a:b] for a, b in result_spans(text)]
        [' 7', ' 7']
    """
    return tuple(match.span(1) for match in RESULT.finditer(response)) or tuple(Segmentation("lines")(response))


class ResultTokenModel(StepRewardModel):
    """A reward model that reads of each step its result only: what a policy does to get there is not scored."""

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        """Scores of the results."""
        spans = [result_spans(text) if text.strip() else None for text in responses]
        return super().score(prompts, responses, spans=spans, **kwargs)


class ImplicitRewardModel(ScriptedRewardModel):
    """The implicit process reward in the place of a step reward model.

    Args:
        model: The trained language model and its reference.
        learning_rate: At which it learns on, where it does.
        batch_size: Responses in a step of that.
    """

    def __init__(self, model: ImplicitReward, learning_rate: float, batch_size: int) -> None:
        super().__init__(lambda prompt, response: [])
        self.model, self.learning_rate, self.batch_size = model, learning_rate, batch_size

    def learning_from(self, outcome: Callable[..., list[float]]) -> Callable[..., list[float]]:
        """The same outcome reward, from whose labels the model learns before it scores the rollout (PRIME).

        Args:
            outcome: A TRL reward function.
        """

        @wraps(outcome)
        def learn(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
            labels = outcome(prompts, completions, **kwargs)
            rows, bags = self._bags(prompts, completions, labels)
            if rows:
                self.model.learn_on(bags, learning_rate=self.learning_rate, batch_size=self.batch_size)
            return labels

        return learn

    def _bags(
        self, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[float | None]
    ) -> tuple[list[int], list[Bag]]:
        """Responses that are not empty: their rows, and their bags of lines."""
        cut = self.settings.segmentation
        rows = [i for i, text in enumerate(responses) if text.strip()]
        return rows, [Bag(prompts[i], responses[i], tuple(cut(responses[i])), labels[i]) for i in rows]

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        """Sigmoid of log-ratios, for steps and for the response."""
        rows, bags = self._bags(prompts, responses, [None] * len(responses))
        found = dict(zip(rows, self.model.score(bags), strict=True))
        return [found.get(i) or StepScores(text, error="The response is empty.") for i, text in enumerate(responses)]


class WholeResponseReward:
    """A response-level reward model as TRL reward function: one score for each completion.

    Args:
        reward_model: One that was trained on responses of one step.
    """

    __name__ = "response_reward_model"

    def __init__(self, reward_model: StepRewardModel) -> None:
        self.reward_model = reward_model

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """P(response is good); an empty completion is not."""
        rows = [i for i, text in enumerate(completions) if text.strip()]
        scored = self.reward_model.score(
            [prompts[i] for i in rows],
            [completions[i] for i in rows],
            spans=[[(0, len(completions[i].rstrip()))] for i in rows],
            progress=False,
        )
        found = {i: result.score for i, result in zip(rows, scored, strict=True)}
        return [found.get(i, 0.0) for i in range(len(completions))]


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is there, or is made now, by one process at a time; `seconds.json` says how long it took."""
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process was faster
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        start = time.process_time()
        make(partial)
        write_atomic(partial / "seconds.json", json.dumps({"seconds": time.process_time() - start}))
        partial.rename(folder)
    return folder


def seconds_of(folder: Path) -> float:
    """Processor seconds that a folder took to make."""
    return json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["seconds"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file; it is given back if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
