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

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from launch import launch, plain

import numpy as np
import torch
from omegaconf import DictConfig

from detector.apps.evaluate import evaluation_data
from detector.data.annotations import AnnotationIndex
from detector.data.images import list_images, read_image
from detector.data.preprocess import resize
from detector.data.progress import progress
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.metrics import evaluate
from detector.evaluation.tables import markdown_table
from detector.export.formats import export_onnx, export_openvino, export_torch, import_onnx, import_openvino
from detector.export.parity import AGREEING_IOU, AGREEING_SCORE, CONFIDENT, REFERENCE, Row, judge, take_turns
from detector.export.quantize import Accuracy, export_int8, export_int8_onnx, import_nncf, import_quantization
from detector.files import write_json
from detector.inference.detections import Detections, Found
from detector.inference.detector import Detector
from detector.inference.predictor import Predictor
from detector.inference.runtime import ExportedDetector

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
# Beside an export of a fixed size: what that size itself costs.
ANY_SIZE = "torch, any size"


def main(config: DictConfig) -> None:
    values = plain(config)
    formats, canvas = chosen_formats(values["format"]), chosen_size(values["size"])
    batch = None if values["batch"] == "dynamic" else values["batch"]
    places = file_of_each(formats, values)
    detector = Detector.load(values["ckpt"], "cpu")
    # Before anything is written: a mistake in the data should not cost the minutes of an export.
    for name in formats:
        for needed in NEEDS[name]:
            needed()
    index = validation_pictures(values, detector) if values["check"] else None
    writers = dict(WRITERS)
    if int8 := [name for name in formats if precision_of(name) == "int8"]:
        pictures = calibration_pictures(values, detector, canvas)
        writers |= {name: partial(WRITERS[name], pictures=pictures) for name in int8}
    if "int8" in formats and (accuracy := accuracy_control(values, detector)):
        writers["int8"] = partial(writers["int8"], accuracy=accuracy)
    for name in formats:
        log.info("%s: %s", name, places[name])
        writers[name](detector, places[name], batch=batch, canvas=canvas)
    if index is None:
        return
    rows = check(values, detector, canvas, places, index)
    report = next(iter(places.values())).with_suffix(".check.json")
    write_json(report, {"ckpt": values["ckpt"], "images": len(index), "rows": [row.to_dict() for row in rows]})
    log.info("\n%s\n%s", render(rows, len(index), canvas), report)
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
# What has to be installed for each; an error says how.
NEEDS: dict[str, tuple[Callable[[], object], ...]] = {
    "onnx": (import_onnx,),
    "openvino": (import_onnx, import_openvino),
    "torch_export": (),
    "int8": (import_onnx, import_openvino, import_nncf),
    "int8_onnx": (import_onnx, import_quantization),
}


def precision_of(name: str) -> str:
    return "int8" if name.startswith("int8") else "float32"


def accuracy_control(values: dict[str, Any], detector: Detector) -> Accuracy | None:
    """On training pictures: what it was tuned on would flatter int8 in the check. None where it is off."""
    if not values["accuracy_control"]:
        return None
    if not values["check"]:
        log.info("accuracy control is off: check=null sets no limit.")
        return None
    data = evaluation_data(values, detector)
    if "train" not in data:
        log.info("accuracy control is off: this checkpoint does not say what it was trained on.")
        return None
    with way_out("Or give accuracy_control=false."):
        index = load_split(data, "train", class_names=detector.class_names)
    return accuracy_on(index, values["check"]["images"], values["check"]["max_drop"]["int8"])


def accuracy_on(index: AnnotationIndex, count: int, max_drop: float) -> Accuracy:
    """On so many pictures of an index, evenly spread."""
    chosen, precision = spread(range(len(index)), count), scorer(index)

    def measure(exported: ExportedDetector, numbers: Sequence[int]) -> tuple[float, list[float]]:
        places = [chosen[number] for number in numbers]
        found = [exported.detect_images([index.read(place)])[0] for place in places]
        each = [precision([one], [place]) or 0.0 for one, place in zip(found, places, strict=True)]
        return precision(found, places) or 0.0, each

    return Accuracy(measure, len(chosen), max_drop)


