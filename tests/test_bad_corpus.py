"""The corpus of bad input, and Hypothesis: each input gets one sentence, at once, and never another meaning."""

import html.parser
import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.bad_inputs import CORPUS, cases, configurations, is_here, option_of

from fractal_rm.cli.main import is_bad_input
from fractal_rm.cli.report import report
from fractal_rm.data import patterns
from fractal_rm.data.contradictions import contradictions, shared_prompts
from fractal_rm.data.readers import read_bags, read_jsonl
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.files import parse_json, read_yaml
from fractal_rm.ranges import RANGES
from fractal_rm.report.viewer import write_viewer
from fractal_rm.scorers.folder import check_model_folder
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.study.study import read_chosen

# Options of base classes whose numbers change nothing in our runs, or are checked by the base class itself.
UNRANGED = {"entropy_target"}
# Of the block: checked against the versions that this package knows, and as finite.
UNRANGED |= {"reading", "format_version", "head"}


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_bytes(content.encode("latin-1"))
    return folder / name


def read_option(given: dict[str, Any], folder: Path) -> None:
    kind, needed = configurations()[given["of"]]
    kind(**needed | {name: value for name, value in given.items() if name != "of"})


def read_block(given: dict[str, Any], folder: Path) -> None:
    FractalSettings.from_dict(FractalSettings().to_dict() | given, where="rm")


def read_folder(given: dict[str, Any], folder: Path) -> None:
    save_file({name: torch.zeros(1) for name in given["weights"]}, folder / "model.safetensors")
    write(folder, "config.json", given["config"])
    check_model_folder(folder, "Give another.")


def read_model_file(name: str) -> Callable[[str, Path], None]:
    def read(given: str, folder: Path) -> None:
        write(folder, "config.json", "{}")
        write(folder, name, given)
        check_model_folder(folder, "Give another.")

    return read


def read_activation(given: str, folder: Path) -> None:
    write(folder, "modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    (folder / "2_Dense").mkdir()
    write(folder / "2_Dense", "config.json", given)
    check_model_folder(folder, "Give another.")


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "option": read_option,
    "block": read_block,
    "rows": lambda given, folder: read_jsonl(write(folder, "rows.jsonl", given)),
    "list": lambda given, folder: read_jsonl(write(folder, "rows.json", given)),
    "gzip": lambda given, folder: read_jsonl(write(folder, "rows.jsonl.gz", given)),
    "name": lambda given, folder: read_jsonl(write(folder, given, "{}")),
    "yaml": lambda given, folder: read_yaml(write(folder, "a.yaml", given)),
    "chosen": lambda given, folder: read_chosen(write(folder, "a.yaml", given)),
    "folder": read_folder,
    "safetensors": read_model_file("model.safetensors"),
    "index": read_model_file("model.safetensors.index.json"),
    "modules": read_model_file("modules.json"),
    "encoder": read_model_file("sentence_bert_config.json"),
    "tokenizer": read_model_file("tokenizer_config.json"),
    "activation": read_activation,
    "pattern": lambda given, folder: Segmentation("pattern", pattern=given)("a" * 60 + "!"),
    "results": lambda given, folder: report(["--results", str(write(folder, "results.jsonl", given))]),
}


def one_sentence(error: BaseException) -> str:
    """What a command would print of an error; anything but a complaint about the input goes on as it is."""
    if not is_bad_input(error):
        raise error
    said = " ".join(str(error).split())
    assert said.endswith("."), said
    assert len(said) < 700, said
    return said


def test_the_corpus_is_what_its_generator_writes():
    lines, made = CORPUS.read_text(encoding="utf-8").splitlines(), cases()
    written = [json.loads(line) for line in lines]
    pins = re.findall(r"^(transformers|trl)==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    if any(importlib.metadata.version(package) != version for package, version in pins):
        # Written with those versions: elsewhere, compare the options that both have.
        known = {option_of(one) for one in written}
        lines = [line for line, one in zip(lines, written, strict=True) if is_here(one)]
        made = [one for one in made if option_of(one) in known]
    assert lines == [json.dumps(one) for one in made]
    assert len(lines) >= 300
    assert len(Counter(json.loads(line)["reader"] for line in lines)) == len(READERS)


@pytest.mark.parametrize("reader", READERS)
def test_every_input_of_the_corpus_gets_its_sentence(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    patterns.compiled.cache_clear()
    silent, other = [], []
    for number, line in enumerate(CORPUS.read_text(encoding="utf-8").splitlines(), 1):
        one = json.loads(line)
        if one["reader"] != reader or not is_here(one):
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            READERS[reader](one["given"], folder)
            silent.append(line[:200])
        except Exception as error:
            said = one_sentence(error)
            if not all(part in said for part in one["says"]):
                other.append((one["says"], said))
    assert not silent, f"taken: {silent}"
    assert not other, other


def test_every_number_of_a_configuration_has_a_range():
    open_ends = []
    for kind, _ in configurations().values():
        hints = get_type_hints(kind)
        for one in fields(kind):
            numeric = re.search(r"\b(int|float)\b", re.sub(r"Literal\[[^]]*\]", "", str(hints[one.name])))
            if numeric and one.name not in RANGES:
                open_ends.append(one.name)
    assert set(open_ends) <= UNRANGED, set(open_ends) - UNRANGED


# Hypothesis -----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "completion", "response", "label", "steps", "step_labels", "chosen", "rejected", "id"]
)


def taken_or_told(read: Callable[[], Any]) -> None:
    try:
        read()
    except Exception as error:
        one_sentence(error)


@settings(max_examples=150)
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode) | JSON.map(lambda x: json.dumps(x).encode()))
def test_any_bytes_are_json_or_get_a_sentence(content):
    taken_or_told(lambda: parse_json(content, "the file"))


