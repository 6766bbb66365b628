"""The light head, in the order of Li et al. 2017 (Light-Head R-CNN), section 3.

Large separable convolution -> thin feature map -> PS-RoI Align -> one hidden FC -> class logits and box deltas; the
loss with online hard example mining; the final boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.boxes import clip_boxes, decode_boxes, encode_boxes
from detector.models.calibrate import IDENTITY, calibrated
from detector.models.layers import Channels, draw_small
from detector.models.matching import Matches, gather_boxes, match, sample
from detector.models.postprocess import FixedDetections, Suppress, is_empty, keep_best, suppress_eagerly
from detector.models.ps_roi_align import ps_roi_align
from detector.models.rpn import Proposals
from detector.options import Count, Flag, NotNegative, Options, Positive, Share

if TYPE_CHECKING:
    from detector.data.collate import Batch

# Bins per side of a RoI (p in the paper).
BINS = 7
# Deltas are learned in units of these: Girshick 2015 (Fast R-CNN), released code.
BOX_STD = (0.1, 0.1, 0.2, 0.2)
# Deltas of a background RoI lead to some far-away box: cut here (in units of BOX_STD), they stay finite until they are
# masked. No RoI that counts comes near: at IoU 0.5 they are below 10.
FAR = 100.0


class LargeSeparableConv(nn.Module):
    """k x 1 then 1 x k, plus 1 x k then k x 1: section 3.2, figure 3. No normalisation, one ReLU after the sum."""

    def __init__(self, in_channels: int, out_channels: int, *, mid_channels: int, kernel_size: int) -> None:
        super().__init__()
        column, row = (kernel_size, 1), (1, kernel_size)
        self.column_row = self._branch(in_channels, mid_channels, out_channels, column, row)
        self.row_column = self._branch(in_channels, mid_channels, out_channels, row, column)

    @staticmethod
    def _branch(inputs: int, mid: int, outputs: int, first: tuple[int, int], second: tuple[int, int]) -> nn.Sequential:
        convs = [
            nn.Conv2d(a, b, size, padding=(size[0] // 2, size[1] // 2))
            for a, b, size in ((inputs, mid, first), (mid, outputs, second))
        ]
        for conv in convs:
            # The released code draws from N(0, 0.01), made for 2048 input channels and a learning rate of its own;
            # chosen here: keep the variance, so that the thin map of a small backbone is not born at zero.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        return nn.Sequential(*convs)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.column_row(features) + self.row_column(features))

    @torch.no_grad()
    def merged(self) -> nn.Sequential:
        """With 1x1 kernels: four linear convolutions and a sum as one, then the ReLU. Computed in float64."""
        weights, biases = [], []
        branches: Any = (self.column_row, self.row_column)
        for first, second in branches:
            mixing = second.weight.double().flatten(1)
            weights.append(mixing @ first.weight.double().flatten(1))
            biases.append(mixing @ first.bias.double() + second.bias.double())
        inputs: Any = branches[0][0]
        merged: Any = nn.Conv2d(
            inputs.in_channels, len(biases[0]), 1, device=inputs.weight.device, dtype=inputs.weight.dtype
        ).requires_grad_(False)
        merged.weight.copy_((weights[0] + weights[1])[:, :, None, None])
        merged.bias.copy_(biases[0] + biases[1])
        return nn.Sequential(merged, nn.ReLU(inplace=True))


@dataclass(frozen=True)
class HeadOutput:
    """Per RoI.

    Attributes:
        class_logits: (N, P, K + 1); the last is background.
        box_deltas: (N, P, B, 4) in units of BOX_STD; B = 1 (class-agnostic) or K.
    """

    class_logits: Tensor
    box_deltas: Tensor


class LightHeadOptions(Options):
    """The defaults are setting S of Li et al. 2017 (Light-Head R-CNN), section 4.3.

    "Released code" is the authors', github.com/zengarden/light_head_rcnn.
    """

    mid_channels: Channels = 64
    """Hidden channels of the large separable convolution: 64 in setting S (section 4.3), 256 in L (section 4.2)."""
    kernel_size: Channels = 15
    """Size k of the large separable convolution, an odd number (section 3.2)."""
    thin_channels: Channels = 10
    """C of the thin map's C * 7 * 7 channels (section 3.2: 10 * 7 * 7 = 490)."""
    hidden_channels: Channels = 2048
    """Width of the fully connected layer (section 3.3)."""
    align_reduce: Literal["mean", "max"] = "mean"
    """What becomes of the 2x2 samples of a bin: mean (the paper) or max (released code)."""
    class_agnostic: Flag = True
    """One box per RoI for all classes (section 3.3), or one for each class (released code)."""
    sampling: Literal["ohem", "random"] = "ohem"
    """RoIs in the loss: ohem, those of highest loss (section 4.1), or random ones (Girshick 2015, Fast R-CNN)."""
    sample_count: Count = 256
    """RoIs in the loss per image; ohem chooses them over all images of a device (section 4.1, released code)."""
    foreground_share: Share = 0.25
    """With sampling=random: of the RoIs in the loss at most (Girshick 2015, section 2.3)."""
    foreground_iou: Share = 0.5
    """RoIs at or above this IoU are foreground, the rest background (released code)."""
    box_weight: NotNegative = 2.0
    """Weight of the box loss against the class loss (section 4.1: doubled)."""
    smooth_l1_beta: Positive = 1.0
    """Where the box loss turns from square to linear (released code: sigma 1)."""
    score_threshold: Share = 0.001
    """Final boxes below are left out (released code: 0; below 0.001 mAP does not change, time does)."""
    objectness: NotNegative = 0.0
    """Final scores are times the proposal's objectness to this power (0: the head alone, as both papers have it)."""
    nms_threshold: Share = 0.5
    """IoU above which the worse of two final boxes of a class goes (section 4.1, table 6)."""
    max_detections: Count = 100
    """Final boxes per image at most (released code; COCO counts no more)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise InputError(f"light_head.kernel_size={self.kernel_size}; it must be odd, or the thin map grows.")
        return self


class LightHead(nn.Module):
    """Thin feature map and R-CNN subnet.

    Args:
        in_channels, stride: of the feature map.
        num_classes: K, without background.
    """

    box_std: Tensor

    def __init__(self, in_channels: int, stride: int, num_classes: int, options: LightHeadOptions) -> None:
        super().__init__()
        self.options = options
        self.scale = 1 / stride
        self.num_classes = num_classes
        self.calibration = IDENTITY  # of final scores, see `calibrated`; found after training, unlike the options
        thin, hidden = options.thin_channels * BINS * BINS, options.hidden_channels
        self.thin = LargeSeparableConv(
            in_channels, thin, mid_channels=options.mid_channels, kernel_size=options.kernel_size
        )
        self.hidden = nn.Linear(thin, hidden)
        self.class_logits = nn.Linear(hidden, num_classes + 1)
        self.box_deltas = nn.Linear(hidden, 4 if options.class_agnostic else 4 * num_classes)
        self.register_buffer("box_std", torch.tensor(BOX_STD), persistent=False)
        draw_small(self.class_logits, 0.01)
        draw_small(self.box_deltas, 0.001)

    def readers(self) -> list[nn.Module]:
        """The layers that read the map."""
        return [self.thin.column_row, self.thin.row_column]

    def to_inference(self) -> None:
        """A thin map made by 1x1 kernels becomes one convolution: fewer calls, and fewer multiply-adds but for the
        narrowest middle layers."""
        if isinstance(self.thin, LargeSeparableConv) and self.options.kernel_size == 1:
            self.thin = self.thin.merged()  # type: ignore[assignment]

    @torch.no_grad()
    def take_classes(self, other: LightHead, labels: Sequence[int | None]) -> None:
        """Fill the layers that know classes from a head that differs in its classes alone.

        Args:
            other: trained on other classes, or on these in another order.
            labels: for each class here its label there. None: a new one, which becomes the mean of the classes there,
                beside its random start. So its logit lies where theirs lie, on objects and on background; a row near
                zero would outshine all that have learnt to stay low on background. Chosen by this project.
        """
        theirs: Any = other.class_logits, other.box_deltas
        for own, given in zip(self.class_logits.parameters(), theirs[0].parameters(), strict=True):
            own[:-1] = _rows(own[:-1], given[:-1], labels)
            own[-1] = given[-1]
        for own, given in zip(self.box_deltas.parameters(), theirs[1].parameters(), strict=True):
            by_class = (
                given
                if self.options.class_agnostic
                else (_rows(own.unflatten(0, (-1, 4)), given.unflatten(0, (-1, 4)), labels).flatten(0, 1))
            )
            own.copy_(by_class)

    def forward(self, thin_features: Tensor, rois: Tensor) -> HeadOutput:
        """The part that is paid for per RoI (section 3.3).

        Args:
            thin_features: (N, C * 7 * 7, h, w), what `thin` makes of a feature map.
            rois: (N, P, 4), xyxy in pixels of the padded input.
        """
        # Cell i is centred on pixel stride * i (see AnchorGrid), but ps_roi_align takes stride * (i + 0.5).
        # The released code of Light-Head has no such half cell either.
        half_cell, reduce = 0.5 / self.scale, self.options.align_reduce
        roi_features = ps_roi_align(  # (N, P, C, 7, 7)
            thin_features, rois + half_cell, spatial_scale=self.scale, output_size=BINS, reduce=reduce
        )
        hidden = torch.relu(self.hidden(roi_features.flatten(2)))
        box_deltas = self.box_deltas(hidden).float().unflatten(-1, (-1, 4))
        return HeadOutput(self.class_logits(hidden).float(), box_deltas)

    def rois_for_training(self, proposals: Proposals, batch: Batch) -> tuple[Proposals, Matches]:
        """Proposals with the ground truth appended (N, P + G), and what each answers for.

        The objects themselves are RoIs too, or an untrained RPN would leave the head without foreground (Fast R-CNN's
        released code). Random sampling happens here, before anything is computed for a RoI.
        """
        real = (batch.labels >= 0) & ~batch.crowd
        rois = Proposals(
            torch.cat((proposals.boxes, batch.boxes * real[..., None]), dim=1),
            torch.cat((proposals.valid, real), dim=1),
            torch.cat((proposals.scores, real.to(proposals.scores.dtype)), dim=1),
        )
        iou = self.options.foreground_iou
        matches = match(rois.boxes, batch, foreground_iou=iou, background_iou=iou, best_is_foreground=False)
        matches = Matches(matches.index, matches.foreground & rois.valid, matches.background & rois.valid)
        return (rois, matches) if self.options.sampling == "ohem" else self._sampled(rois, matches)

    def _sampled(self, rois: Proposals, matches: Matches) -> tuple[Proposals, Matches]:
        foreground, background = sample(
            matches, count=self.options.sample_count, foreground_share=self.options.foreground_share
        )
        count = min(self.options.sample_count, foreground.shape[1])
        kept = (foreground | background).to(torch.uint8).topk(count, dim=1).indices  # (N, count)
        picked = Matches(*(x.gather(1, kept) for x in (matches.index, foreground, background)))
        valid = picked.foreground | picked.background
        return Proposals(gather_boxes(rois.boxes, kept), valid, rois.scores.gather(1, kept)), picked

    def losses(
        self, output: HeadOutput, rois: Proposals, matches: Matches, batch: Batch, taught: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Class and box loss over the chosen RoIs; finite with no RoI and no object, all outputs stay in the graph.

        With class probabilities `taught` (N, P, K + 1) also head_teacher, see `imitation`, over all RoIs, mined or not.
        """
        used = matches.foreground | matches.background
        imitated = {} if taught is None else {"head_teacher": imitation(output.class_logits, taught, used)}
        labels = batch.labels.gather(1, matches.index).masked_fill(~matches.foreground, self.num_classes)
        class_loss = F.cross_entropy(output.class_logits.flatten(0, 1), labels.flatten(), reduction="none")
        class_loss = class_loss.view_as(labels)
        box_loss = self._box_loss(output.box_deltas, rois.boxes, gather_boxes(batch.boxes, matches.index), labels)
        # where, not times: a RoI outside the sample must not turn inf * 0 into nan.
        box_loss = torch.where(matches.foreground, box_loss, 0.0)
        if self.options.sampling == "ohem":
            # Before the box loss is weighted, as the released code ranks.
            used = self._hardest((class_loss + box_loss).detach(), used)
        count = used.sum().clamp(min=1)
        return {
            "head_class": torch.where(used, class_loss, 0.0).sum() / count,
            "head_box": self.options.box_weight * torch.where(used, box_loss, 0.0).sum() / count,
        } | imitated

    def _box_loss(self, deltas: Tensor, rois: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        """Smooth L1 (N, P) between predicted and wanted deltas, of the RoI's own class if class-specific."""
        wanted = encode_boxes(targets, rois) / self.box_std
        if self.options.class_agnostic:
            predicted = deltas[:, :, 0]
        else:
            own = labels.clamp(max=self.num_classes - 1)[..., None, None].expand(*labels.shape, 1, 4)
            predicted = deltas.gather(2, own)[:, :, 0]
        loss = F.smooth_l1_loss(predicted, wanted.clamp(-FAR, FAR), beta=self.options.smooth_l1_beta, reduction="none")
        return loss.sum(dim=-1)

    def _hardest(self, loss: Tensor, used: Tensor) -> Tensor:
        """OHEM (Shrivastava et al. 2016): the sample_count * N RoIs of highest loss of the batch."""
        flat = loss.masked_fill(~used, -1.0).flatten()
        values, index = flat.topk(min(self.options.sample_count * len(loss), len(flat)))
        # Not values >= 0: a loss that is not a number must be chosen, so that training notices it.
        return torch.zeros_like(used).flatten().scatter_(0, index, ~(values < 0)).view_as(used)

    @torch.no_grad()
    def detect(
        self, output: HeadOutput, proposals: Proposals, image_sizes: Tensor, suppress: Suppress = suppress_eagerly
    ) -> FixedDetections:
        """The final boxes: decode, clip, suppress by class, keep the best max_detections of each image, calibrate."""
        scores = output.class_logits.softmax(dim=-1)[..., :-1] * proposals.valid[..., None]  # (N, P, K)
        if self.options.objectness:
            scores = scores * proposals.scores[..., None] ** self.options.objectness
        boxes = decode_boxes(output.box_deltas * self.box_std, proposals.boxes[:, :, None])  # (N, P, B, 4)
        boxes = clip_boxes(boxes.flatten(1, 2), image_sizes).unflatten(1, (-1, boxes.shape[2]))
        scores = torch.where((scores > self.options.score_threshold) & ~is_empty(boxes), scores, 0.0)
        boxes, scores, index = keep_best(
            boxes, scores, self.options.nms_threshold, self.options.max_detections, suppress
        )
        found = scores > 0
        if self.calibration != IDENTITY:
            scores = calibrated(scores, *self.calibration)
        return FixedDetections(boxes, scores, torch.where(found, index % self.num_classes, -1), found.sum(dim=1))


def imitation(class_logits: Tensor, taught: Tensor, used: Tensor) -> Tensor:
    """How far classes are from a teacher's: Kullback-Leibler divergence, mean over RoIs.

    Chen et al. 2017 (Learning efficient object detection models with knowledge distillation), section 3.2. Chosen by
    this project: temperature 1, weight 1 and background weighted as any class.

    Args:
        class_logits: (N, P, K + 1).
        taught: (N, P, K + 1), probabilities.
        used: (N, P), which RoIs count.
    """
    divergence = F.kl_div(class_logits.log_softmax(dim=-1), taught, reduction="none").sum(dim=-1)
    return torch.where(used, divergence, 0.0).sum() / used.sum().clamp(min=1)


def _rows(own: Tensor, given: Tensor, labels: Sequence[int | None]) -> Tensor:
    """What classes have of these labels (K, ...); of a new one, None, the mean over all beside its own."""
    mean = given.mean(dim=0)
    return torch.stack([mean + row if label is None else given[label] for row, label in zip(own, labels, strict=True)])
