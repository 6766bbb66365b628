"""tools/predict.py as a user runs it: sources, forms of results, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tool_runner import ROOT, run_tool, tool_environment

from detector.api import Detector
from detector.preprocess import Preprocessing

CLASSES = ("car", "cat", "kite")


@pytest.fixture
def checkpoint(tmp_path: Path, small_spec: dict[str, Any]) -> Path:
    path = tmp_path / "detector.ckpt"
    Detector(small_spec, CLASSES, Preprocessing(64, 96)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """2024/a.png, a.jpg and sub/a.png: noise."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "sub/a.png"):
        path = tmp_path / "2024" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return tmp_path / "2024"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_with_a_broken_picture(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    outcome = run_tool("predict", f"ckpt={checkpoint}", "source=2024", "score_threshold=0", cwd=tmp_path)
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "1 could not be read:" in outcome.err
    assert "2024/broken.jpg: not a picture" in outcome.err
    out = tmp_path / "predictions"
    assert files(out) == ["a.png", "a_2.png", "detections.json", "sub/a.png"]
    records = json.loads((out / "detections.json").read_text())
    assert [record["path"] for record in records] == [
        "2024/a.jpg", "2024/a.png", "2024/broken.jpg", "2024/sub/a.png",
    ]  # fmt: skip
    assert [record["error"] is None for record in records] == [True, True, False, True]
    assert [record["annotated"] for record in records] == [
        "predictions/a.png", "predictions/a_2.png", None, "predictions/sub/a.png",
    ]  # fmt: skip
    assert sum(len(record["scores"]) for record in records) > 0


def test_a_list_a_pattern_and_all_options(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    outcome = run_tool(
        "predict", f"ckpt={checkpoint}", "source=[2024/a.jpg,'2024/sub/*.png']", "out=found", "score_threshold=0",
        "classes=[cat,2]", "max_proposals=5", "tile=[40,40,10]", "flip=true", "batch_size=2", "max_pixels=4000",
        "save=[jsonl,csv,coco]", "device=cpu", cwd=tmp_path,
    ).ok()  # fmt: skip
    assert "objects in 2 pictures: found" in outcome.err
    assert files(tmp_path / "found") == ["coco.json", "detections.csv", "detections.jsonl"]
    records = [json.loads(line) for line in (tmp_path / "found/detections.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == ["2024/a.jpg", "2024/sub/a.png"]
    assert {name for record in records for name in record["names"]} <= {"cat", "kite"}


def test_a_video(tmp_path: Path, checkpoint: Path) -> None:
    av = pytest.importorskip("av")
    from detector.video import write_video

    with write_video(tmp_path / "drive.mp4", 10) as add:
        for index in range(9):
            add(np.full((48, 64, 3), 20 * index, np.uint8))
    run_tool("predict", f"ckpt={checkpoint}", "source=drive.mp4", "every=4", "out=out", cwd=tmp_path).ok()
    assert files(tmp_path / "out") == ["detections.json", "drive.mp4"]
    records = json.loads((tmp_path / "out/detections.json").read_text())
    assert [(record["frame"], round(record["time"], 2)) for record in records] == [(0, 0), (4, 0.4), (8, 0.8)]
    with av.open(str(tmp_path / "out/drive.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("save=[pictures]", ["there is no pictures", "images, crops, json"]),
        ("classes=[cow]", ["there is no 'cow'", "0: car, 1: cat, 2: kite"]),
        ("tile=[640,640]", ["tile=[640, 640]", "(width, height, overlap)"]),
        ("every=0", ["every=0"]),
        ("max_proposals=0", ["max_proposals=0"]),
        ("source='http://127.0.0.1:9/a.jpg'", ["127.0.0.1", "allow_private=True"]),
        ("source='ftp://host/a.jpg'", ["addresses of ftp are not read"]),
        ("source=webcam:97", ["webcam:97"]),
        ("source=[none.jpg,nothing.jpg]", ["none.jpg: no such file", "1 more could not be read"]),
        ("source=2025", ["2025: no such file"]),
    ],
)
def test_what_cannot_be(tmp_path: Path, folder: Path, checkpoint: Path, override: str, parts: list[str]) -> None:
    if "webcam" in override:
        pytest.importorskip("av")
    source = [] if override.startswith("source") else ["source=2024"]
    message = run_tool("predict", f"ckpt={checkpoint}", *source, override, cwd=tmp_path).error()
    assert [part for part in parts if part not in message] == [], message
    assert not (tmp_path / "predictions").exists() or files(tmp_path / "predictions") == []


ENDLESS = """
import sys, runpy
sys.path.insert(0, "{tools}")
import numpy as np
from detector import sources
from detector.video import Frame

def camera(name, *, every):
    for index in range(10**9):
        yield Frame(np.full((48, 64, 3), index % 256, np.uint8), index, index / 10, 10.0)
        if index == 5:
            print("five", flush=True)

sources.read_camera = camera
sys.argv = ["predict.py", "ckpt={ckpt}", "source=webcam:0", "out=out", "save=[jsonl,json]"]
runpy.run_path("{tools}/predict.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_camera_and_keeps_what_was_found(tmp_path: Path, checkpoint: Path) -> None:
    program = ENDLESS.format(tools=ROOT / "tools", ckpt=checkpoint)
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=tool_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "five\n"
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    records = json.loads((tmp_path / "out/detections.json").read_text())
    assert [record["frame"] for record in records] == list(range(len(records)))
    assert len(records) >= 5
    assert len((tmp_path / "out/detections.jsonl").read_text().splitlines()) in (len(records), len(records) + 1)
