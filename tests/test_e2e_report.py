"""The report as a reader meets it: the real tool writes it, headless Chromium opens it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from report_case import CAT, CLASSES, SIZES, boxes_shown, write_case
from scored_data import write_scored_data
from tool_runner import run_tool

from detector.evaluation.metrics import METRICS
from detector.inference.detector import Detector

pytestmark = pytest.mark.slow

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NOTHING = "\N{EN DASH}"  # for a figure that does not exist
# What the page shows at first.
WRONG = {"localisation", "classification", "both", "duplicate", "background", "missed", "mistaken"}
AT_FIRST = WRONG | {"correct"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    import shutil

    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make browser")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs chromium: make browser")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of report_case and eval/ beside them."""
    folder = write_case(tmp_path_factory.mktemp("report") / "case")
    files = ("results=dt.json", "annotations=gt.json", "images=images")
    outcome = run_tool("eval", *files, cwd=folder).ok()
    assert "report.html" in outcome.err
    assert re.search(r"metrics \d+\.\d s, .*report \d+\.\d s", outcome.err)
    return folder


@contextmanager
def opened(browser: Any, path: Path, width: int = 1200, **options: Any) -> Iterator[Any]:
    """The page; whatever it asks for beyond itself, and whatever it complains about, is a failure."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    address = path.resolve().as_uri()
    page.goto(address)
    yield page
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert complaints == []


def test_numbers_are_those_of_the_metrics_file(browser: Any, case: Path) -> None:
    figures = json.loads((case / "eval/metrics.json").read_text())
    with opened(browser, case / "eval/report.html") as page:
        shown = {name: page.locator(f"[data-metric={name}]").inner_text() for name in METRICS}
        assert shown == {name: NOTHING if figures[name] is None else f"{figures[name]:.3f}" for name in METRICS}
        rows = page.locator("#classes tbody tr")
        classes = {row.locator("th").text_content(): row.locator("td").first.inner_text() for row in rows.all()}
        expected = {name: NOTHING if v is None else f"{v:.3f}" for name, v in figures["per_class"].items()}
        assert classes == expected
        assert set(expected) == set(CLASSES.values())
        assert page.locator("main b, main i").count() == 0
        # By AP, best first, after one click on its heading; absent values last.
        page.locator("#classes thead button").nth(1).click()
        order = [row.locator("th").text_content() for row in rows.all()]
        assert order == sorted(expected, key=lambda name: figures["per_class"][name] or -1, reverse=True)


def test_the_threshold_the_kinds_and_the_class_choose_the_boxes(browser: Any, case: Path) -> None:
    with opened(browser, case / "eval/report.html") as page:

        def drawn() -> int:
            count = page.locator("#pictures g.box").count()
            assert page.locator("#shown").inner_text() == f"{count} boxes shown"
            return count

        def move(threshold: float) -> None:
            page.locator("#threshold").fill(str(threshold))
            assert page.locator("#threshold-value").inner_text() == f"{threshold:.2f}"

        counts = []
        for threshold in (0.0, 0.25, 0.45, 0.65, 0.85, 1.0):
            move(threshold)
            counts.append(drawn())
            assert counts[-1] == boxes_shown(threshold, AT_FIRST)
        assert len(set(counts)) >= 4
        move(0.45)
        page.locator("#picture-class").select_option(label="cat")
        assert drawn() == boxes_shown(0.45, AT_FIRST, CAT) != boxes_shown(0.45, AT_FIRST)
        for kind, wanted in (
            ("correct", False),
            ("missed", False),
            ("found", True),
            ("crowd", True),
            ("ignored", True),
        ):
            page.locator(f"[data-kind={kind}]").first.set_checked(wanted)
        kinds = (AT_FIRST - {"correct", "missed"}) | {"found", "crowd", "ignored"}
        for threshold in (0.0, 0.5):
            move(threshold)
            assert drawn() == boxes_shown(threshold, kinds, CAT)
        assert page.locator("#pictures g.box text").count() == page.locator("#pictures g.box").count()
        page.locator("#named").uncheck()
        assert page.locator("#pictures g.box text").count() == 0


def test_boxes_lie_where_their_numbers_say(browser: Any, case: Path) -> None:
    with opened(browser, case / "eval/report.html") as page:
        page.locator("#threshold").fill("0.85")
        figure = page.locator("#pictures figure").filter(has_text="11.png")
        image, box = (
            figure.locator("img").bounding_box(),
            figure.locator("g.box[data-kind=correct] .edge").bounding_box(),
        )
        scale = image["width"] / SIZES[11][0]
        assert image["height"] == pytest.approx(SIZES[11][1] * scale, abs=1)
        left, top = (box["x"] - image["x"]) / scale, (box["y"] - image["y"]) / scale
        assert (left, top, box["width"] / scale, box["height"] / scale) == pytest.approx((10, 10, 40, 40), abs=1)


def test_curves_follow_the_chosen_class(browser: Any, case: Path) -> None:
    best = json.loads((case / "eval/diagnosis.json").read_text())["curves"]["f1"]
    with opened(browser, case / "eval/report.html") as page:
        assert f"best F1 {best['all']['best']['f1']:.3f} at" in page.locator("#curves").inner_text()
        assert page.locator("#curves svg.chart").count() == 2
        page.locator("#curve-class").select_option(label="cat")
        assert f"best F1 {best['per_class']['cat']['best']['f1']:.3f} at" in page.locator("#curves").inner_text()


@pytest.mark.parametrize("width", [360, 800])
def test_no_page_scrolls_sideways(browser: Any, case: Path, width: int) -> None:
    with opened(browser, case / "eval/report.html", width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        inside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, pre') && "
        inside += "e.getBoundingClientRect().right > innerWidth + 1).length"
        assert page.evaluate(inside) == 0


def luminance(colour: str) -> float:
    """WCAG 2: relative luminance of rgb(...)."""
    red, green, blue = (int(value) / 255 for value in re.findall(r"\d+", colour)[:3])
    linear = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue))
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


CONTRASTS = """() => {
  const clear = c => c === "rgba(0, 0, 0, 0)";
  const out = new Set();
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())) continue;
    if (node.closest("script, style, noscript, title, .picture, option, .skip")) continue;
    let ground = node;
    while (ground && clear(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
    const style = getComputedStyle(node), ink = node.closest("svg") ? style.fill : style.color;
    out.add(ink + "|" + getComputedStyle(ground || document.body).backgroundColor + "|" + node.tagName);
  }
  return [...out];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Any, case: Path, scheme: str) -> None:
    with opened(browser, case / "eval/report.html", color_scheme=scheme) as page:
        for turn in (scheme, {"light": "dark", "dark": "light"}[scheme]):
            page_colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (luminance(page_colour) < 0.1) == (turn == "dark")
            pairs = page.evaluate(CONTRASTS)
            assert len(pairs) > 10
            for pair in pairs:
                one, two = sorted(map(luminance, pair.split("|")[:2]))
                assert (two + 0.05) / (one + 0.05) >= 4.5, pair
            page.locator("#theme").click()


