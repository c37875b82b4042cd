"""`fractal-rm plan`: its formulas against models built in code, and what it says."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.speed import plan_check
from benchmarks.speed.page import page
from benchmarks.speed.scale_plan import config as config_of
from fractal_rm.cli.main import main
from fractal_rm.cli.plan import PlanArguments, read_gpu, read_run, verdict
from fractal_rm.evaluation.results import read_results
from fractal_rm.ppo.plan import (
    GPU,
    GPUS,
    MODELS,
    Run,
    Shape,
    activation_bytes,
    generation_rate,
    hours,
    memory,
    nearest_model,
    seconds,
    shape_of,
)

SMALL = Shape(layers=2, hidden=64, intermediate=160, heads=4, kv_heads=2, vocabulary=96, tied=True)
BIG = Run(policy=MODELS["Qwen2.5-1.5B"], reward=MODELS["Qwen2.5-1.5B"], lora_rank=16, dtype="bfloat16")
CARD = GPUS["RTX-3090"]


def adapted(model: LlamaForCausalLM, rank: int = 8) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, lora_dropout=0.0, task_type="CAUSAL_LM"))


def shared_heads_keep_a_square() -> bool:
    """Whether attention with fewer key heads than query heads keeps a matrix of tokens by tokens for the backward pass:
    an older torch does on a CPU. Plans are for GPUs."""
    query, key = torch.ones(1, 2, 16, 8, requires_grad=True), torch.ones(1, 1, 16, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape[-2:]), lambda none: none):
        torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return (16, 16) in kept


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_usual_model_has_the_parameters_that_its_name_says(name):
    number, unit = re.search(r"([\d.]+)([MB])$", name).groups()
    said = float(number) * {"M": 1e6, "B": 1e9}[unit]
    assert MODELS[name].parameters == pytest.approx(said, rel=0.1)
    assert nearest_model(MODELS[name].parameters) == name


def test_sizes_are_read_from_configurations_with_head_widths_of_their_own():
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False}
    kinds = {Qwen3ForCausalLM: Qwen3Config(**sizes, head_dim=32), Qwen2ForCausalLM: Qwen2Config(**sizes)}
    for kind, config in kinds.items():
        with torch.device("meta"):
            model = kind(config)
        numbers = {name: p.numel() for name, p in model.named_parameters()}
        # Biases, and the norms of Qwen3's queries and keys, are left out.
        small = sum(n for name, n in numbers.items() if name.endswith("bias") or "q_norm" in name or "k_norm" in name)
        assert shape_of(config, where="it").parameters == sum(numbers.values()) - small


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match=r"it is a mixture of experts \(`num_experts`\)"):
        shape_of(MixtralConfig(), where="it")


def test_a_configuration_without_sizes_is_refused():
    with pytest.raises(ValueError, match="The configuration of it has no `intermediate_size`"):
        shape_of(GPT2Config(), where="it")


@pytest.mark.parametrize("parameters", [2e8, 1e9, 4e9, 1e11])
def test_a_size_between_two_models_gets_as_many_layers_as_come_closest(parameters):
    found = MODELS[nearest_model(parameters)].scaled_to(parameters)
    assert abs(found.parameters - parameters) <= 0.51 * (found.layer + 2 * found.hidden)


def test_adapters_are_counted_as_peft_makes_them():
    model = adapted(LlamaForCausalLM(config_of(SMALL)), rank=8)
    assert SMALL.adapters(8) == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("rank", [None, 2], ids=["all weights", "lora"])
def test_what_a_layer_keeps_is_what_a_forward_pass_keeps(dtype, computed, rank):
    run = Run(policy=SMALL, reward=None, dtype=dtype, computed=computed, lora_rank=rank, checkpointing=False)
    run = replace(run, prompt=100, completion=28, micro_batch=4)
    small = replace(SMALL, kv_heads=SMALL.heads) if shared_heads_keep_a_square() else SMALL

    def kept(layers: int) -> float:
        model = LlamaForCausalLM(config_of(replace(small, layers=layers))).to(getattr(torch, dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != computed):
            return plan_check.kept_bytes(model if rank is None else adapted(model, rank), run)

    deeper = activation_bytes(replace(small, layers=5), run) - activation_bytes(replace(small, layers=3), run)
    assert deeper == pytest.approx(kept(5) - kept(3), rel=0.07)
    whole = activation_bytes(small, run)
    assert activation_bytes(small, replace(run, checkpointing=True)) < whole == pytest.approx(kept(2), rel=0.12)


def test_a_trained_parameter_takes_16_bytes_in_float32_and_adapters_leave_the_rest_alone():
    parts = memory(Run(policy=SMALL, reward=None), CARD)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * SMALL.parameters
    parts = memory(Run(policy=SMALL, reward=SMALL, dtype="bfloat16", lora_rank=4, reference=True, value="own"), CARD)
    adapters = 16 * SMALL.adapters(4)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 2 * SMALL.parameters + adapters
    assert parts["reference"] == 0  # the policy without its adapters
    assert parts["value model"] == adapters  # the frozen weights are the policy's
    assert parts["reward model"] == 4 * SMALL.scorer_parameters


def test_training_and_generation_take_turns_unless_vllm_stays():
    alone = memory(BIG, CARD)
    held = sum(alone[part] for part in alone.keys() - {"activations", "logits", "generation", "total"})
    assert alone["total"] == pytest.approx(held + max(alone["activations"] + alone["logits"], alone["generation"]))
    stays, sleeps = memory(replace(BIG, vllm=0.3), CARD), memory(replace(BIG, vllm=0.3, sleep=True), CARD)
    assert stays["generation"] == 0.3 * CARD.memory
    training = stays["activations"] + stays["logits"]
    assert stays["total"] == pytest.approx(held + training + stays["generation"])
    assert sleeps["total"] == pytest.approx(held + max(training, stays["generation"]))


def test_a_share_of_vllm_that_does_not_hold_the_weights_is_refused_with_the_share_that_does():
    with pytest.raises(ValueError, match=r"does not hold the weights and one sequence .* to (0\.\d+) or more") as error:
        memory(replace(BIG, vllm=0.05), CARD)
    enough = float(re.search(r"to (0\.\d+) or", str(error.value))[1])
    assert memory(replace(BIG, vllm=enough + 0.01), CARD)


# Time -----------------------------------------------------------------------------------------------------------------


def test_seconds_are_operations_over_what_the_card_reaches():
    run = Run(policy=SMALL, reward=None, checkpointing=False)
    gpu = GPU(operations=1e9, used=0.5)
    weights = SMALL.layers * SMALL.layer + SMALL.vocabulary * SMALL.hidden
    tokens = run.rollouts * run.length
    found = seconds(run, gpu, generated_per_second=100.0)
    assert found["update"] == pytest.approx(6 * weights * tokens / 5e8)
    assert found["generate"] == run.rollouts * run.completion / 100
    assert found["score"] == found["evaluate"] == 0
    ratios = {
        4 / 6: replace(run, lora_rank=4),
        8 / 6: replace(run, checkpointing=True),
        1 + SMALL.layers * SMALL.layer / weights: replace(run, value="own"),
    }
    for ratio, other in ratios.items():
        assert seconds(other, gpu)["update"] == pytest.approx(ratio * found["update"])


def test_more_sequences_at_once_write_more_tokens_and_vllm_more_than_transformers():
    few, many = (generation_rate(replace(BIG, generated=n), CARD) for n in (1, 128))
    assert 20 < few < many / 50
    assert generation_rate(replace(BIG, vllm=0.3), CARD) > many


def test_hours_of_the_stages_follow_their_counts():
    once, twice = (hours(BIG, CARD, updates=100 * n, sampled=1000 * n) for n in (1, 2))
    assert twice == pytest.approx({stage: 2 * time for stage, time in once.items()})
    assert hours(replace(BIG, reward=None), CARD, updates=1, sampled=1000)["train"] == 0


# The command ----------------------------------------------------------------------------------------------------------


def test_a_model_folder_is_planned_and_fits(tmp_path, capsys):
    config_of(SMALL).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpu", "24GB"]) == 0
    shown = capsys.readouterr().out
    assert "Fits: 0.0 GB of 21.6 GB usable." in shown
    assert all(word in shown for word in ("optimizer", "GB of train", "logits", "sample", "hours"))


def test_without_a_model_there_is_a_table_of_usual_ones(capsys):
    assert main(["plan", "--gpu", "RTX 4090", "--use_peft", "true"]) == 0
    shown = capsys.readouterr().out
    assert "hours of sampling, the reward model and 300 updates of 128 completions with at most 320 tokens." in shown
    lines = shown.splitlines()
    fits = {name: next(line.split("│")[3].strip() for line in lines if name in line) for name in MODELS}
    assert fits["SmolLM2-135M"] == "yes"
    assert fits["Llama-3.1-70B"] == "no"


def test_what_does_not_fit_names_the_largest_part_and_options_that_hold_what_they_promise(capsys):
    arguments = PlanArguments(parameters="1.5B", gradient_checkpointing=False)
    run, gpu = read_run(arguments), read_gpu("24GB", None)
    said = verdict(arguments, run, gpu).splitlines()
    parts = memory(run, gpu)
    largest = max(parts.keys() - {"total"}, key=parts.__getitem__)
    assert said[0].startswith(f"Does not fit: {parts['total'] / 1e9:.1f} GB of 21.6")
    assert f"the largest part is {largest} " in said[0]
    flags = {line.split(":")[0].split()[0] for line in said[1:]}
    assert {"--use_peft", "--gradient_checkpointing", "--per_device_train_batch_size"} <= flags
    for line in said[1:]:
        options, _, promised = line.partition(": ")
        assert main(["plan", "--parameters", "1.5B", "--gradient_checkpointing", "false", *options.split()]) == 0
        shown = capsys.readouterr().out
        assert re.search(rf"(Fits|Does not fit): {promised.split()[0]} GB of", shown), line


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--parameters", "many"], "The size 'many' is not a number of parameters. Give one such as 135M or 1.5B."),
        (["--parameters", "0B"], "The size '0B' is not a number of parameters."),
        (["--parameters", "1B", "--gpu", "big"], "`gpu` is 'big'. Give its memory, such as 24GB, or one of T4,"),
        (["--parameters", "1B", "--gpu", "0GB"], "`gpu` is '0GB', which has no memory."),
        (["--parameters", "1B", "--model", "x"], "`model` and `parameters` both name the policy's size."),
        (["--model", "runs/nowhere/model"], "There is no model folder runs/nowhere/model."),
        (["--model", "owner/unknown-model"], "The configuration of owner/unknown-model cannot be read"),
        (["--parameters", "1B", "--max_steps", "0"], "`max_steps` is 0. Give 1 or more."),
        (["--parameters", "1B", "--teraflops", "-1"], "`teraflops` is -1.0. Give a number above 0,"),
        (["--parameters", "1B", "--num_generations", "7"], "An update has 128 completions"),
        (["--parameters", "1B", "--vllm_gpu_memory_utilization", "2"], "Give a number above 0, up to 1."),
        (["--parameters", "7B", "--use_vllm", "true"], "vLLM's share, 7.2 GB, does not hold the weights"),
        (["--parameters", "1B", "--use_pfet", "true"], "unknown flag --use_pfet. Did you mean `use_peft`?"),
    ],
)
def test_bad_input_gets_one_sentence(flags, sentence, capsys):
    assert main(["plan", *flags]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


# The check ------------------------------------------------------------------------------------------------------------


def test_a_smoke_run_of_the_check_writes_rows_and_the_table(quick_spawn, tmp_path):
    results = tmp_path / "plan_check.jsonl"
    plan_check.main(["--smoke", "--arms", "all weights", "--results", str(results)])
    (row,) = read_results(results)
    assert row["metrics"]["kept_over_formula"] == pytest.approx(1.0, abs=0.1)
    assert row["metrics"]["seconds_over_formula"] > 0
    document = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
    assert "| all weights | " in page(document, tmp_path)
