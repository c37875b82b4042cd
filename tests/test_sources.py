"""Several sources of step rewards: reward models, functions of one's own, their weights, and what each of them sees."""

import json
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.documents import REPOSITORY, blocks
from support.models import reward_model as random_model
from support.stand_ins import save_policy, save_reward_model
from support.step_ppo import (
    AB,
    COMPLETIONS,
    NEWLINE,
    RAGGED,
    SCORES,
    TOKEN_REWARDS,
    A,
    B,
    C,
    count_of_a,
    last_log,
    make,
    measured,
    placed,
    policy_tokenizer,
    replay,
    reward_model,
    rollout,
    same,
    train,
    weights,
)

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.sources import FunctionSource, make_sources

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


def letters(steps: list[list[str]], **_: Any) -> list[list[float]]:
    """What the reward model of the tests says: the score of a step's last letter."""
    return [[SCORES[step[-1]] for step in row] for row in steps]


def lengths(steps: list[list[str]], **_: Any) -> list[list[float]]:
    """Scores that are no probabilities."""
    return [[10.0 * len(step) - 3.0 for step in row] for row in steps]


def other_model() -> Any:
    """Another tokenizer, another scorer, steps that end elsewhere."""
    return random_model("token", "gpt2", segmentation=Segmentation("pattern", pattern="(?<=b)"))


def source(function: Any, *, bounded_by: str | None = None) -> FunctionSource:
    name = getattr(function, "__name__", "own")
    return FunctionSource(name, 1.0, function, Segmentation(), bounded_by=bounded_by)


# Sums -----------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"shaping": "raw", **TOKEN_REWARDS},
    {"normalize_step_rewards": True, "step_reward_clip": 1.5, **TOKEN_REWARDS},
    {"advantage": "group", "num_generations": 4, "step_gamma": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["raw", "normalized", "group"])
def test_several_sources_add_up_with_their_weights_each_shaped_and_placed_by_itself(tmp_path, options):
    shared = {"rollout_func": replay(RAGGED), **options}
    first, second = reward_model(), other_model()
    alone = [
        rollout(tmp_path, reward_model=first, **shared)["advantages"],
        rollout(tmp_path, reward_model=second, **shared)["advantages"],
        rollout(tmp_path, step_reward_funcs=lengths, **shared)["advantages"],
    ]
    together = rollout(
        tmp_path,
        reward_model=[first, second],
        step_reward_funcs=[lengths],
        step_reward_weights=[0.5, 2.0, -0.1],
        **shared,
    )
    assert all(one.abs().sum() > 0.1 for one in alone)
    expected = 0.5 * alone[0] + 2.0 * alone[1] - 0.1 * alone[2]
    torch.testing.assert_close(together["advantages"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=["raw", "normalized", "group"])
def test_a_function_that_says_what_a_reward_model_says_is_worth_the_same(tmp_path, options):
    shared = {"rollout_func": replay(RAGGED), **options}
    model = rollout(tmp_path, reward_model=reward_model(), **shared)
    function = rollout(tmp_path, step_reward_funcs=letters, **shared)
    torch.testing.assert_close(function["advantages"], model["advantages"], atol=1e-5, rtol=1e-5)
    ours, theirs = (measured(output["trainer"]) for output in (function, model))
    for name in ("steps/score", "steps/per_response", "placement/unplaced_steps"):
        assert ours[name] == pytest.approx(theirs[name])


def test_a_source_of_weight_0_changes_no_bit_of_a_training(tmp_path):
    shared = {"reward_funcs": count_of_a, "normalize_step_rewards": True, "max_steps": 2}
    alone = train(tmp_path / "a", reward_model=reward_model(), **shared)
    beside = train(
        tmp_path / "b", reward_model=[reward_model(), other_model()], step_reward_weights=[1.0, 0.0], **shared
    )
    assert same(weights(alone.model), weights(beside.model))
    assert same(weights(alone.value_model), weights(beside.value_model))


def test_outcomes_keep_their_weights_and_functions_their_names(tmp_path):
    output = rollout(
        tmp_path,
        reward_model=[reward_model(), reward_model()],
        step_reward_funcs=[letters, count_of_a_step],
        reward_funcs=[count_of_a, letters_of_outcome],
        reward_weights=[2.0, 3.0],
        rollout_func=replay(RAGGED),
        **TOKEN_REWARDS | {"step_weight": 0.0},
    )
    trainer = output["trainer"]
    assert trainer.args.reward_weights == [2.0, 3.0, 0.0, 0.0, 0.0, 0.0]
    expected = torch.zeros(8, 8)
    for row, ids in enumerate(RAGGED):
        expected[row, len(ids) - 1] = 2.0 * count_of_a([list(ids)])[0] + 3.0 * len(ids)
    torch.testing.assert_close(output["advantages"], expected)
    names = ["step_reward_model_1", "step_reward_model_2", "letters_1", "count_of_a_step"]
    assert [source.name for source in trainer.sources] == names
    logged = measured(trainer)
    assert all(f"rewards/{name}/mean" in logged and f"step_rewards/{name}/std" in logged for name in names)
    assert set(trainer._logs["rewards"]) == {"count_of_a", "letters", *names}


def count_of_a_step(steps: list[list[str]], **_: Any) -> list[list[float]]:
    return [[float(step.count("a")) for step in row] for row in steps]


def letters_of_outcome(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


letters_of_outcome.__name__ = "letters"  # as a source is called


def test_what_no_outcome_judges_stays_unjudged_beside_several_sources(tmp_path):
    def judged(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if i in (0, 5) else 1.0 + i for i in range(len(completion_ids))]

    shared = {"reward_funcs": judged, "rollout_func": replay(RAGGED), "advantage": "group", "num_generations": 4}
    plain = rollout(tmp_path, **shared)
    dense = rollout(tmp_path, reward_model=reward_model(), step_reward_funcs=lengths, step_weight=0.0, **shared)
    torch.testing.assert_close(dense["advantages"], plain["advantages"])
    outcomes = [measured(dense["trainer"])[f"guards/{name}"] for name in ("outcome", "score_outcome_gap")]
    assert all(math.isnan(value) for (value,) in outcomes), "outcomes above 1, and no source among them"
    assert last_correlation(dense) == pytest.approx(expected_correlation(), abs=1e-6)


def last_correlation(output: dict[str, Any]) -> float:
    return measured(output["trainer"])["guards/score_outcome_correlation"][-1]


def expected_correlation() -> float:
    """Between the reward model's scores and the outcomes, where there are both."""
    steps = [list(found.values()) for found in COMPLETIONS.values()]
    pairs = [(min(SCORES[letter] for letter in row), 1.0 + i) for i, row in enumerate(steps) if row and i not in (0, 5)]
    return float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1])