def test_everything_can_be_reached_with_the_keyboard(browser: Any, case: Path) -> None:
    with opened(browser, case / "eval/report.html") as page:
        wanted = page.evaluate(
            "[...document.querySelectorAll('a, button, input, select, summary, [tabindex=\"0\"]')]"
            ".filter(e => e.checkVisibility()).length"
        )
        seen, outlined = [], 0
        for _ in range(wanted + 5):
            page.keyboard.press("Tab")
            at = page.evaluate(
                "(() => { const e = document.activeElement; return e === document.body ? null : "
                "[[...document.querySelectorAll('*')].indexOf(e), e.id, getComputedStyle(e).outlineStyle]; })()"
            )
            if at is None:
                break
            seen.append(at)
            outlined += at[2] != "none"
        assert len({place for place, _, _ in seen}) == wanted == outlined
        assert {"theme", "threshold", "picture-class", "curve-class", "named"} <= {name for _, name, _ in seen}
        page.locator("#threshold").focus()
        before = float(page.locator("#threshold-value").inner_text())
        page.keyboard.press("ArrowRight")
        assert float(page.locator("#threshold-value").inner_text()) == pytest.approx(before + 0.01)
        # Landmarks, and headings that do not skip a level.
        assert [page.locator(tag).count() for tag in ("main", "nav", "header", "h1")] == [1, 1, 1, 1]
        assert page.locator("main > section[aria-labelledby]").count() == page.locator("main > section h2").count()


