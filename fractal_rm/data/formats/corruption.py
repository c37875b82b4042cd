"""Turn good summaries into bad ones with a text generator: FRACTAL's recipe for WikiCatSum and AquaMuSe."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import gaps
from fractal_rm.data.sentences import sentences

Generate = Callable[[str], str]

# Share of the bad summaries that get other words instead of other sentences: 2,000 of 7,500 in FRACTAL's code.
WORD_SHARE = 4 / 15
# How often a generator that changes nothing is asked again: models repeat what they have read.
ATTEMPTS = 4

MASK = "[MASK]"
_WORD = re.compile(r"[^\W_]+(?:[-'’.,][^\W_]+)*")  # noqa: RUF001 - the apostrophe of typeset text


def corrupt_summaries(bags: Sequence[Bag], generate: Generate, *, seed: int = 0) -> list[Bag]:
    """Half of the summaries, some of their sentences or words replaced by what a generator writes.

    Of half of the bags, drawn by the seed, some have 1 to n/2 of their n sentences replaced (never the first: the
    generator sees what stands before), the others 1 to n/5 of their n content words, one at a time in its context. A
    step is 0 iff its text changed, and a response is 1 iff no step did: whatever the generator writes, labels are true.

    Args:
        bags: Good summaries (label 1), as `read_wikicatsum` and `read_aquamuse` give them.
        generate: Answers a prompt with a text, such as a call of a language model. Of the answer, the first sentence or
            the first word is taken.
        seed: Draws summaries, sentences and words; with the same seed and a generator that gives the same answers, the
            result is the same.

    Returns:
        The bags in order. One for which the generator repeats the old text each time stays good.

    Raises:
        TypeError: If the generator gives no text.
        ValueError: If a bag is not good, or the generator's answers stay empty.

    Source:
        FRACTAL (Makhija et al., ACL 2025) with PaLM 2; this follows its description, with prompts of our own. It takes
        nouns, verbs and numbers as content words and has all masked words filled in one answer. Here they are the words
        that are not among scikit-learn's English stop words, filled one by one, so that nothing else can change.

    Example:
        >>> bag = Bag("owls", "Owls hunt. They fly.", ((0, 10), (11, 20)), 1.0, (1.0, 1.0))
        >>> for bag in corrupt_summaries([bag, bag], lambda prompt: "Cats sleep.", seed=7):
        ...     print(bag.response, bag.step_labels)
        Owls hunt. They fly. (1.0, 1.0)
        Owls hunt. Cats sleep. (1.0, 0.0)
    """
    for number, bag in enumerate(bags, 1):
        if bag.label != 1:
            raise ValueError(f"bag {number} has the label {bag.label}, not 1; give good summaries only.")
    bad = set(random.Random(seed).sample(range(len(bags)), len(bags) // 2))
    # Each bag draws by itself, so what the generator answers for one does not touch the others.
    return [_corrupt(bag, generate, random.Random(f"{seed}-{n}")) if n in bad else bag for n, bag in enumerate(bags)]


def _corrupt(bag: Bag, generate: Generate, draw: random.Random) -> Bag:
    old = bag.steps
    by_words = draw.random() < WORD_SHARE
    around = gaps(bag.response, bag.step_spans)
    if by_words or len(old) < 2:
        new = _replace_words(old, around, generate, draw)
    else:
        new = _replace_sentences(old, generate, draw)
    spans, response = [], around[0]
    for step, gap in zip(new, around[1:], strict=True):
        spans.append((len(response), len(response) + len(step)))
        response += step + gap
    gold = tuple(float(_same(before, after)) for before, after in zip(old, new, strict=True))
    return replace(bag, response=response, step_spans=tuple(spans), label=min(gold), step_labels=gold)


def _replace_sentences(old: Sequence[str], generate: Generate, draw: random.Random) -> list[str]:
    new = list(old)
    for index in sorted(draw.sample(range(1, len(old)), draw.randint(1, len(old) // 2))):
        before = " ".join(new[:index])
        prompt = f"{before}\n\nContinue this text with one more sentence. Answer with that sentence only."
        new[index] = _other(old[index], prompt, generate, _first_sentence)
    return new


def _replace_words(old: Sequence[str], around: Sequence[str], generate: Generate, draw: random.Random) -> list[str]:
    words = [(index, match) for index, step in enumerate(old) for match in _WORD.finditer(step) if _content(match[0])]
    if not words:
        return list(old)
    count = draw.randint(1, max(1, len(words) // 5))
    chosen = sorted(draw.sample(range(len(words)), count))
    filled: dict[int, str] = {}
    for number in chosen:
        masked = _with_words(old, words, dict.fromkeys(chosen, MASK) | filled)
        text = around[0] + "".join(step + gap for step, gap in zip(masked, around[1:], strict=True))
        prompt = f"{text}\n\nWhich word could stand for the first {MASK} in this text? Answer with that word only."
        filled[number] = _other(words[number][1][0], prompt, generate, _first_word)
    return _with_words(old, words, filled)


def _with_words(old: Sequence[str], words: Sequence[tuple[int, re.Match[str]]], filled: dict[int, str]) -> list[str]:
    """The steps with some of their words replaced; the last first, so that places of the others stay."""
    new = list(old)
    for number in sorted(filled, reverse=True):
        index, match = words[number]
        new[index] = new[index][: match.start()] + filled[number] + new[index][match.end() :]
    return new


def _other(old: str, prompt: str, generate: Generate, take: Callable[[str], str]) -> str:
    """What the generator gives instead of the old text; the old text itself if it insists on it."""
    answered = False
    for _ in range(ATTEMPTS):
        answer = generate(prompt)
        if not isinstance(answer, str):
            raise TypeError(f"The generator gave {type(answer).__name__}, not text; make it return a text.")
        new = take(answer)
        answered = answered or bool(new)
        if new and not _same(new, old):
            return new
    if not answered:
        raise ValueError(f"The generator gave nothing usable in {ATTEMPTS} attempts; check what it answers.")
    return old


def _first_sentence(answer: str) -> str:
    text = " ".join(answer.split())
    spans = sentences(text)
    return text[spans[0][0] : spans[0][1]] if spans else ""


def _first_word(answer: str) -> str:
    found = _WORD.search(answer.replace(MASK, " "))
    return found[0] if found else ""


def _content(word: str) -> bool:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return word.lower() not in ENGLISH_STOP_WORDS and (len(word) > 1 or word.isdigit())


def _same(one: str, other: str) -> bool:
    """Whether two texts differ in nothing but white space and case."""
    return one.casefold().split() == other.casefold().split()
