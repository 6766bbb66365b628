"""Write a detector as ONNX, OpenVINO IR or torch.export: one graph from uint8 pixels to final boxes.

Standard operators only. The resize stays outside: `Preprocessing` makes it in every runtime.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from detector.data.preprocess import LARGEST_SIDE, STRIDE
from detector.errors import InputError, require
from detector.export.graph import DetectionGraph, suppress_at_once, suppress_in_onnx
from detector.files import replacing
from detector.inference.export_info import SECTION, ExportInfo
from detector.inference.runtime import INPUTS, OUTPUTS, SMALLEST_TORCH_CANVAS, sha256
from detector.models.fuse import fuse
from detector.models.postprocess import Suppress

if TYPE_CHECKING:
    from detector.inference.detector import Detector

OPSET = 18  # GridSample came with 16, ReduceMean with axes as an input with 18
# Modules that only exports need, and the extra of this package that brings each.
EXTRAS = {
    "onnx": "[onnx]",
    "onnxscript": "[onnx]",
    "onnxruntime.quantization": "[onnx]",
    "openvino": "[onnx,openvino]",
    "nncf": "[int8]",
}


class Inputs(TypedDict, total=False):
    """What inputs an export takes.

    Attributes:
        batch: images at once: 1, or None, any number.
        canvas: height and width; None: any.
    """

    batch: int | None
    canvas: tuple[int, int] | None


def export_info(detector: Detector, batch: int | None = None, canvas: tuple[int, int] | None = None) -> ExportInfo:
    """What the file will say about itself. Raises InputError for inputs that no export takes."""
    if batch not in (1, None):
        raise InputError(f"batch={batch}; expected 1 or dynamic.")
    if canvas and (min(canvas) < 1 or any(side % STRIDE for side in canvas)):
        raise InputError(f"size={canvas[0]}x{canvas[1]}; height and width must be multiples of {STRIDE}.")
    if canvas and max(canvas) > LARGEST_SIDE:  # which no reader would take
        raise InputError(f"size={canvas[0]}x{canvas[1]}; height and width are {LARGEST_SIDE} at most.")
    made = {"export": {"torch": str(torch.__version__), "fused": True}}
    about = "float32", detector.options.spec(), dict(detector.provenance) | made
    return ExportInfo(detector.class_names, detector.preprocessing, batch, canvas, *about, detector.thresholds)


def trace(detector: Detector, suppress: Suppress, info: ExportInfo) -> torch.export.ExportedProgram:
    """The detector's graph, with the dimensions that `info` leaves open."""
    network = fuse(detector.network).cpu()  # a copy, fused or not
    graph = DetectionGraph(network, suppress)
    graph.training = False  # its parts are in evaluation mode already
    # Any values would do; no two dimensions alike, lest they be taken for one.
    batch, (height, width) = info.batch or 3, info.canvas or (5 * STRIDE, 7 * STRIDE)
    images = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]] * batch)
    some = {} if info.batch else {0: torch.export.Dim("batch")}
    shapes: tuple[dict[int, Any], dict[int, Any]] = (dict(some), some)
    if info.canvas is None:
        least = SMALLEST_TORCH_CANVAS[0] // STRIDE
        shapes[0][1] = STRIDE * torch.export.Dim("rows", min=least, max=4096)
        shapes[0][2] = STRIDE * torch.export.Dim("columns", min=least, max=4096)
    with torch.no_grad(), quiet():
        return torch.export.export(graph, (images, sizes), dynamic_shapes=shapes, strict=False)


def export_torch(detector: Detector, path: str | Path, **inputs: Unpack[Inputs]) -> ExportInfo:
    """Write a .pt2 of torch.export: aten's operators, and torchvision's for suppression."""
    info = export_info(detector, **inputs)
    program = trace(detector, suppress_at_once, info)
    with replacing(path) as partial, quiet():
        about = {f"{SECTION}.json": json.dumps(info.to_properties())}
        torch.export.save(program, str(partial), extra_files=about)
    return info


def export_onnx(detector: Detector, path: str | Path, **inputs: Unpack[Inputs]) -> ExportInfo:
    """Write an .onnx of opset OPSET, checked by onnx's own checker.

    Raises:
        InputError: onnx or onnxscript is not installed.
    """
    import_packages("onnx", "onnxscript")
    info = export_info(detector, **inputs)
    program = trace(detector, suppress_in_onnx, info)
    with quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            custom_translation_table={torch.ops.light_head_export.nms.default: _nms_in_onnx},
            verbose=False,
        )
    assert written is not None
    save_onnx(written.model_proto, info, path)
    return info


