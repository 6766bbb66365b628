"""Timing of predictions: percentiles by hand, parts that do what a prediction does, and what the tool prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runner import run_tool

from detector.api import Detector
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.lab import prediction
from detector.lab.latency import WARM_UP, take_turns
from detector.lab.prediction import PEERS, Timing, contest_predictions, network_multiply_adds, parts, peak_memory, peer

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def test_percentiles_by_hand() -> None:
    timing = Timing("x", 2, [i / 1000 for i in range(101)])
    assert timing.to_dict() == pytest.approx({"name": "x", "threads": 2, "p50_ms": 50, "p90_ms": 90, "p99_ms": 99})


def test_parts_are_those_of_a_prediction(small_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same boxes come out of the parts as out of `predict`."""
    (expected,) = small_detector.predict(IMAGE, score_threshold=0)
    seen = []
    monkeypatch.setattr(prediction, "restore_boxes", lambda boxes, *_: seen.append(boxes))
    clock = Clock()
    with torch.inference_mode():
        prediction._predict_in_parts(small_detector, IMAGE, clock)
    assert list(clock.seconds) == ["pre-process", "backbone", "neck", "RPN", "head", "NMS", "post-process"]
    assert len(expected) == len(seen[0]) > 0
    scale = prediction.input_scale(IMAGE.shape[:2], small_detector.preprocessing(IMAGE).shape[:2])
    np.testing.assert_allclose(seen[0] / np.tile(scale, 2), expected.boxes, atol=1e-3)


def test_parts_have_a_median_each(small_detector: Detector) -> None:
    spent = parts(small_detector, IMAGE, turns=2)
    assert len(spent) == 7
    assert all(milliseconds > 0 for milliseconds in spent.values())


def test_all_contestants_take_turns_with_every_number_of_threads(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_detector.save(tmp_path / "d.ckpt")
    monkeypatch.setattr(prediction, "peer", lambda name: torch.nn.Identity())
    before, shown = torch.get_num_threads(), []

    def progress(turns: object, title: str) -> object:
        shown.append((title, torch.get_num_threads()))
        return turns

    timings = contest_predictions(tmp_path / "d.ckpt", IMAGE, threads=[1, 2], turns=2, budgets=[5], progress=progress)
    assert shown == [("1 threads", 1), ("2 threads", 2)]
    assert torch.get_num_threads() == before
    names = ["torch", "torch, 5 proposals", *(f"torchvision {name}" for name in PEERS)]
    assert [(timing.threads, timing.name) for timing in timings] == [(n, name) for n in (1, 2) for name in names]
    assert all(len(timing.seconds) == 2 for timing in timings)


def test_multiply_adds_grow_with_the_canvas(small_detector: Detector) -> None:
    network = small_detector.network
    small, large = (np.zeros((side, side, 3), np.uint8) for side in (32, 64))
    size = small_detector.preprocessing
    assert size.target_size(32, 32) == size.target_size(64, 64)  # so the pictures' own size does not matter
    assert network_multiply_adds(small_detector, small) == network_multiply_adds(small_detector, large) > 0
    assert not network.training


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_keeps_nothing_and_so_pays_nothing_for_its_boxes(name: str) -> None:
    with torch.inference_mode():
        (found,) = peer(name)([torch.rand(3, 96, 128)])
    assert len(found["boxes"]) == 0


def test_peak_memory_sees_what_is_held() -> None:
    small, large = peak_memory("x = 0"), peak_memory("x = bytearray(200_000_000)")
    assert 150 < large - small < 260
    with pytest.raises(InputError, match="boom"):
        peak_memory("raise ValueError('boom')")


@pytest.mark.slow
def test_the_tool_prints_and_writes(tmp_path: Path, small_detector: Detector) -> None:
    small_detector.save(tmp_path / "d.ckpt")
    run_tool(
        "benchmark", "predict", "ckpt=d.ckpt", "turns=1", "threads=[1]", "budgets=[5]", "out=p.json", cwd=tmp_path
    ).ok()
    written = json.loads((tmp_path / "p.json").read_text())
    assert [row["name"] for row in written["contestants"]][:2] == ["torch", "torch, 5 proposals"]
    assert set(written["peak_memory_mb"]) == {"torch", *(f"torchvision {name}" for name in PEERS)}
    assert all(megabytes > 50 for megabytes in written["peak_memory_mb"].values())
    assert "640 x 480" in written["picture"]


def test_the_tool_needs_a_checkpoint(tmp_path: Path) -> None:
    assert "ckpt=RUN_DIR/best.ckpt" in run_tool("benchmark", "predict", cwd=tmp_path).error()


def test_settling_calls_are_made_and_not_timed() -> None:
    made = {"a": 0, "b": 0}

    def call(name: str) -> None:
        made[name] += 1

    times = take_turns({name: lambda name=name: call(name) for name in made}, range(WARM_UP + 2), settle=3)
    assert made == {"a": 4 * (WARM_UP + 2), "b": 4 * (WARM_UP + 2)}
    assert [len(seconds) for seconds in times.values()] == [2, 2]
