"""`fractal-rm ppo`: a policy, trained on step rewards, outcome rewards, or both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from fractal_rm.cli.arguments import DataArguments, LoraArguments
from fractal_rm.cli.checks import (
    check_models,
    check_writable_folder,
    checkpoint_to_resume,
    hide_loading_bars,
    load_reward_model,
    print_metrics,
    report_contradictions,
    to_json,
)
from fractal_rm.cli.parser import parse
from fractal_rm.cli.tasks import MAKE_PROMPTS, TaskArguments, make_task
from fractal_rm.data.contradictions import shared_prompts
from fractal_rm.data.prompts import check_same_kind, is_chat, read_prompt
from fractal_rm.data.readers import naming
from fractal_rm.errors import reason
from fractal_rm.files import write_atomic
from fractal_rm.hf.cards import policy_card
from fractal_rm.hf.progress import RichProgress
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.report.rollout_pages import StepScoresCallback
from fractal_rm.tasks import gsm8k
from fractal_rm.tasks.arithmetic import problems as arithmetic
from fractal_rm.tasks.task import Task

# What the screen and the model card show of some thirty numbers; metrics.json holds all of them.
_SHOWN = ("train_runtime", "train_loss", "eval_rewards/", "eval_completions/mean_length", "eval_kl")
# Seeds of problem lists, apart from each other and from those that policies are made with.
_TRAIN_SEED, _EVAL_SEED = 3_000_000, 4_000_000


@dataclass(kw_only=True)
class PPOArguments(TaskArguments):
    """What `fractal-rm ppo` needs beside [`StepPPOConfig`]."""

    _argument_group_name = "models and rewards"

    model: str = field(metadata={"help": "The policy: path or hub id of a causal language model."})
    reward_model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Step reward models, for dense rewards: folders or hub ids, weighted by `step_reward_weights`; "
            "`none` takes out those of the file."
        },
    )
    published: str | None = field(
        default=None,
        metadata={
            "help": "The first of `reward_model` is a published process reward model whose files do not tell which: "
            "`trl` (or `trl:SEPARATOR`), `qwen-prm`, `skywork-prm`, `math-shepherd` or `rlhflow`."
        },
    )
    reward_function: Literal["exact_answer", "gsm8k_answer", "verifier"] | None = field(
        default=None,
        metadata={
            "help": "Outcome reward: `exact_answer` (task arithmetic), `gsm8k_answer` (column `answer`, extra `math`), "
            "`verifier` (tasks reasoning_gym and word_problems: their own check of the answer)."
        },
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Token classification model with one label, for `advantage=gae`; or `reward_model` for the reward "
            "model's backbone, `shared` for a head on the policy's own; default: made of the policy."
        },
    )
    value_use_peft: bool = field(
        default=True,
        metadata={"help": "With `use_peft`: low-rank adapters for the value model too, in place of all its weights."},
    )
    num_problems: int = field(
        default=4096, metadata={"help": "Tasks that make their own prompts: problems to train on."}
    )
    num_eval_problems: int = field(
        default=256, metadata={"help": "Tasks that make their own prompts: problems of evaluations; 0 for none."}
    )
    chat: bool = field(
        default=True, metadata={"help": "Task gsm8k: ask in a chat, for models with a chat template; else as text."}
    )
    page_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps from one page of completions with their step scores to the next, in "
            "`output_dir/step_scores`; 0: no pages."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_model == ["none"]:
            self.reward_model = None
        verifies = self.task in ("reasoning_gym", "word_problems")
        if (self.reward_function == "verifier") != (verifies and self.reward_function is not None):
            raise ValueError(
                f"`reward_function={self.reward_function}` does not suit `task={self.task}`. Give `verifier` with the "
                "tasks reasoning_gym and word_problems, and with no other."
            )


def ppo(argv: Sequence[str]) -> None:
    """Train a policy with PPO on step rewards, outcome rewards, or both."""
    arguments, data, lora, config = parse("ppo", [PPOArguments, DataArguments, LoraArguments, StepPPOConfig], argv)
    folder = Path(config.output_dir)
    check_writable_folder(folder)
    checkpoint = checkpoint_to_resume(config)
    reward_models = arguments.reward_model or []
    names = [*reward_models, *([arguments.reward_function] if arguments.reward_function else [])]
    if not names:
        raise ValueError("There is no reward. Give `reward_model` (dense), `reward_function` (outcome), or both.")
    # The value model may also be a word that stands for a backbone that there is already.
    given_value = None if arguments.value_model in ("reward_model", "shared") else arguments.value_model
    adapt_value = arguments.value_use_peft and config.advantage == "gae" and arguments.value_model != "shared"
    check_models(arguments.model, *reward_models, given_value)
    task = make_task(arguments, data, arguments.model) if arguments.task in MAKE_PROMPTS else None
    functions = (
        [reward_function(arguments.reward_function, task, arguments.answers)] if arguments.reward_function else []
    )
    rows = read_prompts(arguments, data, "train", config.seed, task)
    held_out = read_prompts(arguments, data, "eval", config.seed, task)
    if held_out and task is None:
        names = ("the prompts to train on", "the prompts to evaluate on")
        told = shared_prompts([row["prompt"] for row in rows or ()], [row["prompt"] for row in held_out], names=names)
        report_contradictions(told, strict=data.strict)
    sets = [make_dataset(given) if given else None for given in (rows, held_out)]
    loaded = [
        load_reward_model(path, published=None if n else arguments.published) for n, path in enumerate(reward_models)
    ]
    hide_loading_bars()
    trainer = StepPPOTrainer(
        arguments.model,
        reward_model=loaded,
        reward_funcs=functions,
        args=config,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        value_model=arguments.value_model,
        peft_config=lora.config(),
        value_peft_config=lora.config() if adapt_value else None,
    )
    if arguments.page_steps:
        trainer.add_callback(StepScoresCallback(trainer, every_n_steps=arguments.page_steps))
    with RichProgress(trainer, "PPO"):
        result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics: dict[str, Any] = {"train": result.metrics}
        if held_out:
            metrics["eval"] = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        shown = {
            split: {name: value for name, value in values.items() if name.startswith(_SHOWN)}
            for split, values in metrics.items()
        }
        kept = ("advantage", "num_generations", "num_iterations", "epsilon", "beta", "learning_rate", "seed")
        card = policy_card(
            base=arguments.model,
            rewards=" + ".join(f"`{Path(name).name}`" for name in names),
            data=arguments.task or data.name,
            settings={name: getattr(config, name) for name in kept},
            metrics=shown,
        )
        write_atomic(folder / "metrics.json", to_json(metrics | {"history": trainer.state.log_history}))
        write_atomic(folder / "README.md", card)
        print_metrics(shown)
        print(f"{folder} holds the policy, metrics.json and README.md.")
    trainer.accelerator.end_training()  # a process that exits within a process group may abort


def read_prompts(
    arguments: PPOArguments, data: DataArguments, split: Literal["train", "eval"], seed: int, task: Task | None = None
) -> list[dict[str, Any]] | None:
    """Rows for `StepPPOTrainer`: `prompt`, and the columns that reward functions read.

    Args:
        arguments: Task and reward function.
        data: Files or data set.
        split: Rows to train on, or held-out ones.
        seed: Seed of made problems.
        task: Makes the problems; None: rows are read.

    Returns:
        The rows; None if there are none to evaluate on.

    Raises:
        OSError: If a file cannot be read.
        TypeError: If a prompt is neither text nor a chat.
        ValueError: If there is nothing to train on, or rows do not suit the task or the reward function.
    """
    if task is not None:
        count = arguments.num_problems if split == "train" else arguments.num_eval_problems
        if arguments.task != "arithmetic":
            # `held_out` stays unseen until a policy is measured: `fractal-rm sample --split held_out`.
            made = task.problems("train" if split == "train" else "validation", count, seed) if count else []
            return [{"prompt": problem.prompt} for problem in made] or None
        problems = arithmetic.make_problems(count, seed=seed + (_TRAIN_SEED if split == "train" else _EVAL_SEED))
        return [{"prompt": problem.prompt} for problem in problems] or None
    found = data.read(split)
    if found is None:
        if split == "train":
            raise ValueError("There are no prompts. Give `train_file`, `dataset_name` or `task=arithmetic`.")
        return None
    rows, source = found
    if data.dataset_format is None and arguments.task is None:
        rows = data.prompts(rows, source)
    if data.dataset_format is not None:
        rows = [{"prompt": prompt} for prompt in dict.fromkeys(bag.prompt for bag in rows)]
    if arguments.task == "gsm8k":
        rows = gsm8k.read_gsm8k(rows, source=source, chat=arguments.chat)
    check_prompts(rows, source)
    if arguments.reward_function is not None:
        _check_reward_columns(rows, source, arguments.reward_function)
    return rows


def check_prompts(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Raise unless every row has a prompt, all of them texts or all of them chats."""
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            if row.get("prompt") is None:
                names = ", ".join(map(repr, row)) or "no columns"
                raise ValueError(f"column 'prompt' is missing (found: {names}); add it, or set `task`.")
            read_prompt(row["prompt"])
            check_same_kind(row["prompt"], rows[0]["prompt"])
            if not (is_chat(row["prompt"]) or row["prompt"].strip()):
                raise ValueError("the prompt is empty; drop the row or write the prompt.")


