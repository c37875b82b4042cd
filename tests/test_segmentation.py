"""Steps tile the response, and sentences are cut where a reader would cut them."""

# ruff: noqa: RUF001 - the full stops of other scripts are meant

import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fractal_rm.data.prompts import read_completion
from fractal_rm.data.segmentation import (
    Segmentation,
    common_gap,
    gaps,
    join_steps,
    locate_steps,
    sentences,
)
from fractal_rm.scorers.settings import FractalSettings

SEGMENTATIONS = [
    Segmentation("lines"),
    Segmentation("lines", version=1),
    Segmentation("sentences", version=1),
    Segmentation("lines", thinking="skip"),
    Segmentation("sentences"),
    Segmentation("sentences", language="zh"),
    Segmentation("separator", separator="##"),
    Segmentation("pattern", pattern=r"\n\s*\n|(?=Step)"),
]

# Pieces from which Hypothesis builds texts that look like responses, and texts that look like trouble.
PIECES = [
    *(
        "Add 3 and 4. ",
        "So x. Then y",
        "3.14",
        "5! = 120",
        "e.g. ",
        "Dr. ",
        "$",
        "$$",
        "$5 ",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
    ),
    *(
        "`",
        "``",
        "```",
        "```python\n",
        "\\begin{align}",
        "\\end{align}",
        "\\$",
        "1. ",
        "2) ",
        "- ",
        "* ",
        "Step 3:",
        "##",
    ),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " ",
        "\t",
        "\x0b",
        "\u2028",
        "\u3000",
        ".",
        "!",
        "?",
        "...",
        "。",
        "”",
        ")",
        "**",
        "a",
        "b. C",
    ),
    *("你好", "😀", "👨\u200d👩\u200d👧", "e\u0301", "\ud83d", "\x00", "it goes", "A", "---", "#"),
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=25).map("".join)


def cut(text, language="en"):
    return [text[start:end] for start, end in sentences(text, language)]


@pytest.mark.parametrize("segmentation", SEGMENTATIONS, ids=lambda s: f"{s.method}-{s.language}")
@given(text=texts)
def test_steps_and_gaps_give_back_the_text(segmentation, text):
    spans = segmentation(text)
    steps = [text[start:end] for start, end in spans]
    between = gaps(text, spans)
    assert len(between) == len(steps) + 1
    assert "".join(a + b for a, b in zip(between, [*steps, ""], strict=True)) == text
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    assert all(step and step == step.strip() for step in steps)
    if not text.strip():
        assert spans == []


@given(text=texts)
def test_lines_are_the_stripped_lines_that_are_not_blank(text):
    expected = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    assert [text[start:end] for start, end in Segmentation(version=1)(text)] == [line for line in expected if line]


@given(text=st.text(alphabet="a1 .-\n[]{}", max_size=30))
def test_lines_without_a_letter_or_digit_are_parts_of_the_others(text):
    lines = [line for line in text.split("\n") if line.strip()]
    speaking = [line.strip() for line in lines if any(map(str.isalnum, line))]
    steps = [text[start:end] for start, end in Segmentation()(text)]
    assert len(steps) == (len(speaking) or bool(lines))
    assert all(line in step for line, step in zip(speaking, steps, strict=False))
    assert "".join("".join(steps).split()) == "".join(text.split())


@given(text=texts, mark=st.sampled_from(["##", ".", "\n\n", "(", "a"]))
def test_a_separator_is_taken_literally(text, mark):
    expected = [piece.strip() for piece in text.split(mark) if piece.strip()]
    assert [text[start:end] for start, end in Segmentation("separator", separator=mark)(text)] == expected


@given(text=texts, expression=st.sampled_from([r"\n+", r"[.!?]\s", r"(?=\d)", r"a*", r"(?:x|\s)+"]))
def test_a_pattern_cuts_as_re_split_does(text, expression):
    assume(not set(text) & set("\x1c\x1d\x1e\x1f"))  # white space to `re`, and not to `regex` or Unicode
    expected = [piece.strip() for piece in re.split(expression, text) if piece.strip()]
    assert [text[start:end] for start, end in Segmentation("pattern", pattern=expression)(text)] == expected


@given(text=texts)
def test_every_character_of_the_text_lies_in_a_sentence(text):
    assert all(not gap.strip() for gap in gaps(text, sentences(text)))


