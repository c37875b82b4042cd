"""An index of the known bugs of FRACTAL's released code: a test or more for each, on the function of ours it is about.

The numbers are those of the list of traps this project keeps: 1 sign of the cosine prior, 2 negative windows, 3 raw
ratings, 4 rows that end at the error, 5 ordinal maximum, 6 padding, 7 sign of Bradley-Terry, 8 selection on gold
labels, 9 weights in evaluation, 10 seeds. Properties of these functions are tested in depth in their own files.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import byte_tokenizer, make_model, sums

from fractal_rm.data.formats.multispanqa import read_multispanqa
from fractal_rm.data.formats.prm800k import read_prm800k
from fractal_rm.evaluation.statistics import same_position_auc, step_auc
from fractal_rm.objectives.aggregation import AGGREGATIONS, aggregate
from fractal_rm.objectives.grades import ordinal_bag_loss, ordinal_max_log_probs
from fractal_rm.objectives.preferences import preference_loss
from fractal_rm.objectives.priors import cosine_targets, teacher_prior
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer

ALL_REAL = torch.ones(1, 1, dtype=torch.bool)


# 1. Keras' CosineSimilarity is minus the cosine, so the coded prior prefers steps that are far from the question.


def test_trap_1_a_step_close_to_the_question_is_believed_to_be_good():
    steps = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    assert cosine_targets(steps, torch.tensor([[1.0, 0.0]] * 3)).tolist() == [1.0, 0.5, 0.0]


def test_trap_1_the_cosine_prior_raises_the_score_of_a_close_step():
    logits = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    targets = cosine_targets(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0]] * 2))
    teacher_prior(logits, targets[None], mask).sum().backward()
    close, far = logits.grad[0].tolist()
    assert close < 0 < far  # descent raises the first and lowers the second


# 2. The released windows start on an answer sentence: most "negative" responses of MultiSpanQA hold an answer.


def paragraph(number: int, answers: list[bool]) -> dict[str, Any]:
    """A row of the official file: sentences of three words, of which the second is the answer or not."""
    tokens = [token for index in range(len(answers)) for token in (f"Word{index}", f"thing{index}", "ends", ".")]
    labels = [label for answer in answers for label in ("O", "B" if answer else "O", "O", "O")]
    return {"id": str(number), "question": ["what", "?"], "context": tokens, "label": labels}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
def test_trap_2_negative_windows_hold_no_answer_token(found):
    rows = [paragraph(number, answers) for number, answers in enumerate(found)]
    bags = read_multispanqa(rows, negative_share=1.0)
    for bag, answers in zip(bags, found, strict=True):
        held = [f"thing{index}" in bag.response for index, answer in enumerate(answers) if answer]
        assert any(held) == all(answers)  # only a paragraph without any other sentence stays positive
        assert bag.label == float(any(held)) == max(bag.step_labels)


# 3. and 4. Ratings of PRM800K are -1, 0 and 1, and its rows end at the first error.


def solution(*ratings: int, **row: Any) -> dict[str, Any]:
    """A row of the official file of phase 2, where nobody chose anything at the error."""
    steps = [
        {"completions": [{"text": f"step {n}", "rating": rating}], "chosen_completion": None if rating < 0 else 0}
        for n, rating in enumerate(ratings)
    ]
    return {"question": {"problem": "1+1?"}, "label": {"steps": steps}} | row


@given(st.lists(st.sampled_from([0, 1]), max_size=4), st.sampled_from([-1, 0, 1]))
def test_trap_3_ratings_become_probabilities_and_neutral_steps_are_good(before, last):
    [bag] = read_prm800k([solution(*before, last)])
    assert bag.step_labels == (*[1.0] * len(before), 0.0 if last == -1 else 1.0)
    assert bag.label == min(bag.step_labels)


def test_trap_4_position_alone_finds_the_error_of_prm800k_and_the_metric_beside_it_is_blind_to_position():
    bags = read_prm800k([solution(*[1] * good, -1) for good in (1, 2, 3, 4)] + [solution(1, 1, 1, 1, 1, 1)])
    gold = [bag.step_labels for bag in bags]
    assert all(found[:-1] == (1.0,) * (len(found) - 1) for found in gold)
    labels = [np.array(found) for found in gold]
    early_is_high = [-np.arange(len(found)) for found in gold]
    assert step_auc(early_is_high, labels) > 0.6
    assert same_position_auc(early_is_high, labels) == 0.5


def test_trap_4_the_rest_of_a_solution_can_be_brought_back_so_that_the_error_is_not_its_end():
    row = solution(1, -1)
    row["question"]["pre_generated_steps"] = ["step 0", "step 1", "step 2", "step 3"]
    [bag] = read_prm800k([row], full_solutions=True)
    assert bag.steps == ["step 0", "step 1", "step 2", "step 3"]
    assert bag.step_labels == (1.0, 0.0, None, None)
    assert bag.label == 0.0


# 5. The released maximum of grades sums to .03 on five random steps, and its argmax lets no gradient through.


def test_trap_5_the_distribution_of_the_highest_grade_sums_to_1_and_has_a_gradient():
    logits = torch.randn(8, 5, 4, requires_grad=True)
    mask = torch.ones(8, 5, dtype=torch.bool)
    assert ordinal_max_log_probs(logits, mask).exp().sum(dim=1).tolist() == pytest.approx([1.0] * 8, abs=1e-5)
    ordinal_bag_loss(logits, torch.arange(8) % 4, mask).sum().backward()
    assert (logits.grad != 0).any(dim=2).all()  # each step of each response


# 6. Padding is multiplied by 100, so that a padded score may be the smallest.


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("padding", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_trap_6_padding_never_decides(aggregation, padding):
    real = torch.tensor([[0.7, 0.3], [0.3, -0.7], [-0.3, -0.7]])  # above, around and below a padding of 0
    padded = torch.cat([real, torch.full((3, 3), padding)], dim=1).requires_grad_()
    mask = torch.tensor([[True, True, False, False, False]]).expand(3, -1)
    found = aggregate(padded, mask, aggregation=aggregation)
    expected = aggregate(real, mask[:, :2], aggregation=aggregation)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    found.sum().backward()
    assert padded.grad[:, 2:].abs().max() == 0.0


# 7. The released Bradley-Terry branch prefers the rejected response.


@pytest.mark.parametrize("form", ["bradley_terry", "ratio"])
def test_trap_7_the_loss_falls_when_the_chosen_response_scores_higher(form):
    low, high = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    right = preference_loss(high, ALL_REAL, low, ALL_REAL, form=form)
    wrong = preference_loss(low, ALL_REAL, high, ALL_REAL, form=form)
    assert right < np.log(2) < wrong
    chosen, rejected = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    preference_loss(chosen, ALL_REAL, rejected, ALL_REAL, form=form).sum().backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()


# 8. to 10. are about training: models selected on gold step labels, a weight that evaluation forgets, no seeds.


def make(folder: Path, eval_rows: Any = None, **options: Any) -> FractalTrainer:
    """A trainer of a two-layer model for two steps."""
    defaults: dict[str, Any] = {
        "scorer": "token",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return FractalTrainer(
        make_model("token", "llama"),
        args=FractalConfig(output_dir=str(folder), **defaults | options),  # type: ignore[arg-type]
        train_dataset=sums(8),
        eval_dataset=eval_rows,
        processing_class=byte_tokenizer(merges=True),
    )


def test_trap_8_the_best_model_is_chosen_by_the_loss_which_does_not_see_gold_step_labels(tmp_path):
    config = FractalConfig(
        output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps"
    )
    assert config.metric_for_best_model == "loss"
    rows = sums(6, seed=1)
    wrong = [row | {"step_labels": [1 - label for label in row["step_labels"]]} for row in rows]
    trainer = make(tmp_path, eval_rows=rows)
    right_gold, wrong_gold = trainer.evaluate(), trainer.evaluate(wrong)
    assert right_gold["eval_loss"] == wrong_gold["eval_loss"]
    assert right_gold["eval_step_auc"] != wrong_gold["eval_step_auc"]


def test_trap_9_the_weight_of_the_bag_loss_holds_in_evaluation_as_in_training(tmp_path):
    trainer = make(tmp_path, eval_rows=sums(8), bag_weight=0.25)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(0.25 * found["eval_loss/bag"], rel=1e-5)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert entry["loss"] == pytest.approx(0.25 * entry["loss/bag"], abs=1e-4)


def test_trap_10_the_seed_decides_the_result(tmp_path):
    weights = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        trainer = make(tmp_path / name, seed=seed)
        trainer.train()
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in trainer.scorer.parameters()])
    assert torch.equal(weights["one"], weights["same"])
    assert not torch.equal(weights["one"], weights["other"])
