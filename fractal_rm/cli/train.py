"""`fractal-rm train`: a step reward model from response labels."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fractal_rm.cli.checks import (
    check_models,
    checkpoint_to_resume,
    hide_loading_bars,
    number_cell,
    print_metrics,
    print_table,
    refuse_finished_output,
    report_contradictions,
    saving_trained,
    to_json,
    writing_folder,
)
from fractal_rm.cli.options.arguments import DataArguments, LoraArguments
from fractal_rm.cli.options.parser import parse
from fractal_rm.data.bag import Bag
from fractal_rm.data.contradictions import contradictions, shared_prompts
from fractal_rm.data.formats.index import check_meaning
from fractal_rm.data.prompts import is_chat
from fractal_rm.files import write_atomic
from fractal_rm.hf.manifest import write_manifest
from fractal_rm.hf.progress import RichProgress
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import to_bags
from fractal_rm.reward_training.large_data import training_rows
from fractal_rm.reward_training.stages import plan
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.reward_training.trials import TRIALS_FILE, Trial


@dataclass
class TrainArguments:
    """Arguments of `fractal-rm train` in addition to [`FractalConfig`]."""

    _argument_group_name = "model"

    model: str = field(
        metadata={
            "help": "Model to start from: path or hub id. A causal language model for `scorer=likelihood`, any "
            "backbone for `scorer=token`, a sentence-transformers model for `scorer=embedding`."
        }
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "If a row cannot be read: `stop` before training, or `skip` it and count it."},
    )
    trials: int | None = field(
        default=None,
        metadata={
            "help": "Choose among the first N configurations of a short list (aggregation, priors, pseudo-labels, "
            "learning rates and epochs; 8 at most) by response labels of the evaluation data, cross-validated if "
            "there are few, and train the best. None: train the given configuration."
        },
    )


def train(argv: Sequence[str]) -> None:
    """Train a step reward model from response labels."""
    arguments, data, lora, config = parse("train", [TrainArguments, DataArguments, LoraArguments, FractalConfig], argv)
    with writing_folder(config.output_dir):
        _train(arguments, data, lora, config)


def _train(arguments: TrainArguments, data: DataArguments, lora: LoraArguments, config: FractalConfig) -> None:
    folder = Path(str(config.output_dir))
    checkpoint = checkpoint_to_resume(config)
    refuse_finished_output(folder, config.overwrite_output_dir or bool(checkpoint) or _is_staged(config))
    check_models(arguments.model)
    if data.dataset_format is not None:
        check_meaning(data.dataset_format, config.aggregation)
        if arguments.on_bad_row == "skip":
            raise ValueError("`on_bad_row=skip` has no effect with `dataset_format`: official files are complete.")
    bags, sources, train = {}, {}, None
    for split in ("train", "eval", "test"):
        found = data.read(split)
        if found is None:
            continue
        rows, sources[split] = found
        options: Any = {"source": sources[split], "columns": data.columns, "on_bad_row": arguments.on_bad_row}
        if split == "train" and arguments.trials is None:
            train = training_rows(rows, config, config.settings(), **options)
            bags[split] = train.first
        else:
            bags[split] = to_bags(rows, config.settings(), **options)
    if "train" not in bags:
        raise ValueError("There is no training data. Give `train_file` or `dataset_name`.")
    _check_kinds(bags, sources)
    report_contradictions(_contradictions(bags, sources, meaning(config.aggregation)), strict=data.strict)
    hide_loading_bars()
    given = {"eval_dataset": bags.get("eval"), "peft_config": lora.config()}
    if arguments.trials is None:
        trainer = FractalTrainer(arguments.model, args=config, train_dataset=train, **given)
    else:
        trainer = _choose(arguments.trials, arguments.model, config, {"train_dataset": bags["train"], **given})
    checkpoint = checkpoint or _is_staged(trainer.args)
    with RichProgress(trainer, "Training"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with saving_trained(trainer, "reward model"):
        metrics = trainer.finish(bags.get("test"), data=data.name)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_manifest(folder, trainer.identity, ())  # identifies the run of this model
        write_atomic(folder / "metrics.json", to_json(metrics | {"history": trainer.state.log_history}))
        print_metrics(metrics)
        print(f"{folder} holds the reward model, metrics.json and README.md.")
        print(_closing(folder, metrics, trainer.settings.threshold, data.eval_file or data.train_file))
    trainer.accelerator.end_training()  # a process that exits within a process group may abort


def _choose(count: int, model: str, config: FractalConfig, given: Mapping[str, Any]) -> FractalTrainer:
    """The trainer of the best configuration; prints a line per trial, then a table."""
    done = itertools.count(1)

    def tell(trial: Trial) -> None:
        print(f"Trial {next(done)} of {count}: {trial.value:.4f} ({trial.seconds:.0f} s)", flush=True)

    trainer = FractalTrainer.choose(count, model, config, on_trial=tell, **given)
    assert trainer.choice is not None
    chosen = trainer.choice.chosen
    rows = {f"{one.number + 1}: {one.changes}": [f"{one.value:.4f}"] for one in trainer.choice.trials}
    print_table(["value"], rows, of="trial")
    print(f"Chosen by {trainer.choice.judge.description}: trial {chosen.number + 1}. {TRIALS_FILE} holds all.")
    return trainer


def _closing(folder: Path, metrics: Mapping[str, Mapping[str, Any]], threshold: float, rows: str | None) -> str:
    """The model's held-out metrics, and the command to view its scores."""
    if "eval" in metrics:
        auc, below = number_cell(metrics["eval"].get("bag_auc")), number_cell(threshold)
        found = f"Held-out AUC {auc} (`eval`, `bag_auc`: 0.5 is chance); a step below {below} counts as wrong."
    else:
        found = "Without held-out rows the model is not evaluated: give `--eval_file`."
    output = f"--output {folder}/scores.jsonl --html {folder}/scores.html"
    return f"{found}\nNext: fractal-rm score --model {folder} --input {rows or 'ROWS.jsonl'} {output}"


def _check_kinds(bags: Mapping[str, Sequence[Bag]], sources: Mapping[str, str]) -> None:
    """Raise if one file has text prompts and another chats: the model would refuse it only after training."""
    kinds = {split: "chats" if is_chat(found[0].prompt) else "texts" for split, found in bags.items()}
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise ValueError(
                f"{sources[split]}: the prompts are {kind}, but those of {sources['train']} are {kinds['train']}. "
                "Make the prompts of all files texts, or all chats."
            )


def _contradictions(bags: Mapping[str, Sequence[Bag]], sources: Mapping[str, str], meaning: str) -> list[str]:
    """Contradictions between rows, and rows shared by splits."""
    told = [sentence for split in bags for sentence in contradictions(bags[split], meaning, source=sources[split])]
    train = [bag.prompt for bag in bags["train"]]
    for split in bags.keys() - {"train"}:
        names = (sources["train"], sources[split])
        told += shared_prompts(train, [bag.prompt for bag in bags[split]], names=names)
    return told


def _is_staged(config: FractalConfig) -> bool:
    """Whether to resume a run that keeps the checkpoints of each stage in its own folder."""
    return str(config.resume_from_checkpoint).lower() in ("true", "yes") and len(plan(config)) > 1
