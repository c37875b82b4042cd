"""The arithmetic task: problems, an exact checker of every step, a policy with wrong beliefs."""

import operator
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY, make_tokenizer, train_base_policy
from fractal_rm.tasks.arithmetic.problems import (
    FACTS,
    OPERANDS,
    PHRASES,
    Beliefs,
    Problem,
    apply,
    exact_answer,
    make_problems,
)
from fractal_rm.tasks.task import sample_responses

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PROBLEMS = st.integers(0, 10_000).map(lambda seed: make_problems(1, seed=seed)[0])
TOKENIZER = make_tokenizer()
EXAMPLE = Problem("Mia", 3, (("+", 4), ("*", 3)))
RIGHT = "1: add 4 -> 7\n2: multiply by 3 -> 1\nAnswer: 1"


def values(problem: Problem, slip: int | None = None, by: int = 0) -> list[int]:
    """What the counter shows after each change, with one slip; written without the task's own arithmetic."""
    value, shown = problem.start, []
    for number, (sign, operand) in enumerate(problem.changes):
        value = (SIGNS[sign](value, operand) + (by if number == slip else 0)) % 10
        shown.append(value)
    return shown


def write(problem: Problem, shown: list[int]) -> str:
    lines = [
        f"{i}: {PHRASES[sign]} {operand} -> {value}"
        for i, ((sign, operand), value) in enumerate(zip(problem.changes, shown, strict=True), 1)
    ]
    return "\n".join([*lines, f"Answer: {shown[-1]}"])


def test_there_are_240_facts_and_each_change_can_be_undone():
    assert len(set(FACTS)) == 240
    for sign, operands in OPERANDS.items():
        for operand in operands:
            assert {apply(value, sign, operand) for value in range(10)} == set(range(10))
            assert all(apply(value, sign, operand) == SIGNS[sign](value, operand) % 10 for value in range(10))


@given(PROBLEMS)
def test_a_problem_is_read_back_from_its_prompt(problem):
    assert Problem.from_prompt(problem.prompt) == problem
    assert problem.prompt.endswith("?\n")
    assert problem.answer == values(problem)[-1]


@pytest.mark.parametrize("text", ["", "Mia has 3 apples.", "Mia's counter shows 3 and wraps after 9.\n"])
def test_a_text_that_is_no_prompt_is_named(text):
    with pytest.raises(ValueError, match=r"Not a prompt of the arithmetic task: .* Make prompts with `make_problems`"):
        Problem.from_prompt(text)


@given(PROBLEMS)
def test_a_right_response_has_only_right_steps(problem):
    response = write(problem, values(problem))
    assert problem.check_steps(response) == [True] * (len(problem.changes) + 1)
    assert problem.check_answer(response)
    assert Beliefs(0.0).respond(problem, random.Random(0)) == response


@given(PROBLEMS, st.data())
def test_one_slip_makes_one_wrong_step_and_a_wrong_answer(problem, data):
    slip = data.draw(st.integers(0, len(problem.changes) - 1))
    response = write(problem, values(problem, slip, data.draw(st.integers(1, 9))))
    assert [i for i, good in enumerate(problem.check_steps(response)) if not good] == [slip]
    assert not problem.check_answer(response)


@given(PROBLEMS, st.integers(0, 100))
def test_a_wrong_step_is_a_wrong_belief_and_right_steps_make_a_right_answer(problem, seed):
    beliefs = Beliefs(0.4, seed=seed)
    response = beliefs.respond(problem, random.Random(seed))
    flags = problem.check_steps(response)
    shown = [int(line[-1]) for line in response.split("\n")[:-1]]
    for flag, before, (sign, operand), after in zip(
        flags, [problem.start, *shown], problem.changes, shown, strict=False
    ):
        assert flag == (after == SIGNS[sign](before, operand) % 10)
        assert flag or beliefs.wrong[before, sign, operand] == after
    assert flags[-1]
    assert not all(flags) or problem.check_answer(response)


@pytest.mark.parametrize(
    ("response", "flags", "answered"),
    [
        (RIGHT, [True, True, True], True),
        (f"\n{RIGHT}\n\n", [True, True, True], True),
        ("1: add 4 -> 8\n2: multiply by 3 -> 4\nAnswer: 4", [False, True, True], False),
        ("1: add 4 -> 7\n2: multiply by 3 -> 2\nAnswer: 1", [True, False, False], True),
        ("1: add 5 -> 8\n2: multiply by 3 -> 4\nAnswer: 4", [False, True, True], False),  # another operand
        ("1: subtract 4 -> 7\n2: multiply by 3 -> 1\nAnswer: 1", [False, True, True], True),  # another change
        ("2: add 4 -> 7\n2: multiply by 3 -> 1\nAnswer: 1", [False, True, True], True),  # another number
        ("1: add 4 -> 7\nAnswer: 7", [True, False], False),  # too soon
        ("1: add 4 -> 7\n2: multiply by 3 -> 1", [True, True], False),
        (f"{RIGHT}\nAnswer: 1", [True, True, True, False], True),
        (f"{RIGHT}\n3: add 1 -> 2", [True, True, True, False], False),
        ("1: add 4 -> 7\nhm\n2: multiply by 3 -> 1\nAnswer: 1", [True, False, False, False], True),
        ("1: add 4 -> 17\n2: multiply by 3 -> 1\nAnswer: 1", [False, False, False], True),
        ("Answer: 1 or 2", [False], False),
        ("", [], False),
    ],
)
def test_the_checker_says_which_lines_are_wrong(response, flags, answered):
    assert EXAMPLE.check_steps(response) == flags
    assert EXAMPLE.check_answer(response) is answered
    assert exact_answer([EXAMPLE.prompt], [response], other_column=[1]) == [float(answered)]


