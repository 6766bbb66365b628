"""Geometry of boxes in numpy: xyxy, absolute pixels; widths are x2 - x1. `detector.models.boxes` is its like in torch.

No torch here: results are compared and merged where only a runtime of exports is installed.
"""

from __future__ import annotations

import numpy as np


def corners(xywh: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) xyxy of boxes (N, 4) xywh, as COCO writes them."""
    return np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Area (...) of boxes (..., 4) in square pixels, float64; 0 where a box is reversed."""
    area: np.ndarray = (boxes[..., 2:] - boxes[..., :2]).clip(0).astype(np.float64).prod(axis=-1)
    return area


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area (A, B) in square pixels, float64, that boxes a (A, 4) and b (B, 4) share."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(0).astype(np.float64).prod(axis=2)


def box_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union (A, B) of boxes a (A, 4) and b (B, 4), float64; 0 between empty ones.

    Args:
        a, b: xyxy in one frame.
        crowd: (B,) bool; with a crowd region the overlap is the share of the box of `a` that lies inside it (Lin et al.
            2014, COCO's evaluation code).

    >>> box_iou(np.array([[0, 0, 2, 2]]), np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), np.array([False, True])).round(4)
    array([[0.3333, 0.5   ]])
    """
    shared, area = intersection(a, b), box_area(a)[:, None]
    union = area + box_area(b) - shared
    if crowd is not None:
        union = np.where(crowd, area, union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (B, 4) inside their images (B, 2), height and width, where these are known (not 0); float32."""
    known = (sizes > 0).all(axis=1, keepdims=True)
    low, high = np.where(known, 0, -np.inf), np.where(known, sizes[:, [1, 0, 1, 0]], np.inf)
    return boxes.clip(low, high).astype(np.float32)
