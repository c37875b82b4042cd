"""Pages, plots and tables: read back with parsers that are not ours."""

import base64
import hashlib
import itertools
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from support.pages import Page

from benchmarks.common.marks import replace_table
from fractal_rm.cli.checks import check_matplotlib
from fractal_rm.evaluation.results import ResultsFile, read_results
from fractal_rm.report.pages import response_view
from fractal_rm.report.palette import SCORE_BINS, contrast, ink_on, score_class, score_colour
from fractal_rm.report.plots import FEWEST_IN_BIN, calibration_plot, learning_curves, save_picture
from fractal_rm.report.quickstart_report import QuickstartReport, compare_curves, rollouts_to_reach, write_report
from fractal_rm.report.tables import markdown_table, tabulate
from fractal_rm.report.viewer import write_viewer

CURVES = {
    "dense+outcome": [(0, 0.45), (512, 0.7), (1024, 0.82), (1536, 0.8)],
    "outcome": [(0, 0.45), (512, 0.52), (1024, 0.6), (1536, 0.7)],
}
RUNS = {arm: [curve] for arm, curve in CURVES.items()}


def example(steps, *, label: float | None = 1.0, gold=None, **more):
    """A scored response whose steps are lines; scores fall from 0.9."""
    response, rows = "\n".join(steps), []
    for index, text in enumerate(steps):
        start = sum(len(step) + 1 for step in steps[:index])
        row = {"text": text, "start": start, "end": start + len(text), "score": round(0.9 / (index + 1), 4)}
        rows.append(row if gold is None else {**row, "gold": gold[index]})
    scored = {"prompt": "How many?", "response": response, "label": label, "steps": rows, "score": rows[-1]["score"]}
    return {"id": f"row of {len(steps)}", **scored, **more}


def view(folder: Path, rows, **options) -> Page:
    write_viewer(folder / "view.html", rows, **options)
    return Page(folder / "view.html")


def result(arm="outcome", seed=0, **metrics):
    keys = {"benchmark": "quickstart", "arm": arm, "dataset": "arithmetic", "split": "test"}
    return {**keys, "seed": seed, "metrics": metrics}


@pytest.fixture
def report() -> QuickstartReport:
    return QuickstartReport(
        title="Quickstart <1>",
        seed=7,
        budget="small",
        seconds=61.2,
        headlines=[("step AUC", "0.987", "chance is 0.5")],
        curves=CURVES,
        findings=compare_curves(CURVES),
        examples=[
            example(["7 is right", "8 is right"], gold=[1, 1], id="first"),
            example(["9 is right", "1 is wrong", "2 is wrong"], gold=[1, 0, 0], label=0.0, id="second"),
        ],
        probs=[0.1, 0.4, 0.8, 0.9],
        labels=[0, 1, 1, 1],
        rows=[
            {
                **result("dense+outcome", accuracy=0.8),
                "command": "fractal-rm quickstart",
                "commit": "0123456789abcdef-dirty",
                "versions": {"torch": "2", "peft": None},
            }
        ],
        next_commands=[("fractal-rm score --help", "See what scoring takes")],
    )


# The viewer


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.text(st.characters(), min_size=1).filter(str.strip), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_every_step_stands_in_the_page_once_and_unchanged(tmp_path_factory, responses):
    page = view(tmp_path_factory.mktemp("page"), [example(steps) for steps in responses])
    expected = [re.sub("[\0\ud800-\udfff]", "\ufffd", text) for steps in responses for text in steps]
    assert page.inside("li", "step", "text") == expected
    for text in ("step", "text"):  # none of them opened a tag of its own
        assert sum(text in (a.get("class") or "").split() for _, a in page.tags) == len(expected)


def test_a_response_that_holds_a_script_stays_text(tmp_path):
    attack = "</span><script>alert(1)</script><img src=x onerror=alert(2)>"
    row = example([attack], id=attack, prompt=attack, gold=[0])
    failed = {"id": f'"{attack}', "error": attack, "prompt": [{"role": attack, "content": attack}]}
    page = view(tmp_path, [row, failed], title=f"</title>{attack}")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.inside("li", "step", "text") == [attack]


