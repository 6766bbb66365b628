"""Do the anchors fit the objects? The best IoU of each box with any anchor, and scales and ratios that fit better.

No grid is needed for it: the overlap along each axis falls with the distance of the centres, so the nearest cell's
anchor of a shape is its best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from detector.apps.doctor.annotations import _scales
from detector.apps.doctor.split import INFO, WARNING, Finding, Split, known_boxes
from detector.data.preprocess import STRIDE, Preprocessing

# Below this IoU regression starts from a box that hardly shows the object; more than this share of such objects is
# worth a warning. Source: ours.
POOR_IOU, POOR_SHARE = 0.5, 0.10
_FITTED = 5000  # boxes that a proposal is fitted to


def boxes_at_input(split: Split, sizes: np.ndarray, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """The objects of a split as the network meets them without augmentation.

    Returns:
        Boxes (B, 4) xyxy in pixels of the network input, and the canvas (B, 2), height and width, of each.
    """
    boxes = known_boxes(split)
    size = sizes[boxes.rows]
    scale = _scales(size, preprocessing)
    corners = np.concatenate((boxes.xywh[:, :2], boxes.xywh[:, :2] + boxes.xywh[:, 2:]), axis=1)
    limit = np.where(size > 0, size, 0)[:, [1, 0, 1, 0]]
    corners = corners.clip(0, limit) * scale
    canvas = -(-np.rint(size * scale).astype(np.int64) // STRIDE) * STRIDE
    good = (corners[:, 2:] > corners[:, :2]).all(axis=1) & ~boxes.crowd
    return corners[good], canvas[good]


def best_anchor_iou(
    boxes: np.ndarray, canvas: np.ndarray, scales: Sequence[float], ratios: Sequence[float], stride: int
) -> np.ndarray:
    """The highest IoU of each box with an anchor of the grid, (B,).

    Args:
        boxes: (B, 4) xyxy in pixels of the input.
        canvas: (B, 2) height and width of the padded input.
        scales, ratios, stride: as in detector.models.anchors.AnchorGrid.
    """
    shapes = np.array([(scale * ratio**-0.5, scale * ratio**0.5) for scale in scales for ratio in ratios])
    low, high = boxes[:, :2], boxes[:, 2:]
    last_cell = canvas[:, ::-1] // stride - 1
    centres = np.rint((low + high) / 2 / stride).clip(0, last_cell) * stride
    overlap = np.minimum(high[:, None], centres[:, None] + shapes / 2) - np.maximum(
        low[:, None], centres[:, None] - shapes / 2
    )
    inner = overlap.clip(min=0).prod(axis=2)  # (B, shapes)
    union = (high - low).prod(axis=1)[:, None] + shapes.prod(axis=1) - inner
    best: np.ndarray = (inner / union).max(axis=1)
    return best.clip(max=1.0)  # rounding would put a perfect fit outside the histogram


def coverage(iou: np.ndarray, foreground_iou: float) -> dict[str, Any]:
    """Figures of best IoUs (B,): mean, shares that are low, and a histogram in tenths."""
    return {
        "mean_iou": float(iou.mean()),
        "share_below_0.5": float((iou < POOR_IOU).mean()),
        "share_below_foreground_iou": float((iou < foreground_iou).mean()),
        "histogram": np.histogram(iou, bins=10, range=(0, 1))[0].tolist(),
    }


def propose(
    boxes: np.ndarray, canvas: np.ndarray, scales: Sequence[float], ratios: Sequence[float], stride: int
) -> tuple[list[float], list[float]]:
    """As many scales and ratios, or fewer, of a higher mean best IoU; the given ones where none is found.

    Centres of clusters and quantiles of log size and log ratio are tried, then each number is moved while that helps.
    """
    chosen = np.random.default_rng(0).permutation(len(boxes))[:_FITTED]
    boxes, canvas = boxes[chosen], canvas[chosen]

    def score(candidate: tuple[list[float], list[float]]) -> float:
        return float(best_anchor_iou(boxes, canvas, *candidate, stride).mean())

    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    sizes, shapes = np.log(width * height) / 2, np.log(height / width)
    best = ([float(s) for s in scales], [float(r) for r in ratios])
    starts = [(s, r) for s in _summaries(sizes, len(scales)) for r in _summaries(shapes, len(ratios))]
    start = max((best, *(_rounded(s, r) for s, r in starts)), key=score)
    refined = _refined(start, score)
    # The same numbers, unless others are clearly better: half a per cent of IoU is nobody's concern.
    return refined if score(refined) > score(best) + 0.005 else best


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


def _summaries(values: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Quantiles of values, and the centres of k-means (Lloyd's) that starts from them."""
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    yield centres
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres).argmin(axis=1)
        centres = np.array([values[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centres)])
    yield centres


def _rounded(log_sizes: np.ndarray, log_ratios: np.ndarray) -> tuple[list[float], list[float]]:
    """As one would type them, without repetitions."""
    scales = {float(max(1, round(value))) for value in np.exp(log_sizes).tolist()}
    ratios = {float(f"{value:.2g}") for value in np.exp(log_ratios).tolist()}
    return sorted(scales), sorted(ratios)


def _refined(start: tuple[list[float], list[float]], score: Any) -> tuple[list[float], list[float]]:
    """Move one number at a time by a step that becomes smaller, as long as the score rises."""
    best, best_score = start, score(start)
    for factor in (1.25, 1.1, 1.25, 1.1):
        for part in (0, 1):
            for place in range(len(best[part])):
                for step in (factor, 1 / factor):
                    moved = [np.log(numbers) for numbers in best]
                    if place < len(moved[part]):
                        moved[part][place] += np.log(step)
                        candidate = _rounded(*moved)
                        if (value := score(candidate)) > best_score:
                            best, best_score = candidate, value
    return best


def _join(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
