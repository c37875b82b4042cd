"""Question: does StepPPOTrainer learn as well as TRL 1.12's PPOTrainer in the same setting?

The arithmetic task with the outcome as the only reward: the same policy, value model, prompts, lengths, learning rate,
epochs and minibatches, no KL divergence, no clipping of gradients (PPOTrainer has none).

    python -m benchmarks.speed.ppo_parity --seeds 0 1 2 3 4

TRL's side runs in the environment of `make peer-env`. Rows, one per point of a learning curve, go to
`benchmarks/results/ppo_parity.jsonl`; runs that already have rows are not repeated. The row `difference` is the
difference of the last points, ours minus TRL's, with a 95 % interval over seeds (Welch).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, TrainerCallback

from benchmarks.common.places import RESULTS
from benchmarks.speed.peers import PPO_PYTHON, run_side
from benchmarks.speed.sized_policy import save_models
from benchmarks.speed.speed_blocks import Line
from fractal_rm.evaluation.results import ResultsFile
from fractal_rm.tasks.arithmetic.problems import exact_answer, make_problems
from fractal_rm.tasks.task import sample_responses

ARMS = ("step_ppo", "trl_ppo_1.12")
SHARED: dict[str, Any] = {
    "learning_rate": 6e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "temperature": 1.0,
    "gamma": 1.0,
    "lam": 0.95,
    "vf_coef": 0.5,
    "cliprange_value": 0.2,
    "kl_coef": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 20,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
RESPONSE_LENGTH = 64


class OutcomeReward(nn.Module):
    """`exact_answer` in the form that PPOTrainer wants: a backbone, and a head that is read at the last token.

    Args:
        tokenizer: The policy's.
    """

    base_model_prefix = "body"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.body = _Decoder(tokenizer)
        self.score = nn.Identity()


class _Decoder(nn.Module):
    """Reads the text back from its tokens; the reward stands at every token."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SimpleNamespace:
        """`hidden_states` of one layer, (B, T, 1)."""
        question = "What does it show?\n"
        kept = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        halves = [text.partition(question) for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]
        rewards = exact_answer([first + middle for first, middle, _ in halves], [last for *_, last in halves])
        column = torch.tensor(rewards, device=input_ids.device)[:, None, None]
        return SimpleNamespace(hidden_states=[column.expand(*input_ids.shape, 1)])


class Curve(TrainerCallback):
    """Held-out accuracy of a policy, sampled and greedy.

    Args:
        policy: Gives the policy.
        tokenizer: Its tokenizer.
        given: Arguments of the command line.
    """

    def __init__(self, policy: Any, tokenizer: Any, given: argparse.Namespace) -> None:
        self.policy, self.tokenizer, self.given = policy, tokenizer, given
        self.problems = make_problems(given.held_out, seed=-7)
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL 1.12 counts its own steps before this is called, transformers does too.
        if state.global_step % self.given.evaluate_every == 0:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        point: dict[str, float] = {"rollouts": step * self.given.rollouts}
        prompts = [problem.prompt for problem in self.problems]
        for name, greedy in (("accuracy", False), ("accuracy_greedy", True)):
            responses = sample_responses(
                self.policy(), self.tokenizer, prompts, greedy=greedy, seed=7, max_new_tokens=RESPONSE_LENGTH
            )
            point[name] = sum(exact_answer(prompts, responses)) / len(prompts)
        self.points.append(point)


