"""Denormals are flushed to zero while a trainer trains on a CPU, and at no other time."""

import pytest
import torch
from support.fractal import make as make_fractal
from support.models import sums
from support.step_ppo import make as make_ppo
from support.step_ppo import reward_model
from transformers import TrainerCallback

from fractal_rm.hf.denormals import flush_denormals


def tenth_of_the_least() -> float:
    return (torch.tensor([torch.finfo(torch.float32).tiny]) * 0.1).item()


@pytest.fixture
def kept():
    torch.set_flush_denormal(False)
    assert tenth_of_the_least() > 0
    yield
    torch.set_flush_denormal(False)


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(tenth_of_the_least())


@pytest.mark.parametrize("kind", ["ppo", "fractal"])
def test_denormals_are_0_in_training_and_as_they_were_before_and_after(kept, tmp_path, kind):
    watch = Watch()
    if kind == "ppo":
        trainer = make_ppo(tmp_path, reward_model=reward_model(), max_steps=1)
    else:
        trainer = make_fractal(tmp_path, sums(8), max_steps=1)
    assert tenth_of_the_least() > 0
    trainer.add_callback(watch)
    trainer.train()
    assert watch.seen == [0.0]
    assert tenth_of_the_least() > 0


def test_nothing_changes_where_training_is_not_on_a_cpu(kept):
    with flush_denormals(torch.device("meta")):
        assert tenth_of_the_least() > 0


def test_denormals_that_were_flushed_before_are_flushed_after(kept):
    torch.set_flush_denormal(True)
    with flush_denormals(torch.device("cpu")):
        assert tenth_of_the_least() == 0
    assert tenth_of_the_least() == 0
