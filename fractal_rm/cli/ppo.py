"""`fractal-rm ppo`: a policy, trained on step rewards, outcome rewards, or both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fractal_rm.cli.arguments import DataArguments, LoraArguments, PPOArguments
from fractal_rm.cli.checks import (
    check_chat_templates,
    check_model,
    check_writable_folder,
    checkpoint_to_resume,
    hide_loading_bars,
    load_reward_model,
    print_metrics,
    write_outputs,
)
from fractal_rm.cli.parser import parse
from fractal_rm.cli.prompts import read_prompts, reward_function
from fractal_rm.data.prompts import is_chat
from fractal_rm.hf.model_card import policy_card
from fractal_rm.hf.progress import RichProgress
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.report.rollout_pages import StepScoresCallback

# What the screen and the model card show of some thirty numbers; metrics.json holds all of them.
_SHOWN = ("train_runtime", "train_loss", "eval_rewards/", "eval_completions/mean_length", "eval_kl")


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
    for path in (arguments.model, *reward_models, given_value):
        if path is not None:
            check_model(path)
    functions = [reward_function(arguments.reward_function)] if arguments.reward_function else []
    rows = read_prompts(arguments, data, "train", config.seed)
    held_out = read_prompts(arguments, data, "eval", config.seed)
    loaded = [load_reward_model(path) for path in reward_models]
    hide_loading_bars()
    if is_chat(rows[0]["prompt"]):  # type: ignore[index]
        check_chat_templates(arguments.model, loaded)
    trainer = StepPPOTrainer(
        arguments.model,
        reward_model=loaded,
        reward_funcs=functions,
        args=config,
        train_dataset=Dataset.from_list(rows),  # type: ignore[arg-type]
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
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
        write_outputs(folder, metrics | {"history": trainer.state.log_history}, card)
        print_metrics(shown)
        print(f"{folder} holds the policy, metrics.json and README.md.")
    trainer.accelerator.end_training()  # a process that exits within a process group may abort
