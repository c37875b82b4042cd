"""The plan for large models: its formulas against models built in code, and against what must hold."""

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from benchmarks.speed.scale_formulas import LLAMA_7B, LLAMA_70B, Work, memory, seconds, trained_bytes
from benchmarks.speed.scale_plan import config
from fractal_rm.ppo.plan import GPU, Shape, cache_bytes

SHAPES = [
    Shape(layers=2, hidden=16, intermediate=40, heads=4, kv_heads=2, vocabulary=96),
    Shape(layers=3, hidden=24, intermediate=32, heads=2, kv_heads=2, vocabulary=50, tied=True),
]
SIZES = {"plan": LLAMA_7B, "large": LLAMA_70B}


@pytest.mark.parametrize("shape", [*SHAPES, LLAMA_7B, LLAMA_70B], ids=["small", "tied", "7B", "70B"])
def test_parameters_are_counted_as_transformers_has_them(shape):
    with torch.device("meta"):
        policy = LlamaForCausalLM(config(shape, num_labels=1))
        scorer = LlamaForTokenClassification(config(shape, num_labels=1))
    assert shape.parameters == sum(p.numel() for p in policy.parameters())
    assert shape.scorer_parameters == sum(p.numel() for p in scorer.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_is_as_large_as_the_one_that_transformers_fills(shape):
    model = LlamaForCausalLM(config(shape, num_labels=1)).eval()
    cache = model(input_ids=torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(shape, 3, 7) == held / 2  # the plan is in bf16, the model in float32


def test_a_trained_parameter_takes_16_bytes_in_whole_models_and_no_plan_more():
    work = Work()
    whole = trained_bytes(1000, "ddp", 8, work)
    assert sum(whole.values()) == 16_000
    assert sum(trained_bytes(1000, "fsdp2", 8, work).values()) == 2_000
    assert sum(trained_bytes(1000, "zero2", 8, work).values()) == 2_000 + 14_000 / 8
    assert sum(trained_bytes(1000, "lora", 8, work).values()) == 2_000 + 16 * 1000 * work.adapters


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_more_gpus_take_less_memory_each_and_less_time(size):
    work, gpu = Work(), GPU()
    held = [
        memory(size, LLAMA_7B, "fsdp2", gpus, work, gpu, value=None, reference=True)["total"] for gpus in (8, 16, 64)
    ]
    spent = [seconds(size, LLAMA_7B, gpus, work, gpu, value=None, reference=True)["rollout"] for gpus in (8, 16, 64)]
    assert held == sorted(held, reverse=True)
    assert spent == sorted(spent, reverse=True)


def test_a_value_model_costs_what_training_it_costs():
    work, gpu = Work(), GPU()
    with_value, without = (
        memory(LLAMA_7B, LLAMA_7B, "ddp", 8, work, gpu, value=value, reference=False) for value in (LLAMA_7B, None)
    )
    assert with_value["total"] - without["total"] == pytest.approx(16 * LLAMA_7B.scorer_parameters)
