"""Runs that are killed with SIGKILL and resumed, against the run that never was; and checkpoints that are not whole."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.stand_ins import write_jsonl
from support.step_ppo import RESUMABLE, logs, make, reward_model, same, weights

from benchmarks import faults
from benchmarks.speed import kill_and_resume as benchmark
from fractal_rm.hf.checkpoints import STATE, fault, find_checkpoint, last_checkpoint
from fractal_rm.hf.manifest import MANIFEST, changes, write_manifest

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = 6


@pytest.mark.parametrize(("kind", "kills"), [("step_ppo", 3), ("fractal", 2)])
def test_a_run_that_was_killed_equals_one_that_never_was(tmp_path, kind, kills):
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(kind)
    seconds = benchmark.finish(kind, whole, STEPS)
    found = []
    for number in range(kills):  # while a checkpoint is written, and whenever
        after, in_save = rng.uniform(0.2, 0.8) * seconds * (number % 2), number % 2 == 0
        found.append(benchmark.kill(kind, killed, STEPS, after=after, in_save=in_save))
    assert found[0] == {"killed": True, "checkpoint_step": 0, "checkpoint_torn": True}
    benchmark.finish(kind, killed, STEPS)
    last = f"checkpoint-{STEPS}"
    assert benchmark.differences(killed / last, whole / last) == []
    names = {path.name for path in (whole / last).rglob("*")}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE} <= names
    assert kind == "fractal" or {"value_model", "step_ppo_state.json"} <= names


def test_the_comparison_sees_one_bit_in_any_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "value_model").mkdir(parents=True)
        (tmp_path / name / STATE).write_text(json.dumps({"log_history": [{"loss": 1.0, "step_time": ord(name)}]}))
        (tmp_path / name / "value_model" / "model.safetensors").write_bytes(b"\x00\x01")
    compare = benchmark.differences
    assert compare(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / "value_model" / "model.safetensors").write_bytes(b"\x00\x00")
    (tmp_path / "b" / "replay.safetensors").write_bytes(b"")
    (tmp_path / "b" / STATE).write_text('{"log_history": [{"loss": 2.0}]}')
    expected = ["replay.safetensors", "value_model/model.safetensors", STATE]
    assert compare(tmp_path / "a", tmp_path / "b") == expected


# Which checkpoint is whole --------------------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int, content: str | None = None) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "value_model").mkdir(parents=True)
    (path / STATE).write_text(json.dumps({"global_step": step, "log_history": []}) if content is None else content)
    (path / "value_model" / "model.safetensors").write_bytes(b"0123")
    write_manifest(path, {"seed": 0}, (path / STATE, path / "value_model" / "model.safetensors"))
    return path


def test_the_last_checkpoint_is_the_last_that_is_whole(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "not there") is None
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 10)
    (checkpoint(tmp_path, 12) / STATE).unlink()
    (tmp_path / "checkpoint-14").mkdir()  # not finished: no manifest yet
    checkpoint(tmp_path, 16, json.dumps({"global_step": 12}))  # of another step
    checkpoint(tmp_path, 18, "")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert find_checkpoint(True, tmp_path, {}) == str(tmp_path / "checkpoint-10")
    assert [find_checkpoint(nothing, tmp_path, {}) for nothing in (None, False, "")] == [None] * 3
    named = [record.getMessage() for record in caplog.records[:3]]
    assert all(f"checkpoint-{step} is damaged" in text for step, text in zip((18, 16, 12), named, strict=True))


@pytest.mark.parametrize("name", [STATE, "value_model/model.safetensors", MANIFEST])
@pytest.mark.parametrize("harm", ["cut", "empty", "garbage", "missing"])
def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path, name, harm):
    path = checkpoint(tmp_path, 3)
    assert fault(path) is None
    content = (path / name).read_bytes()
    changed = {"cut": content[:-2], "empty": b"", "garbage": b"\xff" + content[1:], "missing": b""}[harm]
    (path / name).write_bytes(changed)
    if harm == "missing":
        (path / name).unlink()
    assert name in str(fault(path))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"run": [], "files": {}}',
        '{"run": {}, "files": []}',
        '{"run": {}, "files": {"a": 3}}',
        '{"run": {}, "files": {"a": {"bytes": "1"}}}',
        "[" * 9000,
        "\udcff",
    ],
)
def test_a_manifest_of_another_shape_is_one_that_cannot_be_read(tmp_path, content):
    path = checkpoint(tmp_path, 3)
    (path / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    assert fault(path) == "its manifest.json is missing or cannot be read"


def test_a_part_of_a_checkpoint_is_refused_by_its_name(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-4 is not a complete checkpoint: its manifest\.json is missing"):
        find_checkpoint(tmp_path / "checkpoint-4", tmp_path, {})
    with pytest.raises(ValueError, match=r"holds no complete checkpoint\. Start without `resume_from_checkpoint`"):
        find_checkpoint(True, tmp_path, {})
    (checkpoint(tmp_path, 4) / STATE).write_text("")
    with pytest.raises(
        ValueError, match=r"no complete checkpoint: checkpoint-4 is damaged \(trainer_state\.json has 0 of"
    ):
        find_checkpoint(True, tmp_path, {})


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match=r"checkpoint-4 belongs to another run: `seed` was 0 and is 1\."):
        find_checkpoint(True, tmp_path, {"seed": 1})


def test_an_identity_of_another_shape_differs():
    assert changes({"max_steps": "x"}, {"max_steps": 4}) == ["`max_steps` was 'x' and is 4"]
    assert changes({"max_steps": None}, {"max_steps": 4}) == ["`max_steps` was None and is 4"]


def test_state_and_manifest_are_written_after_everything_else(tmp_path, monkeypatch):
    written: list[Any] = []
    trainer = make(tmp_path, reward_model=reward_model(), max_steps=4, save_total_limit=1, **RESUMABLE)
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: written.append("everyone is here"))
    save = trainer.state.save_to_json

    def saved(path: str) -> None:
        assert trainer.args.save_total_limit is None  # until this checkpoint is whole
        assert (tmp_path / "checkpoint-2").is_dir()
        written.append(sorted(file.name for file in Path(path).parent.iterdir()))
        save(path)

    monkeypatch.setattr("transformers.TrainerState.save_to_json", lambda self, path: saved(path))
    trainer.train()
    before = written.index("everyone is here")
    assert {"optimizer.pt", "rng_state.pth", "step_ppo_state.json", "value_model"} <= set(written[before + 1])
    assert not {STATE, MANIFEST} & set(written[before + 1])
    held = json.loads((tmp_path / "checkpoint-4" / MANIFEST).read_text())["files"]
    assert {STATE, "value_model/model.safetensors", "pending_logs.json"} <= held.keys()
    assert trainer.args.save_total_limit == 1
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_run_that_was_killed_after_its_last_checkpoint_makes_no_step_more(tmp_path):
    shared = {"reward_model": reward_model(), "max_steps": 4, **RESUMABLE}
    whole = make(tmp_path, **shared)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = make(tmp_path, **shared)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == again.state.global_step == 4
    assert again.rollouts == []
    assert same(weights(again.model), weights(whole.model))
    assert same(weights(again.value_model), weights(whole.value_model))
    assert logs(again) == logs(whole)
    longer = make(tmp_path, **shared | {"max_steps": 6})
    longer.train(resume_from_checkpoint=True)
    assert (longer.state.global_step, len(longer.rollouts)) == (6, 1)


def test_the_checkpoints_to_go_back_to_are_resumed(tmp_path):
    shared = {"reward_model": reward_model(), "on_alarm": "rollback", "max_steps": 4, **RESUMABLE}
    whole = make(tmp_path, **shared)
    whole.train()
    assert sorted(whole.alarms.checkpoints) == [2, 4]
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make(tmp_path, **shared)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.alarms.checkpoints == whole.alarms.checkpoints


def test_the_benchmark_of_commands_sees_other_weights_doubled_rows_and_what_is_left_over(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    row = {"metrics": {"accuracy": 0.5}, "seconds": 1.0, "arm": "a"}
    for folder in (killed, whole):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        write_jsonl(folder / "responses.jsonl", [row | {"seconds": float(folder == killed)}])
    nothing = {"weights": [], "rows": [], "left_over": []}
    assert faults.differences("sample", killed, whole) == nothing
    (killed / "model.safetensors").write_bytes(b"weighty")
    write_jsonl(killed / "responses.jsonl", [row, row])
    (killed / "a.partial").touch()
    found = faults.differences("sample", killed, whole)
    assert found["weights"] == ["model.safetensors"]
    assert len(found["rows"]) == 1
    assert found["left_over"] == ["a.partial"]
