"""MobileNet V1 (Howard et al. 2017, table 1) and V2 (Sandler et al. 2018, table 2)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.backbones.contract import Backbone, BackboneOptions, ClassifierOptions, Place
from detector.models.layers import Activation, Channels, Width, conv_bn, depthwise
from detector.options import Flag

# Expansion, outputs, blocks, stride of the first block: table 2 of V2, in its letters t, c, n, s.
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def separable(inputs: int, outputs: int, activation: Activation, **shape: int) -> nn.Sequential:
    """Howard et al. 2017, figure 3: depthwise 3x3 (`shape`: stride, dilation) and 1x1, each with BN and activation."""
    return nn.Sequential(
        *depthwise(inputs, activation=activation, **shape), *conv_bn(inputs, outputs, activation=activation)
    )


class MobileNetV1Options(BackboneOptions):
    """The defaults are MobileNet V1 1.0 (Howard et al. 2017, table 1)."""

    name: Literal["mobilenet_v1"] = "mobilenet_v1"
    width: Width = 1.0
    """Times the channels of table 1 (the paper's alpha); the products must be whole numbers."""
    activation: Activation = "relu"
    """relu (section 3.2); the authors' later code has relu6."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 32 * self.width != int(32 * self.width):
            raise InputError(f"backbone.width={self.width}: 32 x {self.width} channels is no whole number.")
        return self


class MobileNetV1(Backbone):
    """MobileNet V1 without the classifier. Convolutions start as torch's do.

    dilate_c5: every second pixel of c5 is what it would be without.
    """

    def __init__(self, options: MobileNetV1Options) -> None:
        super().__init__(dilate_c5=options.dilate_c5)
        activation = options.activation
        first, *widths = (int(channels * options.width) for channels in (32, 64, 128, 256, 512, 1024))
        self.conv1 = conv_bn(3, first, 3, activation, stride=2)
        self.stage1 = nn.Sequential(
            separable(first, widths[0], activation),
            separable(widths[0], widths[1], activation, stride=2),
            separable(widths[1], widths[1], activation),
        )

        def unit(place: Place) -> nn.Module:
            shape = {"stride": place.stride, "dilation": place.dilation}
            return separable(place.inputs, place.outputs, activation, **shape)

        self.add_stages(("conv1", "stage1"), widths[1:], (2, 6, 2), unit)


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, figure 4: 1x1 that widens, depthwise 3x3, 1x1 without activation.

    The input is added where it has as many channels as the output, but not where the network's stride changes, also if
    the stage is dilated instead.

    Args:
        expansion: channels of the depthwise convolution over those of the input; 1: there is no first 1x1.
    """

    def __init__(self, place: Place, expansion: int, activation: Activation) -> None:
        super().__init__()
        middle = place.inputs * expansion
        self.conv = nn.Sequential(
            *([conv_bn(place.inputs, middle, activation=activation)] if expansion > 1 else []),
            depthwise(middle, activation=activation, stride=place.stride, dilation=place.dilation),
            *conv_bn(middle, place.outputs),
        )
        self.residual = place.inputs == place.outputs and not place.first

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2Options(BackboneOptions):
    """The defaults are MobileNet V2 1.0 (Sandler et al. 2018, table 2)."""

    name: Literal["mobilenet_v2"] = "mobilenet_v2"
    width: Width = 1.0
    """Times the channels of table 2."""
    multiple_of: Channels = 8
    """Channels are rounded to the nearest multiple, upwards where that would lose over a tenth (authors' code: 8)."""
    scale_last: Flag = True
    """c5 has 320 channels times the width (authors' code); false: 320 at every width, see MobileNetV2."""
    activation: Activation = "relu6"
    """relu6 (section 4)."""
    classifier: ClassifierOptions | None = ClassifierOptions(conv5_channels=1280, activation="relu6", dropout=0.2)
    """On top, for pre-training and for published costs (table 2; dropout: torchvision's)."""


class MobileNetV2(Backbone):
    """MobileNet V2 up to its last block. Module names are torchvision's; convolutions start as torch's do.

    The last convolution (1280 outputs) is conv5 of the classifier. c4 is the last map of stride 16 (96 channels).

    With scale_last=false and multiples of 4, the costs that Ma et al. 2018, table 8, print for widths below 1 come out
    within 2.2% (0.15: 39, 0.4 at 160 x 160: 43, 0.6: 141, 0.75 at 192 x 192: 145 M); torchvision's rule gives 31, 42,
    151, 154 M.

    dilate_c5: every second pixel of c5 is what it would be without.
    """

    def __init__(self, options: MobileNetV2Options) -> None:
        super().__init__(dilate_c5=options.dilate_c5)
        width, multiple_of, activation = options.width, options.multiple_of, options.activation
        inputs = rounded_channels(32 * width, multiple_of)
        features: list[nn.Module] = [conv_bn(3, inputs, 3, activation, stride=2)]
        ends: list[int] = []  # outputs of every row of table 2
        for expansion, channels, count, stride in V2_STAGES:
            scaled = channels != 320 or options.scale_last
            outputs = rounded_channels(channels * width, multiple_of) if scaled else channels
            dilated = options.dilate_c5 and channels >= 160
            for number in range(count):
                first = stride == 2 and number == 0  # of a stage: a row of stride 1 goes on with the one before
                shape = (1, 1 if first else 2) if dilated else (2 if first else 1, 1)
                place = Place("features", first, inputs, outputs, *shape)
                features.append(InvertedResidual(place, expansion, activation))
                inputs = outputs
            ends.append(outputs)
        self.features = nn.Sequential(*features)
        self.channels = {"c3": ends[2], "c4": ends[4], "c5": ends[6]}
        parts = [f"features.{number}" for number in range(len(features))]
        self.stages = (parts[:4], parts[4:7], parts[7:14], parts[14:])


def rounded_channels(channels: float, multiple_of: int) -> int:
    """The nearest multiple, at least one; the next one where that is less than nine tenths of `channels`."""
    nearest = max(multiple_of, int(channels + multiple_of / 2) // multiple_of * multiple_of)
    return nearest + multiple_of if nearest < 0.9 * channels else nearest
