"""What priors hold steps to: right by hand, in the order of the bags, and unknown where nothing is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import make_model
from support.stand_ins import byte_tokenizer, save_encoder, save_policy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fractal_rm.data.bag import Bag
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.prior_targets import prior_targets
from fractal_rm.scorers.sentence_encoder import SentenceEncoder


def bag(prompt: Any, steps: list[str], **options: Any) -> Bag:
    response, spans, place = "\n".join(steps), [], 0
    for step in steps:
        spans.append((place, place + len(step)))
        place += len(step) + 1
    return Bag(prompt, response, tuple(spans), **{"label": 1.0} | options)


BAGS = [
    bag("1+1?\n", ["1+1=2.", "so 2."]),
    bag("what is 3?\n", ["what is 3?"]),
    bag("4?\n", ["4.", "or 5.", "no 4."]),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> SentenceEncoder:
    return SentenceEncoder(save_encoder(tmp_path_factory.mktemp("encoder")), cache_dir="")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def targets(bags: list[Bag], processor: Any = None, *, model: Any = None, **options: Any) -> dict[str, list[Tensor]]:
    args = FractalConfig(output_dir="unused", use_cpu=True, **options)
    return prior_targets(bags, args, model=model, processor=processor)


def embedded(encoder: SentenceEncoder, texts: list[str]) -> np.ndarray:
    return encoder.embed(texts).double().numpy()


def test_no_weight_no_target(encoder):
    assert targets(BAGS, encoder) == {}


def test_the_cosine_prior_likes_what_is_close_to_the_prompt(encoder):
    found = targets(BAGS, encoder, cosine_prior_weight=0.1, negated_cosine_prior_weight=0.1)
    for example, plain, negated in zip(BAGS, found["cosine"], found["negated_cosine"], strict=True):
        prompt, *steps = embedded(encoder, [example.prompt, *example.steps])
        cosines = [step @ prompt / np.linalg.norm(step) / np.linalg.norm(prompt) for step in steps]
        assert plain.tolist() == pytest.approx([(1 + cosine) / 2 for cosine in cosines], abs=1e-5)
        assert negated.tolist() == pytest.approx([(1 - cosine) / 2 for cosine in cosines], abs=1e-5)
    assert found["cosine"][1].item() == pytest.approx(1.0, abs=1e-4)  # the step repeats the prompt
    assert found["negated_cosine"][1].item() == pytest.approx(0.0, abs=1e-4)


def test_the_cosine_prior_takes_the_closest_part_of_a_long_prompt(encoder):
    parts = [" ".join([word] * 160) + "." for word in ("rivers", "4 7 9")]
    (found,) = targets([bag(" ".join(parts), parts)], encoder, cosine_prior_weight=0.1)["cosine"]
    assert found.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_the_correlation_prior_is_pearsons(encoder):
    found = targets(BAGS, encoder, correlation_prior_weight=0.1)["correlation"]
    for example, matrix in zip(BAGS, found, strict=True):
        expected = (1 + np.corrcoef(embedded(encoder, example.steps))) / 2
        assert np.allclose(matrix.numpy(), np.atleast_2d(expected), atol=1e-5)


def test_the_encoder_of_the_priors_may_be_another_one(encoder, tmp_path):
    other = save_encoder(tmp_path, seed=7)
    options = {"cosine_prior_weight": 0.1, "embedding_cache": ""}
    named = targets(BAGS, encoder, prior_encoder=other, **options)["cosine"]
    direct = targets(BAGS, SentenceEncoder(other, cache_dir=""), **options)["cosine"]
    own = targets(BAGS, encoder, **options)["cosine"]
    assert all(map(torch.equal, named, direct))
    assert not any(map(torch.equal, named[:1], own[:1]))
    token = targets(BAGS, byte_tokenizer(), prior_encoder=other, scorer="token", **options)["cosine"]
    assert all(map(torch.equal, token, direct))


def test_a_scorer_without_an_encoder_needs_one_for_the_priors():
    for weight in ("cosine_prior_weight", "negated_cosine_prior_weight", "correlation_prior_weight"):
        with pytest.raises(ValueError, match=r"need a sentence encoder, but the scorer has none\. Set `prior_encoder`"):
            targets(BAGS, byte_tokenizer(), **{weight: 0.1})


def test_teacher_scores_are_taken_as_they_are_and_unknown_ones_are_left_out():
    rows = [bag("1?", ["a.", "b."], teacher_scores=(0.25, None)), bag("2?", ["c."])]
    found = targets(rows, teacher_prior_weight=0.1)["teacher"]
    assert found[0][0] == 0.25
    assert found[0][1].isnan()
    assert found[1].isnan().all()
    with pytest.raises(ValueError, match=r"The teacher prior found no step scores .* Add a column `teacher_scores`"):
        targets(rows[1:], teacher_prior_weight=0.1)


def mean_log_probs(policy: str, example: Bag) -> list[float]:
    """By hand, step by step, from plain transformers: a byte is a token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    ids = torch.tensor(tokenizer(example.prompt + example.response)["input_ids"])
    with torch.no_grad():
        log_probs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
    start = len(example.prompt)
    places = [range(start + a, start + b) for a, b in example.step_spans]
    return [float(np.mean([log_probs[i - 1, ids[i]].item() for i in steps])) for steps in places]


def test_the_likelihood_prior_is_a_sigmoid_of_standardised_mean_log_probabilities(policy):
    found = targets(BAGS, byte_tokenizer(), likelihood_prior_weight=0.1, scorer="token", reference_model=policy)
    rows = [mean_log_probs(policy, example) for example in BAGS]
    values = np.concatenate(rows)
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    for row, target in zip(rows, found["likelihood"], strict=True):
        expected = 1 / (1 + np.exp(-(np.array(row) - median) / ((high - low) / 1.349)))
        assert target.tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_reference_of_a_likelihood_scorer_is_the_model_before_training(policy):
    options = {"likelihood_prior_weight": 0.1}
    own = targets(BAGS, byte_tokenizer(), model=policy, **options)["likelihood"]
    named = targets(BAGS, byte_tokenizer(), model="elsewhere", reference_model=policy, **options)["likelihood"]
    assert all(map(torch.equal, own, named))


def test_steps_that_the_reference_cannot_read_have_no_target(policy):
    """It has 1,024 positions."""
    long = bag("1?\n", ["short.", "x" * 1100, "end."])
    found = targets([*BAGS, long], None, likelihood_prior_weight=0.1, reference_model=policy, scorer="token")
    last = found["likelihood"][-1]
    assert last.isnan().tolist() == [False, True, True]
    assert not any(row.isnan().any() for row in found["likelihood"][:-1])


def test_the_likelihood_prior_needs_a_model_to_ask():
    for scorer, model in (("likelihood", make_model("likelihood", "llama")), ("token", "a-path")):
        with pytest.raises(ValueError, match=r"needs a causal language model\. Set `reference_model`"):
            targets(BAGS, byte_tokenizer(), model=model, scorer=scorer, likelihood_prior_weight=0.1)


def test_the_reference_model_may_be_a_path(policy):
    found = targets(BAGS, None, model=Path(policy), likelihood_prior_weight=0.1)
    assert [len(row) for row in found["likelihood"]] == [2, 1, 3]
