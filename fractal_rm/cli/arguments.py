"""Arguments of the commands: dataclasses that become flags and keys of a configuration file.

A field's `help` is its only description. Which command takes which of them stands in `fractal_rm/cli/main.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fractal_rm.cli.data_files import (
    DATA_DIR_VARIABLE,
    data_folder,
    find_file,
    find_split,
    load_from_hub,
    load_published,
    read_rows,
)
from fractal_rm.data.formats.index import FORMATS, FormatName


@dataclass
class TrainArguments:
    """What `fractal-rm train` needs beside [`FractalConfig`]."""

    _argument_group_name = "model"

    model: str = field(
        metadata={
            "help": "Path or hub id: a causal language model for `scorer=likelihood`, any backbone for `scorer=token`, "
            "a sentence-transformers model for `scorer=embedding`."
        }
    )


@dataclass
class DataArguments:
    """Where rows come from: files, or a data set with splits."""

    _argument_group_name = "data"

    train_file: str | None = field(
        default=None, metadata={"help": "Rows to train on: .jsonl, .jsonl.gz or .json. Beats `dataset_name`."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Rows for evaluation during training. Beats `dataset_name`."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows for metrics at the end. Beats `dataset_name`."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A folder in `data_dir` that holds a file for each split, or else a data set of the hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub's data set."})
    dataset_format: FormatName | None = field(
        default=None,
        metadata={
            "help": "Read files or a data set as their authors published them, docs/datasets.md. Without a file or "
            "`dataset_name` the hub's copy is loaded."
        },
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_eval_split: str = field(default="validation", metadata={"help": "Split for evaluation, if there is one."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split for metrics at the end, if there is one."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": f"Folder of data sets by name; default: that of the environment's {DATA_DIR_VARIABLE}."},
    )
    limit: int | None = field(default=None, metadata={"help": "Most rows read of each split: the first ones."})

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` is {self.limit}: no row would be left. Give 1 or more, or leave it out.")

    def read(self, split: Literal["train", "eval", "test"]) -> tuple[list[Any], str] | None:
        """Rows of a split (bags with `dataset_format`), and the name of their source for messages.

        Returns:
            None if nothing is named for the split, or the named data set has no such split (for training: an error).

        Raises:
            OSError: If a file is not there, or the hub cannot be reached.
            ValueError: If a file is no readable JSON, or the data set has no split to train on.
        """
        file = getattr(self, f"{split}_file")
        if file is not None:
            return read_rows(find_file(file, self.data_dir), self.dataset_format, self.limit), file
        name = getattr(self, f"dataset_{split}_split")
        if self.dataset_name is None:
            return self._published(name, split)
        found = find_split(self.dataset_name, name, self.data_dir)
        if found is not None:
            return read_rows(found, self.dataset_format, self.limit), str(found)
        if self.is_local:
            rows, places = None, f"files in {data_folder(self.data_dir)}/{self.dataset_name}"
        else:
            splits = load_from_hub(self.dataset_name, self.dataset_config)
            rows, places = splits.get(name), f"splits {sorted(splits)}"
        if rows is None and split == "train":
            raise ValueError(
                f"{self.dataset_name} has no split {name!r} among its {places}. Set `dataset_train_split`."
            )
        return None if rows is None else self._limited(rows, f"{self.dataset_name} ({name})")

    def _published(self, name: str, split: str) -> tuple[list[Any], str] | None:
        """The hub's copy of the data of a format, if no file is named; a split to evaluate on need not be there."""
        if self.dataset_format is None or self.train_file or self.eval_file or self.test_file:
            return None
        hub = FORMATS[self.dataset_format].hub
        if split != "train" and hub is not None and name not in hub.splits:
            return None
        rows = load_published(self.dataset_format, name, self.dataset_config)
        return self._limited(rows, f"{self.dataset_format} ({name})")

    def _limited(self, rows: Any, source: str) -> tuple[list[Any], str]:
        found = list(rows)[: self.limit]
        return (FORMATS[self.dataset_format].read(found, source=source) if self.dataset_format else found), source

    @property
    def name(self) -> str:
        """What is trained on, without its folder."""
        return Path(self.train_file).name if self.train_file else str(self.dataset_name or self.dataset_format)

    @property
    def is_local(self) -> bool:
        """Whether `dataset_name` is a folder of the data folder."""
        folder = data_folder(self.data_dir)
        return folder is not None and self.dataset_name is not None and (folder / self.dataset_name).is_dir()


