"""The report of trainings: what real runs log, read back from disk, drawn, and parsed by what is not ours."""

import itertools
import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from datasets import Dataset
from support.pages import Page
from support.step_ppo import (
    COMPLETIONS,
    GUARDED,
    A,
    Scripted,
    make,
    policy,
    policy_tokenizer,
    replay,
    reward_model,
)

from fractal_rm import StepPPOTrainer
from fractal_rm.cli.checks import to_json
from fractal_rm.cli.main import main
from fractal_rm.credit.guards import LIMITS
from fractal_rm.evaluation.intervals import interval_of_mean
from fractal_rm.report.drawing import PAGE, new_figure
from fractal_rm.report.training_curves import (
    ALARMS,
    MOST_POINTS,
    Line,
    Panel,
    Section,
    early_ends,
    make_line,
    make_sections,
)
from fractal_rm.report.training_history import Run, metrics_by_update, read_runs
from fractal_rm.report.training_report import draw_panel, save_training_figure, write_training_report

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
SVG = "{http://www.w3.org/2000/svg}"
ROWS = [ids for ids in COMPLETIONS if len(ids) > 1]
SILENT = {4, 5}  # rollouts, from 0, in which the policy says nothing; two in a row make an alarm

PANELS = {
    "Outcome reward": ["has_a, held out", "has_a, training"],
    "Reward model against truth": ["dense"],
    "Signs of reward hacking": [
        "Correlation of score and outcome",
        "Score minus outcome",
        "Share of repeated steps",
        "Share of repeated 4-grams",
        "Share of steps that also occur for other prompts",
        "Share of steps with a confidence marker",
        "Agreement with the usual order of words",
        "Share of empty responses",
        "Share of steps at the ceiling",
        "Steps at the ceiling minus outcome",
        "Share of responses not judged",
        "Share of steps beyond the limit",
    ],
    "Length": ["Tokens per response", "Steps per response", "Tokens per step", "Share cut at the length limit"],
    "Distance from the reference policy": [
        "KL per token, in nats",
        "KL per response, in nats",
        "Coefficient of KL in the reward",
    ],
    "Updates": [
        "Explained variance of the value model",
        "Entropy per token, in nats",
        "Share of tokens with a clipped ratio",
    ],
}


