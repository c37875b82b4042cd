"""A small causal language model with wrong beliefs: the policy that the arithmetic task starts from.

The one that the package ships (`SHIPPED_POLICY`, 0.2 M parameters, beliefs and weights of seed 0) was made by

    python -m fractal_rm.tasks.arithmetic.base_policy OUTPUT_DIR --seed 0
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fractal_rm.tasks.arithmetic.problems import Beliefs, make_problems

SHIPPED_POLICY = Path(__file__).parent / "policy"


# "2:" and " 7" are one token each, so that looking up a change takes one step of attention.
PIECES = "[0-9]+:| ?[0-9]| ?[A-Za-z']+|[^A-Za-z0-9]"
# Maximum number of tokens.
_TOKENS = 384


def make_tokenizer(*, texts: Sequence[str] | None = None, pieces: str = PIECES) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the task's own text; digits stay single tokens.

    Args:
        texts: Its training text; None: responses to chains of changes.
        pieces: Regular expression of pieces that no token crosses.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if texts is None:
        rng = random.Random("tokenizer")
        texts = [p.prompt + Beliefs(0.0).respond(p, rng) for p in make_problems(500, seed=-1)]
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def _demonstrations(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Token ids of prompt, response and EOS; the loss leaves the prompt out."""
    prompts, responses = (tokenizer([text[side] for text in texts])["input_ids"] for side in (0, 1))
    eos: Any = tokenizer.eos_token_id
    return [
        {"input_ids": [*prompt, *response, eos], "labels": [-100] * len(prompt) + [*response, eos]}
        for prompt, response in zip(prompts, responses, strict=True)
    ]


class _Bar(ProgressCallback):
    """A progress bar without the logged numbers."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def train_base_policy(
    output_dir: str | Path,
    beliefs: Beliefs,
    *,
    seed: int = 0,
    num_texts: int = 25600,
    hidden_size: int = 64,
    num_layers: int = 3,
) -> None:
    """Train a small Llama from scratch on responses written with `beliefs`, and save it with its tokenizer.

    Args:
        output_dir: The folder to write, an ordinary Hugging Face folder.
        beliefs: The policy's beliefs.
        seed: Seed of the weights and the training text.
        num_texts: Size of the training text, seen once.
        hidden_size: Width of the model.
        num_layers: Depth of the model.
    """
    rng = random.Random(f"demonstrations-{seed}")
    problems = make_problems(num_texts, seed=1_000_000 + seed)
    texts = [(p.prompt, beliefs.respond(p, rng)) for p in problems]
    train_on_texts(output_dir, texts, make_tokenizer(), seed=seed, hidden_size=hidden_size, num_layers=num_layers)


def train_on_texts(
    output_dir: str | Path,
    texts: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 3,
    in_order: bool = False,
    start: str | Path | None = None,
    learning_rate: float = 3e-3,
) -> None:
    """Train a small Llama on pairs of prompt and response, and save it with its tokenizer.

    Args:
        output_dir: The folder to write, an ordinary Hugging Face folder.
        texts: Prompts and responses, seen once.
        tokenizer: Its tokenizer.
        seed: Seed of the weights and the order.
        hidden_size: Width of the model.
        num_layers: Depth of the model.
        in_order: Take the texts in order, 32 per batch, without shuffling.
        start: Folder of the model to start from; None: random weights.
        learning_rate: Peak learning rate.
    """
    set_seed(seed)
    data: Any = _demonstrations(texts, tokenizer)
    special = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,  # the usual 0.02 suits wide models; at width 64 it delays learning to copy
        tie_word_embeddings=True,
        pad_token_id=special["<pad>"],
        eos_token_id=special["<eos>"],
        bos_token_id=None,
    )
    if start is None:
        model = LlamaForCausalLM(config)
    else:
        model = LlamaForCausalLM.from_pretrained(start, trust_remote_code=False)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(output_dir) / "trainer"),
            per_device_train_batch_size=32,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            adam_beta2=0.95,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            seed=seed,
            train_sampling_strategy="sequential" if in_order else "random",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log entry
    if sys.stderr.isatty():
        trainer.add_callback(_Bar)
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a base policy of the arithmetic task.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="Seed of beliefs, weights and text.")
    parser.add_argument("--num_texts", type=int, default=25600, help="Size of the training text.")
    arguments = parser.parse_args()
    train_base_policy(
        arguments.output_dir,
        Beliefs(seed=arguments.seed),
        seed=arguments.seed,
        num_texts=arguments.num_texts,
    )
