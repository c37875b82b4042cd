"""TRL's own GRPO or RLOO with a step reward model as one more reward function, on the arithmetic task.

python recipes/fractal_reward/train.py grpo --config recipes/fractal_reward/grpo.yaml
python recipes/fractal_reward/train.py rloo --config recipes/fractal_reward/rloo.yaml
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TrlParser

from fractal_rm import FractalReward
from fractal_rm.tasks.arithmetic.problems import exact_answer, make_problems

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
# Seeds of the problem lists: they must differ.
TRAIN_SEED, EVAL_SEED = 3_000_000, 4_000_000


@dataclass
class Arguments:
    """What the script needs in addition to TRL's configuration."""

    model: str = field(metadata={"help": "The policy: path or hub id of a causal language model."})
    reward_model: str = field(metadata={"help": "The step reward model: folder or hub id."})
    num_problems: int = field(default=4096, metadata={"help": "Problems to train on."})
    num_eval_problems: int = field(default=256, metadata={"help": "Held-out problems."})


def prompts(count: int, *, seed: int) -> Dataset:
    """Word problems, one per row."""
    return Dataset.from_list([{"prompt": problem.prompt} for problem in make_problems(count, seed=seed)])


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, and save the policy with its log (`trainer_state.json`)."""
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("trainer", choices=TRAINERS)
    name, rest = chosen.parse_known_args(argv)
    trainer_class, config_class = TRAINERS[name.trainer]
    arguments, config = TrlParser((Arguments, config_class)).parse_args_and_config(rest)
    trainer = trainer_class(
        model=arguments.model,
        reward_funcs=[FractalReward(arguments.reward_model), exact_answer],  # this line is the recipe
        args=config,
        train_dataset=prompts(arguments.num_problems, seed=config.seed + TRAIN_SEED),
        eval_dataset=prompts(arguments.num_eval_problems, seed=config.seed + EVAL_SEED),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
