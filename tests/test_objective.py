"""Which loss terms a stage has, what each is computed from, and how they add up in a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from support.models import sums
from support.stand_ins import save_encoder
from torch import Tensor

from fractal_rm.objectives.bag_loss import bag_loss, easyllp_loss, instance_loss
from fractal_rm.objectives.grades import expected_grades, ordinal_bag_loss, ordinal_instance_loss
from fractal_rm.objectives.preferences import preference_loss
from fractal_rm.objectives.priors import correlation_prior, teacher_prior
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.objective import STEP_PRIORS, loss_terms, term_weights
from fractal_rm.reward_training.trainer import FractalTrainer
from fractal_rm.scorers.sentence_encoder import SentenceEncoder

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
UNLABELLED = torch.tensor([-1, -1, -1, -1])
PREFERENCES = torch.tensor([-1, 1, 0, -1])  # the second response is better than the third
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}


def config(folder: Path = Path("unused"), **options: Any) -> FractalConfig:
    return FractalConfig(output_dir=str(folder), **QUIET | options)


def batch(*, chosen: Tensor = UNLABELLED, grades: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Random logits, and a batch with every target."""
    logits = torch.randn(4, 3) if grades is None else torch.randn(4, 3, grades)
    highest = (grades or 2) - 1
    shape, nan = (4, 3), torch.nan
    known: dict[str, Tensor] = {name: torch.rand(shape) for name in STEP_PRIORS}
    known |= {name: torch.randint(highest + 1, shape).float() for name in ("step_labels", "pseudo_labels")}
    known["step_labels"][0, 1] = nan
    found = {name: values.masked_fill(~MASK, nan) for name, values in known.items()}
    labels = torch.randint(highest + 1, (4,)).float()
    found |= {"mask": MASK, "bag_labels": labels, "chosen": chosen, "correlation": torch.rand(4, 3, 3)}
    return logits, found


def terms(logits: Tensor, found: dict[str, Tensor], names: set[str], **options: Any) -> dict[str, Tensor]:
    return loss_terms(logits, found, names, config(**options), base_rate=0.25)


def expected(name: str, logits: Tensor, found: dict[str, Tensor]) -> Tensor:
    labels = found["bag_labels"]
    if name == "bag":
        return bag_loss(logits, labels, MASK, aggregation="min")
    if name == "easyllp":
        return easyllp_loss(logits, labels, MASK, base_rate=0.25)
    if name in ("instance", "pseudo"):
        return instance_loss(logits, found["step_labels" if name == "instance" else "pseudo_labels"], MASK)
    if name == "correlation_prior":
        return correlation_prior(logits, found["correlation"], MASK)
    return teacher_prior(logits, found[name.removesuffix("_prior")], MASK)


NAMES = ("bag", "easyllp", "instance", "pseudo", "correlation_prior", *(f"{name}_prior" for name in STEP_PRIORS))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_brings_exactly_its_own_term(name):
    logits, found = batch()
    (value,) = terms(logits, found, {name}).items()
    assert value[0] == name
    assert torch.equal(value[1], expected(name, logits, found))
    assert value[1].shape == (4,)


def test_names_that_are_not_asked_for_are_not_computed():
    logits, found = batch()
    assert terms(logits, found, set()) == {}
    assert set(terms(logits, found, set(NAMES) | {"preference"})) == set(NAMES)


def test_a_term_without_its_target_is_left_out():
    logits, found = batch()
    bare = {name: found[name] for name in ("mask", "bag_labels", "chosen")}
    assert set(terms(logits, bare, set(NAMES))) == {"bag", "easyllp"}


@pytest.mark.parametrize("form", ["bradley_terry", "ratio"])
def test_preferences_and_labels_share_a_batch(form):
    logits, found = batch(chosen=PREFERENCES)
    options = {"preference_loss": form, "aggregation": "mean"}
    values = terms(logits, found, {"bag", "preference", "easyllp"}, **options)
    better, worse, single = [1], [2], [0, 3]
    labels = found["bag_labels"]
    assert torch.equal(
        values["preference"],
        preference_loss(logits[better], MASK[better], logits[worse], MASK[worse], form=form, aggregation="mean"),
    )
    assert torch.equal(values["bag"], bag_loss(logits[single], labels[single], MASK[single], aggregation="mean"))
    assert torch.equal(values["easyllp"], easyllp_loss(logits[single], labels[single], MASK[single], base_rate=0.25))


