"""Official files of mathematics become bags: PRM800K, ProcessBench, PRMBench, Math-Shepherd."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal_rm.data.formats.math_shepherd import read_math_shepherd
from fractal_rm.data.formats.prm800k import read_prm800k
from fractal_rm.data.formats.prmbench import read_prmbench
from fractal_rm.data.formats.processbench import read_processbench
from fractal_rm.data.readers import read_bags, read_jsonl
from fractal_rm.data.segmentation import Segmentation


def rated(text, rating):
    return {"text": text, "rating": rating, "flagged": None}


def step(*completions, chosen=0, human=None):
    return {"completions": list(completions), "human_completion": human, "chosen_completion": chosen}


def prm800k(*steps, phase=2, finish="solution", pre_generated=None):
    """A row with all official columns."""
    question = {"problem": "2+3*4?", "ground_truth_solution": "14", "ground_truth_answer": "14"}
    if phase == 2:
        question |= {"pre_generated_steps": pre_generated or [], "pre_generated_answer": "14"}
        question |= {"pre_generated_verifier_score": 0.5}
    return {
        "labeler": "eva",
        "timestamp": "2023-01-22T04:34:27.052924",
        "generation": 3 if phase == 2 else None,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": question,
        "label": {"steps": list(steps), "total_time": 9, "finish_reason": finish},
    }


GOOD = step(rated("3*4=12.", 1))
NEUTRAL = step(rated("Let us add.", 0))
WRONG = step(rated("2+12=15.", -1), rated("2+12=14.", 1), chosen=None)


def test_ratings_of_minus_one_are_bad_and_neutral_ones_are_good():
    [bag] = read_prm800k([prm800k(GOOD, NEUTRAL, WRONG, finish="found_error")])
    assert bag.prompt == "2+3*4?"
    assert bag.steps == ["3*4=12.", "Let us add.", "2+12=15."]
    assert bag.step_labels == (1.0, 1.0, 0.0)
    assert bag.label == 0.0
    assert bag.id == "eva/2023-01-22T04:34:27.052924"


def test_a_solution_without_an_error_is_good():
    [bag] = read_prm800k([prm800k(GOOD, NEUTRAL)])
    assert (bag.label, bag.step_labels) == (1.0, (1.0, 1.0))


def test_phase_1_goes_on_with_the_completion_that_was_chosen_or_written():
    row = prm800k(
        step(rated("3*4=7.", -1), rated("3*4=12.", 1), chosen=1),
        step(rated("2+12=9.", -1), rated("2+12=8.", -1), chosen=None, human="2+12=14."),
        step(rated("So 14.", 1), rated("So 15.", -1), chosen=0),
        phase=1,
    )
    [bag] = read_prm800k([row])
    assert bag.steps == ["3*4=12.", "2+12=14.", "So 14."]
    assert bag.step_labels == (1.0, 1.0, 1.0)


def test_a_human_step_may_be_an_object_as_on_the_hub():
    human = {"text": "3*4=12.", "rating": None, "source": "human", "flagged": False}
    [bag] = read_prm800k([prm800k(step(rated("3*4=7.", -1), chosen=None, human=human), GOOD)])
    assert bag.steps == ["3*4=12.", "3*4=12."]


def test_nothing_follows_a_step_after_which_nothing_was_chosen():
    [bag] = read_prm800k([prm800k(WRONG, GOOD)])
    assert bag.steps == ["2+12=15."]


def test_a_row_ends_before_its_first_step_without_a_rating():
    [bag] = read_prm800k([prm800k(GOOD, step(rated("Hm.", None), chosen=None), finish="give_up")])
    assert (bag.steps, bag.label) == (["3*4=12."], 1.0)


def test_rows_without_any_rating_are_left_out_with_a_warning():
    empty = prm800k(step(chosen=None), finish="bad_problem")
    with pytest.warns(UserWarning, match=r"data: 2 of 3 rows have no rated step \(first: row 1\); they are left out\."):
        bags = read_prm800k([empty, prm800k(GOOD), empty])
    assert len(bags) == 1


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=8))
def test_the_response_is_good_iff_no_step_is_minus_one(ratings):
    [bag] = read_prm800k([prm800k(*[step(rated(f"Step {n}.", rating)) for n, rating in enumerate(ratings)])])
    assert bag.label == float(-1 not in ratings)
    assert bag.step_labels == tuple(float(rating != -1) for rating in ratings)


def test_full_solutions_go_on_after_the_first_error_with_unknown_labels():
    whole = ["3*4=12.", "2+12=15.", "So 15.", "Done."]
    row = prm800k(GOOD, WRONG, pre_generated=whole, finish="found_error")
    [short], [long] = read_prm800k([row]), read_prm800k([row], full_solutions=True)
    assert short.steps == whole[:2]
    assert (long.steps, long.step_labels, long.label) == (whole, (1.0, 0.0, None, None), 0.0)


def test_full_solutions_change_nothing_where_the_solution_is_another_or_has_no_error():
    good = prm800k(GOOD, pre_generated=["3*4=12.", "2+12=15."], finish="give_up")
    other = prm800k(WRONG, pre_generated=["2*3=6.", "So 6."])
    for row in (good, other, prm800k(GOOD, phase=1)):
        assert read_prm800k([row], full_solutions=True) == read_prm800k([row])


@pytest.mark.parametrize(
    ("row", "error", "sentence"),
    [
        ({"label": {"steps": []}}, ValueError, "column 'question' is missing or null (found: 'label')"),
        (prm800k(step(rated("a", 2))), ValueError, "the rating of step 1 is 2; give -1, 0, 1 or null."),
        (
            prm800k(GOOD, step(rated("a", 1), chosen=4)),
            ValueError,
            "step 2 has chosen completion 4, but 1 completions; correct the index.",
        ),
        (prm800k(step(rated(7, 1))), TypeError, "column 'completions.text' is int, not str"),
        (prm800k(GOOD) | {"label": {"steps": "a"}}, TypeError, "column 'label.steps' is str, not list"),
        (prm800k("a"), TypeError, "step 1 is str; make it an object with 'completions'."),
        (prm800k({"completions": "ab"}), TypeError, "the completions of step 1 are not a list of objects"),
        (prm800k({"completions": [None]}), TypeError, "the completions of step 1 are not a list of objects"),
        ("a", TypeError, "the row is str; make it an object with named columns."),
    ],
)
def test_a_defect_of_prm800k_is_one_sentence_with_its_row(row, error, sentence):
    with pytest.raises(error) as caught:
        read_prm800k([prm800k(GOOD), row], source="phase2_train.jsonl")
    assert str(caught.value).startswith(f"phase2_train.jsonl, row 2: {sentence}")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_file_gives_what_its_rows_give_and_names_itself(tmp_path):
    path = tmp_path / "phase2_test.jsonl"
    path.write_text(json.dumps(prm800k(GOOD, WRONG)) + "\n", encoding="utf-8")
    assert read_prm800k(path) == read_prm800k([prm800k(GOOD, WRONG)])
    path.write_text(json.dumps({"a": 1}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"phase2_test\.jsonl, row 1: column 'question' is missing"):
        read_prm800k(path)


def test_the_stand_in_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "phase2_test.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:6b\nsize 12240719\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer, not the data; fetch the data with `git lfs pull`\."):
        read_prm800k(path)


def test_missing_files_and_empty_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl is not a file; check the path\."):
        read_prm800k(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"data has no rows; give at least one\."):
        read_prm800k([])


def test_real_rows_of_prm800k_put_back_into_the_official_format_give_the_same_bags(data_dir):
    rows = read_jsonl(data_dir / "prm800k" / "test.jsonl.gz")
    official = []
    for row in rows:
        ratings = zip(row["steps"], row["meta"]["ratings"], strict=True)
        steps = [step(rated(text, rating), chosen=None if rating == -1 else 0) for text, rating in ratings]
        official.append(prm800k(*steps))
        official[-1]["question"]["problem"] = row["prompt"]
    wanted = read_bags(rows, Segmentation("given"))
    found = read_prm800k(official)
    assert len(found) == 189
    for one, other in zip(found, wanted, strict=True):
        assert (one.prompt, one.steps, one.step_labels, one.label) == (
            other.prompt,
            other.steps,
            other.step_labels,
            other.label,
        )


# ProcessBench


def processbench(**changes):
    row = {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "1+1+1?", "steps": ["1+1=2.", "2+1=4.", "So."]}
    return row | {"final_answer_correct": False, "label": 1} | changes


@pytest.mark.parametrize(
    ("first", "gold", "label"),
    [(-1, (1.0, 1.0, 1.0), 1.0), (0, (0.0, None, None), 0.0), (1, (1.0, 0.0, None), 0.0), (2, (1.0, 1.0, 0.0), 0.0)],
)
def test_steps_after_the_first_wrong_one_are_not_known(first, gold, label):
    [bag] = read_processbench([processbench(label=first)])
    assert (bag.step_labels, bag.label, bag.id) == (gold, label, "gsm8k-0")
    assert bag.steps == ["1+1=2.", "2+1=4.", "So."]


def test_answer_labels_can_be_right_after_a_wrong_step():
    [bag] = read_processbench([processbench(final_answer_correct=True)], answer_labels=True)
    assert (bag.label, bag.step_labels) == (1.0, (1.0, 0.0, None))


@pytest.mark.parametrize("first", [3, -2])
def test_a_label_that_is_no_step_is_refused(first):
    with pytest.raises(
        ValueError, match=rf"data, row 1: the label is {first}, but there are 3 steps; give -1 or an index"
    ):
        read_processbench([processbench(label=first)])


def test_the_official_list_in_a_json_file_is_read(tmp_path):
    path = tmp_path / "gsm8k.json"
    path.write_text(json.dumps([processbench(), processbench(id="gsm8k-1")], indent=1), encoding="utf-8")
    assert [bag.id for bag in read_processbench(path)] == ["gsm8k-0", "gsm8k-1"]


def test_real_rows_of_processbench_put_back_into_the_official_format_give_the_same_bags(data_dir):
    path = data_dir / "processbench" / "test.jsonl.gz"
    rows = read_jsonl(path)
    official = [
        {
            "id": row["id"],
            "generator": row["meta"]["generator"],
            "problem": row["prompt"],
            "steps": row["steps"],
            "final_answer_correct": bool(row["meta"]["answer_correct"]),
            "label": row["meta"]["first_error"],
        }
        for row in rows
    ]
    assert len(rows) == 3400
    assert read_processbench(official) == read_bags(rows, Segmentation("given"))
    labels = [bag.label for bag in read_processbench(official, answer_labels=True)]
    assert labels == [row["meta"]["answer_correct"] for row in rows]


# PRMBench


def prmbench(**changes):
    row = {
        "original_question": "1+1?",
        "modified_question": "1+1+0?",
        "original_process": ["1+1=2.", "So 2."],
        "modified_process": ["1+1=3.", "3+0=3.", "So 3."],
        "modified_steps": [1, 2],
        "error_steps": [1, 3],
        "reason": "Wrong sums.",
        "idx": "prm_test_p1_0",
        "question": "1+1?",
        "classification": "counterfactual",
    }
    return row | changes


def test_error_steps_are_counted_from_one():
    [bag] = read_prmbench([prmbench()])
    assert (bag.prompt, bag.step_labels, bag.label) == ("1+1+0?", (0.0, 1.0, 0.0), 0.0)
    assert bag.id == "counterfactual_prm_test_p1_0"


def test_the_originals_of_redundency_rows_are_the_good_responses():
    rows = [prmbench(), prmbench(classification="redundency")]
    bags = read_prmbench(rows)
    assert [bag.id.partition("_")[0] for bag in bags] == ["counterfactual", "correct", "redundency"]
    assert (bags[1].prompt, bags[1].steps, bags[1].label) == ("1+1?", ["1+1=2.", "So 2."], 1.0)


def test_a_solution_without_error_steps_is_good():
    assert read_prmbench([prmbench(classification="multi_solutions", error_steps=[])])[0].label == 1.0


@pytest.mark.parametrize("errors", [[4], [0], [1, 9]])
def test_rows_with_error_steps_that_are_not_there_are_left_out_with_a_warning(errors):
    with pytest.warns(UserWarning, match=r"1 of 2 rows name an error step .* \(first: row 1\); they are left out"):
        assert len(read_prmbench([prmbench(error_steps=errors), prmbench()])) == 1


def test_error_steps_that_are_no_numbers_are_refused():
    with pytest.raises(TypeError, match=r"data, row 1: error_steps is \['1'\]; make it a list of whole numbers"):
        read_prmbench([prmbench(error_steps=["1"])])


def test_real_rows_of_prmbench_put_back_into_the_official_format_give_the_same_bags(data_dir):
    rows = [row for row in read_jsonl(data_dir / "prmbench" / "test.jsonl.gz") if row["step_labels"]]
    official = [
        prmbench(
            modified_question=row["prompt"],
            modified_process=row["steps"],
            error_steps=[number for number, label in enumerate(row["step_labels"], 1) if label == 0],
            idx=row["meta"]["idx"],
            classification=row["meta"]["classification"],
        )
        for row in rows
    ]
    bags = [bag for bag in read_prmbench(official) if not bag.id.startswith("correct_")]
    wanted = read_bags(rows, Segmentation("given"))
    assert [(bag.steps, bag.step_labels, bag.label) for bag in bags] == [
        (bag.steps, bag.step_labels, bag.label) for bag in wanted
    ]


# Math-Shepherd

PROBLEM = "If Ann had 6 + 8 eggs, how many? "


def shepherd(*signs, steps=None, problem=PROBLEM):
    """A row as published: the marks and the signs stand at the same places."""
    steps = steps or [f"Step {number}: {number}+1={number + 1}." for number in range(1, len(signs) + 1)]
    text, signed = (
        "\n".join(f"{one} {end}" for one, end in zip(steps, ends, strict=True)) for ends in (["ки"] * len(signs), signs)
    )
    return {"input": problem + text, "label": problem + signed, "task": "GSM8K"}


def test_signs_are_the_labels_and_marks_are_not_in_the_text():
    [bag] = read_math_shepherd([shepherd("+", "+", "-")])
    assert bag.prompt == PROBLEM.strip()
    assert bag.response == "Step 1: 1+1=2.\nStep 2: 2+1=3.\nStep 3: 3+1=4."
    assert (bag.step_labels, bag.label) == ((1.0, 1.0, 0.0), 0.0)


@given(st.lists(st.sampled_from("+-"), min_size=1, max_size=6))
def test_pluses_and_minuses_of_the_formulas_are_no_labels(signs):
    steps = [f"Step {number}: 5 - 3 + 1 = - 3 +" for number in range(1, len(signs) + 1)]
    [bag] = read_math_shepherd([shepherd(*signs, steps=steps)])
    assert bag.step_labels == tuple(float(sign == "+") for sign in signs)
    assert bag.steps == steps
    assert bag.label == float("-" not in signs)


def test_rows_without_the_beginning_of_the_solution_are_left_out_with_a_warning():
    lost = shepherd("+", steps=["1+1=2."])
    with pytest.warns(UserWarning, match=r"data: 1 of 2 rows have no problem before a 'Step 1:' \(first: row 2\)"):
        assert len(read_math_shepherd([shepherd("-"), lost])) == 1


@pytest.mark.parametrize("label", ["Step 1: 1+1=2. +", PROBLEM + "Step 1: 1+1=2. ?", PROBLEM])
def test_a_label_that_does_not_repeat_the_input_is_refused(label):
    with pytest.raises(
        ValueError, match=r"data, row 1: the label does not repeat the input with a \+ or - after step 1"
    ):
        read_math_shepherd([shepherd("+") | {"label": label}])


def test_an_input_without_marks_is_refused():
    with pytest.raises(ValueError, match=r"data, row 1: the input has no 'ки' at the end of a step"):
        read_math_shepherd([{"input": "1+1? Step 1: 2.", "label": "1+1? Step 1: 2."}])
