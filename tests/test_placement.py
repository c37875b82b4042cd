"""Placement on tokens of real tokenizers, against decoding every prefix, byte counts and plain loops."""

import functools
import random
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fractal_rm.credit.placement import (
    completion_text,
    place_outcome,
    place_step_rewards,
    placeable_ends,
    step_end_tokens,
    token_end_characters,
)

CORPUS = [
    "First add three and four: 3 + 4 = 7.\nThen double it: 2 * 7 = 14.",
    "The answer is 14 😀.\nNaïve café, 価格は3€です。",
    "Don't stop; we can't (yet) be sure, can we?",
] * 4


@functools.cache
def byte_level():
    """As GPT-2, Llama 3 and Qwen: any byte is a token, so an emoji is up to four of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", "<think>"]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@functools.cache
def metaspace():
    """As Llama 2: spaces are `▁`, the leading one is stripped, unknown characters fall back to byte tokens."""
    vocab = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab += ["▁", *dict.fromkeys("".join(CORPUS[:1] + CORPUS[2:3]).replace(" ", "").replace("\n", ""))]
    merges = [("▁", "t"), ("▁", "a"), ("▁a", "n"), ("▁an", "d"), ("o", "u"), ("▁", "▁")]
    vocab += [a + b for a, b in merges]
    ids = {token: i for i, token in enumerate(vocab)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@functools.cache
def word_piece():
    """As BERT: the decoder writes spaces between words and takes them away before punctuation."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        [line.lower() for line in CORPUS],
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", cls_token="[CLS]"
    )


@functools.cache
def python_bytes():
    """As ByT5: written in Python, every byte a token; bytes that are no character vanish from the text."""
    return ByT5Tokenizer(extra_ids=2)


TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace, "word_piece": word_piece, "python_bytes": python_bytes}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
texts = st.text(alphabet="abot 34+=.\n'é€価😀👩\u200d", max_size=30)
id_lists = st.lists(st.integers(0, 10_000), max_size=40)


def sampled(numbers, tokenizer):
    """Ids as a policy may sample them: of the whole vocabulary, and one beyond it where the tokenizer is fast."""
    return [number % (len(tokenizer) + tokenizer.is_fast) for number in numbers]