def scorer(index: AnnotationIndex) -> Callable[[Sequence[Found], Sequence[int]], float | None]:
    """AP of what was found in the pictures of these numbers; None where they hold no object."""
    truth = json.loads(index.annotation_file.read_text(encoding="utf-8"))
    images, objects = {image["id"]: image for image in truth["images"]}, defaultdict(list)
    for row in truth["annotations"]:
        objects[row["image_id"]].append(row)

    def precision(found: Sequence[Found], numbers: Sequence[int]) -> float | None:
        ids = [index.image_ids[number] for number in numbers]
        annotations = [row for image in ids for row in objects[image]]
        part = truth | {"images": [images[image] for image in ids], "annotations": annotations}
        pairs = zip(found, ids, strict=True)
        results = [
            row
            for one, image in pairs
            for row in Detections(*one, index.class_names, (0, 0)).to_coco(image, index.category_ids)
        ]
        figure: float | None = evaluate(results, part)["AP"]
        return figure

    return precision


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


def validation_pictures(values: dict[str, Any], detector: Detector) -> AnnotationIndex:
    with way_out("Or give check=null: nothing is compared then."):
        data = evaluation_data(values, detector)
        data["val"] = data["val"] | {"limit": values["check"]["images"]}
        return load_split(data, "val", class_names=detector.class_names)


@contextmanager
def way_out(hint: str) -> Iterator[None]:
    """Add to the message of a mistake what this tool can do without."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} {hint}") from error


def calibration_pictures(
    values: dict[str, Any], detector: Detector, canvas: tuple[int, int] | None
) -> list[np.ndarray]:
    """From the given folder, evenly spread, or from the training split; validation pictures would flatter the check.

    As large as the network takes them: some hundreds of a camera's would fill the memory.
    """
    pictures: Iterable[np.ndarray]
    if values["calibration"]:
        paths = list_images(str(values["calibration"]))
        pictures = map(read_image, spread(paths, values["calibration_images"]))
    else:
        with way_out("Or give calibration=FOLDER of pictures."):
            data = evaluation_data(values, detector)
            if "train" not in data:
                raise InputError("This checkpoint does not say what it was trained on.")
            index = load_split(data, "train", class_names=detector.class_names)
        pictures = map(index.read, spread(range(len(index)), values["calibration_images"]))
    sizes = partial(detector.preprocessing.target_size, canvas=canvas)
    return [resize(picture, *sizes(*picture.shape[:2])) for picture in pictures]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items)))]


def check(
    values: dict[str, Any],
    detector: Detector,
    canvas: tuple[int, int] | None,
    places: dict[str, Path],
    index: AnnotationIndex,
) -> list[Row]:
    threads = values["check"]["threads"]
    if threads:
        torch.set_num_threads(threads)
    contestants: dict[str, Predictor] = {REFERENCE: detector.on_canvas(canvas) if canvas else detector}
    shown = {ANY_SIZE: detector} if canvas else {}
    contestants |= shown
    contestants |= {name: ExportedDetector.load(path, threads=threads) for name, path in places.items()}
    pictures = progress(map(index.read, range(len(index))), "check", total=len(index))
    files = dict.fromkeys((REFERENCE, ANY_SIZE), Path(values["ckpt"]).stat().st_size)
    files |= {name: sum(part.stat().st_size for part in parts_of(path)) for name, path in places.items()}
    precision = scorer(index)
    return judge(
        take_turns(contestants, pictures),
        lambda found: precision(found, range(len(index))),
        files=files,
        precisions={name: precision_of(name) for name in contestants},
        max_drop=values["check"]["max_drop"],
        shown=list(shown),
    )


def parts_of(path: Path) -> list[Path]:
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def render(rows: list[Row], images: int, canvas: tuple[int, int] | None) -> str:
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
        f"{images} pictures, one at a time. box, score: largest difference from torch of matched detections. agree: "
        f"confident ones (score {CONFIDENT}) found at IoU {AGREEING_IOU} with a score within {AGREEING_SCORE}"
    )
    if canvas:
        legend += f". torch pads and shrinks to {canvas[0]} x {canvas[1]}, as the exports do; '{ANY_SIZE}' does not"
    return f"{legend}\n{markdown_table(heads, lines, align='l' + 'r' * 10 + 'l', width=None)}"


if __name__ == "__main__":
    launch(main, config_name="export")
