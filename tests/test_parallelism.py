"""Launch configurations, and what is refused where weights are in pieces: the states of accelerate are faked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from support.models import byte_tokenizer, make_model, sums
from support.stand_ins import save_reward_model
from support.step_ppo import count_of_a, make, reward_model
from transformers import Trainer

from fractal_rm.hf.parallelism import check_whole_model
from fractal_rm.reward_training.config import FractalConfig
from fractal_rm.reward_training.trainer import FractalTrainer

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "accelerate"
TYPES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_a_launch_configuration(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type.value == TYPES[path.stem]
    assert config.num_processes == 8
    assert path.name in (RECIPES / "README.md").read_text(encoding="utf-8")
    assert set(config.deepspeed_config) == (
        set() if "zero" not in path.stem else set(yaml.safe_load(path.read_text())["deepspeed_config"])
    )


def test_the_configurations_load_reward_models_as_a_whole():
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    assert configs.keys() == TYPES.keys()
    assert configs["fsdp2"]["fsdp_config"]["fsdp_version"] == 2
    assert configs["fsdp2"]["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False
    assert [configs[name]["deepspeed_config"]["zero_stage"] for name in ("zero2", "zero3")] == [2, 3]
    assert not any(configs[name]["deepspeed_config"]["zero3_init_flag"] for name in ("zero2", "zero3"))


@pytest.fixture
def engine(monkeypatch) -> Any:
    """Makes every `Trainer` that is made think that it runs under FSDP or DeepSpeed."""

    def pretend(name: str, stage: int = 3) -> None:
        made = Trainer.create_accelerator_and_postprocess

        def postprocess(self: Any) -> None:
            made(self)
            setattr(self, f"is_{name}_enabled", True)
            if name == "deepspeed":
                monkeypatch.setattr(type(self.accelerator.state), "deepspeed_plugin", SimpleNamespace(zero_stage=stage))

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", postprocess)

    return pretend


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_a_value_model_of_its_own_is_refused_where_weights_are_in_pieces(tmp_path, engine, name):
    engine(name)
    with pytest.raises(ValueError, match=r"trains a value model .*, but (FSDP|DeepSpeed) prepares only one"):
        make(tmp_path, reward_model=reward_model(), advantage="gae")


@pytest.mark.parametrize("advantage", ["group", "global"])
def test_advantages_without_a_value_model_are_accepted_where_weights_are_in_pieces(tmp_path, engine, advantage):
    engine("fsdp")
    trainer = make(tmp_path, reward_model=reward_model(), advantage=advantage)
    assert trainer.value_model is None


def test_a_reward_model_that_fsdp_left_empty_is_refused(tmp_path, engine, monkeypatch):
    engine("fsdp")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    folder = save_reward_model(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"`fsdp_cpu_ram_efficient_loading` leaves the weights of the reward model"):
        make(tmp_path / "out", reward_model=folder, advantage="group")
    make(tmp_path / "out", reward_funcs=count_of_a, advantage="group")  # nothing to be empty


def test_a_reward_model_that_zero_3_took_apart_is_refused():
    model, trainer = torch.nn.Linear(2, 2), SimpleNamespace(is_fsdp_enabled=False)
    check_whole_model(trainer, model, "the reward model")
    model.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed ZeRO-3 while it was loaded.* `zero3_init_flag"):
        check_whole_model(trainer, model, "the reward model")


@pytest.mark.parametrize(
    ("name", "stage", "refused"), [("fsdp", 0, True), ("deepspeed", 3, True), ("deepspeed", 2, False)]
)
def test_a_reward_model_is_not_trained_in_pieces(tmp_path, engine, name, stage, refused):
    engine(name, stage)

    def train() -> FractalTrainer:
        args = FractalConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=256)
        return FractalTrainer(
            make_model("likelihood", "llama"), args, train_dataset=sums(4), processing_class=byte_tokenizer()
        )

    if refused:
        with pytest.raises(ValueError, match=r"FractalTrainer saves whole scorers, but (FSDP|DeepSpeed) shards their"):
            train()
    else:
        train()
