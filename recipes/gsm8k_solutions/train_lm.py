"""Trains a small language model on worked solutions, from which this recipe's likelihood scorer starts.

It learns from `<data_dir>/math_text.jsonl.gz`, with a byte-level tokenizer that splits numbers into digits. Texts
are written and tokenized as the scorer will see responses: "Question: ...\\nAnswer: ", then one step per line.

    python recipes/gsm8k_solutions/train_lm.py --data_dir DATA --output_dir runs/gsm8k_solutions/lm

An interrupted run continues from its last checkpoint when it is started again.
"""

import argparse
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from fractal_rm.data.bag import Bag
from fractal_rm.data.readers import read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.scorers.inputs import TokenInputs
from fractal_rm.scorers.settings import FractalSettings

# Sources of the text: worked solutions that share no problem with the evaluation data. Left out are asdiv, svamp and
# mawps_* (answers without steps), prm800k_steps (has wrong steps), prmbench_correct (shares problems with
# ProcessBench), bbm_arithmetic and tora_examples (no question and answer).
SOURCES = ("gsm8k_train", "aqua_dev")
TEMPLATE = "Question: {prompt}\nAnswer: "
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL = [PAD, BOS, EOS]  # in the order of their ids
# Tokens in a training row: two or three solutions.
BLOCK = 512
CALCULATOR = re.compile(r"<<[^>]*>>")


def split_text(text: str) -> tuple[str, str] | None:
    """Question and answer of a text, written as solutions are; None if it is not a question with an answer.

    GSM8K's calculator notes are taken out, and its "#### 72" becomes the "A: 72" in which sampled solutions end.

    Example:
        >>> split_text("Question: 2+2?\\nAnswer: 2+2 = <<2+2=4>>4\\n#### 4")
        ('2+2?', '2+2 = 4\\nA: 4')
    """
    if not text.startswith("Question: "):
        return None
    question, found, answer = text.removeprefix("Question: ").partition("\nAnswer: ")
    answer = CALCULATOR.sub("", answer).replace("\n#### ", "\nA: ").strip()
    return (question.strip(), answer) if found and answer else None


def read_texts(data_dir: str, sources: Sequence[str]) -> list[tuple[str, str]]:
    """Questions with answers from the sources, without the questions of the evaluation."""
    asked = evaluation_questions(data_dir)
    texts, asked_count = [], 0
    for row in read_jsonl(Path(data_dir) / "math_text.jsonl.gz"):
        split = split_text(row["text"]) if row["source"] in sources else None
        if split is not None and key(split[0]) in asked:
            asked_count += 1
        elif split is not None:
            texts.append(split)
    print(f"{len(texts)} texts; {asked_count} left out because the evaluation asks them")
    return texts


def key(question: str) -> str:
    """A question without case, punctuation and spacing, to find it in another data set."""
    return re.sub(r"\W+", " ", question.lower()).strip()


def evaluation_questions(data_dir: str) -> set[str]:
    """Questions on which the recipe is evaluated."""
    paths = [Path(data_dir) / name / "test.jsonl.gz" for name in ("gsm8k_solutions", "processbench")]
    return {key(row["prompt"]) for path in paths if path.is_file() for row in read_jsonl(path)}


def train_tokenizer(texts: Iterable[tuple[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every digit is a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        (TEMPLATE.replace("{prompt}", question) + answer for question, answer in texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=2 * BLOCK,
    )


def pack(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids of all texts, one after the other, in rows of `BLOCK`.

    Tokenized by [`TokenInputs`], as in the scorer: no token crosses the end of a step or of the prompt.
    """
    lines = Segmentation()
    bags = [Bag(question, answer, tuple(lines(answer)), label=None) for question, answer in texts]
    encoded = TokenInputs(tokenizer, FractalSettings(prompt_template=TEMPLATE)).encode(bags)
    ids = torch.tensor([token for text in encoded for token in [*text.input_ids, tokenizer.eos_token_id]])
    rows = len(ids) // BLOCK
    if not rows:
        raise ValueError(f"The texts hold {len(ids)} tokens, less than one row of {BLOCK}. Give more text.")
    return ids[: rows * BLOCK].view(rows, BLOCK)


class StopAfter(TrainerCallback):
    """Ends training after some minutes; what was learned until then is kept."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.start = 60 * minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.start > self.seconds:
            control.should_training_stop = True


def collate(rows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """A batch of rows that are their own labels."""
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "labels": ids}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data_dir", default=os.environ.get("FRACTAL_RM_DATA"), help="holds math_text.jsonl.gz")
    parser.add_argument("--output_dir", default="runs/gsm8k_solutions/lm")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--minutes", type=float, default=25, help="end after this many minutes at the latest")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--vocab_size", type=int, default=3072)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max_steps", type=int, default=-1, help="end after this many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="--no-bf16 on old processors"
    )
    arguments = parser.parse_args(argv)
    if not arguments.data_dir:
        parser.error("where is the data? Give --data_dir, or set FRACTAL_RM_DATA")
    set_seed(arguments.seed)

    texts = read_texts(arguments.data_dir, SOURCES)
    held_out = texts[::100]
    texts = [text for i, text in enumerate(texts) if i % 100]
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    blocks, held_out_blocks = pack(texts, tokenizer), pack(held_out, tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=5 * arguments.hidden_size // 2,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, arguments.hidden_size // 64),
            max_position_embeddings=2 * BLOCK,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index(PAD),
            bos_token_id=SPECIAL.index(BOS),
            eos_token_id=SPECIAL.index(EOS),
        )
    )
    print(f"{len(blocks) * BLOCK:,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters")
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=arguments.output_dir,
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=8,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.1,
            bf16=arguments.bf16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=50,
            eval_strategy="epoch",
            save_steps=200,
            save_total_limit=1,
            report_to="none",
            seed=arguments.seed,
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
        ),
        data_collator=collate,
        train_dataset=blocks,  # type: ignore[arg-type]
        eval_dataset=held_out_blocks,  # type: ignore[arg-type]
        processing_class=tokenizer,
        callbacks=[StopAfter(arguments.minutes)],
    )
    folder = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.save_model()
    print(f"{folder} holds the language model; nats per token on held-out text: {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
