"""Results of another detector are scored without ours; cost is that of the network as it was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_case import results, write_case
from scored_data import write_scored_data
from tool_runner import tool_environment

from detector.apps.evaluate import EvalOptions, evaluate
from detector.apps.report.reporting import _cost, _usual_canvas
from detector.data.annotations import load_annotations
from detector.errors import InputError
from detector.inference.detector import Detector
from detector.models.fuse import fuse

FILES = {"results": "dt.json", "annotations": "gt.json", "images": "images"}
REPORT = {"pictures": 2, "properties": 3, "proposals": 0, "doctor": 0}


def options(folder: Path, **changes: Any) -> EvalOptions:
    files = {key: str(folder / name) for key, name in FILES.items()}
    return EvalOptions.parse(files | {"report": REPORT} | changes)


def test_results_are_scored_and_reported(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "case")
    figures = evaluate(options(folder))
    assert json.loads((folder / "eval/metrics.json").read_text()) == figures
    diagnosis = json.loads((folder / "eval/diagnosis.json").read_text())
    assert (diagnosis["images"], diagnosis["truths"], len(diagnosis["worst"])) == (3, 6, 2)
    assert diagnosis["two_stages"] is None
    assert "brightness" in diagnosis["slices"]
    page = (folder / "eval/report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert {path.name for path in (folder / "eval").iterdir()} == {"metrics.json", "diagnosis.json", "report.html"}
    assert evaluate(options(folder, report=False, out=str(folder / "bare"))) == figures
    assert [path.name for path in (folder / "bare").iterdir()] == ["metrics.json"]
    assert "mAP" in evaluate(options(folder, metrics="voc", out=str(folder / "voc")))


def test_the_annotation_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_case(tmp_path / "case")
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    evaluate(options(folder))
    assert [opened.count(name) for name in ("gt.json", "dt.json")] == [1, 1]


def test_results_need_no_torch(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "case")
    code = (
        "import sys; from detector.apps.evaluate import EvalOptions, evaluate; "
        f"evaluate(EvalOptions.parse({options(folder).to_dict()})); "
        "print(sorted({'torch', 'torchvision', 'lightning', 'albumentations'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=tool_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": None}, "annotations=instances.json"),
        ({"ckpt": "a.ckpt"}, "give one of"),
        ({"max_proposals": 5}, "needs the detector"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate(options(tmp_path, **changes))


def test_cost_is_of_the_network_as_it_was_trained(tmp_path: Path, small_detector: Detector) -> None:
    # Images of 48 x 64, 64 x 48, 64 x 96, 40 x 100 and 80 x 60 for an input of 64 x 96: three canvases.
    root = write_scored_data(tmp_path / "data", small_detector)
    index = load_annotations(root / "annotations/val.json", root / "images")
    count = sum(parameter.numel() for parameter in small_detector.network.parameters())
    small_detector.network, small_detector.fused = fuse(small_detector.network), True
    assert sum(parameter.numel() for parameter in small_detector.network.parameters()) < count
    cost = _cost(small_detector, index, EvalOptions.parse({"val": {"batch_size": 2}}), [0.25, 0.5, 0.001])
    assert cost["parameters"] == count
    assert cost["ms"] == 250
    assert cost["batches"] == "3 batches of up to 2"
    assert cost["input"] == {"width": 96, "height": 64, "short_side": 64, "long_side": 96}
    assert cost["multiply_adds"] > 1e5


def test_the_usual_canvas(tmp_path: Path, small_detector: Detector) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    index = load_annotations(root / "annotations/val.json", root / "images")
    # 48 x 64 -> 64 x 85 -> canvas 64 x 96, as is 64 x 96, and 40 x 100 -> 38 x 96; the upright ones: 96 x 64.
    assert _usual_canvas(small_detector, index) == (64, 96)
    index.sizes[:] = np.array([[0, 0]])
    assert _usual_canvas(small_detector, index) == (64, 96)


def odd_results(folder: Path, **changes: Any) -> Path:
    """The case with the first detection changed."""
    rows = json.loads((folder / "dt.json").read_text())
    rows[0] |= changes
    (folder / "dt.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    "scores",
    [
        {0: 1.5}, {0: -1.0}, {0: 1e308, 1: -1e308}, {place: 100.0 * place - 300 for place in range(10)},
        dict.fromkeys(range(10), -1e308),
    ],
)  # fmt: skip
def test_scores_that_are_no_shares_are_scored_and_reported(tmp_path: Path, scores: dict[int, float]) -> None:
    """Metrics and report are those of any scores in the same order; only calibration has no meaning."""
    rows = results()
    for place, score in scores.items():
        rows[place]["score"] = score
    order = sorted({row["score"] for row in rows})
    ranks = [row | {"score": (1 + order.index(row["score"])) / len(order)} for row in rows]
    pages = {}
    for name, scored in (("odd", rows), ("ranks", ranks)):
        folder = write_case(tmp_path / name)
        (folder / "dt.json").write_text(json.dumps(scored))
        metrics = {protocol: evaluate(options(folder, metrics=protocol)) for protocol in ("pycocotools", "coco")}
        assert metrics["coco"] == metrics["pycocotools"]
        diagnosis = json.loads((folder / "eval/diagnosis.json").read_text())
        pages[name] = (metrics["coco"], {key: diagnosis[key] for key in ("tide", "worst", "confusion", "slices")})
        odd = name == "odd"
        assert (diagnosis["calibration"] is None) == odd
        assert ("scores lie outside 0 to 1" in (folder / "eval/report.html").read_text()) == odd
    assert pages["odd"] == pages["ranks"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": float("nan")}, "score is nan"),
        ({"score": float("-inf")}, "score is -inf"),
        ({"score": 10**400}, "score is 1000"),
        ({"score": "0.5"}, "score is '0.5'"),
        ({"bbox": [0, 0, 1e300, 1e300]}, "within 1e\\+150 pixels"),
        ({"bbox": [-1e300, 0, 1e300, 5]}, "within 1e\\+150 pixels"),
        ({"bbox": [5, 5, -3, 4]}, "no negative size"),
        ({"bbox": [5, 5, 3]}, "four finite numbers"),
        ({"image_id": 10**400}, "1 unknown image id"),
        ({"image_id": "x" * 1000}, "1 unknown image id"),
        ({"category_id": 999}, "1 unknown category id.* 999;"),
        ({"category_id": None}, "1 unknown category id.* None;"),
        ({"category_id": [3]}, r"1 unknown category id.* \[3\];"),
    ],
)
def test_numbers_that_no_metric_can_use_are_refused_by_entry(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = odd_results(write_case(tmp_path / "case"), **changes)
    with pytest.raises(InputError, match=rf"dt\.json.*{words}") as refused:
        evaluate(options(folder))
    assert len(str(refused.value)) < 600
    assert not (folder / "eval").exists()


def test_unknown_ids_of_several_kinds(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "case")
    rows = results()
    for row, image_id in zip(rows, (None, 999, "x", True, float("nan")), strict=False):
        row["image_id"] = image_id
    (folder / "dt.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"dt.json\[0\]: 5 unknown image id\(s\): None, 999, 'x', True, nan; the"):
        evaluate(options(folder))


@pytest.mark.parametrize("box", [[0, 0, 1e20, 1e20], [1e100, 1e100, 5, 5], [10, 10, 0, 40], [10, 10, 5e-324, 5e-324]])
def test_boxes_that_can_match_nothing_are_scored(tmp_path: Path, box: list[float]) -> None:
    folder = odd_results(write_case(tmp_path / "case"), bbox=box)
    metrics = {protocol: evaluate(options(folder, metrics=protocol)) for protocol in ("pycocotools", "coco")}
    assert metrics["coco"] == metrics["pycocotools"]
    assert (folder / "eval/report.html").is_file()
