"""Average precision as Pascal VOC defines it: one IoU threshold, 0.5.

Everingham et al. 2010 (The Pascal Visual Object Classes Challenge), sections 3.4 and 4.2, and the development kit's
VOCevaldet. A detection belongs to the object of its class that it overlaps most, whether or not that one is taken:
the first detection of an object is right, later ones are wrong; one whose object is difficult does not count. COCO
would let a later detection have the second-best object.

Chosen by this project: boxes are continuous, as everywhere here. The development kit's boxes name the first and last
pixel, and it adds 1 to each extent; a file converted as x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1,
height = ymax - ymin + 1 gives the same overlaps here. The eleven recalls are the decimals 0, 0.1 ... 1: three of ten
objects reach 0.3, which repeated addition of 0.1 in floating point misses. There is no limit of detections an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.data.boxes import box_iou, corners
from detector.data.index import AnnotationIndex
from detector.data.results import Results


def score_voc(results: Results, index: AnnotationIndex, threshold: float = 0.5) -> dict[str, Any]:
    """VOC's mean average precision by both of its rules.

    Args:
        results: what was found on its images.
        index: the ground truth.
        threshold: the least IoU of a right detection with its object.

    Returns:
        "mAP": means of the area under the precision-recall curve (VOC 2010 and later); "mAP07": of the precision at
        eleven recalls (2007 to 2009); "per_class", "per_class_07": the same of each class, None where no object that
        is not difficult exists. Means are over the other classes; None where there are none.
    """
    curves: list[tuple[np.ndarray, np.ndarray] | None] = []
    best, overlaps = _best_objects(results, index)
    for label in range(len(index.class_names)):
        count = int((~index.difficult[index.labels == label]).sum())
        rows = np.flatnonzero(results.labels == label)
        rows = rows[np.argsort(-results.scores[rows], kind="stable")]
        right, wrong = _right_and_wrong(best[rows], overlaps[rows] >= threshold, index.difficult)
        found = np.cumsum(right)
        curves.append((found / count, found / np.maximum(found + np.cumsum(wrong), 1)) if count else None)
    per_class, per_class_07 = (
        {name: None if curve is None else rule(*curve) for name, curve in zip(index.class_names, curves, strict=True)}
        for rule in (_area, _eleven_points)
    )
    means = {"mAP": _mean(per_class), "mAP07": _mean(per_class_07)}
    return means | {"per_class": per_class, "per_class_07": per_class_07}


def _right_and_wrong(best: np.ndarray, near: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of one class are right and which are wrong, both bool (D,).

    Args:
        best: (D,) the object of each detection, best score first.
        near: (D,) bool, it overlaps that object enough.
        difficult: (B,) bool.
    """
    skipped = near.copy()
    skipped[near] = difficult[best[near]]
    candidates = np.flatnonzero(near & ~skipped)
    _, first = np.unique(best[candidates], return_index=True)
    right = np.zeros(len(best), dtype=bool)
    right[candidates[first]] = True
    return right, ~right & ~skipped


def _best_objects(results: Results, index: AnnotationIndex) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the object of its image and class that it overlaps most (-1: none) and that IoU, (D,) each."""
    best, overlaps = np.full(len(results), -1), np.zeros(len(results))
    boxes, objects = corners(results.boxes), index.corners
    by_image = np.argsort(results.images, kind="stable")
    ends = np.searchsorted(results.images[by_image], np.arange(len(index) + 1))
    for i in np.unique(results.images).tolist():
        own, found = slice(*index.offsets[i : i + 2]), by_image[ends[i] : ends[i + 1]]
        same = results.labels[found, None] == index.labels[own]
        if same.any():
            iou = np.where(same, box_iou(boxes[found], objects[own]), -1.0)
            overlaps[found] = iou.max(axis=1).clip(min=0)
            # Where overlaps are equal, the first object in the file wins.
            best[found] = np.where(same.any(axis=1), own.start + iou.argmax(axis=1), -1)
    return best, overlaps


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve after each precision is raised to the best at the same or a higher recall."""
    raised = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * raised).sum())


def _eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the best precision at recalls of 0, 0.1 ... 1 or more."""
    return float(np.mean([precision[recall >= point].max(initial=0.0) for point in np.arange(11) / 10]))


def _mean(values: dict[str, float | None]) -> float | None:
    present = [value for value in values.values() if value is not None]
    return float(np.mean(present)) if present else None
