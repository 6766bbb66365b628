"""Write a checkpoint for other runtimes, then compare what they find with what torch finds.

python tools/export.py ckpt=RUN_DIR/best.ckpt                      best.onnx beside the checkpoint
python tools/export.py ckpt=RUN_DIR/best.ckpt format=all           every format, each compared with the checkpoint
python tools/export.py ckpt=PATH format=int8 calibration=FOLDER    pictures like those that it will see

    onnx           best.onnx                    ONNX Runtime, and nearly everything else
    openvino       best.xml, best.bin           the fastest in float on a CPU, with size=HxW
    torch_export   best.pt2                     torch without this package's network code
    int8           best.int8.xml, best.int8.bin OpenVINO in int8, by NNCF: the fastest, with size=HxW
    int8_onnx      best.int8.onnx               ONNX Runtime in int8, for where there is no OpenVINO

Exit code 1 when an export is worse than `check.max_drop` allows, or differs from torch.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from detector.api import Detector
from detector.data.coco import CocoIndex
from detector.deploy.export import export_onnx, export_openvino, export_torch
from detector.deploy.parity import AGREEING_IOU, AGREEING_SCORE, CONFIDENT, REFERENCE, OnCanvas, Row, judge, take_turns
from detector.deploy.quantize import Accuracy, export_int8, export_int8_onnx
from detector.deploy.runtime import ExportedDetector
from detector.errors import InputError
from detector.evaluation.coco import evaluate
from detector.files import write_json
from detector.images import list_images, read_image
from detector.predictor import Predictor
from detector.structures import Detections
from detector.training.run import evaluation_data, load_split
from launch import launch, plain

log = logging.getLogger(__name__)
# Format -> how its file ends.
FORMATS = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torch_export": ".pt2",
    "int8": ".int8.xml",
    "int8_onnx": ".int8.onnx",
}
FAILED = 1


def main(config: DictConfig) -> None:
    values = plain(config)
    formats, canvas = chosen_formats(values["format"]), chosen_size(values["size"])
    batch = None if values["batch"] == "dynamic" else values["batch"]
    places = file_of_each(formats, values)
    detector = Detector.load(values["ckpt"], "cpu")
    # Before anything is written: a mistake in the data should not cost the minutes of an export.
    index = validation_pictures(values, detector) if values["check"] else None
    pictures: list[np.ndarray] = []
    for name in formats:
        log.info("%s: %s", name, places[name])
        write = WRITERS[name]
        if precision_of(name) == "int8":
            pictures = pictures or list(calibration_pictures(values, detector))
            write = partial(write, pictures=pictures)
        if name == "int8" and index is not None and values["accuracy_control"]:
            write = partial(write, accuracy=accuracy_on(index, values["check"]["max_drop"]["int8"]))
        write(detector, places[name], batch=batch, canvas=canvas)
    if index is None:
        return
    rows = check(values, detector if canvas is None else OnCanvas(detector, canvas), places, index)
    report = next(iter(places.values())).with_suffix(".check.json")
    write_json(report, {"ckpt": values["ckpt"], "images": len(index), "rows": [row.to_dict() for row in rows]})
    log.info("\n%s\n%s", render(rows, len(index)), report)
    failed = [f"{row.name}: {'; '.join(row.complaints)}" for row in rows if row.complaints]
    if failed:
        print(f"failed: {'. '.join(failed)}.", file=sys.stderr)
        sys.exit(FAILED)


WRITERS: dict[str, Callable[..., object]] = {
    "onnx": export_onnx,
    "openvino": export_openvino,
    "torch_export": export_torch,
    "int8": export_int8,
    "int8_onnx": export_int8_onnx,
}


def precision_of(name: str) -> str:
    return "int8" if name.startswith("int8") else "float32"


def accuracy_on(index: CocoIndex, max_drop: float) -> Accuracy:
    def measure(exported: ExportedDetector, numbers: Sequence[int]) -> float:
        found = [exported.predict_images([index.read(number)], [None])[0] for number in numbers]
        return average_precision(index, found, numbers) or 0.0

    return Accuracy(measure, len(index), max_drop)


def average_precision(index: CocoIndex, found: Sequence[Detections], numbers: Sequence[int]) -> float | None:
    """AP of what was found in the pictures of these numbers; None where they hold no object."""
    images = [index.image_ids[number] for number in numbers]
    pairs = zip(found, images, strict=True)
    results = [row for detections, image in pairs for row in detections.to_coco(image, index.category_ids)]
    figure: float | None = evaluate(results, index.annotation_file, image_ids=images)["AP"]
    return figure


def chosen_formats(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    if names == ["all"]:
        return list(FORMATS)
    for name in names:
        if name not in FORMATS:
            raise InputError(f"format={name}; there is {', '.join(FORMATS)} and all.")
    return list(dict.fromkeys(names))


def chosen_size(given: Any) -> tuple[int, int] | None:
    if given == "dynamic":
        return None
    height, cross, width = str(given).partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise InputError(f"size={given}; expected dynamic, or height x width in pixels, for example size=256x320.")
    return int(height), int(width)


def file_of_each(formats: list[str], values: dict[str, Any]) -> dict[str, Path]:
    checkpoint = Path(str(values["ckpt"]))
    if not values["out"]:
        return {name: checkpoint.with_suffix(FORMATS[name]) for name in formats}
    out = Path(str(values["out"]))
    if len(formats) > 1 or out.is_dir() or not out.suffix:
        return {name: out / f"{checkpoint.stem}{FORMATS[name]}" for name in formats}
    ending = Path(f"a{FORMATS[formats[0]]}").suffix
    if out.suffix != ending:
        raise InputError(f"out={out}: a file of format={formats[0]} ends in {ending}.")
    return {formats[0]: out}


def validation_pictures(values: dict[str, Any], detector: Detector) -> CocoIndex:
    data = evaluation_data(values, detector)
    data["val"] = data["val"] | {"limit": values["check"]["images"]}
    return load_split(data, "val", class_names=detector.class_names)


def calibration_pictures(values: dict[str, Any], detector: Detector) -> Iterator[np.ndarray]:
    """From the given folder, evenly spread, or from the training split; validation pictures would flatter the check."""
    if values["calibration"]:
        paths = list_images(str(values["calibration"]))
        yield from map(read_image, spread(paths, values["calibration_images"]))
        return
    data = evaluation_data(values, detector)
    if "train" not in data:
        raise InputError("This checkpoint does not say what it was trained on; give calibration=FOLDER of pictures.")
    index = load_split(data, "train", class_names=detector.class_names)
    yield from map(index.read, spread(range(len(index)), values["calibration_images"]))


def spread(items: Sequence[Any], count: int) -> list[Any]:
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items)))]


def check(values: dict[str, Any], reference: Predictor, places: dict[str, Path], index: CocoIndex) -> list[Row]:
    threads = values["check"]["threads"]
    if threads:
        torch.set_num_threads(threads)
    contestants: dict[str, Predictor] = {REFERENCE: reference}
    contestants |= {name: ExportedDetector.load(path, threads=threads) for name, path in places.items()}
    pictures = tqdm(map(index.read, range(len(index))), total=len(index), unit="picture", disable=None)
    files = {REFERENCE: Path(values["ckpt"]).stat().st_size}
    files |= {name: sum(part.stat().st_size for part in parts_of(path)) for name, path in places.items()}
    return judge(
        take_turns(contestants, pictures),
        lambda found: average_precision(index, found, range(len(index))),
        files=files,
        precisions={name: precision_of(name) for name in contestants},
        max_drop=values["check"]["max_drop"],
    )


def parts_of(path: Path) -> list[Path]:
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def render(rows: list[Row], images: int) -> str:
    table = Table("", "AP", "drop", "box, px", "score", "matched", "agree", "p50, ms", "p90, ms", "faster", "MiB", "")
    for row in rows:
        found = row.difference
        table.add_row(
            row.name,
            *("-" if value is None else f"{value:.2f}" for value in (row.ap, row.drop)),
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
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    legend = (
        f"{images} pictures, one at a time. box, score: largest difference from torch of matched detections. agree: "
        f"confident ones (score {CONFIDENT}) found at IoU {AGREEING_IOU} with a score within {AGREEING_SCORE}"
    )
    return f"{legend}\n{text}"


if __name__ == "__main__":
    launch(main, config_name="export")
