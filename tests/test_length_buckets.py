"""Parts of like length: nothing but padding is left out, and models say of a part what they say of the batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from support.models import reward_model as scorer_model
from support.models import sums
from support.step_ppo import RAGGED, Q, make, policy, replay, reward_model, rollout, same, train, weights
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from fractal_rm.data.readers import read_bags
from fractal_rm.hf import length_buckets
from fractal_rm.hf.length_buckets import LengthBuckets, bucketed_step_logits, may_be_sorted
from fractal_rm.ppo import engine

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

# Prompts that differ too: padding on both sides.
PROMPTS = ["q", "qabcabc", "qa", "qabca"]
RAGGED_BOTH = {"reward_model": reward_model(), "rollout_func": replay(RAGGED)}


@pytest.fixture
def small_buckets(monkeypatch) -> None:
    """Parts of a few tokens: the batches of these tests are small."""
    monkeypatch.setitem(length_buckets._TOKENS, "cpu", 8)


@st.composite
def masks(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Attention masks of padded prompts and completions, some of them empty, and the width of the prompts."""
    prompt_width, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.tuples(st.integers(0, prompt_width), st.integers(0, width)), min_size=1, max_size=12))
    rows = [[0] * (prompt_width - p) + [1] * (p + c) + [0] * (width - c) for p, c in lengths]
    return torch.tensor(rows), prompt_width


@given(masks(), st.none() | st.integers(1, 12), st.booleans())
def test_parts_hold_all_text_once_and_join_to_the_batch(made, most_rows, sort):
    mask, prompt_width = made
    length_buckets._TOKENS["cpu"], usual = 4, length_buckets._TOKENS["cpu"]
    try:
        parts = LengthBuckets(mask, prompt_width, most_rows=most_rows, sort=sort)
    finally:
        length_buckets._TOKENS["cpu"] = usual
    texts = (torch.arange(mask.numel()).view_as(mask) + 1) * mask
    pieces = [part.of(texts)[0] for part in parts.parts]
    assert torch.equal(parts.join(pieces), texts)
    assert all(len(piece) <= (most_rows or len(mask)) for piece in pieces)
    widths = [parts.completion_width(part) for part in parts.parts]
    assert min(widths) >= 1
    completions = [piece[:, -width:] for piece, width in zip(pieces, widths, strict=True)]
    assert torch.equal(parts.join(completions)[:, : mask.size(1) - prompt_width], texts[:, prompt_width:])
    states = [piece.unsqueeze(-1).expand(-1, -1, 3).float() for piece in pieces]
    assert torch.equal(parts.join(states), texts.unsqueeze(-1).expand(-1, -1, 3).float())


def test_rows_of_like_length_are_read_together_without_the_padding_of_others(small_buckets):
    lengths = torch.tensor([9, 1, 8, 2, 9, 1, 8, 2])
    mask = torch.arange(10) < 1 + lengths.unsqueeze(1)
    parts = LengthBuckets(mask, 1).parts
    assert [part.rows.tolist() for part in parts] == [[1, 5], [3, 7], [2, 6], [0, 4]]
    assert [part.columns for part in parts] == [slice(0, 2), slice(0, 3), slice(0, 9), slice(0, 10)]


def test_a_batch_is_left_whole_where_sorting_saves_nothing_or_parts_would_be_small(small_buckets, monkeypatch):
    alike, ragged = torch.ones(8, 10), torch.arange(10) < torch.tensor([[10]] * 4 + [[2]] * 4)
    assert len(LengthBuckets(alike, 1).parts) == 1
    assert len(LengthBuckets(ragged, 1).parts) == 4
    assert len(LengthBuckets(ragged, 1, sort=False).parts) == 1
    monkeypatch.setitem(length_buckets._TOKENS, "cpu", 1024)
    assert len(LengthBuckets(ragged, 1).parts) == 1


