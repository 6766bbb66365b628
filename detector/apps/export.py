"""Write a checkpoint for other runtimes, then compare what they find with what torch finds.

python tools/export.py ckpt=RUN_DIR/best.ckpt                      best.onnx beside the checkpoint
python tools/export.py ckpt=RUN_DIR/best.ckpt format=all           every format, each compared with the checkpoint
python tools/export.py ckpt=PATH format=int8 calibration=FOLDER    images like those that it will see

    onnx           best.onnx                    ONNX Runtime, and nearly everything else
    openvino       best.xml, best.bin           the fastest in float on a CPU, with size=HxW
    torch_export   best.pt2                     torch without this package's network code
    int8           best.int8.xml, best.int8.bin OpenVINO in int8, by NNCF: the fastest, with size=HxW
    int8_onnx      best.int8.onnx               ONNX Runtime in int8, for where there is no OpenVINO
    checkpoint     best.half.ckpt               torch: a small checkpoint to pass on, half precision, without a path

Without ckpt: a detector that comes with the package, into runs/NAME/.

Exit code 1 when an export is worse than `check.max_drop` allows, or differs from torch.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, Strict

from detector.apps.scoring import GivenDataOptions, evaluation_data, recorded_data
from detector.data.images import list_images, read_image
from detector.data.index import AnnotationIndex
from detector.data.progress import progress
from detector.data.results import Results
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.metrics import compute_metrics
from detector.evaluation.tables import markdown_table
from detector.export import parity
from detector.export.formats import Inputs, export_onnx, export_openvino, export_torch, import_packages
from detector.export.parity import REFERENCE, Comparison, compare_contestants, take_turns
from detector.export.quantize import AccuracyControl, export_int8, export_int8_onnx
from detector.files import check_not_read, check_writable, write_json
from detector.inference.detections import Found
from detector.inference.detector import Detector
from detector.inference.loading import load
from detector.inference.runtime import ExportedDetector
from detector.inference.shipped import DEFAULT, find, folder_for, published
from detector.options import Count, Flag, Options, Threads

log = logging.getLogger(__name__)
# Beside an export of a fixed size: what that size itself costs.
ANY_SIZE = "torch, any size"


class Format(NamedTuple):
    """A kind of export.

    Attributes:
        suffix: how its file ends.
        write: writes it.
        needs: modules that have to be installed.
        precision: of its weights.
    """

    suffix: str
    write: Callable[..., object]
    needs: tuple[str, ...]
    precision: Literal["float32", "int8"] = "float32"


def write_checkpoint(detector: Detector, path: Path, **_: object) -> None:
    """A checkpoint to pass on: weights and description, in half precision, without places on this machine."""
    passed_on = copy.copy(detector)
    passed_on.provenance = published(detector.provenance)
    passed_on.save(path, half=True)


FORMATS = {
    "onnx": Format(".onnx", export_onnx, ("onnx", "onnxscript")),
    "openvino": Format(".xml", export_openvino, ("onnx", "onnxscript", "openvino")),
    "torch_export": Format(".pt2", export_torch, ()),
    "int8": Format(".int8.xml", export_int8, ("onnx", "onnxscript", "openvino", "nncf"), "int8"),
    "int8_onnx": Format(".int8.onnx", export_int8_onnx, ("onnx", "onnxscript", "onnxruntime.quantization"), "int8"),
    "checkpoint": Format(".half.ckpt", write_checkpoint, ()),
}


FormatName = Literal["onnx", "openvino", "torch_export", "int8", "int8_onnx", "checkpoint", "all"]
_FORMAT = "onnx, openvino, torch_export, int8, int8_onnx, checkpoint or all, or a list of them"
_SIZE = "^(dynamic|[0-9]{1,6}x[0-9]{1,6})$"


class MaxDropOptions(Options):
    """Points of AP, 0 to 100, that an export may lose. Chosen by this project: what rounding costs at most."""

    float32: Annotated[float, Strict()] = 0.1
    int8: Annotated[float, Strict()] = 1.0


class CheckOptions(Options):
    """The comparison of what was written with the checkpoint."""

    images: Count = 200
    """images of the validation split that are compared"""
    max_drop: MaxDropOptions = MaxDropOptions()
    """points of AP that an export may lose"""
    threads: Threads | None = 1
    """threads of every contestant, so that latencies compare; null: as many as each likes"""


class ExportOptions(Options):
    """What to write, how it is calibrated, and how it is compared."""

    ckpt: str = DEFAULT
    """best.ckpt or last.ckpt of a run, or the name of a detector of this package"""
    format: Annotated[FormatName | Annotated[list[FormatName], Field(min_length=1)], _FORMAT] = "onnx"
    """onnx, openvino, torch_export, int8 (OpenVINO), int8_onnx, checkpoint; several: [onnx,int8]; all"""
    out: str | None = None
    """a file for one format, else a folder; null: beside the checkpoint, under its name"""
    batch: Literal["dynamic", 1] = "dynamic"
    """dynamic, or 1"""
    size: Annotated[str, Field(pattern=_SIZE), "dynamic, or height x width in pixels, such as 256x320"] = "dynamic"
    """dynamic: any multiples of 32; or HxW: images are padded to it, shrunk where they stick out"""
    calibration: str | None = None
    """int8: a folder of images; null: the training images of a checkpoint that says which"""
    calibration_images: Count = 200
    """int8: how many of them fix the ranges"""
    accuracy_control: Flag = True
    """int8: where AP on training images drops by more than check.max_drop, layers go back to float"""
    check: CheckOptions | None = CheckOptions()
    """the comparison with the checkpoint; null leaves it out"""
    data: GivenDataOptions = GivenDataOptions()

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Height and width of every input; None: any."""
        height, _, width = self.size.partition("x")
        return (int(height), int(width)) if width else None

    @property
    def files(self) -> dict[str, Path]:
        """Where each format is written: keys of FORMATS, each once."""
        names = [self.format] if isinstance(self.format, str) else self.format
        formats = list(FORMATS) if "all" in names else list(dict.fromkeys(names))
        checkpoint, out = find(self.ckpt), Path(self.out or "")
        if len(formats) > 1 or out.is_dir() or not out.suffix:
            folder = out if self.out else folder_for(checkpoint)
            return {name: folder / f"{checkpoint.stem}{FORMATS[name].suffix}" for name in formats}
        ending = "." + FORMATS[formats[0]].suffix.rpartition(".")[2]
        if out.suffix != ending:
            raise InputError(f"out={out}: a file of format={formats[0]} ends in {ending}.")
        return {formats[0]: out}


