"""Whoever runs a detector prepares images by `prepare`: with it broken, nobody gets as far as the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_data import write_scored_data

from detector.apps.evaluate import find_all
from detector.apps.report.two_stages import two_stages
from detector.data import preprocess
from detector.data.annotations import load_annotations
from detector.data.index import AnnotationIndex
from detector.export.parity import REFERENCE, take_turns
from detector.export.quantize import _samples
from detector.inference.detector import Detector
from detector.inference.export_info import ExportInfo
from detector.inference.runtime import ExportedDetector
from detector.lab.prediction import _network_call, parts
from detector.training.data_module import DetectionData
from detector.training.run_options import RunOptions

IMAGE = np.zeros((60, 90, 3), np.uint8)


class BrokenError(Exception):
    pass


def exported(detector: Detector, run: Any = None) -> ExportedDetector:
    return ExportedDetector(ExportInfo(detector.class_names, detector.preprocessing), run, Path("a.onnx"))


def validate(detector: Detector, index: AnnotationIndex) -> object:
    data = DetectionData(index, detector.preprocessing, RunOptions.parse({"val": {"batch_size": 2}, "workers": 0}))
    return list(data.val_dataloader())


CALLERS: dict[str, Callable[[Detector, AnnotationIndex], object]] = {
    "prediction": lambda detector, _: detector.predict(IMAGE),
    "an export": lambda detector, _: exported(detector).predict(IMAGE),
    "tiles": lambda detector, _: detector.predict(IMAGE, tile=(50, 50, 10), flip=True),
    "validation": validate,
    "evaluation of an export": lambda detector, index: find_all(exported(detector), index, 2),
    "the report's two stages": lambda detector, index: two_stages(detector, index),
    "the benchmark's parts": lambda detector, _: parts(detector, IMAGE, 1),
    "the comparison of exports": lambda detector, _: take_turns({REFERENCE: detector}, [IMAGE]),
    "calibration": lambda detector, _: _samples([IMAGE], exported(detector).info),
}


@pytest.mark.parametrize("name", CALLERS)
def test_breaking_prepare_breaks_every_caller(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = write_scored_data(tmp_path / "data", small_detector)
    index = load_annotations(root / "annotations/val.json", root / "images")

    def broken(*_: object) -> None:
        raise BrokenError

    monkeypatch.setattr(preprocess, "pad", broken)  # what every call of `prepare` comes to
    with pytest.raises(BrokenError):
        CALLERS[name](small_detector, index)


def test_the_benchmark_of_networks_prepares_too(small_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenError

    monkeypatch.setattr(preprocess, "pad", broken)
    monkeypatch.setattr("detector.lab.prediction.load", lambda *_, **__: small_detector)
    with pytest.raises(BrokenError):
        _network_call("a.onnx", IMAGE, threads=1)
