"""What became of every detection and every object at IoU 0.5: found, or wrong in which way.

The kinds are those of TIDE (Bolya et al. 2020, section 2.2) with the thresholds and the order of its released code
(dbolya/tide, tidecv/quantify.py); the matching is COCO's, so that the correct ones are those that AP50 counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detector.data.boxes import box_iou, corners
from detector.evaluation.records import Records

FOREGROUND, BACKGROUND = 0.5, 0.1
# Kinds of detection. ignored: inside a crowd region of its class, which COCO does not count.
KINDS = ("correct", "ignored", "localisation", "classification", "duplicate", "background", "both")
CORRECT, IGNORED, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND_KIND, BOTH = range(len(KINDS))
WRONG = KINDS[2:]
# States of an object. mistaken: not found, but a localisation or classification error is about it; missed: neither.
STATES = ("found", "mistaken", "missed", "crowd")
FOUND, MISTAKEN, MISSED, CROWD = range(len(STATES))


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Per detection of `records`, in its order.

    Attributes:
        records: what was judged.
        kind: (D,) int64 index into KINDS.
        about: (D,) int64, the object (row of the index) that the detection found, or is wrong about; -1 for ignored
            and background.
        iou: (D,) float64, with that object; 0 without one.
    """

    records: Records
    kind: np.ndarray
    about: np.ndarray
    iou: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """Which detections COCO counts, (D,) bool."""
        return self.kind != IGNORED

    @property
    def wrong(self) -> np.ndarray:
        """Which of them are errors, (D,) bool."""
        return self.counted & (self.kind != CORRECT)

    def states(self, score_threshold: float = 0.0) -> np.ndarray:
        """What became of each object, (G,) int64 index into STATES, by the detections of at least this score."""
        above = self.records.results.scores >= score_threshold
        states = np.full(len(self.records.index.crowd), MISSED)
        states[self.about[above & ((self.kind == LOCALISATION) | (self.kind == CLASSIFICATION))]] = MISTAKEN
        states[self.about[above & (self.kind == CORRECT)]] = FOUND
        states[self.records.index.crowd] = CROWD
        return states


def judge(records: Records) -> Outcomes:
    """Match as COCO does at IoU 0.5, then name each error.

    A detection that matched nothing is, in this order: localisation (IoU 0.1 to 0.5 with an object of its class at
    best), classification (0.5 with one of another class), duplicate (0.5 with one of its class that a better
    detection has), background (at most 0.1 with anything), both (the rest). Crowd regions are no objects here.
    """
    kind = np.full(len(records.results), BACKGROUND_KIND)
    about = np.full(len(records.results), -1)
    iou = np.zeros(len(records.results))
    annotated, boxes = records.index.corners, corners(records.results.boxes)
    for objects, found in records.per_image():
        if objects.start == objects.stop or found.start == found.stop:
            continue
        kind[found], index, iou[found] = _judge_image(
            box_iou(boxes[found], annotated[objects], records.index.crowd[objects]),
            records.results.labels[found, None] == records.index.labels[objects],
            records.index.crowd[objects],
        )
        about[found] = np.where(index >= 0, index + objects.start, -1)
    return Outcomes(records, kind, about, iou)


def _judge_image(iou: np.ndarray, same: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kind, object and IoU (D,) each, of the detections of one image, best first; IoU (D, G), same class (D, G)."""
    matched = _match(np.where(same & ~crowd, iou, 0.0))
    own, other = np.where(same & ~crowd, iou, 0.0), np.where(same | crowd, 0.0, iou)
    best_own, best_other = own.max(axis=1), other.max(axis=1)
    choices = (
        (matched >= 0, CORRECT, matched),
        ((np.where(same & crowd, iou, 0.0) >= FOREGROUND).any(axis=1), IGNORED, -1),
        ((best_own >= BACKGROUND) & (best_own <= FOREGROUND), LOCALISATION, own.argmax(axis=1)),
        (best_other >= FOREGROUND, CLASSIFICATION, other.argmax(axis=1)),
        (best_own >= FOREGROUND, DUPLICATE, own.argmax(axis=1)),
        (best_other <= BACKGROUND, BACKGROUND_KIND, -1),
    )
    conditions = [condition for condition, _, _ in choices]
    kind = np.select(conditions, [kind for _, kind, _ in choices], BOTH)
    about = np.select(conditions, [place for _, _, place in choices], other.argmax(axis=1))
    return kind, about, np.where(about >= 0, iou[np.arange(len(iou)), about], 0.0)


def _match(iou: np.ndarray) -> np.ndarray:
    """COCO's greedy matching: the object (D,) of each detection, best first, or -1. IoU (D, G), 0 where none may be."""
    matched = np.full(len(iou), -1)
    free = iou.copy()
    for row in np.flatnonzero((iou >= FOREGROUND).any(axis=1)):
        best = free.shape[1] - 1 - free[row, ::-1].argmax()  # of equal ones the last, as in pycocotools
        if free[row, best] >= FOREGROUND:
            matched[row] = best
            free[:, best] = 0.0
    return matched