def test_a_batch_of_preferences_alone_has_no_loss_of_labels():
    logits, found = batch(chosen=torch.tensor([1, 0, 1, 0]))
    values = terms(logits, found, {"bag", "preference", "easyllp"})
    assert set(values) == {"preference"}
    assert values["preference"].shape == (2,)


def test_the_bag_loss_has_its_options():
    logits, found = batch()
    options = {"aggregation": "lse_min", "sharpness": 3.0, "missed_good": 0.1, "missed_bad": 0.2}
    value = bag_loss(logits, found["bag_labels"], MASK, aggregation="lse_min", sharpness=3.0, label_noise=(0.1, 0.2))
    assert torch.equal(terms(logits, found, {"bag"}, **options)["bag"], value)
    assert not torch.equal(value, bag_loss(logits, found["bag_labels"], MASK, aggregation="lse_min", sharpness=3.0))


def test_the_distance_of_priors_is_an_option_of_all_but_the_correlation_prior():
    logits, found = batch()
    values = terms(logits, found, set(NAMES), prior_distance="absolute")
    for name in STEP_PRIORS:
        assert torch.equal(values[f"{name}_prior"], teacher_prior(logits, found[name], MASK, distance="absolute"))
    assert torch.equal(values["correlation_prior"], correlation_prior(logits, found["correlation"], MASK))


def test_grades_have_losses_of_their_own_and_priors_on_their_expectation():
    logits, found = batch(grades=4)
    names = {"bag", "instance", "pseudo", "teacher_prior", "correlation_prior"}
    values = terms(logits, found, names, num_grades=4, aggregation="max", scorer="token")
    assert torch.equal(values["bag"], ordinal_bag_loss(logits, found["bag_labels"], MASK))
    assert torch.equal(values["instance"], ordinal_instance_loss(logits, found["step_labels"], MASK))
    assert torch.equal(values["pseudo"], ordinal_instance_loss(logits, found["pseudo_labels"], MASK))
    share = torch.logit(expected_grades(logits) / 3)
    assert torch.allclose(values["teacher_prior"], teacher_prior(share, found["teacher"], MASK), atol=1e-5)
    assert torch.allclose(values["correlation_prior"], correlation_prior(share, found["correlation"], MASK), atol=1e-5)


@pytest.mark.parametrize("grades", [None, 4])
@pytest.mark.parametrize("size", [1.0, 50.0, 1e4])
def test_gradients_are_finite_and_padding_has_none(grades, size):
    logits, found = batch(grades=grades, chosen=UNLABELLED if grades else PREFERENCES)
    logits = (size * logits).requires_grad_()
    options = {} if grades is None else {"num_grades": 4, "aggregation": "max", "scorer": "token"}
    names = set(NAMES) - ({"easyllp"} if grades else set()) | {"preference"}
    sum(term.sum() for term in terms(logits, found, names, **options).values()).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~MASK] == 0).all()
    scrambled = logits.detach().clone()
    scrambled[~MASK] = 1e4
    noisy = found | {
        name: x.masked_fill(~MASK, 0.5) for name, x in found.items() if x.shape == MASK.shape and name != "mask"
    }
    for name, value in terms(scrambled, noisy, names, **options).items():
        assert torch.equal(value, terms(logits.detach(), found, names, **options)[name]), name


# Weights ------------------------------------------------------------------------------------------------------------


def test_without_options_there_is_the_bag_loss_and_nothing_else():
    assert term_weights(config(), "joint") == {"bag": 1.0, "preference": 1.0}


def test_each_option_weighs_its_own_term():
    names = ("easyllp", "instance", *(f"{name}_prior" for name in (*STEP_PRIORS, "correlation")))
    options = {f"{name}_weight": (i + 1) / 10 for i, name in enumerate(names)}
    weights = term_weights(config(bag_weight=3.0, **options), "joint")
    assert weights == {"bag": 3.0, "preference": 3.0} | {name: options[f"{name}_weight"] for name in names}


