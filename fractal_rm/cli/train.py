"""`fractal-rm train`: a step reward model from response labels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fractal_rm.cli.arguments import DataArguments, LoraArguments, TrainArguments
from fractal_rm.cli.checks import (
    check_model,
    check_writable_folder,
    checkpoint_to_resume,
    hide_loading_bars,
    print_metrics,
    to_json,
)
from fractal_rm.cli.parser import parse
from fractal_rm.data.bag import Bag
from fractal_rm.evaluation.responses import choose_threshold, evaluate_scores, measure_responses, score_bags
from fractal_rm.evaluation.statistics import estimates
from fractal_rm.files import write_atomic
from fractal_rm.hf.progress import RichProgress
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import to_bags
from fractal_rm.reward_training.stages import plan
from fractal_rm.reward_training.trainer import FractalTrainer


def train(argv: Sequence[str]) -> None:
    """Train a step reward model from response labels."""
    arguments, data, lora, config = parse("train", [TrainArguments, DataArguments, LoraArguments, FractalConfig], argv)
    folder = Path(config.output_dir)
    check_writable_folder(folder)
    checkpoint = checkpoint_to_resume(config) or _is_staged(config)
    check_model(arguments.model)
    bags, sources = {}, {}
    for split in ("train", "eval", "test"):
        found = data.read(split)
        if found is not None:
            rows, sources[split] = found
            bags[split] = to_bags(rows, config.settings(), source=sources[split])
    if "train" not in bags:
        raise ValueError("There is nothing to train on. Give `train_file` or `dataset_name`.")
    _check_kinds(bags, sources)
    hide_loading_bars()
    trainer = FractalTrainer(
        arguments.model,
        args=config,
        train_dataset=bags["train"],
        eval_dataset=bags.get("eval"),
        peft_config=lora.config(),
    )
    with RichProgress(trainer, "Training"):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics: dict[str, Any] = {"train": {"responses": len(bags["train"]), **result.metrics}}
    reward_model = trainer.reward_model()
    if trainer.eval_dataset is not None:
        trainer.calibrate()
    scored = {split: score_bags(reward_model, bags[split]) for split in ("eval", "test") if split in bags}
    if "eval" in scored:
        threshold = choose_threshold(scored["eval"], bags["eval"], aggregation=trainer.settings.aggregation)
        if not math.isnan(threshold):
            trainer.settings.threshold = threshold
    for split, results in scored.items():
        metrics[split] = evaluate_scores(results, bags[split], trainer.settings.threshold)
        measured = measure_responses(results, bags[split], trainer.settings.threshold)
        trainer.card.intervals[split] = {k: v for k, v in estimates(measured).items() if k in metrics[split]}
    trainer.card.metrics, trainer.card.measured, trainer.card.data = dict(metrics), None, data.name
    trainer.card.intervals.pop("evaluation", None)  # `eval` is the same data, measured with the final threshold
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_atomic(folder / "metrics.json", to_json(metrics | {"history": trainer.state.log_history}))
        print_metrics(metrics)
        print(f"{folder} holds the reward model, metrics.json and README.md.")
    trainer.accelerator.end_training()  # a process that exits within a process group may abort


def _check_kinds(bags: Mapping[str, Sequence[Bag]], sources: Mapping[str, str]) -> None:
    """Raise if one file asks in texts and another in chats: the model would refuse it, but after the training."""
    kinds = {split: "texts" if isinstance(found[0].prompt, str) else "chats" for split, found in bags.items()}
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise ValueError(
                f"{sources[split]}: the prompts are {kind}, but those of {sources['train']} are {kinds['train']}. "
                "Make the prompts of all files texts, or all chats."
            )


def _is_staged(config: FractalConfig) -> bool:
    """Whether a run is to go on that keeps its checkpoints in a folder for each stage."""
    return str(config.resume_from_checkpoint).lower() in ("true", "yes") and len(plan(config)) > 1
