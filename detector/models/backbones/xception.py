"""The light Xception that Light-Head R-CNN and ShuffleNet V2 compare with (Li et al. 2017, table 7)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from detector.errors import InputError
from detector.models.backbones.contract import Backbone, BackboneOptions, Place, Repeats, Widths
from detector.models.layers import Channels, conv_bn, depthwise, pooled_stem
from detector.options import Count


class Block(nn.Module):
    """Three separable convolutions 3x3 (depthwise, 1x1), narrow in between, and a shortcut: receptive field 7.

    BN after each convolution, ReLU after the 1x1 ones only (Chollet 2017, section 4.7, finds none better after the
    depthwise ones), the last one after the addition: no pre-activation (Li et al. 2017).

    Args:
        place: its stride is that of the last depthwise convolution and of the shortcut, as in Chen et al. 2018
            (DeepLabv3+), figure 4; its dilation that of every depthwise convolution. The first shortcut of a stage is
            a 1x1 convolution and BN, the others the input itself.
        bottleneck: outputs over the channels between the separable convolutions.
    """

    def __init__(self, place: Place, bottleneck: int) -> None:
        super().__init__()
        inputs, outputs = place.inputs, place.outputs
        middle = outputs // bottleneck
        self.branch = nn.Sequential(
            *depthwise(inputs, dilation=place.dilation),
            *conv_bn(inputs, middle, activation="relu"),
            *depthwise(middle, dilation=place.dilation),
            *conv_bn(middle, middle, activation="relu"),
            *depthwise(middle, stride=place.stride, dilation=place.dilation),
            *conv_bn(middle, outputs),
        )
        self.shortcut = conv_bn(inputs, outputs, stride=place.stride) if place.first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


class XceptionOptions(BackboneOptions):
    """The defaults are the light Xception 1x (Li et al. 2017, table 7)."""

    name: Literal["xception"] = "xception"
    stem_channels: Channels = 24
    """Channels of the first convolution (table 7)."""
    channels: Widths = (144, 288, 576)
    """Channels of the last three stages, which give c3, c4 and c5 (table 7)."""
    repeats: Repeats = (4, 8, 4)
    """Blocks in each stage, the one of stride 2 included (table 7)."""
    bottleneck: Count = 6
    """Outputs of a block over the channels between its convolutions; not published, chosen for the costs, see there."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (len(self.channels), len(self.repeats)) != (3, 3) or self.bottleneck > min(self.channels):
            raise InputError(
                f"backbone: channels={list(self.channels)}, repeats={list(self.repeats)}, "
                f"bottleneck={self.bottleneck}; give three channels and repeats, the bottleneck no more than the "
                "channels."
            )
        return self


class Xception(Backbone):
    """The light Xception up to its last stage. Convolutions start as torch's do.

    Published are the stem, the channels and repeats of the 1x width (Li et al. 2017, table 7), "all convolutions of the
    bottleneck structure replaced by channel-wise ones", the receptive field of a block, 7 (Ma et al. 2018, section 4),
    and the costs at 224 x 224 of four widths, 40 / 145 / 305 / 525 M (Ma et al. 2018, table 8). The block is not.
    Chosen by this project: the block of Chen et al. 2018 (DeepLabv3+), whose separable convolutions are three, with a
    bottleneck of 1/6: 39.6 / 143.7 / 306.6 / 530.3 M with stages times the width and stems of 8, 24, 36 and 48 (12 at
    0.5x: 41.5 M).
    Tried, in M at 0.5x / 1x / 1.5x / 2x, all with receptive field 7 and the same stems ("joined": the shortcut is
    averaged and concatenated, as in ShuffleNet V1):

        three separable, bottleneck 1/4                    55 / 205 / 444 / 773
        three separable, bottleneck 1/5                    46 / 168 / 359 / 625
        the same, 1/6, stride in the first or the second   35 / 128 / 272 / 471, 38 / 139 / 296 / 512
        three separable, bottleneck 1/4, joined            50 / 182 / 391 / 678
        three separable, bottleneck 1/5, joined            40 / 146 / 308 / 534, but 1/5 of 144 is no whole number
        the same, 1/4, stride in the first                 43 / 155 / 334 / 579
        1x1, three depthwise, 1x1; 1/4, joined             40 / 149 / 323 / 562

    dilate_c5: every second pixel of c5 is what it would be without.
    """

    def __init__(self, options: XceptionOptions) -> None:
        super().__init__(dilate_c5=options.dilate_c5)
        self.stem = pooled_stem(options.stem_channels)
        widths = options.stem_channels, *options.channels
        self.add_stages(("stem",), widths, options.repeats, lambda place: Block(place, options.bottleneck))
