"""Two-layer models of many families, and tokenizers with the habits of real ones, all built in code."""

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import make_scorer
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.scorers.token import token_classifier

CAUSAL_FAMILIES = ("llama", "gpt2", "qwen2")
VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Merges across what regular expressions of real tokenizers would keep apart: the end of a step and its newline are one
# token, and so are newline and the digit after it.
MERGES = [(".", "Ċ"), (".Ċ", "2"), ("Ċ", "Ċ"), ("Ċ", "3"), ("Ġ", "="), ("Ġ=", "Ġ"), ("1", "2"), ("#", "#")]


def byte_tokenizer(*, merges: bool = False, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, with merges that do not care for the ends of steps, or with a token before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = MERGES if merges else []
    names = ["<pad>", "<eos>", "<bos>", *alphabet, *("".join(pair) for pair in kept)]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, kept))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def spaced_tokenizer(*, normalizer: bool = False) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space goes before every text, and bytes stand in for characters it does not know.

    Args:
        normalizer: Put the space there as its first version did; otherwise as its later one does.
    """
    letters = [*"▁.,=+*#?0123456789abcdefghijklmnopqrstuvwxyz"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", "12"]
    core = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [("▁", "a"), ("1", "2")], unk_token="<unk>", byte_fallback=True
        )
    )
    if normalizer:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: lower case, no white space, special tokens around every text."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *".,=+*#?:"]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def config(family: str, *, vocab_size: int = VOCABULARY, **options: Any) -> Any:
    """Two layers, width 16, weights large enough for scores that differ."""
    shared = {"vocab_size": vocab_size, "initializer_range": 0.3, "pad_token_id": 0} | options
    llama = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "llama":
        return LlamaConfig(**llama | shared)
    if family == "qwen2":
        return Qwen2Config(**llama | {"num_key_value_heads": 1} | shared)
    if family == "gpt2":
        dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
        ends = {"bos_token_id": None, "eos_token_id": 1}
        return GPT2Config(**{"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 2} | dropouts | ends | shared)
    if family == "gemma2":  # caps its logits
        cap = {"final_logit_softcapping": 5.0, "head_dim": 8, "num_key_value_heads": 1}
        return Gemma2Config(**llama | cap | shared)
    if family == "gemma3":  # transformers has no token classifier of it, nor of the next two
        return Gemma3TextConfig(**llama | {"head_dim": 8, "num_key_value_heads": 1} | shared)
    if family == "olmo2":
        return Olmo2Config(**llama | {"num_key_value_heads": 1} | shared)
    if family == "granite":  # divides its logits
        return GraniteConfig(**llama | {"logits_scaling": 4.0} | shared)
    assert family == "bert"
    return BertConfig(**{key: value for key, value in (llama | shared).items() if not key.endswith("os_token_id")})


def make_model(scorer: str, family: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model for a scorer, freshly made."""
    torch.manual_seed(seed)
    if scorer == "token":
        made = config(family, **{"num_labels": 1} | options)
        return token_classifier(made)._from_config(made).eval()
    return AutoModelForCausalLM.from_config(config(family, **options)).eval()


def reward_model(
    scorer: str,
    family: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    model_options: dict[str, Any] | None = None,
    **settings: Any,
) -> StepRewardModel:
    """A step reward model that knows nothing, with scores away from 0 and 1."""
    tokenizer = tokenizer or (wordpiece_tokenizer() if family == "bert" else byte_tokenizer(merges=True))
    if scorer == "likelihood":
        settings = {"log_weight": -3.0, "bias": 2.0} | settings
    fractal = FractalSettings(scorer=scorer, **settings)  # type: ignore[arg-type]
    model = make_model(scorer, family, **model_options or {})
    return StepRewardModel(make_scorer(model, fractal).eval(), tokenizer, fractal)


def recomputes_activations(model: PreTrainedModel) -> bool:
    """Whether a model recomputes activations in the backward pass; its property has two names in transformers 5."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def sums(count: int, *, seed: int = 0, chat: bool = False) -> list[dict[str, Any]]:
    """Rows of sums in one to four steps; a response is good if all of its steps are. Both labels occur."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        good = number % 2 == 0
        depth = rng.randint(1, 4)
        slip = None if good else rng.randrange(depth)
        value, steps = rng.randrange(10), []
        question = f"{number}. Start at {value}."
        for step in range(depth):
            change = rng.randrange(1, 5)
            result = value + change + (7 if step == slip else 0)
            steps.append(f"{value}+{change}={result}.")
            value = result
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}] if chat else f"{question}\n",
                "steps": steps,
                "step_labels": [int(step != slip) for step in range(depth)],
                "label": int(good),
            }
        )
    return rows
