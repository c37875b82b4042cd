"""A reward model that keeps learning: what from, when an update is taken back, and that a resumed run is the same."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import reward_model
from support.stand_ins import preferences, save_encoder, save_policy, save_reward_model
from transformers import AutoModelForTokenClassification

from fractal_rm import ranges
from fractal_rm.data.bag import Bag
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.online.online_reward import OnlineReward
from fractal_rm.ppo.online.replay import ReplayBuffer, draw, is_held_out, outcome_labels
from fractal_rm.ppo.rollout import RolloutBatch
from fractal_rm.ppo.trainer import StepPPOTrainer
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.scorers.embedding import make_head
from fractal_rm.scorers.sentence_encoder import SentenceEncoder
from fractal_rm.scorers.settings import FractalSettings

# What is kept -------------------------------------------------------------------------------------------------------

prompts = st.one_of(
    st.text(max_size=8), st.builds(lambda text: [{"role": "user", "content": text}], st.text(max_size=8))
)
bags = st.builds(
    lambda prompt, text, label: Bag(prompt, f"x{text}", ((0, 1),), label),
    prompts,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.floats(0, 1),
)


@settings(max_examples=40)
@given(st.lists(bags, max_size=40), st.integers(2, 30), st.floats(0.05, 0.95))
def test_the_buffer_holds_the_latest_of_each_side_and_no_prompt_is_on_both(found, size, share):
    buffer = ReplayBuffer(size, share)
    for start in range(0, len(found), 7):  # in batches or at once
        buffer.add(found[start : start + 7])
    sides = {side: [bag for bag in found if is_held_out(bag.prompt, share) == side] for side in (False, True)}
    for kept, side in ((buffer.learned, False), (buffer.held_out, True)):
        assert list(kept) == sides[side][max(0, len(sides[side]) - (kept.maxlen or 0)) :]
    assert len(buffer.learned) + len(buffer.held_out) <= max(size, 1)
    assert not {json.dumps(b.prompt) for b in buffer.learned} & {json.dumps(b.prompt) for b in buffer.held_out}
    again = ReplayBuffer(size, share)
    again.add(found[:3])
    again.load_jsonl(buffer.to_jsonl())
    assert (again.learned, again.held_out) == (buffer.learned, buffer.held_out)


def test_the_hash_holds_out_about_the_share_that_was_asked_for_and_more_with_a_larger_one():
    small, large = ({i for i in range(2000) if is_held_out(f"problem {i}", share)} for share in (0.2, 0.5))
    assert 350 < len(small) < 450
    assert small < large


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 3))
def test_rows_are_drawn_evenly(count, wanted, seed):
    rows = draw(count, wanted, torch.Generator().manual_seed(seed))
    times = Counter(rows)
    assert len(rows) == wanted
    assert set(rows) <= set(range(count))
    assert max(times.values()) - min(times[row] for row in range(count)) <= 1


@given(
    st.integers(1, 3).flatmap(
        lambda functions: st.tuples(
            st.lists(
                st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=functions, max_size=functions), min_size=1
            ),
            st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=functions, max_size=functions),
        )
    )
)
def test_a_label_is_the_weighted_mean_of_the_outcomes_that_were_judged(case):
    rows, weights = case
    rewards = torch.tensor([[torch.nan if x is None else x for x in row] for row in rows], dtype=torch.float64)
    labels = outcome_labels(rewards, torch.tensor(weights, dtype=torch.float64))
    for label, row in zip(labels.tolist(), rows, strict=True):
        said = [(w, x) for w, x in zip(weights, row, strict=True) if x is not None and w]
        expected = sum(w * x for w, x in said) / sum(w for w, _ in said) if said else float("nan")
        assert label == pytest.approx(expected, nan_ok=True)


def test_an_outcome_that_is_no_label_is_named():
    rewards = torch.tensor([[0.5, 7.0], [0.0, 3.0]])
    assert outcome_labels(rewards, torch.tensor([1.0, 0.0])).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match=r"`reward_funcs\[1\]` gave completion 0 7, outside \[0, 1\]"):
        outcome_labels(rewards, torch.tensor([1.0, 1.0]))


# Updates --------------------------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([1.0, 0.0])  # of the outcome, and of the reward model itself


def make(model: StepRewardModel, folder: Path, original: Any = None, **options: Any) -> tuple[OnlineReward, list]:
    """An online reward without a trainer, and what it logs."""
    logged: list[tuple[str, float]] = []
    defaults = {"rm_update_every": 1, "rm_learning_rate": 3e-3, "rm_update_steps": 30, "rm_batch_size": 16}
    args = StepPPOConfig(str(folder), use_cpu=True, bf16=False, **(defaults | options))
    online = OnlineReward(model, args, original, WEIGHTS, Accelerator(cpu=True))
    take = online.take
    online.take = lambda batch, scored: logged.extend(take(batch, scored).items())  # type: ignore[method-assign]
    return online, logged


def batch(prompts: list[str], rewards: torch.Tensor) -> RolloutBatch:
    """What the online reward reads of a rollout."""
    nothing = torch.zeros(len(prompts), 0)
    return RolloutBatch(
        prompts=prompts,
        completion_ids=[[] for _ in prompts],
        texts=[""] * len(prompts),
        function_rewards=rewards,
        function_weights=WEIGHTS,
        is_outcome=WEIGHTS > 0,
        scores={},
        tokens={},
        mask=nothing.bool(),
        outcome_advantages=nothing.sum(dim=1),
    )


def responses(count: int, start: int = 0) -> list[dict[str, Any]]:
    """A response is good if none of its lines is `zz.`; both kinds occur."""
    rows = []
    for number in range(start, start + count):
        lines = ["aa.", "zz." if number % 2 else "aa.", "bb."]
        text = "\n".join(lines[(number // 2) % 2 :])
        rows.append({"prompt": f"Question {number}?\n", "completion": text, "label": float("zz" not in text)})
    return rows


def feed(online: OnlineReward, rows: list[dict[str, Any]], *, flip_learned: bool = False) -> None:
    """Hand rows over as a rollout, the labels that are learned from turned round if so wished."""
    texts, questions = [row["completion"] for row in rows], [row["prompt"] for row in rows]
    labels = [
        1 - row["label"] if flip_learned and not is_held_out(row["prompt"], online.args.rm_holdout_share)
        else row["label"]
        for row in rows
    ]  # fmt: skip
    rewards = torch.tensor([[label, 0.5] for label in labels])
    scored = online.reward_model.score(questions, texts, progress=False)
    online.take(batch(questions, rewards), scored)


def bits(online: OnlineReward) -> list[torch.Tensor]:
    """Weights and optimizer, for comparison."""
    weights, optimizer = online.learner.snapshot()
    states = [tensor for state in optimizer["state"].values() for tensor in state.values()]
    return [*weights.values(), *states]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _learned(rows: list[dict[str, Any]], online: OnlineReward) -> list[Bag]:
    """The rows that updates may learn from, as bags."""
    cut = online.reward_model.segmentation
    return [
        Bag(row["prompt"], row["completion"], tuple(cut(row["completion"])), row["label"])
        for row in rows
        if not is_held_out(row["prompt"], online.args.rm_holdout_share)
    ]


def token_model(**settings: Any) -> StepRewardModel:
    return reward_model("token", "llama", **settings)


def embedding_model(folder: Path) -> StepRewardModel:
    encoder = SentenceEncoder(save_encoder(folder), cache_dir="")
    return StepRewardModel(make_head("set", encoder.size, 1).eval(), encoder, FractalSettings(scorer="embedding"))


@pytest.mark.parametrize("scorer", ["token", "likelihood", "embedding"])
def test_an_update_learns_what_outcomes_say_and_is_kept(tmp_path, scorer):
    model = embedding_model(tmp_path) if scorer == "embedding" else reward_model(scorer, "llama")
    online, logged = make(model, tmp_path, rm_learning_rate=3e-4 if scorer == "embedding" else 3e-3)
    feed(online, responses(160))
    seen = dict(logged)
    assert seen["rm_update/kept"] == 1.0
    assert seen["rm_update/bag_auc_after"] > max(0.9, seen["rm_update/bag_auc_before"])
    assert not model.scorer.training
    assert (online.counters.batches, online.counters.kept, online.counters.rolled_back) == (1, 1, 0)


def test_an_update_allows_for_the_wrong_labels_that_training_allowed_for(tmp_path):
    noise = {"missed_good": 0.1, "missed_bad": 0.2}
    trained = FractalConfig(str(tmp_path), use_cpu=True, bf16=False, **noise).settings()
    model = reward_model("likelihood", "llama", **{name: getattr(trained, name) for name in noise})
    online, _ = make(model, tmp_path, rm_learning_rate=1e-9)
    data = online.learner.encode(_learned(responses(40), online), "rows")
    items = [data[i] for i in range(len(data))]
    logits, batch = online.learner._logits(items)
    expected, plain = (
        bag_loss(logits, batch["bag_labels"], batch["mask"], aggregation=trained.aggregation, label_noise=rates).mean()
        for rates in ((0.1, 0.2), (0.0, 0.0))
    )
    assert online.learner.learn([items]) == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected.item() - plain.item()) > 1e-3


def test_an_update_with_wrong_outcomes_is_taken_back_to_the_last_bit(tmp_path):
    online, logged = make(token_model(), tmp_path)
    feed(online, responses(160))
    before, scores = bits(online), online.reward_model.score(["q\n"], ["aa.\nzz."])
    feed(online, responses(480, start=160), flip_learned=True)
    assert [value for name, value in logged if name == "rm_update/kept"] == [1.0, 0.0]
    assert [value for name, value in logged if name.endswith("auc_after")][-1] < 0.5
    assert equal(bits(online), before)
    assert online.reward_model.score(["q\n"], ["aa.\nzz."]) == scores
    assert (online.counters.kept, online.counters.rolled_back) == (1, 1)


def test_an_update_that_diverges_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.delitem(ranges.RANGES, "rm_learning_rate")  # which refuses such a rate
    online, logged = make(token_model(), tmp_path, rm_learning_rate=1e30)
    before = bits(online)
    feed(online, responses(160))
    assert ("rm_update/kept", 0.0) in logged
    assert equal(bits(online), before)


def test_global_random_numbers_are_left_alone_and_dropout_is_repeatable(tmp_path):
    found = []
    for seed in (1, 2):
        online, _ = make(reward_model("likelihood", "gpt2"), tmp_path)  # with dropout
        online.learner.bag_auc = lambda data: 0.5  # type: ignore[method-assign]  # so that every update is kept
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        feed(online, responses(160))
        assert online.counters.kept == 1
        assert torch.equal(torch.get_rng_state(), state)
        found.append(bits(online))
    assert equal(*found)


def test_updates_come_every_n_batches(tmp_path):
    online, logged = make(token_model(), tmp_path, rm_update_every=3, rm_update_steps=1)
    seen = []
    for start in range(0, 700, 100):
        feed(online, responses(100, start=start))
        seen.append(sum(name == "rm_update/loss" for name, _ in logged))
    assert seen == [0, 0, 1, 1, 1, 2, 2]


def test_without_both_kinds_of_held_out_responses_nothing_is_learned_and_the_skip_is_counted(tmp_path):
    online, logged = make(token_model(), tmp_path)
    before = bits(online)
    for start in (0, 200):
        feed(online, [row for row in responses(200, start=start) if row["label"]])
    assert equal(bits(online), before)
    assert logged == [("rm_update/skipped", 1), ("rm_update/skipped", 2)]


def test_what_nobody_judged_and_what_has_no_steps_is_left_out(tmp_path):
    online, _ = make(token_model(max_length=40), tmp_path, rm_update_every=9)
    texts = ["aa.", "aa.", "  \n", "aa.\n" + 60 * "b"]
    scored = online.reward_model.score(["q\n"] * 4, texts, progress=False)
    rewards = torch.tensor([[1.0, 0.5], [torch.nan, 0.5], [0.0, torch.nan], [0.0, 0.5]])
    online.take(batch(["q\n"] * 4, rewards), scored)
    kept = [*online.replay.learned, *online.replay.held_out]
    assert [(bag.response, bag.label) for bag in kept] == [("aa.", 1.0)]


def test_a_batch_has_its_share_of_original_responses_and_none_that_is_held_out(tmp_path):
    online, _ = make(
        token_model(), tmp_path, responses(90, start=5000), rm_original_share=0.25, rm_update_steps=7, rm_update_every=9
    )
    feed(online, responses(100))
    drawn: list[Any] = []
    online.learner.learn = lambda batches: drawn.extend(batches) or 0.5  # type: ignore[method-assign]
    online.update()
    originals = {tuple(bag.input_ids) for bag in online.original.encoded}  # type: ignore[union-attr]
    assert len(drawn) == 7
    for items in drawn:
        assert len(items) == 16
        assert sum(tuple(item["encoded"][0].input_ids) in originals for item in items) == 4
    apart = {b.prompt for b in online.original.bags}, {b.prompt for b in online.original_held_out.bags}  # type: ignore[union-attr]
    assert all(apart)
    assert not apart[0] & apart[1]


def test_a_batch_has_room_for_a_rollout_whatever_the_share_of_original_responses(tmp_path):
    online, _ = make(token_model(), tmp_path, responses(90, start=5000), rm_original_share=0.99, rm_update_every=9)
    feed(online, responses(100))
    originals = {tuple(bag.input_ids) for bag in online.original.encoded}  # type: ignore[union-attr]
    for items in online._batches(torch.Generator().manual_seed(0)):
        assert sum(tuple(item["encoded"][0].input_ids) in originals for item in items) == len(items) - 1


@pytest.mark.parametrize(("share", "kept"), [(0.1, 1.0), (0.9, 0.0)])
def test_forgetting_the_original_responses_counts_by_their_share(tmp_path, share, kept):
    # Rollouts and original data contradict each other: what is good in one is bad in the other.
    contrary = [row | {"label": 1 - row["label"]} for row in responses(160, start=5000)]
    online, logged = make(token_model(), tmp_path, contrary, rm_original_share=share)
    rollouts = responses(160)
    before = online.learner.bag_auc(online.original_held_out)  # type: ignore[arg-type]
    rows = online.learner.encode([bag for bag in _learned(rollouts, online)][:96], "rollouts")
    items = [rows[i] for i in range(96)]
    online._batches = lambda generator: [items[i::6] for i in (0, 1, 2, 3, 4, 5)] * 2  # type: ignore[method-assign]
    feed(online, rollouts)
    seen = dict(logged)
    assert seen["rm_update/bag_auc_after"] > seen["rm_update/bag_auc_before"]
    assert seen["rm_update/original_bag_auc_after"] < seen["rm_update/original_bag_auc_before"] == before
    assert seen["rm_update/kept"] == kept


# In the trainer -------------------------------------------------------------------------------------------------------


def even_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """An outcome that both kinds of completions occur for."""
    return [float(len(set(ids)) % 2) for ids in completion_ids]


def trainer(folder: Path, models: tuple[str, str], **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 32,
        "num_generations": 2,
        "advantage": "group",
        "max_completion_length": 12,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "rm_update_every": 2,
        "rm_update_steps": 2,
        "rm_learning_rate": 1e-3,
        "rm_holdout_share": 0.5,
        "rm_replay_size": 120,
        "normalize_step_rewards": True,
    }
    constructor: dict[str, Any] = {"reward_model": models[1], "reward_funcs": even_length}
    for name, value in changed.items():
        (settings if name in StepPPOConfig.__dataclass_fields__ else constructor)[name] = value
    problems = Dataset.from_dict({"prompt": [f"Problem {i}?\n" for i in range(96)]})
    return StepPPOTrainer(models[0], args=StepPPOConfig(**settings), train_dataset=problems, **constructor)


def rows_of(trained: Any, *, part: str = "") -> list[dict[str, Any]]:
    timed = ("time", "runtime", "per_second")
    return [
        {k: v for k, v in row.items() if part in k and not k.endswith(timed)} for row in trained.state.log_history[:-1]
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_policy(folder / "policy"), save_reward_model(folder / "rm", scorer="token")


# What a run is, beside its optimizer: weights, statistics, what the reward model has seen.
STATE = (
    "model.safetensors",
    "step_ppo_state.json",
    "reward_model/model.safetensors",
    "online_reward/optimizer.safetensors",
    "online_reward/replay.jsonl",
)
ORIGINAL = {"reward_model_dataset": responses(60)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models) -> Any:
    trained = trainer(tmp_path_factory.mktemp("finished"), models, **ORIGINAL)
    trained.train()
    return trained


def test_a_resumed_run_learns_on_to_the_last_bit(tmp_path, models, finished):
    resumed = trainer(tmp_path, models, **ORIGINAL)
    resumed.train(resume_from_checkpoint=str(Path(finished.args.output_dir) / "checkpoint-3"))
    whole = Path(finished.args.output_dir)
    for file in STATE:
        assert (tmp_path / "checkpoint-6" / file).read_bytes() == (whole / "checkpoint-6" / file).read_bytes(), file
    assert rows_of(resumed, part="rm_update") == rows_of(finished, part="rm_update")
    assert sum("rm_update/kept" in row for row in rows_of(finished)) == 3
    moved = Path("checkpoint-3/reward_model/model.safetensors"), Path("checkpoint-6/reward_model/model.safetensors")
    assert (whole / moved[0]).read_bytes() != (whole / moved[1]).read_bytes()


def test_the_learned_model_is_saved_beside_the_policy_as_an_ordinary_folder(tmp_path, finished):
    finished.save_model(str(tmp_path / "final"))
    folder = tmp_path / "final" / "reward_model"
    saved = AutoModelForTokenClassification.from_pretrained(folder)
    learned = finished.online_reward.reward_model
    assert all(torch.equal(value, learned.scorer.base.state_dict()[name]) for name, value in saved.state_dict().items())
    text = ["1 + 1 = 2.\nSo 2."]
    assert StepRewardModel.from_pretrained(folder).score(["q\n"], text) == learned.score(["q\n"], text)
    assert not (tmp_path / "final" / "online_reward").exists(), "rollouts belong to checkpoints"


def test_a_model_that_only_watches_changes_nothing(tmp_path, models):
    runs = []
    for every in (0, 1000):
        runs.append(trainer(tmp_path / str(every), models, rm_update_every=every, max_steps=3))
        runs[-1].train()
    assert rows_of(runs[0]) == rows_of(runs[1])
    assert len(runs[1].online_reward.replay.learned) > 0
    assert not (tmp_path / "0" / "checkpoint-3" / "reward_model").exists()


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_a_rollout_that_a_rollback_throws_away_is_not_learned_from(tmp_path, models):
    written = 0

    def numbered(prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Completions that say which rollout they are of; those of 4 and 5 repeat themselves."""
        nonlocal written
        text = f"Rollout {written}.\n" * 6 if written in (4, 5) else f"Rollout {written}.\nDone."
        written += 1
        tokenizer = trainer.processing_class
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [ids for _ in prompts],
            "logprobs": [[0.0] * len(ids) for _ in prompts],
        }

    saving = {"on_alarm": "rollback", "save_steps": 2, "guard_reference_batches": 2, "guard_patience": 2}
    watching = trainer(
        tmp_path,
        models,
        rollout_func=numbered,
        rm_update_every=1000,
        rm_replay_size=1000,
        max_completion_length=128,
        max_steps=8,
        **saving,
    )
    watching.train()
    replay = watching.online_reward.replay
    kept = {bag.response.partition(".")[0] for side in (replay.learned, replay.held_out) for bag in side}
    assert written == 9, "one rollout was thrown away"
    assert kept == {f"Rollout {number}" for number in range(9) if number != 5}


