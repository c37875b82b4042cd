"""What PPO refuses: one sentence each, before a model is loaded or a completion sampled, or where a reward returns."""

import functools
import http.server
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.stand_ins import byte_tokenizer
from support.step_ppo import (
    RAGGED,
    config,
    make,
    policy,
    policy_tokenizer,
    replay,
    reward_model,
    rollout,
    train,
)
from transformers import LlamaForSequenceClassification
from trl import GRPOConfig

from fractal_rm.data.segmentation import Segmentation
from fractal_rm.ppo.checks import check_reward_models, check_setup, check_step_functions, wait_for_vllm
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.ppo.sources import completion_in_words, make_sources

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
PROMPTS = Dataset.from_dict({"prompt": ["q"] * 8})
CHATS = Dataset.from_dict({"prompt": [[{"role": "user", "content": "q"}]] * 8})


def settings(**options: Any) -> StepPPOConfig:
    return StepPPOConfig("out", use_cpu=True, bf16=False, **options)


def half(steps: list[list[str]], **_: Any) -> list[list[float]]:
    return [[0.5] * len(row) for row in steps]


# Constructor and configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"step_reward_weights": [1.0]}, ValueError, r"has 1 numbers for 1 reward models and 1 `step_reward_funcs`\."),
        ({"step_reward_funcs": ["a"]}, TypeError, r"`step_reward_funcs` contains a str\. Give functions"),
        ({"processing_class": None}, ValueError, r"policy was built in code, .* Give it as `processing_class`"),
        ({"eval_dataset": PROMPTS, "per_device_eval_batch_size": 3}, ValueError, r"has 3 completions .* multiple of 2"),
        ({"train_dataset": [{"prompt": "q"}]}, TypeError, r"`train_dataset` is a list\. Give a `datasets\.Dataset`"),
        ({"eval_dataset": {"a": {"prompt": ["q"]}}}, TypeError, r"`eval_dataset` is a dict\. Give a"),
        (
            {"train_dataset": PROMPTS.rename_column("prompt", "ask")},
            ValueError,
            r"has no column 'prompt' \(found: 'ask'\)",
        ),
        ({"train_dataset": PROMPTS.select([])}, ValueError, r"`train_dataset` has no rows\. Give at least one\."),
        ({"eval_strategy": "steps"}, ValueError, r"`eval_strategy` is 'steps', but there is no data to evaluate on\."),
        ({"train_dataset": CHATS}, ValueError, r"tokenizer of the policy has no chat template\. Set its"),
        (
            {"train_dataset": CHATS, "processing_class": byte_tokenizer(chat=True)},
            ValueError,
            r"tokenizer of the reward model has no chat template\. Set its",
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 9},
            ConnectionError,
            r"at http://127\.0\.0\.1:9 ",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_trainer_is_not_made(tmp_path, monkeypatch, options, error, sentence):
    monkeypatch.setattr("support.step_ppo.policy_tokenizer", lambda: None)
    given = {"processing_class": byte_tokenizer(), "step_reward_funcs": half, "vllm_server_host": "127.0.0.1"}
    with pytest.raises(error, match=sentence) as caught:
        make(tmp_path, reward_model=[reward_model()], vllm_server_timeout=0.0, **given | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"step_reward_weights": [1.0, math.nan]}, r"Number 2 of `step_reward_weights` is nan\. Give a number from"),
        ({"step_separator": "##"}, r"`step_separator` is '##' with `step_segmentation=None`\. Give it if and only if"),
        ({"scale_rewards": "maybe"}, r"`scale_rewards` is 'maybe'\. Choose one of group, batch, none\."),
        ({"loss_type": "dr-grpo"}, r"`loss_type` is 'dr-grpo'\. Choose one of grpo, dr_grpo, (\w+, )+vespo\."),
        ({"importance_sampling_level": "sentence"}, r"level` is 'sentence'\. Choose one of token, sequence\."),
        ({"chat_template_kwargs": 3}, r"`chat_template_kwargs` is 3\. Give an object with named values"),
        ({"generation_kwargs": "{a"}, r"`generation_kwargs` is invalid JSON"),
        ({"step_segmentation": "pattern"}, r"`step_pattern` is None with `step_segmentation='pattern'`\. Give it"),
        ({"step_segmentation": "pattern", "step_pattern": "("}, r"is not a regular expression"),
    ],
    ids=str,
)
def test_a_configuration_is_not_made(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(**options)


def test_losses_are_not_refused_where_the_help_of_trl_does_not_name_them(monkeypatch):
    field = StepPPOConfig.__dataclass_fields__["loss_type"]
    monkeypatch.setattr(field, "metadata", {"help": "Which loss is used."})
    monkeypatch.setattr(GRPOConfig.__dataclass_fields__["loss_type"], "metadata", {"help": "Which loss is used."})
    assert settings(loss_type="newer").loss_type == "newer"


def test_batches_of_evaluation_hold_whole_groups():
    for options in ({"num_generations_eval": 1}, {"per_device_eval_batch_size": 4}, {"num_generations_eval": 3}):
        options = {"per_device_eval_batch_size": 3, "num_generations": 2} | options
        check_setup(settings(**options), policy(), policy_tokenizer(), PROMPTS)
    check_setup(settings(per_device_eval_batch_size=3, num_generations=2), policy(), policy_tokenizer(), None)


def test_a_policy_folder_without_a_tokenizer_is_refused_and_one_with_an_adapter_is_not(tmp_path):
    policy().save_pretrained(tmp_path)
    for model in (str(tmp_path), policy().from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=rf"{tmp_path} has a policy without a tokenizer\. Save its tokenizer"):
            check_setup(settings(), model, None, None)
        check_setup(settings(), model, policy_tokenizer(), None)
    policy_tokenizer().save_pretrained(tmp_path)
    check_setup(settings(), str(tmp_path), None, None)
    check_setup(settings(), "owner/name-on-the-hub", None, None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    check_setup(settings(), str(tmp_path / "adapter"), None, None)


# Reward models and functions ------------------------------------------------------------------------------------------


def test_a_reward_model_that_does_not_suit_the_shaping_is_refused_by_number():
    one, other = reward_model(), reward_model(aggregation="max")
    make_sources([one, other], [], settings())
    with pytest.raises(ValueError, match=r"2 of 2 was trained with aggregation 'max': one good .* charges for bad"):
        make_sources([one, other], [], settings(shaping="min_form", step_lam=1.0))
    with pytest.raises(ValueError, match=r"`shaping='first_mistake'` charges for bad steps"):
        make_sources([other], [], settings(shaping="first_mistake"))
    make_sources([one, reward_model(aggregation="mean")], [], settings(shaping="min_form", step_lam=1.0))


def test_a_reward_model_that_cannot_cut_or_write_a_chat_is_refused():
    given = reward_model(segmentation=Segmentation("given"))
    with pytest.raises(ValueError, match=r"was trained on data with given steps, so it cannot cut completions"):
        check_reward_models([given], PROMPTS)
    with pytest.raises(ValueError, match=r"tokenizer of reward model 2 of 2 has no chat template"):
        check_reward_models([reward_model(chat=True), reward_model()], CHATS)


@pytest.mark.parametrize(
    ("function", "column", "error", "sentence"),
    [
        (lambda steps, answer, **_: steps, "level", TypeError, r"called with .*level.*: missing a required .*'answer'"),
        (lambda steps, **_: steps, "steps", ValueError, r"has a column `steps`, but .* Rename it: `dataset"),
        (lambda prompts, steps: steps, "level", TypeError, r"unexpected keyword argument .* others as `\*\*kwargs`"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(function, column, error, sentence):
    data = PROMPTS.add_column(column, [1] * 8)
    with pytest.raises(error, match=sentence):
        check_step_functions([function], settings(), data)
    check_step_functions([functools.partial(half, extra=1), lambda steps, **_: steps], settings(), PROMPTS)
    check_step_functions([lambda steps, answer, **_: steps], settings(), data.to_iterable_dataset())


def test_steps_of_functions_need_functions():
    with pytest.raises(ValueError, match=r"`step_segmentation` needs `step_reward_funcs`, and there are none"):
        check_step_functions([], settings(step_segmentation="lines"), PROMPTS)


# The vLLM server ------------------------------------------------------------------------------------------------------


@contextmanager
def server(statuses: list[int]) -> Iterator[str]:
    """Answers `/health` with these, then with the last of them."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(
                (statuses.pop(0) if len(statuses) > 1 else statuses[0]) if self.path == "/health" else 404
            )
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def test_a_vllm_server_that_is_healthy_or_starting_is_waited_for():
    with server([200]) as url:
        wait_for_vllm(url, 0.0)
    with server([503, 200]) as url:
        wait_for_vllm(url, 5.0)


def test_a_vllm_server_that_is_not_there_is_named_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nothing listens
        url, start = f"http://127.0.0.1:{taken.getsockname()[1]}", time.monotonic()
        with pytest.raises(ConnectionError, match=rf"No vLLM server answers at {url} \(.*refused\)\. Start one with"):
            wait_for_vllm(url, 0.5)
        assert time.monotonic() - start < 5
    with server([503]) as url, pytest.raises(ConnectionError, match=r"\(.*Service Unavailable\)\. Start one"):
        wait_for_vllm(url, 0.0)
    with server([204]) as url, pytest.raises(ConnectionError, match=r"\(status 204\)"):  # TRL takes 200 only
        wait_for_vllm(url, 0.0)
    with pytest.raises(ConnectionError, match=r"No vLLM server answers at localhost \("):
        wait_for_vllm("localhost", 0.0)


# Rewards that are no numbers ------------------------------------------------------------------------------------------


def outcome(value: float | None) -> Any:
    def judge(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None, value, *[1.0] * (len(completion_ids) - 2)]

    return judge


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_outcome_that_is_no_number_stops_training_and_is_named(tmp_path, advantage, value):
    sentence = (
        rf"`judge` gave row 1 \(prompt 'q[abc ]*', completion 'ab\\nac\\n'\) the reward {value}\. Return a finite"
    )
    shared = {"rollout_func": replay(RAGGED), "advantage": advantage}
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path, reward_funcs=outcome(value), **shared)
    for own in (None, half):
        assert (
            rollout(tmp_path, reward_funcs=outcome(None), step_reward_funcs=own, **shared)["advantages"]
            .isfinite()
            .all()
        )


def test_an_asynchronous_outcome_is_checked_too(tmp_path):
    async def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [*[1.0] * (len(completion_ids) - 1), math.nan]

    with pytest.raises(ValueError, match=r"`judge` gave row 7 .* the reward nan"):
        rollout(tmp_path, reward_funcs=judge, rollout_func=replay(RAGGED))


def test_a_broken_reward_model_of_transformers_is_named(tmp_path):
    model = LlamaForSequenceClassification(config(num_labels=1))
    model.config._name_or_path = "owner/judge"
    options = {"reward_funcs": model, "reward_processing_classes": policy_tokenizer(), "reward_model": reward_model()}
    trainer = rollout(tmp_path, rollout_func=replay(RAGGED), **options)["trainer"]
    assert trainer.reward_funcs[0] is model
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"`judge` gave row 0 \(prompt 'q', completion 'a\\nb'\) the reward nan"):
        rollout(tmp_path, rollout_func=replay(RAGGED), **options)


def test_checked_functions_keep_their_names_and_the_lists_that_were_given_stay_as_they_are(tmp_path):
    judge, sources, kwargs = outcome(1.0), [half], {"reward_processing_classes": [None]}
    functions, args = [judge], settings(per_device_train_batch_size=8, num_generations=2)
    trainer = rollout(tmp_path, reward_funcs=functions, step_reward_funcs=sources, **kwargs)["trainer"]
    assert trainer.reward_func_names == ["judge", "half"]
    assert trainer.reward_funcs[0].__wrapped__ is judge
    assert (functions, sources, kwargs) == ([judge], [half], {"reward_processing_classes": [None]})
    assert args.reward_weights is None


def test_a_long_completion_is_cut_in_messages():
    said = completion_in_words(2, "q", "a" * 10_000)
    assert said.startswith("row 2 (prompt 'q', completion 'aaa")
    assert len(said) < 300
