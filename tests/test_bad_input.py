"""Bad input: one sentence that says what, where and what to do; exit status 2; nothing trained, nothing written."""

import errno
import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from filelock import FileLock
from support.stand_ins import (
    byte_tokenizer,
    gsm8k_problems,
    save_encoder,
    save_policy,
    save_reward_model,
    solutions,
    tiny_config,
    write_jsonl,
)
from transformers import LlamaModel

from fractal_rm.cli.main import main, sentence
from fractal_rm.cli.options.parser import parse
from fractal_rm.cli.ppo import make_dataset
from fractal_rm.cli.serve import ServeArguments
from fractal_rm.files import locked
from fractal_rm.ppo.checks import check_reward_models
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers.embedding import make_head
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.serving.limits import Limits
from fractal_rm.tasks.arithmetic.problems import make_problems

GOOD = {"prompt": "1+1?\n", "completion": "1+1=2.", "label": 1}
BAD = {"prompt": "1+1?\n", "completion": "1+1=3.", "label": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with policies and reward models, with and without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    save_policy(folder / "policy")
    save_policy(folder / "chat_policy", chat=True)
    save_reward_model(folder / "reward_model")
    return folder


class Commands:
    """Runs commands that must fail, and returns their one line on standard error."""

    def __init__(self, folder: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.models, self.capsys = folder, models, capsys
        self.output = folder / "out"

    def file(self, content: list | bytes, name: str = "rows.jsonl") -> str:
        if isinstance(content, bytes):
            (self.folder / name).write_bytes(content)
            return str(self.folder / name)
        return write_jsonl(self.folder / name, content)

    def fails(self, *arguments: str) -> str:
        before = self.tree()
        assert main(list(arguments)) == 2
        captured = self.capsys.readouterr()
        assert captured.err.startswith("fractal-rm: ")
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.rstrip().endswith((".", ")", "?")), captured.err
        assert captured.out == ""
        assert self.tree() == before
        return captured.err

    def tree(self) -> list[tuple[str, bytes | None]]:
        files = sorted(self.folder.rglob("*"))
        return [(str(path), path.read_bytes() if path.is_file() else None) for path in files]

    def train(self, content: list | bytes, *flags: str, model: str = "policy", name: str = "rows.jsonl") -> str:
        arguments = ["--model", str(self.models / model), "--output_dir", str(self.output), "--use_cpu"]
        return self.fails("train", *arguments, "--train_file", self.file(content, name), *flags)

    def score(self, content: list | bytes, *flags: str, model: str = "reward_model") -> str:
        arguments = ["--model", str(self.models / model), "--output", str(self.output / "scores.jsonl")]
        return self.fails("score", *arguments, "--input", self.file(content), *flags)

    def ppo(self, *flags: str, model: str = "policy") -> str:
        arguments = ["--model", str(self.models / model), "--output_dir", str(self.output), "--use_cpu"]
        return self.fails("ppo", *arguments, "--bf16", "false", *flags)


@pytest.fixture
def commands(tmp_path, models, capsys) -> Commands:
    return Commands(tmp_path, models, capsys)


ROWS = {
    "a missing response": (
        [GOOD, {"prompt": "1+1?", "label": 1}],
        2,
        "there is no response (found: 'prompt', 'label')",
    ),
    "a missing label": ([GOOD, {"prompt": "1+1?", "completion": "2"}], 2, "column 'label' is missing"),
    "a missing prompt": ([GOOD, {"completion": "2", "label": 1}], 2, "column 'prompt' is missing"),
    "a response that is a number": ([GOOD | {"completion": 2}, BAD], 1, "is 2 (int), not text"),
    "a label that is a text": ([GOOD, BAD | {"label": "good"}], 2, "'good' (str)"),
    "steps that are a text": ([{"prompt": "1+1?", "steps": "1+1=2.", "label": 1}], 1, "'steps' is str"),
    "an empty response": ([GOOD, BAD | {"completion": " \n"}], 2, "the response is empty"),
    "a label above 1": ([GOOD, BAD | {"label": 3}], 2, "the label is 3, outside [0, 1]"),
    "a label that is NaN": ([GOOD, BAD | {"label": float("nan")}], 2, "the label is NaN"),
    "too few step labels": (
        [{"prompt": "1+1?", "steps": ["1+1=2.", "So 2."], "step_labels": [1], "label": 1}],
        1,
        "there are 1 step labels for 2 steps",
    ),
    "prompts of two types": (
        [GOOD, BAD | {"prompt": [{"role": "user", "content": "1+1?"}]}],
        2,
        "the prompt is a chat but that of row 1 is text",
    ),
    "another aggregation": ([GOOD, BAD | {"aggregation": "max"}], 2, "the label is the max of its steps"),
    "a row that is a list": ([GOOD, [1, 2]], 2, "the row is list"),
}


@pytest.mark.parametrize("defect", ROWS)
@pytest.mark.parametrize("role", ["train", "eval", "test"])
def test_a_bad_row_is_named_before_training(commands, defect, role):
    rows, number, sentence = ROWS[defect]
    if role == "train":
        said = commands.train(rows)
        assert f"rows.jsonl, row {number}: " in said
    else:
        said = commands.train([GOOD, BAD], f"--{role}_file", commands.file(rows, "other.jsonl"))
        assert f"other.jsonl, row {number}: " in said
    assert sentence in said


def test_invalid_json_is_named_with_its_row(commands):
    said = commands.train(json.dumps(GOOD).encode() + b'\n{"prompt": "1+1?",\n')
    assert "rows.jsonl, row 2: the line is invalid JSON" in said


def test_bytes_that_are_no_utf_8_are_named_with_their_row(commands):
    said = commands.train(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert "rows.jsonl, row 2: the line is not UTF-8" in said


def test_an_empty_file_is_named(commands):
    assert "rows.jsonl is empty" in commands.train(b"")


def test_a_file_that_is_not_there_is_named(commands):
    said = commands.fails(
        "train", "--model", str(commands.models / "policy"), "--train_file", "none.jsonl", "--output_dir", "out"
    )
    assert "none.jsonl is not a file" in said


def test_labels_that_are_all_equal_are_a_warning_with_the_consequence(commands):
    arguments = ["--model", str(commands.models / "policy"), "--output_dir", str(commands.output), "--use_cpu"]
    arguments += ["--train_file", commands.file([GOOD, GOOD]), "--max_steps", "1", "--save_strategy", "no"]
    with pytest.warns(UserWarning, match="All 2 responses have the label 1: the reward model can only learn"):
        assert main(["train", *arguments, "--disable_tqdm", "true"]) == 0


def test_nothing_to_train_on_is_said(commands):
    said = commands.fails("train", "--model", str(commands.models / "policy"), "--output_dir", str(commands.output))
    assert "Give `train_file` or `dataset_name`" in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'. Did you mean `learning_rate`?"),
        ("agregation: max", "unknown key 'agregation'. Did you mean `aggregation`?"),
        ("qqqqqq: 1", "unknown key 'qqqqqq'. See `fractal-rm train --help`."),
        ("env: {TOKEN: 1}", "unknown key 'env'."),
        ("learning_rate: fast", "`learning_rate` is 'fast', which is not of type float"),
        ("max_steps: 1.5", "`max_steps` is 1.5, which is not of type int"),
        ("max_steps: true", "`max_steps` is True, which is not of type int"),
        ("use_peft: perhaps", "`use_peft` is 'perhaps', which is not of type bool"),
        ("scorer: head", "`scorer` is 'head'. Choose one of likelihood, token, embedding."),
        ("max_steps: [1, 2]", "`max_steps` is [1, 2]; give a single value"),
        ("max_steps:", "`max_steps` is None; give a single value"),
        ("- max_steps", "does not hold a mapping"),
        ("max_steps: [1\nlimit: 2", "line 2 is invalid YAML"),
        ("max_length: 1", "`max_length` is 1. Give a whole number from 2"),
        ("bag_weight: 0", "`bag_weight`, `instance_weight` and `easyllp_weight` are all 0"),
        ("limit: 0", "`limit` is 0. Give a whole number from 1"),
    ],
)
def test_a_mistake_in_the_configuration_file_is_named(commands, text, sentence):
    config = commands.file(text.encode(), "config.yaml")
    said = commands.train([GOOD, BAD], "--config", config)
    assert sentence in said
    if "`" not in sentence.partition("Did")[0]:  # values of several keys together are the configuration's to judge
        assert "config.yaml" in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learning-rat", "1"], "unknown flag --learning-rat. Did you mean `learning_rate`?"),
        (["--learning_rat=1"], "unknown flag --learning_rat. Did you mean `learning_rate`?"),
        (["--max_steps", "many"], "`max_steps` is 'many'. Give a whole number"),
        (["--scorer", "head"], "fractal-rm: train: `scorer` is 'head'. Choose one of likelihood, token, embedding."),
        (["stray"], "'stray' has no flag before it"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "none.yaml"], "There is no file none.yaml."),
        (["--lora_r"], "expected one argument"),
        (["--resume_from_checkpoint", "nowhere"], "There is no checkpoint nowhere."),
        (["--data_dir", "nowhere"], "nowhere, from `data_dir`, is not a folder"),
    ],
)
def test_a_mistake_in_a_flag_is_named(commands, flags, sentence):
    assert sentence in commands.train([GOOD, BAD], *flags)


