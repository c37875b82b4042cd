"""Training from response labels: equal by construction where it can be, and honest about what it reads."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from sklearn.metrics import roc_auc_score
from support.fractal import ROWS, make
from support.models import byte_tokenizer, make_model, recomputes_activations, sums
from transformers import TrainingArguments

from fractal_rm.data.bag import Bag
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import to_bags
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.scorers.likelihood import LikelihoodScorer
from fractal_rm.scorers.settings import FractalSettings

KINDS = [("likelihood", "llama"), ("likelihood", "gpt2"), ("token", "llama"), ("token", "gpt2"), ("token", "bert")]


def train(folder: Path, *args: Any, **kwargs: Any) -> FractalTrainer:
    trainer = make(folder, *args, **kwargs)
    trainer.train()
    return trainer


def weights(trainer: FractalTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.scorer.named_parameters()}


def assert_equal_weights(a: FractalTrainer, b: FractalTrainer) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def logged(trainer: FractalTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]} | options)


# Learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scorer", "family"), KINDS)
def test_the_bag_loss_falls_and_every_parameter_moves(tmp_path, scorer, family):
    trainer = make(tmp_path, ROWS[:8], scorer=scorer, family=family, max_steps=25, per_device_train_batch_size=8)
    before = weights(trainer)
    trainer.train()
    losses = logged(trainer, "loss/bag")
    assert len(losses) == 25
    assert losses == pytest.approx(logged(trainer, "loss"), abs=1e-4)
    assert not logged(trainer, "loss/instance")
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert [name for name, weight in weights(trainer).items() if torch.equal(weight, before[name])] == []


@pytest.mark.parametrize(
    ("scorer", "targets"), [("likelihood", ["q_proj"]), ("token", ["q_proj"]), ("token", "all-linear")]
)
def test_adapters_learn_and_what_is_saved_scores_alike(tmp_path, scorer, targets):
    trainer = make(
        tmp_path,
        ROWS[:8],
        scorer=scorer,
        max_steps=12,
        per_device_train_batch_size=8,
        # A task that does not fit would leave the head frozen and random.
        peft_config=lora(target_modules=targets, task_type="CAUSAL_LM"),
    )
    before = weights(trainer)
    names = [name for name, parameter in trainer.scorer.named_parameters() if parameter.requires_grad]
    assert any("lora_" in name for name in names)
    assert any(name.endswith(("score.modules_to_save.default.weight", "log_weight")) for name in names)
    assert not any("score" in name and "lora_" in name for name in names)
    trainer.train()
    after = weights(trainer)
    assert sorted(names) == sorted(name for name in after if not torch.equal(before[name], after[name]))
    losses = logged(trainer, "loss/bag")
    assert losses[-1] < losses[0]
    trainer.save_model()
    prompts, responses = [row["prompt"] for row in ROWS], [row["steps"] for row in ROWS]
    live = trainer.reward_model().score(prompts, responses)
    loaded = StepRewardModel.from_pretrained(tmp_path).score(prompts, responses)
    for a, b in zip(live, loaded, strict=True):
        assert a.step_scores == pytest.approx(b.step_scores, abs=1e-5)
    assert np.std([result.score for result in live]) > 1e-3


def test_adapters_that_are_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`peft_config` is a PromptTuningConfig, which adds tokens before the text"):
        make(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_the_callers_adapter_configuration_is_left_alone(tmp_path):
    config = lora()
    make(tmp_path, scorer="token", peft_config=config)
    assert config.task_type is None


@pytest.mark.parametrize("scorer", ["likelihood", "token"])
def test_the_same_seed_gives_the_same_model(tmp_path, scorer):
    options = {"scorer": scorer, "family": "gpt2", "disable_dropout": False}
    first, second = train(tmp_path, **options, seed=1), train(tmp_path, **options, seed=1)
    assert_equal_weights(first, second)


def test_the_seed_decides_a_new_head_and_new_adapters(tmp_path):
    make_model("likelihood", "llama").save_pretrained(tmp_path / "lm")
    start = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # whatever happened before
        start.append(make(tmp_path, scorer="token", model=tmp_path / "lm", seed=seed, peft_config=lora()))
    assert_equal_weights(start[0], start[1])
    assert {name for name, weight in weights(start[0]).items() if not torch.equal(weight, weights(start[2])[name])} == {
        name for name in weights(start[0]) if "lora_A" in name or ("score" in name and "weight" in name)
    }


def test_the_scale_is_fitted_with_the_label_noise_of_the_configuration(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(LikelihoodScorer, "fit_scale", lambda *_, **options: asked.append(options["label_noise"]))
    train(tmp_path, scorer="likelihood", max_steps=1, missed_good=0.3, missed_bad=0.05)
    assert asked == [(0.3, 0.05)]


@pytest.mark.parametrize("scorer", ["likelihood", "token"])
def test_accumulated_gradients_equal_one_big_batch(tmp_path, scorer):
    # Without Adam, which makes whole steps of rounding errors, and without dropout.
    options = {"scorer": scorer, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "instance_weight": 0.5}
    options["model_options"] = {"classifier_dropout": 0.0}
    whole = train(tmp_path, per_device_train_batch_size=8, **options)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    for name in ("loss", "loss/bag", "loss/instance"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), abs=1e-4)
    left, right = weights(whole), weights(parts)
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scorer", ["likelihood", "token"])
def test_gradient_checkpointing_changes_no_weight(tmp_path, scorer):
    plain = train(tmp_path, scorer=scorer, max_steps=2)
    checkpointed = train(tmp_path, scorer=scorer, max_steps=2, gradient_checkpointing=True)
    assert recomputes_activations(checkpointed.scorer.base)
    left, right = weights(plain), weights(checkpointed)
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight)


@pytest.mark.parametrize("scorer", ["likelihood", "token"])
def test_bfloat16_trains_and_keeps_full_precision_weights(tmp_path, scorer):
    trainer = train(tmp_path, ROWS[:8], scorer=scorer, max_steps=8, per_device_train_batch_size=8, bf16=True)
    losses = logged(trainer, "loss/bag")
    assert losses[-1] < losses[0]
    assert all(weight.dtype == torch.float32 for weight in weights(trainer).values())


def test_batches_of_like_length_hold_less_padding(tmp_path):
    rows = sums(64)

    def padding(strategy: str) -> float:
        trainer = train(tmp_path, rows, max_steps=2, train_sampling_strategy=strategy, per_device_train_batch_size=2)
        masks = [batch["attention_mask"].float() for batch in trainer.get_train_dataloader()]
        assert sum(len(mask) for mask in masks) == len(rows)
        return float(np.mean([(1 - mask).mean() for mask in masks]))

    assert padding("group_by_length") < 0.6 * padding("random")


def test_the_scorers_own_parameters_have_their_own_learning_rate(tmp_path):
    for scorer, own in (("likelihood", {"log_weight", "bias"}), ("token", {"model.score.weight", "model.score.bias"})):
        for options, rate in (({}, 10 * 1e-3), ({"head_learning_rate": 0.5}, 0.5), ({"head_learning_rate": 0.0}, 0.0)):
            trainer = make(tmp_path, scorer=scorer, learning_rate=1e-3, weight_decay=0.1, **options)
            names = {id(parameter): name for name, parameter in trainer.scorer.named_parameters()}
            groups = trainer.create_optimizer().param_groups
            found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
            assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
            assert {name for name, (lr, _) in found.items() if lr == rate and lr != 1e-3} == own
            assert all(found[name] == (rate, 0.0) for name in own)


def test_weight_and_bias_are_fitted_before_the_language_model_learns(tmp_path):
    trainer = make(tmp_path, max_steps=1, learning_rate=0.0, head_learning_rate=0.0, eval_rows=ROWS)
    scorer = trainer.scorer
    assert isinstance(scorer, LikelihoodScorer)
    before, start = weights(trainer), trainer.evaluate()["eval_loss/bag"]
    trainer.train()
    fitted = trainer.evaluate()["eval_loss/bag"]
    assert fitted < start
    assert fitted < math.log(2) + 0.01  # better than saying 1/2 to all
    changed = [name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])]
    assert changed == ["log_weight", "bias"]
    # No other weight and bias do better on these labels, the weak pull towards weight 1 aside.
    for shift in (-0.2, 0.2):
        for parameter in (scorer.log_weight, scorer.bias):
            parameter.data += shift
            assert trainer.evaluate()["eval_loss/bag"] > fitted - 2e-3
            parameter.data -= shift


def test_training_goes_on_from_a_reward_model(tmp_path):
    first = train(tmp_path / "first")
    first.save_model()
    again = FractalTrainer(
        tmp_path / "first",
        args=FractalConfig(output_dir=str(tmp_path / "again"), use_cpu=True, max_length=100),
        train_dataset=ROWS,
    )
    assert torch.equal(weights(again)["model.lm_head.weight"], weights(first)["model.lm_head.weight"])
    again.save_model()
    assert StepRewardModel.from_pretrained(tmp_path / "again").settings.max_length == 100


# Resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "family", "adapter"),
    [
        ("likelihood", "gpt2", None),
        ("token", "gpt2", None),
        ("likelihood", "llama", lora()),
        ("token", "llama", lora()),
        ("token", "bert", None),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, scorer, family, adapter):
    options = {"scorer": scorer, "family": family, "peft_config": adapter, "max_steps": 6, "save_strategy": "steps"}
    whole = train(tmp_path / "whole", save_steps=3, **options)
    resumed = make(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal_weights(whole, resumed)
    assert logged(whole, "loss/bag") == logged(resumed, "loss/bag")


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    for adapter in (None, lora()):
        folder = tmp_path / str(adapter is None)
        trainer = train(
            folder,
            eval_rows=sums(8, seed=1),
            peft_config=adapter,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that the best one is not the last
        )
        losses = logged(trainer, "eval_loss")
        assert losses[-1] < max(losses) - 1e-3
        assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)


# Logs and evaluation -----------------------------------------------------------------------------------------------


def test_loss_terms_are_logged_by_name_and_add_up(tmp_path):
    trainer = train(tmp_path, eval_rows=sums(6, seed=1), eval_strategy="steps", eval_steps=2, instance_weight=0.5)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["loss/bag"] + 0.5 * entry["loss/instance"], abs=1e-4)
        assert not any(name.startswith("eval_") for name in entry)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    for entry in evaluations:
        parts = entry["eval_loss/bag"] + 0.5 * entry["eval_loss/instance"]
        assert entry["eval_loss"] == pytest.approx(parts, abs=1e-5)
        assert not any(name.startswith("loss") for name in entry)


def test_terms_of_one_evaluation_do_not_reach_the_log_of_another(tmp_path):
    trainer = make(tmp_path, eval_rows=sums(6, seed=1), scorer="token")
    expected = trainer.evaluate()["eval_loss/bag"]
    trainer.predict(trainer.train_dataset)
    other = trainer.evaluate(ROWS, metric_key_prefix="test")
    assert other["test_loss/bag"] == pytest.approx(other["test_loss"], abs=1e-6)
    assert trainer.evaluate()["eval_loss/bag"] == expected != other["test_loss/bag"]


def test_the_evaluation_loss_is_the_mean_over_bags_with_soft_labels(tmp_path):
    rows = [row | {"label": 0.7 if row["label"] else 0.2} for row in sums(7, seed=1)]
    trainer = make(tmp_path, eval_rows=rows, scorer="token")
    found = trainer.evaluate()["eval_loss/bag"]
    scored = trainer.reward_model().score([row["prompt"] for row in rows], [row["steps"] for row in rows])
    expected = [
        -(row["label"] * math.log(s.score) + (1 - row["label"]) * math.log(1 - s.score))
        for row, s in zip(rows, scored, strict=True)
    ]
    assert found == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("aggregation", ["min", "max", "mean", "product"])
def test_evaluation_equals_metrics_computed_from_scores_whatever_the_batches(tmp_path, aggregation):
    # Batches of other numbers of steps, which Trainer pads with -100: the lowest score of all, were it a score.
    rows = sorted(sums(19, seed=2), key=lambda row: len(row["steps"]))
    assert {len(row["steps"]) for row in rows} == {1, 2, 3, 4}
    trainer = make(tmp_path, eval_rows=rows, scorer="token", aggregation=aggregation, per_device_eval_batch_size=5)
    found = trainer.evaluate()
    scored = trainer.reward_model().score([row["prompt"] for row in rows], [row["steps"] for row in rows])
    labels = [row["label"] for row in rows]
    probs = [result.score for result in scored]
    assert found["eval_bag_auc"] == pytest.approx(roc_auc_score(labels, probs), abs=1e-6)
    hits = [(p >= 0.5) == bool(y) for p, y in zip(probs, labels, strict=True)]
    assert found["eval_bag_accuracy"] == pytest.approx(np.mean(hits))
    gold = [label for row in rows for label in row["step_labels"]]
    steps = [score for result in scored for score in result.step_scores]
    assert found["eval_step_auc"] == pytest.approx(roc_auc_score(gold, steps), abs=1e-6)
    within = [
        roc_auc_score(row["step_labels"], result.step_scores)
        for row, result in zip(rows, scored, strict=True)
        if len(set(row["step_labels"])) == 2
    ]
    assert found["eval_within_bag_auc"] == pytest.approx(np.mean(within), abs=1e-6)


def test_evaluation_without_gold_steps_has_no_step_metrics(tmp_path):
    rows = [{name: row[name] for name in ("prompt", "steps", "label")} for row in ROWS]
    found = make(tmp_path, eval_rows=rows).evaluate()
    assert "eval_bag_auc" in found
    assert not any("step" in name and "per_second" not in name for name in found)


def test_unknown_step_labels_stay_out_of_the_metrics(tmp_path):
    rows = [row | {"step_labels": [None] * len(row["steps"])} for row in ROWS[:6]] + ROWS[6:]
    some, fewer = make(tmp_path, eval_rows=rows).evaluate(), make(tmp_path, eval_rows=ROWS[6:]).evaluate()
    assert some["eval_step_auc"] == fewer["eval_step_auc"]
    assert some["eval_bag_auc"] != fewer["eval_bag_auc"]


def test_evaluate_takes_records(tmp_path):
    trainer = make(tmp_path, eval_rows=ROWS[:4])
    assert trainer.evaluate(ROWS)["eval_bag_auc"] == make(tmp_path, eval_rows=ROWS).evaluate()["eval_bag_auc"]


def test_a_model_may_be_evaluated_without_training_data(tmp_path):
    assert make(tmp_path, None, eval_rows=ROWS).evaluate()["eval_loss"] > 0


# Gold labels -------------------------------------------------------------------------------------------------------


def scrambled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"step_labels": [1 - label for label in row["step_labels"]]} for row in rows]


@pytest.mark.parametrize("max_length", [None, 30])
@pytest.mark.parametrize("scorer", ["likelihood", "token"])
def test_gold_labels_change_nothing_without_an_instance_loss(tmp_path, scorer, max_length):
    options = {"scorer": scorer, "max_length": max_length}
    honest = train(tmp_path, ROWS, **options)
    other = train(tmp_path, scrambled(ROWS), **options)
    none = train(tmp_path, [{k: v for k, v in row.items() if k != "step_labels"} for row in ROWS], **options)
    assert_equal_weights(honest, other)
    assert_equal_weights(honest, none)
    assert honest.train_dataset.truncation == other.train_dataset.truncation


def test_gold_labels_are_used_with_an_instance_loss(tmp_path):
    first = train(tmp_path, ROWS, instance_weight=1.0)
    other = train(tmp_path, scrambled(ROWS), instance_weight=1.0)
    assert any(not torch.equal(a, b) for a, b in zip(weights(first).values(), weights(other).values(), strict=True))


def test_the_instance_loss_alone_learns_steps(tmp_path):
    options = {"bag_weight": 0.0, "instance_weight": 1.0, "max_steps": 25, "per_device_train_batch_size": 8}
    trainer = train(tmp_path, ROWS[:8], scorer="token", eval_rows=ROWS[:8], **options)
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "loss/instance")[0], abs=1e-4)
    assert logged(trainer, "loss/instance")[-1] < 0.7 * logged(trainer, "loss/instance")[0]


# Data --------------------------------------------------------------------------------------------------------------


def test_responses_that_are_too_long_are_counted_logged_and_keep_their_meaning(tmp_path, caplog):
    rows = [
        {"prompt": "?\n", "completion": "good step\ngood step\ngood step", "label": True},
        {"prompt": "?\n", "completion": "fine step\nslip here!\nfine step", "label": False},
        {"prompt": "?\n", "completion": "short", "label": False},
        {"prompt": "?\n", "completion": "a first step that does not fit at all", "label": True},
    ]
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, rows, tokenizer=byte_tokenizer(), max_length=25)
    data = trainer.train_dataset
    assert (data.truncation.total, data.truncation.truncated, data.truncation.dropped) == (4, 1, 2)
    assert [(bag.response, bag.label) for bag in data.bags] == [("good step\ngood step", 1.0), ("short", 0.0)]
    texts = [data_bag.prompt + data_bag.response for data_bag in data.bags]
    assert [trainer.processing_class.decode(encoded.input_ids) for encoded in data.encoded] == texts
    assert "train data: 3 of 4 responses are too long: 1 shortened to their first whole steps, 2 dropped" in caplog.text
    trainer.train()


def test_the_longest_input_of_the_model_is_the_limit_by_default(tmp_path, caplog):
    rows = [*ROWS, {"prompt": "?\n", "completion": "\n".join(["1+1=2."] * 40), "label": 1}]
    trainer = train(tmp_path, rows, family="gpt2", model_options={"n_positions": 64}, eval_rows=rows)
    assert trainer.settings.max_length == 64
    assert max(len(bag.input_ids) for bag in trainer.train_dataset.encoded) <= 64
    assert "1 of 17 responses are too long" in caplog.text
    trainer.save_model()
    scored = StepRewardModel.from_pretrained(tmp_path).score(["?\n"], ["\n".join(["1+1=2."] * 40)])[0]
    assert scored.truncated_steps > 0


def test_preferences_train(tmp_path):
    rows = [
        {"prompt": f"{i}+1?\n", "chosen": f"{i}+1={i + 1}.\ndone.", "rejected": f"{i}+1={i + 2}.\nno."}
        for i in range(4)
    ]
    trainer = train(tmp_path, rows, max_steps=15, per_device_train_batch_size=8)
    assert [bag.label for bag in trainer.train_dataset.bags] == [1.0, 0.0] * 4
    assert len(trainer.train_dataset) == 4
    assert not logged(trainer, "loss/bag")
    assert logged(trainer, "loss/preference")[-1] < 0.8 * logged(trainer, "loss/preference")[0]
    assert trainer.evaluate(rows)["eval_pair_accuracy"] == 1.0


def test_stepwise_supervision_trains(tmp_path):
    rows = [
        {"prompt": f"{i}+1?\n", "completions": [f"{i}+1={i + 1 + i % 2}.", "done."], "labels": [i % 2 == 0, True]}
        for i in range(8)
    ]
    trainer = train(tmp_path, rows)
    assert [bag.label for bag in trainer.train_dataset.bags] == [1.0, 0.0] * 4


def test_stepwise_rows_need_a_label_where_it_is_not_the_minimum_of_the_steps():
    rows = [{"prompt": "q", "completions": ["a", "b"], "labels": [0, 3]}]
    with pytest.raises(ValueError, match=r"rows, row 1: without `label` the response's label would be the minimum"):
        to_bags(rows, FractalSettings(scorer="token", aggregation="max", num_grades=4), source="rows")
    (bag,) = to_bags(
        [rows[0] | {"label": 3}], FractalSettings(scorer="token", aggregation="max", num_grades=4), source="rows"
    )
    assert bag.label == 3


def test_chats_train_with_a_chat_template(tmp_path):
    trainer = train(tmp_path, sums(8, chat=True), tokenizer=byte_tokenizer(chat=True))
    ids = trainer.train_dataset.encoded[0].input_ids
    assert trainer.processing_class.decode(ids).startswith("<user>0. Start at ")
    trainer.save_model()
    StepRewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("chat", [False, True, None])
def test_a_checkpoint_knows_whether_it_learned_from_chats(tmp_path, chat):
    # Readers refuse files of both kinds; bags made in code may be of both.
    mixed = [bag for kind in (False, True) for bag in read_bags(sums(4, chat=kind), Segmentation("lines"))]
    rows = mixed if chat is None else sums(8, chat=chat)
    make(tmp_path, rows, tokenizer=byte_tokenizer(chat=True)).save_model()
    loaded = StepRewardModel.from_pretrained(tmp_path)
    assert loaded.settings.chat is chat
    prompts = [bag.prompt for bag in mixed]
    if chat is None:
        loaded.score(prompts, ["1+1=2."] * 8)
    else:
        with pytest.raises(ValueError, match=f"row {0 if chat else 4}: the prompt is a"):
            loaded.score(prompts, ["1+1=2."] * 8)


def test_texts_to_evaluate_a_model_of_chats_on_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="eval data, row 0: the prompt is a text, but the reward model was trained on"):
        make(tmp_path, sums(8, chat=True), eval_rows=sums(4), tokenizer=byte_tokenizer(chat=True))


def test_chats_without_a_chat_template_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"The prompts are chats, but the tokenizer .* has no chat template\. Set"):
        make(tmp_path, sums(8, chat=True))


@pytest.mark.parametrize(("mine", "theirs"), [("min", "max"), ("mean", "min"), ("product", "mean")])
def test_data_with_another_aggregation_is_refused(tmp_path, mine, theirs):
    rows = [*ROWS, ROWS[0] | {"aggregation": theirs}]
    with pytest.raises(ValueError, match=rf"train data, row 17: the label is the {theirs} of its steps, but"):
        make(tmp_path, rows, aggregation=mine)


def test_a_product_is_a_way_to_learn_a_minimum(tmp_path):
    make(tmp_path, [row | {"aggregation": "min"} for row in ROWS], aggregation="product")
    make(tmp_path, [row | {"aggregation": "native"} for row in ROWS], aggregation="mean")


def bag(**changes: Any) -> Bag:
    return Bag(**{"prompt": "?\n", "response": "one.", "step_spans": ((0, 4),), "label": 1.0} | changes)


def test_bags_train_as_they_are(tmp_path):
    trainer = train(tmp_path, [bag(), bag(label=0.0, response="two.")])
    assert len(trainer.train_dataset) == 2


def test_grades_without_their_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train data, row 2: the bag has num_grades=4, but .* num_grades=None"):
        make(tmp_path, [bag(), bag(label=3.0, num_grades=4)])


def test_labels_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match="train data, row 2: the response has no label"):
        make(tmp_path, [bag(), bag(label=None)])
    with pytest.raises(ValueError, match="eval data, row 2: the response has no label"):
        make(tmp_path, eval_rows=[bag(), bag(label=None)])


def test_equal_labels_are_warned_of_in_training_data_only(tmp_path):
    with pytest.warns(UserWarning, match="All 2 responses have the label 1"):
        make(tmp_path, [bag(), bag()])
    assert math.isnan(make(tmp_path, eval_rows=[bag(), bag()]).evaluate()["eval_bag_auc"])


def test_data_of_which_nothing_fits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train data: no response fits into `max_length=5` tokens with its label"):
        make(tmp_path, max_length=5)


def test_prompts_that_run_into_responses_are_warned_of(tmp_path):
    rows = [{"prompt": "1+1?", "completion": "2", "label": 1}, {"prompt": "1+2?", "completion": "2", "label": 0}]
    with pytest.warns(UserWarning, match="Prompts run into responses without a space or newline"):
        make(tmp_path, rows)
    make(tmp_path, rows, prompt_template="Q: {prompt}\nA: ")


# Models ------------------------------------------------------------------------------------------------------------


def test_a_model_from_nowhere_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"so its tokenizer is unknown\. Give `processing_class`"):
        FractalTrainer(make_model("likelihood", "llama"), args=FractalConfig(output_dir=str(tmp_path), use_cpu=True))


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"The tokenizer has \d+ tokens, but the model has 50"):
        make(tmp_path, model_options={"vocab_size": 50})


def test_a_model_for_the_other_scorer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"The token scorer got a LlamaForCausalLM"):
        make(tmp_path, scorer="token", model=make_model("likelihood", "llama"))


def test_a_folder_trains_in_full_precision_whatever_it_was_saved_in(tmp_path):
    make_model("likelihood", "llama").to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "lm")
    args = FractalConfig(output_dir=str(tmp_path / "rm"), use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True)
    trainer = FractalTrainer(str(tmp_path / "lm"), args=args, train_dataset=ROWS)
    trainer.train()
    trainer.save_model()
    assert StepRewardModel.from_pretrained(tmp_path / "rm").scorer.base.dtype == torch.float32


def test_a_saved_folder_remembers_what_it_was_trained_on(tmp_path):
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[::-1])):
        make(tmp_path / name, rows).save_model()
    blocks = [json.loads((tmp_path / name / "config.json").read_text())["fractal"] for name in "abc"]
    assert blocks[0]["data"] == blocks[1]["data"] != blocks[2]["data"]
    assert blocks[0]["aggregation"] == "min"
    assert not list(tmp_path.glob("*/training_args.bin"))  # a pickle


# Configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bag_weight": 0.0}, "`bag_weight`, `instance_weight` and `easyllp_weight` are all 0"),
        ({"bag_weight": -1.0}, "`bag_weight` is -1.0"),
        ({"instance_weight": math.nan}, "`instance_weight` is nan"),
        ({"head_learning_rate": -1.0}, "`head_learning_rate` is -1.0"),
        ({"max_length": 1}, "`max_length` is 1\\. Give a whole number from 2"),
        ({"aggregation": "median"}, "Unknown aggregation 'median'"),
        ({"scorer": "window"}, "Unknown scorer 'window'"),
        ({"segmentation": "separator"}, "give separator a text"),
        ({"prompt_template": "Q:"}, "`prompt_template` is 'Q:'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FractalConfig(output_dir=str(tmp_path), **options)


def test_columns_are_never_removed(tmp_path):
    assert FractalConfig(output_dir=str(tmp_path), remove_unused_columns=True).remove_unused_columns is False


def test_the_loss_of_a_batch_is_the_mean_over_its_bags(tmp_path):
    trainer = make(tmp_path, scorer="token")
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.scorer(**{k: batch[k] for k in ("input_ids", "attention_mask", "step_ids", "step_ends", "mask")})
    expected = bag_loss(logits, batch["bag_labels"], batch["mask"]).mean()
    assert torch.allclose(trainer.compute_loss(trainer.scorer, batch), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_dropout_is_off_unless_it_is_asked_for(tmp_path, family):
    options = {"attention_dropout": 0.3} if family == "llama" else {}  # a share, not a module
    for disabled in (True, False):
        trainer = make(tmp_path, scorer="token", family=family, model_options=options, disable_dropout=disabled)
        model = trainer.scorer.train()
        batch = trainer.inputs.pad(trainer.inputs.encode(to_bags(ROWS[:1], trainer.settings, source="rows")))
        with torch.no_grad():
            assert torch.equal(model(**batch), model(**batch)) == disabled


def test_another_configuration_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(TypeError, match=r"`args` is a TrainingArguments, .* Give `FractalConfig\(\.\.\.\)`"):
        FractalTrainer(make_model("token", "llama"), TrainingArguments(str(tmp_path)))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gemma3", "granite", "olmo2"])
def test_families_without_a_token_classifier_train_from_a_causal_folder(tmp_path, family):
    make_model("likelihood", family).save_pretrained(tmp_path / "lm")
    trainer = train(tmp_path / "out", scorer="token", model=tmp_path / "lm")
    expected = trainer.reward_model().score([ROWS[0]["prompt"]], [ROWS[0]["steps"]])[0].step_scores
    trainer.save_model(str(tmp_path / "rm"))
    saved = StepRewardModel.from_pretrained(tmp_path / "rm", device="cpu")
    assert saved.score([ROWS[0]["prompt"]], [ROWS[0]["steps"]])[0].step_scores == pytest.approx(expected, abs=1e-6)