@dataclass
class LoraArguments:
    """Low-rank adapters; names and defaults are TRL's."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(default=False, metadata={"help": "Train low-rank adapters instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters: alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; default: PEFT's choice for the architecture."}
    )

    def config(self) -> Any | None:
        """The `peft` configuration, None without `use_peft`. The trainer sets the task."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )


@dataclass
class ScoreArguments:
    """Arguments of `fractal-rm score`."""

    model: str = field(metadata={"help": "Step reward model: the folder that `fractal-rm train` wrote, or a hub id."})
    input: str = field(
        metadata={
            "help": "Rows with `prompt` and `response` (or `completion`, or `steps`), and optionally `id`, `label` and "
            "`step_labels`: .jsonl, .jsonl.gz or .json."
        }
    )
    output: str = field(metadata={"help": "Where to write one line of scores for each response."})
    html: str | None = field(default=None, metadata={"help": "Where to write a page to read the scored responses in."})
    show: int = field(default=0, metadata={"help": "Responses to print with their steps, in colour: the first ones."})
    compare_to: str | None = field(
        default=None, metadata={"help": "A second step reward model, whose scores of the same steps stand beside."}
    )
    dataset_format: FormatName | None = field(
        default=None, metadata={"help": "Read `input` as its authors published it, docs/datasets.md."}
    )
    batch_size: int = field(default=32, metadata={"help": "Responses in a forward pass."})
    limit: int | None = field(default=None, metadata={"help": "Most rows read: the first ones."})

    def __post_init__(self) -> None:
        _check_counts(self.batch_size, self.limit)
        if self.show < 0:
            raise ValueError(f"`show` is {self.show}. Give a number of responses, 0 for none.")
        files = [Path(file).resolve() for file in (self.input, self.output, self.html) if file is not None]
        if len(set(files)) < len(files):
            raise ValueError("`input`, `output` and `html` name one file twice. Give each a file of its own.")


def _check_counts(batch_size: int, limit: int | None) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}. Give 1 or more.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}: no row would be left. Give 1 or more, or leave it out.")


