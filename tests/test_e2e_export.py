"""tools/export.py and tools/eval.py on exports, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scored_data import SIZES, write_scored_data
from tool_runner import run_tool
from torch import nn

from detector.data.preprocess import Preprocessing
from detector.inference.detector import Detector
from detector.models.build import NetworkOptions

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow
NAMES = ("circle", "square", "triangle")


@pytest.fixture
def checkpoint(tmp_path: Path, small_spec: dict[str, Any], excite: Callable[[nn.Module], nn.Module]) -> Path:
    """A small random detector that says it was trained on images on which its AP is neither 0 nor 1."""
    root = tmp_path / "shapes"
    torch.manual_seed(0)
    data = {
        "root": str(root),
        "generate": None,
        "missing": None,
        "keep_empty": True,
        "train": {"annotations": "annotations/train.json", "images": "images", "limit": None},
        "val": {"annotations": "annotations/val.json", "images": "images", "limit": None},
    }
    detector = Detector(
        NetworkOptions.parse(small_spec), NAMES, Preprocessing(short_side=64, long_side=96), {"config": {"data": data}}
    )
    excite(detector.network)
    write_scored_data(root, detector, sizes=SIZES * 2)
    detector.save(tmp_path / "run" / "best.ckpt")
    return tmp_path / "run" / "best.ckpt"


def test_export_checks_itself_and_is_scored_like_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    outcome = run_tool("export", f"ckpt={checkpoint}", "check.images=4", cwd=tmp_path).ok()
    assert "onnx" in outcome.err
    exported = checkpoint.with_name("best.onnx")
    report = json.loads(checkpoint.with_name("best.check.json").read_text())
    assert report["images"] == 4
    assert [row["name"] for row in report["rows"]] == ["torch", "onnx"]
    row = report["rows"][1]
    assert row["passed"] is True
    assert row["difference"]["box"] < 0.05
    assert row["difference"]["score"] < 1e-3
    assert row["file_bytes"] == exported.stat().st_size
    for path, out in ((checkpoint, "a"), (exported, "b")):
        run_tool("eval", f"ckpt={path}", f"out={out}", "workers=0", cwd=tmp_path).ok()
    scores = [json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("a", "b")]
    for figure in ("AP", "AR100", "AR10"):
        assert scores[0][figure] > 0.05
        assert scores[1][figure] == pytest.approx(scores[0][figure], abs=1e-3)
    assert (tmp_path / "b" / "detections.json").is_file()


def test_what_a_smaller_budget_of_proposals_costs(checkpoint: Path, tmp_path: Path) -> None:
    run_tool("eval", f"ckpt={checkpoint}", "max_proposals=2", "report=false", "workers=0", cwd=tmp_path).ok()
    # Not where the figures of all proposals belong, which tools/compare.py takes.
    assert not (checkpoint.parent / "eval").exists()
    found = json.loads((checkpoint.parent / "eval_2_proposals" / "detections.json").read_text())
    shapes = tmp_path / "shapes"
    described = json.loads((shapes / "annotations" / "val.json").read_text())
    detector = Detector.load(checkpoint, "cpu")
    expected = [
        row
        for entry in described["images"]
        for row in detector.predict(shapes / "images" / entry["file_name"], max_proposals=2, score_threshold=0)[
            0
        ].to_coco(entry["id"], [category["id"] for category in described["categories"]])
    ]
    assert 0 < len(found) == len(expected) <= 2 * len(NAMES) * len(described["images"])
    ranked = [sorted(row["score"] for row in rows) for rows in (found, expected)]
    assert ranked[0] == pytest.approx(ranked[1], abs=1e-4)
    exported = tmp_path / "a.onnx"
    exported.write_bytes(b"")
    outcome = run_tool("eval", f"ckpt={exported}", "max_proposals=2", cwd=tmp_path)
    assert "an export's number of proposals is fixed" in outcome.error()


def test_a_worse_export_gives_exit_code_1(checkpoint: Path, tmp_path: Path) -> None:
    # No export is ten points better than its checkpoint.
    overrides = [f"ckpt={checkpoint}", "check.images=6", "check.max_drop.float32=-10", "batch=1", "size=32x32"]
    outcome = run_tool("export", *overrides, cwd=tmp_path)
    assert outcome.code == 1
    assert "failed: onnx: AP is" in outcome.err
    assert "Traceback" not in outcome.err
    rows = {row["name"]: row for row in json.loads(checkpoint.with_name("best.check.json").read_text())["rows"]}
    assert [row["passed"] for row in rows.values()] == [True, True, False]
    # What the small size itself costs is told, though it is no fault of the export.
    assert rows["torch, any size"]["drop"] < -5
    assert abs(rows["onnx"]["drop"]) < 0.1


def test_all_formats_in_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    overrides = ["format=all", "out=exports", "check.images=2", "check.max_drop={float32: 100, int8: 100}"]
    run_tool("export", f"ckpt={checkpoint}", *overrides, "calibration_images=6", cwd=tmp_path, timeout=600).ok()
    names = sorted(path.name for path in (tmp_path / "exports").iterdir())
    assert names == [
        "best.bin", "best.check.json", "best.half.ckpt", "best.int8.bin", "best.int8.onnx", "best.int8.xml",
        "best.onnx", "best.pt2", "best.xml",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "exports" / "best.check.json").read_text())["rows"]
    assert [row["name"] for row in rows][1:] == ["onnx", "openvino", "torch_export", "int8", "int8_onnx", "checkpoint"]
    assert all(row["passed"] for row in rows)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=tflite"], "format=tflite: expected onnx, openvino, torch_export, int8, int8_onnx, checkpoint or all"),
        (["size=256"], "size=256: expected dynamic, or height x width"),
        (["size=100x96"], "multiples of 32"),
        (["format=[]"], "format=[]: expected onnx, openvino"),
        (["check.threads=99999999999999999999"], "expected a whole number from 1 to 4096"),
        (["batch=4"], "batch=4: expected dynamic or 1"),
        (["out=model.pt2"], "ends in .onnx"),
        (["data.root=nowhere"], "nowhere"),
        (["data.root=nowhere"], "Or give check=null"),
        (["format=[onnx,int8]", "calibration=nowhere"], "nowhere"),
        (["format=[onnx,int8]", "check=null", "data.root=nowhere"], "Or give calibration=FOLDER"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in run_tool("export", f"ckpt={checkpoint}", *overrides, cwd=tmp_path).error()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["best.ckpt"]
