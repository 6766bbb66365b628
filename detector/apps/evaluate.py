"""Score a checkpoint, or anybody's detections, and write a report that shows where they err.

python tools/eval.py ckpt=RUN_DIR/best.ckpt                     on the validation split it was trained with
python tools/eval.py ckpt=PATH data.root=DIR data.val.annotations=annotations/test.json out=DIR
python tools/eval.py results=detections.json annotations=instances.json images=DIR   COCO's formats, no model

An export (.onnx, .xml, .pt2) is scored as a checkpoint is. Writes metrics.json, detections.json, diagnosis.json and
report.html.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from detector.apps.report.reporting import ReportOptions, report_on_checkpoint, report_on_export, report_on_results
from detector.data import progress as bars
from detector.data.annotations import AnnotationIndex, read_annotations
from detector.data.results import Results, read_results, write_results
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.metrics import evaluate as score
from detector.evaluation.metrics import format_table, save_metrics
from detector.options import Count, Natural, Options
from detector.training.device_options import DeviceOptions

if TYPE_CHECKING:
    from detector.inference.detector import Detector
    from detector.inference.predictor import Predictor
    from detector.inference.runtime import ExportedDetector

log = logging.getLogger(__name__)


class GivenSplitOptions(Options):
    """Instead of the split that the checkpoint was validated with."""

    annotations: str | None = Field(default=None, coerce_numbers_to_str=True)
    """relative to data.root, for example annotations/test.json"""
    images: str | None = Field(default=None, coerce_numbers_to_str=True)
    """folder of the images, relative to data.root"""
    limit: Count | None = None
    """only the first N images"""


class GivenDataOptions(Options):
    """null: the validation split that the checkpoint was trained with."""

    root: str | None = Field(default=None, coerce_numbers_to_str=True)
    """folder of the data set"""
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


class EvalOptions(ScoringOptions):
    """What to score, against what, and what to write."""

    ckpt: str | None = Field(default=None, coerce_numbers_to_str=True)
    """best.ckpt or last.ckpt of a run, or an export"""
    results: str | None = Field(default=None, coerce_numbers_to_str=True)
    """or anybody's detections in COCO's results format, scored without a model ..."""
    annotations: str | None = Field(default=None, coerce_numbers_to_str=True)
    """... against this annotation file, with the images of ..."""
    images: str | None = Field(default=None, coerce_numbers_to_str=True)
    """... this folder; null: the report shows none"""
    out: str | None = Field(default=None, coerce_numbers_to_str=True)
    """null: eval/ beside the checkpoint (eval_N_proposals/ with max_proposals=N), or the results"""
    metrics: Literal["coco", "pycocotools", "lvis", "voc"] = "coco"
    """pycocotools: the same numbers as coco, slowly"""
    report: Literal[False] | ReportOptions = ReportOptions()
    """diagnosis.json and report.html; false leaves them out"""
    max_proposals: Count | None = None
    """ckpt: the head looks at so many proposals, what a smaller budget costs; null: all"""


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Score a checkpoint, an export or a results file.

    Returns:
        COCO's metrics, on every rank; other `metrics` are written only. Of results and exports: those asked for.

    Raises:
        InputError: an option is missing or contradicts another, or a file is wrong.
    """
    if options.results:
        return _evaluate_results(options)
    from detector.inference.runtime import is_export  # results are scored without torch

    if not options.ckpt:
        raise InputError(
            "ckpt is missing: add ckpt=RUN_DIR/best.ckpt; or results=detections.json annotations=instances.json to "
            "score what another detector found."
        )
    return (_evaluate_export if is_export(options.ckpt) else _evaluate_checkpoint)(options, options.ckpt)


def _evaluate_results(options: EvalOptions) -> dict[str, Any]:
    clock = Clock()
    path = Path(str(options.results))
    if options.ckpt:
        raise InputError(f"Both ckpt={options.ckpt} and results={path}: give one of them.")
    if not options.annotations:
        raise InputError(f"results={path} needs the ground truth: add annotations=instances.json.")
    if options.max_proposals:
        raise InputError(f"max_proposals={options.max_proposals} needs the detector: give ckpt= instead of results=.")
    index = read_annotations(options.annotations, options.images).check()
    results = read_results(path, index)
    clock.book("load")
    out = Path(options.out) if options.out else path.parent / "eval"
    metrics = _score(out, options, clock, index, results, f"{path} against {options.annotations}")
    if options.report:
        report_on_results(out, options, clock, index, results, metrics)
    return metrics


