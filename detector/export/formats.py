"""Write a detector as ONNX, OpenVINO IR or torch.export: one graph from uint8 pixels to final boxes.

Standard operators only. The resize stays outside: `Preprocessing` makes it in every runtime.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from detector.data.preprocess import STRIDE
from detector.errors import InputError
from detector.export.graph import DetectionGraph, suppress_at_once, suppress_in_onnx
from detector.files import replacing
from detector.inference.export_info import SECTION, ExportInfo, check_canvas
from detector.inference.runtime import INPUTS, OUTPUTS, SMALLEST_TORCH_CANVAS, sha256
from detector.models.fuse import fuse
from detector.models.postprocess import Suppress

if TYPE_CHECKING:
    from detector.inference.detector import Detector

OPSET = 18  # GridSample came with 16, ReduceMean with axes as an input with 18


def export_info(detector: Detector, batch: int | None, canvas: tuple[int, int] | None) -> ExportInfo:
    """What the file will say about itself; `batch` is 1 or None (any), `canvas` None (any) or height and width."""
    if batch not in (1, None):
        raise InputError(f"batch={batch}; expected 1 or dynamic.")
    made = {"torch": str(torch.__version__), "fused": True}
    return ExportInfo(
        detector.class_names,
        detector.preprocessing,
        batch,
        check_canvas(canvas) if canvas else None,
        "float32",
        detector.options.spec(),
        dict(detector.provenance) | {"export": made},
    )


def trace(detector: Detector, suppress: Suppress, info: ExportInfo) -> torch.export.ExportedProgram:
    """The detector's graph, with the dimensions that `info` leaves open."""
    network = fuse(detector.network).cpu()  # a copy, fused or not
    graph = DetectionGraph(network, suppress)
    graph.training = False  # its parts are in evaluation mode already
    # Any values would do; no two dimensions alike, lest they be taken for one.
    batch, (height, width) = info.batch or 3, info.canvas or (5 * STRIDE, 7 * STRIDE)
    images = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]] * batch)
    shapes: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    if info.batch is None:
        dimension = torch.export.Dim("batch")
        shapes = {0: dimension}, {0: dimension}
    if info.canvas is None:
        least = SMALLEST_TORCH_CANVAS[0] // STRIDE
        shapes[0][1] = STRIDE * torch.export.Dim("rows", min=least, max=4096)
        shapes[0][2] = STRIDE * torch.export.Dim("columns", min=least, max=4096)
    with torch.no_grad(), _quiet():
        return torch.export.export(graph, (images, sizes), dynamic_shapes=shapes, strict=False)


def export_torch(
    detector: Detector, path: str | Path, *, batch: int | None = None, canvas: tuple[int, int] | None = None
) -> ExportInfo:
    """Write a .pt2 of torch.export: aten's operators, and torchvision's for suppression."""
    info = export_info(detector, batch, canvas)
    program = trace(detector, suppress_at_once, info)
    with replacing(path) as partial, _quiet():
        text = json.dumps(info.to_properties())
        torch.export.save(program, str(partial), extra_files={f"{SECTION}.json": text})
    return info


def export_onnx(
    detector: Detector, path: str | Path, *, batch: int | None = None, canvas: tuple[int, int] | None = None
) -> ExportInfo:
    """Write an .onnx of opset OPSET, checked by onnx's own checker.

    Raises:
        InputError: onnx or onnxscript is not installed.
    """
    import_onnx()
    info = export_info(detector, batch, canvas)
    program = trace(detector, suppress_in_onnx, info)
    with _quiet():
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
    """Write a ModelProto with `info` in it; what the exporter said about its source lines goes.

    Checked before by onnx's own checker, and that it names no operator outside the standard.
    """
    import onnx

    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    for key, value in info.to_properties().items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name = "light-head-detector"
    onnx.checker.check_model(model, full_check=True)
    domains = {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import}
    if domains - {"", "ai.onnx"} or model.functions:
        raise RuntimeError(f"the exported graph is not standard ONNX: domains {sorted(domains)}")
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString())


def export_openvino(
    detector: Detector, path: str | Path, *, batch: int | None = None, canvas: tuple[int, int] | None = None
) -> ExportInfo:
    """Write OpenVINO IR, an .xml and a .bin beside it, float32.

    Raises:
        InputError: openvino, or what ONNX needs, is not installed; the path ends otherwise.
    """
    check_openvino_path(path)
    model, info = openvino_model(detector, batch=batch, canvas=canvas)
    save_openvino(model, info, path)
    return info


def openvino_model(
    detector: Detector, *, batch: int | None = None, canvas: tuple[int, int] | None = None
) -> tuple[Any, ExportInfo]:
    """The detector as an openvino.Model, by way of ONNX."""
    import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        info = export_onnx(detector, Path(folder) / "detector.onnx", batch=batch, canvas=canvas)
        return convert_for_openvino(Path(folder) / "detector.onnx"), info


def convert_for_openvino(source: Any, **options: Any) -> Any:
    """openvino.convert_model of an ONNX file, or of a torch module with `example_input`.

    Raises:
        InputError: openvino is not installed.
    """
    openvino = import_openvino()
    with unreported():
        return openvino.convert_model(source, **options)


def import_openvino() -> Any:
    """The module openvino. Raises InputError where it is not installed."""
    return require("openvino", extra="onnx,openvino")


def require(*modules: str, extra: str) -> Any:
    """Import modules that an extra of this package brings; the last of them.

    Raises:
        InputError: one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in modules][-1]
    except ImportError as error:
        raise InputError(
            f"{error.name or modules[-1]} is not installed: pip install 'light-head-detector[{extra}]'."
        ) from error


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """OpenVINO's tools tell their makers of every use, without asking, but for uses in a CI: so this is one."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


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


def import_onnx() -> None:
    """What writing ONNX takes, torch's exporter included. Raises InputError where it is not installed."""
    require("onnx", "onnxscript", extra="onnx")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own deprecations and progress are not about this export."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
