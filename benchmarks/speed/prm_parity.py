"""Question: does FractalTrainer with gold step labels only learn what TRL 1.13's PRMTrainer learns?

The arithmetic task: the same responses, step labels, backbone, epochs, batches and learning rate. Ours reads a step's
score at its last token, TRL's at the separator after the step.

    python -m benchmarks.speed.prm_parity --seeds 0 1 2

TRL's side runs in the environment of `make peer-env`. Rows go to `benchmarks/results/prm_parity.jsonl`; runs that
already have rows are not repeated.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, set_seed

from benchmarks.common.places import RESULTS
from benchmarks.speed.peers import PRM_PYTHON, run_side
from benchmarks.speed.speed_blocks import Line
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.evaluation.statistics import step_auc, within_bag_auc
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems

ARMS = ("fractal_supervised", "trl_prm_1.13")
Scores = list[list[float]]  # of the steps of each response
SHARED: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 32,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 100,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """Problems with responses of somebody with wrong beliefs, and the labels of their steps."""
    rng = random.Random(f"prm_parity-{seed}")
    rows = []
    for problem in make_problems(count, seed=seed):
        response = Beliefs().respond(problem, rng)
        flags = problem.check_steps(response)
        rows.append({"prompt": problem.prompt, "completions": response.split("\n"), "labels": flags})
    return rows


def supervised(given: argparse.Namespace, train: list[dict], test: list[dict], folder: str) -> Scores:
    """Scores of the test steps by FractalTrainer: all gold, the instance loss only."""
    from fractal_rm.reward_training.config import FractalConfig
    from fractal_rm.reward_training.trainer import FractalTrainer

    trainer = FractalTrainer(
        model=SHIPPED_POLICY,
        args=FractalConfig(
            output_dir=folder,
            **SHARED,
            num_train_epochs=given.epochs,
            seed=given.seed,
            scorer="token",
            bag_weight=0.0,
            instance_weight=1.0,
            head_learning_rate=SHARED["learning_rate"],
        ),
        train_dataset=train,
    )
    trainer.train()
    prompts, responses = [row["prompt"] for row in test], [row["completions"] for row in test]
    return [scored.step_scores for scored in trainer.reward_model().score(prompts, responses, progress=False)]


@torch.no_grad()
def prm(given: argparse.Namespace, train: list[dict], test: list[dict], folder: str) -> Scores:
    """Scores of the test steps by PRMTrainer."""
    from datasets import Dataset
    from trl.experimental.prm import PRMConfig, PRMTrainer

    set_seed(given.seed)  # the head is made before the trainer seeds
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    trainer = PRMTrainer(
        model=AutoModelForTokenClassification.from_pretrained(SHIPPED_POLICY, num_labels=2),
        args=PRMConfig(output_dir=folder, **SHARED, num_train_epochs=given.epochs, seed=given.seed),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
    )
    with torch.enable_grad():
        trainer.train()
    model: Any = trainer.model
    model.eval()
    scores: Scores = []
    for row in test:
        tokens = PRMTrainer.tokenize_row(row, tokenizer, "\n", None, None, False, True)
        logits = model(input_ids=torch.tensor([tokens["input_ids"]])).logits[0]
        read = torch.tensor(tokens["labels"]) != -100
        scores.append(logits[read].softmax(dim=1)[:, 1].tolist())
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs whose rows are missing."""
    parser = argparse.ArgumentParser(description="FractalTrainer with step labels, against TRL 1.13's PRMTrainer.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train", type=int, default=4096, help="Responses.")
    parser.add_argument("--test", type=int, default=1024, help="Responses.")
    parser.add_argument("--peer-python", type=Path, default=PRM_PYTHON, help="Interpreter that has TRL 1.13.")
    parser.add_argument("--results", type=Path, default=RESULTS / "prm_parity.jsonl")
    parser.add_argument("--side", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    test = rows_of(given.test, seed=-9)
    if given.side:
        line = Line()
        torch.set_num_threads(1)
        train = rows_of(given.train, seed=200 + given.seed)
        with tempfile.TemporaryDirectory() as folder:
            line.say(scores=(prm if given.side == "trl_prm_1.13" else supervised)(given, train, test, folder))
        return
    labels = [[float(flag) for flag in row["labels"]] for row in test]
    results = ResultsFile(given.results)
    names = ("epochs", "train", "test")
    config = SHARED | {name: getattr(given, name) for name in names}
    for seed in given.seeds:
        for arm in ARMS:
            if results.has(arm=arm, seed=seed, config=config):
                continue
            if arm == "trl_prm_1.13" and not given.peer_python.exists():
                print(f"{arm}: skipped, for TRL 1.13 is not here ({given.peer_python}). Run `make peer-env`.")
                continue
            start = time.perf_counter()
            scores = run_side("benchmarks.speed.prm_parity", arm, seed, given, names)["scores"]
            found = {"step_auc": step_auc(scores, labels), "within_bag_auc": within_bag_auc(scores, labels)}
            results.append(
                benchmark="prm_parity",
                arm=arm,
                dataset="arithmetic",
                seed=seed,
                split="test",
                metrics=found,
                config=config,
                seconds=time.perf_counter() - start,
            )
            print(f"{arm}, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