def save_onnx(model: Any, info: ExportInfo, path: str | Path) -> None:
    """Write a ModelProto with `info` in it; what the exporter said about its source lines, and domains of operators
    that it declares and does not use, go.

    Checked before by onnx's own checker, and that it names no operator outside the standard.
    """
    import onnx

    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    for key, value in info.to_properties().items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name = "light-head-detector"
    domains = {node.domain for node in model.graph.node}
    declared = [entry for entry in model.opset_import if entry.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(declared)
    onnx.checker.check_model(model, full_check=True)
    if domains - {"", "ai.onnx"} or model.functions:
        raise RuntimeError(f"the exported graph is not standard ONNX: domains {sorted(domains)}")
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())


def export_openvino(
    detector: Detector, path: str | Path, source: Path | None = None, **inputs: Unpack[Inputs]
) -> ExportInfo:
    """Write OpenVINO IR, an .xml and a .bin beside it, float32; source as of `onnx_source`.

    Raises:
        InputError: openvino, or what ONNX needs, is not installed; the path ends otherwise.
    """
    check_openvino_path(path)
    model, info = openvino_model(detector, source, **inputs)
    save_openvino(model, info, path)
    return info


def openvino_model(detector: Detector, source: Path | None = None, **inputs: Unpack[Inputs]) -> tuple[Any, ExportInfo]:
    """The detector as an openvino.Model, by way of ONNX (`onnx_source`)."""
    import_packages("openvino")
    with onnx_source(detector, source, **inputs) as (path, info):
        return convert_for_openvino(path), info


@contextlib.contextmanager
def onnx_source(detector: Detector, source: Path | None, **inputs: Unpack[Inputs]) -> Iterator[tuple[Path, ExportInfo]]:
    """An ONNX file from which another format is made, which takes longer than what comes after.

    Args:
        source: what `export_onnx` wrote of this detector with these inputs; None: it is written for the time.
    """
    if source is not None:
        yield source, export_info(detector, **inputs)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        yield path, export_onnx(detector, path, **inputs)


def convert_for_openvino(source: Any, **options: Any) -> Any:
    """openvino.convert_model of an ONNX file, or of a torch module with `example_input`.

    Raises:
        InputError: openvino is not installed.
    """
    openvino = import_packages("openvino")
    with unreported():
        return openvino.convert_model(source, **options)


def import_packages(*modules: str) -> Any:
    """Import modules of EXTRAS; the last of them. Raises InputError where one is not installed."""
    with unreported():  # NNCF's reporter is made on import
        return [require(name, package=EXTRAS[name], what="this export") for name in modules][-1]


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """OpenVINO's tools tell their makers of every use, without asking, but for uses in a CI: so this is one."""
    before = {key: os.environ[key] for key in ["CI"] if key in os.environ}
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        del os.environ["CI"]
        os.environ.update(before)


def check_openvino_path(path: str | Path) -> None:
    """Before the minutes that an export may take. Raises InputError where the name is not that of an OpenVINO file."""
    if Path(path).suffix != ".xml":
        raise InputError(f"'{path}': an OpenVINO export ends in .xml; its .bin is written beside it.")


def save_openvino(model: Any, info: ExportInfo, path: str | Path) -> None:
    """Write both files complete or not at all; the .xml knows the .bin that belongs to it."""
    import openvino

    path = Path(path)
    for key, value in info.to_properties().items():
        model.set_rt_info(value, [SECTION, key])
    with replacing(path) as partial:
        weights = partial.with_suffix(".bin")
        try:
            openvino.save_model(model, partial, compress_to_fp16=False)
            model.set_rt_info(json.dumps(sha256(weights)), [SECTION, "weights_sha256"])
            openvino.save_model(model, partial, compress_to_fp16=False)
            os.replace(weights, path.with_suffix(".bin"))
        finally:
            weights.unlink(missing_ok=True)


def with_precision(info: ExportInfo, precision: str, **made: Any) -> ExportInfo:
    """The same, of another precision; `made` goes into the provenance."""
    export = dict(info.provenance.get("export", {})) | made
    return replace(info, precision=precision, provenance=dict(info.provenance) | {"export": export})


def _nms_in_onnx(boxes: Any, scores: Any, threshold: float, limit: int) -> Any:
    """`nms_node` in ONNX's own operators: NonMaxSuppression names rows, classes and places, which are marked."""
    import onnx
    from onnxscript import opset18

    op: Any = opset18
    chosen = op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[threshold]),
        op.Constant(value_floats=[0.0]),
    )
    nothing = onnx.helper.make_tensor("nothing", onnx.TensorProto.FLOAT, [1], [0.0])
    marks = op.ConstantOfShape(op.Shape(scores), value=nothing)
    ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(chosen, start=0, end=1))
    return op.Greater(op.ScatterND(marks, chosen, ones), op.Constant(value_float=0.0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters' own deprecations, and advice through the root logger, are not about this export: errors only."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
