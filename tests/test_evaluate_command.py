"""`fractal-rm evaluate` on benchmarks and on two models, and the commands of docs/evaluation.md."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.documents import commands
from support.stand_ins import save_reward_model, solutions, write_jsonl

from fractal_rm.cli.main import main
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.benchmarks import as_learned, measure, read_benchmark, score_whole
from fractal_rm.evaluation.processbench import SUBSETS
from fractal_rm.reward_model import StepRewardModel


def processbench() -> list[dict]:
    """Three cases of each subset, in this package's schema."""
    return [
        row
        | {
            "id": f"processbench-{subset}-{i}",
            "step_labels": [1, 0, None] if row["label"] == 0 else [1, 1, 1],
            "meta": {"subset": subset},
        }
        for subset in SUBSETS
        for i, row in enumerate(solutions(3))
    ]


def prmbench() -> list[dict]:
    kinds = ("circular", "deception", "multi_solutions", "original")
    rows = [row | {"step_labels": [1, row["label"], 1]} for row in solutions(8)]
    return [row | {"meta": {"classification": kinds[i % 4]}} for i, row in enumerate(rows)]


def sampled() -> list[dict]:
    """Four solutions of each of three questions."""
    rows = [row | {"prompt": f"Question {i // 4}?\n"} for i, row in enumerate(solutions(12))]
    return [{key: row[key] for key in ("prompt", "steps", "label")} for row in rows]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder as docs/evaluation.md has it in mind."""
    folder = tmp_path_factory.mktemp("work")
    save_reward_model(folder / "rm")
    save_reward_model(folder / "rm2", reduction="mean")
    for name, rows in (("processbench", processbench()), ("prmbench", prmbench())):
        write_jsonl(folder / "data" / name / "test.jsonl.gz", rows)
    write_jsonl(folder / "held_out.jsonl", solutions(12))
    write_jsonl(folder / "samples.jsonl", sampled())
    return folder


@pytest.fixture
def evaluate(work, monkeypatch, tmp_path):
    """Runs `fractal-rm evaluate` in the folder and returns what it wrote."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("FRACTAL_RM_DATA", str(work / "data"))

    def run(*arguments: str) -> dict:
        output = tmp_path / "metrics.json"
        assert main(["evaluate", "--model", "rm", *arguments, "--output", str(output)]) == 0
        return json.loads(output.read_text())

    return run


def test_every_command_of_the_page_runs(work, evaluate, tmp_path, capsys):
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = [line for line in commands(page) if line.startswith("fractal-rm")]
    assert len(found) >= 5
    for line in found:
        program, command, *arguments = shlex.split(line)
        assert (program, command) == ("fractal-rm", "evaluate")
        assert main(["evaluate", *arguments, "--output", str(tmp_path / "m.json")]) == 0, line
    assert "not all of ProcessBench" in capsys.readouterr().err


def test_processbench_reports_three_thresholds_and_the_curve(evaluate):
    found = evaluate("--benchmark", "processbench", "--data", "processbench")
    assert (found["responses"], found["responses_gsm8k"], found["unscored"], found["truncated"]) == (12, 3, 0, 0)
    assert {"f1", "f1_low", "f1_omnimath", "tuned_f1", "best_f1", "tuned_threshold", "responses_per_second"} <= set(
        found
    )
    assert found["threshold"] == 0.5
    assert max(point["f1"] for point in found["thresholds"]) == pytest.approx(found["best_f1"])
    assert found["tuned_f1"] <= found["best_f1"]


def test_the_subset_of_the_second_threshold_can_be_named(evaluate):
    found = evaluate("--benchmark", "processbench", "--data", "processbench", "--tune_on", "math")
    task = read_benchmark("processbench", processbench(), tuned_on="math")
    again = measure(StepRewardModel.from_pretrained("rm"), task)
    assert found["tuned_threshold"] == pytest.approx(again.counts["tuned_threshold"], abs=1e-6)


def test_official_files_in_a_folder_are_all_read(evaluate, work):
    for subset in SUBSETS:
        case = {"id": f"{subset}-0", "problem": "1+1?", "steps": ["2.", "So 3."], "label": 1}
        write_jsonl(work / "official" / f"{subset}.jsonl", [case, case | {"id": f"{subset}-1", "label": -1}])
    assert evaluate("--benchmark", "processbench", "--data", "official")["responses"] == 8


def test_a_model_compared_with_itself_differs_by_nothing(evaluate, capsys):
    for benchmark in ([], ["--benchmark", "prmbench"]):
        data = ["--data", "prmbench"] if benchmark else ["--data", "held_out.jsonl"]
        found = evaluate(*benchmark, *data, "--compare_to", "rm")
        gains = [value for value in found["difference"].values() if value is not None]
        assert len(gains) > 10
        assert set(gains) == {0.0}
    assert "difference" in capsys.readouterr().out


def test_two_models_are_compared_on_the_same_responses(evaluate):
    found = evaluate("--data", "held_out.jsonl", "--compare_to", "rm2")
    other = found["compare_to"]
    assert other["model"] == "rm2"
    for name in ("bag_auc", "bag_brier", "step_auc"):
        assert found["difference"][name] == pytest.approx(found[name] - other[name], abs=1e-6)
        assert found["difference"][f"{name}_low"] <= found["difference"][name] <= found["difference"][f"{name}_high"]


def test_best_of_n_has_votes_ceiling_and_an_outcome_model(evaluate):
    pattern = ["--answer_pattern", r"answer is (\d+)"]
    found = evaluate("--benchmark", "best_of_n", "--data", "samples.jsonl", *pattern, "--outcome_model", "rm2")
    assert {"own@4", "product@2", "majority@4", "outcome@4", "pass@4"} <= set(found)
    assert found["own@4"] <= found["pass@4"]
    assert (found["questions"], found["responses"], found["without_answer"]) == (3, 12, 0)


def test_an_outcome_model_reads_a_response_as_one_step(work):
    model, bags = StepRewardModel.from_pretrained(work / "rm"), read_bags(solutions(2), Segmentation())
    assert [len(result.steps) for result in score_whole(model, bags)] == [1, 1]
    assert [result.steps[0].text for result in score_whole(model, bags)] == [bag.response for bag in bags]


def test_prompts_become_chats_for_a_model_that_was_trained_on_chats(work, tmp_path):
    bags = read_bags(solutions(2), Segmentation())
    text = StepRewardModel.from_pretrained(work / "rm")
    assert as_learned(text, bags) == bags
    save_reward_model(tmp_path / "chat", chat=True)
    chat = StepRewardModel.from_pretrained(tmp_path / "chat")
    chat.settings.chat = True
    assert as_learned(chat, bags)[0].prompt == [{"role": "user", "content": bags[0].prompt}]
    assert measure(chat, read_benchmark("best_of_n", sampled())).counts["unscored"] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "There is no data to evaluate on. Give `data`, or a `benchmark` that the hub has."),
        (["--benchmark", "best_of_n"], "best_of_n is not on the hub."),
        (
            ["--benchmark", "processbench", "--data", "held_out.jsonl"],
            "held_out.jsonl, row 1: unknown subset 'solution'",
        ),
        (["--data", "held_out.jsonl", "--compare_to", "none/here/x"], "There is no model folder none/here/x."),
        (["--data", "empty"], "empty has no .json or .jsonl file."),
    ],
)
def test_what_is_wrong_is_one_sentence(work, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(work)
    (work / "empty").mkdir(exist_ok=True)
    assert main(["evaluate", "--model", "rm", *arguments]) == 2
    assert sentence in capsys.readouterr().err
