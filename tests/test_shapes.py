"""Shapes of rows that practitioners bring: read rightly, or refused in a sentence that names the option."""

import copy
import gzip
import json
import logging
import warnings
from functools import partial
from pathlib import Path

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from trl.data_utils import extract_prompt, maybe_convert_to_chatml

from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.data.shapes import Columns
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import to_bags
from fractal_rm.reward_training.large_data import training_rows
from fractal_rm.scorers.settings import FractalSettings

LINES = Segmentation("lines")
CORPUS = Path(__file__).parent / "corpus" / "shapes.jsonl"
CASES = {case["kind"]: case for case in map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())}
READ = [kind for kind, case in CASES.items() if "error" not in case]


def columns_of(case):
    return Columns(**{k: tuple(v) if isinstance(v, list) else v for k, v in case.get("columns", {}).items()})


@pytest.mark.parametrize("kind", READ)
def test_a_shape_is_read(kind):
    case = CASES[kind]
    before = copy.deepcopy(case["row"])
    bags = read_bags([case["row"]], LINES, columns=columns_of(case))
    assert [bag.prompt for bag in bags] == [case["prompt"]] * len(bags)
    assert [bag.response for bag in bags] == case["responses"]
    assert [bag.label for bag in bags] == case["labels"]
    gold = case.get("step_labels")
    assert bags[0].step_labels == (None if gold is None else tuple(gold))
    assert case["row"] == before


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in READ])
def test_what_cannot_be_told_is_refused_in_a_sentence(kind):
    case = CASES[kind]
    with pytest.raises((TypeError, ValueError)) as caught:
        read_bags([case["row"]], LINES, columns=columns_of(case), source="rows.jsonl")
    sentence = str(caught.value)
    assert sentence.startswith("rows.jsonl, row 1: ")
    assert case["error"] in sentence
    assert "\n" not in sentence


# Preferences without a prompt of their own that TRL reads otherwise, and what it makes of them.
NOT_AS_TRL = {
    "a preference of texts with turns": "cuts behind the words that the answers share",
    "a preference of texts that differ within a word": "cuts within the word",
    "a preference in turns of ShareGPT": "keeps the names of the roles",
}
ASKED = {"prompt", "question", "conversations"}  # beside the answers
CUT = [kind for kind in READ if "chosen" in CASES[kind]["row"] and not ASKED & CASES[kind]["row"].keys()]


@pytest.mark.parametrize("kind", CUT)
def test_a_preference_that_holds_its_prompt_is_cut_as_trl_cuts_it_but_for_three_kinds(kind):
    case = CASES[kind]
    row = maybe_convert_to_chatml(copy.deepcopy(case["row"]))
    found = extract_prompt(row)
    text = [found[side] if isinstance(found[side], str) else found[side][0]["content"] for side in row if side in found]
    assert ((found["prompt"], text) == (case["prompt"], case["responses"])) == (kind not in NOT_AS_TRL)


def test_cells_of_csv_files_stay_text(tmp_path):
    from fractal_rm.data.formats.table_files import open_table

    path = tmp_path / "rows.csv"
    chat = json.dumps([{"role": "user", "content": "1+1?"}]).replace('"', '""')
    path.write_text(
        f'prompt,response,label\n"{chat}",NA,0.25\n"{chat}",007,TRUE\n"{chat}","[1, 2]\n",\n', encoding="utf-8"
    )
    bags = read_bags(open_table(path), LINES, require_label=False)
    assert [bag.response for bag in bags] == ["NA", "007", "[1, 2]\n"]
    assert [bag.label for bag in bags] == [0.25, 1.0, None]
    assert bags[0].prompt == [{"role": "user", "content": "1+1?"}]
    path.write_text("prompt,response\n1+1?,2,3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.csv, row 2: the row does not have as many cells as the header"):
        open_table(path)