def written(ids, tokenizer):
    """Which ids are text: not the ending, and not padding that is not an ending as well."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    stop = max((at + 1 for at, token in enumerate(ids) if token not in (eos, pad)), default=0)
    return [at < stop and (token != pad or pad == eos) for at, token in enumerate(ids)]


def decoded(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def ends_by_definition(ids, tokenizer):
    """Decode every prefix and compare it with the whole, character by character."""
    is_text = written(ids, tokenizer)
    text_ids = [token for token, keep in zip(ids, is_text, strict=True) if keep]
    full = decoded(text_ids, tokenizer)
    ends = [0]
    for t in range(len(text_ids)):
        prefix = decoded(text_ids[: t + 1], tokenizer).rstrip("\ufffd")
        shared = 0
        while shared < min(len(prefix), len(full)) and prefix[shared] == full[shared]:
            shared += 1
        ends.append(len(full) if t == len(text_ids) - 1 else max(shared, ends[-1]))
    return [ends[sum(is_text[: t + 1])] for t in range(len(ids))]


def token_id(tokenizer, token) -> int:
    return tokenizer.get_vocab()[token]


def byte_symbols():
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def cut_lines(text):
    return [match.span() for match in re.finditer(r"[^\s](?:[^\n]*[^\s])?", text)]


@every_tokenizer
@given(numbers=id_lists)
def test_random_ids_end_where_decoding_every_prefix_says(name, numbers):
    tokenizer = TOKENIZERS[name]()
    ids = sampled(numbers, tokenizer)
    assert token_end_characters(ids, tokenizer) == ends_by_definition(ids, tokenizer)


@every_tokenizer
@given(text=texts, eos=st.integers(0, 3))
def test_encoded_text_ends_where_decoding_every_prefix_says(name, text, eos):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * eos
    assert token_end_characters(ids, tokenizer) == ends_by_definition(ids, tokenizer)


@every_tokenizer
def test_a_long_response_of_repeated_text_ends_where_decoding_every_prefix_says(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("\n".join(CORPUS) + " ...  ''n't", add_special_tokens=False)
    assert len(ids) > 200
    assert token_end_characters(ids, tokenizer) == ends_by_definition(ids, tokenizer)


@given(text=texts, seed=st.integers(0, 99))
@example(text="abo 😀 the and", seed=0)
def test_ends_count_the_characters_whose_bytes_are_all_there_however_a_word_is_spelt(text, seed):
    tokenizer = byte_level()
    ids, sizes, rest, rng = [], [], text.encode(), random.Random(seed)
    byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    pieces = {
        bytes(byte_of[symbol] for symbol in token): i
        for token, i in tokenizer.get_vocab().items()
        if i not in tokenizer.added_tokens_decoder
    }
    while rest:  # any token that fits, so rarely the canonical sequence
        piece = rng.choice([piece for piece in pieces if rest.startswith(piece)])
        ids.append(pieces[piece])
        sizes.append(len(piece))
        rest = rest[len(piece) :]
    assert completion_text(ids, tokenizer) == text
    known, expected = 0, []
    for size in sizes:
        known += size
        expected.append(len(text.encode()[:known].decode(errors="ignore")))
    assert token_end_characters(ids, tokenizer) == expected


def test_an_emoji_is_complete_with_its_last_token():
    tokenizer = byte_level()
    ids = [token_id(tokenizer, byte_symbols()[byte]) for byte in "a👩b".encode()]
    assert len(ids) == 6
    assert token_end_characters(ids, tokenizer) == [1, 1, 1, 1, 2, 3]


def test_a_word_spelt_by_single_letters_is_placed_on_its_last_letter():
    tokenizer = byte_level()
    ids = [token_id(tokenizer, letter) for letter in "answer"]
    assert ids != tokenizer.encode("answer")
    ends = token_end_characters(ids, tokenizer)
    assert step_end_tokens(ends, [(0, 3), (3, 6)]) == [2, 5]


def test_bytes_that_never_become_a_character_end_with_the_last_token_of_text():
    tokenizer = byte_level()
    first_bytes = [token_id(tokenizer, byte_symbols()[byte]) for byte in "7👩".encode()[:3]]
    ids = [*first_bytes, tokenizer.eos_token_id, tokenizer.pad_token_id]
    text = completion_text(ids, tokenizer)
    assert text == "7\ufffd"
    ends = token_end_characters(ids, tokenizer)
    assert ends == [1, 1, 2, 2, 2]
    assert step_end_tokens(ends, [(0, len(text))]) == [2]


def test_valid_bytes_in_an_invalid_run_of_byte_tokens_are_no_character():
    tokenizer = metaspace()
    run = [token_id(tokenizer, f"<0x{byte:02X}>") for byte in "€".encode() + b"\xff"]
    ids = [*run, token_id(tokenizer, "t")]
    assert completion_text(ids, tokenizer) == "\ufffd" * 4 + "t"  # yet the first three alone decode to the euro sign
    assert token_end_characters(ids, tokenizer) == [0, 0, 0, 0, 5]


def test_a_character_begun_in_a_run_of_byte_tokens_leaves_those_before_it_complete():
    tokenizer = metaspace()
    ids = [token_id(tokenizer, f"<0x{byte:02X}>") for byte in "€価".encode()]
    assert completion_text(ids[:4], tokenizer) == "\ufffd" * 4
    assert token_end_characters(ids, tokenizer) == [0, 0, 1, 1, 1, 2]


def test_the_stripped_leading_space_shifts_no_end():
    tokenizer = metaspace()
    ids = tokenizer.encode("and the", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁and", "▁t", "h", "e"]
    assert token_end_characters(ids, tokenizer) == [3, 5, 6, 7]


@every_tokenizer
@given(numbers=id_lists, where=st.lists(st.integers(0, 40), max_size=5), eos=st.integers(0, 2))
def test_padding_anywhere_and_the_ending_add_nothing_and_hold_no_step(name, numbers, where, eos):
    tokenizer = TOKENIZERS[name]()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = [i for i in sampled(numbers, tokenizer) if i not in tokenizer.all_special_ids]
    mixed = list(ids)
    for position in where:
        mixed.insert(position % (len(mixed) + 1), tokenizer.pad_token_id)
    mixed += [tokenizer.eos_token_id] * eos
    text = completion_text(mixed, tokenizer)
    assert text == completion_text(ids, tokenizer)
    ends = token_end_characters(mixed, tokenizer)
    special = set(tokenizer.all_special_ids)
    kept = [end for end, i in zip(ends, mixed, strict=True) if i not in special]
    assert kept == token_end_characters(ids, tokenizer)
    placed = step_end_tokens(ends, cut_lines(text))
    assert all(token is not None and mixed[token] not in special for token in placed)


@every_tokenizer
def test_special_tokens_alone_are_an_empty_response(name):
    tokenizer = TOKENIZERS[name]()
    assert token_end_characters([], tokenizer) == []
    assert token_end_characters([tokenizer.eos_token_id, tokenizer.pad_token_id], tokenizer) == [0, 0]
    assert step_end_tokens([], [(0, 1)]) == [None]


def test_special_tokens_are_text_as_the_policy_wrote_them():
    tokenizer = byte_level()
    think, a, b = (token_id(tokenizer, token) for token in ("<think>", "a", "b"))
    ids = [think, a, tokenizer.eos_token_id, b, think, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert completion_text(ids, tokenizer) == "<think>a<eos>b<think>"
    assert token_end_characters(ids, tokenizer) == [7, 8, 13, 14, 21, 21, 21]
    several = {think, tokenizer.eos_token_id, tokenizer.pad_token_id}  # a model may have several ids that end a text
    assert completion_text(ids, tokenizer, several) == "<think>a<eos>b"
    assert token_end_characters(ids, tokenizer, None, several) == [7, 8, 13, 14, 14, 14, 14]


@every_tokenizer
@given(text=texts, keep=st.integers(1, 60), eos=st.booleans())
def test_every_step_of_a_truncated_response_lies_on_the_token_with_its_last_character(name, text, keep, eos):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(f"{text}\n{text}", add_special_tokens=False)[:keep] + [tokenizer.eos_token_id] * eos
    full = completion_text(ids, tokenizer)
    spans = cut_lines(full)
    ends = token_end_characters(ids, tokenizer)
    assert ends == sorted(ends)
    placed = step_end_tokens(ends, spans)
    for (_, end), token in zip(spans, placed, strict=True):
        assert token is not None
        assert ends[token] >= end
        assert token == 0 or ends[token - 1] < end


class CountingDecoder:
    """A real tokenizer that counts how many ids it is asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0
        self.eos_token_id, self.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id

    def convert_ids_to_tokens(self, token_ids):
        return self.tokenizer.convert_ids_to_tokens(token_ids)

    def decode(self, token_ids, skip_special_tokens=False, **options):
        self.decoded += len(token_ids)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **options)


