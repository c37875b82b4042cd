"""Shows that TRL 1.12's PPOTrainer accepts a token scorer's checkpoint unchanged, as `reward_model` and `value_model`.

In the environment of `make peer-env`: .venv-peer/bin/python -m benchmarks.speed.trl_ppo_reads_our_checkpoint [FOLDER]

The folder is one that FractalTrainer saved with `scorer="token"`; without it, one with a random head is made.
PPOTrainer reads one number per response: at the last token before the first padding token. Where the padding token
is the end token (as with many tokenizers that have no padding token of their own), that is the last token of the text,
where our last step ends; with another padding token it is the end token, where no step ends.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.speed.sized_policy import save_models
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import make_problems

CLOSE = 1e-4


def rewards_of_trl(folder: Path, output_dir: str) -> tuple[list[str], list[str], torch.Tensor]:
    """Prompts, responses and rewards of one update of PPOTrainer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED_POLICY, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [problem.prompt for problem in make_problems(16, seed=3)]
    reward_model = AutoModelForTokenClassification.from_pretrained(folder)
    seen: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    inner = ppo_trainer.get_reward

    def get_reward(model: Any, ids: torch.Tensor, pad_token_id: int, context_length: int) -> Any:
        found = inner(model, ids, pad_token_id, context_length)
        if model is reward_model:
            seen.append((ids.clone(), context_length, found[1].clone()))
        return found

    ppo_trainer.get_reward = get_reward
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=16,
            total_episodes=16,
            num_ppo_epochs=1,
            response_length=64,
            stop_token="eos",
            temperature=1.0,
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(SHIPPED_POLICY),
        ref_model=AutoModelForCausalLM.from_pretrained(SHIPPED_POLICY),
        reward_model=reward_model,
        value_model=AutoModelForTokenClassification.from_pretrained(folder),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
    )
    trainer.train()
    ids, context_length, rewards = seen[0]
    halves = ids[:, :context_length], ids[:, context_length:]
    texts = [tokenizer.batch_decode(half, skip_special_tokens=True) for half in halves]
    return texts[0], texts[1], rewards


def main() -> None:
    """Compare PPOTrainer's rewards with the scores of our last steps."""
    parser = argparse.ArgumentParser(description="TRL 1.12's PPOTrainer with a checkpoint of ours.")
    parser.add_argument("folder", type=Path, nargs="?", help="A token scorer's checkpoint.")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    set_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = given.folder
        if folder is None:
            save_models(Path(work), "0.2M")
            folder = Path(work) / "reward_model"
        prompts, responses, rewards = rewards_of_trl(folder, work)
        scored = StepRewardModel.from_pretrained(folder, device="cpu").score(prompts, responses, progress=False)
        ours = torch.tensor([result.step_scores[-1] for result in scored])
        gap = (rewards.sigmoid() - ours).abs().max().item()
        print(
            f"{len(responses)} responses: the sigmoid of TRL's reward differs from the last step's score by {gap:.1e}."
        )
        token = AutoModelForTokenClassification.from_pretrained(folder)
        sequence = AutoModelForSequenceClassification.from_pretrained(folder)
        same = torch.equal(token.score.weight, sequence.score.weight)
        print(f"AutoModelForSequenceClassification loads the same weights of the head: {same}; it has no bias.")
    if gap > CLOSE or not same:
        raise SystemExit("PPOTrainer reads something else than our scores.")


if __name__ == "__main__":
    main()
