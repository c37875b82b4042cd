"""Files that do not fit in memory: rows that are read when they are drawn, and limits that read what they need."""

import gzip
import json
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.fixed_seed_runs import pairs, sums, tokenizer
from support.stand_ins import write_jsonl

from fractal_rm.cli.options.arguments import read_rows
from fractal_rm.data import rows
from fractal_rm.data.formats import reading, table_files
from fractal_rm.data.readers import open_jsonl, read_jsonl
from fractal_rm.reward_training import large_data
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import BagDataset, to_bags
from fractal_rm.reward_training.large_data import TrainingRows, reads_everything, training_rows
from fractal_rm.scorers.inputs import TokenInputs

ROWS = [{"prompt": row["prompt"], "completion": "\n".join(row["steps"]), "label": row["label"]} for row in sums(20)]


def config(**options: Any) -> FractalConfig:
    defaults: dict[str, Any] = {"output_dir": "unused", "scorer": "token", "use_cpu": True, "report_to": []}
    return FractalConfig(**defaults | options)


def read(path: Path | str, *, skip: bool = False, **options: Any) -> TrainingRows:
    args = config(**options)
    way: Any = "skip" if skip else "stop"
    return training_rows(open_jsonl(path), args, args.settings(), source="rows.jsonl", on_bad_row=way)


def dataset(rows: TrainingRows, **options: Any) -> BagDataset:
    settings = config(**options).settings()
    inputs = TokenInputs(tokenizer(), settings)
    return BagDataset(rows.first, inputs, settings, source="rows.jsonl", later=rows.later)


def plain(item: dict[str, Any]) -> Any:
    return item["input_ids"], item["encoded"], item["labels"], [len(row) for row in item["targets"]["step_labels"]]


@pytest.fixture
def first_four(monkeypatch) -> None:
    monkeypatch.setattr(large_data, "FIRST_ROWS", 4)


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_limit_does_not_look_at_the_last_row(tmp_path, ending):
    content = ("\n".join(map(json.dumps, ROWS)) + "\n{poison").encode()
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert list(read_rows(path, None, 10)) == ROWS[:10]
    with pytest.raises(ValueError, match="row 21: the line is invalid JSON"):
        list(read_rows(path, None, None))


@pytest.mark.parametrize("name", ["math_shepherd", "prm800k", "prmbench", "processbench", "qa_feedback"])
def test_a_limit_of_an_official_format_does_not_look_at_the_last_row(tmp_path, name):
    step = {"completions": [{"text": "1+1=2.", "rating": 1}], "chosen_completion": 0}
    row: dict[str, Any] = {
        "math_shepherd": {"input": "1+1? Step 1: 1+1=3. ки", "label": "1+1? Step 1: 1+1=3. -"},
        "prm800k": {"question": {"problem": "1+1?"}, "label": {"steps": [step]}},
        "prmbench": {"idx": "7", "classification": "deception", "modified_question": "1+1?"}
        | {"modified_process": ["1+1=3."], "error_steps": [1]},
        "processbench": {"id": "a", "problem": "1+1?", "steps": ["1+1=3."], "label": 0},
        "qa_feedback": {"question": "Who?", "passages": [], "prediction 1": "Eva did.", "feedback": {"errors": []}},
    }[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 12) + "\n{poison")
    assert len(read_rows(path, name, 10)) == 10  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row 13: the line is invalid JSON"):
        read_rows(path, name, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, 1, 19, 20, 21])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
