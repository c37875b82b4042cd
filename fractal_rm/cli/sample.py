"""`fractal-rm sample`: prompts in, responses with labels out."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fractal_rm.cli.checks import check_models, check_own_files, hide_loading_bars, writing_files
from fractal_rm.cli.options.arguments import DataArguments
from fractal_rm.cli.options.parser import parse
from fractal_rm.cli.options.tasks import MAKE_PROMPTS, TaskArguments, TaskName, make_task
from fractal_rm.data.rows import parse_line
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.errors import reason
from fractal_rm.files import read_json, write_atomic
from fractal_rm.tasks.answers import read_answer
from fractal_rm.tasks.equations import step_labels
from fractal_rm.tasks.task import Split

# Arguments that may differ when a stopped run continues.
_FREE = ("output", "num_prompts")
# Columns of every row that this command writes.
_WRITTEN = {"prompt", "completion", "label", "answer", "responses"}


@dataclass(kw_only=True)
class SampleArguments(TaskArguments):
    """Arguments of `fractal-rm sample`."""

    model: str = field(metadata={"help": "The policy: path or hub id of a causal language model."})
    output: str = field(
        metadata={
            "help": "File of responses, one per line. Each has `prompt`, `completion`, `label` (1: the final answer is "
            "right), `answer` and `responses` (lines of this prompt). A stopped run continues there."
        }
    )
    split: Split = field(
        default="reward_model",
        metadata={"help": "Prompts of a task that makes its own. Splits share no prompt."},
    )
    num_prompts: int = field(default=256, metadata={"help": "Number of prompts. Raise it to extend a finished run."})
    skip_prompts: int = field(
        default=0,
        metadata={"help": "Rows to skip at the start of a file or data set, kept for another file of responses."},
    )
    samples: int = field(default=8, metadata={"help": "Responses to each prompt."})
    greedy: bool = field(default=False, metadata={"help": "Decode greedily instead of sampling."})
    chat: bool = field(
        default=False, metadata={"help": "Prompts are chats, for models with a chat template; otherwise texts."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a response; default: the task's."}
    )
    batch_size: int = field(default=64, metadata={"help": "Responses per batch."})
    gold_steps: bool = field(
        default=False,
        metadata={
            "help": "Also write `step_labels`, if the task can check steps. They are for evaluation, or for a reward "
            "model trained on them as an upper bound; a method under test must not see them."
        },
    )
    dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "Precision of the policy. Use `float32` on processors without bfloat16."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the problems and of the sampling."})

    def __post_init__(self) -> None:
        if self.skip_prompts and self.task not in (None, "gsm8k"):
            raise ValueError(
                f"`task={self.task}` makes its own prompts: choose others with `split`, not `skip_prompts`."
            )
        super().__post_init__()


@dataclass
class Asked:
    """A prompt, with checks of its responses."""

    prompt: Any  # text or chat
    is_right: Callable[[str], bool]  # checks the final answer of a response
    # Checks each line of a response; returns None if the task cannot check steps.
    check_steps: Callable[[str], Sequence[bool] | None]


def sample(argv: Sequence[str]) -> None:
    """Sample responses to prompts, label them, and append them to a file."""
    arguments, data = parse("sample", [SampleArguments, DataArguments], argv)
    data.check_prompts_alone("sample", evaluates=False)
    check_own_files(train_file=data.train_file, output=arguments.output)
    with writing_files(arguments.output):
        _sample(arguments, data)


def _sample(arguments: SampleArguments, data: DataArguments) -> None:
    output = Path(arguments.output)
    check_models(arguments.model)
    asked, max_new_tokens = _read_prompts(arguments, data)
    finished = _rows_so_far(output, arguments)

    import torch
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoModelForCausalLM

    from fractal_rm.scorers.checkpoint import check_complete, check_finite, load_tokenizer
    from fractal_rm.scorers.inputs import prompt_text
    from fractal_rm.tasks.group_sampling import sample_groups

    hide_loading_bars()
    tokenizer = load_tokenizer(arguments.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=arguments.dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # damaged files make libraries raise anything
        raise ValueError(
            f"{arguments.model} cannot be loaded as a causal language model ({reason(error)}). Give another `model`."
        ) from error
    model, info = loaded
    check_complete(arguments.model, info["missing_keys"], "a causal language model")
    check_finite(arguments.model, model)
    model.to(device)
    texts = [prompt_text(one.prompt, tokenizer, "{prompt}") for one in asked]
    size = max(1, arguments.batch_size // arguments.samples)
    pending = [
        (number, batch)
        for number, batch in enumerate(_batches(texts, size))
        if any(_key(asked[i].prompt) not in finished for i in batch)
    ]
    if not pending:
        print(f"{output} has the responses to all {len(asked)} prompts already.")
    bar = track(pending, description="Sampling", console=Console(stderr=True), disable=not pending)
    for number, batch in bar:
        groups = sample_groups(
            model,
            tokenizer,
            [texts[i] for i in batch],
            samples=arguments.samples,
            greedy=arguments.greedy,
            max_new_tokens=max_new_tokens,
            seed=1_000_003 * arguments.seed + number,
        )
        for i, responses in zip(batch, groups, strict=True):
            if _key(asked[i].prompt) not in finished:
                last_number = arguments.answers == "last_number"
                _append(output, _rows(asked[i], responses, arguments.gold_steps, last_number=last_number))
    prompts = {_key(one.prompt) for one in asked}
    rows = [row for row in read_rows_of(output) if _key(row["prompt"]) in prompts]
    marked = arguments.task != "arithmetic"  # whose checker reads the last line
    print(f"{summary(rows, arguments.samples, marked=marked)}; {output} holds the responses.")


def _read_prompts(arguments: SampleArguments, data: DataArguments) -> tuple[list[Asked], int]:
    """Prompts with their checks, and the maximum number of tokens of a response."""
    count, seed = arguments.num_prompts, arguments.seed
    if arguments.task in MAKE_PROMPTS:
        task = make_task(arguments, data, arguments.model)
        problems = task.problems(arguments.split, count, seed)
        asked = [Asked(p.prompt, p.check_answer, p.check_steps) for p in problems]
        longest = task.max_new_tokens
    else:
        asked, longest = _prompts_of_rows(arguments, data), 320
        first = arguments.skip_prompts
        if first >= len(asked):
            raise ValueError(f"`skip_prompts` is {first}, but there are {len(asked)} prompts. Give a smaller number.")
        asked = asked[first : first + count]
    if arguments.chat:
        for one in asked:
            if isinstance(one.prompt, str):
                one.prompt = [{"role": "user", "content": one.prompt.strip()}]
    return asked, arguments.max_new_tokens or longest


def _prompts_of_rows(arguments: SampleArguments, data: DataArguments) -> list[Asked]:
    """Prompts of a file or data set; their answers are compared as GSM8K's are."""
    from fractal_rm.tasks.gsm8k import gsm8k_answer, last_number_answer, read_gsm8k

    found = data.read("train")
    if found is None:
        tasks = ", ".join(get_args(TaskName))
        raise ValueError(f"There are no prompts. Give `train_file`, `dataset_name`, or one of the tasks {tasks}.")
    rows, source = found
    if arguments.task == "gsm8k":
        rows = read_gsm8k(rows, source=source, chat=arguments.chat)
    else:
        rows = data.prompts(rows, source)
    reward = last_number_answer if arguments.answers == "last_number" else gsm8k_answer
    reward([], [], [])  # says now if math-verify is missing

    def judge(answer: str | float) -> Callable[[str], bool]:
        return lambda response: reward([""], [response], [answer])[0] == 1.0

    for number, row in enumerate(rows, 1):
        answer = row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or row.get("prompt") is None:
            raise ValueError(
                f"{source}, row {number}: a row needs `prompt`, and `answer` as text or number, to be labelled."
            )
    return [Asked(row["prompt"], judge(row["answer"]), lambda _: None) for row in rows]