def read_value(folder: Path, name: str, text: str, *, in_file: bool) -> Any:
    """What a command reads of a text, given by a flag or a key."""
    (folder / "c.yaml").write_text(f"{name}: {json.dumps(text)}\n", encoding="utf-8")
    flags = ["--config", str(folder / "c.yaml")] if in_file else [f"--{name}={text}"]
    return getattr(parse("serve", [Limits], flags)[0], name)


@pytest.mark.parametrize("in_file", [False, True])
def test_numbers_are_read_as_they_are_meant_or_refused(tmp_path, in_file):
    whole = {"5e3": 5000, "5.0": 5, "+5": 5, " 7 ": 7, "1_000": 1000, "007": 7, "5e0": 5, "12345678901": None}
    broken = {"5e-1": 0.5, ".5": 0.5, "5.": 5.0, "+1e1": 10.0}
    for name, texts in (("max_values", whole), ("seconds", broken)):
        for text, value in texts.items():
            if value is None:
                with pytest.raises(ValueError, match=rf"`{name}` is {text}\. Give a whole number"):
                    read_value(tmp_path, name, text, in_file=in_file)
                continue
            found = read_value(tmp_path, name, text, in_file=in_file)
            assert (found, type(found)) == (value, type(value))
        for text in ("1_0", "\u0661\u0662", "0x10", "1,000", "", " ", "true", "1 0", "_1", "1__000", "1e", "\uff15"):
            with pytest.raises(ValueError, match=r"not of type (int|float)|invalid (int|float) value"):
                read_value(tmp_path, name, text, in_file=in_file)
    for text in ("1e400", "nan", "5.5"):
        with pytest.raises(ValueError, match=r"not of type int|invalid int value"):
            read_value(tmp_path, "max_values", text, in_file=in_file)


