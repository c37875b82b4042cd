"""Pages in a real browser: they open from disk without complaint, and the viewer's controls do what they say."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest

from fractal_rm.report.quickstart_report import QuickstartReport, write_report
from fractal_rm.report.training_history import Run
from fractal_rm.report.training_report import write_training_report
from fractal_rm.report.viewer import write_viewer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


def response(name: str, scores: list[float], gold: list[int | None], label: float, **more) -> dict:
    texts = [f"Step {number} of {name}." for number in range(1, len(scores) + 1)]
    steps = [
        {"text": text, "score": score, "gold": value, "other_score": 1 - score}
        for text, score, value in zip(texts, scores, gold, strict=True)
    ]
    whole = {"score": min(scores), "other_score": 1 - max(scores)}
    return {"id": name, "prompt": "How many?", "steps": steps, "label": label} | whole | more


ROWS = [
    response("fine", [0.9, 0.8], [1, 1], 1.0),
    response("alarm", [0.9, 0.1], [1, 1], 1.0),
    response("missed", [0.7, 0.95], [1, 0], 0.0),
    response("found", [0.6, 0.2, 0.3], [1, 0, None], 0.0),
    response("half", [0.5], [None], 0.5),
    response(ATTACK, [0.5], [None], 0.0),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, file: Path, scheme: str):
    """A page; what it complains of and what it loads is collected, and must be nothing but itself."""
    page = browser.new_page(viewport={"width": 1000, "height": 700}, color_scheme=scheme)
    complaints, loaded = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: loaded.append(asked.url))
    page.goto(file.as_uri())
    yield page
    assert complaints == []
    assert loaded == [file.as_uri()]
    page.close()


@pytest.fixture(params=["light", "dark"])
def page(browser, tmp_path, request):
    """The viewer of ROWS."""
    file = tmp_path / "view.html"
    write_viewer(file, ROWS, threshold=0.5, models=("first", "second"))
    with opened(browser, file, request.param) as page:
        yield page


def shown(page) -> list[str]:
    # What is off the screen is not laid out, and has no inner text.
    return page.locator(".response:not([hidden]) h3").all_text_contents()


def test_filters_show_what_they_name(page):
    assert shown(page) == [row["id"] for row in ROWS]
    for choice, names in (
        ("alarm", ["alarm"]),
        ("missed", ["missed"]),
        ("good", ["fine", "alarm", "half"]),
        ("disagrees", ["alarm", "missed", ATTACK]),
    ):
        page.select_option("#show", choice)
        assert shown(page) == names
        assert page.locator("#count").inner_text() == f"{len(names)} of {len(ROWS)} shown"
    page.select_option("#show", "all")
    page.fill("#find", "of FOUND")
    assert shown(page) == ["found"]


def test_sorting_puts_first_what_it_names(page):
    for choice, first in (("worst", "alarm"), ("high", "fine"), ("wrong", "alarm"), ("apart", "fine")):
        page.select_option("#sort", choice)
        assert shown(page)[0] == first, choice
    page.select_option("#sort", "row")
    assert shown(page) == [row["id"] for row in ROWS]


def test_the_keyboard_goes_from_response_to_response_and_from_step_to_step(page):
    here = "document.activeElement.querySelector('h3, .text').innerText"
    for key, name in (
        ("j", "fine"),
        ("j", "alarm"),
        ("n", "Step 1 of alarm."),
        ("n", "Step 2 of alarm."),
        ("k", "fine"),
    ):
        page.keyboard.press(key)
        assert page.evaluate(here) == name
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.press("j")  # is now a letter to find
    assert page.locator("#find").input_value() == "j"


def test_a_step_tells_score_probability_rank_and_label_to_who_points_at_it(page):
    step = page.locator("#response-4 .step").nth(1)
    details = step.locator(".details")
    assert not details.is_visible()
    step.hover()
    assert details.is_visible()
    assert details.inner_text() == "score 0.2000: right with 20.0%, rank 1 of 3 from the worst, labelled wrong"
    page.mouse.move(0, 0)
    step.focus()
    assert details.is_visible()


def test_text_that_is_a_script_stays_text(page):
    assert page.title() == "Step scores"
    assert page.locator("h3").last.text_content() == ATTACK


def test_on_a_phone_nothing_is_wider_than_the_screen(page):
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return Array.from(canvas.getImageData(0, 0, 1, 1).data.slice(0, 3));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!words || !element.checkVisibility() || element.closest("select, script")) continue;
    const backs = [];
    for (let at = element; at; at = at.parentElement) backs.unshift(getComputedStyle(at).backgroundColor);
    const back = paint(["white", ...backs]), ink = paint([getComputedStyle(element).color]);
    const [low, high] = [light(back), light(ink)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.className, element.textContent.slice(0, 30)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}
"""


