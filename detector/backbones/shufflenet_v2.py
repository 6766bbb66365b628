"""ShuffleNet V2 and V2* (Ma et al. 2018: section 3.2 with table 5, and section 4).

Module names are torchvision's, so that its ImageNet weights load by key; conv5 and the classifier are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detector.backbones.contract import Backbone
from detector.errors import InputError

LAYOUTS = ("torchvision", "paper")
Pair = tuple[Tensor, Tensor]


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Shuffle two groups of channels: first 0, second 0, first 1, second 1, ...

    Args:
        first: (N, C, H, W); fastest in channels_last memory, the format of the result.
        second: (N, C, H, W).

    Returns:
        (N, 2C, H, W).
    """
    stacked = torch.stack((first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)), dim=-1)  # (N, H, W, C, 2)
    return stacked.flatten(-2).permute(0, 3, 1, 2)


def pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    """Convolution 1x1, BN, ReLU."""
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def depthwise(channels: int, *, stride: int, dilation: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Depthwise convolution 3x3 and BN, no ReLU."""
    convolution = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)
    return convolution, nn.BatchNorm2d(channels)


class ExtraDepthwise(nn.Sequential):
    """What V2* adds in front of a main branch: depthwise 3x3, BN, no ReLU. Starts as the identity.

    So V2 weights warm-start V2* with equal outputs, bit for bit. In training mode too: this BN always keeps its mean 0
    and variance 1 and learns scale and shift alone (ours), because the statistics of a batch would renormalise what
    passes and move the maps of a pretrained V2 by 22 to 37%. Its weights cannot run away: the next layers normalise.

    The paper says "an additional 3x3 depthwise convolution before the first pointwise convolution in each building
    block" and no more; BN without ReLU is how the same authors begin a branch in released code (DetNAS, `xception`).
    """

    def __init__(self, channels: int, *, dilation: int) -> None:
        convolution, norm = depthwise(channels, stride=1, dilation=dilation)
        super().__init__(convolution, norm)
        nn.init.dirac_(convolution.weight, groups=channels)
        # Normalisation divides by sqrt(running_var + eps): exactly one.
        norm.get_buffer("running_var").fill_(1 - norm.eps)

    def train(self, mode: bool = True) -> ExtraDepthwise:
        super().train(mode)
        self[1].eval()
        return self


class Unit(nn.Module):
    """Figure 3 (c): one half of the channels passes as it is, the other through the main branch.

    Units hand over their two halves before the shuffle, (N, C/2, H, W) each, so that shuffling and splitting again is
    one interleave for each half and no copy of a strided half.
    """

    def __init__(self, channels: int, *, dilation: int, extra_depthwise: bool) -> None:
        super().__init__()
        half = channels // 2
        self.extra = ExtraDepthwise(half, dilation=dilation) if extra_depthwise else nn.Identity()
        self.branch2 = nn.Sequential(
            *pointwise(half, half), *depthwise(half, stride=1, dilation=dilation), *pointwise(half, half)
        )

    def forward(self, pair: Pair) -> Pair:
        first, second = pair
        middle = first.shape[1] // 2
        kept = interleave(first[:, :middle], second[:, :middle])
        return kept, self.branch2(self.extra(interleave(first[:, middle:], second[:, middle:])))


class DownsamplingUnit(nn.Module):
    """Figure 3 (d): all channels go through both branches, and their outputs together are wider.

    Args:
        inputs: channels of the input.
        outputs: channels of the output, both branches together.
        stride: 2; 1 in a dilated stage.
        extra_depthwise: V2*; the projection begins with a depthwise convolution already.
        layout: see ShuffleNetV2.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, extra_depthwise: bool, layout: str) -> None:
        super().__init__()
        half = outputs // 2
        projected = inputs if layout == "paper" else half
        self.branch1 = nn.Sequential(*depthwise(inputs, stride=stride, dilation=1), *pointwise(inputs, projected))
        self.extra = ExtraDepthwise(inputs, dilation=1) if extra_depthwise else nn.Identity()
        self.branch2 = nn.Sequential(
            *pointwise(inputs, half),
            *depthwise(half, stride=stride, dilation=1),
            *pointwise(half, outputs - projected),
        )

    def forward(self, x: Tensor) -> Pair:
        first, second = self.branch1(x), self.branch2(self.extra(x))
        if first.shape[1] != second.shape[1]:
            first, second = torch.cat((first, second), dim=1).chunk(2, dim=1)
        return first, second


class Stage(nn.Sequential):
    """A DownsamplingUnit and the Units after it: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        pair = x
        for unit in self:
            pair = unit(pair)
        return interleave(*pair)


class ShuffleNetV2(Backbone):
    """ShuffleNet V2 up to stage 4, and with `extra_depthwise` V2*.

    Args:
        stem_channels: outputs of conv1.
        channels: outputs of stages 2, 3, 4; multiples of 4.
        repeats: units in stages 2, 3, 4.
        extra_depthwise: V2*: one more depthwise 3x3 at the start of every main branch, see ExtraDepthwise.
        layout: of the downsampling units. "torchvision": both branches give half of the outputs (public weights).
            "paper": the projection keeps its number of channels and the main branch gives the rest, as in the authors'
            code; this reproduces the published 146 / 299 / 591 M multiply-adds. Both shuffle at the end of every unit:
            the authors' code shuffles at the start of stride-1 units, which is the same up to the order of channels.
        dilate_c5: stage 4 keeps stride 16 and dilates its later 3x3 convolutions instead (setting L of Light-Head
            R-CNN): every second pixel of c5 is what it would be without.

    Raises:
        InputError: a value is outside what is stated above.
    """

    def __init__(
        self,
        *,
        stem_channels: int,
        channels: Sequence[int],
        repeats: Sequence[int],
        extra_depthwise: bool,
        layout: str,
        dilate_c5: bool,
    ) -> None:
        super().__init__()
        if len(channels) != 3 or len(repeats) != 3 or any(width % 4 for width in channels) or min(repeats) < 1:
            raise InputError(
                f"backbone: channels={list(channels)}, repeats={list(repeats)}; give three of each, "
                "channels as multiples of 4, repeats of at least 1."
            )
        if layout not in LAYOUTS:
            raise InputError(f"backbone.layout={layout!r} is unknown; there is {' and '.join(LAYOUTS)}.")
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem_channels),
        )
        # ReLU and maximum commute; in this order ReLU has a quarter of the pixels.
        self.maxpool = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU(inplace=True))
        widths = (stem_channels, *channels)

        def stage(index: int, *, dilated: bool = False) -> Stage:
            inputs, outputs = widths[index], widths[index + 1]
            first = DownsamplingUnit(
                inputs, outputs, stride=1 if dilated else 2, extra_depthwise=extra_depthwise, layout=layout
            )
            dilation = 2 if dilated else 1
            rest = (
                Unit(outputs, dilation=dilation, extra_depthwise=extra_depthwise) for _ in range(repeats[index] - 1)
            )
            return Stage(first, *rest)

        self.stage2, self.stage3, self.stage4 = stage(0), stage(1), stage(2, dilated=dilate_c5)
        self.channels = dict(zip(("c3", "c4", "c5"), channels, strict=True))
        self.strides = {"c3": 8, "c4": 16, "c5": 16 if dilate_c5 else 32}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`; the feature maps are in channels_last memory."""
        x = self.maxpool(self.conv1(images.contiguous(memory_format=torch.channels_last)))
        c3 = self.stage2(x)
        c4 = self.stage3(c3)
        return {"c3": c3, "c4": c4, "c5": self.stage4(c4)}