def test_texts_are_not_empty_and_not_numbers_that_lost_a_digit(tmp_path):
    serve = [ServeArguments]
    with pytest.raises(ValueError, match=r"--token_file/--token-file: invalid non-empty text value: ''"):
        parse("serve", serve, ["--model", "m", "--token_file", ""])
    with pytest.raises(ValueError, match=r"`wait` is -1e-05\. Give a number from 0"):
        parse("serve", serve, ["--model", "m", "--wait", "-1e-5"])
    for text, told in {
        "host: 1.10": "`host` is the number 1.1. Put a text in quotes.",
        "host: ''": "`host` is '', which is not of type non-empty text",
        "port: 8_0": "line 1 is invalid YAML: `8_0` is not a decimal number",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=re.escape(told)):
            parse("serve", serve, ["--model", "m", "--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("host: '1.10'\nport: 8_000\nbatch_size: 1e1")
    (found,) = parse("serve", serve, ["--model", "m", "--config", str(tmp_path / "c.yaml")])
    assert (found.host, found.port, found.batch_size) == ("1.10", 8000, 10)


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("score", ["--limit", "0"], "`limit` is 0. Give a whole number from 1"),
        ("score", ["--limit", "-1"], "`limit` is -1. Give a whole number from 1"),
        ("score", ["--batch_size", "0"], "`batch_size` is 0. Give a whole number from 1"),
        ("score", ["--show", "-1"], "`show` is -1. Give a whole number from 0"),
        ("score", ["--html", "out.jsonl"], "`input`, `output` and `html` name one file twice"),
        ("evaluate", ["--limit", "-1"], "`limit` is -1. Give a whole number from 1"),
        ("evaluate", ["--outcome_model", "rm"], "`outcome_model` has an effect only with `benchmark=best_of_n`"),
        ("evaluate", ["--answer_pattern", "(.*)"], "`answer_pattern` has an effect only with `benchmark=best_of_n`"),
        ("evaluate", ["--tune_on", "math"], "`tune_on` has an effect only with `benchmark=processbench`"),
        ("evaluate", ["--output", "in.jsonl"], "`data` and `output` name one file twice"),
        (
            "evaluate",
            ["--benchmark", "best_of_n", "--threshold_file", "x"],
            "`threshold_file` has no effect with `benchmark=best_of_n`",
        ),
    ],
)
def test_an_option_that_cannot_be_meant_is_named_before_anything_is_read(commands, command, flags, sentence):
    files = ["--input", "in.jsonl", "--output", "out.jsonl"] if command == "score" else ["--data", "in.jsonl"]
    assert sentence in commands.fails(command, "--model", "nowhere", *files, *flags)


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("ppo", ["--label_column", "x"], "`label_column` has no effect in `fractal-rm ppo`"),
        ("ppo", ["--test_file", "x.jsonl"], "`test_file` has no effect in `fractal-rm ppo`"),
        ("ppo", ["--num_problems", "3"], "`num_problems` is 3, but has an effect only with the task arithmetic"),
        ("ppo", ["--answers", "last_number"], "`answers` has an effect only with `reward_function=gsm8k_answer`"),
        ("sample", ["--eval_file", "x.jsonl", "--output", "o"], "`eval_file` has no effect in `fractal-rm sample`"),
        ("sample", ["--train_file", "o.jsonl", "--output", "o.jsonl"], "`train_file` and `output` name one file twice"),
        ("train", ["--dataset_config", "main"], "`dataset_config` has no effect without `dataset_name`"),
        ("report", ["--results", "a.md", "--output", "a.md"], "`results`, `output` and `figure` name one file twice"),
    ],
)
def test_an_option_that_a_command_does_not_read_is_refused(commands, command, flags, sentence):
    model = [] if command == "report" else ["--model", "nowhere"]
    assert sentence in commands.fails(command, *model, *flags)


