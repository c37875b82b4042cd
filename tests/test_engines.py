"""Step rewards for other engines against a real server, called as verl, SkyRL and slime document that they call."""

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.documents import script
from support.models import byte_tokenizer, reward_model
from support.serving import running

from fractal_rm.credit.advantages import group_step_advantages
from fractal_rm.data.prompts import RenderedPrompt

ENGINES = Path(__file__).resolve().parent.parent / "recipes" / "engines"
CHAT = [{"role": "user", "content": "2+3*4?"}]
TEXTS = ["3*4=12.\n2+12=14.", "It is 20.", "2+3=5.\n5*4=20.\nSo 20.", "14."]
WORDS = byte_tokenizer(chat=True)


@pytest.fixture(scope="module")
def model():
    return reward_model("token", "llama", byte_tokenizer(chat=True), chat=True)


@pytest.fixture
def engine(model, monkeypatch):
    """Loads a file of the recipe, with a server behind it and stand-ins for what verl registers with."""
    registered: dict[str, Any] = {}

    def register(name: str) -> Any:
        return lambda found: registered.setdefault(name, found)

    for name, function in (
        ("verl", None),
        ("verl.trainer", None),
        ("verl.trainer.ppo", None),
        ("verl.trainer.ppo.core_algos", "register_adv_est"),
        ("verl.workers", None),
        ("verl.workers.reward_manager", "register"),
    ):
        module = ModuleType(name)
        if function:
            setattr(module, function, register)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(ENGINES))
    with running(model) as url:
        monkeypatch.setenv("FRACTAL_RM_URL", url)
        yield lambda name: (script(ENGINES / f"{name}.py"), registered)
    sys.modules.pop("step_rewards", None)


def ids() -> list[list[int]]:
    return [WORDS(text)["input_ids"] + [WORDS.eos_token_id] for text in TEXTS]


def expected_rows(model: Any) -> list[tuple[list[float], list[int]]]:
    """Scores of steps, and the token of each step's last character: one a byte."""
    found = model.score([CHAT] * len(TEXTS), TEXTS)
    return [(one.step_scores, [end - 1 for _, end in one.spans]) for one in found]


