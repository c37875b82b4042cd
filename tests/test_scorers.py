"""Scorers against references computed from full logits, and one pass against scoring every prefix."""

import copy
import math
from typing import Any

import pytest
import torch
from support.models import (
    CAUSAL_FAMILIES,
    byte_tokenizer,
    make_model,
    recomputes_activations,
    reward_model,
    spaced_tokenizer,
)
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, T5Config, T5ForConditionalGeneration

from fractal_rm.data.bag import Bag
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.objectives.bag_loss import bag_loss
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.scorers import likelihood as likelihood_scorer
from fractal_rm.scorers.base import StepScorer
from fractal_rm.scorers.likelihood import LikelihoodScorer
from fractal_rm.scorers.settings import FractalSettings
from fractal_rm.scorers.token import TokenScorer

SCORERS = ("likelihood", "token")
# Ends of steps that a tokenizer would join with what follows; blank lines; multi-byte characters; ragged lengths.
RESPONSES = [
    "3+4=7.\n2 is next.\n\n3*7 = 21.",
    "so x = 12.\n2*12 = 24.\n24 ✓",
    "é.\n字. ##\n  indented.\nlast one.  \n",
    "one step only",
    "\n\nstarts late.\n2.",
]
PROMPT = "What is 3+4? Then go on.\n"


def batch_of(model: StepRewardModel, responses: list[str], prompt: str = PROMPT) -> dict[str, Tensor]:
    bags = [Bag(prompt, response, tuple(model.segmentation(response)), None) for response in responses]
    return model._inputs.pad(model._inputs.encode(bags))


def float64_logits(model: Any, text: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids and full logits of one text, alone, in double precision."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return ids[0], copy.deepcopy(model).double()(input_ids=ids).logits[0]


def step_tokens(prompt: str, response: str) -> list[list[int]]:
    """With one token a byte: places of the tokens of each step, from the text alone."""
    return [
        list(range(len((prompt + response[:start]).encode()), len((prompt + response[:end]).encode())))
        for start, end in Segmentation()(response)
    ]


# One pass against every prefix -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [
        *((family, byte_tokenizer(merges=True)) for family in CAUSAL_FAMILIES),
        ("llama", byte_tokenizer(bos=True)),
        ("llama", spaced_tokenizer()),
    ],
)
@pytest.mark.parametrize("scorer", SCORERS)
def test_one_pass_equals_scoring_every_prefix_separately(scorer, family, tokenizer):
    model = reward_model(scorer, family, tokenizer)
    found = model.score([PROMPT] * len(RESPONSES), RESPONSES)
    steps = [step for whole in found for step in whole.steps]
    prefixes = [whole.response[: step.end] for whole in found for step in whole.steps]
    assert len(steps) == 13
    for step, alone in zip(steps, model.score([PROMPT] * len(steps), prefixes, batch_size=1), strict=True):
        assert (alone.steps[-1].start, alone.steps[-1].end) == (step.start, step.end)
        assert alone.steps[-1].score == pytest.approx(step.score, abs=1e-4)
    # Scores that are all 0, 1 or the same would prove nothing.
    assert torch.tensor([step.score for step in steps]).std() > 0.05


def test_an_encoder_sees_what_follows_a_step():
    model = reward_model("token", "bert")
    whole, part = model.score([PROMPT] * 2, ["3+4=7.\nand more.", "3+4=7."])
    assert abs(whole.steps[0].score - part.steps[0].score) > 1e-4


# Against references ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_token_score_is_read_at_the_token_that_holds_the_last_character(family):
    tokenizer = byte_tokenizer()
    model = reward_model("token", family, tokenizer)
    for response, found in zip(RESPONSES, model.score([PROMPT] * len(RESPONSES), RESPONSES), strict=True):
        _, logits = float64_logits(model.scorer.base, PROMPT + response, tokenizer)
        for places, step in zip(step_tokens(PROMPT, response), found.steps, strict=True):
            probs = logits[:, 0].sigmoid()
            assert step.score == pytest.approx(probs[places[-1]].item(), abs=1e-5)
            neighbours = [probs[place] for place in (places[-1] - 1, places[-1] + 1) if place < len(probs)]
            assert all(abs(step.score - other) > 1e-4 for other in neighbours)


