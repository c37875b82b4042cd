"""The stages of a training: what each learns from, where it starts, what of the gold labels it reads, and resuming."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import byte_tokenizer, make_model, sums
from support.stand_ins import save_encoder
from torch import Tensor
from transformers import TrainerCallback

from fractal_rm.evaluation.responses import choose_threshold, evaluate_scores, score_bags
from fractal_rm.objectives.calibration import fit_temperature
from fractal_rm.objectives.grades import ordinal_pseudo_labels
from fractal_rm.objectives.preferences import preference_pseudo_labels
from fractal_rm.objectives.pseudo_labels import posteriors, pseudo_labels
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training import stages
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.data import to_bags
from fractal_rm.reward_training.stages import most_uncertain, plan, revealed_gold, step_targets
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
ROWS = sums(20)
PAIRS = [{"prompt": f"{i}?", "chosen": [f"{i}.", "good."], "rejected": [f"{i}.", "zzz.", "b."]} for i in range(6)]
GOLD = {"instance_weight": 1.0, "gold_fraction": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder) -> SentenceEncoder:
    return SentenceEncoder(folder, cache_dir="")


def config(folder: Path = Path("unused"), **options: Any) -> FractalConfig:
    defaults = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "scorer": "embedding"}
    return FractalConfig(output_dir=str(folder), **QUIET | defaults | options)


def make(folder: Path, encoder: Any, rows: Any = ROWS, **options: Any) -> FractalTrainer:
    callbacks = options.pop("callbacks", None)
    return FractalTrainer(encoder, args=config(folder, **options), train_dataset=rows, callbacks=callbacks)


def train(folder: Path, encoder: Any, rows: Any = ROWS, **options: Any) -> FractalTrainer:
    trainer = make(folder, encoder, rows, **options)
    trainer.train()
    return trainer


def weights(trainer: FractalTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.scorer.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scrambled(rows: list[dict[str, Any]], kept: set[int] = frozenset()) -> list[dict[str, Any]]:
    """Rows with other gold step labels, but for some."""
    return [
        row if i in kept else row | {"step_labels": [1 - label for label in row["step_labels"]]}
        for i, row in enumerate(rows)
    ]


# Plan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["joint"]),
        ({"cosine_prior_weight": 0.1}, ["joint"]),
        ({"instance_weight": 1.0}, ["joint"]),
        (GOLD, ["joint"]),
        ({"gold_selection": "uncertainty"}, ["joint"]),  # no gold labels are read
        ({"gold_selection": "uncertainty", "instance_weight": 1.0}, ["joint"]),  # all are
        (GOLD | {"gold_selection": "uncertainty"}, ["selection", "joint"]),
        (GOLD | {"hybrid_prior_weight": 0.5}, ["gold", "joint"]),
        ({"pseudo_labels": "soft"}, ["joint", "pseudo-1"]),
        ({"pseudo_labels": "hard", "pseudo_rounds": 3}, ["joint", "pseudo-1", "pseudo-2", "pseudo-3"]),
        (
            GOLD | {"gold_selection": "uncertainty", "hybrid_prior_weight": 0.5, "pseudo_labels": "hard"},
            ["selection", "gold", "joint", "pseudo-1"],
        ),
    ],
)
def test_the_plan_has_the_stages_that_are_asked_for(options, names):
    assert [stage.name for stage in plan(config(**options))] == [f"stage-{name}" for name in names]


def test_one_stage_trains_in_the_output_folder_as_ever(encoder, tmp_path):
    train(tmp_path, encoder, save_strategy="steps", save_steps=3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_stages_have_folders_of_their_own_and_one_history(encoder, tmp_path):
    trainer = train(tmp_path, encoder, pseudo_labels="hard", save_strategy="steps", save_steps=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-joint", "stage-pseudo-1"]
    assert trainer.args.output_dir == str(tmp_path)
    history = trainer.state.log_history
    assert [entry["stage"] for entry in history if "loss" in entry] == ["stage-joint"] * 3 + ["stage-pseudo-1"] * 3
    assert all(("loss/pseudo" in entry) == (entry["stage"] == "stage-pseudo-1") for entry in history if "loss" in entry)


def test_an_optimizer_of_the_callers_is_used_in_one_stage_and_refused_in_several(encoder, tmp_path):
    trainer = make(tmp_path, encoder)
    parameters = list(trainer.scorer.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    options = {"train_dataset": ROWS, "optimizers": (optimizer, None)}
    still = FractalTrainer(encoder, args=config(tmp_path), **options)
    before = weights(still)
    optimizer.param_groups[0]["params"] = list(still.scorer.parameters())
    still.train()
    assert equal(before, weights(still))
    with pytest.raises(ValueError, match="`optimizers` was given, but training has 2 stages"):
        FractalTrainer(encoder, args=config(tmp_path, pseudo_labels="hard"), **options)


# Pseudo-labels ------------------------------------------------------------------------------------------------------


def first_stage(encoder: SentenceEncoder, rows: Any = ROWS, **options: Any) -> tuple[FractalTrainer, list[Tensor]]:
    """A trainer after the joint stage alone, and the logits that it hands on."""
    trainer = train(Path("unused"), encoder, rows, **options)
    return trainer, trainer.step_logits(trainer.data)


@pytest.mark.parametrize("aggregation", ["min", "max", "mean", "product"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_second_stage_learns_the_pseudo_labels_of_the_first(encoder, tmp_path, kind, aggregation):
    trainer = train(tmp_path, encoder, pseudo_labels=kind, aggregation=aggregation)
    first, logits = first_stage(encoder, aggregation=aggregation)
    rule = posteriors if kind == "soft" else pseudo_labels
    for bag, row, found in zip(first.data.bags, logits, trainer.data.targets["pseudo_labels"], strict=True):
        mask = torch.ones(1, len(row), dtype=torch.bool)
        expected = rule(row[None], torch.tensor([bag.label]), mask, aggregation=aggregation)[0]
        assert torch.allclose(found, expected, atol=1e-6)


def test_the_second_stage_learns_the_pseudo_labels_of_preferences(encoder, tmp_path):
    trainer = train(tmp_path, encoder, [*PAIRS, *ROWS[:4]], pseudo_labels="hard", aggregation="mean")
    first, logits = first_stage(encoder, [*PAIRS, *ROWS[:4]], aggregation="mean")
    for better, worse in (rows for rows in first.data.items if len(rows) == 2):
        assert first.data.bags[better].label == 1.0
        arguments = [x for row in (better, worse) for x in (logits[row][None], torch.ones(1, len(logits[row])).bool())]
        expected = preference_pseudo_labels(*arguments, aggregation="mean")
        for row, labels in zip((better, worse), expected, strict=True):
            assert torch.equal(trainer.data.targets["pseudo_labels"][row], labels[0])


def test_the_second_stage_learns_the_pseudo_labels_of_grades(encoder, tmp_path):
    rows = [{"prompt": f"{i}?", "steps": ["a.", "b."][: 1 + i % 2], "label": i % 4} for i in range(12)]
    options = {"num_grades": 4, "aggregation": "max"}
    trainer = train(tmp_path, encoder, rows, pseudo_labels="hard", **options)
    first, logits = first_stage(encoder, rows, **options)
    for bag, row, found in zip(first.data.bags, logits, trainer.data.targets["pseudo_labels"], strict=True):
        expected = ordinal_pseudo_labels(row[None], torch.tensor([bag.label]), torch.ones(1, len(row)).bool())
        assert torch.equal(found, expected[0])
        assert found.max() == bag.label


def test_pseudo_labels_do_not_depend_on_how_many_are_made_at_once(encoder, monkeypatch):
    trainer, logits = first_stage(encoder, aggregation="mean")
    for kind in ("hard", "soft"):
        trainer.args.pseudo_labels = kind
        whole = step_targets(trainer.data, logits, trainer.args)
        monkeypatch.setattr(stages, "_CHUNK", 3)
        assert all(map(torch.equal, whole, step_targets(trainer.data, logits, trainer.args)))
        monkeypatch.undo()


@pytest.mark.parametrize(("kind", "rule"), [("hard", pseudo_labels), ("soft", posteriors)])
def test_pseudo_labels_of_noisy_labels_take_them_as_evidence(encoder, kind, rule):
    trainer, logits = first_stage(encoder, aggregation="min", missed_bad=0.3)
    trainer.args.pseudo_labels = kind
    logits = [row - 3.0 for row in logits]  # a model that believes in no step
    found = step_targets(trainer.data, logits, trainer.args)
    facts = 0
    for bag, row, labels in zip(trainer.data.bags, logits, found, strict=True):
        arguments = (row[None], torch.tensor([bag.label]), torch.ones(1, len(row)).bool())
        assert torch.equal(labels, rule(*arguments, aggregation="min", label_noise=(0.0, 0.3))[0])
        facts += torch.equal(labels, rule(*arguments, aggregation="min")[0])
    assert facts < len(found)  # the noise says something


def test_noise_of_shares_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`missed_bad` is 0\.1 with `pseudo_labels=hard` under `aggregation=mean`"):
        FractalConfig(output_dir=str(tmp_path), aggregation="mean", missed_bad=0.1, pseudo_labels="hard")


class Starts(TrainerCallback):
    """Remembers the weights at the start of each stage."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in model.named_parameters()})