FRAGMENTS = [
    *(
        "so 3.14 holds",
        "e.g. this",
        "i.e. that",
        "Dr. Smith and Prof. Lee",
        "see Fig. 2 here",
        "by eq. (3) and Eq. 4 too",
    ),
    *(
        "cf. Thm. $3$ there",
        "w.r.t. it",
        "$x = 3. 5$ fits",
        "$$y = 2. Z$$ fits",
        "\\(a. B\\) fits",
        "\\[ c. D \\] fits",
    ),
    *("call `f. G` now", "$5 and $6 are paid", "$2.50 is paid", "5! = 120 is big", "n! is big", "np.array is used"),
    *(
        "😀 smiles",
        "“你好” greets",
        "No. 5 is alive",
        "(see Sec. 4.2) as well",
        "vs. them",
        "at 3 p.m. or so",
        "e\u0301 accents",
    ),
    *("\\begin{cases} a. B \\\\[2pt] c \\end{cases} hold", "3*4=12", "**bold** words"),
]
sentence_texts = st.builds(
    lambda opener, fragments, end: f"{opener} {' and '.join(fragments)}{end}",
    st.sampled_from(["We know", "Then", "So", "The value is", "Weng pays"]),
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4),
    st.sampled_from([".", "?", "!", " x.", " $z$.", " 7.", " (so).", ' "so."', " **so.**", " \\(n\\).", "..."]),
)
# A break, and the marker of the item that follows it.
breaks = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\r\n", "\n1. ", "\n2) ", "\n- ", "\n\n* ", "\n**3.** ", "\nStep 4. "]
)


@given(st.lists(st.tuples(breaks, sentence_texts), min_size=1, max_size=6))
def test_sentences_come_back_as_they_were_put_together(parts):
    text = "".join(gap + sentence for gap, sentence in parts)
    assert cut(text) == [(gap + sentence).strip() for gap, sentence in parts]


@pytest.mark.parametrize(
    "step",
    [
        "Pi is 3.14, not 3.15.",
        "We use e.g. Euler, i.e. That man, and Dr. Lee.",
        "By Fig. 2 and eq. (3), and Eqs. (4), (5), Thm. \\ref{a}, Sec. $3$, vol. 2, it holds.",
        "Let $x = 3. 5$ and $y. Z$ be given.",
        "So $$a. B$$ and \\(c. D\\) and \\[e. F\\] hold.",
        "Then \\begin{align*}\na &= b. C \\\\[2pt]\n  &= 3.\n\\end{align*}",
        "```python\nx = 1. Y\n\nprint('A. B')\n```",
        "Call `a. B` or ``c. D`` or ```e. F``` now.",
        "The sum is\n\\[\n  1 + 2 = 3.\n\\]\nwhere one is odd.",
        "The sum of the two\nnumbers is odd.",
        "If $f(x) = 1 \\text{ for all. Then } x$ it holds.",
        "Since 5! = 120 and n! > 5 and (n+1)! is big, it holds.",
        "Let $ x = 3. 5 $ be given.",
        "Wait... and then see.",
        "He said (see above. Then below) that.",
        "If $x = 3. 5 \\text{ if odd. Then more}$ it holds.",
        "Use obj.Method and sum.Txt here.",
        "Let $a +\nb. C$ be given.",
    ],
)
def test_nothing_is_cut_inside(step):
    before, after = "We begin.", "Then we end."
    assert cut(f"{before}\n{step}\n{after}") == [before, step, after]


@pytest.mark.parametrize(
    "steps",
    [
        ["It costs $5 and $6.", "Then she pays."],
        ["It costs $5.", "Let $x = 3. 5$ be more.", "He has $3.", "Done."],
        ["It costs $5 in US$.", "She has CA$.", "Then she pays $6."],
        ["It costs $5.", "She pays in US$.", "Then he pays."],
        ["They pay 2*9=$18.", "so it is a=$20.", "then rest."],
        ["He pays $5.", "then she pays in $ too."],
        ["It is \\(x here.", "Then \\(y\\) is."],
        ["Eggs at $2.50, milk at $3.", "How much?", "They pay 2*9=$18.", "Next week $20."],
        ["So the value is x.", "Then y.", "Hence z."],
        ["The answer is 3.", "5 is odd."],
        ["**Bold.**", "Then *it.*", 'He says "yes."', "Good."],
        ["By Fig. 2.", "So it holds."],
        ["The formula $x = 3.$", "Then we go on."],
        ["LaTeX quotes ``One. Two''.", "Then ``three. Four''."],
        ["Yes!", "No?", "Good."],
        ["😀 It is 5.", "👍 It is 6."],
    ],
)
def test_sentences_of_one_line_are_cut_apart(steps):
    assert cut(" ".join(steps)) == steps


