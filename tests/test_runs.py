"""A run is what it says it is: whose checkpoints it takes, what it reports after a pause, and how it is stopped."""

import copy
import math
import os
import resource
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig
from safetensors.torch import load_file
from support import fractal, step_ppo
from support.models import byte_tokenizer, make_model, sums
from support.stand_ins import save_policy
from transformers import TrainerCallback

from fractal_rm import FractalConfig, FractalTrainer, StepPPOConfig, StepPPOTrainer, ranges
from fractal_rm.cli.main import COMMANDS, main
from fractal_rm.cli.options.arguments import read_rows
from fractal_rm.cli.options.reward_functions import load_reward_function
from fractal_rm.data.readers import read_jsonl
from fractal_rm.files import locked, write_atomic
from fractal_rm.hf.checkpoints import STATE, fault, last_checkpoint
from fractal_rm.hf.manifest import MANIFEST, changes, identity_of, write_manifest
from fractal_rm.hf.runs import TIMED_FROM, Run, RunConfig
from fractal_rm.interrupts import Interrupted, interrupt

# Logs after 3 and 6 steps, checkpoints after 2 and 4: one lies between two logs.
SAVED = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 4}


class At(TrainerCallback):
    """Does something during a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.act()


def reward_run(folder: Path, **changed: Any) -> Any:
    return fractal.make(folder, **SAVED | changed)


def policy_run(folder: Path, **changed: Any) -> Any:
    given = {"reward_model": step_ppo.reward_model(), "num_generations": 2} | SAVED
    given["eval_dataset"] = Dataset.from_dict({"prompt": ["q", "qa"]})
    return step_ppo.make(folder, **given | changed)


RUNS = {"train": reward_run, "ppo": policy_run}


@pytest.mark.parametrize(
    ("kind", "shared"),
    [(FractalTrainer, Run), (StepPPOTrainer, Run), (FractalConfig, RunConfig), (StepPPOConfig, RunConfig)],
)
def test_what_both_trainers_share_stands_before_every_class_of_a_library(kind, shared):
    before = [base.__module__.partition(".")[0] for base in kind.__mro__[: kind.__mro__.index(shared)]]
    assert set(before) == {"fractal_rm"}


@pytest.fixture(scope="module", params=RUNS)
def whole(request, tmp_path_factory) -> tuple[Any, Any, Path]:
    """Which run, its trainer at the end, and its folder: a test that changes anything takes a copy."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = RUNS[request.param](folder)
    trainer.outcome = trainer.train()
    return RUNS[request.param], trainer, folder


@pytest.fixture
def copied(whole, tmp_path) -> tuple[Any, Any, Path]:
    folder = tmp_path / "run"
    shutil.copytree(whole[2], folder)
    return whole[0], whole[1], folder


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return step_ppo.weights(trainer.accelerator.unwrap_model(trainer.model))


