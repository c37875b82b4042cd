"""A checkpoint is an ordinary Hugging Face folder; one that is not whole is refused with one sentence."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import (
    byte_tokenizer,
    make_model,
    reward_model,
    spaced_tokenizer,
    wordpiece_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
)

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.responses import separating_threshold
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.checkpoint import (
    load_model,
    load_scorer,
    load_tokenizer,
    make_scorer,
    replaced_folder,
    save_scorer,
)
from fractal_rm.scorers.settings import FORMAT_VERSION, FractalSettings

PROMPT = "What is 3+4?\n"
RESPONSE = "3+4=7.\nso 12.\n✓ done."
KINDS = [("likelihood", "llama"), ("likelihood", "gpt2"), ("token", "qwen2"), ("token", "gpt2"), ("token", "bert")]
KINDS += [("token", family) for family in ("gemma3", "granite", "olmo2")]


def save(
    folder: Path, scorer: str = "likelihood", family: str = "llama", tokenizer: Any = None, **settings: Any
) -> StepRewardModel:
    model = reward_model(scorer, family, tokenizer, **settings)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    """The one sentence (or few, on one line) with which a folder is refused; it names the folder."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        StepRewardModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# Round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["likelihood", "token"])
def test_config_tokenizer_and_weights_of_a_hub_id_are_of_one_revision(tmp_path, scorer):
    repository = tmp_path / "models--someone--judge"
    models = {}
    for name, aggregation in (("main", "min"), ("v2", "product")):
        torch.manual_seed(len(models))
        models[name] = reward_model(scorer, "llama", aggregation=aggregation)
        commit = ("a" if name == "main" else "b") * 40
        models[name].save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    for name, model in models.items():
        found = StepRewardModel.from_pretrained("someone/judge", revision=name, cache_dir=str(tmp_path), device="cpu")
        assert found.settings.aggregation == model.settings.aggregation
        assert found.score(["1+1?\n"], ["2.\n3."]) == model.score(["1+1?\n"], ["2.\n3."])


@pytest.mark.parametrize(("scorer", "family"), KINDS)
def test_a_saved_model_scores_as_before(tmp_path, scorer, family):
    model = save(tmp_path, scorer, family, aggregation="product")
    loaded = StepRewardModel.from_pretrained(tmp_path)
    theirs, ours = loaded.scorer.state_dict(), model.scorer.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    for one in (loaded, model):  # some kernels add in another order where weights lie at another alignment
        for parameter in one.scorer.parameters():
            parameter.data = parameter.data.clone()
    assert loaded.score([PROMPT], [RESPONSE]) == model.score([PROMPT], [RESPONSE])
    assert not loaded.scorer.training
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        | ({"generation_config.json"} if scorer == "likelihood" else set())
    )


def test_the_block_holds_every_setting(tmp_path):
    settings = FractalSettings(
        scorer="token",
        aggregation="max",
        segmentation=Segmentation("separator", separator="##"),
        prompt_template="Q: {prompt}\n",
        max_length=77,
        temperature=1.5,
        threshold=0.25,
        data="abc",
    )
    model = make_model("token", "llama")
    saved = save_scorer(tmp_path, make_scorer(model, settings), byte_tokenizer(), settings)
    loaded = StepRewardModel.from_pretrained(tmp_path).settings
    assert loaded == saved
    for name in ("scorer", "aggregation", "segmentation", "prompt_template", "max_length", "temperature", "data"):
        assert getattr(loaded, name) == getattr(settings, name)
    assert loaded.versions.keys() >= {"torch", "transformers", "fractal_rm"}
    assert settings.head is None  # the caller's settings are not touched


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_auto_model_for_causal_lm_gives_the_same_numbers(tmp_path, family):
    scored = save(tmp_path, "likelihood", family, byte_tokenizer()).score([PROMPT], [RESPONSE])[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    block = model.config.fractal
    ids = tokenizer(PROMPT + RESPONSE, return_offsets_mapping=True)
    tokens = torch.tensor(ids["input_ids"])
    with torch.no_grad():
        log_probs = model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)
    for step in scored.steps:
        start, end = len(PROMPT) + step.start, len(PROMPT) + step.end
        places = [i for i, (a, b) in enumerate(ids["offset_mapping"]) if a < end and b > start]
        total = sum(log_probs[i - 1, tokens[i]].item() for i in places)
        logit = math.exp(block["log_weight"]) * total + block["bias"]
        assert 1 / (1 + math.exp(-logit)) == pytest.approx(step.score, abs=1e-5)