def export(options: ExportOptions) -> None:
    """Write the formats, and compare them with the checkpoint; exit code 1 where one fails.

    Raises:
        InputError: an option, the checkpoint or the data is wrong, or a package is not installed.
    """
    files, canvas = options.files, options.canvas
    detector = Detector.load(options.ckpt, "cpu")
    for path in (part for file in files.values() for part in parts(file)):
        check_not_read(path, find(options.ckpt))
        check_writable(path, file=True)
    # Before anything is written: a mistake in the data should not cost the minutes of an export.
    if needs := [module for name in files for module in FORMATS[name].needs]:
        import_packages(*needs)
    index = validation_images(options, detector)
    int8 = [name for name in files if FORMATS[name].precision == "int8"]
    read, items = calibration_images(options, detector) if int8 else (None, [])
    control = accuracy_control(options, detector) if "int8" in files else None
    inputs: Inputs = {"batch": None if options.batch == "dynamic" else options.batch, "canvas": canvas}
    with tempfile.TemporaryDirectory() as folder:
        # Several formats are made from ONNX, which takes longer than what comes after: it is written once, and first.
        source = files.get("onnx", Path(folder) / "detector.onnx")
        from_onnx = {name for name in files if "onnx" in FORMATS[name].needs} - {"onnx"}
        for name, path in sorted(files.items(), key=lambda item: item[0] != "onnx"):
            log.info("%s: %s", name, path)
            arguments: dict[str, Any] = dict(inputs)
            if read and name in int8:
                arguments["images"] = map(read, items)  # one by one: some hundreds of a camera's would fill the memory
            if name == "int8":
                arguments["accuracy"] = control
            if name in from_onnx:
                if not source.exists():
                    export_onnx(detector, source, **inputs)
                arguments["source"] = source
            # The others take the form for inference, which cannot be saved.
            given = Detector.load(options.ckpt, "cpu", fused=False) if name == "checkpoint" else detector
            FORMATS[name].write(given, path, **arguments)
    if options.check is None or index is None:
        return
    rows = check(options, options.check, detector, index)
    report = next(iter(files.values())).with_suffix(".check.json")
    write_json(report, {"ckpt": options.ckpt, "images": len(index), "rows": [row.to_dict() for row in rows]})
    log.info("\n%s\n%s", render(rows, len(index), canvas), report)
    failed = [f"{row.name}: {'; '.join(row.complaints)}" for row in rows if row.complaints]
    if failed:
        sys.exit(f"failed: {'. '.join(failed)}.")  # to stderr, and exit code 1


