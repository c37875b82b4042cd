"""The model card: what it says, that its code works without this package, and that it travels with the model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.documents import blocks
from support.models import byte_tokenizer, reward_model, spaced_tokenizer
from support.stand_ins import save_encoder, save_policy, solutions
from transformers import AutoModel, AutoModelForTokenClassification

from fractal_rm import FractalConfig, FractalTrainer
from fractal_rm.data.bag import Bag
from fractal_rm.hf.cards import RewardModelCard, policy_card
from fractal_rm.reward_model import StepRewardModel

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPT = "What is 3+4?\n"
RESPONSE = "3+4=7.\nso 12.\n\n  ✓ done.\n"


def pieces(response: str, spans: list[tuple[int, int]]) -> list[str]:
    """The response, cut behind each step."""
    ends = [end for _, end in spans]
    return [response[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def run_card(folder: Path) -> Any:
    """The function that the code of a card defines; it may import torch and transformers."""
    (code,) = [body for body in blocks((folder / "README.md").read_text(), "python") if "score_steps" in body]
    assert "fractal_rm" not in code
    assert code.count('"this-folder"') == 1
    names: dict[str, Any] = {}
    exec(code.replace('"this-folder"', repr(str(folder))), names)
    return names["score_steps"]


@pytest.mark.parametrize(
    ("scorer", "family", "settings"),
    [
        ("token", "qwen2", {"temperature": 1.7}),
        ("token", "bert", {"prompt_template": "Q: {prompt}"}),
        ("token", "gpt2", {"num_grades": 3, "aggregation": "max", "model_options": {"num_labels": 3}}),
        ("token", "llama", {"tokenizer": byte_tokenizer(bos=True)}),
        ("token", "llama", {"tokenizer": byte_tokenizer(bos=True, chat=True), "chat": True}),
        ("likelihood", "llama", {"temperature": 0.6}),
        ("likelihood", "gpt2", {"reduction": "mean", "prompt_template": "{prompt}\nA: "}),
        ("likelihood", "llama", {"tokenizer": byte_tokenizer(chat=True), "chat": True}),
    ],
)
def test_the_code_of_a_card_gives_the_same_scores_without_this_package(tmp_path, scorer, family, settings):
    settings = dict(settings)
    model = reward_model(scorer, family, settings.pop("tokenizer", None), **settings)
    model.card = RewardModelCard().text(model.settings, model.processor)
    model.save_pretrained(tmp_path)
    prompt = [{"role": "user", "content": "3+4?"}] if model.settings.chat else PROMPT
    (scored,) = model.score([prompt], [RESPONSE])
    found = run_card(tmp_path)(prompt, pieces(RESPONSE, scored.spans))
    assert len(found) == 3
    assert found == pytest.approx(scored.step_scores, abs=1e-5)
    assert max(found) - min(found) > 1e-3


def test_a_card_says_why_it_has_no_code(tmp_path):
    model = reward_model("token", "llama", spaced_tokenizer())
    card = RewardModelCard().text(model.settings, model.processor)
    assert "puts a space before every text" in card
    assert len(blocks(card, "python")) == 1


def config(folder: Path, **options: Any) -> FractalConfig:
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"} | options
    return FractalConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, learning_rate=1e-3, **options)


def test_a_trainer_writes_a_card_with_every_checkpoint_and_one_that_tells_what_is_known(tmp_path):
    args = config(tmp_path / "rm", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    rows = solutions(12)
    trainer = FractalTrainer(
        save_policy(tmp_path / "policy"), args, train_dataset=rows, eval_dataset=[*rows, *solutions(9)]
    )
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "rm" / "README.md").read_text()
    assert (tmp_path / "rm" / "checkpoint-1" / "README.md").is_file()
    assert "| trained from | policy |" in card
    assert str(tmp_path) not in card
    assert "| labels | 12 responses in 36 steps with one label each, 8 of them good; no gold step labels |" in card
    assert f"(fingerprint `{trainer.settings.data}`)" in card
    logged = [logs for logs in trainer.state.log_history if "eval_step_auc" in logs][-1]
    for name in ("bag_auc", "step_auc", "within_bag_auc", "bag_ece"):
        value, low, high = map(
            float, re.search(rf"\| evaluation \| {name} \| (\S+) \| \[(\S+), (\S+)\] \|", card).groups()
        )
        assert value == pytest.approx(logged[f"eval_{name}"], rel=1e-3)
        assert low <= high
        assert name == "bag_ece" or low <= value <= high  # the error of few draws is larger
    (scored,) = StepRewardModel.from_pretrained(tmp_path / "rm").score([PROMPT], [RESPONSE])
    assert run_card(tmp_path / "rm")(PROMPT, pieces(RESPONSE, scored.spans)) == pytest.approx(
        scored.step_scores, abs=1e-5
    )
    before = (tmp_path / "rm" / "README.md").read_text()
    trainer.create_model_card(model_name="x")  # what `Trainer.push_to_hub` writes
    assert (tmp_path / "rm" / "README.md").read_text() == before


def test_the_card_of_an_embedding_scorer_names_its_encoder(tmp_path):
    args = config(tmp_path / "rm", scorer="embedding", embedding_cache=str(tmp_path / "cache"))
    trainer = FractalTrainer(save_encoder(tmp_path), args, train_dataset=solutions(6))
    trainer.save_model()
    card = (tmp_path / "rm" / "README.md").read_text()
    assert "| trained from | encoder |" in card
    assert "its scoring head needs fractal-rm" in card
    assert "library_name: sentence-transformers" in card


def test_a_card_goes_where_its_model_goes(tmp_path):
    model = reward_model("token", "gpt2")
    model.card = "---\n---\n# Mine\n"
    model.save_pretrained(tmp_path / "one")
    StepRewardModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == model.card


def test_nothing_is_uploaded_without_a_network(monkeypatch):
    with pytest.raises(ConnectionError, match=r"\Ame/rm was not uploaded: HF_HUB_OFFLINE is set\. [^\n]+\.\Z"):
        reward_model("token", "gpt2").push_to_hub("me/rm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"\Ame/rm was not uploaded \([^\n]+\.\Z"):
        reward_model("token", "gpt2").push_to_hub("me/rm", token="no-token")


# vLLM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "qwen2", "llama"])
def test_a_token_scorers_folder_is_one_of_token_classification(tmp_path, family):
    model = reward_model("token", family)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert len(saved["architectures"]) == 1
    assert saved["architectures"][0].endswith("ForTokenClassification")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert plain.num_labels == 1
    (scored,) = model.score([PROMPT], [RESPONSE])
    batch = model._inputs.pad(model._inputs.encode([Bag(PROMPT, RESPONSE, tuple(scored.spans), None)]))
    with torch.no_grad():
        logits = plain(batch["input_ids"]).logits[0, :, 0]
    assert logits[batch["step_ends"][0]].sigmoid().tolist() == pytest.approx(scored.step_scores, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_copy_for_vllm_has_a_head_without_bias_whose_scores_lack_only_that(tmp_path, family):
    folder, copy = tmp_path / "rm", tmp_path / "rm-vllm"
    model = reward_model("token", family)
    with torch.no_grad():
        model.scorer.base.score.bias.fill_(0.7)
    model.save_pretrained(folder)
    (code,) = [body for body in blocks((DOCS / "serving.md").read_text(), "python") if "rm-vllm" in body]
    names: dict[str, Any] = {"load_file": load_file, "save_file": save_file}
    exec(code.replace('"rm-vllm"', repr(str(copy))).replace('"rm"', repr(str(folder))), names)
    weights = load_file(copy / "model.safetensors")
    assert "score.bias" not in weights
    saved = json.loads((copy / "config.json").read_text())
    assert saved["architectures"] == [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]]
    assert saved["num_labels"] == 1
    (scored,) = model.score([PROMPT], [RESPONSE])
    batch = model._inputs.pad(model._inputs.encode([Bag(PROMPT, RESPONSE, tuple(scored.spans), None)]))
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(copy).eval()(batch["input_ids"]).last_hidden_state[0]
    raw = hidden[batch["step_ends"][0]] @ weights["score.weight"][0]
    assert (raw + names["bias"]).sigmoid().tolist() == pytest.approx(scored.step_scores, abs=1e-5)


def test_a_card_has_no_count_that_was_not_taken_and_no_link_to_a_registry():
    metrics = {"train": {"total_flos": 0.0, "train_loss": 0.5}}
    card = policy_card(base="org/policy", rewards="`rm`", data="prompts", settings={}, metrics=metrics)
    assert "| train | train_loss | 0.5 |" in card
    assert "total_flos" not in card
    model = reward_model("likelihood", "llama", byte_tokenizer())
    text = RewardModelCard(metrics=metrics | {"more": {"total_flos": 7.0}}).text(model.settings, model.processor)
    assert [line for line in text.splitlines() if "total_flos" in line] == ["| more | total_flos | 7 |  |"]
    assert "pypi.org" not in card + text