@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_a_round_starts_fresh_or_goes_on(encoder, tmp_path, start):
    starts = Starts()
    train(tmp_path, encoder, pseudo_labels="soft", pseudo_rounds=2, pseudo_start=start, callbacks=[starts])
    after_joint = weights(first_stage(encoder)[0])
    first, second, third = starts.weights
    assert equal(first, second) == (start == "fresh")
    assert equal(second, after_joint) == (start == "warm")
    assert equal(second, third) == (start == "fresh")


def test_a_warm_start_keeps_the_learned_scale_of_a_likelihood_scorer(tmp_path):
    starts = Starts()
    trainer = FractalTrainer(
        make_model("likelihood", "llama"),
        args=config(tmp_path, scorer="likelihood", pseudo_labels="soft", pseudo_start="warm"),
        train_dataset=ROWS,
        processing_class=byte_tokenizer(),
        callbacks=[starts],
    )
    trainer.train()
    joint = stages.load_file(tmp_path / "stage-joint" / "weights.safetensors")
    assert all(torch.equal(starts.weights[1][name], value) for name, value in joint.items())


def test_rounds_end_when_no_label_changes(encoder, tmp_path, caplog):
    """A model that learns nothing hands on the same labels again."""
    with caplog.at_level("INFO", logger="fractal_rm.reward_training.trainer"):
        trainer = train(
            tmp_path, encoder, pseudo_labels="hard", pseudo_rounds=5, learning_rate=0.0, head_learning_rate=0.0
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage-joint", "stage-pseudo-1"]
    assert "Pseudo-labels did not change: stage-pseudo-2 and later rounds are skipped" in caplog.text
    assert {entry["stage"] for entry in trainer.state.log_history} == {"stage-joint", "stage-pseudo-1"}


def test_the_bag_loss_may_stay_beside_pseudo_labels(encoder, tmp_path):
    trainer = train(tmp_path, encoder, pseudo_labels="hard", pseudo_bag_weight=0.5)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["loss"] == pytest.approx(last["loss/pseudo"] + 0.5 * last["loss/bag"], abs=2e-4)


# Gold labels --------------------------------------------------------------------------------------------------------

BLIND = [
    {},
    {"pseudo_labels": "hard"},
    {"pseudo_labels": "soft", "pseudo_rounds": 2, "pseudo_start": "warm"},
    {"cosine_prior_weight": 0.2, "correlation_prior_weight": 0.1, "teacher_prior_weight": 0.3, "pseudo_labels": "hard"},
    {"gold_selection": "uncertainty", "gold_fraction": 0.1, "pseudo_labels": "hard"},
]


@pytest.mark.parametrize("options", BLIND)
def test_gold_labels_change_nothing_without_an_instance_loss(encoder, tmp_path, options):
    rows = [row | {"teacher_scores": [0.7] * len(row["steps"])} for row in ROWS]
    honest = weights(train(tmp_path / "honest", encoder, rows, **options))
    assert equal(honest, weights(train(tmp_path / "scrambled", encoder, scrambled(rows), **options)))
    bare = [{name: value for name, value in row.items() if name != "step_labels"} for row in rows]
    assert equal(honest, weights(train(tmp_path / "bare", encoder, bare, **options)))


def revealed(trainer: FractalTrainer) -> set[int]:
    return {row for row, labels in enumerate(trainer.data.targets["step_labels"]) if not labels.isnan().all()}


SEEING = [
    GOLD,
    GOLD | {"hybrid_prior_weight": 0.5},
    GOLD | {"gold_selection": "uncertainty"},
    GOLD | {"hybrid_prior_weight": 0.5, "gold_selection": "uncertainty", "pseudo_labels": "soft"},
]


@pytest.mark.parametrize("options", SEEING)
def test_a_gold_fraction_reads_its_share_and_no_other_label(encoder, tmp_path, options):
    trainer = train(tmp_path / "honest", encoder, **options)
    chosen = revealed(trainer)
    assert len(chosen) == 2  # 10 % of 20
    for row in chosen:
        assert trainer.data.targets["step_labels"][row].tolist() == ROWS[row]["step_labels"]
    other = train(tmp_path / "scrambled", encoder, scrambled(ROWS, kept=chosen), **options)
    assert revealed(other) == chosen
    assert equal(weights(trainer), weights(other))
    assert not equal(weights(trainer), weights(train(tmp_path / "all", encoder, scrambled(ROWS), **options)))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.15, 0.3, 0.5, 1.0])