NUMBERS = {
    "digits": ["1.", "2.", "3.", "4.", "5."],
    "letters": ["a.", "b.", "c.", "d.", "e."],
    "small": ["i.", "ii.", "iii.", "iv.", "v."],
    "capital": ["I.", "II.", "III.", "IV.", "V."],
    "parentheses": ["(1.)", "(2.)", "(3.)", "(4.)", "(5.)"],
}


@pytest.mark.parametrize("kind", NUMBERS)
@given(
    items=st.lists(st.sampled_from(["a pizza", "one pie", "an odd number", "two cakes"]), min_size=2, max_size=5),
    between=st.sampled_from([", ", "; ", " and ", ", and "]),
    before=st.sampled_from(["I have", "We take", "The list is:", "He says that we do"]),
)
def test_a_list_inside_a_sentence_is_not_cut_at_its_numbers(kind, items, between, before):
    numbered = between.join(f"{number} {item}" for number, item in zip(NUMBERS[kind], items, strict=False))
    steps = ["We begin.", f"{before} {numbered}.", "Then we end."]
    assert cut(" ".join(steps)) == steps


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6))
def test_numbers_that_end_sentences_are_cut_behind(numbers):
    steps = [f"{'So' if place else 'It'} is {number}." for place, number in enumerate(numbers)]
    assert cut(" ".join(steps)) == steps


@pytest.mark.parametrize("language", ["en", "zh", "ja", "xx"])
def test_chinese_sentences_are_cut_without_spaces(language):
    assert cut("你好。再见", language) == ["你好。", "再见"]
    assert cut("你好。再见！对吗？“好。”然后 3.14。", language) == [
        "你好。",
        "再见！",
        "对吗？",
        "“好。”",
        "然后 3.14。",
    ]


@pytest.mark.parametrize("space", ["\u2028", "\u0085", "\u00a0", "\u3000", "\x1c"])
def test_wide_spaces_after_a_capital_do_not_crash_the_splitter(space):
    assert cut(f"It is A{space}. We see{space}B.{space}So it is.")[-1].endswith("So it is.")
    assert cut(f"We add 3.{space}We stop.") == ["We add 3.", "We stop."]


def test_half_of_a_surrogate_pair_does_not_crash_the_splitter():
    assert cut("It is \ud83d. We stop.") == ["It is \ud83d.", "We stop."]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1. Add\n2) Multiply. Good\n- so on\n* Stop", ["1. Add", "2) Multiply.", "Good", "- so on", "* Stop"]),
        ("1.\nAdd.\n2.\nMultiply.", ["1.\nAdd.", "2.\nMultiply."]),
        ("Do: 1. Add. 2. Multiply. 3. Stop.", ["Do: 1. Add.", "2. Multiply.", "3. Stop."]),
        ("**Step 1:**\nAdd.\n\n### Step 2\nStop.", ["**Step 1:**\nAdd.", "### Step 2\nStop."]),
        ("Add.\n2.", ["Add.\n2."]),
        ("(a) One.\n(b) Two.\niv) Four.", ["(a) One.", "(b) Two.", "iv) Four."]),
        ("Add.\n---\nStop.", ["Add.\n---", "Stop."]),
        ("1.", ["1."]),
        ("...", ["..."]),
        ("- \n1.\n...", ["- \n1.\n..."]),
    ],
)
def test_a_marker_is_never_a_step_of_its_own(text, steps):
    assert cut(text) == steps


