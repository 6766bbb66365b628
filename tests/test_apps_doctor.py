"""tools/doctor.py as a process: exit codes, the JSON file, and a data set that training would refuse."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tool_runner import run_tool


def test_faults_are_reported_with_exit_code_1(tmp_path: Path, tiny_coco: Path) -> None:
    """tiny_coco has the same images in both splits: a leak."""
    path = tiny_coco / "annotations/train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["image_id"] = 5
    path.write_text(json.dumps(content))
    outcome = run_tool("doctor", f"data.root={tiny_coco}", "out=found", cwd=tmp_path)
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err
    report = json.loads((tmp_path / "found/doctor.json").read_text())
    errors = {f["check"] for f in report["findings"] if f["severity"] == "error"}
    assert errors == {"unknown_images", "leak"}
    for part in ("unknown_images", "leak", "take them out of one split", "found/doctor.json"):
        assert part in outcome.err


def test_warnings_alone_are_exit_code_0_and_train_command_lines_are_understood(tmp_path: Path, tiny_coco: Path) -> None:
    path = tiny_coco / "annotations/val.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        old = Image.open(tiny_coco / "images" / image["file_name"])
        image["file_name"] = f"val_{image['id']}.png"
        old.transpose(Image.Transpose.ROTATE_180).save(tiny_coco / "images" / image["file_name"])
    path.write_text(json.dumps(content))
    outcome = run_tool(
        "doctor", f"data.root={tiny_coco}", "recipe=finetune", "backbone=v2_0.5x", "rpn.scales=[8, 16]",
        "input.short_side=64", "input.long_side=96", "train.batch_size=2", cwd=tmp_path,
    ).ok()  # fmt: skip
    report = json.loads((tmp_path / "doctor/doctor.json").read_text())
    assert report["counts"]["error"] == 0
    assert report["counts"]["warning"] > 0
    anchors = next(f for f in report["findings"] if f["check"] == "anchor_coverage")
    assert anchors["figures"]["scales"] == [8, 16]
    assert "0 errors" in outcome.err


def test_mistakes_of_the_command_line(tmp_path: Path) -> None:
    assert "data.root=DIR" in run_tool("doctor", cwd=tmp_path).error()
    assert "no such folder" in run_tool("doctor", "data.root=nowhere", cwd=tmp_path).error()
    assert "workers=-1" in run_tool("doctor", "data.root=.", "workers=-1", cwd=tmp_path).error()