def test_the_share_is_rounded_up_and_counted_among_bags_that_have_gold_labels(encoder, tmp_path, fraction):
    rows = [row if i % 2 else row | {"step_labels": None} for i, row in enumerate(sums(40))]
    trainer = make(tmp_path, encoder, rows, instance_weight=1.0, gold_fraction=fraction)
    expected = {0.01: 1, 0.1: 2, 0.15: 3, 0.3: 6, 0.5: 10, 1.0: 20}[fraction]
    assert len(revealed(trainer)) == expected
    assert all(row % 2 for row in revealed(trainer))


@pytest.mark.parametrize(("fraction", "count"), [(0.07, 100), (0.55, 100), (0.28, 25), (0.1, 30)])
def test_the_rounding_of_floats_reads_no_further_bag(fraction, count):
    """0.07 * 100 is a little more than 7."""
    gold = [torch.ones(1) for _ in range(count)]
    found = revealed_gold(gold, range(count), config(gold_fraction=fraction))
    assert sum(not row.isnan().item() for row in found) == round(fraction * count)


def test_the_seed_decides_which_bags_are_drawn(encoder, tmp_path):
    rows = sums(30)
    drawn = [revealed(make(tmp_path, encoder, rows, seed=seed, **GOLD)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3


@pytest.mark.parametrize("selection", ["random", "uncertainty"])
def test_long_responses_keep_their_label_without_a_look_at_gold_labels_that_are_not_read(tmp_path, selection):
    """Of a response that is cut, a gold label could tell whether the wrong step is still there."""
    found = []
    for rows in (ROWS, scrambled(ROWS)):
        trainer = FractalTrainer(
            make_model("token", "llama"),
            args=config(tmp_path, scorer="token", max_length=30, gold_selection=selection, **GOLD),
            train_dataset=rows,
            processing_class=byte_tokenizer(),
        )
        found.append([(bag.prompt, bag.response, bag.label, bag.id) for bag in trainer.data.bags])
        assert trainer.data.truncation.truncated > 0
        assert all(len(bag.step_labels) == len(bag.step_spans) for bag in trainer.data.bags)
    assert found[0] == found[1]


def test_uncertainty_chooses_the_bags_whose_steps_are_least_sure():
    logits = [torch.tensor([5.0, -5.0]), torch.tensor([0.1]), torch.tensor([1.0, -1.0]), torch.tensor([1e4])]
    assert most_uncertain(logits, None) == [1, 2, 0, 3]
    grades = [torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0]])]
    assert most_uncertain(grades, 3) == [1, 2, 0]


