"""Do anchors fit objects? The best IoU of each box with any anchor, and scales and ratios that fit better.

No grid is needed for it: the overlap along each axis falls with the distance of the centres, so the nearest cell's
anchor of a shape is its best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from detector.models.anchors import anchor_sizes

# Below this IoU regression starts from a box that hardly shows the object. Chosen by this project.
POOR_IOU = 0.5
_FITTED = 5000  # boxes that a proposal is fitted to
_GAIN = 0.005  # mean IoU that others must be better by: half a per cent is nobody's concern

_Anchors = tuple[list[float], list[float]]  # scales and ratios


def best_anchor_iou(
    boxes: np.ndarray, canvas: np.ndarray, scales: Sequence[float], ratios: Sequence[float], stride: int
) -> np.ndarray:
    """The highest IoU of each box with an anchor of the grid, (B,).

    Args:
        boxes: (B, 4) xyxy in pixels of the input.
        canvas: (B, 2) height and width of the padded input.
        scales, ratios, stride: see AnchorGrid.
    """
    shapes = np.array(anchor_sizes(scales, ratios))
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
    """Numbers about best IoUs (B,): mean, shares that are low, and a histogram in tenths."""
    return {
        "mean_iou": float(iou.mean()),
        "share_below_0.5": float((iou < POOR_IOU).mean()),
        "share_below_foreground_iou": float((iou < foreground_iou).mean()),
        "histogram": np.histogram(iou, bins=10, range=(0, 1))[0].tolist(),
    }


def propose(
    boxes: np.ndarray, canvas: np.ndarray, scales: Sequence[float], ratios: Sequence[float], stride: int
) -> _Anchors:
    """As many scales and ratios, or fewer, of a higher mean best IoU; the given ones where none is found.

    Centres of clusters and quantiles of log size and log ratio are tried, then each number is moved while that helps.
    """
    chosen = np.random.default_rng(0).permutation(len(boxes))[:_FITTED]
    boxes, canvas = boxes[chosen], canvas[chosen]

    def score(candidate: _Anchors) -> float:
        return float(best_anchor_iou(boxes, canvas, *candidate, stride).mean())

    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    sizes, shapes = np.log(width * height) / 2, np.log(height / width)
    best = ([float(s) for s in scales], [float(r) for r in ratios])
    starts = [(s, r) for s in _summaries(sizes, len(scales)) for r in _summaries(shapes, len(ratios))]
    start = max((best, *(_rounded(s, r) for s, r in starts)), key=score)
    refined = _refined(start, score)
    return refined if score(refined) > score(best) + _GAIN else best


def _summaries(values: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Quantiles of values, and the centres of k-means (Lloyd's) that starts from them."""
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    yield centres
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres).argmin(axis=1)
        centres = np.array([values[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centres)])
    yield centres


def _rounded(log_sizes: np.ndarray, log_ratios: np.ndarray) -> _Anchors:
    """As one would type them, without repetitions."""
    scales = {float(max(1, round(value))) for value in np.exp(log_sizes).tolist()}
    ratios = {float(f"{value:.2g}") for value in np.exp(log_ratios).tolist()}
    return sorted(scales), sorted(ratios)


def _refined(start: _Anchors, score: Callable[[_Anchors], float]) -> _Anchors:
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
