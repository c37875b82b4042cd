"""`fractal-rm doctor`: a line for each check, each planted fault named, and never a traceback."""

from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from support.models import byte_tokenizer, reward_model, wordpiece_tokenizer
from support.stand_ins import save_policy, save_reward_model, solutions, write_jsonl

from fractal_rm.cli import doctor
from fractal_rm.cli.examination import model_checks
from fractal_rm.cli.main import main
from fractal_rm.data.bag import Bag
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.ppo import contract
from fractal_rm.scorers.token import TokenScorer

# What is checked without a model, behind the versions.
OF_THE_MACHINE = ["python", "import", "trl names", "device", "bfloat16"]
OF_ROWS = ["models", "rows", "prompts", "segmentation", "tokenizer", "placement", "one pass", "plan"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A policy, a reward model, and rows."""
    folder = tmp_path_factory.mktemp("doctor")
    save_policy(folder / "policy")
    save_reward_model(folder / "rm", scorer="token", max_length=256)
    write_jsonl(folder / "rows.jsonl", solutions(4))
    return folder


@pytest.fixture(scope="module")
def bags() -> list[Bag]:
    return read_bags(solutions(4), Segmentation())


def examined(capsys, *argv: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit status, and for each check of models and rows how it ended and what it says."""
    status = main(["doctor", *argv])
    lines = [(line[:5].strip(), line[6:19].strip(), line[20:]) for line in capsys.readouterr().out.splitlines()]
    names = [name for _, name, _ in lines]
    return status, {name: (how, says) for how, name, says in lines[names.index("bfloat16") + 1 :]}


# Versions, names, device ----------------------------------------------------------------------------------------------


def test_without_a_model_versions_names_and_device_are_looked_at(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    *lines, more = lines
    assert [line[6:20].strip() for line in lines] == [*doctor.needed(), *OF_THE_MACHINE]
    assert all(line.startswith(("ok   ", "warn ")) for line in lines)
    assert more.startswith("`--model` and `--train_file` also check")
    assert set(list(doctor.needed())[:6]) == {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}


def test_a_version_out_of_range_fails_and_nothing_is_imported_after_it(monkeypatch, capsys):
    wanted = {"trl": Requirement("trl>=99"), "gone": Requirement("no-such-package>=1")}
    monkeypatch.setattr(doctor, "needed", lambda: wanted)
    assert main(["doctor"]) == 1
    trl, gone, python = capsys.readouterr().out.splitlines()
    assert trl.endswith("is installed, and fractal-rm needs >=99: pip install 'trl>=99'.")
    assert gone == "fail  gone          It is not installed. Install it: pip install 'no-such-package>=1'."
    assert python.startswith("ok    python")


def test_a_private_name_that_moved_fails(monkeypatch):
    monkeypatch.setitem(contract.METHODS, "_gone", ())
    contract.check_contract.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"`GRPOTrainer._gone` is gone.* `pip install 'trl>="):
            doctor.check_names()
    finally:
        contract.check_contract.cache_clear()


def test_a_trl_newer_than_any_that_was_tested_is_told(monkeypatch):
    monkeypatch.setattr(contract, "TESTED_TRL", ("0.1", "0.2"))
    assert doctor.check_names().status == "warn"


# Models and rows ------------------------------------------------------------------------------------------------------


def test_a_reward_model_and_its_rows_pass_every_check(models, capsys):
    argv = ["--model", str(models / "rm"), "--train_file", str(models / "rows.jsonl"), "--gpu", "24GB"]
    status, found = examined(capsys, *argv)
    assert (status, list(found)) == (0, OF_ROWS)
    assert {how for how, _ in found.values()} == {"ok"}, found
    assert "4 responses, 12 steps" in found["rows"][1]
    assert "12 steps score as the ends of their prefixes do" in found["one pass"][1]


def test_a_policy_with_a_reward_model_and_a_model_to_train_from_pass(models, capsys):
    rows = ["--train_file", str(models / "rows.jsonl"), "--gpu", "24GB"]
    for argv in (["--reward_model", str(models / "rm")], [], ["--reward_model", "none"]):
        status, found = examined(capsys, "--model", str(models / "policy"), *argv, *rows)
        assert status == 0
        assert {how for how, _ in found.values()} == {"ok"}, found
        assert ("one pass" in found) == (argv[1:] != ["none"])


def test_a_run_that_does_not_fit_and_rows_that_cannot_be_read_fail(models, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [*solutions(1), {"prompt": "q", "response": 3}])
    argv = ["--gpu", "1GB", "--per_device_train_batch_size", "32768"]
    status, found = examined(capsys, "--model", str(models / "rm"), "--train_file", rows, *argv)
    assert status == 1
    assert found["rows"][0] == found["plan"][0] == "fail"
    assert f"{rows}, row 2: 'response' is 3 (int)" in found["rows"][1]
    assert found["plan"][1].startswith("Does not fit:")
    assert list(found) == ["models", "rows", "plan"]


def test_a_damaged_model_fails_and_an_error_of_a_library_is_a_line(models, tmp_path, monkeypatch, capsys):
    status, found = examined(capsys, "--model", str(tmp_path / "gone"), "--gpu", "24GB")
    assert status == 1
    assert found["models"] == (
        "fail",
        f"There is no model folder {tmp_path / 'gone'}. Check the path, or give a hub id.",
    )
    monkeypatch.setattr(model_checks, "read_bags", lambda *_, **__: {}["lost"])
    argv = ["--train_file", str(models / "rows.jsonl"), "--gpu", "24GB"]
    status, found = examined(capsys, "--model", str(models / "rm"), *argv)
    assert status == 1
    assert found["rows"][1].startswith("An error of a library ended the check (KeyError: 'lost').")


def test_prompts_alone_and_no_rows_are_told(models, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1?"}])
    status, found = examined(capsys, "--model", str(models / "rm"), "--train_file", rows, "--gpu", "24GB")
    assert (status, found["rows"][0], found["prompts"][0]) == (0, "warn", "ok")
    status, found = examined(capsys, "--model", str(models / "rm"), "--gpu", "24GB")
    assert (status, found["rows"][0], list(found)) == (0, "warn", ["models", "rows", "plan"])


def test_rows_without_a_model_are_refused(models, capsys):
    assert main(["doctor", "--train_file", str(models / "rows.jsonl")]) == 2
    assert "checked together with a `model`. Give one." in capsys.readouterr().err


# Planted faults -------------------------------------------------------------------------------------------------------


def test_prompts_that_the_reward_model_cannot_read_fail():
    model = reward_model("token", "llama", max_length=8)
    patients = model_checks.Patients(model, model.tokenizer, model.scorer.base.config)
    with pytest.raises(ValueError, match=r"cannot read 1 of the first 2 prompts\. row 1: the prompt has 40 tokens"):
        model_checks.check_prompts(patients, ["q", "q" * 40])
    with pytest.raises(ValueError, match="no chat template"):
        model_checks.check_prompts(patients, [[{"role": "user", "content": "q"}]])


def test_steps_that_the_model_would_cut_elsewhere_are_told():
    found = read_bags([{"prompt": "q", "steps": ["1\n2", "3"], "label": 1}] * 2, Segmentation())
    says = model_checks.check_segmentation(found, Segmentation())
    assert says.status == "warn"
    assert says.says.startswith("2 of 2 responses (first: number 1) have other steps than `segmentation=lines` cuts")


def test_a_tokenizer_that_loses_characters_is_told(bags):
    told = model_checks.check_round_trip(
        [*bags, Bag("q", "A = B", ((0, 5),), None)], wordpiece_tokenizer(), "the model"
    )
    assert told.status == "warn"
    assert "changes 5 of 5 responses" in told.says
    assert model_checks.check_round_trip(bags, byte_tokenizer(merges=True), "the model").status == "ok"


def test_a_reward_on_the_token_after_its_step_fails(bags, monkeypatch):
    tokenizer, ends = byte_tokenizer(merges=True), model_checks.step_end_tokens
    assert "rewards of 12 steps" in model_checks.check_placement(bags, tokenizer, Segmentation()).says
    for shift in (-1, 1):
        moved = lambda *given, shift=shift: [end + shift for end in ends(*given)]  # noqa: E731
        monkeypatch.setattr(model_checks, "step_end_tokens", moved)
        with pytest.raises(ValueError, match=r"Response 1: the reward of step 1 is placed on token \d+, which"):
            model_checks.check_placement(bags, tokenizer, Segmentation())
    monkeypatch.setattr(model_checks, "step_end_tokens", lambda *given: [None, *ends(*given)[1:]])
    with pytest.raises(ValueError, match="the reward of step 1 is placed on no token"):
        model_checks.check_placement(bags, tokenizer, Segmentation())


def test_a_model_that_looks_ahead_fails(bags, monkeypatch):
    model = reward_model("token", "llama")
    assert "12 steps score" in model_checks.check_one_pass(bags, model).says
    forward = TokenScorer.forward
    ahead = lambda self, **batch: forward(self, **batch) + 0.01 * batch["attention_mask"].sum(1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(TokenScorer, "forward", ahead)
    with pytest.raises(ValueError, match=r"Response \d: step 1 scores differently in one pass"):
        model_checks.check_one_pass(bags, model)
    nan = lambda self, **batch: forward(self, **batch) * torch.nan  # noqa: E731
    monkeypatch.setattr(TokenScorer, "forward", nan)
    with pytest.raises(ValueError, match="logits differ by nan"):
        model_checks.check_one_pass(bags, model)


def test_encoders_and_responses_that_are_cut_are_told_apart(bags):
    assert model_checks.check_one_pass(bags, reward_model("token", "bert")).says.startswith("Does not apply")
    cut = model_checks.check_one_pass(bags, reward_model("token", "llama", max_length=70))
    assert (cut.status, cut.says[:21]) == ("warn", "1 of 4 responses exce")
    with pytest.raises(ValueError, match="Response 1: prompt and first step exceed `max_length`"):
        model_checks.check_one_pass(bags, reward_model("token", "llama", max_length=40))
