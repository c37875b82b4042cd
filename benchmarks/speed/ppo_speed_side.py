"""One side of `ppo_speed.py`: a PPO training in blocks. The arm `trl_ppo` needs TRL 1.12 (`make peer-env`).

The settings are the same on all sides: every prompt once, one epoch, one minibatch, GAE, a separate value model, KL
divergence from a reference model in the reward. The learning rate is so small that the policy hardly changes, so every
update samples from the same distribution.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from benchmarks.speed.speed_blocks import Blocks, Enough, Line, Stages
from fractal_rm.tasks.arithmetic.problems import exact_answer, make_problems

SHARED: dict[str, Any] = {
    "learning_rate": 1e-9,
    "temperature": 1.0,
    "gamma": 1.0,
    "lam": 0.95,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}
KL_COEF = 0.05


def step_ppo(arguments: argparse.Namespace, blocks: Blocks, prompts: list[str], folder: str) -> Any:
    """Our trainer: `dense`, `outcome` (one number a response from the same reward model) or `rule`.

    `shared` is `dense` with a value head on the policy's backbone.
    """
    from fractal_rm.ppo.config import StepPPOConfig
    from fractal_rm.ppo.trainer import StepPPOTrainer
    from fractal_rm.reward_model import FractalReward

    models = Path(arguments.models)
    reward_model = str(models / "reward_model")
    rewards: dict[str, Any] = {
        "dense": lambda: {"reward_model": reward_model},
        "shared": lambda: {"reward_model": reward_model},
        "outcome": lambda: {"reward_funcs": [FractalReward(reward_model)]},
        "rule": lambda: {"reward_funcs": [exact_answer]},
    }
    return StepPPOTrainer(
        model=str(models / "policy"),
        value_model="shared" if arguments.arm == "shared" else str(models / "value_model"),
        args=StepPPOConfig(
            output_dir=folder,
            **SHARED,
            **{"kl_coef" if arguments.kl == "reward" else "beta": KL_COEF},
            advantage="gae",
            num_generations=1,
            num_iterations=1,
            per_device_train_batch_size=arguments.rollouts,
            max_completion_length=arguments.response_length,
            max_steps=1_000_000,
            lr_scheduler_type="constant",
            use_cpu=arguments.device == "cpu",
            model_init_kwargs={"dtype": arguments.dtype},
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[blocks],
        **rewards[arguments.arm](),
    )


def trl_ppo(arguments: argparse.Namespace, blocks: Blocks, prompts: list[str], folder: str) -> Any:
    """TRL 1.12's trainer with the same four models."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    models = Path(arguments.models)
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "policy", padding_side="left")

    def classifier(name: str) -> Any:
        return AutoModelForTokenClassification.from_pretrained(models / name, dtype=arguments.dtype)

    policies = [AutoModelForCausalLM.from_pretrained(models / "policy", dtype=arguments.dtype) for _ in range(2)]
    return PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            **SHARED,
            kl_coef=KL_COEF,
            num_ppo_epochs=1,
            num_mini_batches=1,
            per_device_train_batch_size=arguments.rollouts,
            local_rollout_forward_batch_size=arguments.rollouts,
            response_length=arguments.response_length,
            stop_token="eos",
            total_episodes=arguments.rollouts * 1_000_000,
            num_sample_generations=0,
            lr_scheduler_type="constant",
            use_cpu=arguments.device == "cpu",
        ),
        processing_class=tokenizer,
        model=policies[0],
        ref_model=policies[1],
        reward_model=classifier("reward_model"),
        value_model=classifier("value_model"),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
        callbacks=[blocks],
    )


def watch_stages(arm: str, trainer: Any) -> Stages:
    """Time the parts of an update. Generation, rewards, forward passes of the rollout, loss, backward, optimizer."""
    stages = Stages()
    stages.watch(trainer.accelerator, "backward", "backward")
    stages.watch(torch.optim.AdamW, "step", "optimizer")
    if arm == "trl_ppo":
        from trl.experimental.ppo import ppo_trainer

        stages.watch(ppo_trainer, "batch_generation", "generation")
        stages.watch(ppo_trainer, "get_reward", "reward_and_value")
        stages.watch(ppo_trainer, "forward", "policy_forwards")
        return stages
    stages.watch(trainer, "_generate", "generation")
    stages.watch(trainer, "_calculate_rewards", "rewards")
    stages.watch(trainer.value_learning, "values", "values")
    stages.watch(trainer, "_get_per_token_logps_and_entropies", "policy_forwards")
    stages.watch(trainer, "_compute_loss", "loss")
    stages.watch(trainer, "_generate_and_score_completions", "rest_of_rollout")
    return stages


def main() -> None:
    """Train until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=["dense", "shared", "outcome", "rule", "trl_ppo"])
    parser.add_argument("models", help="Folder with `policy`, `reward_model` and `value_model`.")
    parser.add_argument("--rollouts", type=int, default=64, help="In an update.")
    parser.add_argument("--response-length", type=int, default=64, help="Most tokens of a response.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kl", choices=["reward", "loss"], default="reward", help="Where our trainer puts it.")
    parser.add_argument("--stages", help="File for the seconds of each stage; timing them costs some time.")
    arguments = parser.parse_args()
    line = Line()
    torch.set_num_threads(arguments.threads)
    prompts = [problem.prompt for problem in make_problems(4096, seed=0)]
    blocks = Blocks(line, work=lambda steps: steps * arguments.rollouts)
    make = trl_ppo if arguments.arm == "trl_ppo" else step_ppo
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arguments, blocks, prompts, folder)
        stages = watch_stages(arguments.arm, trainer) if arguments.stages else None
        try:
            trainer.train()
        except Enough:
            if stages is not None:
                Path(arguments.stages).write_text(json.dumps(stages.seconds))


if __name__ == "__main__":
    main()
