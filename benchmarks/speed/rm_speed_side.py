"""One side of `rm_speed.py`: a reward model's training in blocks. The arm `prm` needs TRL 1.13 (`make peer-env`).

Texts, backbone, batch sizes, optimizer and precision are the same on all sides; each side reads the labels that it
needs. Only speed is measured, so the rival that needs step labels gets them.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from benchmarks.speed.speed_blocks import Blocks, Enough, Line
from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems

SHARED: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 1_000_000,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}


def texts(count: int, longest: int) -> list[dict[str, Any]]:
    """Problems with a right and a wrong response, of two to `longest` changes, so that lengths differ."""
    rng = random.Random("rm_speed")
    right, wrong = Beliefs(0.0), Beliefs(1.0, 1.0)
    rows = []
    for problem in make_problems(count, seed=1, min_steps=2, max_steps=longest):
        good, bad = right.respond(problem, rng), wrong.respond(problem, rng)
        rows.append({"problem": problem, "prompt": problem.prompt, "good": good, "bad": bad})
    return rows


def fractal(arguments: argparse.Namespace, blocks: Blocks, rows: list[dict[str, Any]], folder: str) -> Any:
    """Our trainer, a token scorer: `labels` on responses, `grouped` by length, or `preferences`."""
    from fractal_rm.reward_training.config import FractalConfig
    from fractal_rm.reward_training.trainer import FractalTrainer

    pairs = arguments.arm == "preferences"
    if pairs:
        data = [{"prompt": row["prompt"], "chosen": row["good"], "rejected": row["bad"]} for row in rows]
    else:
        data = [
            {"prompt": row["prompt"], "completion": row["bad" if number % 2 else "good"], "label": not number % 2}
            for number, row in enumerate(rows)
        ]
    return FractalTrainer(
        model=arguments.policy,
        args=FractalConfig(
            output_dir=folder,
            **SHARED,
            bf16=arguments.dtype == "bfloat16",
            scorer="token",
            per_device_train_batch_size=arguments.batch // (2 if pairs else 1),
            train_sampling_strategy="group_by_length" if arguments.arm == "grouped" else "random",
            use_cpu=arguments.device == "cpu",
        ),
        train_dataset=data,
        callbacks=[blocks],
    )


def prm(arguments: argparse.Namespace, blocks: Blocks, rows: list[dict[str, Any]], folder: str) -> Any:
    """TRL 1.13's trainer on labels of steps."""
    from trl.experimental.prm import PRMConfig, PRMTrainer

    data = []
    for number, row in enumerate(rows):
        response = row["bad" if number % 2 else "good"]
        flags = row["problem"].check_steps(response)
        data.append({"prompt": row["prompt"], "completions": response.split("\n"), "labels": flags})
    return PRMTrainer(
        model=AutoModelForTokenClassification.from_pretrained(arguments.policy, num_labels=2),
        args=PRMConfig(
            output_dir=folder,
            **SHARED,
            bf16=arguments.dtype == "bfloat16",
            per_device_train_batch_size=arguments.batch,
            use_cpu=arguments.device == "cpu",
        ),
        processing_class=AutoTokenizer.from_pretrained(arguments.policy),
        train_dataset=Dataset.from_list(data),
        callbacks=[blocks],
    )


def reward(arguments: argparse.Namespace, blocks: Blocks, rows: list[dict[str, Any]], folder: str) -> Any:
    """TRL's trainer on preferences."""
    from trl import RewardConfig, RewardTrainer

    data = [{"chosen": row["prompt"] + row["good"], "rejected": row["prompt"] + row["bad"]} for row in rows]
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(arguments.policy, num_labels=1),
        args=RewardConfig(
            output_dir=folder,
            **SHARED,
            bf16=arguments.dtype == "bfloat16",
            per_device_train_batch_size=arguments.batch // 2,
            use_cpu=arguments.device == "cpu",
        ),
        processing_class=AutoTokenizer.from_pretrained(arguments.policy),
        train_dataset=Dataset.from_list(data),
        callbacks=[blocks],
    )


class Tokens:
    """Counts the tokens of the batches that a trainer trains on.

    Args:
        padded: With the padding, which costs as much as the rest.
    """

    def __init__(self, *, padded: bool) -> None:
        self.padded, self.seen = padded, 0

    def watch(self, trainer: Any) -> None:
        """Count from now on."""
        step: Callable[..., Any] = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs["attention_mask"]
            self.seen += mask.numel() if self.padded else int(mask.sum())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counted


def main() -> None:
    """Train until told to stop."""
    makers = {"labels": fractal, "grouped": fractal, "preferences": fractal, "prm": prm, "reward": reward}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=list(makers))
    parser.add_argument("policy", help="Folder of the backbone.")
    parser.add_argument("--batch", type=int, default=32, help="Responses in a batch.")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=10, help="Most steps of a response.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the autocast.")
    parser.add_argument("--count", choices=["padded", "real"], default="padded", help="Which tokens are counted.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    line = Line()
    torch.set_num_threads(arguments.threads)
    tokens = Tokens(padded=arguments.count == "padded")
    blocks = Blocks(line, work=lambda _: tokens.seen)
    with tempfile.TemporaryDirectory() as folder:
        trainer = makers[arguments.arm](arguments, blocks, texts(arguments.rows, arguments.longest), folder)
        tokens.watch(trainer)
        try:
            trainer.train()
        except Enough:
            return


if __name__ == "__main__":
    main()
