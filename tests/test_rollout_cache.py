"""The forward pass of a rollout is that of its update, where nothing moves in between, and the same is learned."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.step_ppo import (
    RAGGED,
    make,
    policy,
    replay,
    reward_model,
    same,
    value_model,
    weights,
)

from fractal_rm.ppo.engine import Engine
from fractal_rm.ppo.trainer import StepPPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


def learn(folder: Path, **changed: Any) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Weights of policy and value model after three updates, and how many forward passes of each there were."""
    options = {"reward_model": reward_model(), "value_model": value_model(), "rollout_func": replay(RAGGED)}
    trainer = make(folder, **options | {"kl_coef": 0.1, "max_steps": 3} | changed)
    forwards: Counter[str] = Counter()
    models = {"policy": trainer.model, "value": trainer.value_model}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: forwards.update([name]))
    trainer.train()
    learned = {f"{name}.{key}": tensor for name, model in models.items() for key, tensor in weights(model).items()}
    return learned, forwards


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept from here on."""
    monkeypatch.setattr(Engine, "updates_once", lambda self: False)


@pytest.mark.parametrize("options", [{}, {"value_warmup_steps": 1}, {"gradient_checkpointing": True}])
def test_the_same_is_learned_with_half_of_the_forward_passes(tmp_path, policy_folder, monkeypatch, options):
    # Adam divides a gradient by its own size: next to 0, rounding would show in the weight, but for a larger epsilon.
    options = options | {"model": policy_folder, "adam_epsilon": 1e-5}
    kept, fewer = learn(tmp_path / "kept", **options)
    forget(monkeypatch)
    anew, more = learn(tmp_path / "anew", **options)
    assert same(kept, anew, atol=1e-5)
    assert not same({name: kept[f"policy.{name}"] for name in policy().state_dict()}, weights(policy()), atol=1e-2)
    assert fewer == Counter(policy=3, value=3)
    assert more == Counter(policy=6, value=6)


class Unfollowed(StepPPOTrainer):
    """As if the forward pass of the rollout had not been shuffled with the rest."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        flipped = {name: inputs[name].flip(0) for name in ("rollout_logprobs", "rollout_values")}
        return super().compute_loss(model, inputs | flipped, *args, **kwargs)


def test_rows_are_followed_through_the_shuffle(tmp_path, policy_folder):
    kept, _ = learn(tmp_path / "kept", model=policy_folder)
    unfollowed, _ = learn(tmp_path / "unfollowed", model=policy_folder, trainer=Unfollowed)
    assert not same(kept, unfollowed, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"num_iterations": 2}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}]
)
def test_nothing_is_kept_of_several_epochs_or_minibatches(tmp_path, policy_folder, monkeypatch, options):
    usual, count = learn(tmp_path / "usual", model=policy_folder, **options)
    forget(monkeypatch)
    anew, same_count = learn(tmp_path / "anew", model=policy_folder, **options)
    assert same(usual, anew)
    assert count == same_count


def test_a_resumed_run_keeps_what_an_uninterrupted_one_keeps(tmp_path, policy_folder):
    whole, _ = learn(tmp_path / "run", model=policy_folder, save_strategy="steps", save_steps=2)
    options = {"reward_model": reward_model(), "value_model": value_model(), "rollout_func": replay(RAGGED)}
    trainer = make(tmp_path / "run", model=policy_folder, kl_coef=0.1, max_steps=3, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed = {f"policy.{key}": tensor for key, tensor in weights(trainer.model).items()}
    assert same(resumed, {name: tensor for name, tensor in whole.items() if name.startswith("policy.")})


def test_sharded_weights_are_read_anew(tmp_path, monkeypatch):
    trainer = make(tmp_path, reward_model=reward_model())
    assert trainer.updates_once()
    monkeypatch.setattr("fractal_rm.ppo.engine.is_sharded", lambda accelerator: True)
    assert not trainer.updates_once()


def test_the_forward_of_a_rollout_is_taken_once(tmp_path, policy_folder):
    """A graph serves one backward pass: a second loss of the same minibatch has a forward of its own."""
    trainer = make(tmp_path, model=policy_folder, reward_model=reward_model(), kl_coef=0.1, rollout_func=replay(RAGGED))
    trainer.model.train()
    minibatch = trainer.rollout([trainer.train_dataset[i % 4] for i in range(8)]).minibatches()
    trainer.current_gradient_accumulation_steps = 1
    losses = [trainer.compute_loss(trainer.model, minibatch) for _ in range(2)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
