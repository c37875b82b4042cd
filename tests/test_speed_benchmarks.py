"""The speed benchmarks run from end to end, without the environments of the rivals. No time is asserted."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from support.stand_ins import save_policy
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.speed import alternation, ppo_speed, rm_speed, scoring_speed, sized_policy, speed_blocks
from benchmarks.speed import page as speed_page
from fractal_rm.evaluation.results import read_results
from fractal_rm.tasks.arithmetic.base_policy import SHIPPED_POLICY
from fractal_rm.tasks.arithmetic.problems import make_problems

MEASURED = {"ours", "rival", "ratio", "ratio_low", "ratio_high", "cpu_time_ratio", "peak_memory_ratio"}


SMOKE = {
    ppo_speed: ["--arms", "trl_ppo_1.12", "dense_over_outcome", "--no-stages"],
    rm_speed: ["--arms", "trl_prm_1.13"],  # length grouping: next test
    scoring_speed: [],
}


def test_a_smoke_run_writes_rows_skips_absent_rivals_and_makes_the_tables(tmp_path, capsys):
    files = []
    for benchmark, arguments in SMOKE.items():
        absent = [] if benchmark is scoring_speed else ["--peer-python", str(tmp_path / "absent")]
        files.append(tmp_path / f"{benchmark.__name__.rpartition('.')[2]}.jsonl")
        benchmark.main(["--smoke", *arguments, *absent, "--results", str(files[-1])])
    assert capsys.readouterr().out.count("skipped, for TRL 1.1") == 2
    rows = {row["arm"]: row for file in files if file.is_file() for row in read_results(file)}
    assert set(rows) == {"dense_over_outcome", "bare_forward", "per_prefix", "alignment"}
    for arm in rows.keys() - {"alignment"}:
        assert set(rows[arm]["metrics"]) >= MEASURED
        assert all(value > 0 for value in rows[arm]["metrics"].values())
    assert rows["per_prefix"]["metrics"]["tokens_ratio"] > 2
    document = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
    made = speed_page.page(document, tmp_path)
    assert all(arm in made for arm in rows)
    assert "No rows yet." in made  # of what was not run


def test_a_model_folder_takes_the_place_of_the_sizes(tmp_path):
    folder, results = save_policy(tmp_path / "policy"), tmp_path / "rows.jsonl"
    shared = ["--smoke", "--model", folder, "--split", "tiny", "--dtype", "bfloat16", "--results", str(results)]
    scoring_speed.main([*shared, "--arms", "bare_forward", "--longest", "3"])
    rm_speed.main([*shared, "--arms", "length_grouping", "--longest", "3"])
    rows = read_results(results)
    assert [row["split"] for row in rows] == ["tiny, cpu, bfloat16"] * 2
    assert [row["config"]["dtype"] for row in rows] == ["bfloat16", "float32"]  # autocast in training
    assert rows[1]["config"]["autocast"] == "bfloat16"
    expected = LlamaForCausalLM.from_pretrained(folder).num_parameters()
    assert {row["config"]["parameters"] for row in rows} == {expected}
    with pytest.raises(SystemExit, match="nowhere is not a model folder"):
        rm_speed.main(["--model", str(tmp_path / "nowhere")])


def test_a_side_that_fails_says_why():
    side = alternation.Side("theirs", "benchmarks.nowhere", [])
    with (
        pytest.raises(RuntimeError, match=r"theirs ended with status 1(.|\n)*No module named"),
        side,
    ):
        pass


@pytest.mark.parametrize("size", ["0.35M", "5M"])
def test_a_larger_policy_writes_what_the_shipped_one_writes(size):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_POLICY)
    prompts = [problem.prompt for problem in make_problems(4, seed=3)]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    width, layers = sized_policy.SIZES[size]
    large = sized_policy.grow(width, layers)
    small = LlamaForCausalLM.from_pretrained(SHIPPED_POLICY).eval()
    assert large.num_parameters() > 1.5 * small.num_parameters()
    masks = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        torch.testing.assert_close(large(**masks).logits, small(**masks).logits, rtol=1e-4, atol=1e-4)
    assert large.generation_config.use_cache


def test_the_ratio_is_that_of_neighbouring_blocks():
    # The machine slows down over time: ratios of neighbours do not notice, ratios of all blocks would.
    rival = [8.0, 4.0, 2.0, 1.0]
    found = alternation.compare([3 * speed for speed in rival], rival)
    assert found["ratio"] == found["ratio_low"] == found["ratio_high"] == 3.0
    uneven = alternation.compare([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert uneven["ratio_low"] < uneven["ratio"] == 3.0 < uneven["ratio_high"]


def test_sides_alternate_and_the_first_block_of_each_is_not_counted():
    order = []

    class Fake:
        def __init__(self, name, speed):
            self.name, self.speed, self.blocks = name, speed, 0

        def block(self, updates):
            order.append(self.name)
            self.blocks += 1
            seconds = 100.0 if self.blocks == 1 else updates / self.speed
            return {"seconds": seconds, "cpu_seconds": seconds, "work": updates, "memory": 2.0, "start_memory": 1.0}

    found = alternation.alternate(Fake("ours", 6.0), Fake("rival", 3.0), blocks=3, updates=5)
    assert order == ["rival", "ours", "ours", "rival", "rival", "ours", "ours", "rival"]
    assert (found["ours"], found["rival"], found["ratio"]) == pytest.approx((6.0, 3.0, 2.0))
    assert found["cpu_time_ratio"] == pytest.approx(2.0)


def test_a_block_ends_after_its_updates_and_training_when_the_other_end_is_gone(monkeypatch):
    said = []
    line = SimpleNamespace(say=lambda **message: said.append(message))
    line.wait = lambda: speed_blocks.Line.wait(line)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n1\n"))
    blocks = speed_blocks.Blocks(line, work=lambda steps: 10 * steps)
    blocks.on_train_begin(None, None, None)
    for _ in range(2):
        blocks.on_step_end(None, None, None)
    with pytest.raises(speed_blocks.Enough):
        blocks.on_step_end(None, None, None)
    assert said[0] == {"ready": True}
    assert [message["work"] for message in said[1:]] == [20, 10]


def test_a_stage_is_not_charged_for_the_stages_inside_it():
    owner = SimpleNamespace(inner=lambda: time.sleep(0.05))
    owner.outer = lambda: owner.inner()
    stages = speed_blocks.Stages()
    stages.watch(owner, "inner", "inner")
    stages.watch(owner, "outer", "outer")
    owner.outer()
    assert stages.seconds["inner"] >= 0.05
    assert stages.seconds["outer"] < stages.seconds["inner"]
