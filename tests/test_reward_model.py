"""`StepRewardModel.score` and `FractalReward`: what a caller gives and gets."""

import logging
import math
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from support.models import byte_tokenizer, make_model, reward_model
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from fractal_rm.credit.advantages import GROUP_EPSILON
from fractal_rm.data.bag import Step, StepScores
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.score_rows import score_rows
from fractal_rm.reward_model import FractalReward, StepRewardModel, probabilities
from fractal_rm.scorers.settings import FractalSettings

PROMPT = "What is 3+4?\n"
SCALES = ("probability", "log")
RESPONSE = "3+4=7.\n  so 12.\n\n✓ done.\n"


@pytest.fixture(scope="module")
def model() -> StepRewardModel:
    return reward_model("likelihood", "llama")


def test_steps_say_where_they_stand_and_what_they_are(model):
    scored = model.score([PROMPT], [RESPONSE])[0]
    assert scored.response == RESPONSE
    assert [step.text for step in scored.steps] == ["3+4=7.", "so 12.", "✓ done."]
    assert [RESPONSE[start:end] for start, end in scored.spans] == [step.text for step in scored.steps]
    assert all(0 < score < 1 for score in scored.step_scores)
    assert (scored.truncated_steps, scored.error) == (0, None)


@pytest.mark.parametrize(
    ("aggregation", "formula"), [("min", np.min), ("max", np.max), ("mean", np.mean), ("product", np.prod)]
)
def test_the_response_score_aggregates_the_step_scores(aggregation, formula):
    model = reward_model("token", "llama", aggregation=aggregation)
    for scored in model.score([PROMPT] * 2, [RESPONSE, "one step"]):
        assert scored.score == pytest.approx(formula(scored.step_scores), abs=1e-5)


def test_temperature_divides_the_logits():
    cold, warm = (reward_model("token", "llama", temperature=t).score([PROMPT], [RESPONSE])[0] for t in (1.0, 2.0))
    for a, b in zip(cold.step_scores, warm.step_scores, strict=True):
        assert math.log(b / (1 - b)) == pytest.approx(math.log(a / (1 - a)) / 2, abs=1e-4)


