"""Official files of summaries become good bags, and a text generator makes half of them bad."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.bag import Bag
from fractal_rm.data.formats.aquamuse import read_aquamuse
from fractal_rm.data.formats.corruption import ATTEMPTS, MASK, WORD_SHARE, corrupt_summaries
from fractal_rm.data.formats.wikicatsum import read_wikicatsum
from fractal_rm.data.readers import read_jsonl
from fractal_rm.data.sentences import sentences

# WikiCatSum


@pytest.fixture
def files(tmp_path):
    def write(sources, targets):
        (tmp_path / "test.src").write_text("".join(f"{line}\n" for line in sources), encoding="utf-8", newline="")
        (tmp_path / "test.tgt").write_text("".join(f"{line}\n" for line in targets), encoding="utf-8", newline="")
        return tmp_path / "test.src"

    return write


def test_lines_of_both_files_make_a_good_summary(files):
    path = files(
        ["barn owl <EOT> the owl hunts . <EOP> it eats mice .", "acme makes anvils ."],
        ["The owl is a bird . <SNT> It hunts at night . <SNT>", "Acme is a company ."],
    )
    first, second = read_wikicatsum(path)
    assert first.prompt == "barn owl\nthe owl hunts .\nit eats mice ."
    assert first.response == "The owl is a bird . It hunts at night ."
    assert first.steps == ["The owl is a bird .", "It hunts at night ."]
    assert (first.label, first.step_labels, first.id) == (1.0, (1.0, 1.0), "1")
    assert (second.prompt, second.steps) == ("acme makes anvils .", ["Acme is a company ."])


def test_a_line_separator_inside_a_line_ends_none(files):
    path = files(["one\u2028two\x0cthree", "b"], ["A\u0085b .", "C ."])
    assert [bag.prompt for bag in read_wikicatsum(path)] == ["one\u2028two\x0cthree", "b"]


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
    [wanted] = read_wikicatsum(files(["owl <EOT> owls hunt . <EOP> and fly ."], ["It hunts . <SNT> It flies ."]))
    assert (bag.prompt, bag.response, bag.step_spans) == (wanted.prompt, wanted.response, wanted.step_spans)
    assert bag.id == "g1"


def test_files_that_do_not_belong_together_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"test\.src has 2 lines and .*test\.tgt 1; give the two files of one split\."):
        read_wikicatsum(files(["a", "b"], ["A ."]))
    with pytest.raises(ValueError, match=r"test\.src, row 2: there are no steps; drop the row"):
        read_wikicatsum(files(["a", "b"], ["A .", ""]))
    (files(["a"], ["A ."]).with_suffix(".tgt")).unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.tgt is no file; check the path\."):
        read_wikicatsum(tmp_path / "test.src")


# AquaMuSe


ROW = {
    "query": "what do owls eat",
    "input_urls": ["http://a"],
    "target": "Mice, mostly. They also eat frogs… sometimes. " + "An owl hunts at night. " * 20,
}


def test_an_answer_is_a_good_summary_of_its_query(tmp_path):
    first, second = read_aquamuse([ROW, ROW | {"query": "who", "target": "Eva."}])
    assert (first.prompt, first.response) == ("what do owls eat", ROW["target"])
    assert first.steps[:2] == ["Mice, mostly.", "They also eat frogs… sometimes."]
    assert first.label == 1.0
    assert set(first.step_labels) == {1.0}
    assert (second.prompt, second.steps, second.id) == ("who", ["Eva."], "2")
    (tmp_path / "dev.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    assert read_aquamuse(tmp_path / "dev.jsonl") == [first]


def test_a_record_without_a_summary_is_refused():
    with pytest.raises(ValueError, match=r"dev, row 1: column 'target' is missing or null \(found: 'query'\)"):
        read_aquamuse([{"query": "who"}], source="dev")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "release-set-tf-examples-00000-of-00050").write_bytes(b"\x0a\x7f")
    with pytest.raises(ValueError, match=r"has an unknown ending; give a file that ends in \.jsonl"):
        read_aquamuse(tmp_path / "release-set-tf-examples-00000-of-00050")


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