def parts(path: Path) -> list[Path]:
    """The files of an export: OpenVINO's are two."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def accuracy_control(options: ExportOptions, detector: Detector) -> AccuracyControl | None:
    """On training images: what it was tuned on would flatter int8 in the check. None where it is off."""
    if not options.accuracy_control:
        return None
    if options.check is None or recorded_data(detector) is None:
        why = "this checkpoint does not say what it was trained on" if options.check else "check=null sets no limit"
        log.info("accuracy control is off: %s.", why)
        return None
    with way_out("Or give accuracy_control=false."):
        index = training_images(options, detector)
    index = index.select(spread(range(len(index)), options.check.images))

    def measure(exported: ExportedDetector, places: Sequence[int]) -> tuple[float, list[float]]:
        found = [exported.detect_images([index.read(place)])[0] for place in places]
        each = [average_precision([one], index.select([place])) for one, place in zip(found, places, strict=True)]
        return average_precision(found, index.select(places)) or 0.0, [ap or 0.0 for ap in each]

    return AccuracyControl(measure, len(index), options.check.max_drop.int8)


def average_precision(found: Sequence[Found], index: AnnotationIndex) -> float | None:
    """AP of what was found in the images of an index; None where they hold no object."""
    ap: float | None = compute_metrics(Results.of(range(len(index)), found), index)["AP"]
    return ap


def validation_images(options: ExportOptions, detector: Detector) -> AnnotationIndex | None:
    """The first of the validation split; None where nothing is to be compared, or nothing is known to compare on."""
    if options.check is None:
        return None
    if recorded_data(detector) is None and not options.data.root:
        log.info("Nothing is compared: this checkpoint does not say what it was trained on; data.root=DIR compares.")
        return None
    with way_out("Or give check=null: nothing is compared then."):
        data = evaluation_data(options.data, detector)
        limit = min(options.check.images, data.val.limit or options.check.images)
        val = data.val.model_copy(update={"limit": limit})
        return load_split(data.model_copy(update={"val": val}), "val", class_names=detector.class_names)


def training_images(options: ExportOptions, detector: Detector) -> AnnotationIndex:
    """The training split of a checkpoint that says which."""
    return load_split(evaluation_data(options.data, detector), "train", class_names=detector.class_names)


@contextmanager
def way_out(hint: str) -> Iterator[None]:
    """Add to the message of a mistake what this command can do without."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} {hint}") from error


def calibration_images(options: ExportOptions, detector: Detector) -> tuple[Callable[[Any], np.ndarray], list[Any]]:
    """What reads an image, and which ones, evenly spread: of the given folder, or of the training split; validation
    images would flatter the check."""
    if options.calibration:
        return read_image, spread(list_images(options.calibration), options.calibration_images)
    if recorded_data(detector) is None:  # nor does data.root tell: its images may be those that it is judged on
        raise InputError(
            "calibration is missing: this checkpoint does not say what it was trained on; give calibration=FOLDER of "
            "images like those that it will see."
        )
    with way_out("Or give calibration=FOLDER of images."):
        index = training_images(options, detector)
    return index.read, spread(range(len(index)), options.calibration_images)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly spread; all where there are fewer."""
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items)))]


def check(
    options: ExportOptions, settings: CheckOptions, detector: Detector, index: AnnotationIndex
) -> list[Comparison]:
    """What was written against the checkpoint, on the images of an index."""
    files, canvas = options.files, options.canvas
    if settings.threads:
        torch.set_num_threads(settings.threads)
    in_torch = {REFERENCE: detector.on_canvas(canvas), ANY_SIZE: detector} if canvas else {REFERENCE: detector}
    exports = {name: load(path, "cpu", threads=settings.threads).on_canvas(canvas) for name, path in files.items()}
    sizes = dict.fromkeys(in_torch, find(options.ckpt).stat().st_size)
    for name, path in files.items():
        sizes[name] = sum(part.stat().st_size for part in parts(path))
    images = progress(map(index.read, range(len(index))), "check", len(index))
    return compare_contestants(
        take_turns({**in_torch, **exports}, images),
        lambda found: average_precision(found, index),
        files=sizes,
        precisions={name: FORMATS[name].precision for name in files},
        max_drop=settings.max_drop.to_dict(),
    )


def render(rows: list[Comparison], images: int, canvas: tuple[int, int] | None) -> str:
    heads = ("", "AP", "drop", "box, px", "score", "matched", "agree", "p50, ms", "p90, ms", "faster", "MiB", "")
    lines = []
    for row in rows:
        found = row.difference
        line = (
            row.name,
            *(None if value is None else f"{value:.2f}" for value in (row.ap, row.drop)),
            f"{found.box:.2g}",
            f"{found.score:.2g}",
            f"{100 * found.partners / max(found.total, 1):.1f}%",
            f"{100 * found.agreeing / max(found.confident, 1):.1f}%",
            f"{row.p50_ms:.1f}",
            f"{row.p90_ms:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.file_bytes / 2**20:.1f}",
            "FAILED" if row.complaints else "ok",
        )
        lines.append(line)
    legend = (
        f"{images} images, one at a time. box, score: largest difference from torch of matched detections. agree: "
        f"confident ones (score {parity.CONFIDENT}) found at IoU {parity.AGREEING_IOU} with a score within "
        f"{parity.AGREEING_SCORE}"
    )
    if canvas:
        legend += f". torch pads and shrinks to {canvas[0]} x {canvas[1]}, as the exports do; '{ANY_SIZE}' does not"
    return f"{legend}\n{markdown_table(heads, lines, align='l' + 'r' * 10 + 'l', width=None)}"
