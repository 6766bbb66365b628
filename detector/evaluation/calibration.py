"""Whether a score of 0.7 means right in 7 cases of 10: expected calibration error and the reliability diagram."""

from __future__ import annotations

from typing import Any

from detector.evaluation.outcomes import FOREGROUND, Outcomes
from detector.evaluation.records import evaluator


def calibration(outcomes: Outcomes, bins: int = 10) -> dict[str, Any]:
    """Compare the mean score with the precision, in bins of the score; computed by hotcoco.

    A detection is right where COCO's matching at IoU 0.5 says so; those that COCO ignores do not count. ECE: Guo et
    al. 2017, section 2, over detections, as usual for detectors: objects that nothing was found for do not enter.

    Args:
        bins: of equal width, from 0 to 1; a score on an edge belongs to the bin above it.

    Returns:
        {"iou": 0.5, "count": detections,
         "ece": mean over detections of |score - precision| of their bin, in [0, 1],
         "mce": the largest such gap,
         "bins": [{"low", "high", "confidence": mean score, "precision", "count"}], both None in an empty bin,
         "per_class": {class name: ECE, None for a class without detections}}.
        Scores outside [0, 1] are no probabilities: "ece", "mce" and "per_class" are None then, and "bins" empty.
    """
    records = outcomes.records
    scores = records.results.scores[outcomes.counted]
    if ((scores < 0) | (scores > 1)).any():
        unknown = dict.fromkeys(records.index.class_names)
        return {"iou": FOREGROUND, "count": len(scores), "ece": None, "mce": None, "bins": [], "per_class": unknown}
    measured = evaluator(records, outcomes.counted).calibration(bins, FOREGROUND)
    return {
        "iou": FOREGROUND,
        "count": int(measured["num_detections"]),
        "ece": float(measured["ece"]),
        "mce": float(measured["mce"]),
        "bins": [_bin(row) for row in measured["bins"]],
        "per_class": {
            name: measured["per_category"].get(str(label)) for label, name in enumerate(records.index.class_names)
        },
    }


def _bin(row: dict[str, Any]) -> dict[str, Any]:
    count = int(row["count"])
    return {
        "low": float(row["bin_lower"]),
        "high": float(row["bin_upper"]),
        "confidence": float(row["avg_confidence"]) if count else None,
        "precision": float(row["avg_accuracy"]) if count else None,
        "count": count,
    }
