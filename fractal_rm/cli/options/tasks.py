"""Tasks that `sample` and `ppo` take by name: they make prompts and check answers."""

from dataclasses import dataclass, field
from typing import Literal

from fractal_rm.cli.options.arguments import DATA_DIR_VARIABLE, DataArguments, data_folder
from fractal_rm.ranges import check_ranges
from fractal_rm.tasks.task import Task

TaskName = Literal["arithmetic", "gsm8k", "reasoning_gym", "word_problems"]
# `gsm8k` defines how rows are read; the others make their own prompts.
MAKE_PROMPTS = ("arithmetic", "reasoning_gym", "word_problems")


@dataclass(kw_only=True)
class TaskArguments:
    """Which task, and where prompts come from."""

    task: TaskName | None = field(
        default=None,
        metadata={
            "help": "Where prompts come from. `arithmetic` and `reasoning_gym` (extra `gym`) make their own, "
            "`word_problems` reads its texts from `data_dir`, `gsm8k` reads rows with `question` and `answer`; without "
            "a task, rows have `prompt` and the columns that answers are checked with."
        },
    )
    task_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set of reasoning_gym, such as `gsm_symbolic`. Also `gsm_symbolic_unseen` (templates that no "
            "split of gsm_symbolic has), `gsm_symbolic_easy` and `gsm_symbolic_hard`."
        },
    )

    answers: Literal["marked", "last_number"] = field(
        default="marked",
        metadata={
            "help": "What counts as the final answer of a response. `marked`: what follows `####` or is boxed, exactly "
            "once; `last_number`: the last number if nothing is marked. For rows with right answers."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.answers == "last_number" and self.task in MAKE_PROMPTS:
            raise ValueError(
                f"`answers` has no effect with `task={self.task}`, which checks answers itself. Leave it out."
            )
        if self.task == "reasoning_gym" and not self.task_name:
            raise ValueError("`task=reasoning_gym` needs `task_name`: a data set of the library, such as gsm_symbolic.")
        if self.task_name and self.task != "reasoning_gym":
            raise ValueError(
                "`task_name` names a data set of reasoning-gym. Set `task=reasoning_gym`, or leave it out."
            )


def make_task(arguments: TaskArguments, data: DataArguments, model: str) -> Task:
    """The named task, if it makes its own prompts; `data` says where its texts are.

    Raises:
        ImportError: If a library is missing.
        ValueError: If rows are given too, the data set does not exist, or its texts are missing.
    """
    if data.train_file or data.eval_file or data.dataset_name:
        raise ValueError(
            f"`task={arguments.task}` makes its own prompts, but a file or data set is given too. Leave one out."
        )
    if arguments.task == "arithmetic":
        from fractal_rm.tasks.arithmetic.conditions import ShippedArithmetic

        return ShippedArithmetic()
    if arguments.task == "reasoning_gym":
        from fractal_rm.tasks.gym import GymTask

        return GymTask(str(arguments.task_name), model=model)
    from fractal_rm.tasks.word_problems import WordProblems

    folder = data_folder(data.data_dir)
    if folder is None:
        raise ValueError(
            f"`task=word_problems` reads its texts from a folder `word_problems` of `data_dir`: set it, or the "
            f"environment variable {DATA_DIR_VARIABLE}."
        )
    return WordProblems(folder / "word_problems", model=model)
