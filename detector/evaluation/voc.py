"""Average precision as Pascal VOC defines it: one IoU threshold, 0.5.

Everingham et al. 2010 (The Pascal Visual Object Classes Challenge), sections 3.4 and 4.2, and the development kit's
VOCevaldet. A detection belongs to the object of its class that it overlaps most, whether or not that one is taken:
the first detection of an object is right, later ones are wrong; one whose object is difficult does not count. COCO
would let a later detection have the second-best object.

Ours: boxes are continuous, as everywhere here. The development kit's boxes name the first and last pixel, and it
adds 1 to each extent; a file converted as x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1, height = ymax - ymin
+ 1 gives the same overlaps here. The eleven recalls are the decimals 0, 0.1 ... 1: three of ten objects reach 0.3,
which repeated addition of 0.1 in floating point misses. There is no limit of detections an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from detector.evaluation.columns import Found, GroundTruth

# Pairs of a detection and an object that are compared at once; bounds the memory (some 100 bytes each).
_PAIRS = 1_000_000


def score_voc(truth: GroundTruth, found: Found, threshold: float = 0.5) -> dict[str, Any]:
    """VOC's mean average precision by both of its rules.

    Returns:
        "mAP": means of the area under the precision-recall curve (VOC 2010 and later); "mAP07": of the precision at
        eleven recalls (2007 to 2009); "per_class", "per_class_07": the same of each class, None where no object that
        is not difficult exists. Means are over the other classes; None where there are none.
    """
    per_class: dict[str, float | None] = {}
    per_class_07: dict[str, float | None] = {}
    best, overlaps = _best_objects(truth, found)
    for label, name in enumerate(truth.class_names):
        count = int((~truth.difficult[truth.classes == label]).sum())
        rows = np.flatnonzero(found.classes == label)
        rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        right, wrong = _judge(best[rows], overlaps[rows] >= threshold, truth.difficult)
        recall = np.cumsum(right) / max(count, 1)
        precision = np.cumsum(right) / np.maximum(np.cumsum(right) + np.cumsum(wrong), 1)
        per_class[name] = _area(recall, precision) if count else None
        per_class_07[name] = _eleven_points(recall, precision) if count else None
    return {
        "mAP": _mean(per_class),
        "mAP07": _mean(per_class_07),
        "per_class": per_class,
        "per_class_07": per_class_07,
    }


def _judge(best: np.ndarray, near: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _best_objects(truth: GroundTruth, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the object of its image and class that it overlaps most (-1: none) and that IoU, (D,) each."""
    cells = truth.images * len(truth.class_names) + truth.classes
    order = np.argsort(cells, kind="stable")  # of equal overlaps the first in the file wins
    wanted = found.images * len(truth.class_names) + found.classes
    start = np.searchsorted(cells[order], wanted, side="left")
    counts = np.searchsorted(cells[order], wanted, side="right") - start
    best, overlaps = np.full(len(wanted), -1), np.zeros(len(wanted))
    rows = np.flatnonzero(counts)
    for part in np.split(rows, _cuts(counts[rows])):
        if len(part) == 0:
            continue
        first = np.cumsum(counts[part]) - counts[part]  # where each detection's pairs begin
        detections = np.repeat(part, counts[part])
        within = np.arange(len(detections)) - np.repeat(first, counts[part])
        objects = order[np.repeat(start[part], counts[part]) + within]
        iou = _iou(found.boxes[detections], truth.boxes[objects])
        overlaps[part] = np.maximum.reduceat(iou, first)
        places = np.where(iou == np.repeat(overlaps[part], counts[part]), within, len(truth.boxes))
        best[part] = objects[first + np.minimum.reduceat(places, first)]
    return best, overlaps


def _cuts(counts: np.ndarray) -> np.ndarray:
    """Where to split detections so that a part has about _PAIRS pairs, and at least one detection."""
    block = np.cumsum(counts) // _PAIRS
    return np.flatnonzero(np.diff(block)) + 1


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(P,) intersection over union of xywh boxes (P, 4) with their partners; 0 where both are empty."""
    ends = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    inside = np.clip(ends - np.maximum(boxes[:, :2], others[:, :2]), 0, None).prod(axis=1)
    union = boxes[:, 2:].prod(axis=1) + others[:, 2:].prod(axis=1) - inside
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)


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
