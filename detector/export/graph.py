"""The whole detector as one traceable graph: uint8 pixels to final boxes, static shapes, any batch and canvas.

The network's own code, but for greedy suppression: ONNX and torch.export have operators of their own for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from detector.models.light_head_rcnn import LightHeadRCNN
from detector.models.postprocess import Suppress


class DetectionGraph(nn.Module):
    """A network as exports hold it.

    Args:
        network: in evaluation mode, its normalisation folded (`fuse`).
        suppress: how boxes are suppressed.
    """

    def __init__(self, network: LightHeadRCNN, suppress: Suppress) -> None:
        super().__init__()
        self.network = network
        self.suppress = suppress

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find objects.

        Args:
            images: uint8 RGB (N, H, W, 3), as images lie in memory.
            image_sizes: int64 (N, 2), height and width inside the padding.

        Returns:
            The fields of FixedDetections: boxes (N, D, 4), scores (N, D), labels (N, D) and counts (N,).
        """
        regions = self.network.propose(images.permute(0, 3, 1, 2), image_sizes, self.suppress)
        found = self.network.classify(regions, suppress=self.suppress)
        return found.boxes, found.scores, found.labels, found.counts


def suppress_at_once(boxes: Tensor, scores: Tensor, threshold: float, _: int) -> Tensor:
    """`Suppress` by one call of torchvision's operator for all images and classes, moved apart as `batched_nms` does.

    In float64, where the move costs no precision: at float32 the last of 80 classes would be off by 0.01 px. The limit
    is not needed for the result; the operator has none.
    """
    classes, per_place, total = scores.shape[2], scores.shape[2] // boxes.shape[2], scores.numel()
    flat = scores.flatten()
    found = (flat > 0).nonzero()[:, 0]
    # Two more, in rows of their own that nobody asks for: torch.export takes for granted that there are two or more,
    # and an image with one candidate, or none, would end in an assertion.
    extra = torch.arange(2, device=flat.device)
    image = torch.div(found, scores.shape[1] * classes, rounding_mode="floor")
    row = torch.cat((image * classes + found % classes, scores.shape[0] * classes + extra))
    place = torch.cat((torch.div(found, per_place, rounding_mode="floor"), extra * 0))
    moved = boxes.flatten(0, 2)[place].double()
    moved = moved + (row.double() * (boxes.max().double() + 1))[:, None]
    worth = torch.cat((flat[found].double(), extra.double() * 0))
    kept = torch.cat((found, total + extra))[nms(moved, worth, threshold)]
    marks = torch.zeros(total + 2, dtype=torch.bool, device=flat.device)
    return marks.index_fill(0, kept, True)[:total].view_as(scores)


def suppress_in_onnx(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """`Suppress` by ONNX's NonMaxSuppression, which takes boxes (M, P, 4) and scores (M, C, P)."""
    if boxes.shape[2] == 1:
        return nms_node(boxes[:, :, 0], scores.transpose(1, 2), threshold, limit).transpose(1, 2)
    own = boxes.transpose(1, 2).flatten(0, 1)  # (N * C, P, 4): a box per class
    worth = scores.transpose(1, 2)
    kept: Tensor = nms_node(own, worth.flatten(0, 1)[:, None], threshold, limit)
    return kept.view_as(worth).transpose(1, 2)


@torch.library.custom_op("light_head_export::nms", mutates_args=())
def nms_node(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """boxes (M, P, 4), scores (M, C, P) -> bool (M, C, P), what is kept; one node, which the ONNX writer replaces by
    NonMaxSuppression. No file ever names it."""
    return suppress_at_once(boxes[:, :, None], scores.transpose(1, 2), threshold, limit).transpose(1, 2).contiguous()


@nms_node.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