@given(st.lists(st.sampled_from(["1.", "2)", "-", "*", "**3.**", "Step 4:", "Add.", "So it is"]), min_size=1))
def test_no_list_yields_a_bare_marker_beside_a_step(items):
    steps = cut("\n".join(items))
    assert len(steps) == max(1, sum(item in ("Add.", "So it is") for item in items))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Here:\n```python\na. B\n```\nso it is. Then", ["Here:", "```python\na. B\n```", "so it is.", "Then"]),
        ("Here: ```\na. B\n\nc\n``` \nthen it is.", ["Here: ```\na. B\n\nc\n```", "then it is."]),
        ("```\r\na. B\r\n```\r\nthen it is.", ["```\r\na. B\r\n```", "then it is."]),
        ("```\nnever closed. Then\n\nmore", ["```\nnever closed. Then\n\nmore"]),
        ("````\n```\nOne. Two\n```\n````\nThen.", ["````\n```\nOne. Two\n```\n````", "Then."]),
        ("- ```\n  a. B\n  ```\n- Then.", ["- ```\n  a. B\n  ```", "- Then."]),
        ("Use ```a``` here. Use ``` there. Then", ["Use ```a``` here.", "Use ``` there.", "Then"]),
    ],
)
def test_a_fence_is_one_piece(text, steps):
    assert cut(text) == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("We get the\nsum. Then\nmore.", ["We get the\nsum.", "Then\nmore."]),
        ("x = 3\ntotal = 5\nThen stop", ["x = 3", "total = 5", "Then stop"]),
        ("It is so.\nthen stop", ["It is so.", "then stop"]),
        ("We are done.\n\\[ x \\]", ["We are done.", "\\[ x \\]"]),
        ("So it is:\n\\[ x. Y \\]\nhence", ["So it is:\n\\[ x. Y \\]\nhence"]),
        ("We get\n\nso it is", ["We get", "so it is"]),
        ("Eggs cost $5\nMilk is in US$ now", ["Eggs cost $5", "Milk is in US$ now"]),
    ],
)
def test_a_line_break_ends_a_step_unless_the_sentence_goes_on(text, steps):
    assert cut(text) == steps


@pytest.mark.parametrize("opener", ["$", "$$", "\\(", "\\[", "`", "``", "\\begin{align}"])
def test_what_is_never_closed_hides_nothing(opener):
    assert cut(f"It is {opener}x here. Then this.\n\nEnd.") == [f"It is {opener}x here.", "Then this.", "End."]
    # A closer in another paragraph is not its closer.
    closer = {"\\(": "\\)", "\\[": "\\]", "\\begin{align}": "\\end{align}"}.get(opener, opener)
    assert cut(f"It is {opener}x. Then.\n\nIt{closer} ends. Well.") == [
        *(f"It is {opener}x.", "Then.", f"It{closer} ends.", "Well.")
    ]


