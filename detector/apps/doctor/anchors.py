"""The data doctor's check of anchors: how many objects they do not come near, and which would fit better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from detector.apps.doctor.annotations import input_scales
from detector.data.annotations import AnnotationIndex
from detector.data.finding import INFO, WARNING, Finding
from detector.data.preprocess import STRIDE, Preprocessing
from detector.models.anchor_fit import POOR_IOU, best_anchor_iou, coverage, propose

# More than this share of objects that no anchor comes near is worth a warning. Chosen by this project.
POOR_SHARE = 0.10


def boxes_at_input(
    index: AnnotationIndex, sizes: np.ndarray, preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """The objects of a split as the network meets them without augmentation.

    Returns:
        Boxes (B, 4) xyxy in pixels of the network input, and the canvas (B, 2), height and width, of each.
    """
    size = sizes[index.images]
    scale = input_scales(size, preprocessing)
    corners = np.concatenate((index.xywh[:, :2], index.xywh[:, :2] + index.xywh[:, 2:]), axis=1)
    corners = corners.clip(0, size[:, [1, 0, 1, 0]]) * scale
    canvas = -(-np.rint(size * scale).astype(np.int64) // STRIDE) * STRIDE
    good = (corners[:, 2:] > corners[:, :2]).all(axis=1) & ~index.crowd
    return corners[good], canvas[good]


def check_anchors(
    boxes: np.ndarray,
    canvas: np.ndarray,
    *,
    scales: Sequence[float],
    ratios: Sequence[float],
    stride: int,
    foreground_iou: float,
) -> list[Finding]:
    """How well anchors cover objects (B, 4) on canvases (B, 2); see `best_anchor_iou`."""
    if not len(boxes):
        return []
    before = coverage(best_anchor_iou(boxes, canvas, scales, ratios, stride), foreground_iou)
    new_scales, new_ratios = propose(boxes, canvas, scales, ratios, stride)
    after = coverage(best_anchor_iou(boxes, canvas, new_scales, new_ratios, stride), foreground_iou)
    override = f"'rpn.scales=[{_join(new_scales)}]' 'rpn.ratios=[{_join(new_ratios)}]'"
    same = new_scales == [float(s) for s in scales] and new_ratios == [float(r) for r in ratios]
    poor = before["share_below_0.5"] > POOR_SHARE
    lines = [_line("these anchors", before)]
    remedy = ""
    if not same:
        lines.append(_line(override, after))
        remedy = f"{'' if poor else 'if proposals miss objects: '}{override} (a new network: weights of the RPN differ)"
    elif poor:
        remedy = "no better scales and ratios were found: raise input.short_side and input.long_side"
    return [
        Finding(
            "anchor_coverage", WARNING if poor else INFO, round(before["share_below_0.5"] * len(boxes)),
            f"objects whose best anchor has an IoU below {POOR_IOU} at the training input", tuple(lines), remedy,
            figures={
                "objects": len(boxes), "scales": list(scales), "ratios": list(ratios), "before": before,
                "proposed_scales": new_scales, "proposed_ratios": new_ratios, "after": after, "override": override,
            },
        )
    ]  # fmt: skip


def _line(name: str, figures: dict[str, Any]) -> str:
    return (
        f"{name}: mean IoU {figures['mean_iou']:.3f}, below {POOR_IOU}: {figures['share_below_0.5']:.1%}, below the "
        f"foreground threshold: {figures['share_below_foreground_iou']:.1%}"
    )


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
