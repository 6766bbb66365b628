"""Quantization: which layers turn to int8, and what that does to the detections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.export.formats import openvino_model
from detector.export.parity import REFERENCE, difference, take_turns
from detector.export.quantize import (
    LAYERS,
    AccuracyControl,
    export_int8,
    export_int8_onnx,
    float_nodes,
    onnx_nodes,
    openvino_nodes,
)
from detector.inference.detector import Detector
from detector.inference.export_info import ExportInfo
from detector.inference.openvino_core import openvino_core
from detector.inference.runtime import ExportedDetector
from detector.models.build import NetworkOptions

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def node(kind: str, inputs: list[str], output: str) -> object:
    return onnx.helper.make_node(kind, inputs, [output], name=f"{kind}-{output}")


def test_float_nodes_of_a_graph_drawn_by_hand() -> None:
    # pixels -> normalised -> stem -> body -> rpn -> {objectness, deltas} -> boxes -> rois, by the size of body
    # body -> thin ; sampled -> hidden -> {class, box}
    graph = onnx.helper.make_graph(
        [
            node("Div", ["pixels", "std"], "normalised"),
            node("Conv", ["normalised", "w"], "stem"),
            node("Relu", ["stem"], "active"),
            node("Conv", ["active", "w"], "body"),
            node("Conv", ["body", "w"], "rpn"),
            node("Conv", ["rpn", "w"], "objectness"),
            node("Conv", ["rpn", "w"], "deltas"),
            node("Shape", ["body"], "size"),
            node("Add", ["objectness", "deltas"], "boxes"),
            node("Div", ["boxes", "size"], "rois"),
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
    layers = {"Conv-stem", "Conv-objectness", "Conv-deltas", "Gemm-class", "MatMul-box"}
    between = {"Div-normalised", "Add-boxes", "Div-rois", "GridSample-sampled", "Relu-rectified"}
    assert float_nodes(onnx_nodes(graph)) == layers | between


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (8, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [None, (64, 96)])
def test_int8_onnx_finds_nearly_the_same(
    small_detector: Detector, small_onnx: Callable[..., Path], tmp_path: Path, canvas: tuple[int, int] | None
) -> None:
    plain = small_onnx(canvas=canvas)
    info = export_int8_onnx(small_detector, tmp_path / "a.onnx", noise(40, seed=1), plain, canvas=canvas)
    assert info.precision == "int8"
    assert info.provenance["export"]["calibration_pictures"] == 40
    quantized = onnx.load(tmp_path / "a.onnx")
    assert {entry.domain for entry in quantized.opset_import} == {""}
    assert {step.domain for step in quantized.graph.node} == {""}
    # Weights are stored as int8: of the 130 KB of this network nearly all of it.
    stored = [onnx.numpy_helper.to_array(entry) for entry in quantized.graph.initializer]
    weights = [values for values in stored if values.dtype == np.int8]
    assert len(weights) > 25
    check_half_range([values for values in weights if values.ndim > 1])
    check_nearly_the_same(small_detector, plain, tmp_path / "a.onnx", info, share=0.7)


def check_half_range(weights: Sequence[np.ndarray]) -> None:
    """No pair of products overflows 16 bits, as processors without VNNI add them: 2 * 255 * 64 < 2^15. All is used."""
    assert {int(np.abs(values.astype(int)).max()) for values in weights} <= {63, 64}


def check_nearly_the_same(detector: Detector, plain: Path, quantized: Path, info: ExportInfo, *, share: float) -> None:
    """Steep random logits (`excite`) are the worst case; this share of what is found is still the same objects."""
    exported = ExportedDetector.load(quantized, threads=1)
    assert exported.info == info
    contestants = {
        REFERENCE: detector,
        "float": ExportedDetector.load(plain, threads=1),
        "int8": exported,
    }
    records = take_turns(contestants, noise(8))
    total = records["int8"].difference.total
    assert records["float"].difference.agreeing == records["float"].difference.confident > 20
    assert share * total < records["int8"].difference.partners
    # And it is not the float network under another name.
    assert records["int8"].difference.score > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [None, (64, 96)])
def test_openvino_int8_finds_nearly_the_same(
    small_detector: Detector, small_onnx: Callable[..., Path], tmp_path: Path, canvas: tuple[int, int] | None
) -> None:
    openvino = pytest.importorskip("openvino")
    nncf = pytest.importorskip("nncf")
    plain = small_onnx(canvas=canvas)
    info = export_int8(small_detector, tmp_path / "a.xml", noise(40, seed=1), source=plain, canvas=canvas)
    assert info.precision == "int8"
    assert info.provenance["export"]["calibration_pictures"] == 40
    assert info.provenance["export"]["nncf"] == nncf.__version__
    model = openvino_core().read_model(tmp_path / "a.xml")
    kinds = Counter(node.get_type_name() for node in model.get_ordered_ops())
    assert kinds["FakeQuantize"] > 25  # of activations; weights are stored as int8:
    constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    weights = [node.data for node in constants if node.output(0).element_type == openvino.Type.i8]
    assert len(weights) > 25
    # Depthwise kernels, which have five dimensions, keep the whole: NNCF sees no sum of pairs in them.
    check_half_range([values for values in weights if values.ndim < 5])
    # NNCF cuts off outliers, of which random weights have more: on a trained detector it is the nearer one of the two.
    check_nearly_the_same(small_detector, plain, tmp_path / "a.xml", info, share=0.6)


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [None, (64, 96)])
def test_the_same_layers_stay_in_float_in_both_runtimes(
    small_detector: Detector, small_onnx: Callable[..., Path], canvas: tuple[int, int] | None
) -> None:
    pytest.importorskip("openvino")
    plain = small_onnx(canvas=canvas)
    graphs = [
        onnx_nodes(onnx.load(plain).graph),
        openvino_nodes(openvino_model(small_detector, plain, canvas=canvas)[0]),
    ]
    for nodes in graphs:
        layers = [name for name, step in nodes.items() if step.kind in LAYERS]
        # The first convolution, objectness, deltas, classes, boxes.
        assert len(float_nodes(nodes).intersection(layers)) == 5
        assert layers[0] in float_nodes(nodes)
    assert len({sum(step.kind in LAYERS for step in nodes.values()) for nodes in graphs}) == 1


@pytest.mark.slow
def test_weights_have_a_scale_per_channel_however_large_they_are(small_spec: dict[str, Any], tmp_path: Path) -> None:
    """As a checkpoint is exported: loaded for prediction, its 1x1 convolutions made products."""
    wide = small_spec | {"backbone": small_spec["backbone"] | {"channels": [16, 32, 300]}}
    Detector(NetworkOptions.parse(wide), ("a", "b"), Preprocessing(short_side=64, long_side=96)).save(
        tmp_path / "d.ckpt"
    )
    export_int8_onnx(Detector.load(tmp_path / "d.ckpt", "cpu"), tmp_path / "a.onnx", noise(2), canvas=(64, 96))
    graph = onnx.load(tmp_path / "a.onnx").graph
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    made_by = {name: step for step in graph.node for name in step.output}
    scales = []
    for step in graph.node:
        if step.op_type == "Conv" and step.input[1] not in stored:
            weight, scale, *_ = made_by[step.input[1]].input
            assert stored[weight].dtype == np.int8
            assert stored[scale].shape == stored[weight].shape[:1]
            scales.append(stored[weight].size)
    assert len(scales) == sum(step.op_type == "Conv" for step in graph.node) - 3  # the stem and RPN's outputs
    assert max(scales) > 8192


@pytest.mark.slow
def test_accuracy_control_measures_the_detector_itself(
    small_detector: Detector, small_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNCF's search takes minutes: what it is given is looked at here, once in float, and it gives the float back."""
    pytest.importorskip("openvino")
    nncf = pytest.importorskip("nncf")
    pictures, asked = noise(6), []

    def measure(exported: ExportedDetector, numbers: Sequence[int]) -> tuple[float, list[float]]:
        asked.append(numbers)
        chosen = [pictures[number] for number in numbers]
        found, expected = (detector.predict(chosen, score_threshold=0) for detector in (exported, small_detector))
        each = [1 - float(np.abs(a.scores - b.scores).max()) for a, b in zip(found, expected, strict=True)]
        return min(each), each

    def search(model: Any, calibration: Any, validation: Any, validate: Any, *, max_drop: float, **_: Any) -> Any:
        assert max_drop == pytest.approx(0.02)
        assert len(list(calibration.get_inference_data())) == 20
        compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for numbers in ([0, 1, 2, 3, 4, 5], [4, 1]):
            metric, each = validate(compiled, validation.get_data(numbers))
            assert 0.999 < metric <= 1
            assert len(each) == len(numbers)
        return model

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", search)
    export_int8(
        small_detector,
        tmp_path / "a.xml",
        noise(20, seed=1),
        source=small_onnx(canvas=(64, 96)),
        canvas=(64, 96),
        accuracy=AccuracyControl(measure, 6, 2.0),
    )
    assert asked == [[0, 1, 2, 3, 4, 5], [4, 1]]
    assert ExportedDetector.load(tmp_path / "a.xml").info.precision == "int8"