@every_tokenizer
def test_the_cost_grows_linearly_with_the_length(name):
    counting = CountingDecoder(TOKENIZERS[name]())
    ids = counting.tokenizer.encode(" ".join(CORPUS * 4), add_special_tokens=False)
    token_end_characters(ids, counting)
    assert counting.decoded < 25 * len(ids)  # every prefix would be more than 400 times the length


@every_tokenizer
@pytest.mark.parametrize("kind", ["bytes", "any", "mixed"])
def test_the_cost_of_garbage_grows_linearly_with_the_length(name, kind):
    counting, rng = CountingDecoder(TOKENIZERS[name]()), random.Random(0)
    vocabulary = len(counting.tokenizer)
    ids = [rng.randrange(vocabulary) for _ in range(2048)]
    if kind != "any":
        parts = [i for i in range(vocabulary) if "\ufffd" in decoded([i], counting.tokenizer)] or ids
        ids = [rng.choice(parts) if kind == "bytes" or rng.random() < 0.5 else i for i in ids]
    ends = token_end_characters(ids, counting)
    assert counting.decoded < 60 * len(ids)  # every prefix would be a thousand times the length
    assert ends == sorted(ends)
    assert ends[-1] == len(completion_text(ids, counting))
    head = ids[:200]
    assert token_end_characters(head, counting) == ends_by_definition(head, counting.tokenizer)


def test_with_the_pieces_kept_a_second_completion_costs_one_decoding_of_its_text():
    counting, pieces = CountingDecoder(byte_level()), {}
    ids = counting.tokenizer.encode(CORPUS[0], add_special_tokens=False)
    first = token_end_characters(ids, counting, pieces)
    counting.decoded = 0
    assert token_end_characters(ids, counting, pieces) == first == ends_by_definition(ids, counting.tokenizer)
    assert counting.decoded == len(ids)


@given(
    ends=st.lists(st.integers(0, 12), max_size=10).map(sorted),
    spans=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=4),
)
def test_a_step_ends_at_the_first_token_that_reaches_its_last_character(ends, spans):
    expected = [
        next((t for t, reached in enumerate(ends) if reached >= end), None) if end > start else None
        for start, end in spans
    ]
    assert step_end_tokens(ends, spans) == expected


@st.composite
def placements(draw):
    width, rows = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows))
    step = st.tuples(st.floats(-5, 5, width=32), st.none() | st.integers(0, width + 1))
    steps = draw(st.lists(st.lists(step, max_size=6), min_size=rows, max_size=rows))
    rewards, ends = [[r for r, _ in row] for row in steps], [[e for _, e in row] for row in steps]
    return rewards, ends, torch.tensor(mask)


