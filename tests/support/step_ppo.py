"""A policy of twelve tokens, a reward model whose scores are known, and trainers made of them."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.scorers.token import TokenScorer
from support.stand_ins import CHAT_TEMPLATE, byte_tokenizer

# The policy's tokens: letters, two letters at once, a letter with a newline, and "é" in two halves.
PIECES = ("<pad>", "<eos>", "q", "a", "b", "c", "Ġ", "Ċ", "ab", "cĊ", "Ã", "©")


PAD, EOS, Q, A, B, C, SPACE, NEWLINE, AB, C_NEWLINE, E_1, E_2 = range(len(PIECES))

# P(step is good), which the reward model reads off the step's last byte ("é" ends with "©").
SCORES = {"a": 0.9, "b": 0.2, "c": 0.6, "é": 0.7}

LAST_BYTE = {"é": "©"}

# Completions with their scored letters: token -> last letter of the step that ends there.
COMPLETIONS: dict[tuple[int, ...], dict[int, str]] = {
    (A, NEWLINE, B, EOS): {0: "a", 2: "b"},
    (AB, NEWLINE, A, C_NEWLINE, EOS): {0: "b", 3: "c"},
    (E_1, E_2, NEWLINE, NEWLINE, SPACE, C, SPACE, EOS): {1: "é", 5: "c"},
    (EOS,): {},
    (A, B, A, B, A, NEWLINE, A, AB): {4: "a", 7: "b"},
    (SPACE, NEWLINE, EOS): {},
    (C_NEWLINE, C_NEWLINE, C_NEWLINE): {0: "c", 1: "c", 2: "c"},
    (B, E_1, E_2, EOS): {2: "é"},
}

RAGGED = list(COMPLETIONS)


def policy_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def config(**changed: Any) -> LlamaConfig:
    values = {
        "vocab_size": len(PIECES),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    return LlamaConfig(**(values | changed))


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config())


def value_model(**changed: Any) -> LlamaForTokenClassification:
    """Values that differ at every token: the head is not 0."""
    torch.manual_seed(1)
    model = LlamaForTokenClassification(config(num_labels=1, initializer_range=0.3, **changed))
    torch.nn.init.normal_(model.score.weight)
    return model


def reward_model(*, chat: bool = False, **settings: Any) -> StepRewardModel:
    """A reward model without layers, one token a byte: its logit is a known function of a step's last byte."""
    tokenizer = byte_tokenizer(chat=chat)
    shape: dict[str, Any] = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = LlamaForTokenClassification(config(vocab_size=len(tokenizer), num_labels=1, **shape))
    angles = torch.zeros(len(tokenizer))
    for letter, score in SCORES.items():
        byte = tokenizer.convert_tokens_to_ids(LAST_BYTE.get(letter, letter))
        angles[byte] = math.asin(math.log(score / (1 - score)) / (4 * math.sqrt(2)))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.stack([angles.sin(), angles.cos()], dim=1))
        model.score.weight.copy_(torch.tensor([[4.0, 0.0]]))
        model.score.bias.zero_()
    return StepRewardModel(TokenScorer(model), tokenizer, FractalSettings(scorer="token", **settings))


def replay(completions: list[tuple[int, ...]], **extra: Any) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` that gives these completions over and over, so that their lengths and steps are known."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        rows = [list(ids) for ids in itertools.islice(itertools.cycle(completions), len(prompts))]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": rows,
            "logprobs": [[0.0] * len(ids) for ids in rows],
            **extra,
        }

    return rollout


def count_of_a(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """An outcome reward."""
    return [float(ids.count(A)) - 0.5 * len(ids) for ids in completion_ids]


class Recording(StepPPOTrainer):
    """The trainer, which keeps what it computed."""

    rollouts: list[dict[str, Any]]
    batches: list[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts, self.batches = [], []

    def rollout(self, inputs: Any) -> RolloutBatch:
        batch = super().rollout(inputs)
        self.rollouts.append({name: value.clone() for name, value in batch.minibatches().items()})
        return batch

    def loss(self, policy_loss: torch.Tensor, minibatch: dict[str, Any], states: Any) -> torch.Tensor:
        self.batches.append(dict(minibatch))
        return super().loss(policy_loss, minibatch, states)


def make(folder: Path, trainer: type = Recording, args: type = StepPPOConfig, **changed: Any) -> Any:
    """A trainer on CPU: keywords of its constructor and of its configuration, which fall where they belong."""
    constructor = {
        "model": None,
        "processing_class": None,
        "train_dataset": Dataset.from_dict({"prompt": ["q", "qa", "qab b", "qc"] * 8}),
    }
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    for name, value in changed.items():
        (settings if name in args.__dataclass_fields__ else constructor)[name] = value
    constructor["model"] = constructor["model"] or policy()
    constructor["processing_class"] = constructor["processing_class"] or policy_tokenizer()
    return trainer(args=args(**settings), **constructor)


def train(folder: Path, **changed: Any) -> Any:
    trainer = make(folder, **changed)
    trainer.train()
    return trainer


def rollout(folder: Path, **changed: Any) -> dict[str, Any]:
    """The trainer's first rollout."""
    trainer = make(folder, **changed)
    trainer.model.train()
    rows = [trainer.train_dataset[i % 4] for i in range(trainer.args.generation_batch_size)]
    return trainer.rollout(rows).minibatches() | {"trainer": trainer}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0.0, atol=atol) for name in a)


def logs(trainer: Any) -> list[dict[str, Any]]:
    """What was logged, but for times."""
    timed = ("step_time", "runtime", "per_second", "timed_from_step")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]


def measured(trainer: Any) -> dict[str, list[float]]:
    """What was measured since the last log: the one place where tests read TRL's own list."""
    return trainer._metrics["train"]


def last_log(trainer: Any, name: str) -> float:
    return [row[name] for row in trainer.state.log_history if name in row][-1]


TOKEN_REWARDS = {"gamma": 0.0, "lam": 0.0, "whiten_advantages": False, "num_generations": 1}  # with a value of 0


def placed(step_rewards: Callable[[list[float]], list[float]]) -> torch.Tensor:
    """Rewards of RAGGED's steps, made from the scores of each completion, on its tokens."""
    expected = torch.zeros(8, 8)
    for row, steps in enumerate(COMPLETIONS.values()):
        for token, reward in zip(steps, step_rewards([SCORES[letter] for letter in steps.values()]), strict=True):
            expected[row, token] = reward
    return expected


class Scripted:
    """A policy that writes RAGGED, but says nothing in some of its rollouts; keeps its weights at each."""

    def __init__(self, silent: set[int]) -> None:
        self.silent, self.seen, self.moments = silent, [], []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        self.seen.append(weights(trainer.model) | {f"value.{k}": v for k, v in weights(trainer.value_model).items()})
        self.moments.append(len(trainer.optimizer.state))
        return replay([(EOS,)] if len(self.seen) - 1 in self.silent else RAGGED)(prompts, trainer)


GUARDED = {"guard_reference_batches": 2, "guard_patience": 2, "num_generations": 1, "max_steps": 8}


# A rollout serves two steps, and a checkpoint is written after two: between rollouts.
RESUMABLE = {"num_iterations": 2, "num_generations": 1, "save_strategy": "steps", "save_steps": 2}
