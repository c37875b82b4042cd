"""Formats by name: their copies on the Hub, and what the commands read of them; nothing is fetched here."""

import json
from typing import get_args

import datasets
import pytest
from support.stand_ins import save_encoder, save_reward_model, write_jsonl

from fractal_rm.cli.main import main
from fractal_rm.cli.options.arguments import DataArguments, benchmark_from_hub, load_official, read_rows
from fractal_rm.data.formats.index import FORMATS, FormatName
from fractal_rm.data.formats.multispanqa import read_multispanqa
from fractal_rm.data.formats.processbench import read_processbench
from fractal_rm.evaluation.benchmarks import read_benchmark
from fractal_rm.evaluation.processbench import SUBSETS

PROCESSBENCH = [
    {
        "id": f"math-{n}",
        "problem": "1+1?",
        "steps": ["1+1=3.", "So 3."],
        "final_answer_correct": n % 2 == 0,
        "label": n % 2 - 1,
    }
    for n in range(8)
]
MULTISPAN = [
    {"id": "a", "question": ["who"], "context": ["It", "rains", ".", "Eva", "came", "."], "label": list("OOOBOO")}
]
ON_THE_HUB = {name: known.hub for name, known in FORMATS.items() if known.hub is not None}


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset` and records how it was called."""
    calls = []

    def serve(rows):
        def load_dataset(**options):
            assert options.pop("trust_remote_code") is False
            calls.append(options)
            if isinstance(rows, Exception):
                raise rows
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def test_every_name_is_a_choice_of_the_commands():
    assert set(get_args(FormatName)) == set(FORMATS)


def test_rows_of_the_hub_give_what_rows_of_a_file_give(hub):
    calls = hub(PROCESSBENCH)
    bags, source = DataArguments(dataset_format="processbench", dataset_train_split="gsm8k").read("train")
    assert bags == read_processbench(PROCESSBENCH)
    assert source == "processbench (gsm8k)"
    assert calls == [{"path": "Qwen/ProcessBench", "split": "gsm8k"}]


def test_a_split_that_is_not_there_is_an_error_for_training_only(hub):
    calls = hub(PROCESSBENCH)
    data = DataArguments(dataset_format="processbench")
    assert data.read("eval") is None
    with pytest.raises(ValueError, match=r"Qwen/ProcessBench has no split 'train'; use one of gsm8k, math, olympiadb"):
        data.read("train")
    assert calls == []


def test_nothing_is_loaded_where_a_file_is_given(hub, tmp_path):
    calls = hub(PROCESSBENCH)
    file = write_jsonl(tmp_path / "gsm8k.jsonl", PROCESSBENCH)
    data = DataArguments(dataset_format="processbench", train_file=file, limit=3, dataset_eval_split="math")
    assert data.read("train") == (read_processbench(PROCESSBENCH[:3]), file)
    assert data.read("eval") is None
    assert calls == []


def test_splits_that_are_files_are_loaded_one_at_a_time(hub):
    calls = hub(MULTISPAN)
    [bag] = read_multispanqa(list(load_official("multispanqa", "validation")), negative_share=0)
    assert bag.step_labels == (0.0, 1.0)
    file = "hf://datasets/Tugay/multispanqa/validation.json"
    assert calls == [{"path": "json", "data_files": file, "field": "data", "split": "train"}]


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_every_split_can_be_asked_for_with_every_blank_filled_in(hub, name):
    known = ON_THE_HUB[name]
    calls = hub(ConnectionError("offline mode is enabled.\nmore"))
    for split in known.splits:
        with pytest.raises(ValueError, match=rf"^{known.path} cannot be loaded from the hub \(offline mode is"):
            load_official(name, split)
        file = calls[-1].get("data_files")
        if file is None:
            assert calls[-1] == {"path": known.path, "split": split}
        else:
            assert split in file


def test_an_error_in_a_row_names_the_data_set_and_the_split(hub):
    hub([PROCESSBENCH[0] | {"label": 7}])
    with pytest.raises(ValueError, match=r"processbench \(math\), row 1: the label is 7, but there are 2 steps"):
        DataArguments(dataset_format="processbench", dataset_train_split="math").read("train")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fira", "train"), r"fira is not on the hub\. Download its files, and give them\."),
        (("multispanqa", "test"), r"multispanqa has no split 'test'; use one of train, validation\."),
    ],
)
def test_what_the_hub_does_not_have_is_refused_with_what_there_is(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_official(*arguments)


def test_a_limit_keeps_both_responses_of_a_preference_or_none(tmp_path):
    rows = [{"question": "Who?", "passages": [], "preference": [1, 0, 0, 0, 0, 2]}]
    rows = [row | {f"prediction {n}": f"Answer {n}." for n in range(1, 5)} for row in rows]
    (tmp_path / "train_feedback.json").write_text(json.dumps(rows))
    for limit, kept in ((None, 4), (4, 4), (3, 2), (2, 2), (1, 0)):
        assert len(read_rows(tmp_path / "train_feedback.json", "qa_preferences", limit)) == kept


def test_a_benchmark_of_the_hub_is_all_of_its_subsets(hub):
    calls = hub(PROCESSBENCH)
    task = read_benchmark("processbench", [row for rows in benchmark_from_hub("processbench") for row in rows[:2]])
    assert [call["split"] for call in calls] == list(SUBSETS)
    assert task.bags[:2] == read_processbench(PROCESSBENCH[:2])
    assert len(task.bags) == 8
    with pytest.raises(ValueError, match=r"best_of_n is not on the hub\. Give `data`"):
        benchmark_from_hub("best_of_n")


# The commands


def test_train_evaluate_and_score_read_official_files(tmp_path, capsys):
    file = write_jsonl(tmp_path / "gsm8k.jsonl", PROCESSBENCH)
    arguments = ["--dataset_format", "processbench"]
    command = ["train", "--model", save_encoder(tmp_path / "encoder"), "--scorer", "embedding", "--max_steps", "1"]
    command += ["--embedding_cache", str(tmp_path / "cache"), "--report_to", "none", "--use_cpu", "true"]
    command += ["--output_dir", str(tmp_path / "rm"), "--train_file", file, *arguments]
    assert main(command) == 0
    command = ["evaluate", "--model", str(tmp_path / "rm"), "--data", file, "--output", str(tmp_path / "metrics.json")]
    assert main([*command, *arguments]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["responses"] == 8
    command = ["score", "--model", str(tmp_path / "rm"), "--input", file, "--output", str(tmp_path / "scores.jsonl")]
    assert main([*command, *arguments]) == 0
    scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [[step["gold"] for step in row["steps"]] for row in scored[:2]] == [[1.0, 1.0], [0.0, None]]
    capsys.readouterr()


def test_labels_that_mean_something_else_are_refused(tmp_path, capsys):
    file = write_jsonl(tmp_path / "valid.jsonl", MULTISPAN)
    model = save_reward_model(tmp_path / "rm")
    command = ["--dataset_format", "multispanqa", "--output_dir", str(tmp_path / "out"), "--train_file", file]
    assert main(["train", "--model", model, *command]) != 0
    assert (
        "In multispanqa, a response's label is the max of its step labels, but `aggregation` is 'min'"
        in capsys.readouterr().err
    )
    command = ["--dataset_format", "multispanqa", "--output", str(tmp_path / "m.json"), "--data", file]
    assert main(["evaluate", "--model", model, *command]) != 0
    assert "Set `aggregation=max`, or use other data." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "score"])
def test_a_removed_format_names_what_to_use_instead(command, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("dataset_format: aquamuse\n")
    for arguments in (["--dataset_format", "wikicatsum"], ["--config", str(tmp_path / "config.yaml")]):
        assert main([command, *arguments]) == 2
        said = capsys.readouterr().err
        assert "dataset_format" in said
        assert "Give rows with `prompt`, `response` and `label`. " in f"{said} ".replace("\n", " ")


def test_the_name_of_the_package_does_not_hide_the_library():
    assert datasets.__name__ == "datasets"
