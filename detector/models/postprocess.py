"""From scored boxes to the few that are kept, for proposals and for final detections, in torch and in exports.

Shapes are static: what is not kept is masked, not removed, so that a GPU is not waited for and the same code can be
exported. The one step that no basic operator can do, greedy suppression, is handed in as a function (`Suppress`),
because torch and ONNX have different ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from detector.models.nms import nms

# boxes (N, P, B, 4), scores (N, P, C), IoU threshold, limit -> bool (N, P, C): what greedy suppression keeps of each
# image and class, best first, of the boxes with a score above 0; where B = 1 all classes share the box. Of an image's
# best `limit` none may be missing; what lies past them may be marked or not.
Suppress: TypeAlias = Callable[[Tensor, Tensor, float, int], Tensor]
# A box with a side below this, in pixels, is empty: it can never be right, and has no IoU with its own copies.
MIN_SIDE = 1e-2
# Candidates per final box that suppression looks at in one go: most images need no more. Chosen by this project: of an
# untrained network's thousands, all at once would take longer than the network.
CANDIDATES_PER_BOX = 4


@dataclass(frozen=True)
class FixedDetections:
    """What is found in each of N images, best first, in D places; those past the count hold zeros and label -1.

    Attributes:
        boxes: (N, D, 4) xyxy in pixels of the padded input, inside the image.
        scores: (N, D) in [0, 1].
        labels: (N, D) int64.
        counts: (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor

    def per_image(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (d, 4), scores (d,) and labels (d,) of each image, d its count."""
        counts = self.counts.tolist()
        return [
            (boxes[:count], scores[:count], labels[:count])
            for boxes, scores, labels, count in zip(self.boxes, self.scores, self.labels, counts, strict=True)
        ]


def is_empty(boxes: Tensor) -> Tensor:
    """Which boxes (..., 4) have a side below MIN_SIDE: (...)."""
    return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) < MIN_SIDE


def keep_best(
    boxes: Tensor, scores: Tensor, nms_threshold: float, count: int, suppress: Suppress
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of each image that non-maximum suppression by class leaves.

    Args:
        boxes: (N, P, B, 4), B = 1, shared by all classes, or C.
        scores: (N, P, C), above 0 where the box takes part.
        nms_threshold: IoU above which the worse of two boxes of a class goes.
        count: boxes per image at most.
        suppress: how boxes are suppressed.

    Returns:
        boxes (N, D, 4), scores (N, D) and index (N, D) into the P * C candidates, best first; D = min(count, P * C).
        Where fewer are left: zeros, and no meaning of the index.
    """
    per_box, classes = boxes.shape[2], scores.shape[2]
    kept = suppress(boxes, scores, nms_threshold, count)
    candidates = torch.where(kept, scores, 0.0).flatten(1)
    best, index = candidates.topk(min(count, candidates.shape[1]), dim=1)
    place = index if per_box == classes else torch.div(index, classes, rounding_mode="floor")
    chosen = boxes.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, 4))
    return chosen * (best > 0)[..., None], best, index


def suppress_eagerly(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """`Suppress` image by image with torchvision's operator, no longer than it takes to have the best `limit`."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    # A trained network has some tens of candidates an image, an untrained one P * C. One wait for all images.
    totals = (scores > 0).sum(dim=(1, 2)).tolist()
    choose = _survivors_of_one_class if scores.shape[2] == 1 else _best_survivors
    for mask, image_boxes, image_scores, total in zip(kept, boxes, scores, totals, strict=True):
        mask.view(-1)[choose(image_boxes, image_scores, threshold, limit, total)] = True
    return kept


def _survivors_of_one_class(boxes: Tensor, scores: Tensor, threshold: float, _: int, total: int) -> Tensor:
    """Which boxes (P, 1, 4) survive; those without a score may be among them."""
    boxes, scores = boxes[:, 0], scores[:, 0]
    if 2 * total >= len(scores):  # proposals: choosing would take longer than it saves
        return nms(boxes, scores, threshold)
    order = scores.topk(total).indices
    return order[nms(boxes[order], scores[order], threshold)]


def _best_survivors(boxes: Tensor, scores: Tensor, threshold: float, limit: int, total: int) -> Tensor:
    """Which of an image's candidates, of which `total` have a score, are its best `limit`, as indices into P * C.

    Only what was kept suppresses, so the best few decide by themselves if enough of them survive; if not, the next few
    join the survivors.
    """
    few, classes = CANDIDATES_PER_BOX * limit, scores.shape[1]
    per_place = classes // boxes.shape[1]
    scores, boxes = scores.reshape(-1), boxes.flatten(0, 1)

    def survivors(order: Tensor) -> Tensor:
        kept = order[:0]
        for start in range(0, len(order), few):
            index = torch.cat((kept, order[start : start + few]))
            chosen = boxes[index // per_place], scores[index], index % classes
            kept = index[suppress_by_class(*chosen, threshold)]
            if len(kept) >= limit:
                break
        return kept[:limit]

    kept = survivors(scores.topk(min(few, total)).indices)
    if len(kept) < limit and few < total:
        kept = survivors(scores.topk(total).indices)
    return kept


def suppress_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Places (D,) of the boxes (M, 4) that survive NMS among those of their own label, best first.

    Classes are moved apart, as torchvision's batched_nms does, but in float64, where the move costs no precision.
    """
    if boxes.device.type != "mps":  # which has no float64
        boxes, scores = boxes.double(), scores.double()
    return nms(boxes + (labels * (boxes.amax() + 1))[:, None], scores, threshold)
