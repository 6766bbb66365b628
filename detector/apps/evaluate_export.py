"""Score an exported detector as a checkpoint is scored: same pictures, same figures, one process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.apps.evaluate import evaluation_data
from detector.apps.report.reporting import report_on_export
from detector.data.annotations import AnnotationIndex
from detector.data.progress import progress
from detector.data.splits import load_split
from detector.errors import InputError
from detector.evaluation.clock import Clock
from detector.evaluation.metrics import evaluate, format_table, save_metrics
from detector.files import write_json
from detector.inference.detections import Detections
from detector.inference.predictor import Predictor
from detector.inference.runtime import ExportedDetector

log = logging.getLogger(__name__)


def evaluate_export(config: Mapping[str, Any]) -> dict[str, Any]:
    """Score an export as conf/eval.yaml describes it; writes what `run.evaluate` writes. Returns the figures."""
    if config["max_proposals"]:
        raise InputError(
            f"max_proposals={config['max_proposals']}: an export's number of proposals is fixed; score the checkpoint."
        )
    clock = Clock()
    detector = ExportedDetector.load(config["ckpt"])
    index = load_split(evaluation_data(config, detector), "val", class_names=detector.class_names)
    out = Path(str(config["out"])) if config["out"] else Path(config["ckpt"]).parent / "eval"
    clock.book("load")
    results = find_all(detector, index, config["val"]["batch_size"])
    clock.book("predict")
    figures = evaluate(results, index.annotation_file, image_ids=index.image_ids, metrics=config["metrics"])
    clock.book("metrics")
    write_json(out / "detections.json", results)
    save_metrics(figures, out / "metrics.json")
    clock.book("files")
    log.info("\n%s\n", format_table(figures, str(index.annotation_file)))
    log.info("metrics.json, detections.json in %s", out)
    if config["report"]:
        report_on_export(out, config, clock, detector, index, results, figures)
    return figures


def find_all(detector: Predictor, index: AnnotationIndex, batch_size: int) -> list[dict[str, Any]]:
    """COCO's results of every image of an index, in its order."""
    results: list[dict[str, Any]] = []
    for start in progress(range(0, len(index), batch_size), "predict", unit="batch"):
        numbers = range(start, min(start + batch_size, len(index)))
        images = [index.read(i) for i in numbers]
        for i, image, found in zip(numbers, images, detector.detect_images(images), strict=True):
            detections = Detections(*found, index.class_names, image.shape[:2])
            results += detections.to_coco(index.image_ids[i], index.category_ids)
    return results
