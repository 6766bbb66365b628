"""The network: backbone, neck, RPN, light head. Tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detector.models.backbones import Backbone
from detector.models.backbones.input_frame import MEAN, STD
from detector.models.backbones.unshuffled import reorder_inputs
from detector.models.light_head import LightHead
from detector.models.neck import Neck
from detector.models.postprocess import FixedDetections, Suppress, suppress_eagerly
from detector.models.rpn import RPN, Proposals

if TYPE_CHECKING:
    from collections.abc import Callable

    from detector.data.collate import Batch

    # Images (N, 3, H, W) and RoIs (N, P, 4) -> probabilities of classes and background (N, P, K + 1).
    Teach = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Regions:
    """What the first stage gives.

    Attributes:
        proposals: of each image.
        thin_features: (N, C * 7 * 7, h, w), the thin map that the head samples.
        anchors: (A, 4) xyxy in pixels of the padded input, those of every image.
        image_sizes: (N, 2), height and width inside the padding.
    """

    proposals: Proposals
    thin_features: Tensor
    anchors: Tensor
    image_sizes: Tensor


class LightHeadRCNN(nn.Module):
    """Light-Head R-CNN (Li et al. 2017) on any backbone that gives c3, c4 and c5.

    Takes raw uint8 pixels: mean and standard deviation belong to the network, so that nobody can forget them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, neck: Neck, rpn: RPN, head: LightHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.head = head
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) -> float, zero mean and unit deviation over ImageNet, channels last in memory."""
        # Row by row: three channels are too short a dimension for a processor to broadcast over.
        rows, width = images.permute(0, 2, 3, 1).flatten(2), images.shape[3]  # (N, H, 3W)
        rows = (rows - self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The map of the RPN and the map of the light head."""
        return self.neck(self.backbone(self.normalise(images)))

    def to_inference(self) -> None:
        """Let the backbone order its channels as it likes, and reorder the weights of what reads its maps."""
        for name, order in self.backbone.unshuffle().items():
            readers = self.neck.readers(name)
            readers += [self.rpn.hidden] if self.neck.rpn_map == name else []
            readers += self.head.readers() if self.neck.head_map == name else []
            for layers in readers:
                reorder_inputs(layers, order)

    def forward(self, batch: Batch, teach: Teach | None = None) -> dict[str, Tensor]:
        """The training losses: `network(batch)` is what a step of training calls, with the hooks of nn.Module."""
        return self.losses(batch, teach)

    def losses(self, batch: Batch, teach: Teach | None = None) -> dict[str, Tensor]:
        """rpn_objectness, rpn_box, head_class, head_box: scalars whose sum is to be minimised.

        With a teacher, which says of what class the RoIs are, also head_teacher.
        """
        rpn_map, head_map = self.features(batch.images)
        objectness, deltas, anchors = self.rpn(rpn_map)
        losses = self.rpn.losses(objectness, deltas, anchors, batch)
        with torch.no_grad():
            proposals = self.rpn.propose(objectness, deltas, anchors, batch.image_sizes)
            rois, matches = self.head.rois_for_training(proposals, batch)
        output = self.head(self.head.thin(head_map), rois.boxes)
        taught = None if teach is None else teach(batch.images, rois.boxes)
        return losses | self.head.losses(output, rois, matches, batch, taught)

    def class_logits(self, images: Tensor, rois: Tensor) -> Tensor:
        """(N, P, K + 1) of RoIs (N, P, 4), xyxy in pixels of these images."""
        return self.head(self.head.thin(self.features(images)[1]), rois).class_logits

    @torch.inference_mode()
    def detect(self, images: Tensor, image_sizes: Tensor, max_proposals: int | None = None) -> FixedDetections:
        """Find objects.

        Args:
            images: uint8 RGB (N, 3, H, W).
            image_sizes: (N, 2), height and width of each image inside the padding.
            max_proposals: the head sees the best of P so many; None: all.
        """
        return self.classify(self.propose(images, image_sizes), max_proposals)

    def propose(self, images: Tensor, image_sizes: Tensor, suppress: Suppress = suppress_eagerly) -> Regions:
        """The first stage, paid for once per image; arguments as of `detect`."""
        rpn_map, head_map = self.features(images)
        objectness, deltas, anchors = self.rpn(rpn_map)
        proposals = self.rpn.propose(objectness, deltas, anchors, image_sizes, suppress)
        return Regions(proposals, self.head.thin(head_map), anchors, image_sizes)

    def classify(
        self, regions: Regions, max_proposals: int | None = None, suppress: Suppress = suppress_eagerly
    ) -> FixedDetections:
        """The second stage, paid for per proposal; max_proposals as of `detect`."""
        proposals = regions.proposals
        if max_proposals is not None:
            proposals = Proposals(*(x[:, :max_proposals] for x in proposals))
        output = self.head(regions.thin_features, proposals.boxes)
        return self.head.detect(output, proposals, regions.image_sizes, suppress)
