"""What the scores of a detector are worth: their calibration, and from which one on a detection is to be shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from detector.data.index import AnnotationIndex
from detector.data.results import Results
from detector.evaluation.calibration import fit_calibration
from detector.evaluation.curves import f1_curves
from detector.evaluation.outcomes import CORRECT, Outcomes, judge
from detector.evaluation.records import sort_records
from detector.models.calibrate import calibrated

# Chosen by this project: the best threshold of fewer objects is that of a few lucky detections, and one outside the
# range shows noise, or nothing at all on other images.
FEWEST, LOWEST, HIGHEST = 10, 0.1, 0.9


def operating_point(results: Results, index: AnnotationIndex) -> dict[str, Any]:
    """Plain values of detector.inference.operating_point.OperatingPoint, from what was found on a validation split.

    The thresholds are for calibrated scores. Difficult objects are treated as crowd regions: what finds one counts
    neither as right nor as wrong.
    """
    outcomes = judge(sort_records(results, replace(index, crowd=index.crowd | index.difficult)))
    records, counted = outcomes.records, outcomes.counted
    scores = records.results.scores
    scale, shift = fit_calibration(scores[counted], (outcomes.kind == CORRECT)[counted])
    results = replace(records.results, scores=calibrated(scores, scale, shift))  # in the same order: judged alike
    outcomes = replace(outcomes, records=replace(records, results=results))
    return {"calibration": (scale, shift), "thresholds": best_thresholds(outcomes)}


def best_thresholds(outcomes: Outcomes) -> list[float] | None:
    """For each class the lowest threshold, in steps of 0.01, with its best F1 at IoU 0.5, between LOWEST and HIGHEST.

    Returns:
        K values. A class with fewer than FEWEST objects, or none of them found, has the median of the others; None
        where all are like that.
    """
    index = outcomes.records.index
    objects = np.bincount(index.labels[~index.crowd], minlength=len(index.class_names))
    curves = f1_curves(outcomes)["per_class"]
    known = [
        curves[name]["best"]["threshold"] if count >= FEWEST and curves[name]["best"]["f1"] > 0 else None
        for name, count in zip(index.class_names, objects, strict=True)
    ]
    if not (found := [value for value in known if value is not None]):
        return None
    usual = float(np.median(found))
    return [min(max(usual if value is None else value, LOWEST), HIGHEST) for value in known]
