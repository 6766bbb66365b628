"""Post-training quantization to int8: OpenVINO's by NNCF, and ONNX Runtime's own, in QuantizeLinear, DequantizeLinear.

The first is the faster one by far (docs/benchmarks.md). Weights have a scale per output channel in both: with one scale
per layer ShuffleNet V2 collapses (Tencent/ncnn, issue 571), because its depthwise kernels, normalisation folded in,
differ in range from channel to channel. In float stay the first convolution (pixels are as fine as int8 already), RPN's
outputs, the class and box outputs, and everything about boxes: coordinates need more than 256 values.

Weights use half of their range, 7 bits. Processors with AVX2 and without VNNI add two products of 8 bits in 16, and
what does not fit is cut off: with the full range v2_0.5x_voc lost 14 points of AP in ONNX Runtime on one, with half of
it 0.3 (onnxruntime's documentation of quantization, "When and why do I need to try U8U8?"; nncf.OverflowFix).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from detector.data.preprocess import prepare
from detector.errors import InputError
from detector.export.formats import (
    Inputs,
    check_openvino_path,
    import_packages,
    onnx_source,
    openvino_model,
    quiet,
    save_onnx,
    save_openvino,
    with_precision,
)
from detector.inference.export_info import ExportInfo
from detector.inference.openvino_core import signal_stack_kept
from detector.inference.runtime import INPUTS, ExportedDetector, openvino_run

if TYPE_CHECKING:
    from detector.inference.detector import Detector

# Names of the operators with weights, in ONNX and OpenVINO.
LAYERS = ("Conv", "MatMul", "Gemm", "Convolution", "GroupConvolution")
# Likewise, of those that look at a tensor's shape only.
SIZES = ("Shape", "ShapeOf")


@dataclass(frozen=True)
class AccuracyControl:
    """What NNCF's accuracy control goes by: it returns layers to float, the most harmful first, until it is content.

    Attributes:
        measure: average precision, 0 to 1, of a detector on some of the images, given by their numbers; of all of
            them, and of each.
        images: how many there are.
        max_drop: points (0 to 100) that int8 may be worse.
    """

    measure: Callable[[ExportedDetector, Sequence[int]], tuple[float, list[float]]]
    images: int
    max_drop: float


def export_int8(
    detector: Detector,
    path: str | Path,
    images: Iterable[np.ndarray],
    *,
    accuracy: AccuracyControl | None = None,
    source: Path | None = None,
    **inputs: Unpack[Inputs],
) -> ExportInfo:
    """Write OpenVINO IR in int8, an .xml and a .bin beside it.

    Args:
        detector: on any device.
        path: ends in .xml.
        images: uint8 RGB (h, w, 3), like those that the detector will see; some hundreds fix the ranges. They are
            preprocessed here.
        accuracy: None: quantize and leave it at that.
        source: as of `onnx_source`.
        inputs: batch, canvas.

    Raises:
        InputError: no image, a path that ends otherwise, or nncf, openvino or what ONNX needs is not installed.
    """
    nncf = import_packages("nncf")
    check_openvino_path(path)
    model, info = openvino_model(detector, source, **inputs)
    samples = _samples(images, info)

    def validate(compiled: Any, numbers: Iterable[int]) -> tuple[float, list[float]]:
        assert accuracy is not None
        return accuracy.measure(ExportedDetector(info, openvino_run(compiled), Path(path)), list(numbers))

    scope = nncf.IgnoredScope(names=sorted(float_nodes(openvino_nodes(model))), validate=False)
    options: dict[str, Any] = {"subset_size": len(samples), "ignored_scope": scope}
    half_range = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    quantize, given = nncf.quantize, [model, nncf.Dataset(samples)]
    if accuracy is None:
        options["advanced_parameters"] = half_range
    else:
        quantize = nncf.quantize_with_accuracy_control
        given += [nncf.Dataset(range(accuracy.images)), validate]
        options |= {"max_drop": accuracy.max_drop / 100, "advanced_quantization_parameters": half_range}
    with quiet(), signal_stack_kept():  # its progress bars stay
        quantized = quantize(*given, **options)
    info = with_precision(info, "int8", calibration_pictures=len(samples), nncf=nncf.__version__)
    save_openvino(quantized, info, path)
    return info


def export_int8_onnx(
    detector: Detector,
    path: str | Path,
    images: Iterable[np.ndarray],
    source: Path | None = None,
    **inputs: Unpack[Inputs],
) -> ExportInfo:
    """Write an .onnx in int8, for where there is no OpenVINO. Arguments as of `export_int8`; path ends in .onnx.

    Raises:
        InputError: no image, or onnx or onnxruntime is not installed.
    """
    quantization = import_packages("onnxruntime.quantization")
    import onnx

    with onnx_source(detector, source, **inputs) as (plain, info), tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        samples = _samples(images, info)
        left = iter(samples)
        get_next = {"get_next": lambda _: next(left, None)}
        reader = type("Reader", (quantization.CalibrationDataReader,), get_next)()
        with quiet():
            quantization.quantize_static(
                str(plain),
                str(target),
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(LAYERS),
                nodes_to_exclude=sorted(float_nodes(onnx_nodes(onnx.load(plain).graph))),
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
        model = onnx.load(target)
    info = with_precision(info, "int8", calibration_pictures=len(samples))
    save_onnx(model, info, path)
    return info


class Node(NamedTuple):
    """A step of a graph.

    Attributes:
        kind: the operator.
        sources: names of the nodes whose results it takes, in order; what no node makes is left empty.
    """

    kind: str
    sources: tuple[str, ...]


def onnx_nodes(graph: Any) -> dict[str, Node]:
    """The nodes of an ONNX graph by name, each after its sources."""
    made_by = {output: node.name for node in graph.node for output in node.output}
    return {node.name: Node(node.op_type, tuple(made_by.get(name, "") for name in node.input)) for node in graph.node}


def openvino_nodes(model: Any) -> dict[str, Node]:
    """The nodes of an openvino.Model by name, each after its sources."""
    found = {}
    for node in model.get_ordered_ops():
        sources = (place.get_source_output().get_node().get_friendly_name() for place in node.inputs())
        found[node.get_friendly_name()] = Node(node.get_type_name(), tuple(sources))
    return found


def float_nodes(nodes: Mapping[str, Node]) -> set[str]:
    """Names of the nodes of a detector's graph that stay in float; `nodes` come each after its sources."""
    layers = [name for name, node in nodes.items() if node.kind in LAYERS]
    sampling = next(name for name, node in nodes.items() if node.kind == "GridSample")
    # RoIs come from the RPN's two outputs: the first layers that one meets on the way up from the sampling grid. The
    # sizes of maps go into it too.
    rpn_outputs = _above(nodes[sampling].sources[1], nodes, stop_at=(*LAYERS, *SIZES)).intersection(layers)
    sampled = _below({sampling}, nodes)
    hidden = next(name for name in layers if name in sampled)  # classes and boxes depend on it
    return _above(layers[0], nodes) | _below(rpn_outputs, nodes) - {hidden}


def _above(name: str, nodes: Mapping[str, Node], stop_at: Sequence[str] = ()) -> set[str]:
    """A node and all that it depends on, but for what lies above nodes of the kinds in `stop_at`."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in nodes and current not in found:
            found.add(current)
            waiting += () if nodes[current].kind in stop_at else nodes[current].sources
    return found


def _below(names: set[str], nodes: Mapping[str, Node]) -> set[str]:
    """These nodes and all that depend on them."""
    found = set(names)
    for name, node in nodes.items():
        if found.intersection(node.sources):
            found.add(name)
    return found


def _samples(images: Iterable[np.ndarray], info: ExportInfo) -> list[dict[str, np.ndarray]]:
    """What the graph takes for each image, prepared alone."""
    samples = []
    for image in images:
        (prepared,) = prepare([image], info.preprocessing, info.canvas)
        pixels = np.ascontiguousarray(prepared.images.transpose(0, 2, 3, 1))
        samples.append(dict(zip(INPUTS, (pixels, prepared.image_sizes), strict=True)))
    if not samples:
        raise InputError("int8 needs images to calibrate on; give a folder of some hundreds.")
    return samples
