"""`fractal-rm train` with every loss, prior, pseudo-label rule and stage, from a configuration file."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import sums
from support.stand_ins import save_encoder, save_policy, write_jsonl
from transformers import TrainingArguments

from fractal_rm.cli.main import main
from fractal_rm.reward_model import StepRewardModel
from fractal_rm.reward_training.config import FractalConfig

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
ROWS = sums(20)
PAIRS = [{"prompt": f"{i}?", "chosen": [f"{i}.", "good."], "rejected": [f"{i}.", "zzz.", "b."]} for i in range(6)]
GRADES = [
    {"prompt": f"{i}?", "steps": ["a.", "b."][: 1 + i % 2], "label": i % 4, "step_labels": [i % 4, 0][: 1 + i % 2]}
    for i in range(12)
]
GOLD = {"instance_weight": 1.0, "gold_fraction": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


COMMANDS = {
    "cosine": {"cosine_prior_weight": 0.1, "prior_schedule": "linear", "prior_distance": "absolute"},
    "negated cosine": {"negated_cosine_prior_weight": 0.1},
    "correlation": {"correlation_prior_weight": 0.1, "prior_schedule": "cosine"},
    "teacher": {"teacher_prior_weight": 0.2},
    "likelihood": {"likelihood_prior_weight": 0.2},
    "hybrid": GOLD | {"hybrid_prior_weight": 0.2, "gold_fraction": 0.2},
    "uncertainty": GOLD | {"gold_selection": "uncertainty"},
    "hard": {"pseudo_labels": "hard", "pseudo_rounds": 2, "pseudo_start": "warm"},
    "soft": {"pseudo_labels": "soft", "pseudo_bag_weight": 0.5, "head_type": "set"},
    "noise": {"missed_good": 0.1, "missed_bad": 0.1, "aggregation": "product"},
    "easyllp": {"easyllp_weight": 1.0, "bag_weight": 0.0, "aggregation": "mean"},
    "grades": {"num_grades": 4, "aggregation": "max", "pseudo_labels": "hard", "cosine_prior_weight": 0.1},
    "soft aggregation": {"aggregation": "softmin", "sharpness": 4.0},
}


def command(path: Path, encoder_folder: str, options: dict[str, Any], rows: Any = ROWS, *flags: str) -> int:
    rows = [row | {"teacher_scores": [0.8] * len(row["steps"])} if "steps" in row else row for row in rows]
    file = write_jsonl(path / "rows.jsonl", rows)
    quiet = QUIET | {"max_steps": 2, "per_device_train_batch_size": 8}
    data = {"train_file": file, "eval_file": file, "test_file": file, "embedding_cache": str(path / "cache")}
    found = {"model": encoder_folder, "scorer": "embedding", "output_dir": str(path / "out")} | quiet | data | options
    (path / "config.yaml").write_text(yaml.safe_dump(found))
    return main(["train", "--config", str(path / "config.yaml"), *flags])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_trains_with_each_option_from_a_file(folder, tmp_path, name):
    options = COMMANDS[name]
    if name == "likelihood":
        options = options | {"reference_model": save_policy(tmp_path / "policy")}
    assert command(tmp_path, folder, options, GRADES if name == "grades" else ROWS) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(0 <= metrics["test"][name] <= 1 for name in ("bag_accuracy", "bag_ece", "step_auc"))
    model = StepRewardModel.from_pretrained(tmp_path / "out")
    assert all(0 <= score <= 1 for score in model.score(["1?"], ["1.\n2."])[0].step_scores)


def test_the_command_trains_on_preferences_in_both_forms(folder, tmp_path):
    for form in ("bradley_terry", "ratio"):
        options = {"preference_loss": form, "aggregation": "mean", "pseudo_labels": "hard"}
        assert command(tmp_path / form, folder, options, PAIRS) == 0


def test_the_command_goes_on_with_a_stopped_run(folder, tmp_path):
    options = {"pseudo_labels": "hard", "save_strategy": "steps", "save_steps": 1}
    assert command(tmp_path, folder, options) == 0
    out = tmp_path / "out"
    before = (out / "head.safetensors").read_bytes()
    shutil.rmtree(out / "stage-pseudo-1")
    written = (out / "stage-joint" / "step_logits.safetensors").stat().st_mtime_ns
    for _ in range(2):  # the second time nothing is left to do
        assert command(tmp_path, folder, options, ROWS, "--resume_from_checkpoint", "true") == 0
        assert (out / "stage-joint" / "step_logits.safetensors").stat().st_mtime_ns == written
        assert (out / "head.safetensors").read_bytes() == before
        history = json.loads((out / "metrics.json").read_text())["history"]
        assert {entry["stage"] for entry in history} == {"stage-joint", "stage-pseudo-1"}


def test_the_command_reads_ratings_by_name_and_skips_bad_rows_on_request(folder, tmp_path, capsys):
    rated = [{"question": f"{i}?", "answer": f"{i}.\nso.", "rating": 1 + i % 5} for i in range(10)]
    rows = [*rated, rated[0] | {"rating": 9}]
    flags = ("--label_column", "rating", "--label_scale", "1", "5")
    assert command(tmp_path, folder, {"aggregation": "product"}, rows, *flags) == 2
    assert "row 11: the rating is 9, outside the scale 1 to 5; give another --label_scale" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="^1 of 11 rows of .* are left out"):
        assert command(tmp_path, folder, {"aggregation": "product"}, rows, *flags, "--on_bad_row", "skip") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train"]["responses"] == 10
    assert command(tmp_path, folder, {"aggregation": "product", "overwrite_output_dir": True}, rated) == 2
    assert "name the column with --label_column and its lowest" in capsys.readouterr().err


def test_the_command_says_what_a_prior_lacks(folder, tmp_path, capsys):
    assert command(tmp_path, folder, {"likelihood_prior_weight": 0.1}) == 2
    assert "The likelihood prior needs a causal language model. Set `reference_model`" in capsys.readouterr().err


# The page that describes it -----------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "fractal.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_of_the_page_is_a_configuration(snippet):
    FractalConfig(output_dir="unused", use_cpu=True, report_to=[], **yaml.safe_load(snippet))


def test_every_option_of_the_losses_and_stages_is_on_the_page():
    own = {field.name for field in fields(FractalConfig)} - {field.name for field in fields(TrainingArguments)}
    elsewhere = {"segmentation", "separator", "pattern", "language", "prompt_template", "max_length", "reduction"}
    elsewhere |= {"thinking", "chat_template_kwargs", "disable_dropout", "overwrite_output_dir"}
    assert sorted(name for name in own - elsewhere if name not in PAGE) == []