def _batches(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _rows(
    asked: Asked, responses: Sequence[str], gold_steps: bool, *, last_number: bool = False
) -> list[dict[str, Any]]:
    """The rows of a prompt. Blank responses are dropped: nothing can be learned from them."""
    written = [response for response in responses if response.strip()]
    rows = []
    for response in written:
        row = {
            "prompt": asked.prompt,
            "completion": response,
            "label": float(asked.is_right(response)),
            "answer": read_answer(response, last_number=last_number),
            "responses": len(written),
        }
        # One line for each step that a reward model reads: a step may contain other line ends, or several lines.
        lines = [" ".join(response[start:end].splitlines()) for start, end in Segmentation("lines")(response)]
        flags = asked.check_steps("\n".join(lines)) if gold_steps else None
        rows.append(row if flags is None else row | {"step_labels": step_labels(flags)})
    return rows


def _key(prompt: Any) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows in one write: a killed process leaves at most one incomplete line."""
    from fractal_rm.hf.checkpoints import named_write_errors

    with named_write_errors(f"Responses in {path}"), path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows_of(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a file that this command wrote."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    rows = [parse_line(line, path, row) for row, line in enumerate(lines, 1) if line.endswith(b"\n")]
    for number, row in enumerate(rows, 1):
        if missing := _WRITTEN - row.keys():
            raise ValueError(f"{path}, row {number} has no {min(missing)!r}; remove the row, or give another `output`.")
    return rows


def _rows_so_far(path: Path, arguments: SampleArguments) -> set[str]:
    """Prompts that have all their responses; rows of other prompts are removed.

    Raises ValueError if a run with other settings wrote the file.
    """
    settings = {name: value for name, value in vars(arguments).items() if name not in _FREE}
    beside = path.with_name(f"{path.name}.settings.json")
    if path.is_file():
        before = read_json(beside) if beside.is_file() else None
        if before is not None and not isinstance(before, dict):
            raise ValueError(f"{beside} holds no settings. Remove {path} and it, or give another `output`.")
        if before is not None:  # written by a version that had fewer arguments
            before = {one.name: one.default for one in fields(arguments) if one.name in settings} | before
        if before != settings:
            changed = (
                "settings unknown"
                if before is None
                else ", ".join(
                    f"{name} {before.get(name)!r}, now {value!r}"
                    for name, value in settings.items()
                    if before.get(name) != value
                )
            )
            raise ValueError(f"{path} holds responses of a run with other settings ({changed}). Give another `output`.")
    write_atomic(beside, json.dumps(settings, indent=2) + "\n")
    rows = read_rows_of(path)
    counts = Counter(_key(row["prompt"]) for row in rows)
    finished = {key for row in rows if counts[key := _key(row["prompt"])] == row["responses"]}
    if path.is_file():
        kept = [row for row in rows if _key(row["prompt"]) in finished]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return finished


def summary(rows: Sequence[dict[str, Any]], samples: int, *, marked: bool = True) -> str:
    """The share of right responses, as a sentence without its period; if answers are `marked`, also the share without
    one.

    Example:
        >>> rows = [{"prompt": "a", "label": 1.0, "answer": "3"}, {"prompt": "a", "label": 0.0, "answer": None}]
        >>> summary(rows, 2)
        '2 responses to 1 prompts: 50.0 % right, pass@2 100.0 %, 50.0 % without an answer'
        >>> summary(rows, 2, marked=False)
        '2 responses to 1 prompts: 50.0 % right, pass@2 100.0 %'
    """
    right: dict[str, float] = {}
    for row in rows:
        right[_key(row["prompt"])] = max(right.get(_key(row["prompt"]), 0.0), row["label"])
    if not right:
        return "no non-blank response"
    share = 100 * sum(row["label"] for row in rows) / (len(right) * samples)
    silent = 100 * sum(row["answer"] is None for row in rows) / len(rows)
    passed = 100 * sum(right.values()) / len(right)
    told = f"{len(rows)} responses to {len(right)} prompts: {share:.1f} % right, pass@{samples} {passed:.1f} %"
    return f"{told}, {silent:.1f} % without an answer" if marked else told
