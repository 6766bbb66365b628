"""Geometry of boxes: xyxy, float32, absolute pixels; widths are x2 - x1. Any number of leading dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(dw) may enlarge an anchor at most this much: an untrained network must not overflow.
MAX_LOG_RATIO = math.log(1000 / 16)


def box_area(boxes: Tensor) -> Tensor:
    """Area (...) of boxes (..., 4) in square pixels; 0 where a box is reversed."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    width = torch.minimum(a[..., :, None, 2], b[..., None, :, 2]) - torch.maximum(
        a[..., :, None, 0], b[..., None, :, 0]
    )
    height = torch.minimum(a[..., :, None, 3], b[..., None, :, 3]) - torch.maximum(
        a[..., :, None, 1], b[..., None, :, 1]
    )
    return width.clamp(min=0) * height.clamp(min=0)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (..., A, B) of boxes a (..., A, 4) with boxes b (..., B, 4) of the same image.

    Two empty boxes have IoU 0.

    >>> pairwise_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    tensor([[0.3333]])
    """
    intersection = _intersection(a, b)
    union = box_area(a)[..., :, None] + box_area(b)[..., None, :] - intersection
    return intersection / union.clamp(min=1e-6)


def pairwise_coverage(a: Tensor, b: Tensor) -> Tensor:
    """Share (..., A, B) of each box of a (..., A, 4) inside each box of b (..., B, 4): COCO's crowd overlap."""
    return _intersection(a, b) / box_area(a)[..., :, None].clamp(min=1e-6)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets (dx, dy, dw, dh) that move anchors (..., 4) onto boxes (..., 4).

    dx, dy in units of the anchor's width and height, dw, dh natural-log ratios. Sides below 1e-3 px count as that.

    Source: Girshick et al. 2014 (R-CNN), appendix C.
    """
    size = (anchors[..., 2:] - anchors[..., :2]).clamp(min=1e-3)
    target_size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    shift = (boxes[..., :2] + boxes[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / (2 * size)
    return torch.cat((shift, (target_size / size).log()), dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Move and scale anchors (..., 4) by offsets (..., 4): the inverse of encode_boxes. Not clipped to any image.

    Source: Girshick et al. 2014 (R-CNN), appendix C; dw, dh clamped to MAX_LOG_RATIO as in torchvision.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=MAX_LOG_RATIO).exp() / 2
    return torch.cat((center - half, center + half), dim=-1)


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clip boxes (N, P, 4) to their images.

    Args:
        image_sizes: (N, 2), height and width.

    >>> clip_boxes(torch.tensor([[[-3.0, 2.0, 50.0, 8.0]]]), torch.tensor([[10, 40]]))
    tensor([[[ 0.,  2., 40.,  8.]]])
    """
    limits = image_sizes.flip(-1).to(boxes.dtype).repeat(1, 2)[:, None]  # (N, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limits)