def test_a_required_argument_is_named(commands):
    assert "the following arguments are required: --model" in commands.fails("train")


def test_an_unknown_command_is_answered_with_the_nearest(commands):
    assert "Unknown command 'trian'. Did you mean `train`?" in commands.fails("trian")
    assert "Choose one of quickstart, doctor, plan, sample, train," in commands.fails("dance")


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 2
    assert "\n  train       Train a step reward model from response labels.\n" in capsys.readouterr().err


def test_the_environments_data_folder_that_is_not_there_is_named(commands, monkeypatch):
    monkeypatch.setenv("FRACTAL_RM_DATA", "nowhere")
    assert "nowhere, from the environment variable FRACTAL_RM_DATA, is not a folder" in commands.train([GOOD, BAD])


def test_a_data_set_without_the_training_split_is_named(commands):
    write_jsonl(commands.folder / "sums" / "test.jsonl", solutions(3))
    arguments = ["--model", str(commands.models / "policy"), "--output_dir", str(commands.output)]
    said = commands.fails("train", *arguments, "--dataset_name", "sums", "--data_dir", str(commands.folder))
    assert "sums has no split 'train'" in said
    assert "Set `dataset_train_split`." in said


def test_a_data_set_that_the_hub_does_not_have_is_named(commands):
    arguments = ["--model", str(commands.models / "policy"), "--output_dir", str(commands.output)]
    said = commands.fails("train", *arguments, "--dataset_name", "nobody/nothing")
    assert "The data set nobody/nothing cannot be loaded from the hub" in said
    assert "FRACTAL_RM_DATA" in said