# "gemma2" caps its logits and "granite" divides them: they take the path that keeps the model's own forward.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("family", "plain"), [*((f, True) for f in CAUSAL_FAMILIES), ("gemma2", False), ("granite", False)]
)
def test_a_likelihood_logit_is_the_log_likelihood_of_the_step(family, plain, reduction):
    tokenizer = byte_tokenizer()
    model = reward_model("likelihood", family, tokenizer, log_weight=-1.5, bias=0.7, reduction=reduction)
    with torch.no_grad():
        found = model.scorer(**batch_of(model, RESPONSES))
    assert isinstance(model.scorer, LikelihoodScorer)
    assert model.scorer._plain_head is plain
    for row, response in enumerate(RESPONSES):
        ids, logits = float64_logits(model.scorer.base, PROMPT + response, tokenizer)
        log_probs = logits.log_softmax(dim=-1)
        for step, places in enumerate(step_tokens(PROMPT, response)):
            values = torch.stack([log_probs[place - 1, ids[place]] for place in places])
            expected = math.exp(-1.5) * (values.sum() if reduction == "sum" else values.mean()) + 0.7
            assert found[row, step].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_head_that_scales_is_noticed_while_logits_are_still_small(family):
    model = make_model("likelihood", family, initializer_range=0.001)
    scorer = LikelihoodScorer(model)
    assert not scorer._head_is_plain(torch.tensor([[1, 2, 3, 4, 5]]))
    assert LikelihoodScorer(make_model("likelihood", "llama"))._head_is_plain(torch.tensor([[1]]))


def test_the_probe_leaves_the_model_as_it_was():
    model = make_model("likelihood", "gpt2").train()
    batch = batch_of(reward_model("likelihood", "gpt2"), RESPONSES)
    before = model(input_ids=batch["input_ids"][:1], labels=None).logits.shape
    scorer = LikelihoodScorer(model)
    scorer(**batch)
    assert model.training
    assert not model.get_output_embeddings()._forward_hooks
    assert model(input_ids=batch["input_ids"][:1]).logits.shape == before


def test_the_first_token_of_a_text_counts_for_nothing():
    tokenizer = byte_tokenizer()
    model = reward_model("likelihood", "llama", tokenizer, log_weight=0.0, bias=0.25)
    with torch.no_grad():
        found = model.scorer(**batch_of(model, ["a\nb"], prompt=""))
    assert found[0, 0] == 0.25  # nothing could predict it
    assert found[0, 1] < 0.25


def test_weight_and_bias_are_fitted_from_wherever_they_stand():
    torch.manual_seed(0)
    mask = torch.rand(2, 16, 3) < 0.7
    mask[..., 0] = True
    likelihoods = -10 * torch.rand(2, 16, 3)
    worst = likelihoods.masked_fill(~mask, 0.0).amin(dim=2)
    labels = (worst + torch.randn(2, 16) > -7).float()
    fitted = []
    for weight, bias in ((0.0, 0.0), (-2.0, 3.0)):
        scorer = LikelihoodScorer(make_model("likelihood", "llama"), log_weight=weight, bias=bias)
        logits = math.exp(weight) * likelihoods + bias
        scorer.fit_scale(list(logits), list(labels), list(mask), aggregation="min")
        assert all(parameter.grad is None for parameter in scorer.parameters())
        fitted.append((scorer.log_weight.item(), scorer.bias.item()))
    assert fitted[0] == pytest.approx(fitted[1], abs=1e-2)

    def loss(log_weight: float, bias: float) -> float:
        steps = math.exp(log_weight) * likelihoods.flatten(0, 1) + bias
        fit = bag_loss(steps, labels.flatten(), mask.flatten(0, 1)).mean().item()
        return fit + 1e-3 * log_weight**2 + 1e-4 * bias**2

    grid = [(w, b) for w in torch.arange(-3, 3, 0.1).tolist() for b in torch.arange(-2, 12, 0.25).tolist()]
    assert loss(*fitted[0]) <= min(loss(w, b) for w, b in grid) + 1e-4