@pytest.mark.slow
def test_no_image_to_calibrate_on(small_detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    for suffix, export in ((".xml", export_int8), (".onnx", export_int8_onnx)):
        with pytest.raises(InputError, match="images to calibrate on"):
            export(small_detector, tmp_path / f"a{suffix}", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_accuracy_control_gives_layers_back(
    small_spec: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """NNCF's own search, with a limit that int8 does not meet: fewer layers end in int8, and the file still works."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    # The search compiles the network for each layer, and again after each that it gives back: few layers, a low limit.
    small_spec["backbone"]["repeats"], small_spec["neck"] = [1, 1, 1], {"name": "none"}
    small_detector, small_onnx = (request.getfixturevalue(name) for name in ("small_detector", "small_onnx"))
    pictures = noise(3)
    expected = small_detector.predict(pictures, score_threshold=0)

    def measure(exported: ExportedDetector, numbers: Sequence[int]) -> tuple[float, list[float]]:
        found = exported.predict([pictures[number] for number in numbers], score_threshold=0)
        each = [
            difference(expected[number], one).agreeing / difference(expected[number], one).confident
            for number, one in zip(numbers, found, strict=True)
        ]
        return sum(each) / len(each), each

    quantized, agree = [], []
    plain = small_onnx(canvas=(64, 96))
    for accuracy in (None, AccuracyControl(measure, 3, 60.0)):
        images, path = noise(10, seed=1), tmp_path / "a.xml"
        export_int8(small_detector, path, images, source=plain, canvas=(64, 96), accuracy=accuracy)
        model = openvino_core().read_model(tmp_path / "a.xml")
        quantized.append(sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()))
        agree.append(measure(ExportedDetector.load(path, threads=1), [0, 1, 2])[0])
    assert quantized[1] < quantized[0]
    assert agree[0] < 0.4 <= agree[1]
