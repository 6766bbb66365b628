"""Which ground-truth box an anchor or a RoI answers for, for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detector.models.boxes import pairwise_coverage, pairwise_iou

if TYPE_CHECKING:
    from detector.data.collate import Batch


@dataclass(frozen=True)
class Matches:
    """The outcome for M boxes (anchors or RoIs) of each of N images.

    Attributes:
        index: (N, M) int64, the ground-truth box of highest IoU; meaningful where foreground.
        foreground: (N, M) bool.
        background: (N, M) bool; what is neither is ignored.
    """

    index: Tensor
    foreground: Tensor
    background: Tensor


def match(
    boxes: Tensor,
    batch: Batch,
    *,
    foreground_iou: float,
    background_iou: float,
    best_is_foreground: bool,
    among: Tensor | None = None,
) -> Matches:
    """Match boxes to ground truth by IoU (Ren et al. 2015, section 3.1.2).

    Args:
        boxes: (M, 4) or (N, M, 4), xyxy in the frame of the ground truth.
        batch: its boxes (N, G, 4), of which padded places have label -1; a crowd matches nothing, and a box half inside
            one is not background.
        foreground_iou: at or above: foreground.
        background_iou: below: background. In between: ignored.
        best_is_foreground: the boxes of highest IoU with an object are foreground however low it is.
        among: (N, M), the boxes that take part; the others are ignored.
    """
    crowd = batch.crowd
    real = (batch.labels >= 0) & ~crowd
    iou = pairwise_iou(boxes, batch.boxes).masked_fill(~real[:, None], -1.0)  # (N, M, G)
    if among is not None:
        iou = iou.masked_fill(~among[..., None], -1.0)
    best, index = iou.max(dim=2)
    foreground = best >= foreground_iou
    if best_is_foreground:
        best_of_gt = iou.amax(dim=1, keepdim=True)
        foreground |= ((iou == best_of_gt) & (best_of_gt > 0)).any(dim=2)
    background = (best < background_iou) & ~foreground
    if among is not None:
        background &= among
    # On a CPU it costs nothing to ask; a GPU would have to be waited for.
    if crowd.device.type != "cpu" or crowd.any():
        inside = pairwise_coverage(boxes, batch.boxes).masked_fill(~crowd[:, None], 0.0).amax(dim=2)
        background &= inside < 0.5
    return Matches(index, foreground, background)


def gather_boxes(gt_boxes: Tensor, index: Tensor) -> Tensor:
    """The boxes (N, M, 4) that index (N, M) picks from gt_boxes (N, G, 4)."""
    return gt_boxes.gather(1, index[..., None].expand(*index.shape, 4))


def sample(matches: Matches, *, count: int, foreground_share: float) -> tuple[Tensor, Tensor]:
    """Draw at most `count` of the M boxes per image, at most `foreground_share` of them foreground, then background.

    Returns:
        foreground and background masks (N, M), disjoint. Source: Ren et al. 2015, section 3.1.3.
    """
    foreground = _draw(matches.foreground, torch.full_like(matches.index[:, 0], round(count * foreground_share)), count)
    background = _draw(matches.background, count - foreground.sum(dim=1), count)
    return foreground, background


def _draw(candidates: Tensor, counts: Tensor, most: int) -> Tensor:
    """A random subset mask of candidates (N, M) with at most counts (N,) True per row; counts never exceed `most`."""
    keys = torch.rand(candidates.shape, device=candidates.device).masked_fill(~candidates, -1.0)
    values, index = keys.topk(min(most, keys.shape[1]), dim=1)
    rank = torch.arange(index.shape[1], device=index.device)
    chosen = (values >= 0) & (rank < counts[:, None])
    return torch.zeros_like(candidates).scatter_(1, index, chosen)