UNITS = [
    *(
        "The sum is 3 + 4 = 7. So it is odd. ",
        "$",
        "$$",
        "$x ",
        "\\(",
        "\\(\n\n",
        "\\[a",
        "`",
        "``` ",
        "```\n",
        "1. ",
        "1.\n",
    ),
    *(
        "\n",
        " ",
        " \n",
        "$5 and $6. Then ",
        "5! = ",
        "5!   ",
        ".",
        ".)",
        "e.g. ",
        "eq.  ",
        "\\begin{align}",
        '"a. ',
        "(a. B ",
    ),
    *("😀. ", "-\n", "and\n", "A\n", "#", "*", "_", "\\a{x. ", "a", "a. B", "``''", "> ", "。", "\r", "Step  "),
    *("?-", "<!", "!" * 999 + "-"),
    *("<tool_call>{", "to=a", "to=a<|b|>", "<!--", ".</b>", "<a ", "|a. b"),
]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_hundred_thousand_characters_are_cut_in_linear_time(unit):
    text = unit * (100_000 // len(unit))  # quadratic work would take minutes: this test would not come back
    assert all(not gap.strip() for gap in gaps(text, sentences(text)))
    assert gaps(text, Segmentation()(text))


def test_marks_inside_a_long_run_of_punctuation_end_nothing():
    assert cut("So. " + "?-" * 300 + " Then. It is " + "!" * 300 + " Well.") == [
        *("So.", "?-" * 300 + " Then.", "It is " + "!" * 300, "Well.")
    ]


@given(st.lists(texts.filter(str.strip), min_size=1, max_size=5))
def test_joined_steps_are_found_at_their_spans(steps):
    text, spans = join_steps(steps)
    assert text == "\n".join(steps)
    assert [text[start:end] for start, end in spans] == [step.strip() for step in steps]
    assert gaps(text, spans)


@given(text=texts)
def test_located_steps_are_the_spans_that_they_were_cut_from(text):
    spans = sentences(text)
    steps = [text[start:end] for start, end in spans]
    if steps:
        found = locate_steps(text, steps)
        assert [text[start:end] for start, end in found] == steps
        assert gaps(text, found)


def test_a_step_that_is_not_in_the_response_is_named():
    with pytest.raises(ValueError, match=r"^step 2 is not in the response after step 1"):
        locate_steps("a b", ["b", "a"])


@pytest.mark.parametrize("function", [join_steps, lambda steps: locate_steps("a b", steps)])
@pytest.mark.parametrize(
    ("steps", "error", "match"),
    [
        ([], ValueError, "there are no steps"),
        (["a", " \n"], ValueError, "step 2 is blank"),
        (["a", 3], TypeError, "step 2 is int, not text"),
    ],
)
def test_unusable_steps_are_named(function, steps, error, match):
    with pytest.raises(error, match=match):
        function(steps)


@pytest.mark.parametrize("spans", [[(0, 2), (1, 3)], [(2, 3), (0, 1)], [(0, 9)], [(-1, 2)], [(2, 1)]])
def test_gaps_of_impossible_spans_are_refused(spans):
    with pytest.raises(ValueError, match="overlap or leave the text of 4 characters"):
        gaps("abcd", spans)


@pytest.mark.parametrize(
    "segmentation", [*SEGMENTATIONS, Segmentation("given")], ids=lambda s: f"{s.method}-{s.language}"
)
def test_a_segmentation_survives_a_checkpoint(segmentation):
    block = FractalSettings(segmentation=segmentation).to_dict()
    assert FractalSettings.from_dict(json.loads(json.dumps(block)), where="rm").segmentation == segmentation


def test_given_steps_cannot_be_cut_from_a_text():
    with pytest.raises(ValueError, match=r"cannot cut a text; bring data with a 'steps' column"):
        Segmentation("given")("a b")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "words"}, "Unknown segmentation method 'words'; use one of lines, sentences"),
        ({"method": "separator"}, "give separator a text if and only if method='separator'"),
        ({"method": "separator", "separator": ""}, "give separator a text"),
        ({"method": "lines", "separator": "##"}, "give separator a text"),
        ({"method": "pattern"}, "give pattern a text"),
        ({"method": "pattern", "pattern": "("}, "is not a regular expression: missing"),
        ({"method": "sentences", "language": "english"}, "give one such as 'en'"),
    ],
)
def test_a_wrong_option_is_named(options, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        Segmentation(**options)


def test_a_turn_with_thoughts_is_one_step_from_its_first_word_to_its_last():
    text = "I add. <think>4?</think> It is 4. <think>Sure?</think> Yes."
    assert Segmentation("turns", thinking="skip")(text) == [(0, len(text))]


@pytest.mark.parametrize(
    ("segmentation", "joint"),
    [
        (Segmentation("lines"), "\n"),
        (Segmentation("sentences"), " "),
        (Segmentation("sentences", version=1), "\n"),
        (Segmentation("separator", separator="<s>"), "<s>"),
        (Segmentation("separator", separator="<s>", version=1), "\n"),
    ],
)
def test_listed_steps_are_joined_by_what_the_method_cuts_at(segmentation, joint):
    assert segmentation.joint == joint


def test_what_stands_between_turns_is_no_gap_between_steps():
    assistant, tool = {"role": "assistant", "content": "a\nb"}, {"role": "tool", "content": "4"}
    said = read_completion([assistant, tool, assistant, tool, assistant])
    assert common_gap([(said, Segmentation("lines")(said))]) == "\n"
    one_step = read_completion([{**assistant, "content": "a"}, tool, {**assistant, "content": "b"}])
    assert common_gap([(one_step, Segmentation("lines")(one_step))]) is None


def test_a_language_is_read_by_sentences_only():
    text = "Wynik to 5. Np. 3 jest liczbą."
    assert cut(text, "pl") == ["Wynik to 5.", "Np. 3 jest liczbą."] != cut(text)
    with pytest.raises(ValueError, match="method='lines' with language='pl'; only method='sentences' reads a language"):
        Segmentation("lines", language="pl")
