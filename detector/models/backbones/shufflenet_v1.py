"""ShuffleNet V1 (Zhang et al. 2018: section 3.2, figure 2, table 1), and V1-50 (Ma et al. 2018, appendix)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from detector.errors import InputError
from detector.models.backbones.contract import Backbone, BackboneOptions, Place, Repeats, Widths
from detector.models.layers import Channels, Width, conv_bn, depthwise, pooled_stem
from detector.options import Flag

STAGE_2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # table 1: groups -> outputs; stages 3 and 4 have twice, four times
SE_REDUCTION = 16  # Hu et al. 2018 (Squeeze-and-Excitation Networks): r = 16


def shuffle_groups(x: Tensor, groups: int) -> Tensor:
    """Channel 0 of every group, then channel 1 of every group, ...; (N, C, H, W) -> the same shape.

    A copy along the channels of channels_last memory, which it keeps.
    """
    last = x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))  # (N, H, W, groups, C / groups)
    return last.transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)


class Unit(nn.Module):
    """Figure 2: grouped 1x1 and ReLU, shuffle, depthwise 3x3, grouped 1x1; the shortcut is added, or concatenated.

    BN after each convolution, no ReLU after the depthwise one (section 3.2).

    The very first 1x1 has one group, because its inputs are few (section 3.2, stage 2). Where a stage begins, the
    shortcut is averaged over 3x3 cells (padding counts) and takes a part of the outputs, figure 2 (c). Elsewhere, and
    everywhere in a stage at stride 4, it is added, figure 2 (b), filled up with zeros where there are more outputs than
    inputs (He et al. 2016, section 3.3, option A). Squeeze-and-excitation is on all outputs before the last ReLU:
    before the addition, after the concatenation.
    """

    def __init__(self, place: Place, options: ShuffleNetV1Options) -> None:
        super().__init__()
        inputs, outputs, groups = place.inputs, place.outputs, options.groups
        middle = outputs // options.bottleneck // groups * groups
        concatenate = place.first and place.stage != "stage1"
        own = outputs - inputs if concatenate else outputs
        self.reduce = conv_bn(inputs, middle, activation="relu", groups=1 if inputs == options.stem else groups)
        self.expand = nn.Sequential(
            *depthwise(middle, stride=place.stride, dilation=place.dilation), *conv_bn(middle, own, groups=groups)
        )
        self.se: nn.Module = nn.Identity()
        if options.se:
            from torchvision.ops import SqueezeExcitation  # takes as long to import as torch

            self.se = SqueezeExcitation(outputs, outputs // SE_REDUCTION)
        self.pool = nn.AvgPool2d(3, place.stride, padding=1) if concatenate else None
        self.missing = 0 if concatenate else outputs - inputs
        self.shuffle = groups if options.shuffle else 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        if self.shuffle > 1:
            y = shuffle_groups(y, self.shuffle)
        y = self.expand(y)
        if self.pool is not None:
            return F.relu(self.se(torch.cat((self.pool(x), y), dim=1)))
        shortcut = F.pad(x, (0, 0, 0, 0, 0, self.missing)) if self.missing else x
        return F.relu(shortcut + self.se(y))


class ShuffleNetV1Options(BackboneOptions):
    """The defaults are ShuffleNet V1 1x with 3 groups (Zhang et al. 2018, table 1)."""

    name: Literal["shufflenet_v1"] = "shufflenet_v1"
    groups: Literal[1, 2, 3, 4, 8] = 3
    """What the channels of a grouped 1x1 convolution are divided into (table 1)."""
    width: Width | None = None
    """Times the channels of table 1, which depend on the groups; null: 1, or what `channels` say."""
    channels: Widths | None = None
    """Outputs of the last three stages, which give c3, c4 and c5, or of four, the first at stride 4 (V1-50)."""
    stem_channels: Channels | None = None
    """Null: 12 up to half the width, 24, and 48 from twice the width on (the authors' code)."""
    repeats: Repeats = (4, 8, 4)
    """Units in each stage, the one of stride 2 included (table 1)."""
    bottleneck: Channels = 4
    """Outputs of a unit over the channels of its depthwise convolution (section 3.2)."""
    se: Flag = False
    """Squeeze-and-excitation in every unit, reduction 16 (table 5)."""
    shuffle: Flag = True
    """False: the ablation of table 3."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """Channels of each stage's map."""
        if self.channels is not None:
            return self.channels
        first = int(STAGE_2[self.groups] * (self.width or 1))
        return first, 2 * first, 4 * first

    @property
    def stem(self) -> int:
        """Outputs of the stem."""
        if self.stem_channels is not None:
            return self.stem_channels
        width = self.width or 1
        channels = 12 if width <= 0.5 else 24 if width < 2 else 48
        return channels // self.groups * self.groups

    @model_validator(mode="after")
    def _check(self) -> Self:
        groups, channels, bottleneck = self.groups, self.outputs, self.bottleneck
        if self.width is not None and self.channels is not None:
            raise InputError(f"backbone: width={self.width}, channels={list(channels)}; give one of the two.")
        if self.channels is not None and self.stem_channels is None:
            raise InputError("backbone.stem_channels is missing: give it where channels are given.")
        first = STAGE_2[groups] * (self.width or 1)
        if first != int(first):
            raise InputError(
                f"backbone.width={self.width}: {self.width} x {STAGE_2[groups]} channels is no whole number."
            )
        if (len(channels), len(self.repeats)) not in ((3, 3), (4, 4)):
            raise InputError(
                f"backbone: channels={list(channels)}, repeats={list(self.repeats)}; give three of each, or four."
            )
        if any(width % groups or width // bottleneck < groups for width in channels):
            raise InputError(
                f"backbone: channels={list(channels)}, groups={groups}, bottleneck={bottleneck}; channels must be "
                "multiples of groups, and channels / bottleneck at least groups."
            )
        if any(after <= before for before, after in pairwise(channels)):
            raise InputError(f"backbone.channels={list(channels)}: every stage must be wider than the one before it.")
        # The first of four stages has stride 1, which needs no room for a shortcut beside the main branch.
        if self.stem < 1 or self.stem >= channels[0] or (self.stem % groups and len(channels) < 4):
            raise InputError(
                f"backbone.stem_channels={self.stem}: must be a multiple of groups={groups} below the {channels[0]} "
                "channels of the first stage."
            )
        return self


class ShuffleNetV1(Backbone):
    """ShuffleNet V1 up to its last stage. Convolutions start as torch's do; the paper says nothing of it.

    Costs of table 1 at 224 x 224 come out as 143.1 / 140.8 / 137.5 / 134.3 / 138.4 M for 1, 2, 3, 4, 8 groups, where it
    prints 143 / 140 / 137 / 133 / 137.

    The paper does not say that conv1 is scaled with the width, but the authors' code does
    (github.com/megvii-model/ShuffleNet-Series, from 0.5x to 2x); with 24 the 38, 13 and 524 M of tables 2 and 5 would
    be 43, 18 and 508 M with 3 groups. Rounded down to a multiple of the groups, because the first unit's main branch
    gives the outputs that the shortcut leaves: 8 for 8 groups at 0.25x and 0.5x, 12.4 and 36.6 M (the authors' code has
    16 at 0.5x, 40.5 M). The other groups cost 12.9 to 13.3 and 36.5 to 38.5 M at these widths.

    Where the appendix of Ma et al. 2018 is silent about V1-50, this project chose: the shortcut of the first unit, of
    stride 1, is added (the 296 channels that 64 would leave of 360 do not divide into 3 groups), and `bottleneck` is 2,
    which costs the published 2.3 G (2.297 G), where 4 costs 1.16 G. Channels over the bottleneck are rounded down to a
    multiple of the groups, which matters for 2 and 4 groups at some widths.

    dilate_c5: every second pixel of c5 is what it would be without (but for SE).
    """

    def __init__(self, options: ShuffleNetV1Options) -> None:
        super().__init__(dilate_c5=options.dilate_c5)
        self.stem = pooled_stem(options.stem)
        widths = options.stem, *options.outputs
        self.add_stages(("stem",), widths, options.repeats, lambda place: Unit(place, options))