GOOD = {"prompt": "1+1?", "response": "2", "label": 1}
BAD = {"prompt": "1+1?", "response": "3", "label": 0}


def test_bad_rows_are_skipped_and_counted_on_request_only():
    rows = [GOOD, GOOD | {"response": " "}, BAD, GOOD | {"label": 7}]
    with pytest.raises(ValueError, match="row 2: the response is empty"):
        read_bags(rows, LINES, source="rows")
    with pytest.warns(
        UserWarning, match="^2 of 4 rows of rows are left out. First: rows, row 2: the response is empty"
    ):
        assert [bag.response for bag in read_bags(rows, LINES, source="rows", on_bad_row="skip")] == ["2", "3"]
    with pytest.raises(ValueError, match="row 1: the response is empty"):
        read_bags(rows[1:2], LINES, source="rows", on_bad_row="skip")


@pytest.mark.parametrize("scale", [(5, 1), (1, 1), (1, float("nan")), (1,)])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="Give the lowest and the highest rating"):
        Columns(label_scale=scale)


# Files and commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["parquet", "PARQUET", "csv", "CSV.gz", "tsv", "arrow", "saved", "splits", "NDJSON", "ndjson.gz"]
)
def test_tables_are_read_like_json(tmp_path, ending):
    from fractal_rm.cli.options.arguments import DataArguments

    data = Dataset.from_list([GOOD, BAD])
    path = tmp_path / f"rows.{ending}"
    packed = gzip.compress if ending.endswith("gz") else bytes
    if ending.lower() == "parquet":
        data.to_parquet(path)
    elif ending in ("csv", "CSV.gz", "tsv"):
        path.write_bytes(packed(data.to_pandas().to_csv(index=False, sep="\t" if ending == "tsv" else ",").encode()))
    elif "json" in ending.lower():
        path.write_bytes(packed("".join(f"{json.dumps(row)}\n" for row in data).encode()))
    elif ending == "arrow":
        data.save_to_disk(tmp_path / "folder")
        next((tmp_path / "folder").glob("*.arrow")).rename(path)
    elif ending == "saved":
        data.save_to_disk(path)
    else:
        DatasetDict({"train": data, "validation": data}).save_to_disk(path)
    by_name = {"dataset_name": str(path)} if ending == "splits" else {"train_file": str(path)}
    rows, _ = DataArguments(**by_name).read("train")
    assert [(row["prompt"], row["response"], int(row["label"])) for row in rows] == [
        ("1+1?", "2", 1),
        ("1+1?", "3", 0),
    ]


def test_a_broken_table_is_one_sentence(tmp_path):
    from fractal_rm.data.formats.table_files import open_table

    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read \(.*\); write or download it again\.$"):
        open_table(path)
    Dataset.from_dict({"prompt": []}).to_parquet(path)
    with pytest.raises(ValueError, match=r"rows.parquet is empty; give a file with at least one row\.$"):
        open_table(path)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("prompt,response,response", "the header has the name 'response' twice"),
        ("prompt;response;label", r"the header is one cell, 'prompt;response;label'; give a comma-separated file"),
        ("prompt\tresponse\tlabel", r"the header is one cell, .* \(.csv has commas, .tsv tabs\)"),
    ],
)
def test_a_header_that_names_no_column_clearly_is_refused(tmp_path, header, says):
    from fractal_rm.data.formats.table_files import open_table

    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n1+1?,2,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows.csv, row 1: {says}"):
        open_table(path)


def test_lists_in_cells_are_read_under_any_name():
    row = {"prompt": "1+1?", "thoughts": '["1+1=2.", "So 2."]', "label": "1"}
    [bag] = read_bags([row], LINES, columns=Columns(steps="thoughts"))
    assert bag.steps == ["1+1=2.", "So 2."]


def test_two_columns_with_one_name_are_refused():
    with pytest.raises(ValueError, match="`prompt_column` and `response_column` are both 'text'"):
        Columns(prompt="text", response="text")


