"""The benchmarks of ProcessBench and best-of-n run on invented data, and their page shows their rows."""

from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.stand_ins import save_encoder, save_reward_model, solutions, write_jsonl

from benchmarks.evaluation import best_of_n, judged_models, processbench
from benchmarks.evaluation import page as evaluation_page
from fractal_rm.data.readers import read_bags
from fractal_rm.data.segmentation import Segmentation
from fractal_rm.evaluation.processbench import SUBSETS
from fractal_rm.evaluation.results import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Invented data in the layout of the real sets, an encoder, and a reward model with a seed in its name."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for split in ("train", "validation", "test"):
        rows = [
            row | {"prompt": f"{split} {i // 4}?\n", "step_labels": None, "aggregation": "native"}
            for i, row in enumerate(solutions(24))
        ]
        for row in rows:
            row["steps"] = [*row["steps"][:2], f"A: {row['label']}"]
        write_jsonl(folder / "data" / "gsm8k_solutions" / f"{split}.jsonl.gz", rows)
    cases = [
        row | {"step_labels": [1, row["label"], 1 if row["label"] else None], "meta": {"subset": subset}}
        for subset in SUBSETS
        for row in solutions(10)
    ]
    write_jsonl(folder / "data" / "processbench" / "test.jsonl.gz", cases)
    save_encoder(folder)
    save_reward_model(folder / "likelihood-3", scorer="likelihood")
    return folder


def common(folder: Path, name: str) -> list[str]:
    flags = ["--smoke", "--data-dir", str(folder / "data"), "--results", str(folder / name), "--seeds", "0"]
    return [*flags, "--encoder", str(folder / "encoder"), "--models", f"likelihood={folder / 'likelihood-3'}"]


@pytest.fixture(scope="module")
def processbench_rows(folder):
    processbench.main(common(folder, "processbench.jsonl"))
    return read_results(folder / "processbench.jsonl")


@pytest.fixture(scope="module")
def best_of_n_rows(folder):
    best_of_n.main(common(folder, "best_of_n.jsonl"))
    return read_results(folder / "best_of_n.jsonl")


def test_every_arm_of_processbench_has_a_row_with_every_figure(processbench_rows):
    arms = {(row["arm"], row["seed"]) for row in processbench_rows}
    assert {("embedding", 0), ("likelihood", 3), ("floor_random", 4), ("floor_none", None)} <= arms
    for row in processbench_rows:
        for figure in ("f1", "first_error_accuracy", "all_correct_accuracy"):
            assert {figure, f"{figure}_low", *[f"{figure}_{subset}" for subset in SUBSETS]} <= set(row["metrics"])
        assert row["metrics"]["responses"] == 32
    embedding = next(row for row in processbench_rows if row["arm"] == "embedding")
    assert embedding["metrics"]["cpu_minutes_of_all"] > 0
    assert embedding["config"]["threshold_from"] == "response labels of gsm8k_solutions, validation"


def test_floors_that_call_nothing_or_the_first_step_get_their_known_values(processbench_rows):
    values = {row["arm"]: row["metrics"] for row in processbench_rows}
    assert (values["floor_none"]["all_correct_accuracy"], values["floor_none"]["first_error_accuracy"]) == (1.0, 0.0)
    # The invented wrong step is the second one.
    assert (values["floor_first"]["all_correct_accuracy"], values["floor_first"]["first_error_accuracy"]) == (0.0, 0.0)


def test_every_arm_of_best_of_n_has_a_row_on_each_data_set(best_of_n_rows):
    for dataset, n in (("gsm8k_solutions", 4), ("arithmetic", 8)):
        values = {row["arm"]: row["metrics"] for row in best_of_n_rows if row["dataset"] == dataset}
        assert {"floor_random", "floor_majority", "ceiling_pass", "outcome_model", "likelihood"} <= set(values)
        assert values["floor_majority"][f"gain@{n}"] == 0.0
        ceiling = values["ceiling_pass"][f"accuracy@{n}"]
        assert all(found[f"accuracy@{n}"] <= ceiling + 1e-9 for found in values.values())
        assert values["floor_random"]["accuracy@1"] == pytest.approx(values["floor_random"][f"accuracy@{n}"])
        assert {f"min@{n}", f"last@{n}"} <= set(values["outcome_model"])


def test_the_page_shows_the_rows(processbench_rows, best_of_n_rows):
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    made = evaluation_page.page(page, processbench_rows, best_of_n_rows)
    assert made == evaluation_page.page(made, processbench_rows, best_of_n_rows)
    lines = [line for line in made.splitlines() if line.startswith("| ceiling_pass |")]
    assert len(lines) == 2
    first = made.index("| embedding |")
    assert first < made.index("| floor_first |")


def test_models_at_hand_are_named_with_their_folder():
    with pytest.raises(ValueError, match="'likelihood' names no folder"):
        next(judged_models.models_at_hand(["likelihood"]))


def test_models_are_trained_without_gold_steps():
    bags = read_bags([row | {"step_labels": [1, row["label"], 1]} for row in solutions(4)], Segmentation())
    assert all(bag.step_labels is not None for bag in bags)
    bare = judged_models.without_gold(bags)
    assert [(bag.response, bag.label, bag.step_labels) for bag in bare] == [(b.response, b.label, None) for b in bags]
