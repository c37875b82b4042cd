"""Embeddings are computed once, and a cache never changes a number."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stand_ins import save_encoder
from transformers import AutoModel

from fractal_rm.scorers.sentence_encoder import CACHE_VARIABLE, SentenceEncoder

TEXTS = ["2+3*4=14.", "so it is 14.", "2+3*4=14.", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Path(save_encoder(tmp_path_factory.mktemp("encoder")))


def silent(encoder: SentenceEncoder) -> SentenceEncoder:
    """The encoder, without the ability to compute anything new."""

    def encode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was asked")

    encoder.model.encode = encode
    return encoder


def counting(encoder: SentenceEncoder) -> list[str]:
    """The list of texts that the model will be asked for."""
    asked, encode = [], encoder.model.encode

    def count(texts: list[str], **kwargs: Any) -> Any:
        asked.extend(texts)
        return encode(texts, **kwargs)

    encoder.model.encode = count
    return asked


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("embeddings/*/*.safetensors"))


def test_equal_texts_are_encoded_once_and_every_text_has_its_row(folder):
    encoder = SentenceEncoder(folder, cache_dir="")
    asked = counting(encoder)
    found = encoder.embed(TEXTS)
    assert found.shape == (4, encoder.size) == (4, 16)
    assert found.dtype == torch.float32
    assert sorted(asked) == sorted([*set(TEXTS), "a"])  # "a" tells the size
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert encoder.embed([]).shape == (0, 16)


def test_the_numbers_are_those_of_plain_transformers(folder):
    """Mean over tokens, in half precision."""
    encoder = SentenceEncoder(folder, cache_dir="")
    model = AutoModel.from_pretrained(folder).eval()
    ids = encoder.model.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model(**{name: ids[name] for name in ("input_ids", "attention_mask")}).last_hidden_state.mean(dim=1)
    assert torch.allclose(encoder.embed(TEXTS[:1]), expected, rtol=1e-2, atol=1e-3)


def test_what_was_encoded_before_is_read_and_not_computed_again(folder, tmp_path):
    first = SentenceEncoder(folder, cache_dir=tmp_path)
    fresh = first.embed(TEXTS)
    again = silent(SentenceEncoder(folder, cache_dir=tmp_path))
    assert torch.equal(again.embed(TEXTS[::-1]), fresh.flip(0))
    assert torch.equal(silent(first).embed(TEXTS), fresh)
    assert torch.equal(SentenceEncoder(folder, cache_dir="").embed(TEXTS), fresh)


def test_two_instances_share_what_each_has_written(folder, tmp_path):
    one, other = (SentenceEncoder(folder, cache_dir=tmp_path) for _ in range(2))
    left, right = one.embed(TEXTS[:1]), other.embed(TEXTS[1:2])
    both = torch.cat([left, right])
    assert torch.equal(silent(one).embed(TEXTS[:2]), both)
    assert torch.equal(silent(other).embed(TEXTS[:2]), both)
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_a_killed_process_left_half_written_goes(folder, tmp_path):
    SentenceEncoder(folder, cache_dir=tmp_path).embed(TEXTS[:1])
    (shard,) = shards(tmp_path)
    dead, alive = 2**22 + 1, os.getpid()  # no process has a higher number than 2**22
    half = [shard.with_name(f".another.safetensors.{platform.node()}-{process}.tmp") for process in (dead, alive)]
    for file in half:
        file.write_bytes(b"")
    SentenceEncoder(folder, cache_dir=tmp_path).embed(TEXTS[:1])
    assert [file.exists() for file in half] == [False, True]


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-7])


def rename_keys(shard: Path) -> None:
    save_file({"names": load_file(shard)["keys"]}, shard)


@pytest.mark.parametrize("damage", [cut, rename_keys, lambda shard: shard.write_bytes(b"")])
def test_a_damaged_shard_is_encoded_again(folder, tmp_path, damage):
    fresh = SentenceEncoder(folder, cache_dir=tmp_path).embed(TEXTS)
    (shard,) = shards(tmp_path)
    damage(shard)
    assert torch.equal(SentenceEncoder(folder, cache_dir=tmp_path).embed(TEXTS), fresh)
    assert shard not in shards(tmp_path)
    assert torch.equal(silent(SentenceEncoder(folder, cache_dir=tmp_path)).embed(TEXTS), fresh)


def test_without_a_cache_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    SentenceEncoder(folder).embed(TEXTS)
    SentenceEncoder(folder, cache_dir="").embed(TEXTS)
    assert not list(tmp_path.iterdir())


def test_the_environment_names_the_cache_and_an_argument_beats_it(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "environment"))
    SentenceEncoder(folder).embed(TEXTS)
    assert len(shards(tmp_path / "environment")) == 1
    SentenceEncoder(folder, cache_dir=tmp_path / "argument").embed(TEXTS)
    assert len(shards(tmp_path / "argument")) == 1
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    SentenceEncoder(folder).embed(TEXTS)
    assert len(shards(tmp_path / "home" / ".cache" / "fractal_rm")) == 1


def test_models_that_compute_something_else_have_their_own_folder(folder, tmp_path):
    """Other weights, another precision, another pooling of equal weights, another length, another tokenizer."""
    encoders = [
        SentenceEncoder(folder, cache_dir=""),
        SentenceEncoder(save_encoder(tmp_path / "weights", seed=1), cache_dir=""),
        SentenceEncoder(folder, cache_dir="", dtype="bfloat16"),
        SentenceEncoder(save_encoder(tmp_path / "pooling", pooling="cls"), cache_dir=""),
    ]
    short = SentenceEncoder(save_encoder(tmp_path / "short"), cache_dir="")
    assert short.fingerprint == encoders[0].fingerprint  # the same model elsewhere shares
    short.model.max_seq_length = 8
    short.save(tmp_path / "shorter")
    other = SentenceEncoder(folder, cache_dir="")
    other.model.tokenizer.add_tokens(["14"])
    other.save(tmp_path / "tokenizer")
    encoders += [SentenceEncoder(tmp_path / name, cache_dir="") for name in ("shorter", "tokenizer")]
    assert len({encoder.fingerprint for encoder in encoders}) == len(encoders)


def test_half_precision_is_close_and_comes_back_as_it_was(folder, tmp_path):
    half = SentenceEncoder(folder, cache_dir=tmp_path / "cache", dtype="bfloat16")
    exact = SentenceEncoder(folder, cache_dir=tmp_path / "cache")
    assert half.model.dtype == torch.bfloat16
    assert torch.allclose(half.embed(TEXTS), exact.embed(TEXTS), atol=0.1)
    assert not torch.equal(half.embed(TEXTS), exact.embed(TEXTS))
    half.save(tmp_path / "saved")
    loaded = SentenceEncoder(tmp_path / "saved", cache_dir="")
    assert loaded.fingerprint == half.fingerprint
    assert torch.equal(loaded.embed(TEXTS), half.embed(TEXTS))


def test_a_long_job_shows_a_bar_and_a_short_one_does_not(folder, capsys, monkeypatch):
    encoder = SentenceEncoder(folder, cache_dir="")
    encoder.embed(TEXTS, progress=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("fractal_rm.scorers.sentence_encoder._CHUNK_TEXTS", 2)
    encoder.embed([f"{i}" for i in range(5)], progress=True)
    assert "Embedding 5 texts" in capsys.readouterr().out


def test_chunks_change_no_number(folder, tmp_path, monkeypatch):
    texts = [f"{i}+{i}={2 * i}" for i in range(7)]
    whole = SentenceEncoder(folder, cache_dir="").embed(texts)
    monkeypatch.setattr("fractal_rm.scorers.sentence_encoder._CHUNK_TEXTS", 3)
    parts = SentenceEncoder(folder, cache_dir=tmp_path).embed(texts)
    assert torch.allclose(parts, whole, atol=1e-2)
    assert len(shards(tmp_path)) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, ""),
        ({}, "it has no config.json"),
        ({"config.json": "{}"}, ""),
        ({"modules.json": "[", "config.json": "{}"}, "modules.json is invalid JSON"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(tmp_path, content, reason):
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    cannot = r" cannot be loaded as a sentence-transformers model \([^\n]+\)\. Give "
    said = r"[^\n]*" + reason if reason else cannot
    sentence = rf"\A{re.escape(str(path))}{said}[^\n]+\Z"
    with pytest.raises(ValueError, match=sentence):
        SentenceEncoder(path, cache_dir="")