def test_rows_that_stay_on_disk_are_those_of_the_file(tmp_path, limit, end):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + end)
    rows = open_jsonl(path, limit)
    assert list(rows) == ROWS[:limit] == read_jsonl(path, limit)
    assert rows[-1] == ROWS[:limit][-1]
    assert rows[3:1:-1] == ROWS[:limit][3:1:-1]


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_does_not_hold_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(large_data, "FIRST_ROWS", 100)
    path, count = tmp_path / "rows.jsonl", 5000
    write_jsonl(path, [{"prompt": f"{n}?", "completion": "x" * 1000, "label": n % 2} for n in range(count)])
    tracemalloc.start()
    rows = read(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.later is not None
    assert len(rows.later) == count - 100
    assert peak < 3e6 < path.stat().st_size  # a byte of memory for two of the file would be too much
    assert held < 1e6


def test_a_row_that_is_too_long_is_refused_before_memory_holds_it(tmp_path, monkeypatch):
    for module in (rows, reading, table_files):
        monkeypatch.setattr(module, "LONGEST_ROW", 20_000)
    monkeypatch.setattr(rows, "_LONGEST_FILE", 50_000)
    monkeypatch.setattr(rows, "_CHUNK", 10_000)
    text = "x" * 3_000_000
    good, long = json.dumps({"prompt": "1+1?"}) + "\n", json.dumps({"prompt": text})
    header, cells = "prompt,label\n", '"' + '1\n","' * 500_000  # a row that is not closed
    named = {
        "rows.jsonl.gz": (good + long, "row 2: the line has more than 20,000 bytes; shorten or drop the row."),
        "rows.json.gz": (f"[{long}]", "has more than 50,000 bytes, and a list is parsed as a whole; write a .jsonl"),
        "cell.csv": (header + "1,2\n" + text, "row 3: the row has more than 20,000 characters; shorten or drop it"),
        "cells.csv": (header + "1,2\n" + cells, "row 3: the row has more than 20,000 characters; shorten or drop it"),
        "header.tsv": (text, "row 1: the row has more than 20,000 characters"),
    }
    for name, (content, told) in named.items():
        data = content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
        reads = [lambda path=path: list(read_rows(path, None, None))]
        if name.endswith("gz"):
            reads.append(lambda path=path: list(reading.stream_rows(path, None, key="rows")[0]))
        for read_all in reads:
            tracemalloc.start()
            with pytest.raises(ValueError, match=re.escape(told)):
                read_all()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 600_000, (name, peak)


@pytest.mark.parametrize("limit", [None, 15])
def test_a_row_of_a_table_that_is_too_long_is_named(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(table_files, "LONGEST_ROW", 20_000)
    monkeypatch.setattr(table_files, "_AT_A_TIME", 10)
    chat = [{"role": "user", "content": "x" * 7_000}] * 3
    table = datasets.Dataset.from_list([{"prompt": chat[:1], "label": 1}] * 12 + [{"prompt": chat, "label": 1}])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "rows"))
    for name in ("rows.parquet", "rows"):
        with pytest.raises(ValueError, match=rf"{name}, row 13: a row has more than 20,000 bytes; shorten or drop"):
            read_rows(tmp_path / name, None, limit)
    datasets.Dataset.from_list([{"prompt": "x" * 30_000}]).to_parquet(str(tmp_path / "one.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", None)  # and this one is not even unpacked
    with pytest.raises(ValueError, match=r"one\.parquet: a row has more than 20,000 bytes"):
        read_rows(tmp_path / "one.parquet", None, limit)


# Drawing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, sums(20), pairs(20)], ids=["texts", "steps", "preferences"])
def test_a_drawn_row_is_what_it_would_have_been(tmp_path, monkeypatch, rows):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    expected = dataset(read(path))
    monkeypatch.setattr(large_data, "FIRST_ROWS", 4)
    found = dataset(read(path))
    assert found.later is not None
    assert len(found.later) == 16
    assert len(found) == len(expected) == 20
    assert list(map(plain, found)) == list(map(plain, expected))  # iteration, as transformers does for lengths


def test_bags_are_tokenized_when_they_are_drawn(first_four):
    args = config()
    bags = to_bags(pairs(20), args.settings(), source="rows")
    expected = dataset(TrainingRows(bags))
    found = dataset(training_rows(bags, args, args.settings(), source="rows"))
    assert (len(found.encoded), len(found)) == (8, 20)
    assert [plain(found[i]) for i in range(20)] == [plain(expected[i]) for i in range(20)]


def test_a_row_that_does_not_fit_makes_room_for_the_next(tmp_path, first_four):
    rows = [*ROWS[:6], ROWS[6] | {"completion": "x" * 300, "label": 1}, *ROWS[7:]]
    data = dataset(read(write_jsonl(tmp_path / "rows.jsonl", rows)), max_length=100)
    assert plain(data[6]) == plain(data[7])
    rows[4:] = [row | {"completion": "x" * 300} for row in rows[4:]]
    data = dataset(read(write_jsonl(tmp_path / "rows.jsonl", rows)), max_length=100)
    with pytest.raises(ValueError, match="no later row fits into `max_length=100` tokens"):
        data[6]


# Checks ---------------------------------------------------------------------------------------------------------------

BAD = {
    "label 7": ({"label": 7}, "the label is 7, outside"),
    "label null": ({"label": None}, "column 'label' is null"),
    "label nan": ({"label": float("nan")}, "the label is NaN"),
    "label text": ({"label": "maybe"}, "the label is 'maybe'"),
    "blank": ({"completion": " "}, "the response"),
    "number": ({"completion": 4}, "'completion' is 4"),
    "chat": ({"prompt": [{"role": "user", "content": "2+2?"}]}, "the prompt is a chat but that of row 1 is text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_later_row_of_another_shape_is_named_before_training(tmp_path, first_four, name):
    change, sentence = BAD[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:17], ROWS[17] | change, *ROWS[18:]])
    with pytest.raises((TypeError, ValueError), match=f"rows.jsonl, row 18: {sentence}"):
        read(path)
    with pytest.warns(UserWarning, match="1 later rows of rows.jsonl are left out. First: rows.jsonl, row 18"):
        rows = read(path, skip=True)
    assert rows.later is not None
    assert list(rows.later.places) == [*range(4, 17), 18, 19]


def test_a_later_row_that_is_bad_inside_is_named_when_it_is_drawn(tmp_path, first_four):
    rows = sums(20)
    rows[17]["steps"] = [*rows[17]["steps"], "one step more"]
    data = dataset(read(write_jsonl(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 18: there are 1 step labels for 2 steps"):
        data[17]
    skipping = dataset(read(write_jsonl(tmp_path / "rows.jsonl", rows), skip=True))
    assert plain(skipping[17]) == plain(skipping[18])


def test_a_later_row_that_cannot_be_parsed_is_named_before_training(tmp_path, first_four):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, ROWS), "{poison"]))
    with pytest.raises(ValueError, match="row 21: the line is invalid JSON"):
        read(path)


def test_the_name_of_the_data_is_that_of_all_rows(tmp_path, first_four):
    names = set()
    for last in (ROWS[19], ROWS[19] | {"label": 1 - ROWS[19]["label"]}):
        rows = [*ROWS[:19], last]
        file = read(write_jsonl(tmp_path / "rows.jsonl", rows))
        listed = training_rows(rows, config(), config().settings(), source="rows")
        again = read(write_jsonl(tmp_path / "again.jsonl", rows))
        assert file.name("a" * 16) == again.name("a" * 16)
        names |= {file.name("a" * 16), listed.name("a" * 16)}
    assert len(names) == 4


def test_what_is_computed_for_all_rows_reads_all_rows(tmp_path, first_four):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for options in (
        {"easyllp_weight": 1.0},
        {"instance_weight": 1.0},
        {"teacher_prior_weight": 0.1},
        {"pseudo_labels": "hard"},
        {"train_sampling_strategy": "group_by_length"},
        {"scorer": "embedding"},
    ):
        assert reads_everything(config(**options)), options
        assert len(read(path, **options).first) == 20
    assert not reads_everything(config())


def test_little_data_has_no_later_rows(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(write_jsonl(tmp_path / "rows.jsonl", ROWS)).later is None
