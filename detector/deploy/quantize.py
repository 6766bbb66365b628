"""Post-training quantization to int8: an ONNX file with QuantizeLinear and DequantizeLinear, standard operators.

Weights have a scale per output channel: with one scale per layer ShuffleNet V2 collapses (Tencent/ncnn, issue 571),
because its depthwise kernels, normalisation folded in, differ in range from channel to channel. In float stay the first
convolution (pixels are as fine as int8 already), RPN's outputs, the class and box outputs, and all that follows them:
coordinates need more than 256 values.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detector.deploy.export import check_onnx, export_onnx, set_onnx_properties, with_precision
from detector.deploy.metadata import ExportInfo
from detector.deploy.runtime import INPUTS, fitted, on_canvas
from detector.errors import InputError
from detector.files import replacing
from detector.preprocess import pad

if TYPE_CHECKING:
    from detector.api import Detector

LAYERS = ("Conv", "MatMul", "Gemm")


def export_int8(
    detector: Detector,
    path: str | Path,
    pictures: Iterable[np.ndarray],
    *,
    batch: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> ExportInfo:
    """Write an .onnx in int8.

    Args:
        detector: on any device.
        path: ends in .onnx.
        pictures: uint8 RGB (h, w, 3), like those that the detector will see; some hundreds fix the ranges. They are
            preprocessed here.
        batch, canvas: see `export_onnx`.

    Raises:
        InputError: no picture, or onnx or onnxruntime is not installed.
    """
    quantization = _import_quantization()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        info = export_onnx(detector, source, batch=batch, canvas=canvas)
        samples = [_sample(picture, info) for picture in pictures]
        if not samples:
            raise InputError("int8 needs pictures to calibrate on; give a folder of some hundreds.")
        with _without_advice():
            quantization.quantize_static(
                str(source),
                str(target),
                _reader(quantization, samples),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(LAYERS),
                nodes_to_exclude=float_layers(_load(source).graph),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
        model = _load(target)
    info = with_precision(info, "int8", calibration_pictures=len(samples))
    _drop_unused_domains(model)
    set_onnx_properties(model, info)
    check_onnx(model)
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())
    return info


def float_layers(graph: Any) -> list[str]:
    """Names of the layers of a detector's ONNX graph that stay in float."""
    made_by = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in LAYERS]
    sampling = next(node for node in graph.node if node.op_type == "GridSample")
    # RoIs come from the RPN's two outputs: the first layers that one meets on the way up from the sampling grid.
    kept = {layers[0].name} | {node.name for node in _layers_above(sampling.input[1], made_by)}
    after = [node for node in layers if _depends(node, sampling.output[0], made_by)]
    # Of the layers that follow the sampling, those that depend on another: all but the hidden one.
    kept |= {
        node.name for node in after if any(_depends(node, other.output[0], made_by) for other in after if other != node)
    }
    return sorted(kept)


def _layers_above(name: str, made_by: dict[str, Any]) -> list[Any]:
    found, waiting, seen = [], [name], set()
    while waiting:
        current = waiting.pop()
        node = made_by.get(current)
        if node is None or current in seen:
            continue
        seen.add(current)
        if node.op_type in LAYERS:
            found.append(node)
        else:
            waiting += node.input
    return found


def _depends(node: Any, on: str, made_by: dict[str, Any]) -> bool:
    waiting, seen = list(node.input), set()
    while waiting:
        name = waiting.pop()
        if name == on:
            return True
        if name in seen or name not in made_by:
            continue
        seen.add(name)
        waiting += made_by[name].input
    return False


def _sample(picture: np.ndarray, info: ExportInfo) -> dict[str, np.ndarray]:
    resized = fitted(info.preprocessing, info.canvas)(picture)
    images = pad([resized])
    images = on_canvas(images, info.canvas or images.shape[2:])
    return dict(zip(INPUTS, (images, np.array([resized.shape[:2]], np.int64)), strict=True))


def _reader(quantization: Any, samples: list[dict[str, np.ndarray]]) -> Any:
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    return Reader()


def _drop_unused_domains(model: Any) -> None:
    """The quantizer declares its own domain whether it uses it or not."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def _import_quantization() -> Any:
    try:
        from onnxruntime import quantization
    except ImportError as error:
        name = error.name or "onnxruntime"
        raise InputError(f"{name} is not installed: pip install 'light-head-detector[onnx]'.") from error
    return quantization


@contextmanager
def _without_advice() -> Iterator[None]:
    """ONNX Runtime advises to simplify the graph first, through the root logger; torch's exporter has done it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
