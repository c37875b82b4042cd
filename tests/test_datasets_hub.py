"""Data sets of the Hub go through the readers of the files; nothing is fetched here."""

import datasets
import pytest

from fractal_rm.data.formats.hub import HUB, load_hub
from fractal_rm.data.formats.math_sets import read_processbench
from fractal_rm.data.formats.retrieval_sets import read_multispanqa

PROCESSBENCH = [{"id": "a", "problem": "1+1?", "steps": ["1+1=3.", "So 3."], "final_answer_correct": False, "label": 0}]
MULTISPAN = [
    {"id": "a", "question": ["who"], "context": ["It", "rains", ".", "Eva", "came", "."], "label": list("OOOBOO")}
]


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset` and records how it was called."""
    calls = []

    def serve(rows):
        def load_dataset(*args, **options):
            calls.append((args, options))
            if isinstance(rows, Exception):
                raise rows
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def test_rows_of_the_hub_give_what_rows_of_a_file_give(hub):
    calls = hub(PROCESSBENCH)
    assert load_hub("processbench", "gsm8k") == read_processbench(PROCESSBENCH)
    assert calls == [(("Qwen/ProcessBench", None), {"split": "gsm8k"})]


def test_options_reach_the_reader(hub):
    hub(PROCESSBENCH)
    assert load_hub("processbench", "math", answer_labels=True)[0].label == 0.0
    hub(MULTISPAN)
    assert load_hub("multispanqa", "train", negative_share=1) == read_multispanqa(MULTISPAN, negative_share=1)


def test_splits_that_are_files_are_loaded_one_at_a_time(hub):
    calls = hub(MULTISPAN)
    load_hub("multispanqa", "validation")
    file = "hf://datasets/Tugay/multispanqa/validation.json"
    assert calls == [(("json",), {"data_files": file, "field": "data", "split": "train"})]


def test_the_parquet_files_of_one_configuration_are_loaded_without_the_others(hub):
    row = {"title": "owl", "paragraphs": ["Owls hunt."], "summary": {"text": ["It hunts ."], "topic": [3]}}
    calls = hub([row])
    [bag] = load_hub("wikicatsum", "validation", config="film")
    assert (bag.prompt, bag.steps, bag.label) == ("owl\nOwls hunt.", ["It hunts ."], 1.0)
    files = "hf://datasets/GEM/wiki_cat_sum@refs/convert/parquet/film/validation/*.parquet"
    assert calls == [(("parquet",), {"data_files": files, "split": "train"})]


@pytest.mark.parametrize("name", [name for name, known in HUB.items() if known.data_files])
def test_files_are_named_with_every_blank_filled_in(hub, name):
    known = HUB[name]
    calls = hub(ConnectionError("offline"))
    for config in known.configs or (None,):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_hub(name, known.splits[0], config=config)
        files = calls[-1][1]["data_files"]
        assert known.splits[0] in files
        assert config is None or config in files
        assert "None" not in files


def test_the_first_configuration_is_the_default(hub):
    row = {"query": "who", "input_urls": [], "target": "Eva came."}
    calls = hub([row])
    load_hub("aquamuse", "test")
    load_hub("aquamuse", "test", config="extractive")
    assert [args[1] for args, _ in calls] == ["abstractive", "extractive"]


def test_an_error_in_a_row_names_the_data_set_and_the_split(hub):
    hub([PROCESSBENCH[0] | {"label": 7}])
    with pytest.raises(ValueError, match=r"Qwen/ProcessBench \(math\), row 1: the label is 7, no step of 2"):
        load_hub("processbench", "math")


def test_data_that_cannot_be_loaded_is_named(hub):
    hub(ConnectionError("offline mode is enabled.\nmore"))
    sentence = (
        r"^Qwen/ProcessBench cannot be loaded from the Hub \(offline mode is enabled\); download and read its files\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        load_hub("processbench", "math")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "fira", "split": "train"}, r"Unknown data set 'fira'; use one of prm800k, processbench, .*, or read"),
        ({"name": "aquamuse", "split": "dev"}, r"aquamuse has no split 'dev'; use one of train, validation, test\."),
        (
            {"name": "aquamuse", "split": "test", "config": "x"},
            r"no configuration 'x'; use one of abstractive, extract",
        ),
        (
            {"name": "processbench", "split": "math", "config": "x"},
            r"ProcessBench has no configuration 'x'; leave it out",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_the_names_there_are(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_hub(**arguments)


@pytest.mark.parametrize("name", HUB)
def test_every_entry_can_be_asked_for(hub, name):
    known = HUB[name]
    hub(ConnectionError("offline"))
    for split in known.splits:
        for config in (None, *known.configs):
            with pytest.raises(ValueError, match=rf"^{known.path} cannot be loaded from the Hub"):
                load_hub(name, split, config=config)


def test_the_name_of_the_package_does_not_hide_the_library():
    assert datasets.__name__ == "datasets"
    assert hasattr(datasets, "load_dataset")
