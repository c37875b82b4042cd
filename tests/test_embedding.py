"""A head on frozen embeddings: what it may see, what it learns, and the folder it is saved in."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from support.models import make_model, sums, wordpiece_tokenizer
from support.stand_ins import save_encoder, save_policy
from torch import Tensor
from transformers import AutoModel

from fractal_rm.cli.checks import check_models
from fractal_rm.data.bag import Bag
from fractal_rm.reward_model import FractalReward, StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.scorers.checkpoint import load_scorer
from fractal_rm.scorers.embedding import (
    HEADS,
    SPLIT_CHARACTERS,
    EmbeddedBag,
    EmbeddingInputs,
    EmbeddingScorer,
    closest,
    make_head,
    prompt_splits,
)
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

SIZE = 8
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
ROWS = sums(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder) -> SentenceEncoder:
    return SentenceEncoder(folder, cache_dir="")


def make(path: Path, encoder: Any, rows: Any = ROWS, **options: Any) -> FractalTrainer:
    config = FractalConfig(
        output_dir=str(path), **{"scorer": "embedding", "max_steps": 3, "learning_rate": 1e-3} | QUIET | options
    )
    return FractalTrainer(encoder, args=config, train_dataset=rows)


def bags(sizes: list[int], *, seed: int = 0) -> list[EmbeddedBag]:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    return [
        EmbeddedBag(*(unit(torch.randn(size, SIZE, generator=generator), dim=1) for _ in range(2))) for size in sizes
    ]


def scorer(kind: str, outputs: int = 1) -> EmbeddingScorer:
    torch.manual_seed(0)
    return make_head(kind, SIZE, outputs).eval()


def pad(found: list[EmbeddedBag]) -> dict[str, Tensor]:
    inputs: Any = EmbeddingInputs(encoder=None)  # type: ignore[arg-type]  # padding needs none
    return inputs.pad(found)


def write_response(row: dict[str, Any]) -> str:
    return "\n".join(row["steps"])


# What a step sees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("kind", HEADS)
def test_padding_touches_neither_value_nor_gradient(kind, outputs):
    head, batch = scorer(kind, outputs), pad(bags([1, 4, 2]))
    logits = head(**batch)
    assert logits.shape == ((3, 4) if outputs == 1 else (3, 4, outputs))
    assert logits.dtype == torch.float32
    mask = batch["mask"]
    noise = {name: torch.where(mask[..., None], batch[name], torch.randn(3, 4, SIZE)) for name in ("steps", "contexts")}
    noise = {name: x.requires_grad_() for name, x in noise.items()}
    scrambled = head(**noise, mask=mask)
    assert torch.allclose(scrambled[mask], logits[mask], atol=1e-6)
    scrambled[mask].square().sum().backward()
    assert all((x.grad[~mask] == 0).all() and x.grad[mask].abs().sum() > 0 for x in noise.values())
    for row, bag in enumerate(bags([1, 4, 2])):
        alone = head(**pad([bag]))[0]
        assert torch.allclose(alone, logits[row, : bag.num_steps], atol=1e-5)


@settings(max_examples=20)
@given(st.permutations(range(5)))
def test_a_permutation_of_the_steps_permutes_the_scores(order):
    (bag,) = bags([5])
    permuted = EmbeddedBag(bag.steps[order], bag.contexts[order])
    for kind in HEADS:
        head = scorer(kind)
        assert torch.allclose(head(**pad([permuted])), head(**pad([bag]))[:, order], atol=1e-5)


@pytest.mark.parametrize(("kind", "sees_others"), [("pair", False), ("mlp", False), ("set", True)])
def test_which_head_sees_the_other_steps(kind, sees_others):
    (bag,) = bags([4])
    head = scorer(kind)
    steps = bag.steps.clone().requires_grad_()
    head(**pad([EmbeddedBag(steps, bag.contexts)]))[0, 1].backward()
    others = steps.grad[[0, 2, 3]].abs().sum().item()
    assert steps.grad[1].abs().sum() > 0
    assert (others > 1e-6) == sees_others


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_sees_the_prompt(kind):
    (bag,) = bags([3])
    head = scorer(kind)
    assert not torch.allclose(head(**pad([bag])), head(**pad([EmbeddedBag(bag.steps, -bag.contexts)])), atol=1e-4)


def test_the_length_of_an_encoders_vectors_does_not_matter(encoder):
    class Longer:
        def embed(self, texts: list[str], *, progress: bool = False) -> Tensor:
            return 7 * encoder.embed(texts)

    rows = [Bag("1+1?", "2\n3", ((0, 1), (2, 3)), None)]
    (usual,), (longer,) = EmbeddingInputs(encoder).encode(rows), EmbeddingInputs(Longer()).encode(rows)  # type: ignore
    assert torch.allclose(usual.steps, longer.steps, atol=1e-6)
    assert torch.allclose(usual.steps.norm(dim=1), torch.ones(2))
    assert torch.allclose(usual.contexts, longer.contexts, atol=1e-6)


# Prompts ------------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_split_between_sentences_and_nothing_is_lost():
    sentence = "The bridge over the river was built of grey stone and wood. "
    text = sentence * 60
    splits = prompt_splits(text)
    assert len(splits) > 3
    assert all(len(part) <= SPLIT_CHARACTERS and part.strip().endswith(".") for part in splits)
    assert "".join("".join(splits).split()) == "".join(text.split())


def test_a_sentence_longer_than_a_split_stays_whole():
    long = "word " * 300
    assert [part.strip() for part in prompt_splits(f"Short one. {long.strip()}. Last one.")] == [
        "Short one.",
        f"{long.strip()}.",
        "Last one.",
    ]


def test_a_chat_is_its_messages():
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    assert prompt_splits(chat) == prompt_splits("Add.\n1+1?") == ["Add.\n1+1?"]


@pytest.mark.parametrize("text", ["", " ", "\n" * 900])
def test_a_prompt_without_text_has_one_part(text):
    assert prompt_splits(text) == [text]


def test_each_step_gets_the_part_of_the_prompt_that_is_closest(encoder):
    first, second = (" ".join([word] * 160) + "." for word in ("rivers", "4 7 9"))
    prompt = f"{first} {second}"
    splits = prompt_splits(prompt)
    assert len(splits) == 2
    response = f"{splits[1]}\n{splits[0]}"
    spans = ((0, len(splits[1])), (len(splits[1]) + 1, len(response)))
    (bag,) = EmbeddingInputs(encoder).encode([Bag(prompt, response, spans, None)])
    assert torch.allclose(bag.contexts, bag.steps, atol=1e-3)  # each step is one of the parts


def test_closest_is_by_cosine_and_not_by_length():
    steps, contexts = torch.tensor([[1.0, 0.1], [0.1, 1.0]]), torch.tensor([[0.1, 0.0], [9.0, 9.0], [0.0, 0.1]])
    assert torch.equal(
        closest(steps, contexts, torch.zeros(len(steps), len(contexts), dtype=torch.bool)), contexts[[0, 2]]
    )


# Training, saving, loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_response_labels_teach_steps(encoder, tmp_path, kind):
    """Good and bad steps differ in a word; a response is good if it has no bad one."""
    rows = []
    for i in range(24):
        steps = [f"good {i}.", f"right {i + 1}.", f"good {i + 2}."]
        if i % 2:
            steps[i % 3] = f"wrong zzz {i}."
        gold = [int("zzz" not in step) for step in steps]
        rows.append({"prompt": f"{i}?", "steps": steps, "label": 1 - i % 2, "step_labels": gold})
    options = {"aggregation": "product", "max_steps": 100, "per_device_train_batch_size": 24, "learning_rate": 2e-3}
    trainer = make(tmp_path, encoder, rows, head_type=kind, **options)
    trainer.train()
    losses = [entry["loss/bag"] for entry in trainer.state.log_history if "loss/bag" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate(rows)["eval_within_bag_auc"] > 0.8


@pytest.fixture(scope="module", params=["pair", "mlp", "set"])
def saved(request, encoder, tmp_path_factory) -> tuple[Path, FractalTrainer]:
    path = tmp_path_factory.mktemp(f"saved-{request.param}")
    trainer = make(path, encoder, head_type=request.param)
    trainer.train()
    trainer.save_model()
    return path, trainer


def test_a_saved_model_scores_as_before(saved):
    path, trainer = saved
    prompts, responses = [row["prompt"] for row in ROWS], [write_response(row) for row in ROWS]
    live = trainer.reward_model().score(prompts, responses)
    loaded = StepRewardModel.from_pretrained(path)
    assert loaded.score(prompts, responses) == live
    assert loaded.tokenizer is None
    assert loaded.settings.head_type == trainer.settings.head_type
    for result in live:
        assert result.score == pytest.approx(min(result.step_scores), abs=1e-6)


def test_the_folder_is_that_of_its_encoder(saved, folder, encoder):
    path, _ = saved
    texts = ["1+1=2.", "so 3."]
    plain = SentenceTransformer(str(path), device="cpu").encode(texts, convert_to_tensor=True)
    assert torch.equal(plain, SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True))
    model, original = AutoModel.from_pretrained(path), AutoModel.from_pretrained(folder)
    assert model.config.fractal["scorer"] == "embedding"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert not list(path.glob(".writing-*"))


def test_saving_twice_into_one_folder_keeps_the_last(encoder, tmp_path):
    trainer = make(tmp_path, encoder)
    trainer.save_model()
    before = load_file(tmp_path / "head.safetensors")
    trainer.train()
    trainer.save_model()
    after = load_file(tmp_path / "head.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    live = trainer.reward_model().score(["1?"], ["1.\n2."])
    assert StepRewardModel.from_pretrained(tmp_path).score(["1?"], ["1.\n2."]) == live


def test_a_half_precision_encoder_comes_back_as_it_was(folder, tmp_path):
    half = SentenceEncoder(folder, cache_dir="", dtype="bfloat16")
    trainer = make(tmp_path, half)
    trainer.save_model()
    live = trainer.reward_model().score(["1?"], ["1.\n2."])
    assert StepRewardModel.from_pretrained(tmp_path).score(["1?"], ["1.\n2."]) == live


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        load_scorer(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def remove_head(path: Path, other: str) -> None:
    (path / "head.safetensors").unlink()


def damage_head(path: Path, other: str) -> None:
    (path / "head.safetensors").write_bytes(b"damaged")


def reshape_head(path: Path, other: str) -> None:
    weights = load_file(path / "head.safetensors")
    save_file({name: torch.zeros(1, 1) for name in weights}, path / "head.safetensors")


def randomise_head(path: Path, other: str) -> None:
    weights = load_file(path / "head.safetensors")
    save_file({name: 0.1 * torch.randn_like(weight) for name, weight in weights.items()}, path / "head.safetensors")


def other_encoder(path: Path, other: str) -> None:
    shutil.copy(Path(other) / "model.safetensors", path / "model.safetensors")


def other_pooling(path: Path, other: str) -> None:
    file = path / "1_Pooling" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_mode": "cls"}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_head, "the head in head.safetensors is missing or different"),
        (damage_head, "the head in head.safetensors is missing or different"),
        (reshape_head, "the head in head.safetensors is missing or different"),
        (randomise_head, "the scoring head is not the trained one"),
        (other_encoder, "the sentence encoder is not the one the head was trained on"),
        (other_pooling, "the sentence encoder is not the one the head was trained on"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(saved, tmp_path, damage, sentence):
    path = tmp_path / "copy"
    shutil.copytree(saved[0], path)
    damage(path, save_encoder(tmp_path / "other", seed=5))
    assert sentence in refusal(path)


def test_what_cannot_be_trained_with_a_frozen_encoder_is_refused(folder, encoder, tmp_path):
    for given_model, options in ((make_model("likelihood", "llama"), {}), (folder, {"gradient_checkpointing": True})):
        with pytest.raises(ValueError, match="trains a small head on a frozen encoder: give `model` as path or hub id"):
            make(tmp_path, given_model, **options)
    with pytest.raises(ValueError, match=r"The token scorer got a sentence encoder\. Set `scorer=embedding`"):
        make(tmp_path, encoder, scorer="token")


def test_only_the_head_is_trained(encoder, tmp_path):
    before = [parameter.detach().clone() for parameter in encoder.model.parameters()]
    trainer = make(tmp_path, encoder)
    heads = [parameter.detach().clone() for parameter in trainer.scorer.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.model.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(heads, trainer.scorer.parameters(), strict=True)]
    assert all(moved)
    assert {group["lr"] for group in trainer.optimizer.param_groups if group["params"]} <= {0.0, 1e-2}


@pytest.mark.parametrize("kind", HEADS)
def test_the_same_seed_gives_the_same_head_and_a_resumed_run_equals_a_whole_one(encoder, tmp_path, kind):
    options = {"head_type": kind, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, again = make(tmp_path / "whole", encoder, **options), make(tmp_path / "again", encoder, **options)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))  # its own dropout was restored
    fresh = make(tmp_path / "fresh", encoder, **options)
    fresh.train()
    for other in (again, fresh):
        pairs = zip(whole.scorer.parameters(), other.scorer.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# Grades -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_grades_train_save_load_and_score_between_0_and_1(encoder, tmp_path, kind):
    rows = [{"prompt": f"{i}?", "steps": ["a.", f"b {'z' * (i % 4)}."], "label": i % 4} for i in range(16)]
    trainer = make(
        tmp_path,
        encoder,
        rows,
        head_type=kind,
        num_grades=4,
        aggregation="max",
        max_steps=60,
        per_device_train_batch_size=16,
    )
    trainer.train()
    losses = [entry["loss/bag"] for entry in trainer.state.log_history if "loss/bag" in entry]
    assert losses[0] > losses[-1] < 0.8 * math.log(4)
    trainer.save_model()
    prompts, responses = [row["prompt"] for row in rows], [row["steps"] for row in rows]
    live = trainer.reward_model().score(prompts, responses)
    assert StepRewardModel.from_pretrained(tmp_path).score(prompts, responses) == live
    for result in live:
        assert all(0 <= score <= 1 for score in (*result.step_scores, result.score))
        assert result.score >= max(result.step_scores) - 1e-6  # the best step is at least as good as any
    means = [sum(result.score for result in live[grade::4]) for grade in range(4)]
    assert means[0] < means[-1]


# In use -------------------------------------------------------------------------------------------------------------


def test_chats_train_are_scored_and_give_rewards(encoder, tmp_path):
    rows = sums(16, chat=True)
    trainer = make(tmp_path, encoder, rows)
    trainer.train()
    trainer.save_model()
    reward = FractalReward(tmp_path)
    prompts, answers = [row["prompt"] for row in rows], [write_response(row) for row in rows]
    chats = [[{"role": "assistant", "content": answer}] for answer in answers]
    scores = [result.score for result in trainer.reward_model().score(prompts, answers)]
    assert reward(prompts, chats) == scores
    assert reward(prompts[:1], [[{"role": "assistant", "content": ""}]]) == [None]


def test_a_bad_response_is_reported_and_the_others_are_scored(saved):
    model = StepRewardModel.from_pretrained(saved[0])
    good, bad = model.score(["1?", "1?"], ["1.\n2.", " "])
    assert len(good.steps) == 2
    assert re.search("empty", bad.error)


def test_scoring_is_the_same_whatever_the_batch(saved):
    _, trainer = saved
    model = trainer.reward_model()
    prompts, responses = [row["prompt"] for row in ROWS], [write_response(row) for row in ROWS]
    for a, b in zip(
        model.score(prompts, responses, batch_size=1), model.score(prompts, responses, batch_size=7), strict=True
    ):
        assert a.step_scores == pytest.approx(b.step_scores, abs=1e-6)


def test_it_rewards_a_policy_in_training(saved, tmp_path):
    from datasets import Dataset

    from fractal_rm.ppo.config import StepPPOConfig
    from fractal_rm.ppo.trainer import StepPPOTrainer

    config = StepPPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        max_completion_length=6,
        per_device_train_batch_size=4,
        num_generations=2,
        bf16=False,
        **QUIET,
    )
    trainer = StepPPOTrainer(
        model=save_policy(tmp_path / "policy"),
        reward_model=saved[0],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"{i}+1?\n"} for i in range(4)]),
    )
    trainer.train()
    assert any("rewards/step_reward_model/mean" in entry for entry in trainer.state.log_history)


def test_an_encoder_without_a_transformer_trains_and_loads(tmp_path):
    tokenizer = wordpiece_tokenizer().backend_tokenizer
    words = StaticEmbedding(tokenizer, embedding_weights=torch.randn(tokenizer.get_vocab_size(), SIZE).numpy())
    SentenceTransformer(modules=[words]).save_pretrained(str(tmp_path / "words"))
    check_models(str(tmp_path / "words"))
    trainer = make(tmp_path / "rm", str(tmp_path / "words"))
    trainer.save_model()
    texts = {"prompts": ["2+3?"], "responses": ["2+3=5.\nSo 5."]}
    (before,), (after,) = (
        model.score(**texts) for model in (trainer.reward_model(), StepRewardModel.from_pretrained(tmp_path / "rm"))
    )
    assert after.step_scores == before.step_scores
    assert len(set(after.step_scores)) == 2
