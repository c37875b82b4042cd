"""Text to token ids that know their steps: nothing inserted, nothing lost, cut where steps end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import byte_tokenizer, spaced_tokenizer, wordpiece_tokenizer
from transformers import PreTrainedTokenizerFast

from fractal_rm.data.bag import Bag, Span
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.scorers.inputs import EncodedBag, TokenInputs, prompt_text, special_affixes
from fractal_rm.scorers.settings import FractalSettings

lines = Segmentation()
TEXTS = st.text(alphabet="ab 12.=#\n✓é字", min_size=1, max_size=30)
RESPONSES = TEXTS.filter(lambda text: text.strip())
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "merges": byte_tokenizer(merges=True),
    "bos": byte_tokenizer(merges=True, bos=True),
}
SPACED = {"normalizer": spaced_tokenizer(normalizer=True), "pre_tokenizer": spaced_tokenizer()}


def encode_one(
    prompt: str | list[dict[str, str]],
    response: str,
    tokenizer: PreTrainedTokenizerFast,
    spans: list[Span] | None = None,
    **settings,
) -> EncodedBag:
    inputs = TokenInputs(tokenizer, FractalSettings(**settings))
    return inputs.encode([Bag(prompt, response, tuple(spans or lines(response)), None)])[0]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, response=RESPONSES)
def test_tokens_read_as_prompt_and_response_with_nothing_inserted(name, prompt, response):
    tokenizer = TOKENIZERS[name]
    bag = encode_one(prompt, response, tokenizer)
    text = tokenizer.decode(bag.input_ids, skip_special_tokens=True)
    assert text == prompt + response[: lines(response)[-1][1]]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, response=RESPONSES)
def test_the_last_token_of_a_step_holds_its_last_character_and_nothing_after_it(name, prompt, response):
    tokenizer = TOKENIZERS[name]
    bag = encode_one(prompt, response, tokenizer)
    spans = lines(response)
    assert bag.num_steps == bag.kept_steps == len(spans)
    for step, (position, (_, end)) in enumerate(zip(bag.step_ends, spans, strict=True)):
        before = tokenizer.decode(bag.input_ids[: position + 1], skip_special_tokens=True)
        assert before == prompt + response[:end]
        assert bag.step_ids[position] == step


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, response=RESPONSES)
def test_a_step_owns_exactly_the_tokens_that_hold_one_of_its_bytes(name, prompt, response):
    tokenizer = TOKENIZERS[name]
    bag = encode_one(prompt, response, tokenizer)
    text = prompt + response
    edges = [(len(prompt) + start, len(prompt) + end) for start, end in lines(response)]
    steps = [set(range(len(text[:start].encode()), len(text[:end].encode()))) for start, end in edges]
    position, expected = 0, []
    for token in tokenizer.convert_ids_to_tokens(bag.input_ids):
        held = range(position, position + (0 if token == "<bos>" else len(token)))  # a character stands for a byte
        owners = [step for step, characters in enumerate(steps) if characters & set(held)]
        expected.append(owners[0] if owners else -1)
        position = held.stop
    assert bag.step_ids == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, response=RESPONSES)
def test_tokens_of_a_shorter_response_begin_those_of_the_longer_one(name, prompt, response):
    whole = encode_one(prompt, response, TOKENIZERS[name])
    for step, (_, end) in enumerate(lines(response)):
        part = encode_one(prompt, response[:end], TOKENIZERS[name])
        assert part.input_ids == whole.input_ids[: whole.step_ends[step] + 1]
        assert part.step_ids == whole.step_ids[: len(part.step_ids)]


def test_a_token_that_would_join_a_step_with_what_follows_is_not_used():
    tokenizer = TOKENIZERS["merges"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a.\n2")["input_ids"]) == ["a", ".Ċ2"]
    bag = encode_one("?", "a.\n2", tokenizer)
    assert tokenizer.convert_ids_to_tokens(bag.input_ids) == ["?", "a", ".", "Ċ", "2"]
    assert bag.step_ids == [-1, 0, 0, -1, 1]
    assert bag.step_ends == [2, 4]


def test_a_token_that_joins_a_gap_with_the_step_after_it_belongs_to_that_step():
    bag = encode_one("?", "a\n3", TOKENIZERS["merges"])
    assert bag.step_ids == [-1, 0, 1]


@pytest.mark.parametrize("name", SPACED)
@given(prompt=st.text(alphabet="ab 12.\n", max_size=10), response=RESPONSES)
def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_a_step(name, prompt, response):
    tokenizer = SPACED[name]
    bag = encode_one(f"b{prompt}", response, tokenizer)
    # The decoder takes the one space before the whole text away again.
    assert tokenizer.decode(bag.input_ids) == f"b{prompt}{response[: lines(response)[-1][1]]}"


@pytest.mark.parametrize("name", SPACED)
def test_such_a_tokenizer_gives_steps_the_tokens_they_have_inside_the_text(name):
    tokenizer = SPACED[name]
    bag = encode_one("a?\n", "a 12.\nb = 12", tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(bag.input_ids)
    assert tokens == ["▁a", "?", "<0x0A>", "a", "▁", "12", ".", "<0x0A>", "b", "▁", "=", "▁", "12"]
    assert bag.step_ids == [-1, -1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1]


def test_special_tokens_stand_once_around_prompt_and_response():
    tokenizer = wordpiece_tokenizer()
    bag = encode_one("2+2?", "2+2=4.\nso 4.", tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(bag.input_ids)
    assert tokens == ["[CLS]", *"2+2?2+2=4.", "s", "##o", "4", ".", "[SEP]"]
    assert [tokens[end] for end in bag.step_ends] == [".", "."]
    assert bag.step_ids[-1] == bag.step_ids[0] == -1
    assert special_affixes(tokenizer) == ([2], [3])
    assert special_affixes(TOKENIZERS["bos"]) == ([2], [])
    assert special_affixes(TOKENIZERS["bytes"]) == ([], [])


def test_a_step_of_which_the_tokenizer_keeps_nothing_still_has_an_end():
    bag = encode_one("2?", "2.\n\u200b\n3.", wordpiece_tokenizer(), [(0, 2), (3, 4), (5, 7)])
    assert bag.kept_steps == 3
    assert bag.step_ends == [4, 4, 6]


@given(response=RESPONSES, data=st.data())
def test_steps_that_do_not_fit_are_left_out_whole(response, data):
    tokenizer = TOKENIZERS["bos"]
    whole = encode_one("ab", response, tokenizer)
    room = data.draw(st.sampled_from(whole.step_ends)) + data.draw(st.integers(0, 2))
    bag = encode_one("ab", response, tokenizer, max_length=room)
    assert bag.num_steps == whole.num_steps
    assert bag.kept_steps == sum(end < room for end in whole.step_ends)
    if bag.kept_steps:
        assert len(bag.input_ids) <= room
        assert bag.input_ids == whole.input_ids[: len(bag.input_ids)]
        assert bag.step_ends == whole.step_ends[: bag.kept_steps]


def test_room_is_kept_for_special_tokens_at_the_end():
    tokenizer = wordpiece_tokenizer()
    length = len(encode_one("2", "3.\n4.", tokenizer).input_ids)
    assert encode_one("2", "3.\n4.", tokenizer, max_length=length).kept_steps == 2
    bag = encode_one("2", "3.\n4.", tokenizer, max_length=length - 1)
    assert bag.kept_steps == 1
    assert tokenizer.convert_ids_to_tokens(bag.input_ids)[-1] == "[SEP]"


def test_the_prompt_template_is_filled_in_literally():
    tokenizer = TOKENIZERS["bytes"]
    template = "Q: {prompt} {x}\nA: "
    bag = encode_one("{1+1}\\n?", "2", tokenizer, prompt_template=template)
    assert tokenizer.decode(bag.input_ids) == "Q: {1+1}\\n? {x}\nA: 2"


def test_a_chat_goes_through_the_chat_template_and_gets_no_other_special_tokens():
    tokenizer = byte_tokenizer(bos=True, chat=True)
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    bag = encode_one(chat, "2", tokenizer, prompt_template="not for chats {prompt}")
    assert tokenizer.decode(bag.input_ids) == "<system>Add.\n<user>1+1?\n<assistant>2"


def test_a_chat_that_ends_with_the_assistant_is_continued():
    tokenizer = byte_tokenizer(chat=True)
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
    assert prompt_text(chat, tokenizer, "{prompt}") == "<user>1+1?\n<assistant>It is"


def test_a_chat_without_a_chat_template_is_named():
    with pytest.raises(ValueError, match=r"The prompts are chats, but the tokenizer .* has no chat template\. Set"):
        prompt_text([{"role": "user", "content": "1+1?"}], byte_tokenizer(), "{prompt}")


def test_no_rows_are_no_bags():
    assert TokenInputs(byte_tokenizer(), FractalSettings()).encode([]) == []


@given(st.lists(RESPONSES, min_size=1, max_size=4))
def test_padding_is_marked_everywhere(responses):
    inputs = TokenInputs(TOKENIZERS["merges"], FractalSettings())
    bags = inputs.encode([Bag("?", response, tuple(lines(response)), None) for response in responses])
    batch, padding = inputs.pad(bags), inputs.tokenizer.pad_token_id
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["step_ids"].shape
    assert batch["mask"].shape == batch["step_ends"].shape
    for row, bag in enumerate(bags):
        length, steps = len(bag.input_ids), bag.kept_steps
        assert batch["input_ids"][row].tolist() == bag.input_ids + [padding] * (batch["input_ids"].size(1) - length)
        assert batch["attention_mask"][row].sum() == length
        assert batch["step_ids"][row, :length].tolist() == bag.step_ids
        assert (batch["step_ids"][row, length:] == -1).all()
        assert batch["step_ends"][row, :steps].tolist() == bag.step_ends
        assert batch["mask"][row].tolist() == [True] * steps + [False] * (batch["mask"].size(1) - steps)
    assert batch["mask"].dtype == torch.bool
