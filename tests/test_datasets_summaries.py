"""Official files of summaries become good bags, and a text generator makes half of them bad."""

import json
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.corruption import ATTEMPTS, MASK, WORD_SHARE, corrupt_summaries
from fractal_rm.data.formats.summary_sets import read_aquamuse, read_wikicatsum
from fractal_rm.data.formats.tfrecord import crc32c, masked_crc32c
from fractal_rm.data.readers import read_jsonl
from fractal_rm.data.sentences import sentences

# WikiCatSum


@pytest.fixture
def files(tmp_path):
    def write(sources, targets):
        (tmp_path / "test.src").write_text("".join(f"{line}\n" for line in sources), encoding="utf-8", newline="")
        (tmp_path / "test.tgt").write_text("".join(f"{line}\n" for line in targets), encoding="utf-8", newline="")
        return tmp_path / "test.src", tmp_path / "test.tgt"

    return write


def test_lines_of_both_files_make_a_good_summary(files):
    paths = files(
        ["barn owl <EOT> the owl hunts . <EOP> it eats mice .", "acme makes anvils ."],
        ["The owl is a bird . <SNT> It hunts at night . <SNT>", "Acme is a company ."],
    )
    first, second = read_wikicatsum(*paths)
    assert first.prompt == "barn owl\nthe owl hunts .\nit eats mice ."
    assert first.response == "The owl is a bird . It hunts at night ."
    assert first.steps == ["The owl is a bird .", "It hunts at night ."]
    assert (first.label, first.step_labels, first.id) == (1.0, (1.0, 1.0), "1")
    assert (second.prompt, second.steps) == ("acme makes anvils .", ["Acme is a company ."])


def test_a_line_separator_inside_a_line_ends_none(files):
    paths = files(["one\u2028two\x0cthree", "b"], ["A\u0085b .", "C ."])
    assert [bag.prompt for bag in read_wikicatsum(*paths)] == ["one\u2028two\x0cthree", "b"]


@pytest.mark.parametrize(
    "summary",
    [
        {"text": ["It hunts .", "It flies ."], "topic": [3, 1]},
        [{"text": "It hunts .", "topic": 3}, {"text": "It flies ."}],
    ],
)
def test_rows_of_the_hub_give_the_same(files, summary):
    row = {"gem_id": "g1", "title": "owl", "paragraphs": ["owls hunt .", "and fly ."], "summary": summary}
    [bag] = read_wikicatsum([row])
    [wanted] = read_wikicatsum(*files(["owl <EOT> owls hunt . <EOP> and fly ."], ["It hunts . <SNT> It flies ."]))
    assert (bag.prompt, bag.response, bag.step_spans) == (wanted.prompt, wanted.response, wanted.step_spans)
    assert bag.id == "g1"


def test_files_that_do_not_belong_together_are_refused(files):
    with pytest.raises(ValueError, match=r"test\.src has 2 lines and .*test\.tgt 1; give the two files of one split\."):
        read_wikicatsum(*files(["a", "b"], ["A ."]))
    with pytest.raises(ValueError, match=r"test\.src, row 2: there are no steps; drop the row"):
        read_wikicatsum(*files(["a", "b"], ["A .", ""]))
    with pytest.raises(TypeError, match=r"Rows bring their own summaries; give `summaries` with a \.src file only\."):
        read_wikicatsum([{}], "test.tgt")


# AquaMuSe


def field(number, content):
    """A field of Protocol Buffers with a length."""
    length, size = len(content), b""
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def example(**features):
    """A tf.train.Example: texts as bytes_list, numbers as int64_list."""
    entries = b""
    for name, values in features.items():
        texts = b"".join(field(1, value.encode()) for value in values if isinstance(value, str))
        numbers = bytes(value for value in values if isinstance(value, int))
        feature = field(1, texts) if texts else field(3, field(1, numbers))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def tfrecord(*records):
    content = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        content += length + struct.pack("<I", masked_crc32c(length))
        content += record + struct.pack("<I", masked_crc32c(record))
    return content


TARGET = "Mice, mostly. They also eat frogs… sometimes. " + "An owl hunts at night. " * 20
RECORD = example(query=["what do owls eat"], input_urls=["http://a<EOD>http://b"], target=[TARGET], size=[3, 9])