@given(PROBLEMS, st.text(alphabet="0123: add->\nAnswer", max_size=60))
def test_the_checker_reads_any_text(problem, text):
    assert len(problem.check_steps(text)) == sum(bool(line.strip()) for line in text.split("\n"))


def test_beliefs_are_wrong_about_the_share_that_is_asked_for():
    beliefs = Beliefs(0.3, seed=4)
    assert len(beliefs.wrong) == 72
    assert all(result != apply(*fact) and 0 <= result < 10 for fact, result in beliefs.wrong.items())
    assert beliefs.wrong == Beliefs(0.3, seed=4).wrong != Beliefs(0.3, seed=5).wrong
    assert Beliefs(0.0).wrong == {}


def test_beliefs_are_followed_as_often_as_they_are_strong():
    problem, rng = Problem("Mia", 3, (("+", 4),)), random.Random(0)
    beliefs = Beliefs(1.0, strength=0.8)
    wrong = [not problem.check_answer(beliefs.respond(problem, rng)) for _ in range(500)]
    assert 0.74 < sum(wrong) / 500 < 0.86


@pytest.mark.parametrize(("name", "value"), [("wrong_share", 1.2), ("strength", -0.1)])
def test_shares_outside_0_and_1_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` is {value}, outside \[0, 1\]\. Give a share\."):
        Beliefs(**{name: value})


def test_problems_come_from_their_seed():
    problems = make_problems(200, seed=1, min_steps=2, max_steps=4)
    assert problems == make_problems(200, seed=1, min_steps=2, max_steps=4)
    assert problems != make_problems(200, seed=2, min_steps=2, max_steps=4)
    assert {len(problem.changes) for problem in problems} == {2, 3, 4}
    assert {problem.start for problem in problems} == set(range(10))


@pytest.mark.parametrize("lengths", [(0, 3), (4, 3)])
def test_lengths_that_make_no_problem_are_refused(lengths):
    with pytest.raises(ValueError, match="are impossible"):
        make_problems(1, seed=0, min_steps=lengths[0], max_steps=lengths[1])


# The base policy ---------------------------------------------------------------------------------------------------


@given(PROBLEMS)
def test_the_tokenizer_keeps_text_and_gives_each_digit_a_token(problem):
    tokenizer = TOKENIZER
    text = problem.prompt + write(problem, values(problem))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    for token in tokenizer.convert_ids_to_tokens(ids):
        assert sum(character.isdigit() for character in token) <= 1


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy that has seen next to nothing."""
    folder = tmp_path_factory.mktemp("policy")
    train_base_policy(folder, Beliefs(), num_texts=64, hidden_size=16, num_layers=1)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_the_shipped_policy_answers_greedily_what_it_believes():
    model, tokenizer = (auto.from_pretrained(SHIPPED_POLICY) for auto in (AutoModelForCausalLM, AutoTokenizer))
    problems, believed = make_problems(60, seed=123), Beliefs().wrong
    responses = sample_responses(model, tokenizer, [problem.prompt for problem in problems], greedy=True)
    right = [problem.check_answer(response) for problem, response in zip(problems, responses, strict=True)]
    assert 0.1 < sum(right) / len(right) < 0.6  # there is something to learn, and something to learn from
    mistakes = []
    for problem, response in zip(problems, responses, strict=True):
        before = problem.start
        steps = zip(problem.changes, response.split("\n"), problem.check_steps(response), strict=False)
        for change, line, good in steps:
            if not good:
                mistakes.append(believed.get((before, *change)) == int(line[-1]))
            before = int(line[-1])
    assert len(mistakes) > 30
    assert sum(mistakes) / len(mistakes) > 0.9


def test_a_policy_is_an_ordinary_folder(policy):
    model, tokenizer = policy
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_responses_do_not_depend_on_the_batch(policy):
    model, tokenizer = policy
    prompts = [problem.prompt for problem in make_problems(6, seed=0, min_steps=1, max_steps=6)]
    together = sample_responses(model, tokenizer, prompts, greedy=True, max_new_tokens=8)
    alone = [sample_responses(model, tokenizer, [prompt], greedy=True, max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone == sample_responses(model, tokenizer, prompts, greedy=True, max_new_tokens=8, batch_size=2)


def test_sampling_comes_from_its_seed_and_leaves_the_global_generator_alone(policy):
    model, tokenizer = policy
    prompts = [problem.prompt for problem in make_problems(4, seed=0)]
    model.train()
    state = torch.get_rng_state()
    first = sample_responses(model, tokenizer, prompts, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample_responses(model, tokenizer, prompts, max_new_tokens=8, seed=1)
    assert first != sample_responses(model, tokenizer, prompts, max_new_tokens=8, seed=2)
    assert model.training


def test_sampled_texts_hold_no_special_tokens():
    tokenizer = TOKENIZER
    model = make_model("likelihood", "llama", vocab_size=len(tokenizer), initializer_range=0.0)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    assert sample_responses(model, tokenizer, ["a", "bb"], greedy=True) == ["", ""]