# What is given in Python ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [pandas.DataFrame([GOOD]), {"prompt": ["1+1?"]}, DatasetDict(train=Dataset.from_list([GOOD])), "rows.jsonl"],
    ids=lambda given: type(given).__name__,
)
def test_what_yields_names_and_not_rows_is_refused(given):
    for read in (to_bags, partial(training_rows, args=None)):
        with pytest.raises(TypeError, match=rf"train data is a {type(given).__name__}, not a list of rows\. Give rows"):
            read(given, settings=FractalSettings(), source="train data")


def test_a_streaming_data_set_is_read(tmp_path):
    data = Dataset.from_list([GOOD, BAD]).to_iterable_dataset()
    config = FractalConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = training_rows(data, config, config.settings(), source="train data")
    assert [bag.label for bag in rows.first] == [1.0, 0.0]


def test_the_language_of_sentences_is_an_option_that_the_checkpoint_keeps(tmp_path):
    config = FractalConfig(output_dir=str(tmp_path), use_cpu=True, segmentation="sentences", language="pl")
    block = FractalSettings.from_dict(config.settings().to_dict(), where="here")
    assert len(block.segmentation("Wynik to 5. Np. 3 jest liczbą.")) == 2


@pytest.mark.parametrize("names", [["right", "wrong"], ["0", "1"], ["False", "True"]])
def test_labels_that_are_classes_with_names_are_told(names):
    data = Dataset.from_list([GOOD, BAD])
    data = data.cast_column("label", ClassLabel(names=names))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bags = to_bags(data, FractalSettings(), source="train data")
    assert [bag.label for bag in bags] == [1.0, 0.0]
    expected = "train data: the labels are classes (0 is 'right', 1 is 'wrong'), and 1 is read as good. "
    assert [str(one.message).startswith(expected) for one in told] == [True] * (names[0] == "right")


def test_gold_step_labels_that_training_does_not_read_are_said_once(caplog):
    from fractal_rm.reward_training.data import say_unread_gold

    bags = read_bags([{"prompt": "?", "steps": ["a", "b"], "step_labels": [1, None], "label": 0}, GOOD], LINES)
    with caplog.at_level(logging.WARNING):
        say_unread_gold(bags)
        say_unread_gold(bags[1:])
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 responses have gold step labels, which are not read. Set `instance_weight` above 0 to learn from them."
    ]


def test_thoughts_beside_the_content_of_a_prompt_need_a_template_that_reads_them():
    from fractal_rm.reward_training.data import check_reasoning

    thought = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "reasoning_content": "one"}]
    bags = read_bags([GOOD | {"prompt": [*thought, {"role": "user", "content": "And 2+2?"}]}], LINES)
    check_reasoning(bags, "{{ message.reasoning_content }}", source="train data")
    for template in (None, "{{ message.content }}"):
        with pytest.raises(ValueError, match="train data, response 1: a message of the prompt has 'reasoning_content'"):
            check_reasoning(bags, template, source="train data")


def test_ppo_finds_its_prompts_by_the_name_of_their_column():
    from fractal_rm.cli.options.arguments import DataArguments

    rows = [{"q": "1+1?", "answer": "2"}]
    assert DataArguments(prompt_column="q").prompts(rows, "rows") == [{"prompt": "1+1?", "answer": "2"}]
    assert DataArguments().prompts([{"question": "1+1?"}], "rows") == [{"prompt": "1+1?"}]
    chat = [{"role": "user", "content": "1+1?"}]
    for given in (json.dumps(chat), [{"from": "human", "value": "1+1?"}], chat[0]):
        assert DataArguments().prompts([{"prompt": given}], "rows") == [{"prompt": chat}]
    with pytest.raises(ValueError, match=r"rows, row 1: column 'ask' is missing .*--prompt_column"):
        DataArguments(prompt_column="ask").prompts(rows, "rows")
