"""What practitioners bring is read rightly, or refused in a sentence: small inputs of `tests/corpus`, by their kind."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from support.fractal import make as make_training
from support.models import byte_tokenizer, reward_model, spaced_tokenizer
from support.stand_ins import save_reward_model, write_jsonl
from support.step_ppo import (
    EOS,
    PIECES,
    RAGGED,
    TOKEN_REWARDS,
    A,
    B,
    config,
    make,
    measured,
    policy_tokenizer,
    replay,
    rollout,
    train,
)
from support.step_ppo import reward_model as letters_model
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from fractal_rm.cli.main import main
from fractal_rm.credit.placement import completion_text
from fractal_rm.data.bag import Bag, StepScores
from fractal_rm.data.prompts import read_completion, read_prompt
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.reward_model import FractalReward
from fractal_rm.scorers.inputs import TokenInputs, context_text, prompt_text
from fractal_rm.scorers.settings import FractalSettings

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

CORPUS = Path(__file__).resolve().parent / "corpus"
QUESTION = [{"role": "user", "content": "2+2?"}]
CONTROL = ["<|im_start|>", "<|im_end|>", "<step>"]
REFUSING = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if not loop.first and m['role'] == 'user' and messages[loop.index0 - 1]['role'] == 'user' %}"
    "{{ raise_exception('two users') }}{% endif %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
)
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How the answer begins: a template that says nothing, one that opens the thinking, one that switches it off.
TEMPLATES = {
    "plain": (TURNS, {}),
    "opens": (TURNS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), {}),
    "switched off": (
        TURNS.replace(
            "assistant\n{% endif",
            "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
            "{% endif",
        ),
        {"enable_thinking": False},
    ),
}


def corpus(name: str) -> list[Any]:
    rows = [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [pytest.param(row, id=row["kind"]) for row in rows]


def turns_tokenizer(*, template: str = TURNS, special: bool = True, spaced: bool = False) -> Any:
    """A tokenizer with control tokens, special ones or ordinary added ones."""
    tokenizer = spaced_tokenizer() if spaced else byte_tokenizer(merges=True)
    tokenizer.add_tokens(CONTROL, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", corpus("prompts_readable"))
def test_messages_are_read_as_text(row):
    assert read_prompt(row["prompt"]) == row["text"]
    model = reward_model("token", "llama", byte_tokenizer(chat=True))
    assert model.score([row["prompt"]], ["4."]) == model.score([row["text"]], ["4."])
    assert model.score([row["prompt"]], ["4."])[0].error is None


@pytest.mark.parametrize("row", corpus("prompts_unreadable"))
def test_prompts_that_no_reward_model_reads_are_refused_before_training(tmp_path, row):
    model = letters_model(chat=True, max_length=64)
    model.tokenizer.chat_template = REFUSING
    sentence = rf"^The reward model cannot read 1 of the first 9 prompts\. row 8: {row['reason']}"
    parts = isinstance(row["prompt"][0]["content"], list)  # a column holds one kind
    content = [{"type": "text", "text": "q"}] if parts else "q"
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": content}]}] * 8 + [{"prompt": row["prompt"]}])
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, reward_model=[model], processing_class=policy_tokenizer(chat=True), train_dataset=data)


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_message_that_the_chat_template_leaves_out_is_refused(role):
    others = "{% for m in messages if m['role'] in ('user', 'assistant') %}{{ m['content'] }}\n{% endfor %}"
    left, kept = turns_tokenizer(template=others), turns_tokenizer()
    for chat in ([{"role": role, "content": "Be brief."}, *QUESTION], [*QUESTION, {"role": role, "content": "4"}]):
        assert chat[0]["content"] in prompt_text(chat, kept, "{prompt}")
        with pytest.raises(ValueError, match=f"does not write messages of '{role}'"):
            prompt_text(chat, left, "{prompt}")


def test_a_tool_may_answer_calls_only():
    """As in Gemma 4: its template writes what a tool says behind `tool_calls`, and leaves it out otherwise."""
    template = TURNS.replace(
        "<|im_end|>", "{% if m.tool_calls %} calls {{ messages[loop.index].content }}{% endif %}<|im_end|>"
    )
    template = template.replace("in messages", "in messages if m.role != 'tool'").replace(
        "messages[loop.index]", "messages[-1]"
    )
    tokenizer = turns_tokenizer(template=template)
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
    chat = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "told"}]
    assert "told" in prompt_text(chat, tokenizer, "{prompt}")
    with pytest.raises(ValueError, match="does not write messages of 'tool'"):  # calls are a part of a turn's text
        context_text(chat[2:], tokenizer)


def test_columns_that_reach_no_chat_template_are_refused_before_sampling(tmp_path):
    asked = {"prompt": QUESTION, "tools": [{"type": "function"}]}
    options = {"processing_class": policy_tokenizer(chat=True), "reward_model": letters_model(chat=True)}
    with pytest.raises(ValueError, match="a column 'tools', which reaches neither the chat template of the policy"):
        make(tmp_path, train_dataset=Dataset.from_list([asked] * 8), **options)
    data, several = Dataset.from_list([{"prompt": QUESTION}] * 8), {"shop": object, "game": object}
    with pytest.raises(ValueError, match="`environment_factory` names 2 environments"):
        make(tmp_path, train_dataset=data, environment_factory=several, **options)


def test_content_of_a_completion_is_read_where_it_is_null_or_in_parts():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "."}]}]
    assert read_completion(parts) == "4."
    empty = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert FractalReward(reward_model("token", "llama"))(["2+2?"], [empty]) == [None]


# What is not known ----------------------------------------------------------------------------------------------------

ONE_PROMPT = Dataset.from_dict({"prompt": ["q"] * 32})


def test_a_completion_that_is_cut_counts_as_not_judged(tmp_path):
    """`max_length` leaves room for three tokens behind the prompt: rows 1, 2, 4 and 6 do not fit, or not with all."""
    options = {"train_dataset": ONE_PROMPT, "rollout_func": replay(RAGGED), "shaping": "raw", **TOKEN_REWARDS}
    whole = rollout(tmp_path, reward_model=letters_model(), **options)
    cut = rollout(tmp_path, reward_model=letters_model(max_length=4), **options)
    batch = cut["trainer"].last_rollout
    unread = [1, 2, 4, 6]
    assert [row for row, missing in enumerate(batch.unscored) if missing] == unread
    assert not batch.learned[unread].any()
    assert not cut["advantages"][unread].any()
    others = [row for row in range(8) if row not in unread]
    assert (cut["advantages"][others] == whole["advantages"][others]).all()
    assert whole["advantages"][unread].any(dim=1).all()
    found = measured(cut["trainer"])
    assert found["steps/unscored"] == [4 / 8]
    assert found["steps/beyond_limit"] == [sum(one.truncated_steps for one in batch.watched) / 12]
    assert found["steps/score"] == [pytest.approx((0.9 + 0.2 + 0.7) / 3, abs=1e-5)]  # of the two that were read
    assert measured(whole["trainer"])["steps/unscored"] == measured(whole["trainer"])["steps/beyond_limit"] == [0.0]
    scored = letters_model(max_length=4)
    assert FractalReward(scored)(["q"] * 2, ["ab\nac", "b"]) == [None, pytest.approx(0.2, abs=1e-5)]


def test_steps_of_a_model_without_weight_take_no_completion_out_of_training(tmp_path):
    options = {"train_dataset": ONE_PROMPT, "rollout_func": replay(RAGGED), **TOKEN_REWARDS}
    output = rollout(
        tmp_path, reward_model=letters_model(max_length=4), step_weight=0.0, reward_funcs=[length], **options
    )
    assert (output["trainer"].last_rollout.learned == output["trainer"].last_rollout.mask).all()


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def undecided(completion_ids: list[list[int]], **_: Any) -> list[None]:
    return [None] * len(completion_ids)


LONG = [(A, B, A, B, A, B, A)]


@pytest.mark.parametrize("functions", [None, [undecided]])
def test_a_rollout_in_which_nothing_earns_anything_stops_the_run(tmp_path, functions):
    options = {"train_dataset": ONE_PROMPT, "rollout_func": replay(LONG), "reward_funcs": functions}
    sentence = r"The rollout of step 0 has no reward, .*: of 8 completions 0 are empty, 8 could not be"
    with pytest.raises(ValueError, match=sentence) as caught:
        train(tmp_path, reward_model=letters_model(max_length=4), **options)
    assert "the prompt and the first step exceed `max_length`" in str(caught.value)
    with pytest.raises(ValueError, match=r"of 8 completions 8 are empty, 0 could not be"):
        train(tmp_path, reward_model=letters_model(), **options | {"rollout_func": replay([(EOS,)])})


@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_many_that_cannot_be_judged_raise_an_alarm_from_the_first_rollout_on(tmp_path, caplog, on_alarm):
    options = {"train_dataset": ONE_PROMPT, "rollout_func": replay([*LONG, (B, EOS)]), "reward_funcs": [length]}
    guarded = {"guard_patience": 2, "max_steps": 4, "num_generations": 1, "on_alarm": on_alarm}
    trainer = train(tmp_path, reward_model=letters_model(max_length=4), **options, **guarded)
    assert trainer.state.global_step == (4 if on_alarm == "warn" else 2)
    assert (
        "`unscored` is 0.5, beyond 0.2 since step 0: the reward model cannot read what the policy writes" in caplog.text
    )
    assert all(row["guards/unscored"] == 0.5 for row in trainer.state.log_history if "guards/unscored" in row)


# Special tokens -------------------------------------------------------------------------------------------------------


def test_what_the_policy_wrote_reaches_the_reward_model_as_written(tmp_path):
    tokenizer = policy_tokenizer()
    tokenizer.add_tokens(["<step>"], special_tokens=True)
    step = len(PIECES)
    model = letters_model(segmentation=Segmentation("separator", separator="<step>"))
    ids = (A, step, B, step, A, EOS)
    assert completion_text(ids, tokenizer) == "a<step>b<step>a"
    policy = LlamaForCausalLM(config(vocab_size=len(PIECES) + 1))
    options = {"model": policy, "processing_class": tokenizer, "rollout_func": replay([ids]), "shaping": "raw"}
    output = rollout(tmp_path, reward_model=model, **options, **TOKEN_REWARDS)
    batch = output["trainer"].last_rollout
    assert batch.texts == ["a<step>b<step>a"] * 8
    assert [one.spans for one in batch.watched] == [model.score(["q"], ["a<step>b<step>a"])[0].spans] * 8
    assert output["advantages"][0].tolist() == pytest.approx([0.9, 0, 0.2, 0, 0.9, 0], abs=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["own tokenizer", "policy's tokenizer"])
def test_grpo_reads_what_ppo_and_scoring_read(tmp_path, caplog, given):
    """Without the ids, `a<step>b<step>a` is `aba`: one step, that earns .9."""
    tokenizer = policy_tokenizer()
    tokenizer.add_tokens(["<step>"], special_tokens=True)
    ids = (A, len(PIECES), B, len(PIECES), A, EOS)
    model = letters_model(segmentation=Segmentation("separator", separator="<step>"))
    policy = LlamaForCausalLM(config(vocab_size=len(PIECES) + 1))
    options = {"model": policy, "processing_class": tokenizer, "rollout_func": replay([ids]), "max_steps": 1}
    reward = FractalReward(model, tokenizer=tokenizer if given else None)
    trainer = make(tmp_path / "grpo", GRPOTrainer, GRPOConfig, reward_funcs=[reward], **options)
    trainer.train()
    offline = model.score(["q"], ["a<step>b<step>a"])[0]
    (grpo,) = {row["rewards/fractal_reward/mean"] for row in trainer.state.log_history if "reward" in row}
    assert ("Give the policy's tokenizer: `FractalReward(..., tokenizer=...)`" in caplog.text) != given
    assert grpo == pytest.approx(offline.score if given else 0.9, abs=1e-5)
    ppo = rollout(tmp_path / "ppo", reward_model=model, **options, **TOKEN_REWARDS)["trainer"].last_rollout
    assert ppo.watched[0].step_scores == pytest.approx(offline.step_scores, abs=1e-5)
    assert len(offline.steps) == 3


def test_ids_are_read_by_the_reward_models_own_tokenizer_where_it_is_the_policys(caplog):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.add_tokens(["<step>"], special_tokens=True)
    model = reward_model("token", "llama", tokenizer, segmentation=Segmentation("separator", separator="<step>"))
    ids = [tokenizer("a<step>b")["input_ids"] + [tokenizer.eos_token_id], tokenizer("c")["input_ids"]]
    chats = [[{"role": "assistant", "content": text}] for text in ("ab", "c")]
    expected = [one.score for one in model.score(["?"] * 2, ["a<step>b", "c"])]
    assert FractalReward(model)(["?"] * 2, ["ab", "c"], completion_ids=ids) == expected
    assert FractalReward(model)(["?"] * 2, chats, completion_ids=ids) == expected
    assert FractalReward(model)(["?"] * 2, ["ab", "c"]) != expected
    assert not caplog.text


def texts_of(tokenizer: Any, bag: Any) -> str:
    return tokenizer.decode(bag.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encoded(tokenizer: Any, prompt: Any, response: str, **settings: Any) -> Any:
    inputs = TokenInputs(tokenizer, FractalSettings(scorer="token", **settings))
    return inputs.encode([Bag(prompt, response, ((0, len(response)),), None)])[0]


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("row", corpus("control_tokens"))
def test_control_tokens_that_somebody_wrote_are_text(row, special):
    tokenizer = turns_tokenizer(special=special)
    names = [*CONTROL, "<eos>"] if special else CONTROL[:2]
    control = set(tokenizer.convert_tokens_to_ids(names))
    chat = [{"role": "user", "content": row["text"]}]
    plain = encoded(tokenizer, QUESTION, "4.")
    bag = encoded(tokenizer, chat, row["text"])
    assert sum(i in control for i in bag.input_ids) == sum(i in control for i in plain.input_ids) == 3
    assert texts_of(tokenizer, bag) == prompt_text(chat, tokenizer, "{prompt}") + row["text"]
    old = encoded(tokenizer, chat, row["text"], reading=1)
    assert sum(i in control for i in old.input_ids) > 3 or not special


def test_a_control_token_that_the_template_reads_is_left_to_it():
    """As in Qwen3 and DeepSeek: the template finds earlier thoughts by a control token, and leaves them out."""
    template = TURNS.replace("m['content'] | trim", "m['content'].split('<step>')[-1] | trim")
    tokenizer = turns_tokenizer(template=template)
    chat = [
        *QUESTION,
        {"role": "assistant", "content": "Hm.<step>4.<|im_end|>"},
        {"role": "user", "content": "<|im_start|>?"},
    ]
    text = prompt_text(chat, tokenizer, "{prompt}")
    assert text == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    assert sum(i in control for i in encoded(tokenizer, chat, "5.").input_ids) == 2 * len(chat) + 1


@pytest.mark.parametrize("odd", ["\ue0f5", "\ue0f5\ue0f5", "\uf3a7\ue0f5"])
def test_characters_that_mark_places_may_stand_in_a_message(odd):
    tokenizer = turns_tokenizer()
    chat = [{"role": "user", "content": f"{odd}<|im_start|>{odd}"}]
    assert prompt_text(chat, tokenizer, "{prompt}") == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    told = [{"role": "tool", "content": f"5{odd}6"}]
    assert f"5{odd}6" in context_text(told, tokenizer)
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    assert sum(i in control for i in encoded(tokenizer, chat, "5.").input_ids) == 3


words = st.lists(st.sampled_from([*CONTROL, "<eos>", "<", "|im_start|>", "assistant\n", "a", " ", "\n"]), min_size=1)


@pytest.mark.parametrize("spaced", [False, True])
@given(written=words, asked=words)
def test_nobody_can_open_a_turn(spaced, written, asked):
    tokenizer = turns_tokenizer(spaced=spaced)
    control = {tokenizer.convert_tokens_to_ids(one) for one in CONTROL}
    chat, response = [{"role": "user", "content": "".join(asked)}], "".join(written) + "."
    text = prompt_text(chat, tokenizer, "{prompt}")
    bag = encoded(tokenizer, chat, response)
    assert [i for i in bag.input_ids if i in control] == tokenizer.convert_tokens_to_ids([*CONTROL[:2], CONTROL[0]])
    if not spaced:
        assert texts_of(tokenizer, bag) == text + response


# Thinking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinks", [False, True])
def test_training_scoring_and_ppo_read_the_same_bytes(tmp_path, name, thinks):
    template, kwargs = TEMPLATES[name]
    tokenizer = turns_tokenizer(template=template)
    answer = "ab\nb</think>\na" if name == "opens" else "<think>\nab\n</think>\na" if thinks else "ab\na"
    opened = "<think>\n" + answer if name == "opens" and thinks else answer  # data that repeats what the template wrote
    rows = [
        {"prompt": QUESTION, "completion": [{"role": "assistant", "content": opened}], "label": bool(i % 2)}
        for i in range(4)
    ]
    trainer = make_training(
        tmp_path / "rm", rows, scorer="token", tokenizer=tokenizer, chat_template_kwargs=kwargs, max_steps=1
    )
    trained = texts_of(tokenizer, trainer.train_dataset.encoded[0])
    expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, **kwargs) + answer
    assert trained == expected

    model = trainer.reward_model()
    assert model.settings.chat_template_kwargs == kwargs
    seen: list[str] = []
    encode = model._inputs.encode

    def recorded(bags: Any) -> Any:
        found = encode(bags)
        seen.extend(texts_of(tokenizer, bag) for bag in found)
        return found

    object.__setattr__(model._inputs, "encode", recorded)
    model.score([QUESTION], [opened])
    assert seen.pop() == expected

    ids = tuple(PIECES.index({"\n": "Ċ", " ": "Ġ"}.get(letter, letter)) for letter in "ab\na")
    model.settings.chat_template_kwargs = {}  # those of the policy reach the reward model too
    policy = policy_tokenizer()
    policy.chat_template = template
    data = Dataset.from_list([{"prompt": QUESTION}] * 8)
    options = {"processing_class": policy, "train_dataset": data, "chat_template_kwargs": kwargs or None}

    def written(prompts: Any, trainer: Any) -> dict[str, Any]:
        return replay([(*ids, EOS)])(["q"] * len(prompts), trainer)

    rollout(tmp_path / "ppo", reward_model=model, rollout_func=written, **options)
    assert seen[-1] == expected.removesuffix(answer) + "ab\na"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("<think>\nFirst 2.\nThen 3.\n</think>\nIt is 5.\nYes, 5.", ["It is 5.", "Yes, 5."]),
        ("First 2.\nThen 3.\n</think>\nIt is 5.", ["It is 5."]),  # opened by the template
        ("It is 5.\n<think>\nOr 6.\nNo.", ["It is 5."]),  # never closed
        ("<think>One.\nTwo.</think>It is 5.\n<think>Hm.</think>Yes, 5.", ["It is 5.", "Yes, 5."]),
        ("<think>One.", []),
        ("<think>One.<think>Two.</think>Three.</think>\nIt is 5.", ["It is 5."]),  # one inside of the other
        ("<THINK>\nOne.\nTwo.\n</THINK>\nIt is 5.", ["It is 5."]),
        ("<|think|>One.\nTwo.<|/think|>It is 5.\n<analysis a=1>Hm.\nNo.</analysis>Yes, 5.", ["It is 5.", "Yes, 5."]),
        (
            "[THINK]\nOne.\n[/THINK]\nIt is 5.\n<|begin_of_thought|>Two.\n<|end_of_thought|>Yes, 5.",
            ["It is 5.", "Yes, 5."],
        ),
        ("<|channel|>analysis<|message|>One.\nTwo.<|end|><|channel|>final<|message|>It is 5.", ["It is 5."]),
    ],
)
@pytest.mark.parametrize("method", ["lines", "sentences"])
def test_thinking_is_passed_over_where_asked_for(text, steps, method):
    spans = Segmentation(method, thinking="skip")(text)
    assert [text[start:end] for start, end in spans] == steps
    assert len(Segmentation(method)(text)) > len(steps)


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", corpus("segmentation"))
def test_texts_are_cut_where_a_reader_would(row):
    spans = Segmentation(row["method"])(row["text"])
    assert [row["text"][start:end] for start, end in spans] == row["steps"]


def test_older_checkpoints_keep_their_rules():
    block = FractalSettings().to_dict()
    for name in ("reading", "joint", "chat_template_kwargs"):
        del block[name]
    for name in ("thinking", "version"):
        del block["segmentation"][name]
    old = FractalSettings.from_dict(block, where="here")
    assert (old.reading, old.segmentation.version, old.segmentation.joint) == (1, 1, "\n")
    assert FractalSettings.from_dict(FractalSettings().to_dict(), where="here") == FractalSettings()
    assert old.segmentation("a\n---\nb") == [(0, 1), (2, 5), (6, 7)]
    sentences = Segmentation("sentences", version=1)
    assert len(sentences("1. a pizza, 2. a pie")) == 2
    assert len(sentences("Schritt 1:\n\nAddiere 2.")) == 2
    assert sentences.joint == "\n"


def test_steps_are_joined_by_what_stood_between_them_in_training(tmp_path):
    texts = [{"prompt": "2+2?\n", "completion": f"a{i}.  b.  c.", "label": bool(i % 2)} for i in range(4)]
    options = {"scorer": "token", "segmentation": "pattern", "pattern": "  ", "max_steps": 1}
    model = make_training(tmp_path, texts, **options).reward_model()
    assert model.settings.joint == "  "
    listed, text = model.score(["2+2?\n"] * 2, [["a.", "b."], "a.  b."])
    assert listed == text
    mixed = [*texts, {"prompt": "2+2?\n", "steps": ["a.", "b."], "label": True}]
    with pytest.raises(
        ValueError, match=r"train data, row 5: the steps .* joined by '\\n', .* in 4 rows .* '  ' apart"
    ):
        make_training(tmp_path, mixed, **options)
    kept = [*texts, mixed[-1] | {"response": "a.  b."}]
    assert make_training(tmp_path, kept, **options).settings.joint == "  "


def test_steps_of_sentences_are_joined_by_spaces(tmp_path):
    rows = [{"prompt": "2+2?\n", "steps": ["Two.", "Four."], "label": bool(i % 2)} for i in range(4)]
    trainer = make_training(tmp_path, rows, scorer="token", segmentation="sentences", max_steps=1)
    assert trainer.settings.joint == " "
    assert trainer.train_dataset.bags[0].response == "Two. Four."


def test_prose_under_lines_is_warned_of_with_counts(tmp_path):
    prose = [{"prompt": "?\n", "completion": f"I add {i}. I take 2. So 3.", "label": bool(i % 2)} for i in range(20)]
    found = r"20 responses have 20 steps under `segmentation=lines`: .* `segmentation=sentences` finds 60 steps in 20"
    with pytest.warns(UserWarning, match=found):
        make_training(tmp_path, prose, scorer="token", max_steps=1)
    make_training(tmp_path, prose, scorer="token", max_steps=1, segmentation="sentences")
    short = [row | {"completion": "So 3."} for row in prose]
    make_training(tmp_path, short, scorer="token", max_steps=1)
    lines = [row | {"completion": "I add 2\nI take 2\nSo 3"} for row in prose]
    with pytest.warns(UserWarning, match=r"`segmentation=lines` finds 60 steps in 20 of them"):
        make_training(tmp_path, lines, scorer="token", max_steps=1, segmentation="separator", separator=" ## ")


PROSE = [{"prompt": "?\n", "response": f"I add {i}. I take 2. So 3.", "label": i % 2} for i in range(20)]


def test_scoring_and_evaluation_warn_of_prose_under_lines_once(tmp_path):
    folder = save_reward_model(tmp_path / "rm", scorer="token")
    file = write_jsonl(tmp_path / "rows.jsonl", PROSE)
    found = r"20 responses have 20 steps under `segmentation=lines`: .* finds 60 steps in 20 of them"
    outputs = ["--output", str(tmp_path / "out")]
    for command in (["score", "--input", file], ["evaluate", "--data", file]):
        with pytest.warns(UserWarning, match=found) as said:
            assert main([*command, "--model", folder, *outputs]) == 0
        assert len(said) == 1
    cut = [row | {"response": row["response"].replace(". ", ".\n")} for row in PROSE]
    write_jsonl(tmp_path / "rows.jsonl", cut)
    for command in (["score", "--input", file], ["evaluate", "--data", file]):
        assert main([*command, "--model", folder, *outputs]) == 0


@pytest.mark.parametrize("functions", [False, True])
def test_the_first_rollout_of_ppo_warns_of_completions_that_are_one_step(tmp_path, functions):
    """`a b` has a full stop for a marker here: the separator finds one step, lines two."""
    options: dict[str, Any] = {"rollout_func": replay([(A, PIECES.index("Ċ"), B, EOS)]), "max_steps": 2}
    separated = Segmentation("separator", separator="#")
    if functions:
        options |= {"step_reward_funcs": [step_length], "step_segmentation": "separator", "step_separator": "#"}
    else:
        options |= {"reward_model": letters_model(segmentation=separated)}
    with pytest.warns(UserWarning, match=r"8 responses have 8 steps under `segmentation=separator`: ") as said:
        train(tmp_path, **options)
    assert len([one for one in said if "responses have" in str(one.message)]) == 1


def step_length(steps: list[list[str]], **_: Any) -> list[list[float]]:
    return [[float(len(step)) for step in row] for row in steps]


def test_an_empty_response_is_judged_and_an_unreadable_one_is_not():
    model = reward_model("token", "llama", max_length=12)
    empty, whole, cut, long = model.score(["?"] * 4, [" \n", "a", "a\n" + "b" * 12, "b" * 12])
    assert [one.judged for one in (empty, whole, cut, long)] == [True, True, False, False]
    assert (cut.truncated_steps, long.truncated_steps) == (1, 1)
    assert re.search("max_length", long.error or "")
    separated = reward_model("token", "llama", segmentation=Segmentation("separator", separator="#"))
    assert separated.score(["?"], ["##"])[0].judged
    assert StepScores("a", error="no").judged is False
