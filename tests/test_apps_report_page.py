"""The page is one safe file that says what the metrics say."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_case import CLASSES, FOUND, SIZES, ground_truth, results
from scored_rows import diagnose, evaluate

from detector.apps.report import page as report
from detector.apps.report.images import jpeg_uri, worst_images
from detector.apps.report.page import SIZE_LIMIT, Report, embed, format_times, short, write_report
from detector.apps.report.sections import class_section, confusion_section, curve_section, proposal_section
from detector.data.annotations import read_annotations
from detector.data.results import read_results
from detector.errors import InputError
from detector.evaluation.outcomes import judge
from detector.evaluation.records import sort_records
from detector.evaluation.worst import worst

ODD = CLASSES[8]


class Page(HTMLParser):
    """The tags of a page, and what its scripts hold, by somebody else's reading of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded


@pytest.fixture(scope="module")
def diagnosis() -> dict[str, Any]:
    return diagnose(results(), ground_truth())


def make(diagnosis: dict[str, Any], **changes: Any) -> Report:
    metrics = evaluate(results(), ground_truth())
    return Report(f"About {ODD}", ["nine & more"], metrics, diagnosis=diagnosis, **changes)


def entries(diagnosis: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What the page has of the worst images, all of one grey."""
    for image_id, (width, height) in SIZES.items():
        Image.new("RGB", (width, height), (90, 90, 90)).save(folder / f"{image_id}.png")
    index = read_annotations(ground_truth(), folder)
    return worst_images(diagnosis["worst"], read_results(results(), index), index, 300_000)


def sorted_names() -> list[str]:
    return [CLASSES[key] for key in sorted(CLASSES)]


def test_the_page_is_safe_and_whole(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, diagnosis: dict[str, Any]
) -> None:
    extra = [(ODD, {"<i>": ["&amp;", "]]>", "<!--", None, 3.0]})]
    whole = make(
        diagnosis,
        images=entries(diagnosis, tmp_path_factory.mktemp("images")),
        extra=extra,
        configs=[("a", f"name: {ODD}")],
    )
    size = write_report(tmp_path / "report.html", whole)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert size == (tmp_path / "report.html").stat().st_size
    page = Page(text)
    # Two scripts, the data and ours: nothing in a name has become a tag.
    assert [tag for tag, _ in page.tags].count("script") == len(page.scripts) == 2
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    assert "<" not in page.scripts[0]
    assert page.data["names"] == sorted_names()
    assert [row[0] for row in page.data["classes"]["rows"]] == sorted_names()
    assert page.data["extra"][0]["content"] == {"<i>": ["&amp;", "]]>", "<!--", None, 3.0]}
    assert page.text.count(f"About {ODD}") == 2  # title and heading
    assert page.data["metrics"] == evaluate(results(), ground_truth())
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_nothing_leaves_the_page() -> None:
    template = (Path(report.__file__).parent / "page.html").read_text()
    addresses = re.findall(r"(?:https?:|wss?:|ftp:)?//[\w.-]+\.\w+[^\"'\s]*", template)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # the name of SVG
    for tag, attributes in Page(template).tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    for call in (
        "fetch(",
        "XMLHttpRequest",
        "import(",
        "sendBeacon",
        "WebSocket",
        "innerHTML",
        "document.write",
        "eval(",
    ):
        assert call not in template
    assert "url(" not in template
    assert "default-src 'none'" in template


def test_json_between_script_tags() -> None:
    value = {"</script><!--": ["]]>&lt;\u2028\u2029", "\ud800", "é", 1.5, None]}
    text = embed(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    text.encode("utf-8")


def test_short_numbers() -> None:
    values = (0.123456789, 12345.678912, float("nan"), float("inf"), 7, True, None, "x")
    assert short({"a": values, 3: {"b": 1e-9}}) == {
        "a": [0.1234568, 12345.68, None, None, 7, True, None, "x"], "3": {"b": 1e-9}
    }  # fmt: skip
    assert f"{short(51 / 202):.3f}" == "0.252"  # and not 0.253, by way of 0.2525


def test_sections_that_are_left_out_say_why(tmp_path: Path, diagnosis: dict[str, Any]) -> None:
    write_report(tmp_path / "report.html", make(diagnosis, left_out={"model": "Because."}))
    data = Page((tmp_path / "report.html").read_text()).data
    assert data["left_out"] == {"model": "Because.", "pictures": "There is no image with an error to show."}
    assert data["proposals"] is None


def test_nothing_to_find(tmp_path: Path) -> None:
    truth = ground_truth() | {"annotations": []}
    empty = Report("t", [], evaluate(results(), truth), diagnosis=diagnose(results(), truth))
    write_report(tmp_path / "report.html", empty)
    data = Page((tmp_path / "report.html").read_text()).data
    assert data["left_out"]["curves"].startswith("There is no object")
    assert data["metrics"]["AP"] is None
    assert data["best"] is None
    nothing = Report("t", [], evaluate([], ground_truth()), diagnosis=diagnose([], ground_truth()))
    assert write_report(tmp_path / "report.html", nothing) > 0


def test_images_hold_every_detection_in_the_original_frame(tmp_path: Path) -> None:
    diagnosis = diagnose(results(), ground_truth(), score_threshold=0.65)
    assert sum(len(picture["detections"]) for picture in diagnosis["worst"]) == 5  # it lists those above
    shown = entries(diagnosis, tmp_path)
    assert [entry["name"] for entry in shown] == [picture["file_name"] for picture in diagnosis["worst"]]
    for entry in shown:
        image_id = int(entry["name"].removesuffix(".png"))
        assert (entry["width"], entry["height"]) == SIZES[image_id]
        expected = sorted(
            ((s, CLASSES[c], [float(v) for v in b], kind) for i, c, b, s, kind in FOUND if i == image_id), reverse=True
        )
        names = sorted_names()
        assert [(d["s"], names[d["c"]], d["b"], d["k"]) for d in entry["detections"]] == expected
        with Image.open(io.BytesIO(base64.b64decode(entry["jpeg"].partition(",")[2]))) as picture:
            assert picture.size == SIZES[image_id]
            assert abs(int(np.asarray(picture).mean()) - 90) <= 1


@pytest.mark.parametrize("shape", [(1500, 2000), (3000, 300), (1, 4000)])
def test_a_jpeg_keeps_to_its_budget(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    uri = jpeg_uri(noise, 120_000)
    assert len(uri) <= 120_000
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.format == "JPEG"
        assert max(picture.size) <= 800
        scale = max(picture.size) / max(shape)
        assert picture.size == pytest.approx((max(1, shape[1] * scale), max(1, shape[0] * scale)), abs=1)


def test_many_large_images_stay_within_the_limit(tmp_path: Path, diagnosis: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    budget = report.IMAGE_BUDGET // 12
    one = {"name": "a", "words": "", "width": 1600, "height": 1200, "detections": [], "objects": []}
    images = [one | {"jpeg": jpeg_uri(noise, budget)}] * 12
    assert sum(len(entry["jpeg"]) for entry in images) <= report.IMAGE_BUDGET
    size = write_report(tmp_path / "report.html", make(diagnosis, images=images * 4))
    assert 2_000_000 < size <= SIZE_LIMIT
    data = Page((tmp_path / "report.html").read_text()).data
    kept = len(data["pictures"]["list"])
    assert 12 <= kept < 48
    assert f"{48 - kept} more would have made this file too large" in data["pictures"]["text"]


def test_a_page_that_is_too_large_is_not_written(tmp_path: Path, diagnosis: dict[str, Any]) -> None:
    huge = make(diagnosis, configs=[("a", "x" * SIZE_LIMIT)])
    with pytest.raises(InputError, match="more than 5,000,000"):
        write_report(tmp_path / "report.html", huge)
    assert not list(tmp_path.iterdir())


def test_class_rows(diagnosis: dict[str, Any]) -> None:
    section = class_section(evaluate(results(), ground_truth()), diagnosis)
    rows = {row[0]: dict(zip(section["columns"], row, strict=True)) for row in section["rows"]}
    cat, odd, absent = rows["cat"], rows[ODD], rows[CLASSES[5]]
    assert (cat["objects"], odd["objects"], absent["objects"]) == (4, 2, 0)  # the crowd region is none
    assert absent["AP"] is absent["AP50"] is absent["F1"] is None
    # One of two objects, at a score below those of two wrong ones: precision 1/3 up to recall 0.5, 51 points of 101.
    assert odd["AP50"] == pytest.approx(51 / 101 / 3)
    # Cats by score: right, duplicate, badly placed, a wrong class, right: 2 of 4. F1 is 2 * 1 / (1 + 4) at the top, and
    # 2 * 2 / (5 + 4) with all but the faint one, which is more.
    assert (cat["F1"], cat["precision"], cat["recall"]) == pytest.approx((4 / 9, 2 / 5, 2 / 4))
    assert cat["best threshold"] == 0.11  # of equally good ones the lowest


def test_a_matrix_of_many_classes_keeps_those_that_are_confused() -> None:
    classes = 150
    matrix = np.diag(np.full(classes + 1, 5))
    matrix[149, 3] = 4
    matrix[7, 149] = 2
    matrix[20, classes] = 9  # not found: no confusion between classes
    names = [f"c{i}" for i in range(classes)] + ["background"]
    section = confusion_section({"names": names, "matrix": matrix.tolist(), "iou": 0.5, "score_threshold": 0.2})
    assert section["largest"] == [["c149", "c3", 4, 4 / 9], ["c7", "c149", 2, 2 / 7]]
    assert len(section["names"]) == len(section["totals"]) == 101
    assert {"c3", "c7", "c149"} < set(section["names"])
    assert section["names"][-1] == "background"
    assert section["shortened"].startswith("Of 150 classes")
    back = {(section["names"][r], section["names"][c]): n for r, c, n in section["cells"]}
    assert back["c149", "c3"] == 4
    assert all(matrix[names.index(r), names.index(c)] == n for (r, c), n in back.items())


def test_curves_of_very_many_classes_are_thinned() -> None:
    row = [i / 100 for i in range(101)]
    best = {"threshold": 0.37, "f1": 0.5, "precision": 0.5, "recall": 0.5}
    curve = {"f1": row, "precision": row, "recall": row, "best": best}
    names = [f"c{i}" for i in range(1200)]
    curves = {
        "recall": row, "precision": row, "precision_50": row,
        "precision_50_per_class": dict.fromkeys(names, row) | {"absent": None},
        "f1": {"thresholds": row, "all": curve, "per_class": dict.fromkeys(names, curve) | {"absent": None}},
    }  # fmt: skip
    section = curve_section(curves)
    assert section is not None
    assert section["recall"] == row[::5]
    assert section["f1_per_class"]["c9"] == {"f1": row[::5], "precision": row[::5], "recall": row[::5], "best": best}
    assert "absent" not in section["precision_per_class"]
    assert len(embed(short(section))) < 1_500_000


def test_proposals() -> None:
    recall = {"truths": 4, "recall50": [0.25, 0.75], "recall": [0.1, 0.4]}
    nothing = {"truths": 0, "recall50": None, "recall": None}
    histogram = [0] * 20
    histogram[5], histogram[6], histogram[9], histogram[19] = 1, 1, 1, 1  # IoU 0.25, 0.3, 0.45 and 0.95 up
    stages = {
        "images": 2, "limit": 50, "ms_shared": 3.14159,
        "recall": {"proposals": [10, 50], "all": recall, "small": nothing},
        "budgets": [
            {"proposals": 10, "AP": 0.1, "AP50": 0.2, "ms": 5.0}, {"proposals": 50, "AP": 0.3, "AP50": 0.4, "ms": 9.0}
        ],
        "anchors": {
            "foreground_iou": 0.7, "all": {"truths": 4, "unmatched": 0.75, "histogram": histogram},
            "small": {"truths": 0, "unmatched": None, "histogram": [0] * 20},
        },
    }  # fmt: skip
    section = proposal_section(stages)
    assert section["tradeoff"] == {"count": [10, 50], "AP": [0.1, 0.3], "ms": [5.0, 9.0]}
    assert section["tables"][0]["rows"] == [["all", 4, 0.25, 0.75], ["small", 0, None, None]]
    assert section["tables"][3]["rows"] == [["all", 4, 0.75, 0.25, 0.5, 0.0, 0.25], ["small", 0, None, *[None] * 4]]
    assert "3.14 ms" in section["text"]


def test_times_for_the_log() -> None:
    assert format_times({"network": 2.04, "report": 0.5}) == "2.5 s: network 2.0 s, report 0.5 s"


def test_what_is_found_below_the_threshold_is_on_the_page(tmp_path: Path) -> None:
    """The reader moves the threshold; here the only mistake goes with it."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 20, 20], "area": 400, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "dt.json").write_text(
        json.dumps([{"image_id": 1, "category_id": 1, "bbox": [8, 8, 20, 20], "score": 0.3}])
    )
    index = read_annotations(tmp_path / "gt.json", tmp_path)
    found = read_results(tmp_path / "dt.json", index)
    shown = worst(judge(sort_records(found, index)), 0.5)
    assert [row["badness"] for row in shown] == [1]
    (entry,) = worst_images(shown, found, index, 100_000)
    assert [(one["s"], one["o"]) for one in entry["detections"]] == [(0.3, 0)]
