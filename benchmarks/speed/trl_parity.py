"""Records what TRL 1.12's PPOTrainer computes on one set of rollouts, for `tests/test_trl_parity.py`.

In the environment of `make peer-env`: .venv-peer/bin/python -m benchmarks.speed.trl_parity tests/data/trl_ppo_1.12.json

The numbers are local variables of `PPOTrainer.train`, read while it runs; none of its code is copied. The second update
is kept, where the policy differs from the reference, and in it the last minibatch of the second epoch, where ratios are
clipped.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import make_problems

OF_ROLLOUT = ("logprobs", "ref_logprobs", "kl", "values", "scores", "padding_mask", "padding_mask_p1")
OF_MINIBATCH = ("new_logprobs", "mb_logprobs", "mb_advantage", "vpred", "mb_values", "mb_return", "pg_loss", "vf_loss")


class Watcher:
    """Reads local variables of `PPOTrainer.train` where it calls one of its helpers."""

    def __init__(self) -> None:
        self.rollout: dict[str, Any] = {}
        self.minibatch: dict[str, Any] = {}
        self._whiten = ppo_trainer.masked_whiten
        ppo_trainer.masked_whiten = self.masked_whiten

    def masked_whiten(self, values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        """First called with the rewards, without `shift_mean`, then with the advantages of the loop."""
        whitened = self._whiten(values, mask, shift_mean)
        seen = sys._getframe(1).f_locals
        if not shift_mean:
            self.rollout = {"rewards": plain(values), "whitened_rewards": plain(whitened)}
        else:
            self.rollout |= {name: plain(seen[name]) for name in OF_ROLLOUT}
            self.rollout |= {"gae_rewards": plain(seen["rewards"]), "advantages": plain(values)}
            self.rollout |= {"whitened_advantages": plain(whitened), "returns": plain(seen["returns"])}
        return whitened

    def watch_backward(self, accelerator: Any) -> None:
        """Read what went into each loss when its gradient is wanted."""
        backward = accelerator.backward

        def watched(loss: torch.Tensor) -> None:
            seen = sys._getframe(1).f_locals
            rows = seen["micro_batch_inds"]
            self.minibatch = {name: plain(seen[name]) for name in OF_MINIBATCH} | {
                "loss": plain(loss),
                "mask": plain(~seen["padding_mask"][rows]),
                "value_mask": plain(~seen["padding_mask_p1"][rows]),
            }
            backward(loss)

        accelerator.backward = watched


def plain(tensor: torch.Tensor) -> Any:
    """Numbers as JSON holds them, with the nine digits that tell any two numbers of float32 apart."""
    values = tensor.detach().cpu().tolist()
    return json.loads(json.dumps(values), parse_float=lambda digits: float(f"{float(digits):.9g}"))


def main() -> None:
    """Two updates of a tiny training, the second written down."""
    parser = argparse.ArgumentParser(description="Write down what TRL 1.12's PPOTrainer computes.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--kl-estimator", choices=["k1", "k3"], default="k1")
    given = parser.parse_args()
    set_seed(0)
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED_POLICY, padding_side="left")
    prompts = [problem.prompt for problem in make_problems(64, seed=0, min_steps=3, max_steps=4)]
    classifiers = [AutoModelForTokenClassification.from_pretrained(SHIPPED_POLICY, num_labels=1) for _ in range(2)]
    settings = {
        "whiten_rewards": True,
        "kl_coef": 0.05,
        "kl_estimator": given.kl_estimator,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "gamma": 0.97,
        "lam": 0.9,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                **settings,
                per_device_train_batch_size=16,
                num_mini_batches=2,
                num_ppo_epochs=2,
                total_episodes=32,
                response_length=32,
                stop_token="eos",
                temperature=1.0,
                learning_rate=3e-4,
                lr_scheduler_type="constant",
                num_sample_generations=0,
                report_to=[],
                save_strategy="no",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
            ),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(SHIPPED_POLICY),
            ref_model=AutoModelForCausalLM.from_pretrained(SHIPPED_POLICY),
            reward_model=classifiers[0],
            value_model=classifiers[1],
            train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
        )
        watcher = Watcher()
        watcher.watch_backward(trainer.accelerator)
        trainer.train()
    found = {"trl": trl.__version__, "settings": settings, "rollout": watcher.rollout, "minibatch": watcher.minibatch}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
