"""Several looks at one image, and how what they find becomes one result: tiles, and the mirror image.

Chosen by this project, all of it: the papers look once. Boxes are xyxy in pixels of the original image unless a word
says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detector.data.boxes import box_area, box_iou, intersection
from detector.errors import InputError
from detector.inference.detections import Found

# IoU from which two looks show the same object: COCO's loosest match.
SAME_IOU = 0.5
# A side this near to the seam, in shares of the tile's, is cut by it: boxes are not exact.
MARGIN = 0.02
# A cut box goes if a whole one holds this share of it ...
COVERED = 0.7
# ... and is at least this many times as sure: noise must not remove what was found.
SURE = 0.5


class Tiling(NamedTuple):
    """Tiles of width x height original pixels that overlap their neighbours by `overlap` pixels or more.

    The overlap should be as large as the objects that only a tile is near enough to find.
    """

    width: int
    height: int
    overlap: int

    @classmethod
    def parse(cls, value: Sequence[int]) -> Tiling:
        """From (width, height, overlap). Raises InputError if that is not what it is, or tiles would not move on."""
        numbers = list(value) if isinstance(value, (list, tuple)) else []
        whole = len(numbers) == 3 and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not whole or not 0 <= numbers[2] < min(numbers[:2]):
            raise InputError(
                f"tile={value}; expected (width, height, overlap) in whole pixels of the image, the overlap smaller "
                f"than both sides."
            )
        return cls(*numbers)

    def regions(self, height: int, width: int) -> np.ndarray:
        """The tiles (T, 4) of an image, xyxy, row by row, all inside it; none if one tile would hold it all."""
        columns = _starts(width, self.width, self.overlap)
        rows = _starts(height, self.height, self.overlap)
        if len(columns) == len(rows) == 1:
            return np.zeros((0, 4), np.int64)
        ends = np.array([width, height])
        return np.array([(x, y, *np.minimum((x + self.width, y + self.height), ends)) for y in rows for x in columns])


def merge_tiles(found: Sequence[Found], regions: np.ndarray, size: tuple[int, int]) -> Found:
    """One result from what each tile and the whole image show, class by class.

    1. A box that ends at a seam (within MARGIN of a side of its tile that is no side of the image) is cut; the
       others are whole. The image's own pass cuts nothing.
    2. Non-maximum suppression between the looks: best first, a whole box goes if another look has a better one with
       IoU > SAME_IOU. Boxes of one look do not suppress each other: the network has done that by its own threshold.
    3. A cut box goes if a whole box that stays, SURE times its score or more, holds COVERED of it.
    4. What is left was shown whole by no look. Two cut boxes are halves of one object if, inside the part that both
       tiles show, their IoU > SAME_IOU: they become the box around both, with the better score. Between these and the
       whole ones, the better of two with IoU > SAME_IOU stays.

    Args:
        found: of each look, boxes in pixels of the original image.
        regions: (T, 4), the xyxy that each look saw.
        size: height and width of the image.
    """
    every = Found.join(found)
    order = np.argsort(-every.scores, kind="stable")
    look = np.repeat(np.arange(len(found)), [len(one) for one in found])[order]
    every = every.where(order)
    cut = _is_cut(every.boxes, regions[look], size)
    kept: list[Found] = []
    for label in np.unique(every.labels):
        same = every.labels == label
        boxes, scores = _merge_class(every.boxes[same], every.scores[same], look[same], cut[same], regions)
        kept.append(Found(boxes, scores, np.full(len(scores), label, every.labels.dtype)))
    return _ranked(Found.join(kept)) if kept else every


def mirror_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes of an image's mirror image (left for right) in the image, or the other way round."""
    return np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1)