def _evaluate_export(options: EvalOptions, ckpt: str) -> dict[str, Any]:
    if options.max_proposals:
        raise InputError(
            f"max_proposals={options.max_proposals}: an export's number of proposals is fixed; score the checkpoint."
        )
    from detector.inference.runtime import ExportedDetector

    clock = Clock()
    detector = ExportedDetector.load(ckpt)
    index = load_split(evaluation_data(options.to_dict(), detector), "val", class_names=detector.class_names)
    out = Path(options.out) if options.out else Path(ckpt).parent / "eval"
    clock.book("load")
    results = find_all(detector, index, options.val.batch_size)
    clock.book("predict")
    metrics = _score(out, options, clock, index, results)
    if options.report:
        report_on_export(out, options, clock, detector, index, results, metrics)
    return metrics


def _evaluate_checkpoint(options: EvalOptions, ckpt: str) -> dict[str, Any]:
    import lightning
    from tqdm.contrib.logging import logging_redirect_tqdm

    from detector.inference.detector import Detector
    from detector.training.data_module import DetectionData
    from detector.training.task import DetectionTask
    from detector.training.timing import PartTimes
    from detector.training.trainer import check_writable, devices, is_first_process, progress, ranks_end_together

    clock = Clock()
    device_arguments = devices(options.trainer)
    detector = Detector.load(ckpt, device="cpu")  # Lightning moves it to this process's device
    if options.max_proposals:
        rpn = detector.network.rpn
        budget = min(options.max_proposals, rpn.test_limits.after_nms)
        rpn.test_limits = rpn.test_limits.model_copy(update={"after_nms": budget})
    index = load_split(evaluation_data(options.to_dict(), detector), "val", class_names=detector.class_names)
    # Not where other tools look for the detector's metrics.
    name = f"eval_{options.max_proposals}_proposals" if options.max_proposals else "eval"
    out = Path(options.out) if options.out else Path(ckpt).parent / name
    if is_first_process():
        check_writable(out)
    data = DetectionData(
        val=index,
        preprocessing=detector.preprocessing,
        val_batch_size=options.val.batch_size,
        workers=options.workers,
    )
    task = DetectionTask(detector)
    task.val_index = index
    times = PartTimes(clock)
    trainer = lightning.Trainer(
        **device_arguments, **progress(options.trainer, [times]), logger=False, enable_checkpointing=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=out,
    )  # fmt: skip
    with ranks_end_together(trainer), logging_redirect_tqdm():
        trainer.validate(task, data, verbose=False)
    if trainer.is_global_zero:
        known = task.figures if options.metrics == "coco" else None
        metrics = _score(out, options, clock, index, task.results, known=known)
        if options.report:
            detector.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
            report_on_checkpoint(out, options, clock, detector, index, task.results, metrics, times.seconds_per_image)
    return task.figures


def _score(
    out: Path,
    options: EvalOptions,
    clock: Clock,
    index: AnnotationIndex,
    results: Results,
    title: str | None = None,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics, those that are known already or new ones, written and logged, with detections that were made here."""
    metrics = known if known is not None else score(results, index, options.metrics)
    if known is None:
        clock.book("metrics")
    save_metrics(metrics, out / "metrics.json")
    names = "metrics.json"
    if not options.results:
        write_results(out / "detections.json", results, index)
        names += ", detections.json"
    clock.book("files")
    log.info("\n%s\n", format_table(metrics, title or str(index.annotation_file)))
    if degenerate := index.counts["degenerate"]:
        log.info("%d objects without area in their image count, and can never be found", degenerate)
    log.info("%s in %s", names, out)
    return metrics


def find_all(detector: Predictor, index: AnnotationIndex, batch_size: int) -> Results:
    """What is found on every image of an index."""
    parts = []
    for start in bars.progress(range(0, len(index), batch_size), "predict", unit="batch"):
        places = range(start, min(start + batch_size, len(index)))
        parts.append(Results.of(places, detector.detect_images([index.read(i) for i in places])))
    return Results.joined(parts)


def evaluation_data(config: Mapping[str, Any], detector: Detector | ExportedDetector) -> dict[str, Any]:
    """The data of the checkpoint's recipe, with what the command line gives instead."""
    recorded = detector.provenance.get("config", {}).get("data")
    given = config["data"]
    if recorded is None and not given["root"]:
        raise InputError("This checkpoint does not say which data it was trained on; give data.root=DIR.")
    data = dict(recorded or {"generate": None, "missing": None, "keep_empty": True})
    if given["root"] and given["root"] != data.get("root"):
        data |= {"root": given["root"], "generate": None, "missing": None}
    val = {"annotations": "annotations/val.json", "images": "images", "limit": None} | dict(data.get("val", {}))
    data["val"] = val | {key: value for key, value in given["val"].items() if value is not None}
    return data
