"""`fractal-rm ppo`: train a policy on step rewards, outcome rewards, or both."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from fractal_rm.cli.checks import (
    check_models,
    checkpoint_to_resume,
    hide_loading_bars,
    load_reward_model,
    number_cell,
    print_metrics,
    refuse_finished_output,
    report_contradictions,
    saving_trained,
    to_json,
    writing_folder,
)
from fractal_rm.cli.options.arguments import DataArguments, LoraArguments
from fractal_rm.cli.options.parser import parse
from fractal_rm.cli.options.reward_functions import NAMED, check_reward_function, load_reward_function
from fractal_rm.cli.options.tasks import MAKE_PROMPTS, TaskArguments, make_task
from fractal_rm.data.contradictions import shared_prompts
from fractal_rm.data.prompts import check_same_kind, is_chat, read_prompt
from fractal_rm.data.readers import naming
from fractal_rm.errors import reason
from fractal_rm.files import write_atomic
from fractal_rm.hf.cards import policy_card
from fractal_rm.hf.manifest import write_manifest
from fractal_rm.hf.progress import RichProgress
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.report.rollout_pages import StepScoresCallback
from fractal_rm.tasks import gsm8k
from fractal_rm.tasks.arithmetic import problems as arithmetic
from fractal_rm.tasks.task import Task

# Metrics on the screen and the model card; metrics.json holds all of them.
_SHOWN = ("train_runtime", "train_loss", "eval_rewards/", "eval_completions/mean_length", "eval_kl")
_OUTCOME = re.compile(r"rewards/[^/]+/mean")
# Seeds of problem lists: different from each other and from the seeds of policies.
_TRAIN_SEED, _EVAL_SEED = 3_000_000, 4_000_000


@dataclass(kw_only=True)
class PPOArguments(TaskArguments):
    """Arguments of `fractal-rm ppo` in addition to [`StepPPOConfig`]."""

    _argument_group_name = "models and rewards"

    model: str = field(metadata={"help": "The policy: path or hub id. A causal language model."})
    reward_model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Step reward models: folders or hub ids. They give dense rewards, weighted by "
            "`step_reward_weights`; `none` removes the models that the file names."
        },
    )
    published: str | None = field(
        default=None,
        metadata={
            "help": "Format of the first `reward_model`, if it is a published one whose files do not tell: "
            "`trl` (or `trl:SEPARATOR`), `qwen-prm`, `skywork-prm`, `math-shepherd` or `rlhflow`."
        },
    )
    reward_function: str | None = field(
        default=None,
        metadata={
            "help": "Outcome reward: a name, or FILE.py:FUNCTION. Names: `exact_answer`, `gsm8k_answer`, `verifier`. "
            "`exact_answer` is for the task arithmetic; `gsm8k_answer` reads the column `answer` (extra `math`); "
            "`verifier` is the check of the tasks reasoning_gym and word_problems. Name your own function by its file "
            "(`my_rewards.py:exact`) or by a dotted path (`my_package.rewards.exact`); it takes the arguments of TRL's "
            "reward functions."
        },
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Value model: path, `reward_model` or `shared`. For `advantage=gae`: a token classification "
            "model with one label, the reward model's backbone, or a head on the policy's backbone; default: a copy of "
            "the policy."
        },
    )
    value_use_peft: bool = field(
        default=True,
        metadata={"help": "With `use_peft`: train adapters of the value model too, not all its weights."},
    )
    num_problems: int = field(default=4096, metadata={"help": "Problems that a task makes for training."})
    num_eval_problems: int = field(
        default=256, metadata={"help": "Problems that a task makes for evaluation; 0 for none."}
    )
    chat: bool = field(
        default=True,
        metadata={"help": "Task gsm8k: prompts are chats, for models with a chat template; otherwise texts."},
    )
    page_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between pages of scored completions. The pages are in `output_dir/step_scores`; 0: no pages."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_model == ["none"]:
            self.reward_model = None
        if self.reward_function is not None:
            check_reward_function(self.reward_function)
        verifies = self.task in ("reasoning_gym", "word_problems")
        checked_by_task = verifies and self.reward_function in NAMED
        if (self.reward_function == "verifier") != checked_by_task:
            raise ValueError(
                f"`reward_function={self.reward_function}` does not suit `task={self.task}`. Give `verifier` with the "
                "tasks reasoning_gym and word_problems, and with no other."
            )
        if self.answers != "marked" and self.reward_function != "gsm8k_answer":
            raise ValueError("`answers` has an effect only with `reward_function=gsm8k_answer`. Leave it out.")
        of_tasks = {"num_problems": MAKE_PROMPTS, "num_eval_problems": MAKE_PROMPTS, "chat": ("gsm8k",)}
        for one in fields(self):
            tasks = of_tasks.get(one.name)
            if tasks and self.task not in tasks and getattr(self, one.name) != one.default:
                raise ValueError(
                    f"`{one.name}` is {getattr(self, one.name)}, but has an effect only with the task "
                    f"{' or '.join(tasks)}. Leave it out."
                )


def ppo(argv: Sequence[str]) -> None:
    """Train a policy with PPO on step rewards, outcome rewards, or both."""
    arguments, data, lora, config = parse("ppo", [PPOArguments, DataArguments, LoraArguments, StepPPOConfig], argv)
    data.check_prompts_alone("ppo", evaluates=True)
    with writing_folder(config.output_dir):
        _ppo(arguments, data, lora, config)


def _ppo(arguments: PPOArguments, data: DataArguments, lora: LoraArguments, config: StepPPOConfig) -> None:
    folder = Path(str(config.output_dir))
    checkpoint = checkpoint_to_resume(config)
    refuse_finished_output(folder, config.overwrite_output_dir or bool(checkpoint))
    reward_models = arguments.reward_model or []
    names = [*reward_models, *([arguments.reward_function] if arguments.reward_function else [])]
    if not names:
        raise ValueError("There is no reward. Give `reward_model` (dense), `reward_function` (outcome), or both.")
    # These two words name a backbone that is loaded anyway.
    given_value = None if arguments.value_model in ("reward_model", "shared") else arguments.value_model
    adapt_value = arguments.value_use_peft and config.advantage == "gae" and arguments.value_model != "shared"
    check_models(arguments.model, *reward_models, given_value)
    task = make_task(arguments, data, arguments.model) if arguments.task in MAKE_PROMPTS else None
    rows = read_prompts(arguments, data, "train", config.seed, task)
    held_out = read_prompts(arguments, data, "eval", config.seed, task)
    name = arguments.reward_function
    functions = [load_reward_function(name, task, arguments.answers)] if name else []
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
            with saving_trained(trainer, "policy"):
                metrics["eval"] = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_manifest(folder, trainer.identity, ())  # identifies the run of this policy
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
        print(closing(trainer.state.log_history))
        print(f"{folder} holds the policy, metrics.json and README.md.")
        print(f"Next: fractal-rm report --runs {folder} --output {folder}/training.html")
    trainer.accelerator.end_training()  # a process that exits within a process group may abort


def closing(history: Sequence[Mapping[str, Any]]) -> str:
    """How a run changed its rewards, from its first log to its last, and the alarms of its guards.

    Example:
        >>> logs = [{"rewards/exact_answer/mean": 0.25, "steps/score": 0.5}, {"rewards/exact_answer/mean": 0.75}]
        >>> closing([*logs, {"steps/score": 0.625, "guards/alarm/kl": 1.0}])
        'Outcome (exact_answer) 0.25 -> 0.75, step score 0.5 -> 0.625. Alarms: kl.'
    """
    names = {name: name.split("/")[1] for logs in history for name in logs if _OUTCOME.fullmatch(name)}
    shown = {name: f"outcome ({short})" for name, short in names.items() if not short.startswith("step_reward_model")}
    found = []
    for name, called in (shown | {"steps/score": "step score"}).items():
        values = [logs[name] for logs in history if isinstance(logs.get(name), int | float)]
        if values:
            found.append(f"{called} {number_cell(values[0])} -> {number_cell(values[-1])}")
    alarms = {name.rpartition("/")[2] for logs in history for name in logs if name.startswith("guards/alarm/")}
    text = ", ".join(found) or "no reward was logged"
    return f"{text[0].upper()}{text[1:]}. Alarms: {', '.join(sorted(alarms)) or 'none'}."


def read_prompts(
    arguments: PPOArguments, data: DataArguments, split: Literal["train", "eval"], seed: int, task: Task | None = None
) -> list[dict[str, Any]] | None:
    """Rows for `StepPPOTrainer`: `prompt`, and the columns that reward functions read.

    `task` makes problems from `seed`; without it, rows are read from files or a data set. Returns None if there are no
    rows for evaluation.

    Raises:
        OSError: If a file cannot be read.
        TypeError: If a prompt is neither text nor a chat.
        ValueError: If there is no training data, or rows do not suit the task or the reward function.
    """
    if task is not None:
        count = arguments.num_problems if split == "train" else arguments.num_eval_problems
        if arguments.task != "arithmetic":
            # The split `held_out` is for measuring policies: `fractal-rm sample --split held_out`.
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
    return list(rows)


def check_prompts(rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Raise ValueError unless every row has a prompt, all of them texts or all of them chats."""
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            if row.get("prompt") is None:
                names = ", ".join(map(repr, row)) or "no columns"
                raise ValueError(
                    f"column 'prompt' is missing (found: {names}); add it, name it with --prompt_column, or set `task`."
                )
            read_prompt(row["prompt"])
            check_same_kind(row["prompt"], rows[0]["prompt"])
            if not (is_chat(row["prompt"]) or row["prompt"].strip()):
                raise ValueError("the prompt is empty; drop the row or write the prompt.")


def make_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a data set with all their columns, null where a row lacks one; raises ValueError if a column has mixed
    types."""
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError, NotImplementedError, OverflowError) as error:  # of Arrow
        kinds = {name: sorted({type(row.get(name)).__name__ for row in rows} - {"NoneType"}) for name in names}
        mixed = next(
            (f"{name!r} ({', '.join(found)})" for name, found in kinds.items() if len(found) > 1), "one column"
        )
        raise ValueError(
            f"The rows cannot be one table: {mixed} has values of several types ({reason(error)}). Give all values of "
            "a column the same type, or drop the column."
        ) from None


def _check_reward_columns(rows: Sequence[Mapping[str, Any]], source: str, name: str) -> None:
    for number, row in enumerate(rows, 1):
        with naming(source, number):
            if name == "gsm8k_answer" and not isinstance(row.get("answer"), str | int | float):
                raise ValueError(f"`reward_function={name}` reads the column 'answer', a text or a number; add it.")
            if name == "exact_answer":
                arithmetic.Problem.from_prompt("" if is_chat(row["prompt"]) else row["prompt"])