# Whose checkpoints ----------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(copied, caplog):
    make, trainer, folder = copied
    file = folder / "checkpoint-4" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    again = make(folder)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is damaged (optimizer.pt has" in caplog.text
    assert step_ppo.same(weights(again), weights(trainer))
    assert fault(folder / "checkpoint-4") is None  # written again


CHANGES = {
    "train": [
        ("aggregation", {"aggregation": "mean"}),
        ("segmentation", {"segmentation": "sentences"}),
        ("prompt_template", {"prompt_template": "{prompt}\n"}),
        ("learning_rate", {"learning_rate": 0.5}),
        ("max_steps", {"max_steps": 3}),
        ("train_data", {"rows": sums(15)}),
        ("model", {"model_options": {"seed": 5}}),
    ],
    "ppo": [
        ("lam", {"lam": 0.5}),
        ("shaping", {"shaping": "delta"}),
        ("seed", {"seed": 1}),
        ("train_data", {"train_dataset": Dataset.from_dict({"prompt": ["qb", "qc"] * 8})}),
        ("model", {"model": step_ppo.LlamaForCausalLM(step_ppo.config(initializer_range=0.5))}),
        ("reward_models", {"reward_model": step_ppo.reward_model(aggregation="mean")}),
        ("rewards", {"reward_funcs": step_ppo.count_of_a}),
    ],
}


def test_a_run_that_is_resumed_as_another_one_is_refused_by_what_differs(whole):
    make, _, folder = whole
    kind = next(name for name, one in RUNS.items() if one is make)
    ways: list[Any] = [True, False, str(folder / "checkpoint-2")]
    for number, (key, changed) in enumerate(CHANGES[kind]):
        with pytest.raises(ValueError, match=rf"checkpoint-\d belongs to another run: .*`{key}` was"):
            make(folder, **changed).train(resume_from_checkpoint=ways[number % 3])


# Every other option is part of what a run is, also one that a later version adds.
MAY_CHANGE = """
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_timeout
disable_tqdm do_eval do_predict do_train embedding_cache enable_jit_checkpoint eval_accumulation_steps eval_delay
eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object hub_always_push hub_model_id
hub_private_repo hub_revision hub_strategy hub_token local_rank log_completions log_completions_hub_repo log_level
log_level_replica log_multimodal log_on_each_node log_unique_prompts logging_dir logging_first_step
logging_nan_inf_filter logging_steps logging_strategy num_completions_to_print num_generations_eval num_train_epochs
output_dir overwrite_output_dir per_device_eval_batch_size project push_to_hub report_to resume_from_checkpoint run_name
save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics trackio_bucket_id
trackio_space_id trackio_static_space_id vllm_gpu_memory_utilization vllm_group_port vllm_server_base_url
vllm_server_host vllm_server_port vllm_server_timeout
"""


class AsJson:
    def to_json(self) -> str:
        return "another"


@pytest.mark.parametrize("kind", [FractalConfig, StepPPOConfig])
def test_every_option_makes_another_run_or_is_named_as_one_that_may_change(tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    (tmp_path / "another").write_text("{}")
    values = {"max_steps": 1, "deepspeed": str(tmp_path / "another"), "parallelism_config": AsJson()}
    before, found = identity_of(args, {}), set()
    for one in fields(kind):
        other = copy.copy(args)
        setattr(other, one.name, values.get(one.name, "another"))
        if not changes(before, identity_of(other, {})):
            found.add(one.name)
    assert found == set(MAY_CHANGE.split()) & {one.name for one in fields(kind)}


def test_steps_may_be_added_and_not_taken_away():
    assert changes({"max_steps": 4}, {"max_steps": 3}) == ["`max_steps` was 4 and is 3"]
    assert not changes({"max_steps": 4}, {"max_steps": 5})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.0 for _ in completion_ids]


def rewards_of_another_file(folder: Path) -> Any:
    """A function of the same name in a file of a user."""
    (folder / "mine.py").write_text("def reward(completion_ids, **_):\n    return [1.0 for _ in completion_ids]\n")
    return load_reward_function(f"{folder / 'mine.py'}:reward")


def adapted_value(folder: Path, rank: int) -> dict[str, Any]:
    adapter = LoraConfig(r=rank, target_modules=["q_proj"])
    return {"reward_funcs": reward, "value_model": step_ppo.value_model(), "value_peft_config": adapter}


def learning_judge(folder: Path, label: float) -> dict[str, Any]:
    rows = [{"prompt": f"{i}?", "completion": "a", "label": label * (i % 2)} for i in range(32)]
    return {"reward_funcs": reward, "rm_update_every": 1, "reward_model_dataset": rows}


def file_of_deepspeed(folder: Path, stage: int) -> Any:
    (folder / "deepspeed.json").write_text(f'{{"stage": {stage}}}')
    return SimpleNamespace(to_dict=dict, deepspeed=str(folder / "deepspeed.json"))


MATERIALS = {
    "reward_sources": lambda folder, first: {"reward_funcs": reward if first else rewards_of_another_file(folder)},
    "value_adapter": lambda folder, first: adapted_value(folder, 2 if first else 4),
    "reward_model_data": lambda folder, first: learning_judge(folder, 1.0 if first else 0.5),
    "eval_data": lambda folder, first: {
        "advantage": "group",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": Dataset.from_dict({"prompt": ["q", "qa" if first else "qb"]}),
    },
}


@pytest.mark.parametrize("name", MATERIALS)
def test_a_policy_of_other_rewards_adapters_or_data_is_another_run(tmp_path, name):
    one, other = (policy_run(tmp_path, **MATERIALS[name](tmp_path, first)).identity for first in (True, False))
    assert [told.split()[0] for told in changes(one, other)] == [f"`{name}`"]


def test_the_content_of_a_file_of_deepspeed_and_of_a_reference_model_is_part_of_a_run(tmp_path):
    one, other = (identity_of(file_of_deepspeed(tmp_path, stage), {}) for stage in (2, 3))
    assert len(changes(one, other)) == 1
    reference, found = tmp_path / "reference", []
    for seed in (0, 1):
        make_model("likelihood", "llama", seed=seed).save_pretrained(reference)
        byte_tokenizer(merges=True).save_pretrained(reference)
        given = {"likelihood_prior_weight": 1.0, "reference_model": str(reference)}
        found.append(reward_run(tmp_path / "run", **given).identity)
    assert [told.split()[0] for told in changes(*found)] == ["`prior_models`"]


def test_a_checkpoint_of_a_model_alone_is_no_run_to_go_on_from(copied):
    make, trainer, folder = copied
    saved = folder / "checkpoint-4"
    for name in ("pending_logs.json", MANIFEST):
        (saved / name).unlink()
    write_manifest(saved, trainer.identity, [path for path in saved.rglob("*") if path.is_file()])
    with pytest.raises(ValueError, match=r"checkpoint-4 holds only a model \(`save_only_model`\)"):
        make(folder).train(resume_from_checkpoint=True)


def test_what_may_change_when_a_run_goes_on(copied):
    make, _, folder = copied
    changed = {"logging_steps": 1, "save_steps": 5, "run_name": "other", "max_steps": 5, "save_total_limit": 1}
    longer = make(folder, **changed)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5
    assert last_checkpoint(folder) == str(folder / "checkpoint-5")
    assert not (folder / "checkpoint-4").exists()


def test_another_run_takes_the_folder_when_it_is_told_to(copied):
    make, _, folder = copied
    other = make(folder, seed=3, max_steps=1, overwrite_output_dir=True)
    with pytest.raises(ValueError, match="`overwrite_output_dir` removes the checkpoints that"):
        other.train(resume_from_checkpoint=True)
    other.train()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_shorter_training_makes_no_step_more(tmp_path):
    given = {"max_steps": -1, "save_steps": 3, "rows": sums(16)}  # 4 steps an epoch
    reward_run(tmp_path, num_train_epochs=2, **given).train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    shorter = reward_run(tmp_path, num_train_epochs=1.25, **given)  # 5 steps, and 6 are done
    assert shorter.train(resume_from_checkpoint=True).global_step == 6


# What it reports ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(copied):
    make, trainer, folder = copied
    expected = {**trainer.outcome.metrics}
    shutil.rmtree(folder / "checkpoint-4")
    resumed = make(folder)
    found = resumed.train(resume_from_checkpoint=True)
    assert found.training_loss == found.metrics["train_loss"] == expected["train_loss"]
    assert found.metrics.keys() - expected.keys() == {TIMED_FROM}
    assert found.metrics[TIMED_FROM] == 2
    speed = 2 / found.metrics["train_runtime"]
    assert found.metrics["train_steps_per_second"] == pytest.approx(speed, rel=0.1, abs=0.01)
    assert step_ppo.logs(resumed) == step_ppo.logs(trainer)


def test_a_finished_run_that_is_started_again_reports_it_too(copied):
    make, trainer, folder = copied
    again = make(folder)
    found = again.train(resume_from_checkpoint=True)
    assert found.metrics["train_loss"] == trainer.outcome.metrics["train_loss"]
    assert found.metrics["total_flos"] == trainer.outcome.metrics["total_flos"]
    assert step_ppo.logs(again) == step_ppo.logs(trainer)


def test_an_evaluation_after_a_finished_run_draws_what_it_would_have_drawn(tmp_path):
    trainer = policy_run(tmp_path)
    trainer.train()
    expected = trainer.evaluate()
    torch.manual_seed(7)
    again = policy_run(tmp_path)
    again.train(resume_from_checkpoint=True)
    found = again.evaluate()
    times = ("runtime", "per_second", "step_time")
    assert {k: v for k, v in found.items() if not k.endswith(times)} == {
        k: v for k, v in expected.items() if not k.endswith(times)
    }


# How it is stopped ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(whole, tmp_path, number, status):
    make, trainer, _ = whole
    stopped = make(tmp_path, save_steps=100)
    stopped.add_callback(At(1, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(Interrupted, match=r"Interrupted after step 1: .* holds a checkpoint\.") as caught:
        stopped.train()
    assert caught.value.status == status
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    again = make(tmp_path, save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert step_ppo.same(weights(again), weights(trainer))
    assert signal.getsignal(number) is not stopped.stopping._ask


def test_a_policy_stops_between_two_rollouts(tmp_path):
    trainer = policy_run(tmp_path, num_iterations=2, max_steps=6, save_steps=100)
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Interrupted, match="after step 4"):
        trainer.train()


def test_a_second_signal_ends_it_at_once(tmp_path):
    trainer = reward_run(tmp_path, save_steps=100)
    trainer.add_callback(At(1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    with pytest.raises(Interrupted, match=r"twice: .* There is no checkpoint: the same command starts again\."):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    write_atomic(tmp_path / "checkpoint-1" / STATE, "{}")
    write_atomic(tmp_path / "checkpoint-1" / MANIFEST, "{}")
    assert trainer.stopping._then().startswith(
        f"{tmp_path}/checkpoint-1 is the last checkpoint: the same command continues"
    )


def test_without_checkpoints_a_signal_says_that_nothing_was_saved(tmp_path):
    trainer = reward_run(tmp_path, save_strategy="no")
    trainer.add_callback(At(1, lambda: interrupt(signal.SIGTERM, None)))
    with pytest.raises(
        Interrupted, match=r"after step 0\. Nothing was saved, because `save_strategy` is `no`"
    ) as caught:
        trainer.train()
    assert caught.value.status == 143


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_told_to_end_has_the_status_of_the_signal(monkeypatch, capsys, number, status):
    monkeypatch.setattr("fractal_rm.cli.report.report", lambda argv: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert main(["report"]) == status
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.count("\n") == 1


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(whole, tmp_path):
    make, _, _ = whole
    trainer, (soft, hard) = make(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.add_callback(At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.*\)\. It is removed; the previous"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert fault(tmp_path / "checkpoint-2") is None


@pytest.fixture
def any_rate(monkeypatch):
    """Rates that options refuse, for the quickest way to weights that are not finite."""
    monkeypatch.delitem(ranges.RANGES, "learning_rate")


@pytest.mark.parametrize("kind", RUNS)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(tmp_path, kind, any_rate):
    twice = {"num_iterations": 2} if kind == "ppo" else {}  # the same rollout, with other weights
    trainer = RUNS[kind](tmp_path, learning_rate=1e30, max_grad_norm=0.0, save_steps=100, **twice)
    with pytest.raises(ValueError, match=r"The loss of step 1 is nan: training diverges"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    (file,) = tmp_path.glob("not_finite-1-*.safetensors")
    batch = load_file(file)
    assert batch["input_ids" if kind == "train" else "completion_ids"].numel()
    trainer.model.train()
    with pytest.raises(ValueError, match=r"The loss of step 1 is nan"):
        trainer.compute_loss(trainer.model, batch)


def test_a_policy_that_can_no_longer_sample_stops_the_run_and_keeps_the_prompts(tmp_path, any_rate):
    with pytest.raises(ValueError, match=r"cannot sample at step 1, .*/not_finite-1-0\.jsonl keeps the prompts\."):
        policy_run(tmp_path, learning_rate=1e30, max_grad_norm=0.0).train()
    assert len(read_jsonl(tmp_path / "not_finite-1-0.jsonl")) == 8


def test_a_reward_that_is_not_finite_keeps_the_rollout(tmp_path):
    def broken(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0] * (len(completion_ids) - 1) + [math.nan]

    with pytest.raises(ValueError, match=r"the reward nan\..*/not_finite-0-0\.jsonl keeps the rollout\."):
        policy_run(tmp_path, reward_funcs=broken).train()
    assert len(read_jsonl(tmp_path / "not_finite-0-0.jsonl")) == 8


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    trainer = reward_run(tmp_path)
    weight = next(trainer.scorer.base.parameters())
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = None

    class Remember(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            nonlocal before
            before = weights(trainer)

    trainer.add_callback(Remember())
    with pytest.raises(ValueError, match="The gradient norm of step 0 is nan"):
        trainer.train()
    assert step_ppo.same(weights(trainer), before or {})


@pytest.mark.parametrize("kind", RUNS)
def test_a_model_with_a_weight_that_is_not_finite_is_not_written(tmp_path, kind):
    trainer = RUNS[kind](tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=r"1 weights are NaN or infinite \(first: .*is not written"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_train_epochs": -1, "max_steps": -1}, "`num_train_epochs` is -1: nothing would be trained"),
        ({"max_steps": 0}, "`max_steps` is 0: nothing would be trained"),
        ({"gradient_accumulation_steps": -1}, "`gradient_accumulation_steps` is -1: nothing would be trained"),
        ({"num_iterations": 0}, "`num_iterations` is 0: nothing would be trained"),
    ],
)
def test_amounts_that_train_nothing_are_refused(tmp_path, changed, message):
    for kind, make in RUNS.items():
        if kind == "ppo" or "num_iterations" not in changed:
            with pytest.raises(ValueError, match=message):
                make(tmp_path, **changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim_args", "a"),
        ("optim_args", "=,=="),
        ("lr_scheduler_kwargs", {"nope": 1}),
        ("lr_scheduler_kwargs", {"num_cycles": "a"}),
    ],
)
def test_options_that_libraries_read_late_are_named(tmp_path, name, value):
    given = {name: value, "lr_scheduler_type": "cosine"}
    for make in RUNS.values():
        with pytest.raises(ValueError, match=rf"`{name}` is .*, which cannot be used \(.*\)\. Correct it"):
            make(tmp_path, **given).create_optimizer_and_scheduler(4)


def test_an_option_that_the_model_does_not_know_is_named(tmp_path):
    save_policy(tmp_path / "policy")
    given = {"model": str(tmp_path / "policy"), "model_init_kwargs": {"nope": 1}}
    with pytest.raises(ValueError, match=r"`model_init_kwargs` is .*'nope': 1.*, which cannot be used \(.*'nope'\)"):
        policy_run(tmp_path / "run", **given)


def test_options_of_adapters_without_adapters_are_refused(tmp_path, capsys):
    flags = ["--model", "nothing", "--train_file", "none.jsonl", "--output_dir", str(tmp_path), "--lora_r", "4"]
    assert main(["train", *flags]) == 2
    assert "`lora_r` is 4, but has no effect without `use_peft`" in capsys.readouterr().err


# Two at once ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_is_refused_and_a_dead_one_holds_none(tmp_path, capsys):
    train = ["train", "--model", "nowhere/at/all", "--train_file", "none.jsonl", "--output_dir", str(tmp_path / "run")]
    with locked(tmp_path / "run" / ".lock", "there"):
        assert main(train) == 2
    assert f"Another process {os.getpid()} writes into {tmp_path / 'run'}." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("12345")  # of a process that was killed
    assert main(train) == 2
    assert "There is no model folder nowhere/at/all" in capsys.readouterr().err


# Arguments of each command that writes, and the lock that it takes. Several `compare` share their work, run by run.
WRITING = {
    "quickstart": (["--output_dir", "out"], "out/.lock"),
    "sample": (["--model", "nowhere/x", "--task", "arithmetic", "--output", "out.jsonl"], ".out.jsonl.lock"),
    "train": (["--model", "nowhere/x", "--train_file", "none.jsonl", "--output_dir", "out"], "out/.lock"),
    "score": (["--model", "nowhere/x", "--input", "none.jsonl", "--output", "out.jsonl"], ".out.jsonl.lock"),
    "evaluate": (["--model", "nowhere/x", "--data", "none.jsonl", "--output", "out.json"], ".out.json.lock"),
    "ppo": (["--model", "nowhere/x", "--output_dir", "out"], "out/.lock"),
    "report": (["--results", "none.jsonl", "--output", "out.md"], ".out.md.lock"),
}
SHARING, READING = {"compare"}, {"doctor", "plan", "serve"}


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - SHARING - READING))
def test_every_command_that_writes_refuses_what_another_process_writes(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    flags, lock = WRITING[command]
    with locked(Path(lock), "it"):
        assert main([command, *flags]) == 2
    assert f"Another process {os.getpid()} writes " in capsys.readouterr().err


def test_a_lock_that_its_owner_removes_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    file, acquire, ended = tmp_path / "out" / ".lock", FileLock.acquire, []

    def acquire_late(self, *args, **kwargs):
        held = acquire(self, *args, **kwargs)
        if not ended:  # its owner came to its end after the file was opened here, and before it was locked
            ended.append(file.unlink())
        return held

    monkeypatch.setattr(FileLock, "acquire", acquire_late)
    with locked(file, "there"), pytest.raises(OSError, match="Another process"), locked(file, "there"):
        pass
    assert not file.exists()


# Large files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_limit_reads_no_more_than_it_needs(tmp_path, name):
    lines = ['{"prompt": "a"}'] * 3 if name.endswith("jsonl") else ["prompt,label", "a,1", "a,1", "a,0"]
    (tmp_path / name).write_text("\n".join([*lines, "{,1,2", "{,1,2"]))  # the rest cannot be read
    assert [row["prompt"] for row in read_rows(tmp_path / name, None, 3)] == ["a"] * 3
    with pytest.raises(ValueError, match="row"):
        list(read_rows(tmp_path / name, None, None))
