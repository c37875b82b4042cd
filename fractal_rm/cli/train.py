"""`fractal-rm train`: a step reward model from response labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fractal_rm.cli.arguments import DataArguments, LoraArguments
from fractal_rm.cli.checks import (
    check_models,
    check_writable_folder,
    checkpoint_to_resume,
    hide_loading_bars,
    print_metrics,
    report_contradictions,
    to_json,
)
from fractal_rm.cli.parser import parse
from fractal_rm.data.bag import Bag
from fractal_rm.data.contradictions import contradictions, shared_prompts
from fractal_rm.data.formats.index import check_meaning
from fractal_rm.data.prompts import is_chat
from fractal_rm.files import write_atomic
from fractal_rm.hf.progress import RichProgress
from fractal_rm.objectives.aggregation import meaning
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import to_bags
from fractal_rm.reward_training.stages import plan
from fractal_rm.reward_training.trainer import FractalTrainer


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
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "A row that cannot be read: `stop` before training, or `skip` it; how many is said."},
    )


def train(argv: Sequence[str]) -> None:
    """Train a step reward model from response labels."""
    arguments, data, lora, config = parse("train", [TrainArguments, DataArguments, LoraArguments, FractalConfig], argv)
    folder = Path(config.output_dir)
    check_writable_folder(folder)
    checkpoint = checkpoint_to_resume(config) or _is_staged(config)
    check_models(arguments.model)
    if data.dataset_format is not None:
        check_meaning(data.dataset_format, config.aggregation)
        if arguments.on_bad_row == "skip":
            raise ValueError("`on_bad_row=skip` has no effect with `dataset_format`: official files are complete.")
    bags, sources = {}, {}
    for split in ("train", "eval", "test"):
        found = data.read(split)
        if found is not None:
            rows, sources[split] = found
            bags[split] = to_bags(
                rows, config.settings(), source=sources[split], columns=data.columns, on_bad_row=arguments.on_bad_row
            )
    if "train" not in bags:
        raise ValueError("There is nothing to train on. Give `train_file` or `dataset_name`.")
    _check_kinds(bags, sources)
    report_contradictions(_contradictions(bags, sources, meaning(config.aggregation)), strict=data.strict)
    hide_loading_bars()
    trainer = FractalTrainer(
        arguments.model,
        args=config,
        train_dataset=bags["train"],
        eval_dataset=bags.get("eval"),
        peft_config=lora.config(),
    )
    with RichProgress(trainer, "Training"):
        trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.finish(bags.get("test"), data=data.name)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_atomic(folder / "metrics.json", to_json(metrics | {"history": trainer.state.log_history}))
        print_metrics(metrics)
        print(f"{folder} holds the reward model, metrics.json and README.md.")
    trainer.accelerator.end_training()  # a process that exits within a process group may abort


def _check_kinds(bags: Mapping[str, Sequence[Bag]], sources: Mapping[str, str]) -> None:
    """Raise if one file asks in texts and another in chats: the model would refuse it, but after the training."""
    kinds = {split: "chats" if is_chat(found[0].prompt) else "texts" for split, found in bags.items()}
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise ValueError(
                f"{sources[split]}: the prompts are {kind}, but those of {sources['train']} are {kinds['train']}. "
                "Make the prompts of all files texts, or all chats."
            )


def _contradictions(bags: Mapping[str, Sequence[Bag]], sources: Mapping[str, str], meaning: str) -> list[str]:
    """What the rows say against each other, and what splits share."""
    told = [sentence for split in bags for sentence in contradictions(bags[split], meaning, source=sources[split])]
    train = [bag.prompt for bag in bags["train"]]
    for split in bags.keys() - {"train"}:
        names = (sources["train"], sources[split])
        told += shared_prompts(train, [bag.prompt for bag in bags[split]], names=names)
    return told


def _is_staged(config: FractalConfig) -> bool:
    """Whether a run is to go on that keeps its checkpoints in a folder for each stage."""
    return str(config.resume_from_checkpoint).lower() in ("true", "yes") and len(plan(config)) > 1