@dataclass
class EvaluateArguments:
    """Arguments of `fractal-rm evaluate`."""

    model: str = field(metadata={"help": "Step reward model: the folder that `fractal-rm train` wrote, or a hub id."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Rows with `label` and, where known, `step_labels`: a file, or a data set in `data_dir`; of a "
            "benchmark its official files, or none to take them from the hub."
        },
    )
    benchmark: Literal["processbench", "prmbench", "best_of_n"] | None = field(
        default=None,
        metadata={
            "help": "Judge by the rule of a benchmark; `best_of_n` takes rows of sampled solutions with `prompt`, "
            "`response`, `label` (is it right?) and, for majority votes, `answer`."
        },
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "A second model, judged on the same responses: paired differences."}
    )
    split: str = field(default="test", metadata={"help": "Split, where `data` is the name of a data set."})
    output: str = field(default="metrics.json", metadata={"help": "Where to write the metrics."})
    threshold_file: str | None = field(
        default=None,
        metadata={
            "help": "Other rows with `label`, to choose the threshold on below which a step is called wrong; default: "
            "the threshold that the checkpoint remembers."
        },
    )
    tune_on: Literal["gsm8k", "math", "olympiadbench", "omnimath"] = field(
        default="gsm8k",
        metadata={"help": "processbench: the subset on whose gold labels a second threshold is chosen."},
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "best_of_n: regular expression whose first group is the final answer, where rows have no `answer`."
        },
    )
    outcome_model: str | None = field(
        default=None, metadata={"help": "best_of_n: a model that scores each response as one step, as a control."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": f"Folder of data sets by name; default: that of the environment's {DATA_DIR_VARIABLE}."},
    )
    dataset_format: FormatName | None = field(
        default=None,
        metadata={"help": "Read `data` as its authors published it, docs/datasets.md; None of it: the hub's copy."},
    )
    batch_size: int = field(default=32, metadata={"help": "Responses in a forward pass."})
    limit: int | None = field(default=None, metadata={"help": "Most rows read of each file: the first ones."})

    def __post_init__(self) -> None:
        _check_counts(self.batch_size, self.limit)
        for name in ("outcome_model", "answer_pattern"):
            if getattr(self, name) is not None and self.benchmark != "best_of_n":
                raise ValueError(f"`{name}` has an effect with `benchmark=best_of_n` only. Leave it out.")
        if self.dataset_format is not None and self.benchmark is not None:
            raise ValueError("`dataset_format` has no effect with `benchmark`, which reads its own. Leave one out.")
        if self.threshold_file is not None and self.benchmark == "best_of_n":
            raise ValueError("`threshold_file` has no effect with `benchmark=best_of_n`. Leave it out.")


@dataclass
class PPOArguments:
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
    reward_function: Literal["exact_answer", "gsm8k_answer"] | None = field(
        default=None,
        metadata={
            "help": "Outcome reward: `exact_answer` (task arithmetic), `gsm8k_answer` (column `answer`, extra `math`)."
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
    task: Literal["arithmetic", "gsm8k"] | None = field(
        default=None,
        metadata={
            "help": "`arithmetic` makes its own problems; `gsm8k` reads rows with `question` and `answer`; without a "
            "task, rows hold `prompt` and the columns that the reward function reads."
        },
    )
    num_problems: int = field(default=4096, metadata={"help": "Task arithmetic: problems to train on."})
    num_eval_problems: int = field(default=256, metadata={"help": "Task arithmetic: held-out problems; 0 for none."})
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
        if self.reward_model == ["none"]:
            self.reward_model = None


@dataclass
class ServeArguments:
    """Arguments of `fractal-rm serve`."""

    model: str = field(metadata={"help": "Step reward model: the folder that `fractal-rm train` wrote, or a hub id."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on; 0.0.0.0 for all, which lets other machines use the server."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0: any that is free."})
    batch_size: int = field(default=32, metadata={"help": "Most responses in a forward pass, of any requests."})
    wait: float = field(
        default=0.005, metadata={"help": "Seconds that a response waits for others to share a forward pass with."}
    )
    max_responses: int = field(default=1024, metadata={"help": "Most responses in a request."})
    max_characters: int = field(
        default=4_000_000, metadata={"help": "Most characters in the prompts and responses of a request."}
    )
    max_body_bytes: int = field(default=16_000_000, metadata={"help": "Longest request."})
    seconds: float = field(
        default=60.0, metadata={"help": "Longest time for a request to arrive, and again to be scored."}
    )
    max_queued: int = field(
        default=16_384, metadata={"help": "Most responses that wait for their turn; requests beyond are refused."}
    )
    ends: list[str] | None = field(
        default=None,
        metadata={
            "help": "OpenRLHF: texts to take off the end of a response, such as the policy's end-of-text token; those "
            "of the reward model's own tokenizer are taken off anyway."
        },
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.wait < self.seconds:
            raise ValueError(
                f"`batch_size` is {self.batch_size} and `wait` is {self.wait}. "
                "Give a batch size of 1 or more and a wait from 0 to less than `seconds`."
            )


@dataclass
class ReportArguments:
    """Arguments of `fractal-rm report`."""

    results: str | None = field(default=None, metadata={"help": "A `results.jsonl`, for tables. This or `runs`."})
    runs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Trainings by PPO, for their curves: each DIR or NAME=DIR, the `output_dir` of `fractal-rm ppo` or "
            "a checkpoint. Runs of one NAME, such as seeds, are drawn as their mean with an interval."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Where to write: .html for a page, of results also .md for Markdown; default for results: to the "
            "screen."
        },
    )
    figure: str | None = field(
        default=None, metadata={"help": "Of runs: where to save the curves as a picture, .png or .svg."}
    )
    metrics: list[str] | None = field(
        default=None, metadata={"help": "Of results: metrics to show, in order; default: all."}
    )
    title: str | None = field(default=None, metadata={"help": "Heading; default: `Results` or `Training`."})

    def __post_init__(self) -> None:
        if (self.results is None) == (self.runs is None):
            raise ValueError("Give either `results`, a results.jsonl for tables, or `runs`, folders for curves.")
        for name, needs in (("figure", "runs"), ("metrics", "results")):
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(f"`{name}` has an effect with `{needs}` only. Leave it out.")
        if self.runs is not None and self.output is None and self.figure is None:
            raise ValueError(
                "`runs` make a page or a picture. Give `output` (.html), `figure` (.png or .svg), or both."
            )
        endings = (".html",) if self.runs is not None else (".md", ".html")
        if self.output is not None and not self.output.endswith(endings):
            raise ValueError(f"`output` is {self.output}. Give a name that ends in {' or '.join(endings)}.")
        if self.figure is not None and not self.figure.endswith((".png", ".svg")):
            raise ValueError(f"`figure` is {self.figure}. Give a name that ends in .png or .svg.")