def test_evaluation_is_not_learned_from(tmp_path, models):
    watching = trainer(
        tmp_path, models, rm_update_every=1000, max_steps=1, per_device_eval_batch_size=4, save_strategy="no"
    )
    watching.evaluate(Dataset.from_dict({"prompt": ["Problem?\n"] * 4}))
    assert watching.online_reward.counters.batches == 0


def test_a_checkpoint_of_a_frozen_reward_model_is_refused(tmp_path, models):
    trainer(tmp_path / "a", models, rm_update_every=0, max_steps=3).train()
    online = trainer(tmp_path / "b", models)
    with pytest.raises(ValueError, match=r"belongs to another run: .*`rm_update_every` was 0 and is"):
        online.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"reward_funcs": None}, r"learns from outcomes, and there are no `reward_funcs` with a weight above 0"),
        ({"reward_weights": [0.0]}, r"there are no `reward_funcs` with a weight above 0"),
        ({"reward_weights": [-1.0]}, r"weights must not be negative"),
        ({"reward_model": None, "advantage": "gae"}, r"`rm_update_every` needs a `reward_model` to update"),
        ({"rm_update_every": 0, **ORIGINAL}, r"`reward_model_dataset` needs `rm_update_every`, which is 0"),
        ({"reward_model_dataset": responses(1)}, r"of 1 responses \d are held out; some must be held out, but not all"),
        ({"reward_model_dataset": preferences(4)}, r"row 1: a preference cannot be mixed with outcomes"),
        ({"rm_update_every": -1}, r"`rm_update_every` is -1\. Give a whole number from 0"),
        ({"rm_learning_rate": 0.0}, r"`rm_learning_rate` is 0\.0\. Give a number above 0"),
        ({"rm_update_steps": 0}, r"`rm_update_steps` is 0\. Give a whole number from 1"),
        ({"rm_holdout_share": 1.0}, r"`rm_holdout_share` is 1\.0\. Give a number above 0, up to below 1"),
        ({"rm_original_share": 1.0}, r"`rm_original_share` is 1\.0\. Give a number from 0 to below 1"),
        ({"rm_replay_size": 1}, r"`rm_replay_size` is 1: too small for both training"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_training(tmp_path, models, changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, models, **changed)


def test_a_reward_model_that_cannot_learn_from_outcomes_is_refused(tmp_path):
    graded = token_model(num_grades=4, aggregation="max", model_options={"num_labels": 4})
    with pytest.raises(ValueError, match=r"but the reward model scores grades\. Set `rm_update_every=0`"):
        make(graded, tmp_path)
    frozen = token_model()
    frozen.scorer.requires_grad_(False)
    with pytest.raises(ValueError, match=r"All weights of the reward model are frozen"):
        make(frozen, tmp_path)


def test_the_reward_model_is_not_written_over(tmp_path, models):
    folder = save_reward_model(tmp_path / "reward_model", scorer="token")
    with pytest.raises(ValueError, match=r"over the one it starts from, .*reward_model\. Choose another `output_dir`"):
        trainer(tmp_path, (models[0], folder))


def test_an_outcome_outside_0_and_1_stops_the_first_rollout(tmp_path, models):
    wrong = trainer(tmp_path, models, reward_funcs=lambda completion_ids, **_: [2.0] * len(completion_ids))
    with pytest.raises(ValueError, match=r"`reward_funcs\[0\]` gave completion 0 2, outside \[0, 1\]"):
        wrong.train()