@given(placements())
def test_placed_rewards_are_those_of_a_plain_loop(batch):
    rewards, ends, mask = batch
    placement = place_step_rewards(rewards, ends, mask)
    expected, unplaced = torch.zeros(mask.shape), 0
    for row in range(len(mask)):
        for value, end in zip(rewards[row], ends[row], strict=True):
            if end is None or end >= mask.shape[1] or not mask[row, end]:
                unplaced += 1
            else:
                expected[row, end] += value
    torch.testing.assert_close(placement.rewards, expected)
    assert placement.unplaced == unplaced == sum(end is None for row in placement.step_ends for end in row)


@given(placements())
def test_rewards_sum_to_the_placed_step_rewards_and_padding_gets_none(batch):
    rewards, ends, mask = batch
    placement = place_step_rewards(rewards, ends, mask.int())
    sums = [
        sum(value for value, end in zip(*row, strict=True) if end is not None)
        for row in zip(rewards, placement.step_ends, strict=True)
    ]
    torch.testing.assert_close(placement.rewards.sum(dim=1), torch.tensor(sums, dtype=torch.float32))
    assert not placement.rewards[~mask].any()


@given(placements(), st.randoms())
def test_permuting_rows_permutes_the_rewards(batch, rng):
    rewards, ends, mask = batch
    order = rng.sample(range(len(mask)), len(mask))
    permuted = place_step_rewards([rewards[i] for i in order], [ends[i] for i in order], mask[order])
    torch.testing.assert_close(permuted.rewards, place_step_rewards(rewards, ends, mask).rewards[order])


@every_tokenizer
@given(rows=st.lists(id_lists, min_size=1, max_size=4))
def test_all_steps_of_sampled_responses_are_placed_and_their_rewards_are_kept(name, rows):
    tokenizer = TOKENIZERS[name]()
    batch = [sampled(numbers, tokenizer) for numbers in rows]
    width = max(map(len, batch)) + 2
    mask = torch.tensor([[t < len(ids) for t in range(width)] for ids in batch])
    spans = [cut_lines(completion_text(ids, tokenizer)) for ids in batch]
    ends = [step_end_tokens(token_end_characters(ids, tokenizer), row) for ids, row in zip(batch, spans, strict=True)]
    rewards = [[0.25 * (i + 1) for i in range(len(row))] for row in spans]
    placement = place_step_rewards(rewards, ends, mask)
    assert placement.unplaced == 0
    assert placement.rewards.sum(dim=1).tolist() == [sum(row) for row in rewards]
    assert not placement.rewards[~mask].any()


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5), st.floats(-3, 3, width=32))
def test_an_outcome_lies_on_the_last_real_token(rows, reward):
    mask = torch.tensor(rows)
    placed = place_outcome(torch.full((len(rows),), reward), mask)
    for row, real in enumerate(rows):
        last = max((t for t in range(6) if real[t]), default=None)
        assert placed[row].tolist() == [reward if t == last else 0.0 for t in range(6)]


def test_an_undefined_outcome_of_one_response_stays_in_its_row():
    placed = place_outcome(torch.tensor([float("nan"), 2.0]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert placed[0].isnan().tolist() == [False, True, False]
    assert placed[1].tolist() == [2.0, 0.0, 0.0]


def test_a_batch_without_tokens_has_no_rewards():
    empty = torch.zeros(2, 0, dtype=torch.bool)
    assert place_outcome(torch.ones(2), empty).shape == (2, 0)
    assert place_step_rewards([[1.0], []], [[0], []], empty).unplaced == 1


@pytest.mark.parametrize(
    ("rewards", "ends", "sentence"),
    [
        ([[1.0]], [[0], [1]], "Step rewards have 1 rows, step ends have 2"),
        ([[1.0], [1.0, 2.0]], [[0], [1]], "Row 1 has 2 step rewards and 1 step ends"),
        ([[1.0], [float("nan")]], [[0], [1]], "Row 1 has a step reward that is not a finite number"),
        ([[1.0], [1.0]], [[0], [-1]], "A step of row 1 ends at a negative token"),
        ([[1.0]], [[0]], "Step ends have 1 rows, the completion mask has 2"),
    ],
)
def test_step_rewards_that_do_not_fit_are_named(rewards, ends, sentence):
    with pytest.raises(ValueError, match=sentence):
        place_step_rewards(rewards, ends, torch.ones(2, 3, dtype=torch.bool))


def test_ends_on_padding_beyond_the_tensor_or_unknown_are_not_placeable():
    mask = torch.tensor([[True, False, True]])
    assert placeable_ends([[0, 1, 2, 3, None]], mask) == [[0, None, 2, None, None]]
