"""The shipped policy inside a larger network: it writes the same text at the cost of a model of that size.

Random weights would write random tokens, without steps and without an end, and their speed would say little. Here all
added parts are multiplied by 0 before they are used.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, LlamaForCausalLM

from fractal_rm.scorers.checkpoint import make_scorer, save_scorer
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY

# Name, width and layers; parameters follow.
SIZES = {"0.2M": (64, 3), "0.35M": (64, 5), "5M": (256, 4), "125M": (1024, 8), "340M": (1536, 10)}


@torch.no_grad()
def grow(width: int, layers: int, *, seed: int = 0) -> LlamaForCausalLM:
    """A model of `layers` layers and `width` hidden units that computes what the shipped policy computes.

    Args:
        width: A multiple of the width of a head, at least the shipped policy's width.
        layers: At least as many as the shipped policy has.
        seed: Seed of the weights that are read by nobody.

    Raises:
        ValueError: If it is smaller than the shipped policy, or the width is no whole number of heads.
    """
    small = LlamaForCausalLM.from_pretrained(SHIPPED_POLICY)
    config = copy.deepcopy(small.config)
    known, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    if width < known or layers < config.num_hidden_layers or width % head:
        raise ValueError(f"{layers} layers of {width} units cannot hold the policy. Take multiples of {head}, larger.")
    config.update(
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // head,
            "num_key_value_heads": width // head,
            "head_dim": head,
            "use_cache": True,  # the policy was saved without, and generation would follow
            # A norm divides by a mean over all units, most of which are 0 now.
            "rms_norm_eps": config.rms_norm_eps * known / width,
        }
    )
    torch.manual_seed(seed)
    large = LlamaForCausalLM(config)
    for layer in large.model.layers:
        for written in (layer.self_attn.o_proj, layer.mlp.down_proj):
            written.weight.zero_()
    large.model.embed_tokens.weight.zero_()
    weights = dict(large.named_parameters())
    for name, old in small.named_parameters():
        place = tuple(slice(size) for size in old.shape)
        weights[name][place] = old * (known / width) ** 0.5 if name.endswith("norm.weight") else old
    return large.eval()


def save_models(
    folder: Path, size: str, *, source: Path | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Policy, step reward model (a token scorer with a random head) and value model (a head of 0) of one size.

    Args:
        folder: Where the folders `policy`, `reward_model` and `value_model` go.
        size: One of `SIZES`; not read if there is a source.
        source: Folder of a causal language model that takes the place of the shipped policy.
        dtype: Of the weights.
        seed: Seed of the random head.

    Returns:
        What describes them in a row of results.
    """
    if source is None:
        policy: Any = grow(*SIZES[size]).to(dtype)
    else:
        policy = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tokenizer: Any = AutoTokenizer.from_pretrained(source or SHIPPED_POLICY)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    torch.manual_seed(seed)
    model: Any = AutoModelForTokenClassification.from_config(config).to(dtype)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    settings = FractalSettings(scorer="token")
    save_scorer(folder / "reward_model", make_scorer(model, settings), tokenizer, settings)
    for parameter in model.score.parameters():
        nn.init.zeros_(parameter)
    model.save_pretrained(folder / "value_model")
    tokenizer.save_pretrained(folder / "value_model")
    return {
        "parameters": policy.num_parameters(),
        "width": policy.config.hidden_size,
        "layers": policy.config.num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
    }