def test_every_text_has_the_contrast_that_wcag_asks_for(page):
    worst = page.evaluate(CONTRASTS)
    assert len(worst) > 30
    assert worst[0][0] >= 4.5, worst[:3]


def test_controls_have_names(page):
    for role, name in (("combobox", "Sort"), ("combobox", "Show"), ("searchbox", "Find")):
        assert page.get_by_role(role, name=name).is_visible()


def test_500_responses_make_a_page_under_5_mb_that_filters_at_once(browser, tmp_path):
    draw = random.Random(0)
    many = [response(f"row {i}", [draw.random() for _ in range(8)], [None] * 8, i % 2) for i in range(500)]
    for row in many:
        row["prompt"] = "How many apples? " * 30
    write_viewer(tmp_path / "many.html", many)
    assert (tmp_path / "many.html").stat().st_size < 5e6
    page = browser.new_page()
    page.goto(Path(tmp_path / "many.html").as_uri())
    page.fill("#find", "row 499")
    assert shown(page) == ["row 499"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_training_report_is_readable_in_both_modes_and_on_a_phone(browser, tmp_path, scheme):
    curve = {update: update / 9 for update in range(1, 10)}
    keys = ("rewards/f/mean", "guards/empty", "guards/alarm/empty", "completions/mean_length", "kl")
    runs = [Run(f"{ATTACK} {n}", f"runs/{'long-' * 30}{n}", "metrics.json", dict.fromkeys(keys, curve)) for n in (1, 2)]
    write_training_report(tmp_path / "training.html", runs)
    with opened(browser, tmp_path / "training.html", scheme) as page:
        assert page.title() == "Training"
        plots = page.get_by_role("img")
        assert plots.count() == 4
        assert "Alarms at update 1, 2, 3" in plots.nth(1).get_attribute("aria-label")
        worst = page.evaluate(CONTRASTS)
        assert len(worst) > 20
        assert worst[0][0] >= 4.5, worst[:3]
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert plots.first.bounding_box()["width"] > 300


def test_the_quickstart_report_is_whole_at_once_and_on_a_phone(browser, tmp_path):
    numbers = [(f"A number called {name}", "0.500", "0.400 before") for name in "abcde"]
    metrics = {f"metric_{number}_of_many": number / 20 for number in range(14)}
    rows = [{"arm": arm, "seed": 0, "metrics": metrics} for arm in ("reward_model", "outcome")]
    report = QuickstartReport("Quickstart", 0, "small", 1.0, headlines=numbers, examples=ROWS * 4, rows=rows)
    write_report(tmp_path / "report.html", report)
    with opened(browser, tmp_path / "report.html", "light") as page:
        # A capture of the whole page scrolls nowhere: all responses are laid out before anybody does.
        assert page.locator(".response .text").last.evaluate("text => text.getClientRects().length") == 1
        assert page.locator(".response").last.evaluate("row => getComputedStyle(row).contentVisibility") == "visible"
        tops = {box["y"] for box in (number.bounding_box() for number in page.locator(".headlines div").all())}
        assert len(tops) == 1  # five in one row
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for cell in page.locator(".results td").all():
            box = cell.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360  # every metric, without scrolling sideways