def test_the_gold_stage_learns_gold_alone_and_the_pseudo_stage_pseudo_labels():
    args = config(
        instance_weight=0.5, teacher_prior_weight=1.0, hybrid_prior_weight=1.0, pseudo_labels="hard", bag_weight=2.0
    )
    assert term_weights(args, "gold") == {"instance": 1.0}
    assert term_weights(args, "pseudo") == {"pseudo": 1.0}
    args.pseudo_bag_weight = 0.3
    assert term_weights(args, "pseudo") == {"pseudo": 1.0, "bag": 0.3, "preference": 0.3}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_priors_that_decay_end_at_nothing_and_labels_keep_their_weight(schedule):
    args = config(teacher_prior_weight=0.4, correlation_prior_weight=0.2, instance_weight=0.5, prior_schedule=schedule)
    course = [term_weights(args, "joint", progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert course[0] == term_weights(
        config(teacher_prior_weight=0.4, correlation_prior_weight=0.2, instance_weight=0.5), "joint", 0.5
    )
    values = [weights.get("teacher_prior", 0.0) for weights in course]
    assert values == sorted(values, reverse=True)
    assert values[2] == pytest.approx(0.2)
    assert course[-1] == {"bag": 1.0, "preference": 1.0, "instance": 0.5}


# In a training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> SentenceEncoder:
    return SentenceEncoder(save_encoder(tmp_path_factory.mktemp("encoder")), cache_dir="")


ROWS = [row | {"teacher_scores": [0.9] * len(row["steps"])} for row in sums(16)]
PAIRS = [{"prompt": f"{i}?", "chosen": [f"{i}.", "good."], "rejected": [f"{i}.", "zzz."]} for i in range(8)]


def train(folder: Path, encoder: SentenceEncoder, rows: Any = ROWS, **options: Any) -> FractalTrainer:
    defaults = {"scorer": "embedding", "max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 16}
    trainer = FractalTrainer(encoder, args=config(folder, **defaults | options), train_dataset=rows)
    trainer.train()
    return trainer


def same_weights(a: FractalTrainer, b: FractalTrainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.scorer.parameters(), b.scorer.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_loss_is_the_weighted_sum_of_the_terms_in_the_log(encoder, tmp_path, schedule):
    options = {
        "bag_weight": 0.7,
        "cosine_prior_weight": 0.3,
        "correlation_prior_weight": 0.1,
        "teacher_prior_weight": 0.2,
        "instance_weight": 0.5,
    }
    trainer = train(tmp_path, encoder, prior_schedule=schedule, **options)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        weights = term_weights(trainer.args, "joint", (entry["step"] - 1) / 4)
        found = {name.removeprefix("loss/"): entry[name] for name in entry if name.startswith("loss/")}
        assert found.keys() == weights.keys() - {"preference"}
        assert entry["loss"] == pytest.approx(sum(weights[name] * found[name] for name in found), abs=2e-4)


@pytest.mark.parametrize("name", ["cosine", "negated_cosine", "correlation", "teacher"])
def test_a_prior_changes_the_run_and_weight_0_does_not(encoder, tmp_path, name):
    bare = [{key: value for key, value in row.items() if key != "teacher_scores"} for row in ROWS]
    plain = train(tmp_path, encoder, bare)
    assert same_weights(plain, train(tmp_path, encoder, **{f"{name}_prior_weight": 0.0, "prior_schedule": "linear"}))
    assert not same_weights(plain, train(tmp_path, encoder, **{f"{name}_prior_weight": 0.5}))


def test_label_noise_changes_the_run(encoder, tmp_path):
    plain = train(tmp_path, encoder)
    assert same_weights(plain, train(tmp_path, encoder, missed_good=0.0, missed_bad=0.0))
    assert not same_weights(plain, train(tmp_path, encoder, missed_bad=0.2))


@pytest.mark.parametrize("form", ["bradley_terry", "ratio"])
def test_preferences_are_learned_in_both_forms(encoder, tmp_path, form):
    trainer = train(tmp_path, encoder, PAIRS, preference_loss=form, aggregation="mean", max_steps=60)
    losses = [entry["loss/preference"] for entry in trainer.state.log_history if "loss/preference" in entry]
    assert not any("loss/bag" in entry for entry in trainer.state.log_history)
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate(PAIRS)["eval_pair_accuracy"] == 1.0


def test_every_pair_and_every_label_is_evaluated_whatever_the_batches(encoder, tmp_path):
    rows = [*PAIRS[:3], *ROWS[:4], *PAIRS[3:], *ROWS[4:9]]
    found = []
    for size in (1, 3, 5, 64):
        trainer = train(tmp_path, encoder, rows, per_device_eval_batch_size=size, aggregation="mean", max_steps=1)
        found.append(trainer.evaluate(rows))
    model = trainer.reward_model()
    score = {
        key: model.score([row["prompt"] for row in PAIRS], [row[key] for row in PAIRS])
        for key in PAIRS[0]
        if key != "prompt"
    }
    pairs = zip(score["chosen"], score["rejected"], strict=True)
    right = sum(better.score > worse.score for better, worse in pairs) / len(PAIRS)
    gold = [label for row in ROWS[:9] for label in row["step_labels"]]
    steps = [s for row in ROWS[:9] for s in model.score([row["prompt"]], [row["steps"]])[0].step_scores]
    for metrics in found:
        assert metrics["eval_pair_accuracy"] == right
        assert metrics["eval_step_auc"] == pytest.approx(roc_auc_score(gold, steps), abs=1e-6)
        assert metrics["eval_bag_auc"] == pytest.approx(found[0]["eval_bag_auc"], abs=1e-6)


def test_pairs_and_labels_train_together(encoder, tmp_path):
    trainer = train(tmp_path, encoder, [*PAIRS, *ROWS], per_device_train_batch_size=24)
    assert len(trainer.train_dataset) == 24
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["loss/bag"] + entry["loss/preference"], abs=2e-4)
    found = trainer.evaluate([*PAIRS, *ROWS])
    assert 0 <= found["eval_pair_accuracy"] <= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cosine_prior_weight": -0.1}, "`cosine_prior_weight` is -0.1"),
        ({"missed_good": 0.5, "missed_bad": 0.5}, "sum to less than 1"),
        ({"gold_fraction": 1.5}, "`gold_fraction` is 1.5"),
        ({"hybrid_prior_weight": 0.1}, "`hybrid_prior_weight` needs gold step labels"),
        ({"hybrid_prior_weight": 0.1, "instance_weight": 1.0, "gold_fraction": 0.0}, "needs gold step labels"),
        ({"pseudo_labels": "hard", "pseudo_rounds": 0}, "`pseudo_rounds` is 0"),
        ({"num_grades": 4}, "`num_grades` is 4 with the likelihood scorer"),
        ({"num_grades": 4, "scorer": "token"}, "`num_grades` is 4 with `aggregation=min`"),
        ({"num_grades": 4, "scorer": "token", "aggregation": "max", "easyllp_weight": 1.0}, "`easyllp_weight`"),
        ({"num_grades": 4, "scorer": "token", "aggregation": "max", "missed_bad": 0.1}, "`missed_bad`"),
        ({"sharpness": 0.0}, "`sharpness` is 0.0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**options)


def test_preferences_of_grades_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"train data: preferences say nothing about grades\. Leave `num_grades` out"):
        train(tmp_path, encoder, PAIRS, num_grades=4, aggregation="max")


def test_the_loss_of_an_evaluation_has_the_weights_of_training_and_knows_no_prior(encoder, tmp_path):
    trainer = train(tmp_path, encoder, bag_weight=0.3, teacher_prior_weight=0.5)
    found = trainer.evaluate(ROWS)
    assert found["eval_loss"] == pytest.approx(0.3 * trainer.state.log_history[-1]["eval_loss/bag"], abs=1e-5)
    assert not any("prior" in name for name in trainer.state.log_history[-1])
