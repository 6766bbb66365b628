"""The whole detector as one traceable graph: uint8 pixels to final boxes, static shapes, any batch and canvas.

Equal to `LightHeadRCNN.detect` up to rounding. Where that loops over images and keeps lists, this marks what is kept
and takes the best of it: every shape but batch, height and width is known beforehand. The one step that no basic
operator can do, greedy suppression, is a function of its own (`Keep`), because ONNX and torch have different ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from detector.models.boxes import clip_boxes, decode_boxes
from detector.models.light_head_rcnn import LightHeadRCNN

# boxes (M, P, 4), scores (M, C, P), IoU threshold, limit -> bool (M, C, P): what greedy suppression keeps of every row,
# best first, at most `limit`, of the boxes with a score above 0. What lies past the limit may be marked too.
Keep: TypeAlias = Callable[[Tensor, Tensor, float, int], Tensor]
# A side below this is an empty box, as in RPN.propose and LightHead.detect.
MIN_SIDE = 1e-2


class DetectionGraph(nn.Module):
    """A network as exports hold it.

    Args:
        network: in evaluation mode, its normalisation folded (`fuse`).
        keep: how boxes are suppressed.
        any_size: the canvas is not fixed, so there may be fewer anchors than `before_nms`; costs a little.
    """

    def __init__(self, network: LightHeadRCNN, keep: Keep, *, any_size: bool) -> None:
        super().__init__()
        self.network = network
        self.keep = keep
        self.any_size = any_size

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find objects.

        Args:
            images: uint8 RGB (N, H, W, 3), as pictures lie in memory.
            image_sizes: int64 (N, 2), height and width inside the padding.

        Returns:
            boxes (N, D, 4) xyxy in pixels of the padded input, scores (N, D), labels (N, D) int64 and counts (N,)
            int64, best first; D is `max_detections`. Past the count: zeros, and labels -1.
        """
        rpn_map, head_map = self.network.features(images.permute(0, 3, 1, 2))
        rois, valid = self._propose(*self._rpn(rpn_map), image_sizes)
        output = self.network.head(head_map, rois)
        return self._final(output.class_logits, output.box_deltas, rois, valid, image_sizes)

    def _rpn(self, rpn_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """RPN.forward without len(), which would fix the batch in a trace."""
        rpn = self.network.rpn
        hidden = rpn.hidden(rpn_map)
        objectness = rpn.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = rpn.deltas(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
        return objectness.float(), deltas.float(), rpn.anchors(rpn_map.shape[2], rpn_map.shape[3])

    def _propose(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """RPN.propose: boxes (N, P, 4) and which of them are valid (N, P)."""
        rpn, limits = self.network.rpn, self.network.rpn.test_limits
        before, after = limits.before_nms, limits.after_nms
        if self.any_size:
            # Empty anchors, so that topk has a fixed number to take.
            objectness = torch.cat(
                (objectness, objectness.new_full((objectness.shape[0], before), float("-inf"))), dim=1
            )
            deltas = torch.cat((deltas, deltas.new_zeros(deltas.shape[0], before, 4)), dim=1)
            anchors = torch.cat((anchors, anchors.new_zeros(before, 4)))
        else:
            before = min(before, objectness.shape[1])
        index = objectness.topk(before, dim=1).indices
        deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(decode_boxes(deltas, anchors[index]), image_sizes)
        usable = ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(dim=2)
        # Ranks in place of logits: no two are equal, in any runtime.
        ranks = torch.arange(before, 0, -1, dtype=boxes.dtype, device=boxes.device)
        ranks = torch.where(usable, ranks, 0.0)  # (N, before)
        kept = self.keep(boxes, ranks[:, None], rpn.nms_threshold, after)[:, 0]
        ranks, index = torch.where(kept, ranks, 0.0).topk(min(before, after), dim=1)
        valid = ranks > 0
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None]
        return boxes, valid

    def _final(
        self, class_logits: Tensor, box_deltas: Tensor, rois: Tensor, valid: Tensor, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """LightHead.detect."""
        head = self.network.head
        classes, limit = head.num_classes, head.max_detections
        scores = class_logits.softmax(dim=-1)[..., :-1] * valid[..., None]  # (N, P, K)
        boxes = decode_boxes(box_deltas * head.box_std, rois[:, :, None])  # (N, P, B, 4)
        per_roi = boxes.shape[2]
        flat = clip_boxes(boxes.flatten(1, 2), image_sizes)  # (N, P * B, 4)
        boxes = flat.unflatten(1, (-1, per_roi))
        sides = (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1)  # (N, P, B)
        scores = torch.where((scores > head.score_threshold) & (sides > MIN_SIDE), scores, 0.0)
        kept = self._keep_per_class(boxes, scores.transpose(1, 2), head.nms_threshold, limit).transpose(1, 2)
        count = min(limit, classes * rois.shape[1])
        scores, index = torch.where(kept, scores, 0.0).flatten(1).topk(count, dim=1)  # (N, D)
        found = scores > 0
        labels = torch.where(found, index % classes, -1)
        place = torch.div(index, classes, rounding_mode="floor") if per_roi == 1 else index
        boxes = flat.gather(1, place[..., None].expand(-1, -1, 4)) * found[..., None]
        return boxes, scores, labels, found.sum(dim=1)

    def _keep_per_class(self, boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
        """Boxes (N, P, B, 4), scores (N, K, P) -> (N, K, P)."""
        if boxes.shape[2] == 1:
            return self.keep(boxes[:, :, 0], scores, threshold, limit)
        own = boxes.transpose(1, 2).flatten(0, 1)  # (N * K, P, 4)
        return self.keep(own, scores.flatten(0, 1)[:, None], threshold, limit).view_as(scores)


def keep_with_torchvision(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """`Keep` by one call of torchvision's operator: rows are moved apart, as `batched_nms` does.

    In float64, where the move costs no precision: at float32 the last of 80 classes would be off by 0.01 px. The limit
    is not needed for the result; the operator has none.
    """
    rows, classes, places = scores.shape
    flat, total = scores.flatten(), scores.numel()
    found = (flat > 0).nonzero()[:, 0]
    # Two more, in rows of their own that nobody asks for: torch.export takes for granted that there are two or more,
    # and a picture with one candidate, or none, would end in an assertion.
    extra = torch.arange(2, device=flat.device)
    row = torch.cat((torch.div(found, places, rounding_mode="floor"), rows * classes + extra))
    place = torch.cat((found % places, extra * 0))
    image = torch.div(row, classes, rounding_mode="floor").clamp(max=rows - 1)
    moved = boxes.flatten(0, 1)[image * places + place].double()
    moved = moved + (row.double() * (boxes.max().double() + 1))[:, None]
    worth = torch.cat((flat[found].double(), extra.double() * 0))
    kept = torch.cat((found, total + extra))[nms(moved, worth, threshold)]
    marks = torch.zeros(total + 2, dtype=torch.bool, device=flat.device)
    return marks.index_fill(0, kept, True)[:total].view_as(scores)


@torch.library.custom_op("light_head_export::keep", mutates_args=())
def keep_for_onnx(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """`Keep` as one node, which the ONNX writer replaces by NonMaxSuppression; no file ever names it."""
    return keep_with_torchvision(boxes, scores, threshold, limit)


@keep_for_onnx.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
