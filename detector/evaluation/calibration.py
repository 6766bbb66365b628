"""Whether a score of 0.7 means right in 7 cases of 10: calibration error and reliability diagram, and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.evaluation.outcomes import FOREGROUND, Outcomes
from detector.evaluation.records import evaluator
from detector.models.calibrate import IDENTITY, LARGEST

# Chosen by this project: below, a threshold shows nothing; fewer tell nothing.
LOWEST, FEWEST, STEPS = 0.05, 20, 50


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


def fit_calibration(scores: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Scale and shift of `calibrated` by logistic regression of "is right" on the scores' logits, with Platt's targets.

    Platt 1999, section 2.2; scores below LOWEST, which nobody is shown, have no part in it. Newton's method, a step
    halved until it is one downhill (Lin et al. 2007, A note on Platt's probabilistic outputs): a full one may jump to
    where all curvature is gone.

    Args:
        scores: (D,) in [0, 1].
        right: (D,) bool.

    Returns:
        IDENTITY where fewer than FEWEST are right, or wrong, or where better scores are not more often right.
    """
    used = scores >= LOWEST
    right, clipped = right[used], scores[used].astype(np.float64).clip(1e-6, 1 - 1e-6)
    hits, misses = int(right.sum()), int((~right).sum())
    if min(hits, misses) < FEWEST:
        return IDENTITY
    design = np.stack((np.log(clipped / (1 - clipped)), np.ones(len(clipped))), axis=1)
    wanted = np.where(right, (hits + 1) / (hits + 2), 1 / (misses + 2))
    fitted = np.array([0.0, np.log(hits / misses)])
    for _ in range(STEPS):
        share = 1 / (1 + np.exp(-design @ fitted))
        curvature = (design * (share * (1 - share))[:, None]).T @ design
        step = np.linalg.lstsq(curvature, design.T @ (share - wanted), rcond=None)[0]
        while np.abs(step).max() > 1e-10 and _loss(design @ (fitted - step), wanted) > _loss(design @ fitted, wanted):
            step = step / 2
        fitted = fitted - step
        if np.abs(step).max() <= 1e-10:
            scale, shift = fitted.tolist()
            return (scale, shift) if 0 < scale <= LARGEST and abs(shift) <= LARGEST else IDENTITY
    return IDENTITY  # it does not converge


def _loss(logits: np.ndarray, wanted: np.ndarray) -> float:
    """The cross-entropy of the logistic regression."""
    return float(np.logaddexp(0, logits).sum() - wanted @ logits)


def _bin(row: dict[str, Any]) -> dict[str, Any]:
    count = int(row["count"])
    return {
        "low": float(row["bin_lower"]),
        "high": float(row["bin_upper"]),
        "confidence": float(row["avg_confidence"]) if count else None,
        "precision": float(row["avg_accuracy"]) if count else None,
        "count": count,
    }