def test_a_folder_that_is_no_model_is_named(commands):
    (commands.folder / "empty").mkdir()
    said = commands.train([GOOD, BAD], "--model", str(commands.folder / "empty"))
    assert "empty is not a model folder: it has no config.json" in said


def test_a_model_of_the_wrong_kind_is_named(commands):
    (commands.folder / "t5").mkdir()
    (commands.folder / "t5" / "config.json").write_text('{"model_type": "t5"}')
    byte_tokenizer().save_pretrained(commands.folder / "t5")
    said = commands.train([GOOD, BAD], "--model", str(commands.folder / "t5"))
    assert "cannot be loaded as an AutoModelForCausalLM for the likelihood scorer" in said


def test_a_config_json_that_is_broken_is_named(commands):
    (commands.folder / "broken").mkdir()
    (commands.folder / "broken" / "config.json").write_text("{")
    said = commands.train([GOOD, BAD], "--model", str(commands.folder / "broken"))
    assert str(commands.folder / "broken") in said


def test_a_model_path_that_is_not_there_is_named(commands):
    assert "There is no model folder runs/none." in commands.train([GOOD, BAD], "--model", "runs/none")


def test_chats_for_a_tokenizer_without_a_chat_template_are_refused(commands):
    said = commands.train(solutions(6, chat=True))
    assert "The prompts are chats, but the tokenizer" in said
    assert "has no chat template" in said


@pytest.mark.parametrize("split", ["eval", "test"])
def test_texts_to_train_on_and_chats_to_measure_on_are_refused_before_training(commands, split):
    chats = commands.file(solutions(3, chat=True), "chats.jsonl")
    said = commands.train(solutions(6), f"--{split}_file", chats, model="chat_policy")
    assert "chats.jsonl: the prompts are chats, but those of" in said
    assert "rows.jsonl are texts" in said


@pytest.mark.parametrize("place", ["file", "file/deeper", "folder"])
def test_an_output_folder_that_cannot_be_written_is_found_first(commands, place):
    (commands.folder / "file").write_text("")
    output = "/proc/fractal" if place == "folder" else str(commands.folder / place)
    if place == "folder" and not sys.platform.startswith("linux"):
        pytest.skip("/proc is a folder of Linux that nobody can write")
    # The rows are bad as well: they were not even read.
    said = commands.train([{}], "--output_dir", output)
    assert f"The output folder {output} cannot be written (" in said
    assert "Choose another one." in said


def test_an_output_file_that_is_a_folder_is_found_first(commands):
    said = commands.score([{}], "--output", str(commands.folder))
    assert f"The output {commands.folder} is a folder." in said


# Scoring ----------------------------------------------------------------------------------------------------------