def make_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a data set with all their columns, null where a row has none.

    Raises:
        ValueError: If a column holds values of several types.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError, NotImplementedError, OverflowError) as error:  # of Arrow
        kinds = {name: sorted({type(row.get(name)).__name__ for row in rows} - {"NoneType"}) for name in names}
        mixed = next(
            (f"{name!r} ({', '.join(found)})" for name, found in kinds.items() if len(found) > 1), "one column"
        )
        raise ValueError(
            f"The rows cannot be one table: {mixed} holds values of several types ({reason(error)}). Make all values "
            "of a column alike, or drop the column."
        ) from None


def _check_reward_columns(rows: Sequence[Mapping[str, Any]], source: str, name: str) -> None:
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            if name == "gsm8k_answer" and not isinstance(row.get("answer"), str):
                raise ValueError(f"`reward_function={name}` reads the column 'answer', a text; add it.")
            if name == "exact_answer":
                arithmetic.Problem.from_prompt("" if is_chat(row["prompt"]) else row["prompt"])


def reward_function(name: str, task: Task | None = None, answers: str = "marked") -> Callable[..., list[float]]:
    """The reward function of a name, with what it needs installed.

    Args:
        name: Its name.
        task: Checks answers, for `verifier`.
        answers: What counts as an answer, for `gsm8k_answer`.

    Raises:
        ImportError: If it needs a package that is missing.
    """
    if name == "verifier" and task is not None:
        return task.outcome
    if name == "exact_answer":
        return arithmetic.exact_answer
    reward = gsm8k.last_number_answer if answers == "last_number" else gsm8k.gsm8k_answer
    reward([], [], [])  # says now, not after the first rollout, if math-verify is missing
    return reward
