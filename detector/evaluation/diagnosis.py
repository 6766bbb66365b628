"""Why a detector errs: everything that its results and the ground truth tell, as one plain dict for a report."""

from __future__ import annotations

from typing import Any

from detector.data.image_properties import image_properties
from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.evaluation.calibration import calibration
from detector.evaluation.confusion import confusion
from detector.evaluation.curves import curves
from detector.evaluation.outcomes import judge
from detector.evaluation.records import sort_records
from detector.evaluation.subsets import score_subsets
from detector.evaluation.tide import tide
from detector.evaluation.worst import worst


def diagnose(
    results: Results,
    index: AnnotationIndex,
    *,
    properties: int = 0,
    score_threshold: float | None = None,
    worst_count: int = 12,
) -> dict[str, Any]:
    """All diagnoses of a set of results; plain types only, ready for JSON.

    Args:
        results, index: as of detector.evaluation.metrics.compute_metrics.
        properties: read this many images, to slice by brightness and the like; 0 reads none.
        score_threshold: of the confusion matrix and the worst images; None takes the one of the best F1, 0.5 where
            there is no object.
        worst_count: how many of the worst images.

    Returns:
        {"images", "truths" (crowd regions left out), "detections" (at most COCO's 100 an image and class): counts,
         "score_threshold": float,
         "tide", "confusion", "curves", "calibration", "worst": what the functions of these names return,
         "slices": what score_subsets returns}.

    Raises:
        InputError: hotcoco is not installed.
    """
    records = sort_records(results, index)
    outcomes = judge(records)
    found = curves(outcomes)
    if score_threshold is None:
        score_threshold = found["f1"]["all"]["best"]["threshold"] if found["f1"]["all"] else 0.5
    return {
        "images": len(records.index),
        "truths": int((~records.index.crowd).sum()),
        "detections": len(records.results),
        "score_threshold": score_threshold,
        "tide": tide(outcomes),
        "confusion": confusion(outcomes, score_threshold),
        "curves": found,
        "calibration": calibration(outcomes),
        "slices": score_subsets(outcomes, image_properties(index, properties) if properties else None),
        "worst": worst(outcomes, score_threshold, worst_count),
    }