def test_a_bad_row_spoils_no_other(commands, capsys):
    rows = [
        {"prompt": "1+1?\n", "response": "1+1=2."},
        {"prompt": "1+2?\n", "response": "  "},
        {"id": "third", "prompt": "1+3?\n", "steps": ["1+3=4."]},
        {"prompt": "1+4?\n"},
    ]
    output = commands.folder / "scores.jsonl"
    arguments = ["--model", str(commands.models / "reward_model"), "--input", commands.file(rows)]
    page = commands.folder / "view.html"
    assert main(["score", *arguments, "--output", str(output), "--html", str(page)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["row"] for record in records] == [1, 2, 3, 4]
    assert [record["error"] is None for record in records] == [True, False, True, False]
    assert [record["score"] is None for record in records] == [False, True, False, True]
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert len(said) == 2
    assert "rows.jsonl, row 2: the response is empty" in said[0]
    assert "rows.jsonl, row 4: there is no response" in said[1]
    assert "Scored 2 of 4 responses" in captured.out
    assert "row 2: the response is empty" in page.read_text()


def test_a_file_without_a_good_row_is_refused(commands):
    said = commands.score([{"prompt": "1+1?"}, {"response": "2"}])
    assert "None of 2 responses could be scored. First: " in said
    assert "rows.jsonl, row 1: there is no response" in said


def test_chats_for_a_reward_model_without_a_chat_template_are_refused(commands):
    said = commands.score(solutions(3, chat=True))
    assert "rows.jsonl, row 1: " in said
    assert "no chat template" in said


def test_a_response_that_does_not_fit_is_reported_with_its_row(commands, capsys):
    save_reward_model(commands.folder / "short", max_length=20)
    rows = [{"prompt": "1?\n", "response": "1."}, {"prompt": "1?\n", "response": "one " * 20}]
    output = commands.folder / "scores.jsonl"
    arguments = ["--model", str(commands.folder / "short"), "--input", commands.file(rows), "--output", str(output)]
    assert main(["score", *arguments]) == 0
    assert "rows.jsonl, row 2: the prompt and the first step exceed" in capsys.readouterr().err


def test_a_model_that_is_no_reward_model_is_refused(commands):
    assert "is a model but not a step reward model" in commands.score([GOOD], model="policy")


def test_a_reward_model_with_another_tokenizer_is_refused(commands):
    folder = commands.folder / "other_tokenizer"
    save_reward_model(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    assert "is not the one the model was trained with (fingerprint " in commands.score([GOOD], "--model", str(folder))


def test_a_reward_model_without_its_head_is_refused(commands):
    folder = commands.folder / "headless"
    save_reward_model(folder, scorer="token")
    config = (folder / "config.json").read_text()
    LlamaModel(tiny_config(byte_tokenizer())).save_pretrained(folder)
    (folder / "config.json").write_text(config)
    assert "weights are missing from the folder and would be random" in commands.score([GOOD], "--model", str(folder))


def test_a_reward_model_of_an_unknown_version_is_refused(commands):
    folder = commands.folder / "future"
    save_reward_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["fractal"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    assert "the `fractal` block has format version 99" in commands.score([GOOD], "--model", str(folder))


# Evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_data_with_another_aggregation_are_refused(commands):
    data = commands.file([GOOD, BAD | {"aggregation": "mean"}])
    arguments = ["--model", str(commands.models / "reward_model"), "--output", str(commands.folder / "m.json")]
    said = commands.fails("evaluate", *arguments, "--data", data)
    assert "rows.jsonl, row 2: the label is the mean of its steps, but `aggregation` is 'min'" in said


def test_evaluation_data_without_labels_are_refused(commands):
    data = commands.file([{"prompt": "1+1?", "response": "2"}])
    arguments = ["--model", str(commands.models / "reward_model"), "--output", str(commands.folder / "m.json")]
    assert "rows.jsonl, row 1: column 'label' is missing" in commands.fails("evaluate", *arguments, "--data", data)


# PPO --------------------------------------------------------------------------------------------------------------


def test_ppo_without_a_reward_is_refused(commands):
    assert "There is no reward." in commands.ppo("--task", "arithmetic")


def test_ppo_without_prompts_is_refused(commands):
    assert "There are no prompts." in commands.ppo("--reward_function", "gsm8k_answer")


def test_ppo_says_how_to_get_the_models_of_the_quickstart(commands):
    said = commands.ppo("--task", "arithmetic", "--reward_model", "runs/quickstart/none")
    assert "There is no model folder runs/quickstart/none. Run `make quickstart` first" in said


def test_group_advantages_of_single_completions_are_refused(commands):
    said = commands.ppo(
        "--task", "arithmetic", "--reward_function", "exact_answer", "--advantage", "group", "--num_generations", "1"
    )
    assert "`num_generations` is 1" in said


def test_a_task_that_makes_its_problems_takes_no_file(commands):
    arguments = ["--task", "arithmetic", "--reward_function", "exact_answer"]
    said = commands.ppo(*arguments, "--train_file", commands.file(gsm8k_problems(2)))
    assert "`task=arithmetic` makes its own prompts" in said


def test_chats_for_a_policy_without_a_chat_template_are_refused(commands):
    problems = commands.file(gsm8k_problems(2))
    said = commands.ppo("--task", "gsm8k", "--train_file", problems, "--reward_function", "gsm8k_answer")
    assert "the tokenizer of the policy" in said
    assert "has no chat template" in said


def test_chats_for_a_reward_model_without_a_chat_template_are_refused_before_ppo(commands):
    arguments = ["--task", "gsm8k", "--train_file", commands.file(gsm8k_problems(2))]
    said = commands.ppo(*arguments, "--reward_model", str(commands.models / "reward_model"), model="chat_policy")
    assert "the tokenizer of the reward model has no chat template" in said


def test_an_embedding_reward_model_needs_no_chat_template(tmp_path):
    encoder = SentenceEncoder(save_encoder(tmp_path))
    settings = FractalSettings(scorer="embedding")
    reward_model = StepRewardModel(make_head(settings.head_type, encoder.size, 1), encoder, settings)
    prompts = Dataset.from_dict({"prompt": [CHAT]})
    check_reward_models([reward_model], prompts)


CHAT = [{"role": "user", "content": "1+1?"}]
PROMPTS = {
    "a missing prompt": ([{"answer": "2"}], [], 1, "column 'prompt' is missing (found: 'answer')"),
    "a prompt that is a number": ([{"prompt": 1}], [], 1, "the prompt is int"),
    "an empty prompt": ([{"prompt": " "}], [], 1, "the prompt is empty"),
    "a message without its role": (
        [{"prompt": [{"content": "1+1?"}]}],
        [],
        1,
        "message 1 of the prompt is not a message",
    ),
    "prompts of two types": ([{"prompt": "1?"}, {"prompt": CHAT}], [], 2, "a chat but that of row 1 is text"),
    "a missing question": ([{"answer": "#### 2"}], ["--task", "gsm8k"], 1, "column 'question' is missing"),
    "a missing answer": ([{"question": "1+1?"}], ["--task", "gsm8k"], 1, "column 'answer' is missing"),
    "an answer without its mark": (
        [*gsm8k_problems(1), {"question": "1+1?", "answer": "2"}],
        ["--task", "gsm8k"],
        2,
        "the answer has no number after '####'",
    ),
    "a prompt of another task": (
        [{"prompt": make_problems(1, seed=0)[0].prompt}, {"prompt": "1+1?"}],
        ["--reward_function", "exact_answer"],
        2,
        "Not a prompt of the arithmetic task",
    ),
    "no answer to compare with": (
        [{"prompt": "1+1?"}],
        ["--reward_function", "gsm8k_answer"],
        1,
        "`reward_function=gsm8k_answer` reads the column 'answer'",
    ),
}


@pytest.mark.parametrize("defect", PROMPTS)
def test_a_bad_prompt_is_named_before_ppo(commands, defect):
    rows, flags, number, sentence = PROMPTS[defect]
    arguments = (
        flags if "--reward_function" in flags else [*flags, "--reward_model", str(commands.models / "reward_model")]
    )
    said = commands.ppo(*arguments, "--train_file", commands.file(rows))
    assert f"rows.jsonl, row {number}: " in said
    assert sentence in said


def test_columns_that_reward_functions_get_from_the_rollout_are_refused(commands):
    rows = [{"prompt": "1+1?", "answer": "2", "completions": "x"}, {"prompt": "2+2?", "answer": "4"}]
    said = commands.ppo("--reward_function", "gsm8k_answer", "--train_file", commands.file(rows))
    assert (
        "The data set has a column 'completions', but reward functions get an argument of that name from the rollout."
        in said
    )


def test_columns_of_several_types_are_named(commands):
    rows = [{"prompt": "1+1?", "answer": "2", "more": 1}, {"prompt": "2+2?", "answer": "4", "more": "one"}]
    said = commands.ppo("--reward_function", "gsm8k_answer", "--train_file", commands.file(rows))
    assert "'more' (int, str) has values of several types" in said


def test_a_column_that_the_first_row_lacks_is_kept():
    found = make_dataset([{"prompt": "a"}, {"prompt": "b", "answer": "4"}])
    assert found["answer"] == [None, "4"]


def test_a_prompt_that_the_policy_cannot_read_is_refused_before_a_rollout(commands):
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "1+1?" * 250_000, "answer": "2"}]
    flags = ["--per_device_train_batch_size", "2", "--num_generations", "1"]
    said = commands.ppo("--reward_function", "gsm8k_answer", "--train_file", commands.file(rows), *flags)
    assert "Row 2 of the prompts has 1,000,000 tokens, but the policy reads 1,024" in said


def test_rows_that_contradict_each_other_are_refused_where_asked(commands):
    rows = [GOOD, GOOD | {"label": 0}]
    said = commands.train(rows, "--strict", "true", "--eval_file", commands.file([GOOD], "eval.jsonl"))
    assert "rows.jsonl: 1 response has both labels (first: row 2)." in said
    assert "eval.jsonl: 1 of 1 prompts are in " in said


def test_a_threshold_file_that_is_the_data_is_said(commands, capsys):
    data = commands.file([GOOD, BAD])
    arguments = ["evaluate", "--model", str(commands.models / "reward_model"), "--data", data]
    arguments += ["--threshold_file", data, "--output", str(commands.folder / "m.json")]
    assert "2 of 2 rows are also in " in commands.fails(*arguments, "--strict", "true")
    assert main(arguments) == 0
    assert "Warning: rows.jsonl: 2 of 2 rows are also in " in capsys.readouterr().err


def test_a_line_that_no_model_reads_is_refused_before_it_is_parsed(commands):
    said = commands.train(b'{"prompt": "' + b"a" * 2**24 + b'"}\n')
    assert "rows.jsonl, row 1: the line has more than 16,777,216 bytes; shorten or drop the row." in said


# Reports ----------------------------------------------------------------------------------------------------------


def test_a_file_that_holds_no_results_is_refused(commands):
    assert "rows.jsonl, row 1 holds no metrics" in commands.fails("report", "--results", commands.file([GOOD]))


def test_results_that_are_not_there_are_named(commands):
    assert "There is no file none.jsonl." in commands.fails("report", "--results", "none.jsonl")


def test_an_empty_results_file_is_named(commands):
    assert "no rows of results" in commands.fails("report", "--results", commands.file(b""))


def test_a_report_of_an_unknown_kind_is_refused(commands):
    results = commands.file([{"arm": "a", "metrics": {"accuracy": 1.0}}])
    said = commands.fails("report", "--results", results, "--output", str(commands.folder / "report.pdf"))
    assert "Give a name that ends in .md or .html" in said


def test_a_metric_that_is_nowhere_is_refused(commands):
    results = commands.file([{"arm": "a", "metrics": {"accuracy": 1.0}}])
    assert "No row has the metric 'speed'" in commands.fails("report", "--results", results, "--metrics", "speed")


# The system -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left", "o.md"), "o.md: No space left. Free space, and run the command again."),
        (OSError(errno.EDQUOT, "Quota exceeded"), "Quota exceeded. Free space, and run the command again."),
        (
            PermissionError(errno.EACCES, "Permission denied", "o.md"),
            "o.md: Permission denied. Check the path and its permissions, and run the command again.",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", ""),
            "'': No such file. Check the path and its permissions, and run the command again.",
        ),
        (KeyError("The metric 'a' is unknown."), "The metric 'a' is unknown."),
        (ValueError("unknown option"), "unknown option."),
        (ConnectionError("There is no server.\n Start it."), "There is no server. Start it."),
    ],
)
def test_an_error_of_the_system_says_where_and_what_to_do(error, said):
    assert sentence(error) == said


def test_a_full_disk_is_one_sentence_and_leaves_the_file_before(commands):
    rows = commands.file([{"benchmark": "b", "arm": "a", "seed": 0, "metrics": {"auc": 0.5}}], "results.jsonl")
    output = commands.folder / "tables.md"
    output.write_text("as it was")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
    try:
        said = commands.fails("report", "--results", rows, "--output", str(output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{output}: File too large. Free space, and run the command again." in said


def test_a_lock_whose_owner_wrote_no_number_is_one_sentence(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe")
    with FileLock(tmp_path / ".lock"):
        (tmp_path / ".lock").write_bytes(b"\xff\xfe")
        with pytest.raises(OSError, match=r"Another process .* writes there"), locked(tmp_path / ".lock", "there"):
            pass


def test_a_variable_of_a_launcher_that_is_no_number_is_one_sentence(commands, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "The environment variable WORLD_SIZE is 'two'. Unset it, or start with" in commands.fails("ppo")
