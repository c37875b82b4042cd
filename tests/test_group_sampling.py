"""Several responses to each prompt, against `generate` and against the probabilities of the model."""

from types import SimpleNamespace

import pytest
import torch
from support.models import CAUSAL_FAMILIES, byte_tokenizer, config
from transformers import AutoModelForCausalLM, AutoTokenizer

from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import make_problems
from fractal_rm.tasks.group_sampling import rollout_in_groups, sample_groups
from fractal_rm.tasks.task import sample_responses


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(SHIPPED_POLICY), AutoTokenizer.from_pretrained(SHIPPED_POLICY)


def test_greedy_responses_are_those_of_generate(policy):
    model, tokenizer = policy
    prompts = [p.prompt for p in make_problems(20, seed=1, min_steps=2, max_steps=7)]
    found = sample_groups(model, tokenizer, prompts, samples=2, greedy=True)
    expected = sample_responses(model, tokenizer, prompts, greedy=True)
    assert found == [[text, text] for text in expected]
    assert len({len(text) for text in expected}) > 3  # responses left the batch at different times


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_greedy_responses_are_those_of_generate_in_other_families(family):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, vocab_size=len(tokenizer)))
    prompts = ["a", "a longer prompt", "one more"]
    found = sample_groups(model, tokenizer, prompts, samples=1, greedy=True, max_new_tokens=12)
    assert [text for (text,) in found] == sample_responses(model, tokenizer, prompts, greedy=True, max_new_tokens=12)


def test_samples_follow_the_models_probabilities(policy):
    model, tokenizer = policy
    prompt = make_problems(1, seed=2)[0].prompt
    texts = sample_groups(model, tokenizer, [prompt, prompt + "\n"], samples=1500, max_new_tokens=6, seed=3)[0]
    others = sample_responses(model, tokenizer, [prompt] * 1500, max_new_tokens=6, seed=4)
    for text in set(others):
        assert abs(texts.count(text) - others.count(text)) / 1500 < 0.06


def test_a_seed_gives_the_same_responses_and_leaves_the_global_generator(policy):
    model, tokenizer = policy
    prompts = [p.prompt for p in make_problems(3, seed=5)]
    torch.manual_seed(7)
    first = sample_groups(model, tokenizer, prompts, samples=4, seed=1)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.rand(1) == after
    assert first == sample_groups(model, tokenizer, prompts, samples=4, seed=1)
    assert first != sample_groups(model, tokenizer, prompts, samples=4, seed=2)


def test_the_head_never_gets_a_slice(policy):
    # torch on a CPU multiplies a slice by one copy of the head's weights for each row, if they are frozen and bfloat16.
    model, tokenizer = policy
    contiguous = []
    handle = model.lm_head.register_forward_pre_hook(lambda head, given: contiguous.append(given[0].is_contiguous()))
    sample_groups(model, tokenizer, [p.prompt for p in make_problems(3, seed=5)], samples=2, max_new_tokens=3)
    handle.remove()
    assert contiguous == [True, True, True]


def test_a_policy_that_never_ends_is_cut_off(policy):
    model, tokenizer = policy
    prompt = make_problems(1, seed=2)[0].prompt
    (short,), (whole,) = (
        sample_groups(model, tokenizer, [prompt], samples=1, greedy=True, max_new_tokens=n)[0] for n in (4, 96)
    )
    assert short != whole
    assert whole.startswith(short)
    assert len(tokenizer(short)["input_ids"]) == 4


def trainer_of(model, tokenizer, **options):
    """What the function reads of a trainer."""
    sampling = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
    args = SimpleNamespace(**{**sampling, "temperature": 0.01, "max_completion_length": 96, **options})
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    return SimpleNamespace(
        args=args,
        model=model,
        processing_class=tokenizer,
        accelerator=accelerator,
        num_generations=3,
        num_generations_eval=1,
    )


def test_a_rollout_has_the_completions_of_each_prompt_in_order(policy):
    model, tokenizer = policy
    prompts = [p.prompt for p in make_problems(4, seed=9, min_steps=2, max_steps=4)]
    trainer = trainer_of(model.train(), tokenizer)
    found = rollout_in_groups([prompt for prompt in prompts for _ in range(3)], trainer)
    greedy = [text for (text,) in sample_groups(model, tokenizer, prompts, samples=1, greedy=True, max_new_tokens=96)]
    texts = tokenizer.batch_decode(found["completion_ids"], skip_special_tokens=True)
    assert texts == [text for text in greedy for _ in range(3)]  # at a temperature near 0
    assert found["prompt_ids"] == tokenizer([prompt for prompt in prompts for _ in range(3)])["input_ids"]
    assert found["logprobs"] is None
    ended = [ids for ids in found["completion_ids"] if len(ids) < 96]
    assert ended
    assert all(ids[-1] == tokenizer.eos_token_id for ids in ended)
    assert model.training
    model.eval()
    assert len(rollout_in_groups(prompts, trainer)["completion_ids"]) == 4


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_a_rollout_refuses_what_it_cannot_do(policy, options):
    model, tokenizer = policy
    with pytest.raises(ValueError, match="supports only a temperature"):
        rollout_in_groups(["1+1"], trainer_of(model, tokenizer, **options))
    with pytest.raises(ValueError, match="Leave it out for chats"):
        rollout_in_groups([[{"role": "user", "content": "1+1"}]], trainer_of(model, tokenizer))
