"""Region proposal network: objectness and deltas for every anchor -> a fixed number of proposals per image.

Source: Ren et al. 2015 (Faster R-CNN), section 3.1; settings of Li et al. 2017 (Light-Head R-CNN), section 3.3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic.types import Strict
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.anchors import AnchorGrid
from detector.models.boxes import clip_boxes, decode_boxes, encode_boxes
from detector.models.layers import Channels, conv_bn, depthwise, draw_small
from detector.models.matching import gather_boxes, match, sample
from detector.models.postprocess import Suppress, is_empty, keep_best, suppress_eagerly
from detector.options import Count, Flag, Options, Positive, Share

if TYPE_CHECKING:
    from detector.data.collate import Batch


# Bounds: no image has use for more, and a damaged number must not take all memory.
Limit = Annotated[int, Strict(), Field(ge=1), Field(le=100_000)]
Pixels = Annotated[float, Strict(), Field(gt=0), Field(le=100_000)]
Ratio = Annotated[float, Strict(), Field(ge=0.001), Field(le=1000)]


class ProposalLimits(Options):
    """How many boxes survive."""

    before_nms: Limit
    """Anchors per image, by objectness, that are decoded at all."""
    after_nms: Limit
    """P, the fixed number of proposals per image."""


class RPNOptions(Options):
    """The defaults are setting S of Li et al. 2017 (Light-Head R-CNN).

    "Released code" is the authors', github.com/zengarden/light_head_rcnn, where the paper is silent.
    """

    channels: Channels = 256
    """Channels of the hidden map: 256 in setting S (section 4.3), 512 in L (section 4.2)."""
    separable: Flag = False
    """5x5 depthwise and 1x1 convolution (ThunderNet, section 3.2) in place of the published 3x3."""
    scales: Annotated[tuple[Pixels, ...], Field(min_length=1, max_length=64)] = (32, 64, 128, 256, 512)
    """Square roots of the anchors' areas, in pixels of the network input (section 3.3)."""
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=64)] = (0.5, 1.0, 2.0)
    """Height / width of the anchors (section 3.3)."""
    foreground_iou: Share = 0.7
    """Anchors at or above are foreground, and the best of each object (section 3.3)."""
    background_iou: Share = 0.3
    """Anchors below are background; those in between are ignored (section 3.3)."""
    inside_only: Flag = True
    """Train on anchors inside the image alone (released code); false: no background that is centred on padding."""
    sample_count: Count = 256
    """Anchors per image in the loss (Ren et al. 2015, section 3.1.3; released code)."""
    foreground_share: Share = 0.5
    """At most so much of the sampled anchors (Ren et al. 2015, section 3.1.3; released code)."""
    smooth_l1_beta: Positive = 1 / 9
    """Where the box loss turns from square to linear (released code: sigma 3, beta = 1 / sigma^2)."""
    nms_threshold: Share = 0.7
    """IoU above which the worse of two proposals goes (section 3.3)."""
    train_limits: ProposalLimits = ProposalLimits(before_nms=12000, after_nms=2000)
    """Released code; 2000 in section 4.1."""
    test_limits: ProposalLimits = ProposalLimits(before_nms=6000, after_nms=1000)
    """Released code; 1000 in section 4.1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.background_iou > self.foreground_iou:
            raise InputError(
                f"rpn.background_iou={self.background_iou} is above rpn.foreground_iou={self.foreground_iou}: an "
                "anchor would be both."
            )
        return self


class Proposals(NamedTuple):
    """P boxes per image, best first.

    Attributes:
        boxes: (N, P, 4) xyxy in pixels of the padded input, inside the image; zeros where not valid.
        valid: (N, P) bool; an image with fewer boxes is filled up.
        scores: (N, P) objectness in [0, 1].
    """

    boxes: Tensor
    valid: Tensor
    scores: Tensor


class RPN(nn.Module):
    """A small convolution, then objectness (N, A) and deltas (N, A, 4) for the A anchors of the map.

    Args:
        in_channels, stride: of the feature map.
    """

    def __init__(self, in_channels: int, stride: int, options: RPNOptions) -> None:
        super().__init__()
        self.options = options
        channels = options.channels
        self.anchors = AnchorGrid(scales=options.scales, ratios=options.ratios, stride=stride)
        if options.separable:
            self.hidden = nn.Sequential(*depthwise(in_channels, 5), *conv_bn(in_channels, channels, activation="relu"))
        else:
            self.hidden = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True))
            draw_small(self.hidden[0], 0.01)
        self.objectness = nn.Conv2d(channels, self.anchors.per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * self.anchors.per_cell, 1)
        for layer in (self.objectness, self.deltas):
            draw_small(layer, 0.01)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw outputs for a map (N, C, h, w).

        Returns:
            objectness logits (N, A), deltas (N, A, 4), both float32, and the anchors (A, 4) in pixels of the padded
            input; A = h * w * shapes, ordered as AnchorGrid orders them.
        """
        hidden = self.hidden(features)
        objectness = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
        height, width = hidden.shape[-2:]
        return objectness.float(), deltas.float(), self.anchors(height, width)

    @torch.no_grad()
    def propose(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        image_sizes: Tensor,
        suppress: Suppress = suppress_eagerly,
    ) -> Proposals:
        """Decode the best anchors, clip them to the image, suppress doubles, keep P.

        Not differentiable: the head's loss must not move the proposals (Ren et al. 2015, approximate joint training).
        """
        limits = self.options.train_limits if self.training else self.options.test_limits
        before, after = limits.before_nms, limits.after_nms
        if isinstance(cast("int | torch.SymInt", objectness.shape[1]), torch.SymInt):  # an export for any size
            # Empty anchors, so that there is a fixed number to take.
            objectness = F.pad(objectness, (0, before), value=float("-inf"))
            deltas, anchors = F.pad(deltas, (0, 0, 0, before)), F.pad(anchors, (0, 0, 0, before))
        else:
            before = min(before, objectness.shape[1])
        logits, index = objectness.topk(before, dim=1)
        deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(decode_boxes(deltas, anchors[index]), image_sizes)
        # Ranks in place of logits: no two are equal, in any runtime.
        ranks = torch.arange(before, 0, -1, dtype=boxes.dtype, device=boxes.device)
        ranks = torch.where(is_empty(boxes), 0.0, ranks)
        boxes, ranks, index = keep_best(
            boxes[:, :, None], ranks[..., None], self.options.nms_threshold, after, suppress
        )
        valid = ranks > 0
        scores = torch.where(valid, logits.gather(1, index).sigmoid(), 0.0)
        missing = after - min(before, after)
        return Proposals(F.pad(boxes, (0, 0, 0, missing)), F.pad(valid, (0, missing)), F.pad(scores, (0, missing)))

    def losses(self, objectness: Tensor, deltas: Tensor, anchors: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Objectness and box loss over a sample of the anchors of each image, averaged over the sampled anchors.

        Ren et al. 2015, equation 1. Finite without any object; every output stays in the graph.
        """
        with torch.no_grad():
            inside = _inside(anchors, batch.image_sizes) if self.options.inside_only else None
            matches = match(
                anchors,
                batch,
                foreground_iou=self.options.foreground_iou,
                background_iou=self.options.background_iou,
                best_is_foreground=True,
                among=inside,
            )
            matches = replace(matches, background=matches.background & _centred(anchors, batch.image_sizes))
            count, share = self.options.sample_count, self.options.foreground_share
            foreground, background = sample(matches, count=count, foreground_share=share)
            # A fixed number of places, of which some are unused: nothing has to be waited for.
            most = min(round(count * share), foreground.shape[1])
            used, index = foreground.to(torch.uint8).topk(most, dim=1)  # (N, most)
            targets = encode_boxes(gather_boxes(batch.boxes, matches.index.gather(1, index)), anchors[index])
            sampled = foreground | background
        total = sampled.sum().clamp(min=1)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness, foreground.to(objectness.dtype), reduction="none"
        )
        predicted = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        box_loss = F.smooth_l1_loss(predicted, targets, beta=self.options.smooth_l1_beta, reduction="none")
        return {
            # where, not times: what is not sampled must not turn inf * 0 into nan.
            "rpn_objectness": torch.where(sampled, objectness_loss, 0.0).sum() / total,
            "rpn_box": torch.where(used[..., None] > 0, box_loss, 0.0).sum() / total,
        }


def _inside(anchors: Tensor, image_sizes: Tensor) -> Tensor:
    """Which anchors lie inside each image: (N, A)."""
    return (anchors[:, :2] >= 0).all(dim=-1) & (anchors[:, 2:] <= image_sizes.flip(-1)[:, None]).all(dim=-1)


def _centred(anchors: Tensor, image_sizes: Tensor) -> Tensor:
    """Which anchors are centred on the image, not on its padding: (N, A). Padding is too easy to learn from."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centers < image_sizes.flip(-1)[:, None]).all(dim=-1)
