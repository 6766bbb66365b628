"""Why a detector errs: everything that its results and the ground truth tell, as one plain dict for a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detector.data.image_properties import image_properties
from detector.evaluation.calibration import calibration
from detector.evaluation.confusion import confusion
from detector.evaluation.curves import curves
from detector.evaluation.outcomes import judge
from detector.evaluation.records import read_records
from detector.evaluation.subsets import slices
from detector.evaluation.tide import tide
from detector.evaluation.worst import worst

if TYPE_CHECKING:
    from detector.data.annotations import AnnotationIndex


def diagnose(
    results: Sequence[Mapping[str, Any]] | str | Path,
    ground_truth: Mapping[str, Any] | str | Path,
    *,
    image_ids: Iterable[Any] | None = None,
    images: AnnotationIndex | None = None,
    image_limit: int | None = None,
    score_threshold: float | None = None,
    worst_count: int = 12,
) -> dict[str, Any]:
    """All diagnoses of a set of results; plain types only, ready for JSON.

    Args:
        results, ground_truth, image_ids: as of detector.evaluation.metrics.evaluate.
        images: where the pictures are, to slice by their properties; None reads no picture.
        image_limit: read at most this many of them.
        score_threshold: of the confusion matrix and the worst pictures; None takes the one of the best F1, 0.5 where
            there is no object.
        worst_count: how many of the worst pictures.

    Returns:
        {"images", "truths" (crowd regions left out), "detections" (at most COCO's 100 an image and class): counts,
         "score_threshold": float,
         "tide", "confusion", "curves", "calibration", "slices", "worst": what the functions of these names return}.

    Raises:
        InputError: as evaluate; hotcoco is not installed, or a picture cannot be read.
    """
    records = read_records(results, ground_truth, image_ids=image_ids)
    outcomes = judge(records)
    found = curves(outcomes)
    if score_threshold is None:
        score_threshold = found["f1"]["all"]["best"]["threshold"] if found["f1"]["all"] else 0.5
    return {
        "images": len(records.image_ids),
        "truths": int((~records.truth_crowd).sum()),
        "detections": len(records.scores),
        "score_threshold": score_threshold,
        "tide": tide(outcomes),
        "confusion": confusion(outcomes, score_threshold),
        "curves": found,
        "calibration": calibration(outcomes),
        "slices": slices(outcomes, image_properties(images, image_limit) if images is not None else None),
        "worst": worst(outcomes, score_threshold, worst_count),
    }