def test_uncertainty_is_that_of_a_model_without_gold_labels(encoder, tmp_path):
    chosen = revealed(train(tmp_path, encoder, **GOLD | {"gold_selection": "uncertainty", "gold_fraction": 0.2}))
    _, logits = first_stage(encoder)
    assert chosen == set(most_uncertain(logits, None)[:4])


def test_the_hybrid_prior_is_what_a_model_of_the_gold_fraction_thinks_of_the_other_bags(encoder, tmp_path):
    trainer = train(tmp_path, encoder, hybrid_prior_weight=0.5, **GOLD)
    chosen = revealed(trainer)
    logits = stages.load_file(tmp_path / "stage-gold" / "step_logits.safetensors")["logits"]
    parts = logits.split([len(bag.step_spans) for bag in trainer.data.bags])
    for row, (target, part) in enumerate(zip(trainer.data.targets["hybrid"], parts, strict=True)):
        assert target.isnan().all() if row in chosen else torch.equal(target, part.sigmoid())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(
        {name for name in entry if name.startswith("loss/")} == {"loss/instance"}
        for entry in entries
        if entry["stage"] == "stage-gold"
    )
    assert "loss/hybrid_prior" in entries[-1]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gold_labels_override_pseudo_labels_and_steer_the_others(encoder, tmp_path, kind):
    rows = [row | {"step_labels": [row["step_labels"][0], *[None] * (len(row["steps"]) - 1)]} for row in ROWS]
    trainer = train(tmp_path, encoder, rows, pseudo_labels=kind, instance_weight=1.0, gold_fraction=0.5)
    for row, found in enumerate(trainer.data.targets["pseudo_labels"]):
        if row in revealed(trainer):
            assert found[0] == rows[row]["step_labels"][0]
        if kind == "hard" and rows[row]["label"] == 0:
            assert found.min() == 0  # the rule holds: gold labels do not contradict response labels here


