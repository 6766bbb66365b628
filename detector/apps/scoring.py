"""What is scored, on which data, and what is written: the options of an evaluation, and of all that scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from detector.data.image_files import ExifBoxes
from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.data.splits import DataOptions, Format
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.inference.shipped import find
from detector.options import Count, Natural, Options
from detector.training.device_options import DeviceOptions

if TYPE_CHECKING:
    from detector.inference.detector import Detector
    from detector.inference.runtime import ExportedDetector


class GivenSplitOptions(Options):
    """Instead of the split that the checkpoint was validated with."""

    annotations: str | None = None
    """relative to data.root, for example annotations/test.json"""
    images: str | None = None
    """folder of the images, relative to data.root"""
    limit: Count | None = None
    """only the first N images"""


class GivenDataOptions(Options):
    """null: the validation split that the checkpoint was trained with."""

    root: str | None = None
    """folder of the data set"""
    format: Format | None = None
    """its layout, coco, voc or yolo"""
    exif_boxes: ExifBoxes | None = None
    """frame of the boxes where images have an EXIF rotation"""
    val: GivenSplitOptions = GivenSplitOptions()


class BatchOptions(Options):
    """How images come."""

    batch_size: Count = 8
    """images a step and device"""


class ScoringOptions(Options):
    """What every scoring of a checkpoint asks: also that of a comparison."""

    workers: Natural = 1
    """loader processes; 0 loads in this one"""
    data: GivenDataOptions = GivenDataOptions()
    val: BatchOptions = BatchOptions()
    trainer: DeviceOptions = DeviceOptions()


class ReportOptions(Options):
    """What diagnosis.json and report.html look into."""

    pictures: Natural = 12
    """show the images with the most errors, at most this many"""
    properties: Natural = 200
    """read this many images to slice by brightness, contrast, sharpness and resolution"""
    proposals: Natural = 100
    """run the two stages apart on this many images"""
    doctor: Natural = 1000
    """examine the data set as tools/doctor.py does if it has at most this many images"""


class EvalOptions(ScoringOptions):
    """What to score, against what, and what to write."""

    ckpt: str | None = None
    """best.ckpt or last.ckpt of a run, an export, or the name of a detector of this package"""
    results: str | None = None
    """or anybody's detections in COCO's results format, scored without a model ..."""
    annotations: str | None = None
    """... against this annotation file, with the images of ..."""
    images: str | None = None
    """... this folder; null: the report shows none"""
    out: str | None = None
    """null: eval/ beside the checkpoint or the results, or in runs/NAME (eval_N_proposals/ with max_proposals=N)"""
    metrics: Literal["coco", "pycocotools", "lvis", "voc"] = "coco"
    """pycocotools: the same numbers as coco, slowly"""
    report: Literal[False] | ReportOptions = ReportOptions()
    """diagnosis.json and report.html; false leaves them out"""
    max_proposals: Count | None = None
    """ckpt: the head looks at so many proposals, what a smaller budget costs; null: all"""


@dataclass
class Scored:
    """What an evaluation has made when its report begins.

    Attributes:
        options: of the evaluation.
        clock: what the run has taken until here; goes on.
        index: the images that were scored.
        results: the detections on them.
        metrics: what detector.evaluation.metrics made of both.
        detector: what found them, on the device that it is to be timed on; None: somebody's results were scored.
        seconds_per_image: of network and post-process, for each batch; empty where Lightning did not run.
    """

    options: EvalOptions
    clock: Clock
    index: AnnotationIndex
    results: Results
    metrics: Mapping[str, Any]
    detector: Detector | ExportedDetector | None
    seconds_per_image: Sequence[float]


def recorded_data(detector: Detector | ExportedDetector) -> DataOptions | None:
    """The data that a detector was trained on; None where it does not say."""
    recorded = detector.provenance.get("config", {}).get("data")
    return None if recorded is None else DataOptions.parse_recorded(recorded, "data")


def evaluation_data(given: GivenDataOptions, detector: Detector | ExportedDetector) -> DataOptions:
    """The data that a detector was trained on, with what the command line gives instead.

    Raises:
        InputError: neither says which data.
    """
    data = recorded_data(detector)
    if data is None and not given.root:
        raise InputError("This checkpoint does not say which data it was trained on; give data.root=DIR.")
    if data is None or (given.root and given.root != data.root):
        data = (data or DataOptions()).model_copy(
            update={"root": given.root, "format": None, "generate": None, "missing": None, "exif_boxes": None}
        )
        data = data.model_copy(update={"val": data.val.model_copy(update={"limit": None})})
    data = data.model_copy(update=given.model_dump(include={"exif_boxes", "format"}, exclude_none=True))
    return data.model_copy(update={"val": data.val.model_copy(update=given.val.model_dump(exclude_none=True))})


def what_was_scored(ckpt: str, index: AnnotationIndex, max_proposals: int | None = None) -> dict[str, Any]:
    """What detections belong to: digests of the file of the detector and of the images, their folder, names and
    classes, and the budget of proposals."""
    about = [str(index.image_dir.resolve()), index.image_ids, index.file_names, index.class_names, index.category_ids]
    with find(ckpt).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"ckpt": digest, "images": hashlib.sha256(repr(about).encode()).hexdigest(), "max_proposals": max_proposals}


def never_found(index: AnnotationIndex) -> str:
    """What training leaves out and metrics count, in the words of log, report and doctor; "" where there is none."""
    return "".join(f"{finding.count} {finding.message}" for finding in index.degenerate_boxes())
