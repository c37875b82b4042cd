"""Generation by vLLM, up to the boundary that needs a GPU: TRL's generation class is replaced by one that replays."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.step_ppo import RAGGED, count_of_a, make, replay, reward_model, same, value_model, weights

# Without vLLM the same completions come by `rollout_func`, which TRL calls experimental.
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

OFFSET = 0.25  # nats by which the generator's log-probabilities are said to lie below the trainer's


class Generation:
    """Stands where `trl.generation.vllm_generation.VLLMGeneration` does: what it is made with, asked and handed."""

    made: list[dict[str, Any]]

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.options = model, options
        self.synced: list[dict[str, torch.Tensor]] = []
        self.asked: list[int] = []
        self.vllm_client = self
        Generation.made.append({"generation": self, **options})

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def sync_weights(self) -> None:
        self.synced.append(weights(self.model))

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], num_generations: int, **_: Any) -> tuple[Any, ...]:
        self.asked.append(num_generations)
        rows = [list(ids) for ids in itertools.islice(itertools.cycle(RAGGED), len(prompts))]
        logprobs = []
        for prompt, ids in zip(prompts, rows, strict=True):
            logits = self.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            logprobs.append([[value - OFFSET] for value in chosen.tolist()])
        return prompts, rows, logprobs, None


@pytest.fixture
def generation(monkeypatch) -> type[Generation]:
    Generation.made = []
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Generation)
    monkeypatch.setattr("fractal_rm.ppo.checks.wait_for_vllm", lambda url, seconds: None)
    return Generation


def vllm(folder: Path, **changed: Any) -> Any:
    shared = {"reward_model": reward_model(), "reward_funcs": count_of_a, "value_model": value_model()}
    return make(folder, use_vllm=True, gradient_accumulation_steps=1, **shared | changed)


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_the_generator_gets_our_configuration_and_the_new_weights_of_every_rollout(tmp_path, generation, mode):
    options = {"vllm_server_base_url": "http://localhost:8000"} if mode == "server" else {}
    trainer = vllm(tmp_path, vllm_mode=mode, num_iterations=2, max_steps=4, temperature=0.7, **options)
    start = weights(trainer.model)
    trainer.train()
    (made,) = generation.made
    assert (made["mode"], made["temperature"], made["max_completion_length"]) == (mode, 0.7, 8)
    assert mode == "colocate" or made["server_base_url"] == "http://localhost:8000"
    assert made["max_num_seqs"] == 8
    generator = made["generation"]
    assert generator.asked == [2, 2]  # a rollout serves two epochs
    assert len(generator.synced) == 2
    assert same(generator.synced[0], start)
    assert not same(generator.synced[1], start)  # the second rollout is written by the weights of step 2
    assert not same(generator.synced[1], weights(trainer.model))  # which step 4 has left behind


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("advantage", ["gae", "group", "global"])
def test_the_same_completions_have_the_same_advantages_with_and_without_vllm(tmp_path, generation, mode, advantage):
    def changed() -> dict[str, Any]:
        return {
            "reward_model": reward_model(),
            "reward_funcs": count_of_a,
            "advantage": advantage,
            "value_model": value_model() if advantage == "gae" else None,
            "max_steps": 1,
        }

    with_vllm = vllm(tmp_path / "with", vllm_mode=mode, **changed())
    without = make(tmp_path / "without", rollout_func=replay(RAGGED), **changed())
    for trainer in (with_vllm, without):
        trainer.train()
    ours, theirs = with_vllm.rollouts[0], without.rollouts[0]
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    for name in ("advantages", "values", "returns", "value_mask"):
        assert (name in ours) == (name in theirs)
        assert name not in ours or torch.equal(ours[name], theirs[name])
    assert "importance_sampling_ratio" in ours
    assert "importance_sampling_ratio" not in theirs


@pytest.mark.parametrize(
    ("mode", "width"), [("token_truncate", 8), ("token_mask", 8), ("sequence_truncate", 1), ("sequence_mask", 1)]
)
def test_the_correction_weighs_the_policy_loss_of_each_token_and_not_the_value_loss(tmp_path, generation, mode, width):
    trainer = vllm(
        tmp_path, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.2, max_steps=1, vf_coef=0.5
    )
    trainer.model.train()
    rows = [trainer.train_dataset[i % 4] for i in range(8)]
    output = trainer.rollout(rows).minibatches()
    ratio, mask, advantages = output["importance_sampling_ratio"], output["value_mask"], output["advantages"]
    assert ratio.shape == (8, width)
    # The trainer's log-probabilities lie above the generator's by OFFSET.
    exact = (OFFSET * (mask if width == 8 else mask.sum(dim=1, keepdim=True))).exp()
    expected = exact.clamp(max=1.2) if mode.endswith("truncate") else exact.masked_fill(exact > 1.2, 0.0)
    real = mask if width == 8 else mask.any(dim=1, keepdim=True)
    torch.testing.assert_close(ratio[real], expected[real])
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, output)
    policy_loss = -(ratio * advantages * mask).sum() / mask.sum()  # the policy is that of the rollout: its ratio is 1
    value_loss = 0.5 * ((output["values"] - output["returns"]).square() * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, policy_loss + 0.5 * value_loss)