def has_a(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A checker."""
    return [float(ids.count(A) > 0) for ids in completion_ids]


def twice_a(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Another outcome reward."""
    return [2.0 * ids.count(A) for ids in completion_ids]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Any:
    """A training with all there is to log, as `fractal-rm ppo` leaves it behind."""
    folder = tmp_path_factory.mktemp("finished")
    policy().save_pretrained(folder / "policy")
    policy_tokenizer().save_pretrained(folder / "policy")
    torch.manual_seed(0)
    trainer = make(
        folder / "out",
        StepPPOTrainer,
        model=str(folder / "policy"),
        reward_model=reward_model(),
        reward_funcs=has_a,
        rollout_func=Scripted(SILENT),
        kl_coef=0.05,
        eval_dataset=Dataset.from_dict({"prompt": ["cc"] * 4}),
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=2,
        **GUARDED,
    )
    trainer.rollout_func = without_evaluation(trainer.rollout_func)
    trainer.train()
    history = {"train": {}, "history": trainer.state.log_history}
    (folder / "out" / "metrics.json").write_text(to_json(history))
    return trainer


def without_evaluation(script: Scripted) -> Any:
    """The script for rollouts to learn from; in evaluation the policy always speaks, and no rollout is counted."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return (script if trainer.model.training else replay(ROWS))(prompts, trainer)

    return rollout


def logged(trainer: Any, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


def log_of(**curves: dict[int, float]) -> dict[str, dict[int, float]]:
    """Metrics of a run; `reward_model__mean` stands for `reward_model/mean`."""
    return {key.replace("__", "/"): curve for key, curve in curves.items()}


def run_of(name: str = "a", folder: str = "a", **curves: dict[int, float]) -> Run:
    return Run(name, folder, "metrics.json", log_of(**curves))


def panels(sections: list[Section]) -> dict[str, Panel]:
    return {panel.title: panel for section in sections for panel in section.panels}


def zero_panels(runs: list[Run]) -> list[str]:
    """Titles of panels that are 0 throughout."""
    return [title for section in make_sections(runs) for title in section.zero]


def captions(page: Page) -> list[str]:
    return [text.strip() for text in page.inside("figcaption") if text.strip()]


def page_of(folder: Path, runs: list[Run], **options: Any) -> Page:
    write_training_report(folder / "page.html", runs, **options)
    return Page(folder / "page.html")


@pytest.fixture(scope="module")
def finished_page(finished, tmp_path_factory) -> Page:
    """The page of the training, named as its folder."""
    return page_of(tmp_path_factory.mktemp("page"), read_runs([finished.args.output_dir]))


# A real run -----------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_shows_all_that_it_logged(finished, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    assert main(["report", "--runs", f"dense={finished.args.output_dir}", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"Wrote {output}.\n"
    page = Page(output)
    assert page.inside("h2") == [*PANELS, "Last values", "Runs"]
    zero = zero_panels(read_runs([finished.args.output_dir]))
    assert captions(page) == [title for title in itertools.chain(*PANELS.values()) if title not in zero]
    for title in zero:
        assert any(title in line for line in page.inside("p") if line.startswith("0 throughout: "))
    assert page.inside("table", "results", "td")[-3:] == ["dense", finished.args.output_dir, "metrics.json"]
    assert page.inside("table", "results", "td", "n")[-1] == str(GUARDED["max_steps"])
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_lines_hold_what_the_trainer_logged(finished):
    (run,) = read_runs([finished.args.output_dir])
    drawn = panels(make_sections([run]))
    assert run.name == "out"
    zero = zero_panels([run])
    assert {*drawn, *zero} == {*itertools.chain(*PANELS.values()), "out"} - {"dense"}  # a panel named like the run
    assert "Share of repeated 4-grams" in zero
    for title, panel in drawn.items():
        for key, line in zip(panel.keys, panel.lines, strict=True):
            expected = logged(finished, key)
            assert len(expected) > 1, title
            assert line.updates.tolist() == list(expected)
            assert line.mean == pytest.approx(list(expected.values()))
            assert line.low is line.high is None


def test_an_alarm_is_in_the_log_and_in_its_panel_and_nowhere_else(finished, finished_page):
    alarm_at = max(SILENT) + 1  # the update that follows the rollout
    assert logged(finished, "guards/alarm/empty") == {alarm_at: 1.0}
    (run,) = read_runs([finished.args.output_dir])
    assert (alarm_at, "empty") in run.alarms
    by_signal = {signal: update for update, signal in run.alarms}
    for panel in panels(make_sections([run])).values():
        signals = [key.removeprefix("guards/") for key in panel.keys]
        assert [mark.update for mark in panel.marks] == [by_signal[s] for s in signals if s in by_signal]
    assert f"empty</code> at update {alarm_at}" in finished_page.source
    assert "No alarm" not in finished_page.source
    labels = [a["aria-label"] or "" for tag, a in finished_page.tags if tag == "svg" and a.get("role") == "img"]
    (label,) = [label for label in labels if label.startswith("Share of empty responses")]
    assert label.endswith(f"Alarms at update {alarm_at}.")


def test_every_alarm_is_explained_beside_its_curve(tmp_path):
    assert ALARMS.keys() == LIMITS.keys()
    run = run_of(guards__empty={1: 0.0, 2: 0.0}, guards__alarm__empty={2: 1.0}, kl={1: 0.0, 2: 0.5})
    page = page_of(tmp_path, [run])
    assert page.inside("figure", "p", "alarm") == [f"▼ {ALARMS['empty']}"]
    assert zero_panels([run]) == []  # an alarm is drawn, whatever was logged
    assert zero_panels([run_of(guards__empty={1: 0.0, 2: 0.0}, kl={1: 0.0, 2: 0.5})]) == ["Share of empty responses"]


def test_an_alarm_that_stops_training_is_in_the_last_log(tmp_path):
    script, options = Scripted(SILENT), GUARDED | {"logging_steps": 100, "on_alarm": "stop"}
    trainer = make(tmp_path, StepPPOTrainer, reward_model=reward_model(), rollout_func=script, **options)
    trainer.train()
    assert logged(trainer, "guards/alarm/empty") == {max(SILENT) + 1: 1.0}


def test_a_checkpoint_shows_the_run_up_to_it(finished):
    (run,) = read_runs([f"{finished.args.output_dir}/checkpoint-4"])
    assert (run.name, run.file, run.last_update) == ("checkpoint-4", "trainer_state.json", 4)
    expected = {step: value for step, value in logged(finished, "guards/kl_per_token").items() if step <= 4}
    assert run.metrics["guards/kl_per_token"] == pytest.approx(expected)


def test_a_run_that_is_not_finished_shows_its_newest_whole_checkpoint(finished, tmp_path):
    shutil.copytree(finished.args.output_dir, tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()
    torn = tmp_path / "out" / "checkpoint-8" / "trainer_state.json"
    torn.write_text(torn.read_text()[:-9])
    (run,) = read_runs([str(tmp_path / "out")])
    assert (run.name, run.file, run.last_update) == ("out", "checkpoint-6/trainer_state.json", 6)


def test_runs_that_lack_something_have_no_panel_of_it(tmp_path):
    def trained(folder: str, **options: Any) -> Run:
        torch.manual_seed(0)
        trainer = make(tmp_path / folder, StepPPOTrainer, rollout_func=replay(ROWS), **options)
        trainer.train()
        return Run(folder, folder, "metrics.json", metrics_by_update(trainer.state.log_history))

    dense = trained("dense", reward_model=reward_model())
    sections = make_sections([dense])
    assert [section.name for section in sections] == ["truth", "guards", "length", "updates"]
    (truth,) = sections[0].panels
    assert [line.name for line in truth.lines] == ["score"]
    assert "Score minus outcome" not in panels(sections)

    outcome = trained("outcome", reward_funcs=[has_a, twice_a], advantage="group")
    sections = make_sections([outcome])
    assert [section.name for section in sections] == ["outcome", "guards", "length", "updates"]
    assert list(panels(sections))[:3] == ["has_a, training", "twice_a, training", "Weighted sum, training"]
    assert "Steps per response" not in panels(sections)

    both = panels(make_sections([dense, outcome]))
    assert [line.name for line in both["Steps per response"].lines] == ["dense"]
    assert [line.name for line in both["has_a, training"].lines] == ["outcome"]
    assert [line.name for line in both["Tokens per response"].lines] == ["dense", "outcome"]
    assert both["has_a, training"].lines[0].slot == both["Tokens per response"].lines[1].slot == 1


# Pages and pictures ---------------------------------------------------------------------------------------------------


def test_every_plot_is_a_valid_svg_with_a_name_and_identifiers_of_its_own(finished_page):
    page = finished_page
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg role=.*?</svg>", page.source, re.DOTALL)]
    alone = sum(len(titles) == 1 for titles in PANELS.values())  # drawn for wide pages, and for phones
    assert alone == page.source.count('<div class="wide">') == page.source.count('<div class="phone">') > 0
    assert len(found) == len(captions(page)) + alone
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in found)
    assert not re.search("#0[1-5]0[1-5]0[1-5]", page.source)  # colours follow the page
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_the_page_loads_nothing_and_runs_nothing(finished_page):
    page = finished_page
    targets = [a[name] for _, a in page.tags for name in ("src", "href", "xlink:href") if name in a]
    assert all(target and target.startswith("#") for target in targets)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "image", "iframe")]
    assert not re.search(r"@import|url\((?!#)", page.source)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_has_the_format_that_its_name_says(finished, tmp_path, ending):
    figure = tmp_path / "new" / f"curves.{ending}"
    assert main(["report", "--runs", finished.args.output_dir, "--figure", str(figure)]) == 0
    assert [path.name for path in figure.parent.iterdir()] == [figure.name]
    if ending == "png":
        pixels = matplotlib.image.imread(figure)
        assert pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == pytest.approx(1.0)
    else:
        root = ElementTree.parse(figure).getroot()
        assert root.tag == f"{SVG}svg"
        axes = [group.get("id") for group in root.iter(f"{SVG}g") if (group.get("id") or "").startswith("axes_")]
        assert len(axes) >= sum(map(len, PANELS.values()))


def test_a_name_with_markup_stays_text(tmp_path):
    attack = "_<script>alert(1)</script> & $\\frac{$</svg>"
    log = {"rewards__f__mean": {1: 0.5, 2: 0.6}, "step_rewards__rm__mean": {1: 0.0}, "rewards__rm__mean": {1: 0.2}}
    runs = [run_of(attack, f"{attack}{seed}", **log | {f"guards__alarm__{attack}": {2: 1.0}}) for seed in (0, 1)]
    page = page_of(tmp_path, runs, title=f"</title>{attack}")
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.inside("h1") == [f"</title>{attack}"]
    assert attack in captions(page)
    assert page.inside("table", "results", "td")[-6:-3] == [attack, f"{attack}0", "metrics.json"]
    save_training_figure(tmp_path / "curves.svg", runs)
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    legend = next(group for group in root.iter(f"{SVG}g") if group.get("id") == "legend_1")
    assert len([group for group in legend.iter(f"{SVG}g") if (group.get("id") or "").startswith("text_")]) == 1


def test_lines_are_told_apart_without_colour(tmp_path):
    runs = [run_of(f"arm {n}", f"{n}", rewards__f__mean={1: 0.5, 2: n / 9}) for n in range(9)]
    page = page_of(tmp_path, runs)
    legend = re.findall(r'style="color: (.*?)">.*?<path d="(M1[48][^"]*)"', page.source)
    assert len(legend) == 9
    assert len(set(legend)) == 9
    assert len({shape for _, shape in legend[:4]}) == 4


# Groups ---------------------------------------------------------------------------------------------------------------


def seeds(values: np.ndarray, name: str = "a", key: str = "rewards__f__mean") -> list[Run]:
    """One run for each row of values."""
    return [run_of(name, f"{name}{i}", **{key: dict(enumerate(row, start=1))}) for i, row in enumerate(values.tolist())]


def test_runs_of_one_name_are_a_mean_with_the_interval_of_the_plain_bootstrap():
    values = np.random.default_rng(1).normal(size=(5, 7))
    line = make_line("a", 0, seeds(values), "rewards/f/mean")
    assert line is not None
    assert line.updates.tolist() == list(range(1, 8))
    assert line.mean == pytest.approx(values.mean(axis=0))
    drawn = np.random.default_rng(0).integers(5, size=(1000, 5))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975], axis=0)
    assert line.low == pytest.approx(low)
    assert line.high == pytest.approx(high)


def test_the_interval_of_the_mean_is_near_that_of_all_draws_there_are():
    values = np.random.default_rng(2).normal(size=(4, 3))
    means = np.array([values[list(drawn)].mean(axis=0) for drawn in itertools.product(range(4), repeat=4)])
    exact = np.quantile(means, [0.025, 0.975], axis=0)
    spread = values.max(axis=0) - values.min(axis=0)
    assert (np.abs(np.array(interval_of_mean(values, draws=20_000)) - exact) < 0.03 * spread).all()


def test_a_group_is_drawn_where_all_of_its_runs_have_a_value():
    long = run_of(folder="long", rewards__f__mean={1: 0.0, 2: 0.2, 3: 0.4, 4: 1.0})
    short = run_of(folder="short", rewards__f__mean={1: 1.0, 3: 0.6})
    line = make_line("a", 0, [long, short], "rewards/f/mean")
    assert line is not None
    assert (line.updates.tolist(), line.mean.tolist()) == ([1, 3], [0.5, 0.5])
    (sentence,) = early_ends([long, short, run_of("b", "b", rewards__f__mean={9: 0.0})])
    assert "The lines of a end at update 3, where short ends; long continues to 4." in sentence


def test_one_run_has_no_band_and_the_page_speaks_of_none(tmp_path):
    values = np.random.default_rng(3).random((2, 5))
    one, two = seeds(values[:1]), seeds(values, "two")
    assert "95 %" not in page_of(tmp_path, one).source
    page = page_of(tmp_path, [*one, *two])
    assert "the band is the 95 % interval of that mean, from a bootstrap over runs" in page.source
    means, ends = values.mean(axis=0), np.sort(values[:, -1])
    last = f"{means[-1]:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"  # of two runs: from one to the other
    assert page.inside("table", "results", "td", "n")[:2] == [f"{values[0, -1]:.3f}", last]


@pytest.mark.parametrize("count", [1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 3])
def test_a_long_log_is_drawn_by_means_of_neighbours_and_says_so(tmp_path, count):
    values = np.random.default_rng(4).random((2, count))
    runs = seeds(values)
    line = make_line("a", 0, runs, "rewards/f/mean")
    assert line is not None
    size = math.ceil(count / MOST_POINTS)
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    assert line.updates.tolist() == [block[-1] + 1 for block in blocks]
    assert len(blocks) <= MOST_POINTS
    assert line.mean == pytest.approx([values[:, list(block)].mean() for block in blocks])
    assert ("neighbouring values" in page_of(tmp_path, runs).source) == (count > MOST_POINTS)


# Histories ------------------------------------------------------------------------------------------------------------


def test_what_is_no_finite_number_is_left_out_and_the_later_of_two_counts():
    history = [
        {"kl": 1.0, "step": 1},
        {"kl": 2, "loss": math.nan, "note": "x", "flag": True, "epoch": 0.5, "step": 1},
        {"kl": None, "reward": math.inf, "step": 2},
        {"kl": 9.0},
        "nonsense",
    ]
    assert metrics_by_update(history) == {"kl": {1: 2.0}}


def test_a_metric_under_two_names_is_taken_under_the_one_that_most_runs_have():
    new, old = (
        {"guards__truncated": {1: 0.5}, "completions__clipped_ratio": {1: 0.5}},
        {"completions__clipped_ratio": {1: 0.1}},
    )
    assert panels(make_sections([run_of(**new)]))["Share cut at the length limit"].keys == ("guards/truncated",)
    both = make_sections([run_of(**new), run_of("b", "b", **old)])
    assert panels(both)["Share cut at the length limit"].keys == ("completions/clipped_ratio",)


def test_the_total_is_drawn_unless_it_is_what_the_one_function_gave():
    same = {"rewards__f__mean": {1: 0.25, 2: 0.5}, "reward": {1: 0.25, 2: 0.5}}
    assert "Weighted sum, training" not in panels(make_sections([run_of(**same)]))
    assert "Weighted sum, training" in panels(make_sections([run_of(**same | {"reward": {1: 0.5, 2: 1.0}})]))


def test_a_folder_may_have_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"history": [{"kl": 1.0, "step": 1}]}))
    assert [run.name for run in read_runs([str(folder)])] == ["lr=0.1"]
    assert [run.name for run in read_runs([f"fast={folder}"])] == ["fast"]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> Path:
    """Folders of runs, and of what is none."""
    history = {"good": [{"kl": 1.0, "step": 1}], "other": [{"kl": 1.0, "step": 2}]}
    for name in ("good", "other", "twin/good"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps({"history": history[Path(name).name]}))
    for name, text in {
        "empty": None,
        "broken": '{"history": [',
        "rm": json.dumps({"history": [{"eval_step_auc": 0.9, "loss": 0.1, "step": 1}]}),
        "silent": json.dumps({"history": []}),
        "judged": json.dumps({"step_auc": 0.9}),
    }.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "metrics.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--runs", "none"], "There is no folder none. Give `runs` the output folders"),
        (["--runs", "a=none"], "There is no folder none."),
        (["--runs", "a="], "`runs` holds 'a='. Give NAME=DIR"),
        (["--runs", "=good"], "`runs` holds '=good'. Give NAME=DIR"),
        (
            ["--runs", "empty"],
            "empty has no metrics.json with a history, no trainer_state.json and no complete checkpoint",
        ),
        (["--runs", "judged"], "judged has no metrics.json with a history"),
        (["--runs", "broken"], "broken/metrics.json is invalid JSON"),
        (
            ["--runs", "good", "rm"],
            "metrics.json in rm logs no reward, guard, length or KL, but eval_step_auc, loss: it is",
        ),
        (["--runs", "silent"], "metrics.json in silent logs no reward, guard, length or KL, but nothing"),
        (["--runs", "a=good", "b=./good"], "twice. Give each run once"),
        (["--runs", "good", "twin/good"], "2 runs are called 'good', good by its folder only. Give each as NAME=DIR"),
        (["--runs", "good", "good=twin/good"], "2 runs are called 'good', good by its folder only"),
        (["--runs", "a=good", "a=other"], "The 2 runs called 'a' have logged nothing at the same update."),
        (["--runs", "good", "--results", "r.jsonl"], "Give either `results`"),
        ([], "Give either `results`"),
        (["--runs", "good", "--metrics", "kl"], "`metrics` has an effect only with `results`"),
        (["--results", "r.jsonl", "--figure", "f.png"], "`figure` has an effect only with `runs`"),
        (["--runs", "good", "--output", "page.md"], "`output` is page.md. Give a name that ends in .html."),
        (["--runs", "good", "--figure", "f.pdf"], "`figure` is f.pdf. Give a name that ends in .png or .svg."),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(folders, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    is_complete = not arguments or {"--output", "--figure", "--results"} & set(arguments)
    more = [] if is_complete else ["--output", "page.html", "--figure", "curves.png"]
    assert main(["report", *arguments, *more]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert said.endswith(".\n")
    assert sorted(folders.rglob("*")) == before


def test_runs_without_a_place_to_write_are_refused(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    assert main(["report", "--runs", "good"]) == 2
    assert "`runs` become a page or a picture. Give `output`" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named_before_anything_is_read(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "--runs", "none", "--output", "page.html"]) == 2
    assert 'pip install "fractal-rm[plots]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "values", [(5.5451, 5.5455), (0.0, 1.0), (0.0, 0.0), (3.0, 3.0), (-2e-16, 6e-16), (1e4, 1e4 + 1)]
)
def test_no_two_ticks_of_an_axis_read_the_same(values):
    line = Line("ppo", 0, np.array([1, 9]), np.array(values), 1, None, None)
    with new_figure(4.7, 2.3) as figure:
        axes = figure.add_subplot()
        draw_panel(axes, Panel("Entropy", ("entropy",), [line], []), PAGE, 9)
        read = [axes.yaxis.get_major_formatter()(tick, None) for tick in axes.get_yticks()]
    assert len(read) > 2
    assert len(set(read)) == len(read)
    assert max(map(len, read)) <= 12