def test_running_moments_are_those_of_each_source_and_are_resumed_by_name(tmp_path):
    shared = {"reward_model": reward_model(), "normalize_step_rewards": True, "num_generations": 1}
    trainer = train(tmp_path, step_reward_funcs=lengths, save_strategy="steps", save_steps=1, max_steps=1, **shared)
    file = tmp_path / "checkpoint-1" / "step_ppo_state.json"
    saved = json.loads(file.read_text())["step_rewards"]
    moments = trainer.shaper.moments
    assert saved == {name: moments[name].state_dict() for name in ("step_reward_model", "lengths")}
    assert moments["lengths"].std > 3 * moments["step_reward_model"].std
    resumed = make(tmp_path / "b", step_reward_funcs=lengths, **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.shaper.moments["lengths"].count > moments["lengths"].count
    other = make(tmp_path / "c", step_reward_funcs=letters, **shared)
    with pytest.raises(ValueError, match=r"another run: .*`rewards` was \['step_reward_model', 'lengths'\] and is"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# What a function sees -------------------------------------------------------------------------------------------------


def test_a_function_gets_prompts_completions_steps_and_columns_and_a_completion_may_have_no_opinion(tmp_path):
    seen: dict[str, Any] = {}

    def own(prompts: list[str], completions: list[str], steps: list[list[str]], difficulty: list[int], **rest: Any):
        seen.update(rest, prompts=prompts, completions=completions, steps=steps, difficulty=difficulty)
        return [None if level else [1.0] * len(row) for level, row in zip(difficulty, steps, strict=True)]

    data = Dataset.from_dict({"prompt": ["q", "qa", "qab b", "qc"] * 8, "difficulty": [0, 0, 1, 1] * 8})
    output = rollout(
        tmp_path,
        step_reward_funcs=own,
        train_dataset=data,
        rollout_func=replay(RAGGED),
        shaping="raw",
        **TOKEN_REWARDS,
    )
    assert seen["prompts"][:2] == ["q", "qa"]
    assert seen["difficulty"] == [0, 0, 1, 1] * 2
    assert seen["steps"][:4] == [["a", "b"], ["ab", "ac"], ["é", "c"], []]
    assert seen["completion_ids"] == [list(ids) for ids in RAGGED]
    assert "trainer_state" in seen
    expected = placed(lambda scores: [1.0] * len(scores))
    expected[[2, 3, 6, 7]] = 0.0
    torch.testing.assert_close(output["advantages"], expected)


def test_a_step_without_an_opinion_is_as_if_it_were_not_there(tmp_path):
    def own(steps: list[list[str]], **_: Any) -> list[list[float | None]]:
        return [[None if step[-1] == "b" else SCORES[step[-1]] for step in row] for row in steps]

    for options in ({"shaping": "centered", "center": "batch"}, {"shaping": "delta"}):
        output = rollout(tmp_path, step_reward_funcs=own, rollout_func=replay(RAGGED), **options, **TOKEN_REWARDS)[
            "advantages"
        ]
        kept = {row: {t: x for t, x in steps.items() if x != "b"} for row, steps in enumerate(COMPLETIONS.values())}
        every = [SCORES[letter] for steps in kept.values() for letter in steps.values()]
        expected = torch.zeros(8, 8)
        for row, steps in kept.items():
            before = 0.5
            for token, letter in steps.items():
                baseline = before if options["shaping"] == "delta" else sum(every) / len(every)
                expected[row, token] = SCORES[letter] - baseline
                before = SCORES[letter]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0.0)


def test_functions_cut_as_they_are_told_or_as_the_first_reward_model_or_by_lines(tmp_path):
    def cut(**options: Any) -> list[list[str]]:
        models = options.pop("models", [])
        args = StepPPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
        made = make_sources(models, [lambda steps, **_: [[1.0] * len(row) for row in steps]], args)[-1]
        return [[step.text for step in row.steps] for row in made(["q"], ["a\nbab"], {})]

    assert cut() == [["a", "bab"]]
    assert cut(models=[other_model()]) == [["a\nb", "ab"]]
    assert cut(models=[other_model()], step_segmentation="separator", step_separator="a") == [["b", "b"]]


def test_an_asynchronous_function_is_awaited(tmp_path):
    async def own(**given: Any) -> list[list[float]]:
        return letters(**given)

    shared = {"rollout_func": replay(RAGGED), **TOKEN_REWARDS}
    sync = rollout(tmp_path, step_reward_funcs=letters, **shared)
    later = rollout(tmp_path, step_reward_funcs=own, **shared)
    assert torch.equal(sync["advantages"], later["advantages"])


def test_arrays_and_tensors_are_scores_too():
    for kind in (torch.tensor, tuple, lambda row: torch.tensor(row).numpy()):
        made = source(lambda steps, kind=kind, **_: [kind([0.25] * len(row)) for row in steps])
        (scored,) = made(["q"], ["a\nb"], {})
        assert scored.score == 0.25
        assert scored.step_scores == [0.25, 0.25]


def test_the_guards_watch_steps_of_a_function_and_take_no_score_of_it_for_a_probability(tmp_path):
    output = rollout(tmp_path, step_reward_funcs=lengths, reward_funcs=count_of_a, rollout_func=replay(RAGGED))
    trainer = output["trainer"]
    logged = measured(trainer)
    assert logged["guards/steps_per_response"] == [12 / 8]
    assert math.isnan(logged["guards/steps_at_ceiling"][0])
    assert math.isnan(logged["guards/score_outcome_correlation"][0])
    together = {"reward_model": other_model(), "step_reward_funcs": lengths}
    both = measured(rollout(tmp_path, rollout_func=replay(RAGGED), **together)["trainer"])
    assert both["guards/steps_at_ceiling"][0] <= 1.0
    assert both["guards/steps_per_response"] == both["steps/per_response"] != [12 / 8]


# Chats, several turns, tools ------------------------------------------------------------------------------------------


def test_a_chat_with_a_system_message_and_several_turns_goes_through(tmp_path):
    learned = reward_model(chat=True)
    learned.settings.chat = True
    system = {"role": "system", "content": "b"}
    chats = [
        [system, {"role": "user", "content": "q"}],
        [
            system,
            {"role": "user", "content": "qa"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q"},
        ],
    ]
    seen = []

    def own(prompts: list[Any], steps: list[list[str]], completions: list[Any], **_: Any) -> list[list[float]]:
        seen.extend(prompts)
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [[0.5] * len(row) for row in steps]

    trainer = train(
        tmp_path,
        train_dataset=Dataset.from_dict({"prompt": chats * 8}),
        processing_class=policy_tokenizer(chat=True),
        reward_model=learned,
        step_reward_funcs=own,
        max_steps=1,
    )
    assert {len(prompt) for prompt in seen} == {2, 4}
    assert all(prompt[0] == system for prompt in seen)
    assert last_log(trainer, "placement/unplaced_steps") == 0
    assert last_log(trainer, "rewards/step_reward_model/mean") > 0
    (scored,) = learned.score([chats[1]], ["a\nb"])
    assert scored.step_scores == pytest.approx([SCORES["a"], SCORES["b"]], abs=1e-4)


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_no_source_rewards_a_token_that_the_policy_did_not_write(tmp_path, advantage):
    own = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]])
    ids = [(A, NEWLINE, C, NEWLINE, B), (B, C, A, NEWLINE, AB)]
    extra = {"lam": 0.0, "gamma": 0.0, "whiten_advantages": False} if advantage == "gae" else {}
    output = rollout(
        tmp_path,
        reward_model=[reward_model(), other_model()],
        step_reward_funcs=lengths,
        rollout_func=replay(ids, env_mask=own.tolist()),
        per_device_train_batch_size=2,
        advantage=advantage,
        shaping="raw",
        **extra,
    )
    assert (output["tool_mask"] == own).all()
    assert (output["advantages"][own == 0] == 0).all()
    assert (output["advantages"][own == 1] != 0).any()
    assert measured(output["trainer"])["placement/unplaced_steps"] == [0.0]
    texts = [[step.text for step in one.steps] for one in output["trainer"].last_rollout.watched]
    assert texts == [["a", "b"], ["b", "a", "ab"]]


