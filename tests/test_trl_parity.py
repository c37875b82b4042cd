"""Advantages and losses equal those of TRL 1.12's PPOTrainer, whose own numbers stand in `data/trl_ppo_1.12.json`."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset
from support.stand_ins import save_policy

from fractal_rm.credit.advantages import gae, whiten
from fractal_rm.credit.kl import kl_estimates
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.ppo.value_model import clipped_value_loss

FIXTURE = Path(__file__).parent / "data" / "trl_ppo_1.12.json"
PEER = REPOSITORY / ".venv-peer" / "bin" / "python"
CLOSE = {"rtol": 0.0, "atol": 1e-5}
needs_peer = pytest.mark.skipif(not PEER.exists(), reason="TRL 1.12 is not here: `make peer-env` installs it")


def tensors(part):
    return SimpleNamespace(**{name: torch.tensor(value) for name, value in part.items()})


@pytest.fixture(scope="module")
def peer():
    """What TRL computed: settings, a rollout batch of its second update, and the last minibatch of its second epoch."""
    found = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return SimpleNamespace(
        **{part: tensors(found[part]) for part in ("rollout", "minibatch")},
        settings=SimpleNamespace(**found["settings"]),
    )


def test_the_rollouts_exercise_every_branch(peer):
    lengths = (~peer.rollout.padding_mask).sum(dim=1)
    assert lengths.min() < lengths.max() == peer.rollout.padding_mask.shape[1]  # finished ones, and ones that were cut
    ratios = (peer.minibatch.new_logprobs - peer.minibatch.mb_logprobs).exp()[peer.minibatch.mask]
    assert ratios.min() < 1 - peer.settings.cliprange
    assert ratios.max() > 1 + peer.settings.cliprange
    moves = (peer.minibatch.vpred - peer.minibatch.mb_values).abs()[peer.minibatch.value_mask]
    assert moves.min() < peer.settings.cliprange_value < moves.max()


def test_gae_equals_the_loop_of_trl(peer):
    # TRL puts the score of a finished response one position after its last token, and counts that position in.
    seen, mask = peer.rollout, ~peer.rollout.padding_mask_p1
    advantages, returns = gae(seen.gae_rewards, seen.values, mask, gamma=peer.settings.gamma, lam=peer.settings.lam)
    torch.testing.assert_close(advantages[mask], seen.advantages[mask], **CLOSE)
    torch.testing.assert_close(returns[mask], seen.returns[mask], **CLOSE)


def test_whitening_of_advantages_and_rewards_equals_that_of_trl(peer):
    seen = peer.rollout
    for values, whitened, padding, shift_mean in (
        (seen.advantages, seen.whitened_advantages, seen.padding_mask, True),
        (seen.rewards, seen.whitened_rewards, seen.padding_mask_p1, False),
    ):
        ours = whiten(values, ~padding, shift_mean=shift_mean)
        torch.testing.assert_close(ours[~padding], whitened[~padding], **CLOSE)


def test_the_kl_divergence_in_the_reward_equals_that_of_trl(peer):
    seen, mask = peer.rollout, ~peer.rollout.padding_mask
    ours = kl_estimates(seen.logprobs, seen.ref_logprobs, mask, estimator=peer.settings.kl_estimator)
    torch.testing.assert_close(ours[mask], seen.kl[mask], **CLOSE)


def test_the_clipped_value_loss_equals_that_of_trl(peer):
    seen = peer.minibatch
    ours = clipped_value_loss(
        seen.vpred, seen.mb_values, seen.mb_return, seen.value_mask, peer.settings.cliprange_value
    )
    torch.testing.assert_close(ours, seen.vf_loss, **CLOSE)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Ours, with a policy that is never asked."""
    folder = tmp_path_factory.mktemp("trainer")
    return StepPPOTrainer(
        model=save_policy(folder / "policy"),
        reward_funcs=lambda prompts, **kwargs: [0.0 for _ in prompts],
        args=StepPPOConfig(
            output_dir=str(folder / "out"),
            loss_type="bnpo",
            epsilon=0.2,
            num_generations=1,
            per_device_train_batch_size=8,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 8}),
    )


def test_the_clipped_policy_loss_with_loss_type_bnpo_equals_that_of_trl(peer, trainer, monkeypatch):
    seen = peer.minibatch
    assert trainer.epsilon_low == trainer.epsilon_high == peer.settings.cliprange
    monkeypatch.setattr(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *_, **__: (seen.new_logprobs, torch.zeros_like(seen.new_logprobs), None),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    blank = torch.zeros(seen.mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": blank[:, :1],
        "prompt_mask": blank[:, :1] + 1,
        "completion_ids": blank,
        "completion_mask": seen.mask.long(),
        "advantages": seen.mb_advantage,
        "old_per_token_logps": seen.mb_logprobs,
        "num_items_in_batch": seen.mask.sum(),
    }
    ours = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(ours, seen.pg_loss, **CLOSE)
    # With one minibatch a rollout, TRL's default `dapo` divides by the same number of tokens.
    monkeypatch.setattr(trainer, "loss_type", "dapo")
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), seen.pg_loss, **CLOSE)


@needs_peer
def test_the_fixture_is_what_trl_computes_today(tmp_path):
    command = [PEER, "-m", "benchmarks.speed.trl_parity", tmp_path / "found.json"]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    found, kept = (json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / "found.json", FIXTURE))
    assert found["trl"] == kept["trl"]
    for name in ("pg_loss", "vf_loss"):
        assert found["minibatch"][name] == pytest.approx(kept["minibatch"][name], rel=1e-3)


@needs_peer
def test_ppo_of_trl_takes_our_checkpoint_as_it_is():
    # It compares, and fails where rewards differ.
    command = [PEER, "-m", "benchmarks.speed.trl_ppo_reads_our_checkpoint"]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