def test_gold_labels_that_are_not_there_are_asked_for(encoder, tmp_path):
    rows = [{name: row[name] for name in ("prompt", "steps", "label")} for row in ROWS]
    with pytest.raises(ValueError, match="need gold step labels, but the training data has none"):
        make(tmp_path, encoder, rows, instance_weight=1.0)


# Resuming -----------------------------------------------------------------------------------------------------------


class StopAfter(TrainerCallback):
    """Ends the process, as far as a test can, after a number of steps of all stages together."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left <= 0:
            raise KeyboardInterrupt


FULL = GOLD | {
    "gold_selection": "uncertainty",
    "hybrid_prior_weight": 0.5,
    "pseudo_labels": "soft",
    "pseudo_rounds": 2,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(encoder, whole_folder) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and log of a run that nothing stopped."""
    trainer = train(whole_folder, encoder, **FULL)
    return weights(trainer), trainer.state.log_history


def losses(history: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(entry["stage"], entry["loss"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize("steps", range(1, 11))
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(encoder, tmp_path, whole, steps):
    """Stopped inside each of the five stages (odd), and at the end of each before its results are written (even)."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, encoder, callbacks=[StopAfter(steps)], **FULL)
    again = make(tmp_path, encoder, **FULL)
    torch.randn(7)  # another process has another random state
    again.train(resume_from_checkpoint=True)
    assert equal(weights(again), whole[0])
    assert losses(again.state.log_history) == losses(whole[1])


def test_a_run_from_the_start_takes_nothing_over_from_one_that_was_there_before(encoder, tmp_path, whole):
    train(tmp_path, encoder, **FULL | {"seed": 7})  # another run, to its end
    with pytest.raises(ValueError, match=r"belongs to another run: .*`seed` was 7 and is"):
        train(tmp_path, encoder, **FULL)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, encoder, callbacks=[StopAfter(1)], overwrite_output_dir=True, **FULL)
    again = make(tmp_path, encoder, **FULL)
    again.train(resume_from_checkpoint=True)
    assert equal(weights(again), whole[0])


def test_a_single_checkpoint_is_refused_where_there_are_several_stages(encoder, tmp_path):
    trainer = make(tmp_path, encoder, **FULL)
    with pytest.raises(ValueError, match=r"but there are 5 stages, each with its own checkpoints\. Give true"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "stage-joint" / "checkpoint-1"))


@pytest.mark.parametrize("finished", range(1, 6))
def test_a_run_that_is_stopped_between_stages_goes_on(encoder, whole, whole_folder, finished):
    for stage in plan(config(**FULL))[finished:]:  # they are made again
        shutil.rmtree(whole_folder / stage.name)
    again = make(whole_folder, encoder, **FULL)
    result = again.train(resume_from_checkpoint=True)
    assert equal(weights(again), whole[0])
    assert losses(again.state.log_history) == losses(whole[1])
    assert result.global_step == 2
    assert math.isfinite(result.training_loss)


def test_a_new_run_does_not_take_up_stages_of_an_older_one(encoder, tmp_path):
    train(tmp_path, encoder, pseudo_labels="hard", seed=1)
    stopped = make(
        tmp_path,
        encoder,
        pseudo_labels="hard",
        callbacks=[StopAfter(1)],
        save_strategy="steps",
        save_steps=1,
        overwrite_output_dir=True,
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make(tmp_path, encoder, pseudo_labels="hard")
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed), weights(train(tmp_path / "other", encoder, pseudo_labels="hard")))


def test_a_trainer_may_train_twice(encoder, tmp_path):
    trainer = train(tmp_path, encoder, pseudo_labels="hard")
    trainer.train()


# Calibration --------------------------------------------------------------------------------------------------------


def test_the_temperature_is_stored_and_scores_are_divided_by_it(encoder, tmp_path):
    trainer = FractalTrainer(encoder, args=config(tmp_path), train_dataset=ROWS, eval_dataset=sums(20, seed=3))
    trainer.train()
    logits = trainer.step_logits(trainer.eval_dataset)
    pad = torch.nn.utils.rnn.pad_sequence
    labels = torch.tensor([bag.label for bag in trainer.eval_dataset.bags])
    mask = pad([torch.ones(len(row)).bool() for row in logits], batch_first=True)
    expected = fit_temperature(pad(logits, batch_first=True), labels, mask, aggregation="min")
    assert trainer.calibrate() == expected != 1.0
    trainer.save_model()
    loaded = StepRewardModel.from_pretrained(tmp_path)
    assert loaded.settings.temperature == expected
    bags = trainer.eval_dataset.bags
    scored = loaded.score([bag.prompt for bag in bags], [bag.steps for bag in bags])
    for row, result in zip(logits, scored, strict=True):
        assert result.step_scores == pytest.approx((row / expected).sigmoid().tolist(), abs=1e-5)
    assert trainer.calibrate() == expected  # it does not add up


def test_preferences_and_grades_are_not_calibrated(encoder, tmp_path):
    trainer = FractalTrainer(encoder, args=config(tmp_path), train_dataset=PAIRS, eval_dataset=PAIRS)
    assert trainer.calibrate() == 1.0
    rows = [{"prompt": "1?", "steps": ["a."], "label": i % 3} for i in range(6)]
    options = config(tmp_path, num_grades=3, aggregation="max")
    assert FractalTrainer(encoder, args=options, train_dataset=rows, eval_dataset=rows).calibrate() == 1.0


def test_calibration_needs_held_out_data(encoder, tmp_path):
    with pytest.raises(ValueError, match="There is no evaluation data to calibrate on"):
        make(tmp_path, encoder).calibrate()


def test_a_finished_model_has_the_temperature_and_the_threshold_of_the_evaluation_data(encoder, tmp_path):
    held_out, other = sums(20, seed=3), sums(10, seed=4)
    trainer = FractalTrainer(encoder, args=config(tmp_path), train_dataset=ROWS, eval_dataset=held_out)
    trainer.train()
    trainer.evaluate()
    metrics = trainer.finish(other, data="sums")
    trainer.save_model()
    loaded = StepRewardModel.from_pretrained(tmp_path)
    bags = to_bags(held_out, loaded.settings, source="held out")
    threshold = choose_threshold(score_bags(loaded, bags), bags)
    assert loaded.settings.threshold == pytest.approx(threshold, abs=1e-6) != 0.5
    assert loaded.settings.temperature == trainer.calibrate() != 1.0
    assert {split: found["responses"] for split, found in metrics.items()} == {"train": 20, "eval": 20, "test": 10}
    assert metrics["test"]["threshold"] == metrics["eval"]["threshold"] == loaded.settings.threshold
    test_bags = to_bags(other, loaded.settings, source="other")
    assert metrics["test"] == pytest.approx(
        evaluate_scores(score_bags(loaded, test_bags), test_bags, loaded.settings.threshold), abs=1e-5
    )
    card = (tmp_path / "README.md").read_text()
    assert "| data | sums (" in card
    for split, name in (("train", "train_loss"), ("eval", "bag_auc"), ("test", "within_bag_auc")):
        assert f"| {split} | {name} | {metrics[split][name]:.4g} |" in card
    assert "| evaluation |" not in card


def test_gold_step_labels_change_no_temperature_and_no_threshold(encoder, tmp_path):
    found = []
    for held_out in (sums(20, seed=3), scrambled(sums(20, seed=3))):
        trainer = FractalTrainer(encoder, args=config(tmp_path), train_dataset=ROWS, eval_dataset=held_out)
        trainer.finish()
        found.append((trainer.settings.temperature, trainer.settings.threshold))
    assert found[0] == found[1] != (1.0, 0.5)


def test_a_model_without_evaluation_data_is_measured_and_keeps_its_scale(encoder, tmp_path):
    trainer = train(tmp_path, encoder)
    assert trainer.finish(sums(10, seed=4))["test"]["threshold"] == 0.5
    assert trainer.settings.temperature == 1.0
