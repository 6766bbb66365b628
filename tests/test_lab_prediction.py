"""Timing of predictions: percentiles by hand, parts that do what a prediction does, and what the tool prints."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timed_calls import broken, sleeper
from tool_runner import run_tool

from detector.data.annotations import load_annotations
from detector.data.shapes import ensure_shapes
from detector.errors import InputError
from detector.export.formats import Inputs, export_onnx, export_openvino
from detector.inference.detector import Detector
from detector.inference.openvino_core import openvino_core
from detector.lab import gpu, prediction
from detector.lab.benchmark import BenchmarkOptions, benchmark
from detector.lab.latency import take_turns_apart
from detector.lab.prediction import (
    NO_PROPOSALS,
    PEERS,
    contest_predictions,
    exported_peer_names,
    network_multiply_adds,
    parts,
    peak_memory,
    peer,
)
from detector.models.build import NetworkOptions

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_parts_are_those_of_a_prediction(small_detector: Detector) -> None:
    before = [len(hooks._forward_hooks) for hooks in small_detector.network.modules()]
    spent = parts(small_detector, IMAGE, turns=2)
    assert list(spent) == ["pre-process", "backbone", "neck", "RPN", "head", "post-process"]
    assert all(milliseconds > 0 for milliseconds in spent.values())
    assert [len(hooks._forward_hooks) for hooks in small_detector.network.modules()] == before


def test_all_contestants_take_turns_with_every_number_of_threads(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_detector.save(tmp_path / "d.ckpt")
    monkeypatch.setattr(prediction, "peer", lambda name: torch.nn.Identity())
    monkeypatch.setattr(torch, "set_num_threads", lambda number: asked.append(number))
    asked: list[int] = []
    shown = []

    def in_this_process(makers: dict[str, Any], turns: int, title: str, *, settle: int) -> dict[str, list[float]]:
        assert (turns, settle) == (101, prediction.SETTLE)
        shown.append(title)
        for maker in pickle.loads(pickle.dumps(makers)).values():
            assert maker()() is not None
        base = [i / 1000 for i in range(1, 102)]
        return {name: base if name == "torch" else [1.25 * seconds for seconds in base] for name in makers}

    monkeypatch.setattr(prediction, "take_turns_apart", in_this_process)
    timings = contest_predictions(tmp_path / "d.ckpt", IMAGE, threads=[1, 2], turns=101, budgets=[5])
    assert shown == ["1 thread", "2 threads"]
    assert asked == [1] * 5 + [2] * 5
    names = ["torch", "torch, 5 proposals", *(f"torchvision {name}" for name in (*PEERS, NO_PROPOSALS))]
    assert [(timing["threads"], timing["name"]) for timing in timings] == [(n, name) for n in (1, 2) for name in names]
    percentiles = {"p50_ms": 51, "p90_ms": 91, "p99_ms": 100, "times_of_torch": 1}  # of 1, 2 ... 101 ms, by hand
    assert timings[0] == pytest.approx({"name": "torch", "threads": 1, **percentiles})
    assert timings[1]["times_of_torch"] == pytest.approx(1.25)


def test_contestants_run_in_processes_of_their_own() -> None:
    makers = {"a": partial(sleeper, 5), "b": partial(sleeper, 20)}
    times = take_turns_apart(makers, 4, "", settle=2)
    assert [len(seconds) for seconds in times.values()] == [4, 4]
    # Least times: a busy machine makes them longer, never shorter.
    assert 0.005 <= min(times["a"]) < 0.02 <= min(times["b"])
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("made", "b: ValueError: cannot be made"),
        pytest.param("called", "b: ValueError: cannot be called", marks=pytest.mark.slow),
        pytest.param("ended", "b: .* terminated abruptly", marks=pytest.mark.slow),
    ],
)
def test_a_contestant_that_fails_is_named(where: str, message: str) -> None:
    makers = {"a": partial(sleeper, 1), "b": partial(broken, where)}
    with pytest.raises(InputError, match=message):
        take_turns_apart(makers, 1, "", settle=0)
    assert not multiprocessing.active_children()


def test_multiply_adds_grow_with_the_canvas(small_detector: Detector) -> None:
    network = small_detector.network
    small, large = (np.zeros((side, side, 3), np.uint8) for side in (32, 64))
    size = small_detector.preprocessing
    assert size.target_size(32, 32) == size.target_size(64, 64)  # so the images' own size does not matter
    assert network_multiply_adds(small_detector, small) == network_multiply_adds(small_detector, large) > 0
    # What lies before the RoIs grows with the area, what is done for each RoI does not.
    at = [network_multiply_adds(small_detector, small, (64, side)) for side in (64, 128, 192)]
    assert at[2] - at[1] == at[1] - at[0] > 0
    assert not network.training


@pytest.mark.slow
@pytest.mark.parametrize(("name", "proposals"), [(PEERS[0], 150), (NO_PROPOSALS, 0), (PEERS[1], None)])
def test_what_a_peer_with_random_weights_works_on(name: str, proposals: int | None) -> None:
    """No boxes are kept, so its final NMS costs nothing; the RoIs of two stages are as many or as few as can be."""
    model, seen = peer(name), []
    if proposals is not None:
        model.roi_heads.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[1][0])))
    with torch.inference_mode():
        (found,) = model([torch.rand(3, 96, 128)])
    assert len(found["boxes"]) == 0
    assert seen == ([] if proposals is None else [proposals])


def test_peak_memory_sees_what_is_held() -> None:
    small, large = peak_memory("x = 0"), peak_memory("x = bytearray(200_000_000)")
    assert 150 < large - small < 260
    with pytest.raises(InputError, match="boom"):
        peak_memory("raise ValueError('boom')")


@pytest.mark.slow
def test_predictions_are_measured_beside_peers_that_are_exported_as_we_export(
    tmp_path: Path, small_detector: Detector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torchvision's have a fixed size, in float32 and with the convolutions in int8. All in one: exports take long."""
    for package in ("onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    small_detector.save(tmp_path / "d.ckpt")
    inputs: Inputs = {"batch": 1, "canvas": (32, 64)}
    export_onnx(small_detector, tmp_path / "d.onnx", **inputs)
    export_openvino(small_detector, tmp_path / "d.xml", tmp_path / "d.onnx", **inputs)
    written_peers: list[tuple[str, list[int], float]] = []

    def looked_at(image: np.ndarray, folder: Path, write: Any = prediction.write_peers) -> dict[str, Path]:
        files: dict[str, Path] = write(image, folder)
        written_peers.extend((name, *shape_and_int8(path)) for name, path in files.items())
        return files

    monkeypatch.setattr(prediction, "write_peers", looked_at)
    caplog.set_level("INFO")
    exports = [str(tmp_path / name) for name in ("d.onnx", "d.xml")]
    benchmark(
        BenchmarkOptions(
            what="predict", ckpt=str(tmp_path / "d.ckpt"), exports=exports, turns=1,
            threads=[1], budgets=[5], out=str(tmp_path / "p.json"), peers_exported=True,
        )
    )  # fmt: skip
    exported = {name: name.partition(" ")[0] for peer in PEERS for name in exported_peer_names(peer)}
    assert [name for name, _, _ in written_peers] == list(exported)
    for name, shape, share in written_peers:
        assert shape == [3, 480, 640]
        assert share > 0.95 if name.endswith("int8)") else share == 0
    written = json.loads((tmp_path / "p.json").read_text())
    peers = [f"torchvision {name}" for name in PEERS]
    names = ["torch", "torch, 5 proposals", "d.onnx", "d.xml", *peers, f"torchvision {NO_PROPOSALS}"]
    assert [row["name"] for row in written["contestants"]] == names
    assert set(written["peak_memory_mb"]) == {"torch", "d.onnx", "d.xml", *peers}
    assert all(megabytes > 50 for megabytes in written["peak_memory_mb"].values())
    assert "640 x 480" in written["picture"]
    assert re.search(r"torch \d.*, onnxruntime \d.*, openvino \d", written["machine"])
    rows = written["per_multiply_add"]
    assert [row["name"] for row in rows] == [*exported, "d.onnx", "d.xml"]
    assert all(row["ms"] > 0 for row in rows)
    costs = {row["name"]: row["multiply_adds"] for row in rows}
    image = np.zeros((480, 640, 3), np.uint8)
    assert costs["d.onnx"] == costs["d.xml"] == network_multiply_adds(small_detector, image, (32, 64))
    assert costs["d.xml"] < network_multiply_adds(small_detector, image)
    for name in (*names, *exported):
        assert f"| {name} " in caplog.text


def shape_and_int8(path: Path) -> tuple[list[int], float]:
    """The size of the input of an OpenVINO model, and what share of its convolutions has activations in int8."""
    model = openvino_core().read_model(path)
    layers = [node for node in model.get_ops() if "Convolution" in node.get_type_name()]
    before = [node.input(0).get_source_output().get_node().get_type_name() for node in layers]
    return list(model.input(0).shape), before.count("FakeQuantize") / len(layers)


def test_two_exports_of_one_name(tmp_path: Path) -> None:
    outcome = run_tool("benchmark", "predict", "ckpt=d.ckpt", "exports=[a/d.onnx,b/d.onnx]", cwd=tmp_path)
    assert "a/d.onnx and b/d.onnx have one name" in outcome.error()


def test_the_tool_needs_a_checkpoint(tmp_path: Path) -> None:
    assert "ckpt=RUN_DIR/best.ckpt" in run_tool("benchmark", "predict", cwd=tmp_path).error()


def test_training_steps_and_predictions_are_measured_by_layout_and_precision(
    small_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BATCHES", (2,)), ("SIZE", 64), ("OTHERS", [])):
        monkeypatch.setattr(gpu, name, value)
    root = ensure_shapes(tmp_path, seed=1, train=2, val=1, size=64)
    index = load_annotations(root / "annotations/train.json", root / "images")
    rows = gpu.measure(NetworkOptions.parse(small_spec), index, torch.device("cpu"), 1)
    assert [row["what"] for row in rows] == ["training step"] * 4 + ["prediction"] * 4
    assert {(row["memory"], row["precision"]) for row in rows[:4]} == {one[1:] for one in gpu.OWN}
    assert all(row["images_per_second"] == pytest.approx(2000 / row["ms"]) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_is_not_measured_where_there_is_none() -> None:
    with pytest.raises(InputError, match="torch sees no GPU here"):
        benchmark(BenchmarkOptions(what="gpu"))