def train(given: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """One run of the side that the arguments name.

    Returns:
        The points of its learning curve.
    """
    models = {name: str(folder / name) for name in ("policy", "value_model")}
    tokenizer: Any = AutoTokenizer.from_pretrained(models["policy"], padding_side="left")
    prompts = [problem.prompt for problem in make_problems(given.rollouts * given.updates, seed=100 + given.seed)]
    trainer: Any
    curve = Curve(lambda: trainer.model if given.side == "step_ppo" else policy, tokenizer, given)
    if given.side == "step_ppo":
        from fractal_rm.ppo.config import StepPPOConfig
        from fractal_rm.ppo.trainer import StepPPOTrainer

        trainer = StepPPOTrainer(
            model=models["policy"],
            value_model=models["value_model"],
            reward_funcs=[exact_answer],
            args=StepPPOConfig(
                output_dir=str(folder / "out"),
                **SHARED,
                seed=given.seed,
                num_generations=1,
                per_device_train_batch_size=given.rollouts,
                max_completion_length=RESPONSE_LENGTH,
                max_steps=given.updates,
                max_grad_norm=0.0,
                loss_type="bnpo",
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[curve],
        )
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        policy = AutoModelForCausalLM.from_pretrained(models["policy"])
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=str(folder / "out"),
                **SHARED,
                seed=given.seed,
                num_ppo_epochs=1,
                num_mini_batches=1,
                per_device_train_batch_size=given.rollouts,
                local_rollout_forward_batch_size=given.rollouts,
                response_length=RESPONSE_LENGTH,
                stop_token="eos",
                total_episodes=given.rollouts * given.updates,
                num_sample_generations=0,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=AutoModelForCausalLM.from_pretrained(models["policy"]),
            reward_model=OutcomeReward(tokenizer),  # type: ignore[arg-type]
            value_model=AutoModelForTokenClassification.from_pretrained(models["value_model"]),
            train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
            callbacks=[curve],
        )
    trainer.train()
    return curve.points


def difference(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ours less TRL's at the last point, with its interval."""
    from scipy.stats import ttest_ind

    last = max(row["metrics"]["rollouts"] for row in rows if row["arm"] in ARMS)
    found: dict[str, float] = {"rollouts": last}
    for name in ("accuracy", "accuracy_greedy"):
        sides = [
            {r["seed"]: r["metrics"][name] for r in rows if r["arm"] == arm and r["metrics"]["rollouts"] == last}
            for arm in ARMS
        ]
        ours, theirs = (list(side.values()) for side in sides)
        low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        found |= {name: sum(ours) / len(ours) - sum(theirs) / len(theirs), f"{name}_low": low, f"{name}_high": high}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs whose rows are missing."""
    parser = argparse.ArgumentParser(description="Learning curves of StepPPOTrainer and of TRL 1.12's PPOTrainer.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rollouts", type=int, default=64, help="In an update.")
    parser.add_argument("--evaluate-every", type=int, default=20, help="Updates.")
    parser.add_argument("--held-out", type=int, default=512, help="Problems of the evaluation.")
    parser.add_argument("--peer-python", type=Path, default=PPO_PYTHON, help="Interpreter that has TRL 1.12.")
    parser.add_argument("--results", type=Path, default=RESULTS / "ppo_parity.jsonl")
    parser.add_argument("--side", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.side:
        line = Line()
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            save_models(Path(folder), "0.2M")
            line.say(points=train(given, Path(folder)))
        return
    results = ResultsFile(given.results)
    names = ("updates", "rollouts", "evaluate_every", "held_out")
    config = SHARED | {name: getattr(given, name) for name in names}

    def append(arm: str, seed: int | None, metrics: dict[str, float], seconds: float) -> None:
        results.append(
            benchmark="ppo_parity",
            arm=arm,
            dataset="arithmetic",
            seed=seed,
            split="held_out",
            metrics=metrics,
            config=config,
            seconds=seconds,
        )

    def rows() -> list[dict[str, Any]]:
        return [row for row in results.rows() if row["config"] == json.loads(json.dumps(config))]

    has_peer = given.peer_python.exists()
    for seed in given.seeds:
        for arm in ARMS if has_peer else ARMS[:1]:
            if results.has(arm=arm, seed=seed, config=config):
                continue
            start = time.perf_counter()
            points = run_side("benchmarks.speed.ppo_parity", arm, seed, given, names)["points"]
            for point in points:
                append(arm, seed, point, time.perf_counter() - start)
            print(f"{arm}, seed {seed}: {points[-1]}", flush=True)
    if not has_peer:
        print(f"trl_ppo_1.12: skipped, for TRL 1.12 is not here ({given.peer_python}). Run `make peer-env`.")
    elif len(given.seeds) > 1:
        append("difference", None, difference(rows()), 0.0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