@pytest.mark.parametrize("aggregation", ["min", "product"])
def test_the_response_score_aggregates_the_divided_logits(aggregation):
    logits, mask = torch.tensor([[-1.0, 2.0, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
    settings = [FractalSettings(scorer="token", aggregation=aggregation, temperature=t) for t in (2.0, 1.0)]
    (_, warm), (_, divided) = (probabilities(x, mask, s) for x, s in zip((logits, logits / 2), settings, strict=True))
    assert warm.item() == pytest.approx(divided.item(), abs=1e-6)


def test_grades_are_scored_as_shares_of_the_highest():
    """By enumeration of the grades of two steps."""
    settings = FractalSettings(scorer="token", num_grades=3, aggregation="max", temperature=2.0)
    logits = torch.randn(1, 3, 3)
    steps, responses = probabilities(logits, torch.tensor([[True, True, False]]), settings)
    first, second = (logits[0, :2] / 2.0).softmax(dim=1).tolist()
    expected = [sum(grade * p for grade, p in enumerate(row)) / 2 for row in (first, second)]
    assert steps[0, :2].tolist() == pytest.approx(expected, abs=1e-6)
    highest = sum(max(a, b) * p * q for a, p in enumerate(first) for b, q in enumerate(second)) / 2
    assert responses.tolist() == pytest.approx([highest], abs=1e-6)


@pytest.mark.parametrize("sharpness", [1.0, 20.0])
def test_the_sharpness_of_an_aggregation_is_that_of_the_settings(sharpness):
    settings = FractalSettings(scorer="token", aggregation="softmin", sharpness=sharpness)
    logits, mask = torch.tensor([[-1.0, 2.0, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
    _, (found,) = probabilities(logits, mask, settings)
    weights = [math.exp(-sharpness * logit) for logit in (-1.0, 2.0, 0.5)]
    logit = sum(weight * x for weight, x in zip(weights, (-1.0, 2.0, 0.5), strict=True)) / sum(weights)
    assert found.item() == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)


def test_results_come_in_the_order_of_the_responses(model):
    responses = ["a much longer first response.\nwith two steps.", "b", "c is\nin the middle"]
    scored = model.score([PROMPT] * 3, responses, batch_size=2)
    assert [result.response for result in scored] == responses
    assert scored == [model.score([PROMPT], [response])[0] for response in responses]


def test_steps_may_come_already_cut(model):
    text, cut = model.score([PROMPT] * 2, ["3+4=7.\nso 12.", ["3+4=7.", "so 12."]])
    assert text == cut
    given = reward_model("likelihood", "llama", segmentation=Segmentation("given"))
    assert given.score([PROMPT], [["3+4=7.", "so 12."]])[0].step_scores == text.step_scores
    with pytest.raises(ValueError, match="Segmentation 'given' cannot cut a text"):
        given.score([PROMPT], ["3+4=7."])


def test_spans_that_are_known_are_not_looked_for(model):
    scored = model.score([PROMPT], ["3+4=7. so 12."], spans=[[(0, 6), (7, 13)]])[0]
    assert [step.text for step in scored.steps] == ["3+4=7.", "so 12."]
    assert model.score([PROMPT], ["3+4=7. so 12."])[0].spans == [(0, 13)]


BAD = [
    ("", PROMPT, "the response is empty"),
    (" \n\t\n", PROMPT, "the response is empty"),
    ("half \ud83d a pair", PROMPT, "the response holds half of a surrogate pair"),
    (None, PROMPT, "the response is None"),
    (7, PROMPT, "the response is 7 (int), not text"),
    ([], PROMPT, "there are no steps"),
    (["one", " "], PROMPT, "step 2 is blank"),
    (["one", 2], PROMPT, "step 2 is int, not text"),
    ("fine.", None, "the prompt is NoneType"),
    ("fine.", "half \ud83d", "the prompt holds half of a surrogate pair"),
    ("fine.", [], "the prompt is a chat without messages"),
    ("fine.", [{"role": "user"}], "message 1 of the prompt is not a message"),
]


@pytest.mark.parametrize(("response", "prompt", "reason"), BAD)
def test_a_bad_response_is_reported_and_the_others_are_scored(model, caplog, response, prompt, reason):
    with caplog.at_level(logging.WARNING):
        before, bad, after = model.score([PROMPT, prompt, PROMPT], [RESPONSE, response, "so 12."])
    assert before == model.score([PROMPT], [RESPONSE])[0]
    assert after == model.score([PROMPT], ["so 12."])[0]
    assert bad.steps == []
    assert math.isnan(bad.score)
    assert bad.error.startswith(f"row 1: {reason}")
    assert [record.getMessage() for record in caplog.records] == [f"Not scored: 1 of 3 responses. First: {bad.error}"]


def test_a_batch_of_bad_responses_only_is_reported_whole(model):
    assert all(result.error for result in model.score([PROMPT] * 2, ["", " "]))
    assert model.score([], []) == []


@pytest.mark.parametrize(
    ("prompts", "responses", "spans"),
    [(["?"], [], None), ([], ["a"], None), (["?"], ["a"], []), (["?"], ["a"], [[], []])],
)
def test_prompts_responses_and_spans_must_be_as_many(model, prompts, responses, spans):
    with pytest.raises(ValueError, match="Give one prompt per response"):
        model.score(prompts, responses, spans=spans)


def test_spans_outside_the_response_are_that_rows_error(model):
    assert "leave the response of 2 characters" in model.score(["?"], ["ab"], spans=[[(0, 3)]])[0].error


def test_steps_beyond_max_length_are_counted_and_logged(caplog):
    tokenizer = byte_tokenizer()
    whole = reward_model("token", "llama", tokenizer).score([PROMPT], ["one.\ntwo.\nthree."])[0]
    short = reward_model("token", "llama", tokenizer, max_length=len(PROMPT) + len("one.\ntwo."))
    with caplog.at_level(logging.WARNING):
        cut, fits, hopeless, many = short.score(
            [PROMPT] * 4, ["one.\ntwo.\nthree.", "one.", "a first step that is too long", "1\n2\n3\n4"]
        )
    assert cut.step_scores == pytest.approx(whole.step_scores[:2], abs=1e-6)
    assert len(many.steps) == 4  # in the same batch: its steps are not those of the others
    assert cut.score == pytest.approx(min(cut.step_scores))
    assert (cut.truncated_steps, fits.truncated_steps) == (1, 0)
    assert hopeless.error == "row 2: the prompt and the first step exceed `max_length` (22 tokens)."
    messages = [record.getMessage() for record in caplog.records]
    assert "1 of 4 responses are longer than `max_length`: their last steps are unscored." in messages


def test_chats_go_through_the_chat_template():
    model = reward_model("token", "llama", byte_tokenizer(chat=True))
    chat = [{"role": "user", "content": "What is 3+4?"}]
    as_chat, as_text = model.score([chat, "<user>What is 3+4?\n<assistant>"], [RESPONSE] * 2)
    assert as_chat == as_text


def test_a_chat_that_the_template_refuses_stops_no_other_row():
    tokenizer = byte_tokenizer(chat=True)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    model = reward_model("token", "llama", tokenizer, chat=True)
    chat = [{"role": "user", "content": "What is 3+4?"}]
    good, bad = model.score([chat, [{"role": "system", "content": "x"}, *chat]], [RESPONSE] * 2)
    assert good == model.score([chat], [RESPONSE])[0]
    assert bad.error == "row 1: The chat template refuses this chat (no system). Change its messages."


def test_chats_without_a_chat_template_are_named(model):
    with pytest.raises(ValueError, match=r"The prompts are chats, but the tokenizer .* has no chat template"):
        model.score([PROMPT, [{"role": "user", "content": "3+4?"}]], [RESPONSE] * 2)


CHAT = [{"role": "user", "content": "What is 3+4?"}]


@pytest.mark.parametrize(
    ("trained_on_chats", "known", "other", "sentence"),
    [
        (False, PROMPT, CHAT, r"row 1: the prompt is a chat, .* trained on prompts that are texts\. Give .* as texts"),
        (True, CHAT, PROMPT, r"row 1: the prompt is a text, .* trained on prompts that are chats\. Give .* as chats"),
    ],
)
def test_a_model_refuses_the_kind_of_prompt_that_it_has_not_learned_from(trained_on_chats, known, other, sentence):
    model = reward_model("token", "llama", byte_tokenizer(chat=True), chat=trained_on_chats)
    unknowing = reward_model("token", "llama", byte_tokenizer(chat=True))
    assert model.score([known], [RESPONSE]) == unknowing.score([known], [RESPONSE])
    assert all(scored.error is None for scored in unknowing.score([known, other], [RESPONSE] * 2))
    with pytest.raises(ValueError, match=sentence):
        model.score([known, other], [RESPONSE] * 2)
    with pytest.raises(ValueError, match=sentence):
        FractalReward(model)(prompts=[known, other], completions=[RESPONSE] * 2)


def test_a_prompt_that_is_neither_text_nor_chat_stays_an_error_of_its_row():
    for chat in (True, False):
        model = reward_model("token", "llama", byte_tokenizer(chat=True), chat=chat)
        assert model.score([None], [RESPONSE])[0].error.startswith("row 0: the prompt is NoneType")  # type: ignore[union-attr,list-item]


@pytest.mark.parametrize(("batches", "progress", "shown"), [(2, None, False), (3, None, True), (3, False, False)])
def test_a_bar_is_shown_for_long_work_only(model, capsys, monkeypatch, batches, progress, shown):
    monkeypatch.setattr("fractal_rm.reward_model._BATCHES_WORTH_A_BAR", 3)
    model.score([PROMPT] * batches, ["so 12."] * batches, batch_size=1, progress=progress)
    assert ("Scoring" in capsys.readouterr().out) is shown


def test_scoring_is_without_dropout_and_leaves_training_as_it_was():
    model = reward_model("token", "gpt2")
    expected = model.score([PROMPT], [RESPONSE])
    model.scorer.train()
    assert model.score([PROMPT], [RESPONSE]) == expected
    assert model.scorer.training
    assert model.scorer.base.training


# As a reward of TRL ------------------------------------------------------------------------------------------------


def test_one_text_in_place_of_a_list_is_refused(model):
    with pytest.raises(TypeError, match=r"`prompts` is a str\. Give a list"):
        model.score("1+1?", ["2", "3", "4", "5"])
    with pytest.raises(TypeError, match=r"`responses` is a str\. Give a list"):
        model.score(["a", "b"], "23")
    with pytest.raises(TypeError, match=r"`prompts` is a DataFrame\. Give a list"):
        model.score(pandas.DataFrame({"prompt": ["1+1?"]}), ["2"])
    given = (one for one in ["1+1?\n"])
    assert model.score(given, ["2"]) == model.score(["1+1?\n"], ["2"])


def test_scores_that_are_nan_are_an_error_of_their_row():
    broken = reward_model("token", "llama")
    with torch.no_grad():
        next(broken.scorer.parameters()).fill_(math.nan)
    [record] = score_rows(broken, [{"prompt": "?", "response": "a"}], source="rows.jsonl")
    assert record["error"].startswith("rows.jsonl, row 1: the model gives scores that are NaN")
    assert record["steps"] == []


def test_a_reward_is_the_response_score_and_none_where_there_is_none(model, tmp_path):
    model.save_pretrained(tmp_path / "rm")
    expected = model.score([PROMPT], [RESPONSE])[0].score
    for reward in (FractalReward(model), FractalReward(tmp_path / "rm"), FractalReward(str(tmp_path / "rm"))):
        assert reward.__name__ == "fractal_reward"
        assert reward(prompts=[PROMPT] * 2, completions=[RESPONSE, ""], completion_ids=[[1], []]) == [expected, None]


def test_a_reward_reads_chats_of_one_message():
    reward = FractalReward(reward_model("token", "llama", byte_tokenizer(chat=True)))
    chat = [{"role": "user", "content": "What is 3+4?"}]
    text = "<user>What is 3+4?\n<assistant>"
    assert reward([chat], [[{"role": "assistant", "content": RESPONSE}]]) == reward([text], [RESPONSE])


class Scores(StepRewardModel):
    """A model in which a response is a list of logits, one a step, as text."""

    def __init__(self, **settings: Any) -> None:
        self.settings = FractalSettings(**settings)

    def score(self, prompts: Any, responses: Any, **kwargs: Any) -> list[StepScores]:
        rows = [[float(logit) for logit in text.split()] for text in responses]
        found = []
        for row in rows:
            step_probs, bag = probabilities(torch.tensor([row]), torch.ones(1, len(row)).bool(), self.settings)
            steps = [Step("", 0, 1, score) for score in step_probs[0].tolist()]
            found.append(StepScores("", steps, bag.item()))
        return found


def long_responses(steps: int, mean: float, groups: int = 50) -> tuple[list[str], list[str]]:
    """Groups of 8 responses of so many steps, whose P(good) varies around a mean."""
    torch.manual_seed(0)
    spread = torch.distributions.Beta(mean * 20, (1 - mean) * 20).sample((groups * 8, steps)).logit()
    return [""] * len(spread), [" ".join(f"{logit:.4f}" for logit in row) for row in spread.tolist()]


def group_advantages(rewards: list[float]) -> torch.Tensor:
    """Advantages of GRPO in groups of 8."""
    grouped = torch.tensor(rewards).view(-1, 8)
    return (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + GROUP_EPSILON)


def test_a_product_of_many_steps_leaves_no_advantage_and_its_logarithm_does():
    prompts, completions = long_responses(150, 0.88)
    sizes = {}
    for aggregation, scale in (("product", "probability"), ("product", "log"), ("min", "probability"), ("min", "log")):
        rewards = FractalReward(Scores(aggregation=aggregation), scale=scale)(prompts, completions)
        sizes[aggregation, scale] = group_advantages(rewards).abs().mean().item()  # type: ignore[arg-type]
    assert sizes.pop(("product", "probability")) < 0.05
    assert all(0.65 < size < 0.85 for size in sizes.values()), sizes
    # Seven steps, and the product does as well.
    short = FractalReward(Scores(aggregation="product"))(*long_responses(7, 0.88))
    assert group_advantages(short).abs().mean() > 0.65  # type: ignore[arg-type]


def test_the_logarithm_orders_responses_as_the_product_does_and_outlives_it():
    prompts, completions = long_responses(12, 0.8)
    plain, logs = (FractalReward(Scores(aggregation="product"), scale=s)(prompts, completions) for s in SCALES)
    assert [math.exp(x) for x in logs] == pytest.approx(plain, rel=1e-4)  # type: ignore[arg-type]
    endless = FractalReward(Scores(aggregation="product"), scale="log")([""], ["-2 " * 1000])[0]
    assert endless == pytest.approx(-1000 * math.log1p(math.exp(2)), rel=1e-5)
    assert Scores(aggregation="product").score([""], ["-2 " * 1000])[0].score == 0.0
    assert math.isfinite(FractalReward(Scores(aggregation="min"), scale="log")([""], ["-200"])[0])  # type: ignore[arg-type]


def test_a_product_that_comes_to_nothing_is_said_once_with_its_numbers(caplog):
    reward = FractalReward(Scores(aggregation="product"))
    reward([""] * 3, ["2 2", "2 2", " ".join(["2"] * 149)])
    assert not caplog.messages, "most responses are short"
    for _ in range(2):
        reward([""] * 3, ["2 " * 149, "2 2", "2 " * 151])
    (said,) = caplog.messages
    assert "149 or more steps, and half of the steps a score of 0.88 or more" in said
    assert f"is about {torch.tensor(2.0).sigmoid().item() ** 149:.1e}" in said
    assert "scale='log'" in said
    FractalReward(Scores(aggregation="product"), scale="log")([""], ["2 " * 150])
    FractalReward(Scores(aggregation="min"))([""], ["2 " * 150])
    assert len(caplog.messages) == 1


def test_a_scale_that_is_unknown_or_does_not_suit_is_refused():
    with pytest.raises(ValueError, match=r"Unknown scale 'logits'\. Choose probability or log"):
        FractalReward(Scores(), scale="logits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores grades"):
        FractalReward(Scores(scorer="token", aggregation="max", num_grades=3), scale="log")


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_a_reward_trains_in_trl(model, tmp_path, trainer, config):
    tokenizer = byte_tokenizer()
    policy = make_model("likelihood", "llama", seed=3)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    seen: list[StepScores] = []

    class Watched(FractalReward):
        def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
            rewards = super().__call__(prompts, completions, **kwargs)
            seen.extend(rewards)
            return rewards

    run = trainer(
        policy,
        reward_funcs=[Watched(model)],
        args=config(
            output_dir=str(tmp_path),
            max_steps=2,
            num_generations=2,
            per_device_train_batch_size=4,
            max_completion_length=12,
            learning_rate=1e-2,
            beta=0.0,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+1?\n"} for i in range(4)]),
        processing_class=tokenizer,
    )
    run.train()
    assert len(seen) == 8
    logged = [entry["rewards/fractal_reward/mean"] for entry in run.state.log_history if "reward" in entry]
    assert len(logged) == 2
    assert logged[0] == pytest.approx(np.mean([reward for reward in seen[:4] if reward is not None]), abs=1e-4)
    assert any(not torch.equal(before[name], parameter) for name, parameter in run.model.named_parameters())