# Wrong answers of functions -------------------------------------------------------------------------------------------

ROW = r"row 1 \(prompt 'qa', completion 'a\\nb'\)"


@pytest.mark.parametrize(
    ("returned", "error", "sentence"),
    [
        (None, TypeError, r"`own` returned a NoneType\. Return a list with an entry for each completion"),
        ([[]], ValueError, r"`own` returned 1 entries for 2 completions\. Return one list of step scores"),
        ([[], 0.5], TypeError, rf"`own` gave {ROW} a float\. Return a list with a score for each step"),
        ([[], torch.tensor(0.5)], TypeError, rf"`own` gave {ROW} a Tensor\. Return a list with a score"),
        ([[], "ab"], TypeError, rf"`own` gave {ROW} a str\. Return a list with a score for each step"),
        ([[], [0.5]], ValueError, rf"`own` gave {ROW} 1 scores for 2 steps\. Return one score for each of `steps`"),
        ([[], [0.5, "x"]], TypeError, rf"`own` gave step 2 of {ROW} a str\. Return a number, or None"),
        ([[], [0.5, math.nan]], ValueError, rf"`own` gave step 2 of {ROW} the score nan\. Return a finite number"),
        ([None, [-math.inf, 0.5]], ValueError, rf"`own` gave step 1 of {ROW} the score -inf\. Return a finite"),
        ([[], [0.5, 1.5]], ValueError, rf"`own` gave step 2 of {ROW} the score 1\.5, and `shaping='log_odds'` needs"),
    ],
)
def test_what_a_function_returns_is_checked_and_the_row_named(returned, error, sentence):
    def own(**_: Any) -> Any:
        return returned

    with pytest.raises(error, match=sentence) as caught:
        source(own, bounded_by="log_odds")(["q", "qa"], ["", "a\nb"], {})
    assert "\n" not in str(caught.value)