def test_the_page_allows_no_script_but_its_own(tmp_path, report):
    page = view(tmp_path, [example(["a"])])
    digest = base64.b64encode(hashlib.sha256(page.inside("script")[0].encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    write_report(tmp_path / "report.html", report)
    assert "script-src 'none'" in Page(tmp_path / "report.html").source.replace("&#39;", "'")


def test_pages_load_nothing(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    for page in (Page(tmp_path / "report.html"), view(tmp_path, [example(["see https://example.org/a.png"])])):
        loading = ("src", "srcset", "data", "action", "poster", "background", "href", "xlink:href")
        targets = [attributes[name] for _, attributes in page.tags for name in loading if name in attributes]
        assert all(target and target.startswith("#") for target in targets)
        assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "image", "img")]
        assert not re.search(r"@import|url\((?!#)", page.source)


def test_scores_and_gold_labels_are_shown(tmp_path):
    page = view(tmp_path, [example(["a", "b", "c", "d"], gold=[1, 0, None, 0], label=0.0)])
    assert page.inside("li", "step", "chip") == ["0.90", "0.45", "0.30", "0.23"]
    assert page.inside("li", "step", "wrong") == ["✗", "✗"]
    assert page.inside("li", "step", "right") == ["✓"]
    assert page.inside("li", "step", "first") == ["first wrong step"]
    steps = [(a["class"] or "").split() for tag, a in page.tags if tag == "li" and a.get("class")]
    assert steps == [["step", "s9"], ["step", "s4"], ["step", "s3"], ["step", "s2"]]
    assert page.source.index(">b</span>") < page.source.index("first wrong step") < page.source.index(">c</span>")


def test_a_score_at_the_threshold_calls_its_step_right():
    steps = [{"text": "a", "score": 0.4, "gold": gold} for gold in (1, 0)]
    assert [step.mistake for step in response_view({"steps": steps}, 1, threshold=0.4).steps] == ["", "missed error"]


def test_without_gold_labels_no_step_is_judged(tmp_path):
    page = view(tmp_path, [example(["a", "b"])])
    assert "✗" not in page.source
    assert "judged" not in [name for _, a in page.tags for name in (a.get("class") or "").split()]


def test_text_outside_the_steps_is_not_lost(tmp_path):
    row = {"prompt": "?", "label": None, "response": "Well: a; b.", "score": 0.5}
    row["steps"] = [
        {"text": "a", "start": 6, "end": 7, "score": 0.9},
        {"text": "b", "start": 9, "end": 10, "score": 0.5},
    ]
    assert view(tmp_path, [row]).inside("li", "outside", "text") == ["Well: ", "; ", "."]
    assert view(tmp_path, [example(["a", "b"])]).inside("li", "outside", "text") == []


def test_steps_that_did_not_fit_are_counted_and_shown_without_a_score(tmp_path):
    def notes(page):
        return [text for text in page.inside("div", "facts", "mark") if "max_length" in text]

    row = example(["a", "b", "c", "d"])
    cut = [{**row, "steps": row["steps"][:kept], "truncated_steps": 4 - kept} for kept in (4, 3, 2)]
    page = view(tmp_path, cut)
    assert notes(page) == ["1 step beyond max_length was not scored", "2 steps beyond max_length were not scored"]
    assert page.inside("li", "outside", "text") == ["\nd", "\nc\nd"]
    assert len(page.inside("li", "step", "chip")) == 4 + 3 + 2
    assert notes(view(tmp_path, [row])) == []


def test_the_viewer_says_why_a_response_score_can_be_lower_than_every_step_score(tmp_path):
    assert "the model's aggregation of the step scores" in view(tmp_path, [example(["a"])]).source


def test_a_response_that_was_not_scored_tells_why(tmp_path):
    row = {"id": "r", "prompt": "?", "label": None, "steps": [], "score": None, "error": "the response is empty"}
    page = view(tmp_path, [row, example(["a"])])
    assert page.inside("p", "error") == ["Not scored: the response is empty"]
    assert [a["data-state"] for tag, a in page.tags if tag == "article"] == ["error", ""]


def test_a_score_far_from_its_label_is_marked(tmp_path):
    rows = [example(["a"], label=label) for label in (0.0, 1.0, 0.5, None)]
    assert [a["data-state"] for tag, a in view(tmp_path, rows).tags if tag == "article"] == ["disagrees", "", "", ""]


def test_a_chat_is_shown_with_its_roles(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    page = view(tmp_path, [example(["4"], prompt=prompt)])
    assert page.inside("p", "prompt") == ["system: Be brief.\n\nuser: 2+2?"]


def test_a_long_prompt_is_folded_and_whole(tmp_path):
    page = view(tmp_path, [example(["a"], prompt="word " * 200)])
    assert page.inside("details", "prompt", "span") == ["word " * 200]


def test_a_score_that_is_no_number_is_a_dash(tmp_path):
    row = {"prompt": "?", "label": 1, "score": float("nan"), "steps": [{"text": "a", "score": None}]}
    page = view(tmp_path, [row])
    assert page.inside("li", "step", "chip") == ["—"]
    assert next(a["data-score"] for tag, a in page.tags if tag == "article") == ""


def test_a_file_without_responses_makes_a_page_that_says_so(tmp_path):
    assert "There are no responses" in view(tmp_path, []).source


def test_a_row_with_neither_steps_nor_error_is_named(tmp_path):
    with pytest.raises(ValueError, match="Row 2 has neither `steps` nor `error`"):
        view(tmp_path, [example(["a"]), {"prompt": "?"}])
    assert not list(tmp_path.iterdir())


def test_a_page_is_written_in_one_move(tmp_path, monkeypatch):
    target, seen = tmp_path / "view.html", []
    target.write_text("old", encoding="utf-8")
    replace = os.replace

    def watch(source, destination):
        new = Path(source).read_text(encoding="utf-8")
        seen.append((Path(source).parent, new.endswith("</html>\n"), target.read_text(encoding="utf-8")))
        replace(source, destination)

    monkeypatch.setattr(os, "replace", watch)
    write_viewer(target, [example(["a"])])
    assert seen == [(tmp_path, True, "old")]
    assert list(tmp_path.iterdir()) == [target]


# Colours


@given(st.floats(0, 1), st.sampled_from(["light", "dark"]))
def test_text_on_a_score_is_readable(score, mode):
    colour = score_colour(score, mode)
    assert contrast(colour, ink_on(colour)) >= 4.5


@given(st.floats(0, 1))
def test_a_score_has_the_class_of_the_nearest_bin(score):
    bins = np.linspace(0, 1, SCORE_BINS)
    chosen = int(score_class(score)[1:])
    assert abs(bins[chosen] - score) == pytest.approx(np.abs(bins - score).min())


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize(
    "sight",
    [
        pytest.param([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]], id="protanopia"),
        pytest.param([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]], id="deuteranopia"),
        pytest.param([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]], id="tritanopia"),
    ],
)
def test_wrong_and_right_stay_apart_for_colour_blind_readers(sight, mode):
    """Simulation of Machado, Oliveira and Fernandes (2009), distances in CIELAB."""

    def lab(colour):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.clip(sight @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
        xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]] @ linear
        f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 0.008856))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    wrong, middle, right = (lab(score_colour(score, mode)) for score in (0.0, 0.5, 1.0))
    assert np.linalg.norm(wrong - right) > 40
    assert min(np.linalg.norm(wrong - middle), np.linalg.norm(right - middle)) > 15


