"""Small stand-ins for what tests would otherwise download: models, a tokenizer, invented data."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, PreTrainedTokenizerFast

from fractal_rm.scorers.checkpoint import make_scorer, save_scorer
from fractal_rm.scorers.settings import FractalSettings
from support.models import config, wordpiece_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, **{c: i for i, c in enumerate(alphabet, 2)}}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two layers, width 16."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )


def save_policy(folder: Path, *, chat: bool = False) -> str:
    """A causal language model that knows nothing."""
    tokenizer = byte_tokenizer(chat=chat)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, *, chat: bool = False, **settings: Any) -> str:
    """A step reward model that knows nothing."""
    tokenizer, fractal = byte_tokenizer(chat=chat), FractalSettings(**settings)
    torch.manual_seed(1)
    kind = LlamaForCausalLM if fractal.scorer == "likelihood" else LlamaForTokenClassification
    save_scorer(folder, make_scorer(kind(tiny_config(tokenizer)), fractal), tokenizer, fractal)
    return str(folder)


def solutions(count: int, *, chat: bool = False) -> list[dict[str, Any]]:
    """Rows of responses with labels and gold step labels; every third has a wrong second step."""
    rows = []
    for i in range(count):
        wrong = i % 3 == 0
        question = f"How many are {i} and {i} more, doubled?"
        steps = [f"{i} + {i} = {2 * i}.", f"2 * {2 * i} = {4 * i + wrong}.", f"The answer is {4 * i + wrong}."]
        rows.append(
            {
                "id": f"solution-{i}",
                "prompt": [{"role": "user", "content": question}] if chat else f"{question}\n",
                "steps": steps,
                "step_labels": [1, int(not wrong), None],
                "label": int(not wrong),
            }
        )
    return rows


def preferences(count: int) -> list[dict[str, Any]]:
    """Rows of two responses, the better one named; the other columns repeat it, as those of published sets may."""
    rows = []
    for row in solutions(2 * count)[::2]:
        worse = [step.replace("=", "is not") for step in row["steps"]]
        rows.append(row | {"chosen": row["steps"], "rejected": worse, "label": 1, "aggregation": "native"})
    return rows


def gsm8k_problems(count: int) -> list[dict[str, str]]:
    """Rows as GSM8K has them, invented."""
    return [
        {
            "question": f"Ada has {i} pens and buys {i + 1} more. How many has she?",
            "answer": f"{i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} pens.\n#### {2 * i + 1}",
        }
        for i in range(1, count + 1)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def save_encoder(folder: Path, *, pooling: str = "mean", dtype: torch.dtype = torch.float32, seed: int = 0) -> str:
    """A sentence-transformers model of two layers that knows nothing."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(seed)
    AutoModel.from_config(config("bert")).to(dtype).save_pretrained(folder / "transformer")
    wordpiece_tokenizer().save_pretrained(folder / "transformer")
    transformer = Transformer(str(folder / "transformer"), model_kwargs={"dtype": dtype})
    model = SentenceTransformer(modules=[transformer, Pooling(16, pooling_mode=pooling)], device="cpu")
    model.save_pretrained(str(folder / "encoder"), create_model_card=False)
    return str(folder / "encoder")