def test_other_shapings_take_scores_of_any_scale(tmp_path):
    for shaping in ("raw", "centered", "delta", "min_form"):
        options = {"rollout_func": replay(RAGGED), "shaping": shaping, "step_lam": 1.0, "num_generations": 1}
        assert rollout(tmp_path, step_reward_funcs=lengths, **options)["advantages"].isfinite().all()
    for shaping in ("log_odds", "first_mistake"):
        sentence = rf"`lengths` gave step 1 of row 0 .* the score 7, and `shaping='{shaping}'` needs probabilities"
        with pytest.raises(ValueError, match=sentence):
            rollout(tmp_path, step_reward_funcs=lengths, rollout_func=replay(RAGGED), shaping=shaping)


# The page that describes it -------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (REPOSITORY / "docs" / "step_ppo.md").read_text(encoding="utf-8")
    (example,) = blocks(page.partition("## Several rewards, and your own\n")[2].partition("\n## ")[0], "python")
    assert 'output_dir="out"' in example
    save_policy(tmp_path / "policy")
    for name in ("rm", "other_rm"):
        save_reward_model(tmp_path / name)
    tiny = {"per_device_train_batch_size": 8, "max_steps": 1, "max_completion_length": 8, "num_generations": 1}
    given = {
        "prompts": Dataset.from_dict({"prompt": ["q", "qa"] * 8, "budget": [None, 5] * 8}),
        "tiny": tiny | {"use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1, "report_to": "none"},
    }
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace('output_dir="out"', 'output_dir="out", **tiny'), "example", "exec"), given)
    names = ["step_reward_model_1", "step_reward_model_2", "brevity"]
    assert [source.name for source in given["trainer"].sources] == names
    assert all(f"step_rewards/{name}/std" in given["trainer"].state.log_history[0] for name in names)
