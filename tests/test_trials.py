"""Choosing a configuration: what judges trials, what they never look at, and that a stopped choice goes on."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support.models import byte_tokenizer, make_model, sums
from support.stand_ins import save_encoder, write_jsonl

from fractal_rm.cli.main import main
from fractal_rm.data.bag import Bag, Step, StepScores
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.intervals import Measurement, differences
from fractal_rm.evaluation.results import read_results
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.reward_training.trials import (
    FOLDS,
    Trial,
    best_beyond_noise,
    check_trials,
    make_folds,
    make_judge,
    response_score,
    response_statistic,
    response_value,
    trial_options,
)

ROWS = sums(40)
# As much as judges without folds.
HELD_OUT = sums(104, seed=1)


def config(folder: Any = "unused", **options: Any) -> FractalConfig:
    given: dict[str, Any] = {"scorer": "embedding", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    short = {"max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
    return FractalConfig(output_dir=str(folder), **{**given, **short, **options})


def bags_of(rows: Any) -> list[Bag]:
    return read_bags(rows, Segmentation("given"), source="rows")


def labelled(labels: list[float], **options: Any) -> list[Bag]:
    return [Bag(f"{i}?", "a\nb", ((0, 1), (2, 3)), label, **options) for i, label in enumerate(labels)]


def preferences(count: int) -> list[Bag]:
    return [
        Bag(f"{pair}?", side, ((0, 1),), 1.0 - number, pair_id=str(pair))
        for pair in range(count)
        for number, side in enumerate("ab")
    ]


# What is tried --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["min", "product", "max", "noisy_or", "mean"])
@pytest.mark.parametrize("scorer", ["embedding", "likelihood", "token"])
def test_the_list_starts_with_the_plain_bag_loss_and_every_configuration_is_one(scorer, aggregation):
    args = config(scorer=scorer, aggregation=aggregation)
    found = trial_options(args)
    rule = {"product": "min", "noisy_or": "max"}.get(aggregation, aggregation)
    assert found[0] == {"aggregation": rule}
    assert len(found) == (6 if scorer == "token" and rule == "mean" else 8)
    assert [str(one) for one in found] == list(dict.fromkeys(map(str, found)))
    for options in found:
        assert replace(args, **options).pseudo_labels == options.get("pseudo_labels", "none")
        assert not any(name.startswith(("instance", "gold", "hybrid")) for name in options)


def test_grades_and_preferences_have_hard_pseudo_labels_only():
    for found in (
        trial_options(config(num_grades=4, aggregation="max")),
        trial_options(config(), preferences=True),
    ):
        assert {options.get("pseudo_labels") for options in found} == {None, "hard"}


# What it is judged by -------------------------------------------------------------------------------------------------


def test_the_value_is_the_auc_of_responses_and_no_step_label_is_read():
    generator = np.random.default_rng(0)
    labels, scores = [float(i % 2) for i in range(30)], generator.random(30).tolist()
    bags = labelled(labels)
    assert response_value(scores, bags) == pytest.approx(roc_auc_score(labels, scores))
    gold = [replace(bag, step_labels=(float(i % 3 == 0), 1.0)) for i, bag in enumerate(bags)]
    assert response_value(scores, gold) == response_value(scores, bags)
    unscored = [float("nan"), *scores[1:]]
    assert response_value(unscored, bags) == pytest.approx(roc_auc_score(labels[1:], scores[1:]))


def test_scores_of_different_folds_are_not_compared():
    bags, folds = labelled([1.0, 0.0, 1.0, 0.0]), [0, 0, 1, 1]
    scores = [0.2, 0.1, 0.9, 0.8]  # each fold ranks rightly, on a scale of its own
    assert response_statistic(scores, bags, folds).value == 1.0
    assert response_value(scores, bags) == 0.75


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("min", 0.2), ("product", 0.2), ("max", 0.9), ("noisy_or", 0.9), ("mean", 0.5)]
)
def test_every_trial_is_read_by_the_aggregation_of_the_plain_bag_loss(aggregation, expected):
    steps = [Step("a", 0, 1, 0.9), Step("b", 2, 3, 0.2), Step("c", 4, 5, 0.4)]
    scored = StepScores("a b c", steps, score=0.77)
    assert response_score(scored, config(aggregation=aggregation)) == pytest.approx(expected)
    assert response_score(scored, config(num_grades=4, aggregation="max")) == 0.77
    assert math.isnan(response_score(StepScores("", error="no steps"), config()))


def test_preferences_and_grades_have_values_of_their_own():
    pairs = preferences(4)
    assert response_value([0.9, 0.1, 0.2, 0.3, 0.5, 0.5, 0.7, 0.6], pairs) == 0.5  # a tie does not count
    grades = [
        replace(bag, num_grades=3, label=label) for bag, label in zip(labelled([0.0, 1.0]), (2.0, 0.0), strict=True)
    ]
    assert response_value([1.0, 0.5], grades) == -0.25
    both = [*labelled([1.0, 0.0]), *preferences(1)]
    assert response_value([0.9, 0.1, 0.2, 0.3], both) == 0.5


def test_much_validation_data_judges_alone_and_little_of_it_by_folds():
    train, much, few = labelled([1.0, 0.0] * 20), labelled([1.0, 0.0] * 50), labelled([1.0, 0.0] * 49)
    assert make_judge(train, much, seed=0).folds is None
    assert make_judge(train, preferences(100), seed=0).folds is None
    judge = make_judge(train, few, seed=0)
    assert len(judge.bags) == len(train) + len(few)
    assert judge.folds is not None
    lopsided = labelled([1.0] * 200 + [0.0] * 5)
    assert make_judge(train, lopsided, seed=0).folds is not None
    assert make_judge(train, None, seed=0).bags == train


def test_folds_keep_prompts_together_and_share_out_both_labels():
    bags = [Bag(f"{i // 4}?", f"{i}", ((0, 1),), float(i % 3 == 0)) for i in range(80)]
    folds = make_folds(bags, seed=0)
    for prompt in {bag.prompt for bag in bags}:
        assert len({fold for bag, fold in zip(bags, folds, strict=True) if bag.prompt == prompt}) == 1
    for one in range(FOLDS):
        mine = [bag.label for bag, fold in zip(bags, folds, strict=True) if fold == one]
        assert 12 <= len(mine) <= 20
        assert 0.2 < np.mean(mine) < 0.5
    judge = make_judge(bags, None, seed=0)
    assert make_folds(bags, seed=0) == folds != make_folds(bags, seed=1)
    held = sorted(row for _, rows in judge.splits for row in rows)
    assert held == list(range(80))
    for train, rows in judge.splits:
        assert not {bag.prompt for bag in train} & {bags[row].prompt for row in rows}
        assert len(train) + len(rows) == 80


def test_the_plain_bag_loss_stays_unless_another_is_better_beyond_noise():
    labels = [float(i % 2) for i in range(100)]
    judge = make_judge(labelled([1.0, 0.0]), labelled(labels), seed=0)
    generator = np.random.default_rng(0)
    plain = generator.random(100)

    def measured(scores: np.ndarray) -> Measurement:
        return Measurement(100, {"auc": response_statistic(scores.tolist(), judge.bags)})

    def errors(scores: np.ndarray) -> float:
        """The gain over `plain`, in standard errors."""
        gain = differences(measured(scores), measured(plain))["auc"]
        return gain.value / ((gain.high - gain.low) / (2 * 1.96))

    others = (plain + generator.normal(scale=0.3, size=100) for _ in range(100))
    near = next(one for one in others if 1.2 < errors(one) < 1.7)
    clear = np.array(labels) + 0.1 * generator.random(100)

    def choice(*scores: np.ndarray, options: Sequence[dict[str, Any]] = ({}, {"aggregation": "product"})) -> int:
        trials = [
            Trial(number, dict(changed), response_value(one.tolist(), judge.bags), one.tolist())
            for number, (one, changed) in enumerate(zip(scores, options, strict=False))
        ]
        assert max(trials, key=lambda trial: trial.value).number == len(trials) - 1
        return best_beyond_noise(trials, judge).chosen.number

    assert choice(plain, near) == 0
    assert choice(plain, clear) == 1
    assert choice(plain) == 0
    # The pace of the plain bag loss is chosen by the value alone; another method has to beat the better pace.
    slower = {"learning_rate": 1e-4, "num_train_epochs": 6}
    assert choice(plain, near, options=({}, slower)) == 1
    good = np.array(labels) + 0.5 * generator.normal(size=100)
    closer = good + 0.5 * generator.normal(size=100) * 1e-1 + 0.02 * np.array(labels)
    assert choice(plain, good, closer, options=({}, slower, {"aggregation": "product"})) == 1
    assert choice(plain, closer, options=({}, {"aggregation": "product"})) == 1


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "train", "validation", "told"),
    [
        (0, {}, ROWS, None, "`trials` is 0, but there are 8 configurations. Give 1 to 8."),
        (9, {}, ROWS, None, "`trials` is 9, but there are 8 configurations"),
        (2, {"pseudo_labels": "hard"}, ROWS, None, "`pseudo_labels` is hard, but `trials` vary"),
        (2, {"cosine_prior_weight": 0.1}, ROWS, None, "`cosine_prior_weight` is 0.1, but `trials` vary"),
        (2, {}, ROWS[::2], ROWS[:2:2], "All 21 responses are good, so configurations cannot be compared"),
        (2, {}, ROWS[1::2], None, "All 20 responses are bad"),
        (2, {}, ROWS[:10], None, r"Too few labels to choose by: 10 responses to 10 prompts \(5 good, 5 bad, 0 pref"),
        (2, {}, [row | {"prompt": "?"} for row in ROWS], None, "Too few labels .* 40 responses to 1 prompts"),
    ],
)
def test_what_cannot_be_chosen_is_said_before_work(count, options, train, validation, told):
    held_out = None if validation is None else bags_of(validation)
    with pytest.raises(ValueError, match=told):
        check_trials(count, config(**options), bags_of(train), held_out)


# The method and the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


class Stopped(Exception):
    pass


def test_a_stopped_choice_goes_on_and_makes_no_trial_again(encoder, tmp_path):
    options = {"embedding_cache": str(tmp_path / "cache"), "seed": 3}
    whole = FractalTrainer.choose(3, encoder, config(tmp_path / "whole", **options), ROWS, HELD_OUT)

    def stop(trial: Trial) -> None:
        if trial.number == 1:
            raise Stopped

    args = config(tmp_path / "cut", **options)
    with pytest.raises(Stopped):
        FractalTrainer.choose(3, encoder, args, ROWS, HELD_OUT, on_trial=stop)
    file = tmp_path / "cut" / "trials.jsonl"
    before = file.read_text()
    assert len(before.splitlines()) == 2
    trainer = FractalTrainer.choose(3, encoder, args, ROWS, HELD_OUT)
    assert file.read_text().startswith(before)
    assert len(file.read_text().splitlines()) == 3
    assert [one.value for one in trainer.choice.trials] == [one.value for one in whole.choice.trials]
    assert [one.scores for one in trainer.choice.trials] == [one.scores for one in whole.choice.trials]
    assert trainer.choice.chosen.options == whole.choice.chosen.options
    assert trainer.args.aggregation == trainer.choice.chosen.options["aggregation"] == trainer.settings.aggregation
    after = file.read_text()
    FractalTrainer.choose(3, encoder, args, ROWS, HELD_OUT)
    assert file.read_text() == after  # nothing is left to do
    FractalTrainer.choose(1, encoder, config(tmp_path / "cut", **options | {"weight_decay": 0.3}), ROWS, HELD_OUT)
    assert len(file.read_text().splitlines()) == 4  # another configuration is another choice
    assert " at 0x" not in str(args.to_dict())  # or another process would not know these trials
    assert not (tmp_path / "cut" / "trial").exists()
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "## How its configuration was chosen" in card
    assert f"Trial {trainer.choice.chosen.number + 1} of 3, by response labels of 104 responses of the val" in card


def test_gold_step_labels_choose_nothing(encoder, tmp_path):
    found = []
    for name, rows in (
        ("right", ROWS),
        ("wrong", [row | {"step_labels": [1 - x for x in row["step_labels"]]} for row in ROWS]),
    ):
        args = config(tmp_path / name, embedding_cache=str(tmp_path / "cache"))
        found.append(FractalTrainer.choose(1, encoder, args, rows).choice.trials)
    assert [one.scores for one in found[0]] == [one.scores for one in found[1]]


def test_a_model_that_is_an_instance_starts_every_trial_anew(tmp_path):
    model = make_model("token", "llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = config(tmp_path, scorer="token", learning_rate=1e-2)
    trainer = FractalTrainer.choose(1, model, args, ROWS, processing_class=byte_tokenizer())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (row,) = read_results(tmp_path / "trials.jsonl")
    assert len(row["metrics"]["scores"]) == len(ROWS)
    assert len(trainer.choice.trials) == 1


def test_the_command_chooses_trains_the_winner_and_names_it(encoder, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    flags = ["--model", encoder, "--scorer", "embedding", "--train_file", file, "--output_dir", str(tmp_path / "out")]
    flags += ["--report_to", "none", "--use_cpu", "true", "--save_strategy", "no", "--max_steps", "1"]
    flags += ["--embedding_cache", str(tmp_path / "cache"), "--disable_tqdm", "true"]
    assert main(["train", *flags, "--trials", "0"]) == 2
    assert "`trials` is 0, but there are 8 configurations. Give 1 to 8." in capsys.readouterr().err
    assert main(["train", *flags, "--trials", "2"]) == 0
    out = capsys.readouterr().out
    assert "Trial 2 of 2: 0." in out
    number = int(re.findall(r"5-fold cross-validated by prompt: trial (\d)\. trials.jsonl holds all", out)[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Trial {number} of 2, by response labels of 40 responses" in card
    rows = read_results(tmp_path / "out" / "trials.jsonl")
    assert [row["config"]["aggregation"] for row in rows] == ["min", "product"]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["fractal"]
    assert settings["aggregation"] == rows[number - 1]["config"]["aggregation"]