def test_check_sums_are_those_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_tfrecords_are_read_without_tensorflow(tmp_path):
    path = tmp_path / "release-set-tf-examples-00000-of-00050"
    path.write_bytes(tfrecord(RECORD, example(query=["who"], target=["Eva."])))
    first, second = read_aquamuse(path)
    assert (first.prompt, first.response) == ("what do owls eat", TARGET)
    assert first.steps[:2] == ["Mice, mostly.", "They also eat frogs… sometimes."]
    assert first.label == 1.0
    assert set(first.step_labels) == {1.0}
    assert (second.prompt, second.steps, second.id) == ("who", ["Eva."], "2")


def test_a_folder_of_tfrecords_is_read_in_the_order_of_its_names(tmp_path):
    for number in (2, 0, 1):
        record = example(query=[f"q{number}"], target=["Eva."])
        (tmp_path / f"release-set-tf-examples-0000{number}-of-00050").write_bytes(tfrecord(record))
    assert [bag.prompt for bag in read_aquamuse(tmp_path)] == ["q0", "q1", "q2"]


def test_rows_and_json_lines_give_what_tfrecords_give(tmp_path):
    row = {"query": "what do owls eat", "input_urls": ["http://a"], "target": TARGET}
    (tmp_path / "dev").write_bytes(tfrecord(RECORD))
    (tmp_path / "dev.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert read_aquamuse([row]) == read_aquamuse(tmp_path / "dev") == read_aquamuse(tmp_path / "dev.jsonl")


@given(st.integers(0, len(tfrecord(RECORD)) - 1), st.integers(1, 255))
def test_a_damaged_byte_is_always_found(tmp_path_factory, position, change):
    content = bytearray(tfrecord(RECORD))
    content[position] ^= change
    path = tmp_path_factory.mktemp("damaged") / "dev"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"dev, row 1: .*download the file again\."):
        read_aquamuse(path)


@pytest.mark.parametrize("kept", [1, 11, 15, 40, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, kept):
    (tmp_path / "dev").write_bytes(tfrecord(RECORD)[:kept])
    with pytest.raises(ValueError, match=r"dev, row 1: .*cut off"):
        read_aquamuse(tmp_path / "dev")


@pytest.mark.parametrize("record", [b"\x0b", b"\x0a\x7f", field(1, field(1, field(1, b"\xff")))])
def test_a_record_that_is_no_example_is_refused(tmp_path, record):
    (tmp_path / "dev").write_bytes(tfrecord(RECORD, record))
    with pytest.raises(ValueError, match=r"dev, row 2: the record is no tf\.train\.Example; check the file\."):
        read_aquamuse(tmp_path / "dev")


def test_a_record_without_a_summary_is_refused(tmp_path):
    (tmp_path / "dev").write_bytes(tfrecord(example(query=["who"], size=[1])))
    with pytest.raises(ValueError, match=r"dev, row 1: column 'target' is missing or null \(found: 'query'\)"):
        read_aquamuse(tmp_path / "dev")


# The recipe that makes bad summaries


def good(text, name=None):
    spans = tuple(sentences(text))
    return Bag("prompt", text, spans, 1.0, (1.0,) * len(spans), id=name)


WORDS = ["Owls", "hunt", "mice", "quickly", "the", "in", "forests", "42", "and", "sleep"]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=2, max_size=7), min_size=1, max_size=6).map(
    lambda steps: "  ".join(" ".join(["So", *words]) + "." for words in steps)
)


def changed(before, after):
    return [old != new for old, new in zip(before.steps, after.steps, strict=True)]


def kind(before, after):
    """How a summary was made bad: all of a step, or words in it."""
    if before == after:
        return "good"
    rest = [
        (old, new)
        for old, new in zip(before.steps, after.steps, strict=True)
        if old != new and new != "Zebras read books."
    ]
    return "words" if rest else "sentences"


def storyteller(prompt):
    return "Zebras read books. And more." if MASK not in prompt else "Zebras"


@given(st.lists(TEXTS, min_size=1, max_size=8), st.integers(0, 5))
def test_a_step_is_bad_iff_it_was_changed_and_a_response_iff_one_was(texts, seed):
    before = [good(text, str(number)) for number, text in enumerate(texts)]
    after = corrupt_summaries(before, storyteller, seed=seed)
    for old, new in zip(before, after, strict=True):
        assert (old.prompt, old.id, len(old.steps)) == (new.prompt, new.id, len(new.steps))
        assert new.step_labels == tuple(float(not one) for one in changed(old, new))
        assert new.label == min(new.step_labels)
    made_bad = sum(new.label == 0 for new in after)
    assert made_bad <= len(before) // 2
    if all(re.search("Owls|hunt|mice|quickly|forests|42|sleep", text) for text in texts):
        assert made_bad == len(before) // 2


