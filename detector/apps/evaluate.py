"""Score a checkpoint, or anybody's detections, and write a report that shows where they err.

python tools/eval.py ckpt=RUN_DIR/best.ckpt                     on the validation split it was trained with
python tools/eval.py ckpt=PATH data.root=DIR data.val.annotations=annotations/test.json out=DIR
python tools/eval.py results=detections.json annotations=instances.json images=DIR   COCO's formats, no model

An export (.onnx, .xml, .pt2) is scored as a checkpoint is. Writes metrics.json, diagnosis.json, report.html and, but of
`results=`, detections.json and scored.json (of which file and images they are).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detector.apps.report.reporting import write_evaluation_report
from detector.apps.scoring import EvalOptions, GivenDataOptions, Scored, evaluation_data, never_found, what_was_scored
from detector.data.annotations import read_annotations
from detector.data.image_files import match_files
from detector.data.index import AnnotationIndex
from detector.data.progress import progress
from detector.data.results import Results, read_results, write_results
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.metrics import compute_metrics, format_table, save_metrics
from detector.files import check_writable, write_json
from detector.inference.runtime import ExportedDetector, is_export
from detector.inference.shipped import folder_for
from detector.training.device_options import DeviceOptions

if TYPE_CHECKING:
    from detector.inference.detector import Detector
    from detector.inference.predictor import Predictor
    from detector.training.task import DetectionTask

log = logging.getLogger(__name__)


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """Score a checkpoint, an export or a results file.

    Returns:
        COCO's metrics, on every rank; other `metrics` are written only. Of results and exports: those asked for.

    Raises:
        InputError: an option is missing or contradicts another, or a file is wrong.
    """
    clock = Clock()
    detector = _load(options)
    if detector is None:
        if options.images and not Path(options.images).is_dir():
            raise InputError(f"images={options.images}: no such folder; without images= the report shows none.")
        index = read_annotations(str(options.annotations), options.images).check()
        if options.images is not None:
            index = match_files(index)  # for the report: no image is needed to score
    else:
        index = load_split(evaluation_data(options.data, detector), "val", class_names=detector.class_names)
    return score(options, detector, index, clock)


def _load(options: EvalOptions) -> Detector | ExportedDetector | None:
    """What is to be scored; None for a results file, which is scored without torch."""
    ckpt, results, limit = options.ckpt, options.results, options.max_proposals
    if results:
        if ckpt:
            raise InputError(f"Both ckpt={ckpt} and results={results}: give one of them.")
        if not options.annotations:
            raise InputError(f"results={results} needs the ground truth: add annotations=instances.json.")
        if limit:
            raise InputError(f"max_proposals={limit} needs the detector: give ckpt= instead of results=.")
        if options.data != GivenDataOptions():
            raise InputError(f"data.* is for ckpt=; results={results} is scored against annotations=FILE, images=DIR.")
        return None
    if not ckpt:
        raise InputError(
            "ckpt is missing: add ckpt=RUN_DIR/best.ckpt; or results=detections.json annotations=instances.json to "
            "score what another detector found."
        )
    if given := options.annotations or options.images:
        name = "annotations" if options.annotations else "images"
        raise InputError(
            f"{name}={given} is for results=; of ckpt={ckpt} give data.root=DIR data.val.{name}=... instead."
        )
    if is_export(ckpt):
        if options.trainer != DeviceOptions():
            raise InputError(f"trainer.* is for a checkpoint; {ckpt} is predicted by its own runtime, on the CPU.")
        if limit:
            raise InputError(f"max_proposals={limit}: an export's number of proposals is fixed; score the checkpoint.")
        return ExportedDetector.load(ckpt)
    from detector.inference.detector import Detector

    detector = Detector.load(ckpt, device="cpu")  # Lightning moves it to this process's device
    if limit:
        rpn = detector.network.rpn
        limits = rpn.options.test_limits
        limits = limits.model_copy(update={"after_nms": min(limit, limits.after_nms)})
        rpn.options = rpn.options.model_copy(update={"test_limits": limits})
    return detector


def score(
    options: EvalOptions, detector: Detector | ExportedDetector | None, index: AnnotationIndex, clock: Clock
) -> dict[str, Any]:
    """As `evaluate`, of a detector and a ground truth that are in memory already.

    Args:
        options: of the evaluation.
        detector: a detector on the CPU, or an export; None: `options.results`.
        index: the images to score it on.
        clock: what has been spent until here counts as loading.
    """
    # With fewer proposals, not where other tools look for the detector's metrics.
    name = f"eval_{options.max_proposals}_proposals" if options.max_proposals else "eval"
    out = Path(options.out or _folder(options) / name)
    if options.metrics != "coco":  # what is missing for it is said before minutes of prediction
        compute_metrics(Results.of([], []), index, options.metrics)
    coco: dict[str, Any] | None = None
    seconds_per_image: Sequence[float] = ()
    # Before the prediction: a run that still trains may have another best.ckpt after it.
    scored = what_was_scored(str(options.ckpt), index, options.max_proposals) if detector is not None else None
    if detector is None:
        results = read_results(str(options.results), index)
        check_writable(out)
        clock.book("load")
    elif isinstance(detector, ExportedDetector):
        check_writable(out)
        clock.book("load")
        results = find_all(detector, index, options.val.batch_size)
        clock.book("predict")
    else:
        task, seconds_per_image = _validate(options, detector, index, clock, out)
        results, coco = task.results, task.metrics
        if not task.trainer.is_global_zero:
            return coco
    if coco is not None and options.metrics == "coco":
        metrics = coco
    else:
        metrics = compute_metrics(results, index, options.metrics)
        clock.book("metrics")
    _write(options, index, results, metrics, scored, out)
    clock.book("files")
    if options.report:
        write_evaluation_report(out, Scored(options, clock, index, results, metrics, detector, seconds_per_image))
    return metrics


def _folder(options: EvalOptions) -> Path:
    return folder_for(options.ckpt) if options.ckpt else Path(str(options.results)).parent


def _validate(
    options: EvalOptions, detector: Detector, index: AnnotationIndex, clock: Clock, out: Path
) -> tuple[DetectionTask, list[float]]:
    """Score under Lightning, on whatever devices it has; and the seconds of network and post-process an image."""
    import lightning
    from tqdm.contrib.logging import logging_redirect_tqdm

    from detector.training.data_module import DetectionData
    from detector.training.processes import devices, ranks_end_together
    from detector.training.run_directory import is_first_process
    from detector.training.task import DetectionTask
    from detector.training.timing import PartTimes
    from detector.training.trainer import progress as progress_arguments

    if is_first_process():
        check_writable(out)
    data = DetectionData(index, detector.preprocessing, options)
    task = DetectionTask(detector, index)
    times = PartTimes(clock)
    trainer = lightning.Trainer(
        **devices(options.trainer),
        **progress_arguments(options.trainer, [times]),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # it pads
        default_root_dir=out,
    )
    with ranks_end_together(trainer), logging_redirect_tqdm():
        trainer.validate(task, data, verbose=False)
    detector.to(trainer.strategy.root_device)  # Lightning has put it back on the CPU
    return task, times.seconds_per_image


def _write(
    options: EvalOptions,
    index: AnnotationIndex,
    results: Results,
    metrics: Mapping[str, Any],
    scored: Mapping[str, Any] | None,
    out: Path,
) -> None:
    """Write and log the metrics; then write detections that were made here, which need more room.

    What lies there of an evaluation before is no longer of these metrics.
    """
    for name in ("diagnosis.json", "report.html", *(["scored.json"] if scored is not None else [])):
        (out / name).unlink(missing_ok=True)
    save_metrics(metrics, out / "metrics.json")
    title = f"{options.results} against {index.annotation_file}" if options.results else str(index.annotation_file)
    log.info("\n%s\n", format_table(metrics, title))
    if note := never_found(index):
        log.info("%s", note)
    log.info("metrics.json in %s", out)
    if scored is not None:
        write_results(out / "detections.json", results, index)
        write_json(out / "scored.json", scored)
        log.info("detections.json in %s", out)


def find_all(detector: Predictor, index: AnnotationIndex, batch_size: int) -> Results:
    """What is found on every image of an index."""
    parts = []
    for start in progress(range(0, len(index), batch_size), "predict", unit="batch"):
        places = range(start, min(start + batch_size, len(index)))
        parts.append(Results.of(places, detector.detect_images([index.read(i) for i in places])))
    return Results.joined(parts)
