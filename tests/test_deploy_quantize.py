"""Quantization: which layers turn to int8, and what that does to the detections."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from detector.api import Detector
from detector.deploy.export import export_onnx
from detector.deploy.parity import REFERENCE, take_turns
from detector.deploy.quantize import export_int8, float_layers
from detector.deploy.runtime import ExportedDetector
from detector.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def node(kind: str, inputs: list[str], output: str) -> object:
    return onnx.helper.make_node(kind, inputs, [output], name=f"{kind}-{output}")


def test_float_layers_of_a_graph_drawn_by_hand() -> None:
    # pixels -> stem -> body -> rpn -> {objectness, deltas} -> rois ; body -> thin ; sampled -> hidden -> {class, box}
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["pixels", "w"], "stem"),
            node("Relu", ["stem"], "active"),
            node("Conv", ["active", "w"], "body"),
            node("Conv", ["body", "w"], "rpn"),
            node("Conv", ["rpn", "w"], "objectness"),
            node("Conv", ["rpn", "w"], "deltas"),
            node("Add", ["objectness", "deltas"], "rois"),
            node("Conv", ["body", "w"], "thin"),
            node("GridSample", ["thin", "rois"], "sampled"),
            node("MatMul", ["sampled", "w"], "hidden"),
            node("Relu", ["hidden"], "rectified"),
            node("Gemm", ["rectified", "w", "b"], "class"),
            node("MatMul", ["rectified", "w"], "box"),
        ],
        "detector",
        [],
        [],
    )
    kept = {"Conv-stem", "Conv-objectness", "Conv-deltas", "Gemm-class", "MatMul-box"}
    assert set(float_layers(graph)) == kept


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (8, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [None, (64, 96)])
def test_int8_finds_nearly_the_same(small_detector: Detector, tmp_path: Path, canvas: tuple[int, int] | None) -> None:
    info = export_int8(small_detector, tmp_path / "a.onnx", noise(40, seed=1), batch=None, canvas=canvas)
    assert info.precision == "int8"
    assert info.provenance["export"]["calibration_pictures"] == 40
    export_onnx(small_detector, tmp_path / "float.onnx", canvas=canvas)
    quantized = onnx.load(tmp_path / "a.onnx")
    assert {entry.domain for entry in quantized.opset_import} == {""}
    assert {step.domain for step in quantized.graph.node} == {""}
    # Weights are stored as int8: of the 130 KB of this network nearly all of it.
    kinds = Counter(entry.data_type for entry in quantized.graph.initializer)
    assert kinds[onnx.TensorProto.INT8] > 25
    exported = ExportedDetector.load(tmp_path / "a.onnx", threads=1)
    assert exported.info == info
    contestants = {
        REFERENCE: small_detector,
        "float": ExportedDetector.load(tmp_path / "float.onnx", threads=1),
        "int8": exported,
    }
    records = take_turns(contestants, noise(8))
    total = records["int8"].difference.total
    assert records["float"].difference.agreeing == records["float"].difference.confident > 20
    # Steep random logits (`excite`) are the worst case; what is found is still mostly the same objects.
    assert 0.7 * total < records["int8"].difference.partners
    # And it is not the float network under another name.
    assert records["int8"].difference.score > 1e-4


@pytest.mark.slow
def test_no_picture_to_calibrate_on(small_detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pictures to calibrate on"):
        export_int8(small_detector, tmp_path / "a.onnx", [])
    assert list(tmp_path.iterdir()) == []