@given(TEXTS, st.integers(0, 30))
def test_at_most_half_of_the_sentences_or_a_fifth_of_the_content_words_change(text, seed):
    before = [good(text), good(text)]
    for old, new in zip(before, corrupt_summaries(before, storyteller, seed=seed), strict=True):
        steps = changed(old, new)
        if kind(old, new) == "sentences" and len(steps) > 1:
            assert 1 <= sum(steps) <= max(1, len(steps) // 2)
            assert not steps[0]
        if kind(old, new) == "words":
            pairs = list(zip(old.response.split(), new.response.split(), strict=True))
            words = [one for one, other in pairs if one != other]
            content = [word for word in old.response.split() if word.strip(".") not in ("So", "the", "in", "and")]
            assert 1 <= len(words) <= max(1, len(content) // 5)
            assert set(words) <= set(content)


def test_both_kinds_occur_at_about_the_rate_of_the_paper():
    text = "Owls hunt mice. Foxes hunt hares. Cats hunt birds. Dogs hunt cats."
    before = [good(text) for _ in range(400)]
    kinds = [kind(old, new) for old, new in zip(before, corrupt_summaries(before, storyteller, seed=1), strict=True)]
    assert kinds.count("good") == 200
    assert kinds.count("words") / 200 == pytest.approx(WORD_SHARE, abs=0.1)


def test_the_same_seed_gives_the_same_summaries_and_another_one_others():
    before = [good("Owls hunt mice. Foxes hunt hares. Cats hunt birds.") for _ in range(12)]
    first, again, other = (corrupt_summaries(before, storyteller, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_white_space_between_steps_stays():
    before = [good(" Owls hunt.\n\n  Cats sleep.\tDogs bark. ") for _ in range(8)]
    for new in corrupt_summaries(before, storyteller):
        assert re.fullmatch(r" [^.]+\.\n\n  [^.]+\.\t[^.]+\. ", new.response)


def test_the_generator_sees_what_stands_before_and_what_was_written():
    seen = []

    def generate(prompt):
        seen.append(prompt)
        return f"New sentence {len(seen)}."

    text = "Anna came. Ben sat. Carl ran. Dora slept. Emil sang. Fred read."
    for seed in range(20):
        seen.clear()
        before = [good(text), good(text)]
        after = corrupt_summaries(before, generate, seed=seed)
        for old, new in zip(before, after, strict=True):
            if old != new and all(MASK not in prompt for prompt in seen):
                places = [place for place, one in enumerate(changed(old, new)) if one]
                assert [
                    prompt.startswith(" ".join(new.steps[:place])) for place, prompt in zip(places, seen, strict=True)
                ]


def test_a_generator_that_repeats_the_text_leaves_the_summary_good():
    calls = []
    before = [good("Owls hunt. Owls hunt.") for _ in range(10)]

    def parrot(prompt):
        calls.append(prompt)
        if MASK not in prompt:
            return "  owls   HUNT. "
        return "hunt" if prompt.startswith(("Owls [", "Owls hunt. Owls [")) else "Owls"

    assert corrupt_summaries(before, parrot) == before
    assert len(calls) == 5 * ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        ("  \n ", ValueError, "The generator gave nothing usable in 4 attempts; check what it answers."),
        (None, TypeError, "The generator gave NoneType, not text; make it return a text."),
    ],
)
def test_a_generator_that_gives_nothing_is_named(answer, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        corrupt_summaries([good("Owls hunt. Cats sleep.")] * 2, lambda prompt: answer)


def test_bad_summaries_are_not_made_worse():
    with pytest.raises(ValueError, match=r"bag 2 has the label 0\.0, not 1; give good summaries only\."):
        corrupt_summaries([good("Owls hunt."), Bag("", "No.", ((0, 3),), 0.0)], storyteller)


def test_real_summaries_are_corrupted(data_dir):
    rows = [row for row in read_jsonl(data_dir / "aquamuse_swap" / "test.jsonl.gz") if row["label"] == 1][:60]
    official = [{"query": row["prompt"], "input_urls": [], "target": " ".join(row["steps"])} for row in rows]
    before = read_aquamuse(official)
    after = corrupt_summaries(before, storyteller)
    assert sum(bag.label == 0 for bag in after) == 30
    for old, new in zip(before, after, strict=True):
        assert new.step_labels == tuple(float(not one) for one in changed(old, new))