def merge_flipped(straight: Found, mirrored: Found) -> Found:
    """One result from an image and its mirror image, whose boxes are already turned back.

    Best first, class by class, each box of one look takes the free box of the other with the largest IoU, at least
    SAME_IOU. The pair becomes the mean of both boxes, weighted by their scores, with the mean of both scores; a box
    without partner stays where it is, with half its score: the other look gives it 0. Nothing is suppressed.
    """
    both = Found.join((straight, mirrored))
    boxes, scores, labels = both.boxes, both.scores, both.labels
    look = np.repeat((0, 1), (len(straight), len(mirrored)))
    same = box_iou(boxes, boxes)
    same[(labels[:, None] != labels) | (look[:, None] == look)] = 0
    free = np.ones(len(scores), bool)
    merged = []
    for place in np.argsort(-scores, kind="stable"):
        if not free[place]:
            continue
        partner = int(np.argmax(same[place] * free))
        members = [place, partner] if same[place, partner] * free[partner] >= SAME_IOU else [place]
        free[members] = False
        weights = np.maximum(scores[members], 1e-9).astype(np.float64)
        box = np.average(boxes[members].astype(np.float64), axis=0, weights=weights)
        merged.append((box, scores[members].sum() / 2, labels[place]))
    return _ranked(Found(*map(np.array, zip(*merged, strict=True)))) if merged else straight


def _merge_class(
    boxes: np.ndarray, scores: np.ndarray, look: np.ndarray, cut: np.ndarray, regions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Steps 2 to 4 of `merge_tiles` for the boxes of one class, best first."""
    whole, sure = boxes[~cut], scores[~cut]
    stays = _suppress(whole, look[~cut])
    whole, sure = whole[stays], sure[stays]
    pieces, hopes, seen = boxes[cut], scores[cut], regions[look[cut]]
    held = intersection(pieces, whole) >= COVERED * np.maximum(box_area(pieces), 1e-9)[:, None]
    alone = ~(held & (sure >= SURE * hopes[:, None])).any(axis=1)
    joined, best = _join(pieces[alone], hopes[alone], seen[alone])
    boxes, scores = np.concatenate((whole, joined)), np.concatenate((sure, best))
    order = np.argsort(-scores, kind="stable")
    joined_last = np.repeat((0, 1), (len(whole), len(joined)))[order]
    stays = _suppress(boxes[order], joined_last)
    return boxes[order][stays], scores[order][stays]


def _suppress(boxes: np.ndarray, look: np.ndarray) -> np.ndarray:
    """Which boxes (D,), best first, no better one of another look shows too."""
    stays = np.ones(len(boxes), bool)
    for place in range(len(boxes)):
        if stays[place]:
            same = box_iou(boxes[place : place + 1], boxes[place + 1 :])[0] > SAME_IOU
            stays[place + 1 :] &= ~(same & (look[place + 1 :] != look[place]))
    return stays


def _join(boxes: np.ndarray, scores: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the pieces (D, 4) of objects together; `seen` (D, 4) is the tile of each."""
    group = np.arange(len(boxes))
    for place in range(len(boxes)):
        common = _clip(seen, seen[place])
        piece, pieces = _clip(boxes[place], common), _clip(boxes, common)
        shared = box_area(_clip(piece, pieces))
        iou = shared / np.maximum(box_area(piece) + box_area(pieces) - shared, 1e-9)
        partner = (iou > SAME_IOU) & (seen != seen[place]).any(axis=1)
        group[np.isin(group, group[partner])] = group[place]
    members = [group == value for value in np.unique(group)]
    around = [np.concatenate((boxes[one, :2].min(axis=0), boxes[one, 2:].max(axis=0))) for one in members]
    return np.array(around).reshape(-1, 4), np.array([scores[one].max() for one in members])


def _is_cut(boxes: np.ndarray, seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which boxes (D,) end at a side of their tile (D, 4) that is no side of the image."""
    image = np.array([0, 0, size[1], size[0]])
    margin = MARGIN * np.tile(seen[:, 2:] - seen[:, :2], 2)
    return ((np.abs(boxes - seen) <= margin) & (seen != image)).any(axis=1)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles along a side begin: spread evenly, the last ends with the side."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]  # rounded down: no overlap gets too small


def _clip(boxes: np.ndarray, to: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes[..., :2], to[..., :2]), np.minimum(boxes[..., 2:], to[..., 2:])
    return np.concatenate((low, np.maximum(low, high)), axis=-1)


def _ranked(found: Found) -> Found:
    found = found.where(np.argsort(-found.scores, kind="stable"))
    return Found(found.boxes.astype(np.float32), found.scores.astype(np.float32), found.labels)