@pytest.mark.parametrize(("family", "tokenizer"), [("qwen2", byte_tokenizer()), ("bert", wordpiece_tokenizer())])
def test_plain_auto_model_for_token_classification_gives_the_same_numbers(tmp_path, family, tokenizer):
    response = "3+4=7.\nso 12."
    scored = save(tmp_path, "token", family, tokenizer).score([PROMPT], [response])[0]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    ids = tokenizer(PROMPT + response, return_offsets_mapping=True)
    with torch.no_grad():
        probs = model(input_ids=torch.tensor(ids["input_ids"])[None]).logits[0, :, 0].sigmoid()
    for step in scored.steps:
        (place,) = (i for i, (a, b) in enumerate(ids["offset_mapping"]) if a < len(PROMPT) + step.end <= b)
        assert probs[place].item() == pytest.approx(step.score, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scorer", "family"), [("likelihood", "llama"), ("token", "qwen2")])
def test_half_precision_is_not_taken_for_another_head(tmp_path, scorer, family, dtype):
    model = save(tmp_path, scorer, family)
    half = StepRewardModel.from_pretrained(tmp_path, dtype=dtype)
    assert half.scorer.base.dtype == dtype
    exact = model.score([PROMPT], [RESPONSE])[0].step_scores
    assert half.score([PROMPT], [RESPONSE])[0].step_scores == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize(("scorer", "family"), [("likelihood", "llama"), ("token", "qwen2")])
def test_adapters_are_merged_into_what_is_saved(tmp_path, scorer, family):
    task = "CAUSAL_LM" if scorer == "likelihood" else "TOKEN_CLS"
    model = get_peft_model(
        make_model(scorer, family), LoraConfig(task_type=task, target_modules=["q_proj"], init_lora_weights=False)
    )
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    settings = FractalSettings(scorer=scorer, log_weight=-3.0, bias=2.0)
    tokenizer = byte_tokenizer(merges=True)
    live = StepRewardModel(make_scorer(model, settings).eval(), tokenizer, settings)
    before = live.score([PROMPT], [RESPONSE])[0]
    live.save_pretrained(tmp_path)
    assert live.score([PROMPT], [RESPONSE])[0] == before  # saving changes nothing
    loaded = StepRewardModel.from_pretrained(tmp_path)
    assert loaded.score([PROMPT], [RESPONSE])[0].step_scores == pytest.approx(before.step_scores, abs=1e-5)
    plain = reward_model(scorer, family)
    assert plain.score([PROMPT], [RESPONSE])[0].step_scores != pytest.approx(before.step_scores, abs=1e-3)


def test_saving_over_a_folder_leaves_no_file_of_the_model_before(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    model = save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "notes.txt" in names
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & names
    assert StepRewardModel.from_pretrained(tmp_path).score([PROMPT], [RESPONSE]) == model.score([PROMPT], [RESPONSE])


def test_a_save_moves_the_configuration_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def watch(source, target):
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    with replaced_folder(tmp_path / "model") as folder:
        for name in ("config.json", *(f"model-{number:02}.safetensors" for number in range(30))):
            (folder / name).write_text("{}")
    assert len(moved) == 31
    assert moved[-1] == "config.json"


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path):
    model = save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class FullDisk(type(model.tokenizer)):
        def save_pretrained(self, *args, **kwargs):
            raise OSError("No space left on device")

    model.tokenizer.__class__ = FullDisk
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = reward_model("token", "llama")
    model.scorer.base.score.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"1 weights are NaN or infinite .*rm is not written\. Lower `learning_rate`"):
        model.save_pretrained(tmp_path / "rm")
    assert not (tmp_path / "rm").exists()


# Folders that are not whole ----------------------------------------------------------------------------------------