def test_weight_and_bias_are_fitted_to_labels_that_are_wrong_as_often_as_is_said():
    torch.manual_seed(0)
    likelihoods, mask = -10 * torch.rand(64, 3), torch.ones(64, 3, dtype=torch.bool)
    labels = (likelihoods.amin(dim=1) > -7).float()
    scorer, noise = LikelihoodScorer(make_model("likelihood", "llama")), (0.3, 0.05)
    logits = (scorer.log_weight.exp() * likelihoods + scorer.bias).detach()
    scorer.fit_scale([logits], [labels], [mask], aggregation="min", label_noise=noise)

    def slope(label_noise: tuple[float, float]) -> float:
        steps = scorer.log_weight.exp() * likelihoods + scorer.bias
        fit = bag_loss(steps, labels, mask, label_noise=label_noise).mean()
        loss = fit + 1e-3 * scorer.log_weight**2 + 1e-4 * scorer.bias**2
        return max(abs(x.item()) for x in torch.autograd.grad(loss, [scorer.log_weight, scorer.bias]))

    assert slope(noise) < 1e-3 < 1e-2 < slope(noise[::-1])


# Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scorer", "family"), [("token", "bert"), *((s, f) for s in SCORERS for f in CAUSAL_FAMILIES)])
def test_what_else_is_in_a_batch_changes_no_score(scorer, family):
    model = reward_model(scorer, family)
    prompts = [PROMPT, "?\n", PROMPT * 3, "Why?\n", PROMPT]
    together = model.score(prompts, RESPONSES, batch_size=len(RESPONSES))
    alone = model.score(prompts, RESPONSES, batch_size=1)
    backwards = model.score(prompts[::-1], RESPONSES[::-1], batch_size=2)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert a.step_scores == pytest.approx(b.step_scores, abs=1e-5)
        assert a.step_scores == pytest.approx(c.step_scores, abs=1e-5)
        assert a.score == pytest.approx(b.score, abs=1e-5)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scrambled_padding_changes_nothing_and_gets_no_gradient(scorer):
    model = reward_model(scorer, "llama")
    batch = batch_of(model, RESPONSES)
    scrambled = dict(batch)
    scrambled["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 9)
    scrambled["step_ends"] = torch.where(batch["mask"], batch["step_ends"], 3)
    mask = batch["mask"]
    assert torch.allclose(model.scorer(**batch)[mask], model.scorer(**scrambled)[mask], atol=1e-6)
    model.scorer(**scrambled)[mask].sum().backward()
    embeddings: Any = model.scorer.base.get_input_embeddings()
    used = batch["input_ids"][batch["attention_mask"] == 1].unique()
    assert 9 not in used
    if scorer == "token":  # there the token is never the target of a prediction either
        assert embeddings.weight.grad[9].abs().sum() == 0
        assert embeddings.weight.grad[used].abs().sum() > 0


def test_permuting_bags_permutes_logits():
    model = reward_model("likelihood", "gpt2")
    batch, order = batch_of(model, RESPONSES), torch.tensor([3, 1, 4, 0, 2])
    permuted = {name: tensor[order] for name, tensor in batch.items()}
    mask = permuted["mask"]
    assert torch.allclose(model.scorer(**batch)[order][mask], model.scorer(**permuted)[mask], atol=1e-6)


# Memory and precision ----------------------------------------------------------------------------------------------


def largest_saved_tensor(scorer: StepScorer, batch: dict[str, Tensor]) -> int:
    """Elements of the largest tensor that a forward keeps for its backward; parameters are there anyway."""
    parameters = {parameter.data_ptr() for parameter in scorer.parameters()}
    sizes = [0]

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scorer(**batch).sum().backward()
    return max(sizes)


def test_no_tensor_with_the_logits_of_all_tokens_is_kept():
    vocabulary = 8192
    model = reward_model("likelihood", "llama", model_options={"vocab_size": vocabulary})
    batch = batch_of(model, RESPONSES * 2)
    step_tokens_in_batch = int((batch["step_ids"] >= 0).sum())
    assert largest_saved_tensor(model.scorer, batch) < step_tokens_in_batch * vocabulary / 20


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_in_chunks_equal_those_of_the_plain_formula(family, monkeypatch):
    monkeypatch.setattr(likelihood_scorer, "CHUNK_TOKENS", 7)
    model = reward_model("likelihood", family)
    batch = batch_of(model, RESPONSES)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    bag_loss(model.scorer(**batch), labels, batch["mask"]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.scorer.named_parameters() if p.grad is not None}
    model.scorer.zero_grad()
    logits = model.scorer.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    own = torch.nn.functional.one_hot(batch["step_ids"][:, 1:] + 1, batch["mask"].size(1) + 1)[..., 1:]
    scorer: Any = model.scorer
    steps = scorer.log_weight.exp() * torch.einsum("bt,bts->bs", log_probs, own.float()) + scorer.bias
    bag_loss(steps, labels, batch["mask"]).sum().backward()
    expected = {name: p.grad for name, p in model.scorer.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == dict(model.scorer.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("scorer", "family"), [("token", "bert"), *((s, f) for s in SCORERS for f in CAUSAL_FAMILIES)])
def test_bfloat16_scores_are_near_those_of_float32(scorer, family):
    model = reward_model(scorer, family)
    exact = model.score([PROMPT] * len(RESPONSES), RESPONSES)
    model.scorer.model.to(torch.bfloat16)
    logits = model.scorer(**batch_of(model, RESPONSES))
    assert logits.dtype == torch.float32
    for a, b in zip(exact, model.score([PROMPT] * len(RESPONSES), RESPONSES), strict=True):
        assert a.step_scores == pytest.approx(b.step_scores, abs=0.05)


@pytest.mark.parametrize("scorer", SCORERS)
def test_gradient_checkpointing_gives_the_same_gradients(scorer):
    model = reward_model(scorer, "llama")
    batch = batch_of(model, RESPONSES)
    model.scorer.train()
    gradients = []
    # Names of two versions of transformers, of which the older one is deprecated in the newer.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(name for name in names if hasattr(model.scorer.base, name))
    for _ in range(2):
        torch.manual_seed(0)  # dropout
        model.scorer.zero_grad()
        model.scorer(**batch).sum().backward()
        gradients.append([p.grad.clone() for p in model.scorer.parameters() if p.grad is not None])
        getattr(model.scorer, enable)()
    assert recomputes_activations(model.scorer.base)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# Models of another kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        AutoModelForMaskedLM.from_config(BertConfig(num_hidden_layers=1, vocab_size=9, hidden_size=12)),
        make_model("token", "llama"),
        T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=8, d_kv=4, num_heads=2, vocab_size=9)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_likelihood_scorer_refuses_what_is_no_causal_language_model(model):
    with pytest.raises(ValueError, match=f"The likelihood scorer got a {type(model).__name__}. Load the model with"):
        LikelihoodScorer(model)


@pytest.mark.parametrize(
    ("model", "labels"), [(make_model("likelihood", "llama", num_labels=1), 1), (make_model("likelihood", "gpt2"), 2)]
)
def test_the_token_scorer_refuses_what_has_no_head_with_one_output(model, labels):
    with pytest.raises(ValueError, match=f"The token scorer got a {type(model).__name__} with {labels} labels"):
        TokenScorer(model)


def test_a_scorer_that_is_none_says_so():
    with pytest.raises(TypeError, match="Use one of its subclasses"):
        StepScorer(torch.nn.Linear(1, 1))(**batch_of(reward_model("token", "llama"), RESPONSES))


@pytest.mark.parametrize(("name", "value"), [("scorer", "window"), ("aggregation", "median"), ("reduction", "max")])
def test_a_setting_that_does_not_exist_is_named(name, value):
    with pytest.raises(ValueError, match=rf"Unknown {name} '{value}'. Choose one of "):
        FractalSettings(**{name: value})


def test_a_prompt_template_without_the_prompt_is_named():
    with pytest.raises(ValueError, match=r"without a place for the prompt. Write `{prompt}` in it"):
        FractalSettings(prompt_template="Q:")
