"""Prompts for `fractal-rm ppo`: made by a task, or read from a data set, and checked before any model is loaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fractal_rm.cli.arguments import DataArguments, PPOArguments
from fractal_rm.data.prompts import check_prompt, check_same_kind, is_chat
from fractal_rm.data.readers import naming
from fractal_rm.tasks import gsm8k
from fractal_rm.tasks.arithmetic import problems as arithmetic

# Seeds of problem lists, apart from each other and from those that policies are made with.
_TRAIN_SEED, _EVAL_SEED = 3_000_000, 4_000_000


def read_prompts(
    arguments: PPOArguments, data: DataArguments, split: Literal["train", "eval"], seed: int
) -> list[dict[str, Any]] | None:
    """Rows for `StepPPOTrainer`: `prompt`, and the columns that reward functions read.

    Args:
        arguments: Task and reward function.
        data: Files or data set.
        split: Rows to train on, or held-out ones.
        seed: Seed of made problems.

    Returns:
        The rows; None if there are none to evaluate on.

    Raises:
        OSError: If a file cannot be read.
        TypeError: If a prompt is neither text nor a chat.
        ValueError: If there is nothing to train on, or rows do not suit the task or the reward function.
    """
    if arguments.task == "arithmetic":
        if data.train_file or data.eval_file or data.dataset_name:
            raise ValueError(
                "`task=arithmetic` makes its own problems, but a file or data set is given too. Leave one of them out."
            )
        count = arguments.num_problems if split == "train" else arguments.num_eval_problems
        if count < (split == "train"):
            name, least = ("num_problems", 1) if split == "train" else ("num_eval_problems", 0)
            raise ValueError(f"`{name}` is {count}. Give {least} or more.")
        problems = arithmetic.make_problems(count, seed=seed + (_TRAIN_SEED if split == "train" else _EVAL_SEED))
        return [{"prompt": problem.prompt} for problem in problems] or None
    found = data.read(split)
    if found is None:
        if split == "train":
            raise ValueError("There are no prompts. Give `train_file`, `dataset_name` or `task=arithmetic`.")
        return None
    rows, source = found
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
        where = f"{source}, row {number}"
        if row.get("prompt") is None:
            names = ", ".join(map(repr, row)) or "no columns"
            raise ValueError(f"{where}: column 'prompt' is missing (found: {names}); add it, or set `task`.")
        with naming(source, number):
            check_prompt(row["prompt"])
            check_same_kind(row["prompt"], rows[0]["prompt"])
            if not (is_chat(row["prompt"]) or row["prompt"].strip()):
                raise ValueError("the prompt is empty; drop the row or write the prompt.")


def _check_reward_columns(rows: Sequence[Mapping[str, Any]], source: str, name: str) -> None:
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            if name == "gsm8k_answer" and not isinstance(row.get("answer"), str):
                raise ValueError(f"`reward_function={name}` reads the column 'answer', a text; add it.")
            if name == "exact_answer":
                arithmetic.Problem.from_prompt("" if is_chat(row["prompt"]) else row["prompt"])


def reward_function(name: str) -> Callable[..., list[float]]:
    """The reward function of a name, with what it needs installed.

    Raises:
        ImportError: If it needs a package that is missing.
    """
    if name == "exact_answer":
        return arithmetic.exact_answer
    gsm8k.gsm8k_answer([], [], [])  # says now, not after the first rollout, if math-verify is missing
    return gsm8k.gsm8k_answer