@settings(max_examples=100)
@given(content=st.binary(max_size=40) | st.text(alphabet="ab:[]{}&*!|>-'\"\n\t ?%#,1.", max_size=40).map(str.encode))
def test_any_bytes_are_yaml_or_get_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    taken_or_told(lambda: read_yaml(path))


@settings(max_examples=120)
@given(st.lists(st.dictionaries(NAMES, JSON, max_size=5), min_size=1, max_size=3))
def test_any_rows_are_bags_or_get_a_sentence(rows):
    taken_or_told(lambda: read_bags(rows, Segmentation()))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from([one.name for one in fields(FractalSettings)]), JSON, max_size=3))
def test_any_block_is_settings_in_range_or_gets_a_sentence(change):
    block = FractalSettings().to_dict() | change
    try:
        found = FractalSettings.from_dict(json.loads(json.dumps(block)), where="rm")
    except ValueError as error:
        said = one_sentence(error)
        found = None
    if found is None:
        assert said.startswith("rm/config.json: the `fractal` block ")
        return
    assert 0 < found.temperature < math.inf
    assert 0 <= found.threshold <= math.nextafter(1, 2)
    assert math.isfinite(found.bias)
    assert abs(found.log_weight) <= 80


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(sorted(RANGES)), st.floats() | st.integers(), min_size=1, max_size=1))
def test_any_number_of_a_range_is_in_it_or_gets_a_sentence(values):
    (name, value), *_ = values.items()
    allowed = RANGES[name]
    inside = (allowed.low < value if allowed.open_low else allowed.low <= value) and (
        value < allowed.high if allowed.open_high else value <= allowed.high
    )
    assert (value in allowed) == (inside and not (allowed.whole and value != math.floor(value)))


class Tags(html.parser.HTMLParser):
    """The elements of a page, and its attributes that run code or load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "srcdoc")]


@settings(max_examples=15)
@given(text=st.text(max_size=20).map(lambda text: f"</script><script>alert(1)</script><img src=x onerror=1>{text}"))
def test_any_text_on_a_page_stays_text(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "view.html"
    counts = []
    for shown in ("plain", text):
        step = {"text": shown, "start": 0, "end": len(shown), "score": 0.5}
        record = {"id": shown, "row": 1, "prompt": shown, "response": shown, "steps": [step], "score": 0.5}
        record |= {"label": 1.0, "error": None, "truncated_steps": 0}
        write_viewer(path, [record], title=shown, threshold=0.5)
        page = Tags()
        page.feed(path.read_text(encoding="utf-8"))
        counts.append(page.tags)
    assert counts[0] == counts[1]


# Rows that contradict each other --------------------------------------------------------------------------------------

ROW = {"prompt": "1+1?", "completion": "1+1=2.", "label": 1}


@pytest.mark.parametrize(
    ("rows", "meaning", "says"),
    [
        ([ROW, ROW | {"label": 0}, ROW], "min", "1 response has both labels (first: row 2)."),
        ([ROW, ROW | {"label": 1.0}], "min", None),
        ([ROW | {"step_labels": [0]}], "min", "1 label is not the min of its step labels"),
        ([ROW | {"step_labels": [0]}] * 3, "mean", "3 labels are not the mean of their step labels (first: row 1)."),
        ([{"prompt": "a", "steps": ["b", "c"], "step_labels": [None, 0], "label": 1}], "min", "is not the min"),
        ([{"prompt": "a", "steps": ["b", "c"], "step_labels": [None, 1], "label": 0}], "min", None),
        ([{"prompt": "a", "steps": ["b", "c"], "step_labels": [None, 1], "label": 0}], "max", "is not the max"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "min", "1 preference has equal answers"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "min", None),
        ([ROW | {"id": "x"}, ROW | {"id": "x", "prompt": "2+2?"}], "min", "1 id names different rows (first: id x)."),
        ([ROW | {"id": "x"}, ROW | {"id": "x"}], "min", None),
    ],
)
def test_rows_that_contradict_each_other_are_counted(rows, meaning, says):
    told = contradictions(read_bags(rows, Segmentation()), meaning, source="rows.jsonl")
    assert (says is None and not told) or (len(told) == 1 and says in told[0] and told[0].startswith("rows.jsonl: "))


def test_prompts_of_two_files_are_compared_whether_they_are_texts_or_chats():
    chat = [{"role": "user", "content": "1+1?"}]
    names = ("train.jsonl", "test.jsonl")
    assert shared_prompts([chat, "a"], [list(reversed(chat)), "b"], names=names) == [
        "test.jsonl: 1 of 2 prompts are in train.jsonl too: measurements on them prove nothing."
    ]
    assert shared_prompts(["a"], ["b"], names=names) == []
