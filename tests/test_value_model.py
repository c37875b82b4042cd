"""Value models on a shared backbone and with adapters, against explicit forwards, SGD by hand, whole runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.step_ppo import (
    RAGGED,
    RESUMABLE,
    count_of_a,
    last_log,
    make,
    policy,
    replay,
    reward_model,
    same,
    train,
    value_model,
    weights,
)

from fractal_rm.ppo.value_model import ValueHead, make_value_head

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

SHARED: dict[str, Any] = {"value_model": "shared", "rollout_func": replay(RAGGED), "num_generations": 1}


def adapter(**changed: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj", "down_proj"]} | changed))


def with_random_head(trainer: Any) -> Any:
    """The trainer, with values that differ at every token."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.value_model.parameters():
            parameter.normal_()
    return trainer


def forwards(module: torch.nn.Module) -> list[bool]:
    """Filled with one entry for each forward of a module: whether it was one with gradients."""
    seen: list[bool] = []
    module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


def explicit_values(model: Any, head: torch.nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Values of each completion: one row at a time, without padding, the head written out."""
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    values = []
    for row, real in enumerate(batch["completion_mask"].bool()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][real]
        states = core.model(input_ids=torch.cat([prompt, completion])[None]).last_hidden_state[0]
        values.append((states @ head.weight[0] + head.bias)[len(prompt) - 1 : -1])
    return values


# The shared backbone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "without_gradients"),
    [
        ({}, 2),  # a forward of its own, in two parts
        ({"num_iterations": 2}, 2),  # TRL computes old log-probabilities
        (
            {"peft_config": adapter(init_lora_weights=False), "kl_coef": 0.1},
            4,
        ),  # log-probabilities of policy, reference
        ({"peft_config": adapter(init_lora_weights=False), "kl_coef": 0.1, "num_iterations": 2}, 4),
        ({"peft_config": adapter(init_lora_weights=False), "beta": 0.1, "num_iterations": 2}, 4),
    ],
    ids=["alone", "old", "kl", "old_and_kl", "old_and_beta"],
)
def test_shared_values_are_the_head_on_the_policys_states_and_cost_no_forward_that_trl_runs_anyway(
    tmp_path, options, without_gradients
):
    batches = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
    trainer = with_random_head(make(tmp_path, reward_model=reward_model(), **SHARED, **batches, **options))
    core = trainer.model.get_base_model() if "peft_config" in options else trainer.model
    seen, whole = forwards(core.model), forwards(core)
    trainer.model.train()
    output = trainer.rollout([trainer.train_dataset[i % 4] for i in range(8)]).minibatches()
    assert seen == [False] * without_gradients
    assert len(whole) == (0 if options == {} else without_gradients), "the language model's head was not needed"
    for row, expected in enumerate(explicit_values(trainer.model, trainer.value_model, output)):
        torch.testing.assert_close(output["values"][row, : len(expected)], expected.detach(), atol=1e-4, rtol=1e-4)


def test_an_update_runs_one_forward_of_the_policy_for_each_minibatch(tmp_path):
    batches = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    trainer = make(tmp_path, reward_model=reward_model(), **SHARED, **batches, num_iterations=2, max_steps=4, beta=0.0)
    seen = forwards(trainer.model.model)
    trainer.train()
    assert seen == [False] * 2 + [True] * 4


def by_hand(trainer: Any, rate: float) -> torch.nn.Module:
    """The head after the trainer's batches of a policy that stands still: a loop over rows, clipping and SGD."""
    args, head = (
        trainer.args,
        with_random_head(make(trainer.args.output_dir, **SHARED, reward_funcs=count_of_a)).value_model,
    )
    for batch in trainer.batches:
        losses = []
        for row, values in enumerate(explicit_values(trainer.model, head, batch)):
            old, target = (batch[name][row, : len(values)] for name in ("values", "returns"))
            near = old + (values - old).clamp(-args.cliprange_value, args.cliprange_value)
            losses.append(0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2))
        parameters = list(head.parameters())
        gradients = torch.autograd.grad(args.vf_coef * torch.cat(losses).mean(), parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * min(1.0, args.max_grad_norm / norm.item()) * gradient
    return head


def test_the_head_follows_clipped_sgd_by_hand(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.0, "value_learning_rate": 0.1, "cliprange_value": 0.05}
    trainer = with_random_head(make(tmp_path, reward_funcs=count_of_a, **SHARED, **settings, max_steps=3))
    start = weights(trainer.value_model)
    trainer.train()
    expected = by_hand(trainer, rate=0.1)
    assert not same(weights(expected), start, atol=1e-3)
    assert same(weights(trainer.value_model), weights(expected), atol=1e-5)
    assert same(weights(trainer.model), weights(policy()))


def test_gradients_of_the_value_loss_stay_in_the_head(tmp_path):
    moved = []
    for coefficient in (0.1, 10.0):
        options = {"vf_coef": coefficient, "max_steps": 1, "optim": "sgd"}
        trainer = with_random_head(make(tmp_path / str(coefficient), reward_funcs=count_of_a, **SHARED, **options))
        trainer.train()
        moved.append(weights(trainer.model))
    assert same(*moved)
    assert not same(moved[0], weights(policy()))


@pytest.mark.parametrize("shared", [True, False])
def test_weight_decay_does_not_move_the_policy_in_the_value_models_warm_up(tmp_path, shared):
    options = SHARED if shared else SHARED | {"value_model": value_model()}
    options |= {"reward_funcs": count_of_a, "value_warmup_steps": 2, "weight_decay": 0.5}
    trainer = with_random_head(make(tmp_path / "a", **options, max_steps=2))
    start = weights(trainer.value_model)
    trainer.train()
    assert same(weights(trainer.model), weights(policy()))
    assert [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row] == [0.0, 0.0]
    assert not same(weights(trainer.value_model), start)
    assert not same(weights(train(tmp_path / "b", **options, max_steps=3).model), weights(policy()), atol=1e-4)


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_gradient_checkpointing_recomputes_layers_and_changes_no_weight(tmp_path, kind):
    finished, counts = [], []
    for checkpointing in (False, True):
        options = SHARED | {"value_model": "shared" if kind == "shared" else value_model()}
        options |= {"reward_funcs": count_of_a, "gradient_checkpointing": checkpointing}
        trainer = make(tmp_path / str(checkpointing), **options, max_steps=2)
        model = trainer.model if kind == "shared" else trainer.value_model
        seen = forwards(model.model.layers[0].self_attn)
        trainer.train()
        finished.append(weights(trainer.model) | weights(trainer.value_model))
        counts.append(sum(seen))
    assert same(*finished)
    assert counts == [2, 4], "each of two updates runs a layer once, and once more in its backward pass"


def test_a_head_computes_in_float32_whatever_it_is_given():
    head = ValueHead(4)
    torch.nn.init.constant_(head.weight, 1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert torch.equal(values, torch.full((2, 3), 4 * 1.001))


def test_a_model_without_output_embeddings_gets_no_head():
    with pytest.raises(ValueError, match=r"LlamaForTokenClassification has no output embeddings, so no value head"):
        make_value_head(value_model())


# Adapters -------------------------------------------------------------------------------------------------------------


def test_an_adapted_value_model_trains_its_adapter_and_head_and_holds_no_copy_of_the_policys_frozen_weights(tmp_path):
    options = {"peft_config": adapter(), "value_peft_config": adapter(r=3), "kl_coef": 0.1}
    trainer = make(tmp_path, reward_funcs=count_of_a, **options, **RESUMABLE, max_steps=4)
    before, base = weights(trainer.value_model), weights(policy())
    storages = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    own = {name for name, value in trainer.value_model.named_parameters() if value.data_ptr() not in storages}
    learned = {name for name, value in trainer.value_model.named_parameters() if value.requires_grad}
    assert own == learned | {name for name in own if ".original_module." in name}  # the head that was replaced
    trainer.train()
    moved = {name for name, tensor in weights(trainer.value_model).items() if not torch.equal(tensor, before[name])}
    assert moved == learned
    assert any("lora_A" in name for name in moved)
    assert any("score" in name for name in moved)
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    assert all(
        torch.equal(
            trainer.model.get_parameter(name), base[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        )
        for name in frozen
    )
    # One backbone serves policy, reference and value model, and the policy starts as the reference.
    assert trainer.ref_model is None
    kl = [row["kl_reward/per_completion"] for row in trainer.state.log_history if "kl_reward/per_completion" in row]
    assert kl[0] == 0.0
    assert kl[1] != 0.0


@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_weights_of_a_policy_that_trains_are_copied(tmp_path, bias):
    """Whether all of them train, or those biases that the adapter's configuration says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**policy().config.to_dict() | {"attention_bias": True}))
    trained = {"peft_config": adapter(bias=bias)} if bias == "all" else {}
    trainer = make(
        tmp_path, model=model, reward_funcs=count_of_a, value_peft_config=adapter(bias=bias), **trained, max_steps=2
    )
    learned = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad}
    assert learned.isdisjoint(p.data_ptr() for p in trainer.value_model.parameters())
    before = weights(trainer.value_model)
    trainer.train()
    learned_values = {name for name, p in trainer.value_model.named_parameters() if p.requires_grad}
    assert {n for n, t in weights(trainer.value_model).items() if not torch.equal(t, before[n])} <= learned_values


# Checkpoints ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "shared": {"value_model": "shared"},
    "shared_peft": {"value_model": "shared", "peft_config": adapter()},
    "peft": {"peft_config": adapter(), "value_peft_config": adapter()},
}
WEIGHTS = {"peft": "adapter/adapter_model.safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(tmp_path, kind):
    options = KINDS[kind] | RESUMABLE | {"reward_funcs": count_of_a, "max_steps": 4, "value_learning_rate": 3e-3}
    whole = train(tmp_path / "a", **options)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "value_model" / WEIGHTS.get(kind, "model.safetensors")).is_file()
    assert not any(file.suffix in (".bin", ".pt", ".tmp") for file in checkpoint.glob("value_model/**/*"))
    resumed = make(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed.rollouts[0]["values"], whole.rollouts[1]["values"])
    assert not (resumed.rollouts[0]["values"] == 0).all()
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.value_model), weights(whole.value_model))
    assert last_log(resumed, "value/loss") == last_log(whole, "value/loss")


def test_a_checkpoint_of_another_kind_of_value_model_is_refused(tmp_path):
    options = RESUMABLE | {"reward_funcs": count_of_a, "max_steps": 4}
    train(tmp_path / "a", **options, peft_config=adapter(), value_peft_config=adapter())
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(Path(tmp_path) / "a" / "checkpoint-2", checkpoint)
    with pytest.raises(ValueError, match=r"belongs to another run: .*`value_model` was"):
        make(tmp_path / "b", **options, peft_config=adapter()).train(resume_from_checkpoint=str(checkpoint))


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"value_model": "shared", "value_peft_config": adapter()}, r"has no backbone of its own that"),
        ({"advantage": "group", "value_peft_config": adapter()}, r"`advantage='group'` uses no `value_peft_config`"),
        ({"advantage": "global", "value_model": "shared"}, r"`advantage='global'` uses no `value_model`"),
    ],
)
def test_options_of_a_value_model_that_would_do_nothing_are_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, reward_funcs=count_of_a, **options)


def test_a_whole_value_model_beside_an_adapter_says_what_it_costs(tmp_path, caplog):
    made = make(tmp_path, reward_funcs=count_of_a, peft_config=adapter())
    weights = sum(parameter.numel() for parameter in made.value_model.parameters())
    assert f"the value model trains all its {weights:,} weights" in caplog.text
    assert "Give `value_peft_config`" in caplog.text
    caplog.clear()
    make(tmp_path, reward_funcs=count_of_a, peft_config=adapter(), value_peft_config=adapter())
    make(tmp_path, reward_funcs=count_of_a, peft_config=adapter(), value_model="shared")
    make(tmp_path, reward_funcs=count_of_a)
    assert "the value model trains all its" not in caplog.text


def test_two_forwards_of_a_value_model_with_dropout_are_equal(tmp_path):
    given = value_model()
    given.dropout.p = 0.5
    trainer = make(tmp_path, reward_funcs=count_of_a, value_model=given)
    trainer.model.train()
    ids = torch.tensor([[3, 4, 3, 4]])
    assert torch.equal(trainer.value_model(input_ids=ids).logits, trainer.value_model(input_ids=ids).logits)
