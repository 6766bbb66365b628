"""Which class is taken for which: the confusion matrix of detections, with background. Computed by hotcoco."""

from __future__ import annotations

from typing import Any

from detector.evaluation.outcomes import FOREGROUND, Outcomes
from detector.evaluation.records import evaluator


def confusion(outcomes: Outcomes, score_threshold: float) -> dict[str, Any]:
    """Match detections to objects of any class at IoU 0.5, best detection first.

    Only detections of at least the threshold, and only the 100 best of an image; crowd regions, and the detections
    that COCO ignores because of them, take no part.

    Returns:
        {"score_threshold": float, "iou": 0.5,
         "names": K class names and "background",
         "matrix": (K + 1, K + 1) counts; rows are the ground truth, columns the detections, so that the last column
            holds objects that nothing was found for, and the last row detections where there is nothing.}
    """
    records = outcomes.records
    keep = outcomes.counted & (records.results.scores >= score_threshold)
    matrix = evaluator(records, keep).confusion_matrix(iou_thr=FOREGROUND)["matrix"]
    return {
        "score_threshold": float(score_threshold),
        "iou": FOREGROUND,
        "names": [*records.index.class_names, "background"],
        "matrix": matrix.astype(int).tolist(),
    }
