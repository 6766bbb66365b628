"""tools/predict.py as a user runs it: sources, forms of results, exit codes."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tool_runner import ROOT, run_tool, tool_environment
from torch import nn

from detector.apps.export import FORMATS, FormatName
from detector.apps.predict import Kind, PredictCommandOptions, Stop, predict
from detector.data.preprocess import Preprocessing
from detector.inference.detections import Detections
from detector.inference.detector import Detector
from detector.inference.writers import WRITERS
from detector.models.build import NetworkOptions

CLASSES = ("car", "cat", "kite")


@pytest.fixture
def checkpoint(tmp_path: Path, small_spec: dict[str, Any], excite: Callable[[nn.Module], nn.Module]) -> Path:
    """A small random detector that finds something everywhere."""
    torch.manual_seed(0)
    detector = Detector(NetworkOptions.parse(small_spec), CLASSES, Preprocessing(short_side=64, long_side=96))
    excite(detector.network)
    detector.save(tmp_path / "detector.ckpt")
    return tmp_path / "detector.ckpt"


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


def test_a_folder_with_a_broken_image(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    outcome = run_tool("predict", f"ckpt={checkpoint}", "source=2024", "score_threshold=0", cwd=tmp_path)
    assert outcome.code == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert "1 could not be read:" in outcome.err
    assert "2024/broken.jpg: not an image" in outcome.err
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


def test_types_name_all_kinds_of_results_and_formats() -> None:
    assert get_args(Kind) == tuple(WRITERS)
    assert get_args(FormatName) == (*FORMATS, "all")


def test_what_cannot_be_written_is_named(
    tmp_path: Path,
    folder: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(image: Image.Image, path: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    options = PredictCommandOptions(ckpt=str(checkpoint), source=str(folder), out=str(tmp_path / "out"), device="cpu")
    with pytest.raises(SystemExit) as ended, caplog.at_level("INFO"):
        predict(options)
    assert ended.value.code == 1
    names = ", ".join(str(folder / name) for name in ("a.jpg", "a.png", "sub/a.png"))
    message = f"3 could not be written (No space left on device), give another out=DIR for them: {names}"
    assert message in caplog.messages
    assert files(tmp_path / "out") == ["detections.json"]
    message = run_tool("predict", f"ckpt={checkpoint}", "source=2024", "out=detector.ckpt", cwd=tmp_path).error()
    assert "Cannot write to 'detector.ckpt': File exists. Choose another out=." in message


def check_same(records: list[dict[str, Any]], expected: list[Detections]) -> None:
    """The records of a tool, and what the library finds in this process: torch may round otherwise in the other."""
    assert [record["path"] for record in records] == [found.path for found in expected]
    for record, found in zip(records, expected, strict=True):
        assert record["names"] == found.names
        np.testing.assert_allclose(record["scores"], found.scores, atol=1e-4)
        np.testing.assert_allclose(np.reshape(record["boxes"], (-1, 4)), found.boxes, atol=1e-2)


@pytest.mark.slow
def test_a_list_a_pattern_and_all_options(
    tmp_path: Path, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library with the same options; without any one of them, that finds something else."""
    outcome = run_tool(
        "predict", f"ckpt={checkpoint}", "source=[2024/a.jpg,['2024/sub/*.png']]", "out=found", "score_threshold=0.1",
        "classes=[cat,2]", "max_proposals=5", "tile=[40,40,10]", "flip=true", "batch_size=2", "max_pixels=4000",
        "save=[jsonl,csv,coco]", "device=cpu", "threads=1", cwd=tmp_path,
    ).ok()  # fmt: skip
    assert "objects in 2 images: found" in outcome.err
    assert files(tmp_path / "found") == ["coco.json", "detections.csv", "detections.jsonl"]
    records = [json.loads(line) for line in (tmp_path / "found/detections.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == ["2024/a.jpg", "2024/sub/a.png"]
    monkeypatch.chdir(tmp_path)
    detector = Detector.load(checkpoint, "cpu")
    source = ["2024/a.jpg", "2024/sub/a.png"]
    options: dict[str, Any] = {
        "score_threshold": 0.1, "classes": ["cat", 2], "max_proposals": 5, "tile": (40, 40, 10), "flip": True,
    }  # fmt: skip
    check_same(records, detector.predict(source, **options))
    assert min(len(record["names"]) for record in records) > 0
    assert (
        "threads=0: expected"
        in run_tool("predict", f"ckpt={checkpoint}", "source=a", "threads=0", cwd=tmp_path).error()
    )
    for name in options:
        others = detector.predict(source, **{key: value for key, value in options.items() if key != name})
        with pytest.raises(AssertionError):
            check_same(records, others)


@pytest.mark.slow
def test_results_of_an_earlier_run_are_not_searched(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    originals = {name: (folder / name).read_bytes() for name in files(folder)}
    for source in (".", "**/*.[jp][pn]g"):
        run_tool("predict", f"ckpt={checkpoint}", f"source='{source}'", cwd=folder).ok()
        records = json.loads((folder / "predictions/detections.json").read_text())
        assert [record["path"] for record in records] == ["a.jpg", "a.png", "sub/a.png"]
        assert files(folder / "predictions") == ["a.png", "a_2.png", "detections.json", "sub/a.png"]
    assert {name: (folder / name).read_bytes() for name in originals} == originals


def test_no_original_is_replaced(tmp_path: Path, folder: Path, checkpoint: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    message = run_tool("predict", f"ckpt={checkpoint}", "source=2024", "out=2024", cwd=tmp_path).error()
    assert "out=2024: is the folder that is searched" in message
    assert "out=2024/predictions" in message
    assert files(folder) == sorted(before)
    run_tool("predict", f"ckpt={checkpoint}", "source=a.png", "out=.", cwd=folder).ok()
    assert files(folder) == sorted([*before, "a_2.png", "detections.json"])
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_an_export(tmp_path: Path, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from detector.export.formats import export_onnx

    detector = Detector.load(checkpoint, "cpu")
    export_onnx(detector, tmp_path / "best.onnx")
    run_tool("predict", "ckpt=best.onnx", "source=2024", "score_threshold=0.1", "flip=true", cwd=tmp_path).ok()
    out = tmp_path / "predictions"
    assert files(out) == ["a.png", "a_2.png", "detections.json", "sub/a.png"]
    monkeypatch.chdir(tmp_path)
    expected = detector.predict("2024", score_threshold=0.1, flip=True)
    check_same(json.loads((out / "detections.json").read_text()), expected)
    assert sum(map(len, expected)) > 0
    message = run_tool("predict", "ckpt=best.onnx", "source=2024", "max_proposals=5", cwd=tmp_path).error()
    assert "max_proposals=5" in message
    assert "fixed when it was exported" in message


def test_a_video(tmp_path: Path, checkpoint: Path) -> None:
    av = pytest.importorskip("av")
    from detector.inference.video import write_video

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
        ("save=[pictures]", ['save=["pictures"]: expected some of images, crops, json']),
        ("classes=[cow]", ["there is no 'cow'", "0: car, 1: cat, 2: kite"]),
        ("tile=[640,640]", ["tile=[640, 640]", "(width, height, overlap)"]),
        ("every=0", ["every=0"]),
        ("max_proposals=0", ["max_proposals=0"]),
        ("batch_size=0", ["batch_size=0"]),
        ("max_pixels=3000", ["2024/a.jpg", "64 x 48 pixels", "2 more could not be read"]),
        ("device=abacus", ["abacus"]),
        ("source='http://127.0.0.1:9/a.jpg'", ["127.0.0.1", "allow_private=True"]),
        ("source='ftp://host/a.jpg'", ["addresses of ftp are not read"]),
        ("source=webcam:97", ["webcam:97"]),
        ("source='rtsp://user:secret@127.0.0.1:9/1'", ["error: rtsp://127.0.0.1:9/1: no stream there"]),
        ("source=[none.jpg,nothing.jpg]", ["none.jpg: no such file", "1 more could not be read"]),
        ("source=2025", ["2025: no such file"]),
    ],
)
def test_what_cannot_be(tmp_path: Path, folder: Path, checkpoint: Path, override: str, parts: list[str]) -> None:
    if "webcam" in override or "rtsp" in override:
        pytest.importorskip("av")
    source = [] if override.startswith("source") else ["source=2024"]
    message = run_tool("predict", f"ckpt={checkpoint}", *source, override, cwd=tmp_path).error()
    assert [part for part in parts if part not in message] == [], message
    left = files(tmp_path / "predictions") if (tmp_path / "predictions").exists() else []
    if "webcam" in override or "rtsp" in override:
        # Its lines are written as it goes, and this one says why there is no more.
        assert left == ["detections.jsonl"]
        [line] = (tmp_path / "predictions/detections.jsonl").read_text().splitlines()
        assert json.loads(line)["error"] in message
        assert "secret" not in line
    else:
        assert left == []


def test_what_is_written_at_the_end_is_no_choice_for_a_camera(tmp_path: Path, checkpoint: Path) -> None:
    source = "source=[a.jpg,[webcam:0]]"
    message = run_tool("predict", f"ckpt={checkpoint}", source, "save=[coco,images,json]", cwd=tmp_path).error()
    assert "coco, json is written at the end" in message
    assert "save=[images,jsonl]" in message
    assert not (tmp_path / "predictions").exists()


# A camera that never stops, in a program of its own.
ENDLESS = """
import sys, runpy
sys.path.insert(0, "{tools}")
import numpy as np
from detector.inference import sources
from detector.inference.video import Frame

def camera(name, *, every):
    for index in range(10**9):
        yield Frame(np.full((48, 64, 3), index % 256, np.uint8), index, index / 10, 10.0)

sources.read_camera = camera
sys.argv = ["predict.py", "ckpt={ckpt}", "source=webcam:0", "out=out", *sys.argv[1:]]
runpy.run_path("{tools}/predict.py", run_name="__main__")
"""


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file that is being written."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_waits_for_what_is_being_written(number: signal.Signals) -> None:
    before, done = signal.getsignal(number), []
    for writing in (True, False):
        stop = Stop()
        with stop.ends():
            for index in range(5):
                if not writing and index == 2:
                    signal.raise_signal(number)
                with stop.waits():
                    done.append(f"copy {index}")
                    if writing and index == 1:
                        signal.raise_signal(number)
                    done.append(f"line {index}")
        assert signal.getsignal(number) == before
    assert done == ["copy 0", "line 0", "copy 1", "line 1"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "overrides"),
    [(signal.SIGINT, []), (signal.SIGTERM, ["save=[images,jsonl,csv]", "score_threshold=0"])],
)
def test_a_camera_is_followed_and_ended(
    tmp_path: Path, checkpoint: Path, number: signal.Signals, overrides: list[str]
) -> None:
    av = pytest.importorskip("av")
    program, lines = ENDLESS.format(tools=ROOT / "tools", ckpt=checkpoint), tmp_path / "out" / "detections.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", program, *overrides], cwd=tmp_path, env=tool_environment(), stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while len(whole_lines(lines)) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(records) >= 5
    assert [record["frame"] for record in records] == list(range(len(records)))
    # Each image is in all results or in none.
    assert f" in {len(records)} images: out" in err
    with av.open(str(tmp_path / "out/webcam_0.mp4")) as container:
        assert len(list(container.decode(video=0))) == len(records)
    if overrides:
        with (tmp_path / "out/detections.csv").open(newline="") as file:
            frames = [int(row["frame"]) for row in csv.DictReader(file)]
        assert frames == [record["frame"] for record in records for _ in record["names"]]
        assert len(frames) > 0
    assert files(tmp_path / "out") == sorted(
        ["detections.jsonl", "webcam_0.mp4", *(["detections.csv"] if overrides else [])]
    )