def test_results_without_images(browser: Any, case: Path) -> None:
    run_tool("eval", "results=dt.json", "annotations=gt.json", "out=bare", cwd=case).ok()
    with_images = json.loads((case / "eval/metrics.json").read_text())
    assert json.loads((case / "bare/metrics.json").read_text()) == with_images
    with opened(browser, case / "bare/report.html") as page:
        for section, words in (("pictures", "images=DIR"), ("proposals", "give ckpt="), ("model", "no model")):
            assert words in page.locator(f"#{section} .left-out").inner_text()
        assert page.locator("#errors table").count() > 0


def test_the_report_of_a_checkpoint(browser: Any, tmp_path: Path, small_detector: Detector) -> None:
    small_detector.save(tmp_path / "start.ckpt")
    root = write_scored_data(tmp_path / "data", small_detector)
    arguments = ("ckpt=start.ckpt", f"data.root={root}", "trainer.accelerator=cpu", "val.batch_size=2")
    run_tool("eval", *arguments, "report.proposals=3", cwd=tmp_path).ok()
    figures = json.loads((tmp_path / "eval/metrics.json").read_text())
    stages = json.loads((tmp_path / "eval/diagnosis.json").read_text())["two_stages"]
    assert stages["images"] == 3
    parameters = sum(parameter.numel() for parameter in small_detector.network.parameters())
    with opened(browser, tmp_path / "eval/report.html") as page:
        assert page.locator("[data-metric=AP]").inner_text() == f"{figures['AP']:.3f}"
        assert f"{parameters:,}" in page.locator("#model").inner_text()
        assert "96 x 64" in page.locator("#model").inner_text()
        assert page.locator("#proposals svg.chart").count() == 2
        assert f"{stages['recall']['all']['recall50'][-1]:.3f}" in page.locator("#proposals").inner_text()
        parts = dict(
            zip(*(page.locator(f"#times tbody tr > :nth-child({i})").all_inner_texts() for i in (1, 2)), strict=True)
        )
        assert set(parts) == {
            "load", "decode", "network", "post-process", "metrics", "files", "proposals", "cost", "doctor", "diagnosis",
            "report",
        }  # fmt: skip
        examined = page.locator("#extra-0").inner_text()
        assert "anchor_coverage" in examined
        assert "errors" in examined
        assert float(parts["network"]) > 0
        assert "score_threshold" in page.locator("#provenance").text_content()
        assert page.locator("#pictures figure").count() == 5


def test_a_large_data_set_is_left_to_the_doctor_itself(tmp_path: Path, small_detector: Detector) -> None:
    small_detector.save(tmp_path / "start.ckpt")
    root = write_scored_data(tmp_path / "data", small_detector)
    options = ("report.proposals=0", "report.doctor=2")
    run_tool("eval", "ckpt=start.ckpt", f"data.root={root}", *options, cwd=tmp_path).ok()
    page = (tmp_path / "eval/report.html").read_text()
    assert "5 images are more than report.doctor=2: run tools/doctor.py." in page


def test_a_report_can_be_left_out(tmp_path: Path, small_detector: Detector) -> None:
    small_detector.save(tmp_path / "start.ckpt")
    root = write_scored_data(tmp_path / "data", small_detector)
    run_tool("eval", "ckpt=start.ckpt", f"data.root={root}", "report=false", cwd=tmp_path).ok()
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"metrics.json", "detections.json", "scored.json"}


def test_what_does_not_go_together(case: Path) -> None:
    assert "annotations=" in run_tool("eval", "results=dt.json", cwd=case).error()
    assert "give one of them" in run_tool("eval", "results=dt.json", "ckpt=a.ckpt", cwd=case).error()
    overrides = ("results=dt.json", "annotations=gt.json", "max_proposals=5")
    assert "max_proposals=5 needs the detector" in run_tool("eval", *overrides, cwd=case).error()
    assert "ckpt is missing" in run_tool("eval", cwd=case).error()
    message = run_tool("eval", "results=none.json", "annotations=gt.json", cwd=case).error()
    assert "none.json: no such results file" in message