def padded(rows: list[Any], value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def test_verl_gets_scores_where_steps_end_and_an_estimator_that_adds_nothing_up(engine, model):
    _, registered = engine("verl_steps")
    responses, rows = padded(ids()), expected_rows(model)
    mask = padded([[1] * len(row) for row in ids()])
    batch = {
        "prompts": torch.zeros(4, 3, dtype=torch.long),
        "responses": responses,
        "attention_mask": torch.cat([torch.ones(4, 3, dtype=torch.long), mask], dim=1),
    }
    chats = np.array([CHAT] * 4 + [None], dtype=object)[:4]
    data = SimpleNamespace(batch=batch, non_tensor_batch={"raw_prompt": chats})
    manager = registered["fractal_steps"](WORDS, num_examine=1, compute_score=None, reward_fn_key="data_source")
    rewards = manager(data, return_dict=True)["reward_tensor"]
    wanted = torch.zeros(responses.shape)
    for row, (scores, ends) in enumerate(rows):
        wanted[row, ends] = torch.tensor(scores)
    torch.testing.assert_close(rewards, wanted, atol=1e-5, rtol=0)
    assert torch.equal(manager(data), rewards)
    estimate = registered["fractal_step_group"]
    uid = np.array(["a", "b", "a", "b"])
    advantages, returns = estimate(token_level_rewards=rewards, response_mask=mask, index=uid, config={})
    for group in ([0, 2], [1, 3]):
        scores, ends = [rows[row][0] for row in group], [rows[row][1] for row in group]
        alone = group_step_advantages(scores, ends, mask[group].bool(), 2, gamma=1.0, scale=False)
        torch.testing.assert_close(advantages[group], alone, atol=1e-5, rtol=0)
    assert torch.equal(advantages, returns)
    with pytest.raises(ValueError, match=r"Set `data.return_raw_chat=True`"):
        manager(SimpleNamespace(batch=batch, non_tensor_batch={}))


def test_skyrl_gets_a_list_of_rewards_for_each_response(engine, model):
    module, _ = engine("skyrl_steps")

    class Generator:
        async def generate(self, input_batch: Any, disable_tqdm: bool = False) -> dict[str, Any]:
            return {"response_ids": ids(), "rewards": [1.0] * 4, "loss_masks": [[1]] * 4}

    generator = module.StepRewardGenerator(Generator(), WORDS)
    output = asyncio.run(generator.generate({"prompts": [CHAT] * 4}))
    rows = expected_rows(model)
    mean = np.mean([score for scores, _ in rows for score in scores])
    assert [len(row) for row in output["rewards"]] == [len(row) for row in ids()]
    for rewards, (scores, ends) in zip(output["rewards"], rows, strict=True):
        assert [rewards[end] for end in ends] == pytest.approx([score - mean for score in scores], abs=1e-5)
        assert sum(reward != 0 for reward in rewards) == len(ends)
    assert output["loss_masks"] == [[1]] * 4
    with pytest.raises(ValueError, match="4 responses came for 2 prompts"):
        asyncio.run(generator.generate({"prompts": [CHAT] * 2}))


def test_slime_gets_advantages_of_each_token_in_place(engine, model, tmp_path):
    module, _ = engine("slime_steps")
    WORDS.save_pretrained(tmp_path)
    rendered = WORDS.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt = WORDS(rendered)["input_ids"]
    data: dict[str, Any] = {
        "tokens": [torch.tensor([*prompt, *row]) for row in ids()],
        "response_lengths": [len(row) for row in ids()],
        "loss_masks": [torch.ones(len(row)) for row in ids()],
        "rewards": [0.0] * 4,
    }
    assert module.step_advantages(SimpleNamespace(hf_checkpoint=str(tmp_path)), data) is None
    found = model.score([RenderedPrompt(rendered)] * 4, TEXTS)
    ends = [[end - 1 for _, end in one.spans] for one in found]
    mask = padded([[1] * len(row) for row in ids()]).bool()
    wanted = group_step_advantages([one.step_scores for one in found], ends, mask, 4, gamma=1.0, scale=False)
    for row, (advantages, returns) in enumerate(zip(data["advantages"], data["returns"], strict=True)):
        torch.testing.assert_close(advantages, wanted[row, : len(advantages)], atol=1e-5, rtol=0)
        assert len(advantages) == data["response_lengths"][row]
        assert torch.equal(advantages, returns)


TOOL_MASKS = [[1] * 3 + [0] * 4 + [1] * (len(row) - 7) for row in ids()]


def test_outputs_of_tools_are_refused_where_the_engines_mask_them(engine, model, tmp_path):
    """At both ends of a mask nothing is missing: others wrote what comes before and after."""
    _, registered = engine("verl_steps")
    lengths = padded([[1] * len(row) for row in ids()])
    attention = torch.cat([torch.ones(4, 3, dtype=torch.long), lengths], dim=1)
    batch = {"prompts": torch.zeros(4, 3, dtype=torch.long), "responses": padded(ids()), "attention_mask": attention}
    manager = registered["fractal_steps"](WORDS, num_examine=1)
    sentence = "Completion 0 holds tokens that the policy did not write, such as a tool's output"
    chats = {"raw_prompt": np.array([CHAT] * 4 + [None], dtype=object)[:4]}
    with pytest.raises(ValueError, match=sentence):
        manager(SimpleNamespace(batch=batch | {"response_mask": padded(TOOL_MASKS)}, non_tensor_batch=chats))
    ends = [[0, *[1] * (len(row) - 2), 0] for row in ids()]
    assert manager(SimpleNamespace(batch=batch | {"response_mask": padded(ends)}, non_tensor_batch=chats)).any()

    class Generator:
        async def generate(self, input_batch: Any) -> dict[str, Any]:
            return {"response_ids": ids(), "rewards": [1.0] * 4, "loss_masks": TOOL_MASKS}

    with pytest.raises(ValueError, match=sentence):
        asyncio.run(engine("skyrl_steps")[0].StepRewardGenerator(Generator(), WORDS).generate({"prompts": [CHAT] * 4}))
    WORDS.save_pretrained(tmp_path)
    data = {"tokens": [[5, *row] for row in ids()], "response_lengths": [len(row) for row in ids()]}
    with pytest.raises(ValueError, match=sentence):
        engine("slime_steps")[0].step_advantages(
            SimpleNamespace(hf_checkpoint=str(tmp_path)), data | {"loss_masks": TOOL_MASKS}
        )


def test_a_completion_that_is_read_in_part_has_no_steps(engine):
    engine("skyrl_steps")
    prompt = WORDS(WORDS.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))["input_ids"]
    short = reward_model("token", "llama", byte_tokenizer(chat=True), chat=True, max_length=len(prompt) + 12)
    found = short.score([CHAT] * len(TEXTS), TEXTS)
    placed = sys.modules["step_rewards"].placed_scores([CHAT] * len(TEXTS), ids(), WORDS, short)
    assert [one.judged for one in found].count(False) not in (0, len(TEXTS))
    assert [bool(one.scores) for one in placed] == [one.judged for one in found]
    assert any(one.truncated_steps and one.step_scores for one in found)


def test_what_nothing_can_be_learned_from_stops_the_engine(engine, monkeypatch):
    module, _ = engine("skyrl_steps")
    shared = sys.modules["step_rewards"]
    with pytest.raises(ValueError, match=r"None of 1 completions could be scored. First: "):
        shared.placed_scores(["a text, to a model of chats"], ids()[:1], WORDS, shared.from_environment())
    monkeypatch.delenv("FRACTAL_RM_URL")
    with pytest.raises(ValueError, match="FRACTAL_RM_URL is not set"):
        shared.from_environment()
    assert module.mean_score([]) == 0.0