def test_a_folder_without_config_is_no_model_folder(tmp_path):
    assert "is not a model folder: it has no config.json. Give a folder" in refusal(tmp_path)


def test_a_path_that_is_neither_a_folder_nor_reachable_is_named(tmp_path):
    assert "neither a model folder nor a hub id that can be reached" in refusal(tmp_path / "missing")


def test_a_config_that_is_no_json_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is invalid JSON (" in refusal(tmp_path)


def test_a_model_without_the_block_is_no_step_reward_model(tmp_path):
    make_model("likelihood", "llama").save_pretrained(tmp_path)
    assert "is a model but not a step reward model" in refusal(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, None, "1"])
def test_an_unknown_format_version_is_refused(tmp_path, version):
    save(tmp_path)
    edit_config(tmp_path, lambda config: config["fractal"].update(format_version=version))
    assert f"has format version {version!r}; this package reads version {FORMAT_VERSION}. Install" in refusal(tmp_path)


def test_an_unknown_key_is_refused(tmp_path):
    save(tmp_path)
    edit_config(tmp_path, lambda config: config["fractal"].update(ordinal=4, graded=1))
    assert "the `fractal` block has unknown keys ['graded', 'ordinal']. Install" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"scorer": "window"}, "Unknown scorer 'window'. Choose one of likelihood, token, embedding"),
        ({"aggregation": "median"}, "Unknown aggregation 'median'."),
        ({"aggregation": "lse_min"}, "cannot be used (The aggregation 'lse_min' was removed; use 'softmin'). Train"),
        ({"segmentation": {"method": "words"}}, "Unknown segmentation method 'words'"),
        ({"segmentation": 3}, "the `fractal` block cannot be used ("),
    ],
)
def test_a_damaged_block_is_refused(tmp_path, block, sentence):
    save(tmp_path)
    edit_config(tmp_path, lambda config: config["fractal"].update(block))
    assert sentence in refusal(tmp_path)


@pytest.mark.parametrize("block", [[], "yes", 3])
def test_a_block_that_is_no_object_is_refused(tmp_path, block):
    save(tmp_path)
    edit_config(tmp_path, lambda config: config.update(fractal=block))
    assert "has format version None" in refusal(tmp_path)


