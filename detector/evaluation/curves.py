"""Precision against recall, and F1 against the score threshold: where to set the threshold, and what it buys."""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.evaluation.outcomes import CORRECT, Outcomes
from detector.evaluation.records import evaluator

THRESHOLDS = np.arange(101) / 100


def curves(outcomes: Outcomes) -> dict[str, Any]:
    """The curves as plain lists.

    Precision and recall are COCO's: interpolated at 101 points of recall, the mean over the classes that have objects,
    so that the mean of a curve is AP50 or AP. F1 is at IoU 0.5 and not interpolated; that over all classes pools the
    detections and objects of all.

    Returns:
        {"recall": 101 values from 0 to 1,
         "precision_50": 101 values at IoU 0.5, "precision": their mean over IoU 0.50:0.95; None without objects,
         "precision_50_per_class": {class name: 101 values, or None without objects},
         "f1": {"thresholds": 101 values from 0 to 1,
                "all": CURVE, "per_class": {class name: CURVE, or None without objects}}}
        with CURVE {"f1", "precision", "recall": 101 values each; precision is None where nothing is left,
        "best": {"threshold", "f1", "precision", "recall"}, of equally good thresholds the lowest}, None without
        objects.
    """
    scores = evaluator(outcomes.records)
    scores.accumulate()
    table = scores.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class): all areas, 100 detections
    exists = table[0, 0] > -1
    mean = table[:, :, exists].mean(axis=2) if exists.any() else None
    names = outcomes.records.index.class_names
    return {
        "recall": THRESHOLDS.tolist(),
        "precision_50": None if mean is None else mean[0].tolist(),
        "precision": None if mean is None else mean.mean(axis=0).tolist(),
        "precision_50_per_class": {
            name: table[0, :, place].tolist() if exists[place] else None for place, name in enumerate(names)
        },
        "f1": f1_curves(outcomes),
    }


def f1_curves(outcomes: Outcomes) -> dict[str, Any]:
    """F1 at each of THRESHOLDS: "f1" of `curves`."""
    records = outcomes.records
    objects = np.bincount(records.index.labels[~records.index.crowd], minlength=len(records.index.class_names))
    counts = [
        (_at_least(outcomes, label, outcomes.kind == CORRECT), _at_least(outcomes, label, outcomes.counted))
        for label in range(len(records.index.class_names))
    ]
    totals = np.array(counts, np.int64).reshape(-1, 2, len(THRESHOLDS)).sum(axis=0)
    return {
        "thresholds": THRESHOLDS.tolist(),
        "all": _curve(totals[0], totals[1], int(objects.sum())),
        "per_class": {
            name: _curve(*counts[label], int(objects[label])) for label, name in enumerate(records.index.class_names)
        },
    }


def _at_least(outcomes: Outcomes, label: int, which: np.ndarray) -> np.ndarray:
    """How many of the chosen detections of a class have each threshold's score or more, (101,)."""
    scores = np.sort(outcomes.records.results.scores[which & (outcomes.records.results.labels == label)])
    return len(scores) - np.searchsorted(scores, THRESHOLDS, side="left")


def _curve(correct: np.ndarray, found: np.ndarray, objects: int) -> dict[str, Any] | None:
    if not objects:
        return None
    precision = np.divide(correct, found, out=np.full(len(found), np.nan), where=found > 0)
    recall = correct / objects
    f1 = 2 * correct / (found + objects)
    best = int(f1.argmax())
    values = {"f1": f1.tolist(), "precision": _listed(precision), "recall": recall.tolist()}
    return values | {"best": {"threshold": float(THRESHOLDS[best])} | {name: row[best] for name, row in values.items()}}


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
