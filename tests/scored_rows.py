"""Evaluation as the oracles take it: rows in COCO's formats, or files of them, instead of arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from detector.data.annotations import read_annotations
from detector.data.index import AnnotationIndex
from detector.data.results import read_results
from detector.evaluation import compare as compare_module
from detector.evaluation import metrics as metrics_module
from detector.evaluation.diagnosis import diagnose as diagnose_arrays
from detector.evaluation.records import Records, sort_records
from detector.evaluation.resampling import MatchedDetections
from detector.evaluation.resampling import match_detections as match_arrays


def index_of(ground_truth: Any, image_ids: Iterable[Any] | None = None) -> AnnotationIndex:
    index = read_annotations(ground_truth).check()
    if image_ids is None:
        return index
    return index.select([index.image_ids.index(image_id) for image_id in image_ids])


def evaluate(
    results: Any, ground_truth: Any, *, image_ids: Iterable[Any] | None = None, metrics: str = "coco"
) -> dict[str, Any]:
    index = index_of(ground_truth, image_ids)
    return metrics_module.compute_metrics(read_results(results, index), index, metrics)


def read_records(results: Any, ground_truth: Any, *, image_ids: Iterable[Any] | None = None) -> Records:
    index = index_of(ground_truth, image_ids)
    return sort_records(read_results(results, index), index)


def match_detections(results: Any, ground_truth: Any) -> MatchedDetections:
    index = index_of(ground_truth)
    return match_arrays(read_results(results, index), index)


def compare(a: Any, b: Any, ground_truth: Any, **options: Any) -> dict[str, Any]:
    index = index_of(ground_truth)
    return compare_module.compare(read_results(a, index), read_results(b, index), index, **options)


def diagnose(results: Any, ground_truth: Any, **options: Any) -> dict[str, Any]:
    index = index_of(ground_truth)
    return diagnose_arrays(read_results(results, index), index, **options)
