"""Agreement of the steps of responses to the same prompt."""

from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.tasks.agreement import agreement, result_agreement

LINES = st.lists(st.integers(0, 3).map(lambda n: f"so it is {n}"), min_size=1, max_size=4)


def test_only_other_responses_to_the_same_prompt_vote():
    steps = [["a 1", "b 2"], ["c 1", "d 3"], ["e 1", "f 2"], ["g 1"]]
    chat = [{"role": "user", "content": "p"}]
    assert agreement([chat, chat, list(chat), "q"], steps) == [[1.0, 0.5], [1.0, 0.0], [1.0, 0.5], [0.0]]


def test_a_result_counts_anywhere_or_after_the_same_results_only():
    steps = [["x 5", "y 1"], ["y 1"], ["y 1,0"]]
    assert agreement(["p"] * 3, steps)[0] == [0.0, 0.0]
    assert result_agreement(["p"] * 3, steps)[0] == [0.0, 0.5]


def test_numbers_are_compared_by_value_and_words_without_a_number_with_each_other():
    assert agreement(["p"] * 2, [["It costs $1,200."], ["= 1200.0"]]) == [[1.0], [1.0]]
    assert agreement(["p"] * 2, [["Well."], ["= 0"]]) == [[0.0], [0.0]]
    assert agreement(["p"] * 2, [["Well."], ["So."]]) == [[1.0], [1.0]]


@given(st.lists(LINES, min_size=2, max_size=4), st.data())
def test_a_line_inserted_or_repeated_raises_no_score_that_follows(responses, data):
    before = agreement(["p"] * len(responses), responses)[0]
    place = data.draw(st.integers(0, len(responses[0])))
    line = data.draw(st.sampled_from([*responses[0], "Clearly, this is so."]))
    longer = [*responses[0][:place], line, *responses[0][place:]]
    after = agreement(["p"] * len(responses), [longer, *responses[1:]])[0]
    assert after[:place] == before[:place]
    assert all(later <= ([1.0, *before])[place] for later in after[place:])
    assert after == sorted(after, reverse=True)
