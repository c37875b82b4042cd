"""Checks verl_steps.py against the verl that is installed; no server and no GPU.

    make engines    # in a separate environment

verl finds the reward manager and the estimator by their names, calls the manager on a batch of its own type, and passes
the result to the estimator. Step scores come from a rule instead of a server.
"""

import os
from pathlib import Path

os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_steps"  # verl reads it when it is imported
os.environ["FRACTAL_RM_URL"] = "http://127.0.0.1:1"

import numpy as np
import step_rewards
import torch
import verl
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.reward import compute_reward, load_reward_manager

from fractal_rm.credit.advantages import group_step_advantages
from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.segmentation import Segmentation

TEXTS = ["3*4=12.\n2+12=14.", "It is 20.", "2+3=5.\n5*4=20.\nSo 20.", "14."]
PROMPT_LENGTH = 3


def rule(texts: list[str]) -> list[StepScores]:
    """Lines as steps; a longer one scores higher."""
    found = []
    for text in texts:
        steps = [Step(text[a:b], a, b, (b - a) / 100) for a, b in Segmentation("lines")(text)]
        found.append(StepScores(text, steps, min(step.score for step in steps)))
    return found


class Scoring:
    """Stands in for the client of a server."""

    def score(self, prompts: list[object], texts: list[str]) -> list[StepScores]:
        return rule(texts)


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """One token a byte."""
    names = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def batch_of(tokenizer: PreTrainedTokenizerFast) -> DataProto:
    """Two responses to each of two prompts."""
    ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in TEXTS]  # type: ignore[misc]
    responses = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    tensors = {
        "prompts": torch.zeros(len(TEXTS), PROMPT_LENGTH, dtype=torch.long),
        "responses": responses,
        "response_mask": mask,
        "attention_mask": torch.cat([torch.ones(len(TEXTS), PROMPT_LENGTH, dtype=torch.long), mask], dim=1),
    }
    chats = np.empty(len(TEXTS), dtype=object)
    chats[:] = [[{"role": "user", "content": "2+3*4?"}]] * len(TEXTS)
    others = {"raw_prompt": chats, "uid": np.array(["a", "b", "a", "b"], dtype=object)}
    return DataProto.from_dict(tensors=tensors, non_tensors=others)


def main() -> None:
    step_rewards.client = lambda url: Scoring()  # type: ignore[assignment]
    tokenizer = tokenizer_of_bytes()
    config = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")
    config.merge_with_dotlist(["reward_manager.name=fractal_steps", "algorithm.adv_estimator=fractal_step_group"])
    data = batch_of(tokenizer)
    rewards, _ = compute_reward(data, load_reward_manager(config, tokenizer, num_examine=0))
    scored = rule(TEXTS)
    wanted = torch.zeros_like(rewards)
    for row, one in enumerate(scored):
        for step in one.steps:
            wanted[row, step.end - 1] = step.score
    torch.testing.assert_close(rewards, wanted)
    data.batch["token_level_rewards"] = rewards
    data = compute_advantage(data, config.algorithm.adv_estimator, config=config.algorithm)
    mask = data.batch["response_mask"].bool()
    for rows in ([0, 2], [1, 3]):
        scores = [scored[row].step_scores for row in rows]
        ends = [[step.end - 1 for step in scored[row].steps] for row in rows]
        alone = group_step_advantages(scores, ends, mask[rows], 2, gamma=1.0, scale=False)  # type: ignore[arg-type]
        torch.testing.assert_close(data.batch["advantages"][rows], alone, atol=1e-5, rtol=0)
    print(f"verl {verl.__version__}: finds `fractal_steps` and `fractal_step_group`, and uses what they return.")


if __name__ == "__main__":
    main()