def test_another_tokenizer_is_refused(tmp_path):
    save(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "is not the one the model was trained with" in refusal(tmp_path)


def test_another_chat_template_is_refused(tmp_path):
    save(tmp_path, tokenizer=byte_tokenizer(chat=True))
    StepRewardModel.from_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(file.read_text().replace("<assistant>", "<model>"))
    assert "the tokenizer or its chat template is not the one" in refusal(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    save(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert re.search("no tokenizer that can be loaded|the tokenizer or its chat template is not", refusal(tmp_path))


def test_a_mistyped_name_is_said_to_be_neither_a_folder_nor_on_the_hub():
    with pytest.raises(ValueError, match=r"There is no folder polcy, and the hub does not give its tokenizer \("):
        load_tokenizer("polcy", local_files_only=True)


@pytest.mark.parametrize(("scorer", "head"), [("token", "score.weight"), ("likelihood", "lm_head.weight")])
def test_a_missing_head_is_refused(tmp_path, scorer, head):
    save(tmp_path, scorer)
    edit_weights(tmp_path, lambda weights: weights.pop(head))
    assert f"1 weights are missing from the folder and would be random (first: {head})" in refusal(tmp_path)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("scorer", "head"), [("token", "score.weight"), ("likelihood", "lm_head.weight")])
def test_a_random_head_is_refused_however_its_size(tmp_path, scorer, head, scale):
    """A new head has the mean and the norm that the old one had: only its single weights tell."""
    options = {"initializer_range": scale, "hidden_size": 256, "num_hidden_layers": 1}
    save(tmp_path, scorer, model_options=options)
    StepRewardModel.from_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({head: scale * torch.randn_like(weights[head])}))
    assert "the scoring head is not the trained one. Restore" in refusal(tmp_path)


def test_missing_weights_of_the_backbone_are_refused(tmp_path):
    save(tmp_path, "token")
    edit_weights(tmp_path, lambda weights: weights.pop("model.norm.weight"))
    assert "1 weights are missing from the folder and would be random (first: model.norm.weight)" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "cannot be loaded as an AutoModelForCausalLM for the likelihood scorer" in refusal(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    save(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refusal(tmp_path)


# Grades ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_token_scorer_of_grades_comes_back_as_it_was(tmp_path, family):
    options = {"num_grades": 4, "aggregation": "max", "model_options": {"num_labels": 4}}
    model = save(tmp_path, "token", family, **options)
    loaded = StepRewardModel.from_pretrained(tmp_path)
    result = loaded.score([PROMPT], [RESPONSE])[0]
    assert result == model.score([PROMPT], [RESPONSE])[0]
    assert all(0 <= score <= 1 for score in (*result.step_scores, result.score))
    assert result.score >= max(result.step_scores)
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.num_labels == 4


def test_grades_that_the_head_does_not_have_are_refused(tmp_path):
    save(tmp_path, "token", num_grades=4, aggregation="max", model_options={"num_labels": 4})
    edit_config(tmp_path, lambda config: config["fractal"].update(num_grades=5))
    assert "cannot be loaded as an AutoModelForTokenClassification" in refusal(tmp_path)
    with pytest.raises(ValueError, match=r"The token scorer got a \w+ with 1 labels.*num_labels=3\)`"):
        make_scorer(make_model("token", "llama"), FractalSettings(scorer="token", num_grades=3, aggregation="max"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"scorer": "likelihood", "num_grades": 4, "aggregation": "max"}, "`num_grades` is 4 with the likelihood"),
        ({"scorer": "token", "num_grades": 1, "aggregation": "max"}, "`num_grades` is 1. Give a whole number from 2"),
        ({"scorer": "token", "num_grades": 4, "aggregation": "mean"}, "Grades are aggregated by their maximum"),
        ({"sharpness": math.nan}, "`sharpness` is nan"),
        ({"head_type": "deep"}, "Unknown head_type 'deep'. Choose one of pair, mlp, set"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        FractalSettings(**settings)


def test_a_threshold_above_every_score_is_one_that_training_may_choose():
    assert separating_threshold(np.ones(3), np.zeros(3)) > 1
    settings = FractalSettings(threshold=separating_threshold(np.ones(3), np.zeros(3)))
    assert FractalSettings.from_dict(settings.to_dict(), where="rm").threshold == settings.threshold


# Models to start from ----------------------------------------------------------------------------------------------


def test_a_causal_model_starts_a_token_scorer_with_a_new_head_only(tmp_path):
    make_model("likelihood", "llama").save_pretrained(tmp_path)
    model, missing = load_model(tmp_path, FractalSettings(scorer="token"))
    assert all(name.startswith("score.") for name in missing)
    assert model.config.num_labels == 1


def test_a_classifier_of_other_labels_is_named(tmp_path):
    make_model("token", "llama", num_labels=7).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"cannot be loaded as an AutoModelForTokenClassification for the token scorer \([^\n]+\)\. Give",
    ):
        load_model(tmp_path, FractalSettings(scorer="token"))


def test_a_language_model_without_its_head_is_named(tmp_path):
    make_model("likelihood", "llama").base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights are missing .*lm_head.weight.* Give a folder with all weights"):
        load_model(tmp_path, FractalSettings(scorer="likelihood"))


def test_an_encoder_is_not_a_causal_language_model(tmp_path):
    AutoModelForMaskedLM.from_config(BertConfig(num_hidden_layers=1, vocab_size=9, hidden_size=12)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"for the likelihood scorer \(it is not a causal language model\)\. Give"):
        load_model(tmp_path, FractalSettings(scorer="likelihood"))


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<eos>"


def test_a_tokenizer_with_neither_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has neither a padding nor an end-of-text token\. Set `tokenizer\.pad_token`"
    ):
        load_tokenizer(tmp_path)


def test_the_tokenizer_of_a_checkpoint_survives_a_move(tmp_path):
    model = save(tmp_path / "a", tokenizer=spaced_tokenizer())
    shutil.move(tmp_path / "a", tmp_path / "b")
    scorer, _, _ = load_scorer(tmp_path / "b")
    assert scorer.base.config.vocab_size == model.scorer.base.config.vocab_size