# Plots


@pytest.mark.parametrize(
    "draw",
    [
        lambda: learning_curves(CURVES),
        lambda: learning_curves(CURVES, baseline="outcome"),
        lambda: learning_curves({'<arm> & "quotes"': [(0, 0.5)]}),
        lambda: learning_curves({f"arm {n}": [(0, n / 6), (9, 0.5)] for n in range(6)}),
        lambda: calibration_plot([0.0, 0.5, 1.0], [0, 1, 1]),
        lambda: calibration_plot([0.2, 0.7], [0.0, float("nan")]),
    ],
)
def test_plots_are_valid_svg_that_follows_the_page(draw):
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert not list(root.iter("{http://www.w3.org/2000/svg}text"))  # letters are paths
    assert not list(root.iter("{http://www.w3.org/2000/svg}metadata"))
    assert "currentColor" in svg
    assert "var(--series-1" in svg
    assert not re.search("#0[1-5]0[1-5]0[1-5]", svg)  # no stand-in colour is left
    names = [element.get("id") for element in root.iter() if element.get("id")]
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
    assert len(names) == len(set(names))
    assert used
    assert set(used) <= set(names)
    assert draw() == svg


def test_two_plots_in_a_page_share_no_identifier(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    names = [attributes["id"] for _, attributes in Page(tmp_path / "report.html").tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_plots_ignore_and_keep_the_settings_of_the_user():
    plain = learning_curves(CURVES)
    with matplotlib.rc_context({"axes.linewidth": 9, "xtick.direction": "in", "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        assert learning_curves(CURVES) == plain
        assert dict(matplotlib.rcParams) == before


def test_plots_leave_no_figure_open():
    import matplotlib.pyplot

    learning_curves(CURVES)
    calibration_plot([0.5], [1])
    assert matplotlib.pyplot.get_fignums() == []


def test_points_of_the_calibration_plot_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    probs = generator.random(300)
    labels = (generator.random(300) < probs**2).astype(float)
    observed, predicted = calibration_curve(labels, probs, n_bins=10)
    description = ElementTree.fromstring(calibration_plot(probs.tolist(), labels.tolist())).get("aria-label") or ""
    points = re.findall(r"([\d.]+) predicted and ([\d.]+) observed", description)
    assert points == [(f"{p:.2f}", f"{o:.2f}") for p, o in zip(predicted, observed, strict=True)]


def test_a_nearly_empty_bin_has_no_point_of_calibration():
    def read(few):
        svg = calibration_plot([0.05] * FEWEST_IN_BIN + [0.95] * few, [0] * FEWEST_IN_BIN + [1] * few)
        return ElementTree.fromstring(svg).get("aria-label") or ""

    assert "0.95 predicted" in read(FEWEST_IN_BIN)
    assert "0.95 predicted" not in read(FEWEST_IN_BIN - 1)
    assert "no bin has 10 responses" in (ElementTree.fromstring(calibration_plot([0.5], [1])).get("aria-label") or "")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: learning_curves({}), "no learning curve"),
        (lambda: learning_curves({"outcome": []}), "without points"),
        (lambda: learning_curves(CURVES, baseline="other"), "'other' has no learning curve"),
        (lambda: calibration_plot([], []), "0 probabilities"),
        (lambda: calibration_plot([0.5], [1, 0]), "1 probabilities and 2 labels"),
        (lambda: calibration_plot([0.5], [math.nan]), "0 known"),
        (lambda: save_picture("picture.jpg", RUNS, [example(["a"])]), "must end|end the name in .png or .svg"),
        (lambda: save_picture("picture.png", RUNS, [{"error": "empty", "steps": []}]), "no scored response"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_extra_to_install_is_named(tmp_path, monkeypatch, report):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls = [
        check_matplotlib,
        lambda: learning_curves(CURVES),
        lambda: calibration_plot([0.5], [1]),
        lambda: save_picture(tmp_path / "a.png", RUNS, [example(["a"])]),
        lambda: write_report(tmp_path / "report.html", report),
    ]
    for call in calls:
        with pytest.raises(ImportError, match=r'Plots need matplotlib.*pip install "fractal-rm\[plots\]"'):
            call()
    assert not list(tmp_path.iterdir())
    view(tmp_path, [example(["a"])])  # reading scores needs no plots


def test_the_picture_is_white_and_twice_as_wide_as_it_is_shown(tmp_path):
    rows = [example(["a"] * n, gold=[n % 2] * n, label=float(n % 2)) for n in range(1, 30)]
    save_picture(tmp_path / "new" / "picture.png", RUNS, rows, baseline="outcome")
    pixels = matplotlib.image.imread(tmp_path / "new" / "picture.png")
    assert pixels.shape[1] == 1800
    assert pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == pytest.approx(1.0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_the_picture_can_be_svg(tmp_path):
    save_picture(tmp_path / "picture.svg", RUNS, [example(["a", "b"], gold=[1, None])])
    assert ElementTree.parse(tmp_path / "picture.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_picture_shows_the_mean_over_seeds_and_says_how_many_there_are(tmp_path):
    def texts(runs):
        save_picture(tmp_path / "picture.svg", runs, [example(["a"])])
        return re.findall(r"<!-- (.*?) -->", (tmp_path / "picture.svg").read_text())  # what its paths spell

    assert "one seed" in texts(RUNS)
    found = texts({"outcome": [[(0, 0.5), (64, 0.7)], [(64, 0.8), (0, 0.5)]]})
    assert "mean of 2 seeds; thin: single seeds" in found
    assert "75.0%" in found


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(OSError, match=r"picture\.png"):
        save_picture(tmp_path / "picture.png", RUNS, [example(["a"])])
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


# The quickstart report


def test_the_report_shows_all_it_was_given(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    page = Page(tmp_path / "report.html")
    assert page.inside("title") == page.inside("h1") == ["Quickstart <1>"]
    assert "Seed 7, budget small, 1 min 1 s." in page.source
    assert page.inside("dd", "value") == ["0.987"]
    assert page.inside("dd", "note") == ["chance is 0.5"]
    assert page.inside("ul", "findings", "li") == compare_curves(CURVES)
    assert [tag for tag, _ in page.tags].count("svg") == 2
    assert page.inside("table", "heat", "a") == ["first", "second"]
    assert page.inside("li", "step", "text") == ["7 is right", "8 is right", "9 is right", "1 is wrong", "2 is wrong"]
    assert page.inside("table", "results", "td") == ["dense+outcome"]
    assert page.inside("table", "results", "td", "n") == ["0.800"]
    assert "".join(text for path, text in page.texts if {"commands", "code"} <= set(path)) == "fractal-rm score --help"
    assert page.inside("footer") == ["Written by fractal-rm quickstart; commit 0123456789ab with changes; torch 2."]


def test_wrong_steps_are_marked_in_the_heat_map(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    page = Page(tmp_path / "report.html")
    cells = [text for path, text in page.texts if {"heat", "td", "span"} <= set(path)]
    assert cells == ["0.90", "0.45", "0.90", "0.45 ✗", "0.30 ✗"]
    groups = [text for path, text in page.texts if "group" in path and path[-1] == "th"]
    assert groups == ["right answer", "wrong answer"]
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == ["#response-1", "#response-2"]
    assert set(links) <= {f"#{a['id']}" for tag, a in page.tags if tag == "article"}


def test_empty_parts_are_left_out_of_the_report(tmp_path):
    write_report(tmp_path / "report.html", QuickstartReport("T", seed=0, budget="small", seconds=3))
    page = Page(tmp_path / "report.html")
    assert page.inside("h2") == []
    assert "3 s." in page.source


def test_a_report_with_labels_missing_is_refused(tmp_path):
    report = QuickstartReport("T", seed=0, budget="small", seconds=3, probs=[0.1, 0.2], labels=[1])
    with pytest.raises(ValueError, match="2 probabilities and 1 labels"):
        write_report(tmp_path / "report.html", report)


curve = st.dictionaries(st.integers(0, 20), st.floats(0, 1), min_size=1).map(lambda d: list(d.items()))


@given(curve, st.floats(0, 1))
def test_the_accuracy_is_reached_at_the_first_point_that_is_not_below(points, accuracy):
    reached = rollouts_to_reach(points, accuracy)
    at_least = [rollouts for rollouts, value in points if value >= accuracy]
    assert reached == (min(at_least) if at_least else None)


@given(curve, curve)
def test_findings_say_whether_an_arm_lost_or_fell(dense, outcome):
    first, own, other = compare_curves({"dense+outcome": dense, "outcome": outcome})
    final = dict(outcome)[max(dict(outcome))]
    assert ("did not reach" in first) == all(value < final for _, value in dense)
    for points, sentence in ((dense, own), (outcome, other)):
        ended = dict(points)[max(dict(points))]
        assert ("ended at its best" in sentence) == (ended == max(value for _, value in points))
    ended = dict(dense)[max(dict(dense))]
    assert ("below outcome" in own) == (ended < final)


def test_findings_read_well():
    assert compare_curves(CURVES) == [
        "dense+outcome reached the final accuracy of outcome (70.0%) after 512 rollouts; outcome needed 1,536.",
        "dense+outcome ended at 80.0%, 10.0 points above outcome; its best was 82.0%, after 1,024 rollouts.",
        "outcome ended at its best, 70.0%.",
    ]
    swapped = compare_curves(CURVES, arm="outcome", baseline="dense+outcome")
    assert swapped[0] == "outcome did not reach the final accuracy of dense+outcome (80.0%) within 1,536 rollouts."


def test_an_arm_without_a_curve_cannot_be_compared():
    with pytest.raises(ValueError, match="'dense\\+outcome' has no learning curve"):
        compare_curves({"outcome": [(0, 0.5)]})


# Tables


def test_rows_of_results_become_the_expected_markdown(tmp_path):
    file = ResultsFile(tmp_path / "results.jsonl")
    common = {"benchmark": "quickstart", "dataset": "arithmetic", "split": "test", "config": {}, "seconds": 1.0}
    measured = [
        ("dense+outcome", 0, {"accuracy": 0.9, "rollouts": 4096}),
        ("outcome", 0, {"accuracy": 0.7, "rollouts": 4096, "step_auc": float("nan")}),
        ("dense+outcome", 1, {"accuracy": 0.8, "rollouts": 4096}),
        ("outcome", 1, {"accuracy": 0.71, "rollouts": 4096, "step_auc": 0.5}),
    ]
    for arm, seed, metrics in measured:
        file.append(arm=arm, seed=seed, metrics=metrics, **common)
    assert markdown_table(read_results(file.path)) == (
        "| arm | seeds | accuracy | rollouts | step_auc |\n"
        "|---|---:|---:|---:|---:|\n"
        "| dense+outcome | 2 | 0.850 ± 0.071 | 4,096 | — |\n"
        "| outcome | 2 | 0.705 ± 0.007 | 4,096 | 0.500 (1 of 2) |"
    )


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True))
def test_seeds_are_averaged(values):
    rows = [result(seed=seed, accuracy=value) for seed, value in enumerate(values)]
    ((arm, seeds, cell),) = tabulate(rows).cells
    assert (arm, seeds) == ("outcome", str(len(values)))
    mean, spread = map(float, cell.split(" ± "))
    assert mean == pytest.approx(np.mean(values), abs=5.1e-4)
    assert spread == pytest.approx(np.std(values, ddof=1), abs=5.1e-4)


def test_a_run_that_was_repeated_counts_once_with_its_later_row():
    rows = [result(accuracy=0.1), result(accuracy=0.9)]
    assert tabulate(rows) == (["arm", "accuracy"], [["outcome", "0.900"]], 1)


def test_columns_that_tell_lines_apart_are_kept():
    rows = [result(accuracy=0.5), {**result(accuracy=0.6), "split": "validation"}]
    assert tabulate(rows).header == ["arm", "split", "accuracy"]
    assert tabulate(rows, metrics=["accuracy"]).cells == [
        ["outcome", "test", "0.500"],
        ["outcome", "validation", "0.600"],
    ]


def test_a_name_cannot_break_a_table():
    assert markdown_table([result("a|b\nc", accuracy=1.0)]).splitlines()[2] == "| a\\|b c | 1.000 |"


def test_a_table_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no rows of results"):
        markdown_table([])
    with pytest.raises(ValueError, match="No row has the metric 'auc'"):
        markdown_table([result(accuracy=1.0)], metrics=["auc"])


def test_a_table_in_a_document_is_replaced_and_stays():
    document = "# Title\n<!-- table: main -->\nold\n<!-- end of table: main -->\nafter\n"
    table = markdown_table([result(accuracy=0.5)])
    once = replace_table(document, "main", table)
    assert once == f"# Title\n<!-- table: main -->\n{table}\n<!-- end of table: main -->\nafter\n"
    assert replace_table(once, "main", table) == once


def test_marks_that_are_missing_or_doubled_are_named():
    start, end = "<!-- table: a -->", "<!-- end of table: a -->"
    for pieces in itertools.chain([(start,), (end,), (), (end, start), (start, start, end), (start, end, end)]):
        with pytest.raises(ValueError, match="table: a"):
            replace_table("\n".join(pieces), "a", "new")