def test_a_batch_too_small_for_two_parts_is_read_without_columns_of_padding(monkeypatch):
    monkeypatch.setitem(length_buckets._TOKENS, "cpu", 100)
    mask = torch.zeros(8, 20, dtype=torch.long)
    mask[:, 3:7] = 1
    parts = LengthBuckets(mask, 5).parts
    assert [part.columns for part in parts] == [slice(3, 7)]
    assert [part.columns for part in LengthBuckets(mask, 5, sort=False).parts] == [slice(0, 20)]


def test_models_with_learned_positions_and_several_processes_read_a_batch_whole():
    accelerator: Any = Accelerator(cpu=True)
    assert may_be_sorted(policy(), accelerator)
    assert not may_be_sorted(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)), accelerator)
    two: Any = SimpleNamespace(num_processes=2, unwrap_model=accelerator.unwrap_model)
    assert not may_be_sorted(policy(), two)


def ragged_batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and mask of padded prompts and completions, and the width of the completions."""
    prompts, width = [[Q] * n for n in (1, 5, 2, 4, 1, 3, 2, 5)], max(map(len, RAGGED))
    ids = [[0] * (5 - len(p)) + p + list(c) + [0] * (width - len(c)) for p, c in zip(prompts, RAGGED, strict=True)]
    mask = [[0] * (5 - len(p)) + [1] * len(p + list(c)) for p, c in zip(prompts, RAGGED, strict=True)]
    return torch.tensor(ids), torch.tensor([row + [0] * (5 + width - len(row)) for row in mask]), width


@pytest.mark.parametrize("batch_size", [None, 3])
def test_log_probabilities_entropies_and_gradients_are_those_of_the_whole_batch(tmp_path, small_buckets, batch_size):
    trainer = make(tmp_path, reward_model=reward_model())
    ids, mask, width = ragged_batch()
    real = mask[:, -width:].bool()

    def compute(sort: bool) -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            calls: list[int] = []
            whole = trainer.model.forward
            patch.setattr(trainer.model, "forward", lambda *a, **k: (calls.append(1), whole(*a, **k))[1])
            if not sort:
                patch.setitem(length_buckets._TOKENS, "cpu", 1 << 30)
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, width, batch_size=batch_size, compute_entropy=True
            )
        assert len(calls) == {None: 4, 3: 8}[batch_size] if sort else {None: 1, 3: 3}[batch_size]
        trainer.model.zero_grad()
        (logps * real).pow(2).sum().backward()
        return [logps * real, entropies * real, *(parameter.grad.clone() for parameter in trainer.model.parameters())]

    for part, whole in zip(compute(sort=True), compute(sort=False), strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        LoraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
)
def test_with_a_large_vocabulary_logits_are_those_of_completions_alone(tmp_path, monkeypatch, adapter):
    trainer = make(tmp_path, reward_model=reward_model(), peft_config=adapter, temperature=0.7)
    ids, mask, width = ragged_batch()
    real = mask[:, -width:].bool()

    def compute(least: int) -> list[torch.Tensor]:
        monkeypatch.setattr(engine, "_LARGE_VOCABULARY", least)
        seen: list[int] = []
        handle = trainer.policy.get_output_embeddings().register_forward_hook(
            lambda module, args, logits: seen.append(logits.size(1))
        )
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, width, compute_entropy=True
        )
        handle.remove()
        assert (seen == [width]) == (least == 1)  # TRL reads further positions, or its kernel does not call the head
        assert not logps[~real].any()
        trainer.model.zero_grad()
        logps.pow(2).sum().backward()
        gradients = [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]
        return [logps * real, entropies * real, *gradients]

    alone, everything = compute(1), compute(1 << 30)
    assert len(alone) == len(everything) > 2
    for ours, trls in zip(alone, everything, strict=True):
        torch.testing.assert_close(ours, trls, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("option", "value"), [("cast_lm_head_to_fp32", True), ("temperature", 1.0)])
def test_a_head_that_trl_changes_is_left_to_trl(tmp_path, monkeypatch, option, value):
    monkeypatch.setattr(engine, "_LARGE_VOCABULARY", 1)
    trainer = make(tmp_path, reward_model=reward_model(), **{option: value})
    assert trainer._has_large_vocabulary == (option == "temperature")


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_entropies_have_a_gradient_where_they_are_learned(tmp_path, monkeypatch, coefficient):
    monkeypatch.setattr(engine, "_LARGE_VOCABULARY", 1)
    trainer = make(tmp_path, reward_model=reward_model(), entropy_coef=coefficient)
    ids, mask, width = ragged_batch()
    _, entropies, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, compute_entropy=True)
    assert entropies.requires_grad == bool(coefficient)


@pytest.mark.parametrize("value_model", [None, "shared"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_training_in_parts_is_training_on_the_whole_batch(tmp_path, monkeypatch, value_model, iterations):
    options = {
        "train_dataset": make(tmp_path, reward_model=reward_model()).train_dataset.map(
            lambda row, n: {"prompt": PROMPTS[n % 4]}, with_indices=True
        ),
        "value_model": value_model,
        "num_iterations": iterations,
        "max_steps": 3,
    }
    whole = train(tmp_path / "whole", **RAGGED_BOTH, **options)
    monkeypatch.setitem(length_buckets._TOKENS, "cpu", 8)
    parts = train(tmp_path / "parts", **RAGGED_BOTH, **options)
    for name in ("model", "value_model"):
        assert same(weights(getattr(parts, name)), weights(getattr(whole, name)), atol=2e-4)
    assert not same(weights(parts.model), weights(policy()), atol=1e-2)


def test_values_of_a_part_are_values_of_the_batch(tmp_path, small_buckets, monkeypatch):
    output = rollout(tmp_path, **RAGGED_BOTH, num_generations=2)
    learning, mask = output["trainer"].value_learning, output["completion_mask"].bool()
    torch.nn.init.normal_(learning.model.score.weight)
    with torch.no_grad():
        parts = learning.values(output, most_rows=4)
        monkeypatch.setitem(length_buckets._TOKENS, "cpu", 1 << 30)
        whole = learning.values(output)
    assert parts[mask].std() > 0.1
    torch.testing.assert_close(parts[mask], whole[mask], atol=1e-5, rtol=1e-4)


def test_a_mixture_of_experts_and_images_go_trls_own_way(tmp_path, small_buckets):
    trainer = make(tmp_path, reward_model=reward_model())
    ids, mask, width = ragged_batch()
    seen: list[torch.Size] = []
    forward = trainer.model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape)
        kwargs.pop("token_type_ids")
        return forward(*args, **kwargs)

    trainer.model.forward = watch
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, token_type_ids=torch.zeros_like(ids))
    assert seen == [ids.shape]
    assert isinstance(trainer.model.config, LlamaConfig)


@pytest.mark.parametrize(("scorer", "family"), [("token", "llama"), ("token", "bert"), ("likelihood", "gpt2")])
def test_a_scorer_says_of_parts_what_it_says_of_the_batch(small_buckets, monkeypatch, scorer, family):
    accelerator: Any = Accelerator(cpu=True)
    scored = scorer_model(scorer, family)
    rows = sums(12)
    batch = scored._inputs.pad(scored._inputs.encode(read_bags(rows, scored.segmentation)))
    shapes = []
    scored.scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scored.scorer.eval()
    parts = bucketed_step_logits(scored.scorer, batch, accelerator)[batch["mask"]]
    assert scorer == "likelihood" or (len(shapes) == 4 and len({width for _, width in shapes}) > 1)
    monkeypatch.setitem(length_buckets._TOKENS, "cpu", 1 << 30)
    whole = bucketed_step_logits(scored.scorer, batch, accelerator)[batch["mask"]]
    assert whole.std() > 1e-3
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
