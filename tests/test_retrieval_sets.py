"""Official files of retrieval become bags: FiRA with its grades, MultiSpanQA with windows that hold no answer."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.formats.fira import read_fira
from fractal_rm.data.formats.multispanqa import _longest_run_of_zeros, read_multispanqa
from fractal_rm.data.readers import read_jsonl

HEADER = (
    "id\trelevanceLevel\trelevanceCharacterRanges\tdurationUsedToJudgeMs\tjudgedAtUnixTS\tdocumentId\tqueryId\tuserId"
)
LEVELS = ("0_NOT_RELEVANT", "1_TOPIC_RELEVANT_DOES_NOT_ANSWER", "2_GOOD_ANSWER", "3_PERFECT_ANSWER")
TEXT = "Blood flows. Cold slows the flow of blood. It is red."
SENTENCES = ["Blood flows.", "Cold slows the flow of blood.", "It is red."]


def marked(*texts, document=TEXT):
    """Ranges of some texts, both ends included, as the annotation tool writes them."""
    starts = [document.index(text) for text in texts]
    return ";".join(f"{start}-{start + len(text) - 1}" for start, text in zip(starts, texts, strict=True))


@pytest.fixture
def fira(tmp_path):
    """Writes the three official files from judgements (level, ranges[, document[, query]]) and reads them."""

    def read(*judgements, documents=None, queries=None, header=HEADER):
        rows = [header]
        for number, (level, ranges, *pair) in enumerate(judgements, 1):
            document, query = [*pair, *("D1_0", "Q7")[len(pair) :]]
            rows.append(
                f"{number}\t{LEVELS[level] if level in range(4) else level}\t{ranges}\t900\t15\t{document}\t{query}\tU"
            )
        files = {
            "fira-trec19-raw-judgements.tsv": rows,
            "documents.tsv": ["doc_id\tdoc_text", *(documents or [f"D1_0\t{TEXT}", "D1_1\tIce is cold."])],
            "queries.tsv": ["query_id\tquery_text", *(queries or ["Q7\twhat slows blood", "Q8\tis ice cold"])],
        }
        for name, lines in files.items():
            (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_fira(tmp_path / "fira-trec19-raw-judgements.tsv")

    return read


def test_a_step_has_the_highest_grade_of_its_words(fira):
    [bag] = fira((3, marked("Cold")), (2, marked("slows the flow", "red")), (1, marked("Cold slows")))
    assert bag.steps == SENTENCES
    assert bag.step_labels == (0.0, 3.0, 2.0)
    assert (bag.label, bag.num_grades, bag.prompt, bag.id) == (3.0, 4, "what slows blood", "Q7-D1_0")
    assert bag.response == TEXT


def test_every_range_of_a_judgement_counts(fira):
    [bag] = fira((2, marked("Blood", "It is")))
    assert bag.step_labels == (2.0, 0.0, 2.0)


def test_a_range_over_two_sentences_touches_both(fira):
    [bag] = fira((3, marked("flows. Cold")))
    assert bag.step_labels == (3.0, 3.0, 0.0)


def test_a_range_ends_with_its_last_character(fira):
    end = TEXT.index("Cold")
    assert fira((2, f"0-{end - 1}"))[0].step_labels == (2.0, 0.0, 0.0)
    assert fira((2, f"0-{end}"))[0].step_labels == (2.0, 2.0, 0.0)


def test_a_judgement_without_ranges_is_about_the_whole_snippet(fira):
    [bag] = fira((1, "<no ranges selected>"), (2, marked("red")))
    assert bag.step_labels == (1.0, 1.0, 2.0)
    [bag] = fira((0, "<no ranges selected>"))
    assert (bag.step_labels, bag.label) == ((0.0, 0.0, 0.0), 0.0)


def test_pairs_of_query_and_document_are_apart_and_in_order(fira):
    bags = fira(
        (3, "<no ranges selected>", "D1_1", "Q8"),
        (0, "<no ranges selected>"),
        (2, marked("Ice", document="Ice is cold."), "D1_1", "Q8"),
    )
    assert [(bag.id, bag.label) for bag in bags] == [("Q8-D1_1", 3.0), ("Q7-D1_0", 0.0)]


def test_characters_outside_the_basic_plane_are_two_units_of_a_range(fira):
    document = "D1_0\t🙂🙂 Hot. Cold."  # in UTF-16: "Hot." at 5 to 8, "Cold." at 10 to 14
    assert fira((3, "10-14"), documents=[document])[0].step_labels == (0.0, 3.0)
    assert fira((3, "5-8"), documents=[document])[0].step_labels == (3.0, 0.0)


def test_quoted_fields_may_hold_quotation_marks(fira):
    [bag] = fira((2, "0-3"), documents=['D1_0\t"He said ""stop"". We did."'])
    assert bag.response == 'He said "stop". We did.'


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 2), min_size=1)), min_size=1, max_size=5))
def test_grades_agree_with_a_table_of_judges_and_sentences(tmp_path_factory, judged):
    folder = tmp_path_factory.mktemp("fira")
    (folder / "documents.tsv").write_text(f"doc_id\tdoc_text\nD\t{TEXT}\n")
    (folder / "queries.tsv").write_text("query_id\tquery_text\nQ\tblood\n")
    lines = [
        f"{n}\t{LEVELS[grade]}\t{marked(*(SENTENCES[i] for i in which))}\t1\t1\tD\tQ\tU"
        for n, (grade, which) in enumerate(judged)
    ]
    (folder / "j.tsv").write_text("\n".join([HEADER, *lines]) + "\n")
    [bag] = read_fira(folder / "j.tsv")
    table = [[grade if sentence in which else 0 for grade, which in judged] for sentence in range(3)]
    assert bag.step_labels == tuple(float(max(grades)) for grades in table)
    assert bag.label == max(bag.step_labels)


@pytest.mark.parametrize(
    ("judgement", "sentence"),
    [
        (("4_BEST", "0-3"), "row 2: relevanceLevel is '4_BEST'; give a grade from 0 to 3, such as '2_GOOD_ANSWER'."),
        ((2, "a-b"), "row 2: relevanceCharacterRanges has 'a-b'; give ranges such as '0-4;6-9'."),
        ((2, "4-1"), "row 2: relevanceCharacterRanges has '4-1'; give ranges such as '0-4;6-9'."),
        ((2, "900-901"), "row 2: range '900-901' is outside the document; give the files of one release."),
        ((2, "0-1", "D9"), "row 2: document 'D9' is not in "),
        ((2, "0-1", "D1_0", "Q9"), "row 2: query 'Q9' is not in "),
    ],
)
def test_a_defect_of_fira_is_one_sentence_with_its_row(fira, judgement, sentence):
    with pytest.raises(ValueError, match=re.escape(f"fira-trec19-raw-judgements.tsv, {sentence}")):
        fira(judgement)


def test_missing_columns_and_empty_files_of_fira_are_named(fira):
    with pytest.raises(ValueError, match=r"judgements\.tsv, row 2: column 'queryId' is missing or null"):
        fira((2, "0-1"), header=HEADER.replace("queryId", "query"))
    with pytest.raises(ValueError, match=r"judgements\.tsv has no rows; give at least one\."):
        fira()


# MultiSpanQA


def multispan(*sentences, name="a"):
    """A row from sentences of tokens, of which those with a star are answers."""
    tokens = [token for sentence in sentences for token in sentence.split()]
    labels, before = [], "O"
    for token in tokens:
        before = ("I" if before != "O" else "B") if token.startswith("*") else "O"
        labels.append(before)
    tokens = [token.removeprefix("*") for token in tokens]
    row = {"id": name, "type": "HUM", "question": ["who", "came"], "context": tokens}
    return row | {"num_span": labels.count("B"), "label": labels, "structure": "Conjunction"}


ROW = multispan("It rained .", "*Eva came .", "We ate bread .", "They sang .", "*Max *Lee sat .", "Then night fell .")


def test_a_step_is_good_iff_it_holds_an_answer_token():
    [bag] = read_multispanqa([ROW], negative_share=0)
    assert bag.prompt == "who came"
    assert bag.steps == [
        "It rained .",
        "Eva came .",
        "We ate bread .",
        "They sang .",
        "Max Lee sat .",
        "Then night fell .",
    ]
    assert bag.step_labels == (0.0, 1.0, 0.0, 0.0, 1.0, 0.0)
    assert (bag.label, bag.id) == (1.0, "a")


def test_a_negative_window_is_the_longest_without_an_answer():
    [bag] = read_multispanqa([ROW], negative_share=1)
    assert bag.response == "We ate bread . They sang ."
    assert (bag.steps, bag.step_labels, bag.label) == (["We ate bread .", "They sang ."], (0.0, 0.0), 0.0)


WORDS = st.sampled_from(["ice", "owl", "sun", "*Eva", "*Max", "tea"])
SENTENCE = st.lists(WORDS, min_size=1, max_size=4).map(lambda words: " ".join(["So", *words, "."]))


@given(st.lists(st.lists(SENTENCE, min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
def test_negative_windows_hold_no_answer_token_at_all(documents, seed):
    rows = [multispan(*sentences, name=str(number)) for number, sentences in enumerate(documents)]
    for bag, row in zip(read_multispanqa(rows, negative_share=1, seed=seed), rows, strict=True):
        answers = {token for token, label in zip(row["context"], row["label"], strict=True) if label != "O"}
        held = [bool(answers & set(step.split())) for step in bag.steps]
        assert bag.step_labels == tuple(map(float, held))
        if bag.label == 0:
            assert not any(held)
        else:  # nothing could be cut: every sentence holds an answer
            assert all(held)
        assert bag.response in " ".join(row["context"])


@given(st.lists(st.integers(0, 1), max_size=8))
def test_the_longest_run_agrees_with_trying_all(labels):
    runs = [
        (start, end) for start, end in itertools.combinations(range(len(labels) + 1), 2) if not any(labels[start:end])
    ]
    longest = max((end - start for start, end in runs), default=0)
    wanted = next((run for run in runs if run[1] - run[0] == longest), (0, 0))
    assert _longest_run_of_zeros(labels) == wanted


def test_half_of_the_rows_are_cut_and_the_seed_says_which():
    rows = [ROW | {"id": str(number)} for number in range(20)]
    first, again, other = (read_multispanqa(rows, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sum(bag.label for bag in first) == sum(bag.label for bag in other) == 10
    assert [bag.id for bag in first] == [row["id"] for row in rows]


def test_the_official_object_around_the_rows_is_opened(tmp_path):
    path = tmp_path / "valid.json"
    path.write_text(json.dumps({"version": 1.0, "data": [ROW]}), encoding="utf-8")
    assert read_multispanqa(path, negative_share=0) == read_multispanqa([ROW], negative_share=0)
    path.write_text('{"version": 1.0}', encoding="utf-8")
    with pytest.raises(TypeError, match=r"valid\.json does not hold a list under 'data'; give the official file\."):
        read_multispanqa(path)
    path.write_text('{"version"', encoding="utf-8")
    with pytest.raises(ValueError, match=r"valid\.json is invalid JSON \("):
        read_multispanqa(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label": None}, "row 1: column 'label' is missing or null"),
        ({"label": ["O"]}, "row 1: there are 1 labels for 21 tokens; give one label for each token."),
        ({"label": ["X"] * 21}, "row 1: the labels include 'X'; give only 'B', 'I' and 'O'."),
        ({"context": [], "label": []}, "row 1: the response is empty"),
    ],
)
def test_a_defect_of_multispanqa_is_one_sentence_with_its_row(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(f"data, {sentence}")):
        read_multispanqa([ROW | changes])


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"negative_share is 2; give a share from 0 to 1\."):
        read_multispanqa([ROW], negative_share=2)


def test_real_paragraphs_put_back_into_tokens_keep_their_answers(data_dir):
    rows = [row for row in read_jsonl(data_dir / "multispanqa" / "test.jsonl.gz") if row["meta"]["document"] == "full"]
    official = []
    for row in rows:
        words = [
            (word, bool(gold))
            for step, gold in zip(row["steps"], row["step_labels"], strict=True)
            for word in step.split()
        ]
        labels = ["I" if gold else "O" for _, gold in words]
        official.append(
            {
                "id": row["id"],
                "question": row["prompt"].split(),
                "context": [word for word, _ in words],
                "label": labels,
            }
        )
    bags = read_multispanqa(official, negative_share=0)
    assert [bag.label for bag in bags] == [float(row["label"]) for row in rows]
    assert sum(map(len, (bag.steps for bag in bags))) == pytest.approx(sum(len(row["steps"]) for row in rows), rel=0.02)
    negatives = [bag for bag in read_multispanqa(official, negative_share=1) if bag.label == 0]
    good = {
        row["id"]: [step for step, gold in zip(row["steps"], row["step_labels"], strict=True) if gold] for row in rows
    }
    assert len(negatives) > 0.9 * len(rows)
    assert not any(" ".join(step.split()) in bag.response for bag in negatives for step in good[bag.id])
