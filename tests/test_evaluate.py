"""Evaluation of scores: against the trainer's own metrics, by hand, and where a response was cut."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from support.stand_ins import save_policy, save_reward_model, solutions

from fractal_rm.data.bag import Bag, Step, StepScores
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.responses import choose_threshold, evaluate_scores, measure_responses, score_bags
from fractal_rm.evaluation.score_rows import score_rows
from fractal_rm.objectives.aggregation import AGGREGATIONS, meaning
from fractal_rm.report.terminal import show_steps
from fractal_rm.report.viewer import write_viewer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer

FOUR = Bag("p", "a\nb\nc\nd", ((0, 1), (2, 3), (4, 5), (6, 7)), label=0.0, step_labels=(1, 1, 1, 0))
TWO = Bag("p", "a\nb", ((0, 1), (2, 3)), label=1.0, step_labels=(1, 1))


def scores(bag: Bag, *values: float) -> StepScores:
    """Scores of the first steps of a bag; the others were beyond the limit."""
    steps = [Step(bag.response[s:e], s, e, value) for (s, e), value in zip(bag.step_spans, values, strict=False)]
    truncated = len(bag.step_spans) - len(values)
    return StepScores(bag.response, steps, min(values, default=math.nan), truncated, None if values else "too long")


def test_metrics_equal_those_of_the_trainer(tmp_path):
    trainer = FractalTrainer(
        save_policy(tmp_path / "policy"),
        args=FractalConfig(output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True),
        eval_dataset=solutions(12),
    )
    expected = trainer.evaluate()
    bags = read_bags(solutions(12), Segmentation())
    found = evaluate_scores(score_bags(trainer.reward_model(), bags), bags, 0.5)
    for name in ("bag_auc", "bag_accuracy", "bag_ece", "step_auc", "within_bag_auc"):
        assert found[name] == pytest.approx(expected[f"eval_{name}"], abs=1e-6)


def test_a_wrong_step_beyond_the_limit_counts_as_missed():
    whole = evaluate_scores([scores(FOUR, 0.9, 0.9, 0.9, 0.1), scores(TWO, 0.9, 0.9)], [FOUR, TWO], 0.5)
    cut = evaluate_scores([scores(FOUR, 0.9, 0.9, 0.9), scores(TWO, 0.9)], [FOUR, TWO], 0.5)
    assert (whole["first_error_accuracy"], whole["truncated"]) == (1.0, 0)
    assert (cut["first_error_accuracy"], cut["all_correct_accuracy"], cut["truncated"]) == (0.0, 1.0, 2)


def test_steps_beyond_the_limit_stay_out_of_the_auc():
    found = evaluate_scores([scores(FOUR, 0.9, 0.8, 0.7), scores(TWO, 0.6, 0.5)], [FOUR, TWO], 0.5)
    assert math.isnan(found["step_auc"])  # the only wrong step was not scored


def test_a_response_without_scores_is_counted_and_left_out_of_the_response_metrics():
    found = evaluate_scores([scores(FOUR), scores(TWO, 0.9, 0.8)], [FOUR, TWO], 0.5)
    assert (found["responses"], found["unscored"]) == (2, 1)
    assert found["bag_accuracy"] == 1.0
    assert found["first_error_accuracy"] == 0.0


def test_a_right_response_without_scores_is_no_hit():
    found = evaluate_scores([scores(TWO), scores(FOUR)], [TWO, FOUR], 0.5)
    assert (found["unscored"], found["all_correct_accuracy"], found["first_error_accuracy"]) == (2, 0.0, 0.0)
    found = evaluate_scores([scores(TWO, 0.9), scores(FOUR)], [TWO, FOUR], 0.5)
    assert found["all_correct_accuracy"] == 1.0  # one step did not fit: it was not called wrong


def test_step_metrics_are_left_out_where_no_step_label_is_known():
    bag = Bag("p", "a", ((0, 1),), label=1.0)
    assert "step_auc" not in evaluate_scores([scores(bag, 0.4)], [bag], 0.5)


def test_the_threshold_does_not_depend_on_step_labels():
    bags = [FOUR, TWO]
    scored = [scores(FOUR, 0.9, 0.9, 0.8, 0.3), scores(TWO, 0.8, 0.7)]
    hidden = [Bag(bag.prompt, bag.response, bag.step_spans, bag.label) for bag in bags]
    assert choose_threshold(scored, bags) == choose_threshold(scored, hidden) == 0.5


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_threshold_is_on_the_highest_step_where_one_good_step_is_enough(aggregation):
    good, bad = Bag("p", "a\nb", ((0, 1), (2, 3)), label=1.0), Bag("p", "a\nb", ((0, 1), (2, 3)), label=0.0)
    scored = [scores(good, 0.1, 0.8), scores(bad, 0.3, 0.4), scores(good, 0.3, 0.9)]
    found = choose_threshold(scored, [good, bad, good], aggregation=aggregation)
    assert found == pytest.approx(0.6 if meaning(aggregation) == "max" else 0.1)


def test_grades_count_as_shares_of_the_highest():
    graded = [
        Bag("p", "a\nb", ((0, 1), (2, 3)), label=label, step_labels=steps, num_grades=4)
        for label, steps in ((3.0, (3, 0)), (1.0, (0, 1)))
    ]
    shares = [
        Bag("p", "a\nb", ((0, 1), (2, 3)), label=label, step_labels=steps)
        for label, steps in ((1.0, (1, 0)), (1 / 3, (0, 1 / 3)))
    ]
    scored = [scores(bag, 0.6, 0.2) for bag in graded]
    expected = evaluate_scores(scored, shares, 0.5)
    found = evaluate_scores(scored, graded, 0.5)
    # Steps are expected to be of grade 1.8 and 0.6 in both responses, and are of 3, 0 and 0, 1.
    assert found.pop("step_mae") == pytest.approx((1.2 + 0.6 + 1.8 + 0.4) / 4)
    assert found.pop("bag_mae") == pytest.approx(
        np.mean([abs(3 * s.score - bag.label) for s, bag in zip(scored, graded, strict=True)])
    )
    assert found == pytest.approx(expected, nan_ok=True)
    assert expected["step_auc"] == pytest.approx(2.5 / 3)  # grade 1 of 3 is bad, so one of four is good
    assert choose_threshold(scored, graded, aggregation="max") == choose_threshold(scored, shares, aggregation="max")


def test_bags_are_scored_with_their_own_steps(tmp_path):
    model = StepRewardModel.from_pretrained(save_reward_model(tmp_path / "rm"))
    bag = Bag("p\n", "It is 3.  It stays 3.", ((0, 8), (10, 21)), label=1.0)
    (found,) = score_bags(model, [bag])
    assert found.spans == [(0, 8), (10, 21)]  # lines would have made one step of it


def test_a_prompt_of_the_wrong_kind_spoils_no_other_row(tmp_path):
    model = StepRewardModel.from_pretrained(save_reward_model(tmp_path / "rm", chat=True))
    model.settings.chat = False
    rows = [{"prompt": "1+1?\n", "response": "2"}, {"prompt": [{"role": "user", "content": "1+1?"}], "response": "2"}]
    text, chat = score_rows(model, rows, source="rows")
    assert text["error"] is None
    assert chat["error"].startswith("rows, row 2: the prompt is a chat, but the reward model was trained on prompts")


@pytest.mark.parametrize("prompt", ["a \ud800", 5, [{"role": "user"}], ["hi"], None])
def test_a_row_that_no_file_can_hold_spoils_no_other_row(tmp_path, prompt):
    model = StepRewardModel.from_pretrained(save_reward_model(tmp_path / "rm"))
    rows = [{"prompt": "1+1?\n", "response": "2."}, {"prompt": prompt, "response": "3 \ud800."}]
    good, bad = score_rows(model, rows, source="x.jsonl")
    assert (good["error"], bad["steps"]) == (None, [])
    assert "x.jsonl, row 2" in bad["error"]
    assert bad["response"] == "3 ?."
    write_viewer(tmp_path / "view.html", [good, bad])
    show_steps([good, bad], Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8")))
    json.dumps([good, bad], ensure_ascii=False).encode()


def test_a_terminal_obeys_no_text(tmp_path):
    out = io.StringIO()
    steps = [{"text": "b\x1b]0;title\x07c \ud800", "score": math.nan, "gold": None}]
    show_steps([{"id": "a", "prompt": "q\x1b[2J", "steps": steps, "score": math.nan}], Console(file=out))
    assert "\x1b" not in out.getvalue()
    assert "b\ufffd]0;title\ufffdc" in out.getvalue()


def test_a_preference_makes_two_records(tmp_path):
    model = StepRewardModel.from_pretrained(save_reward_model(tmp_path / "rm"))
    rows = [{"prompt": "1+1?\n", "chosen": "2", "rejected": "3"}, {"prompt": "1+3?\n", "response": "4"}]
    records = score_rows(model, rows, source="rows")
    found = [(record["row"], record["label"], record["response"]) for record in records]
    assert found == [(1, 1.0, "2"), (1, 0.0, "3"), (2, None, "4")]
    expected = model.score(["1+1?\n", "1+1?\n", "1+3?\n"], ["2", "3", "4"])
    assert [record["score"] for record in records] == pytest.approx([result.score for result in expected])


def test_preferences_are_compared_pair_by_pair():
    def pair(name):
        return [Bag("p", "a\nb", ((0, 1), (2, 3)), label=label, pair_id=name) for label in (1.0, 0.0)]

    bags = [*pair("a"), *pair("b"), *pair("c"), *pair("d"), TWO]
    values = [(0.9, 0.8), (0.1, 0.2), (0.3, 0.3), (0.4, 0.4), (0.2, 0.2), (0.2, 0.2), (0.9, 0.9), (), (0.5, 0.5)]
    found = evaluate_scores([scores(bag, *row) for bag, row in zip(bags, values, strict=True)], bags, 0.5)
    assert found["pair_accuracy"] == 1 / 4  # right; wrong; a tie; and one that was not scored
    assert "pair_accuracy" not in evaluate_scores([scores(TWO, 0.5, 0.5)], [TWO], 0.5)


def test_knowing_which_prompts_are_easy_is_worth_nothing_within_prompts():
    # Three of four answers to the first prompt are good, one of four to the second. Prompts are a text and a chat.
    prompts = ["1+1?", [{"role": "user", "content": "1234*4321?"}]]
    labels = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    bags = [Bag(prompt, "2.", ((0, 2),), one) for prompt, row in zip(prompts, labels, strict=True) for one in row]
    easy = [scores(bag, 0.9 if bag.prompt == "1+1?" else 0.1) for bag in bags]
    assert measure_responses(easy, bags, 0.5).values["bag_auc"] == 0.75
    assert measure_responses(easy, bags, 0.5).values["within_prompt_auc"] == 0.5
    right = [scores(bag, 0.8 + 0.1 * bag.label if bag.prompt == "1+1?" else 0.1 * bag.label) for bag in bags]
    assert measure_responses(right, bags, 0.5).values["within_prompt_auc"] == 1.0
    unscored = [
        StepScores(bag.response, error="too long") if bag.label else one for bag, one in zip(bags, right, strict=True)
    ]
    assert "within_prompt_auc" not in measure_responses(unscored, bags, 0.5).values
