"""The map that RPN and light head look at: the backbone's own stages, or one fused map at stride 16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detector.models.layers import Channels, conv_bn, depthwise
from detector.options import Options


class NoNeckOptions(Options):
    """No layers between backbone and stages: Li et al. 2017 (Light-Head R-CNN), figure 2."""

    name: Literal["none"] = "none"


class ContextEnhancementOptions(Options):
    """One fused map for both stages: Qin et al. 2019 (ThunderNet), section 3.2."""

    name: Literal["cem"] = "cem"
    width: Channels = 245
    """Channels of the fused map (ThunderNet, section 3.2: 245)."""


AnyNeckOptions = Annotated[NoNeckOptions | ContextEnhancementOptions, Field(discriminator="name")]


class Neck(nn.Module):
    """What stands between the backbone's maps and the two stages.

    Attributes:
        rpn_channels, rpn_stride, head_channels, head_stride: of the maps that the RPN and the light head get.
        rpn_map, head_map: names of the backbone's maps that are handed on as they are; None: made here.
    """

    rpn_channels: int
    rpn_stride: int
    head_channels: int
    head_stride: int
    rpn_map: str | None = None
    head_map: str | None = None

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The map of the RPN and the map of the light head."""
        raise NotImplementedError

    def readers(self, name: str) -> list[nn.Module]:
        """The layers here that read the backbone's map of this name; see `Backbone.unshuffle`."""
        raise NotImplementedError


class NoNeck(Neck):
    """RPN on C4, light head on C5: Li et al. 2017 (Light-Head R-CNN), figure 2."""

    rpn_map, head_map = "c4", "c5"

    def __init__(self, channels: Mapping[str, int], strides: Mapping[str, int], options: NoNeckOptions) -> None:
        super().__init__()
        self.rpn_channels, self.rpn_stride = channels["c4"], strides["c4"]
        self.head_channels, self.head_stride = channels["c5"], strides["c5"]

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return features["c4"], features["c5"]

    def readers(self, name: str) -> list[nn.Module]:
        return []


class ContextEnhancement(Neck):
    """One map at stride 16 from C3, C4, C5 and the global average: what both stages share.

    1x1 of C4 + upsampled 1x1 of C5 + 1x1 of the global average + strided 3x3 of C3, then a 5x5 depthwise and a 1x1.

    Source: Qin et al. 2019 (ThunderNet), section 3.2. Chosen by this project: C3, which carries the small
    objects, and the depthwise convolution that mixes the sum; each branch has a batch normalisation, so that none
    drowns the others.

    Args:
        channels, strides: of the backbone.
    """

    def __init__(
        self, channels: Mapping[str, int], strides: Mapping[str, int], options: ContextEnhancementOptions
    ) -> None:
        super().__init__()
        width = options.width
        self.rpn_channels = self.head_channels = width
        self.rpn_stride = self.head_stride = strides["c4"]
        self.c3 = conv_bn(channels["c3"], width, 3, stride=2)
        self.c4 = conv_bn(channels["c4"], width)
        self.c5 = conv_bn(channels["c5"], width)
        # No normalisation on the global branch: one value per image and channel has no variance at batch size 1.
        self.context = nn.Conv2d(channels["c5"], width, 1)
        self.mix = nn.Sequential(*depthwise(width, 5), *conv_bn(width, width, activation="relu"))

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        c4 = self.c4(features["c4"])
        c5 = F.interpolate(self.c5(features["c5"]), size=c4.shape[-2:], mode="nearest")
        context = self.context(features["c5"].mean(dim=(2, 3), keepdim=True))
        fused = self.mix(torch.relu(c4 + c5 + context + self.c3(features["c3"])))
        return fused, fused

    def readers(self, name: str) -> list[nn.Module]:
        readers: dict[str, list[nn.Module]] = {"c3": [self.c3], "c4": [self.c4], "c5": [self.c5, self.context]}
        return readers[name]


NECKS: dict[str, type[NoNeck | ContextEnhancement]] = {"none": NoNeck, "cem": ContextEnhancement}
