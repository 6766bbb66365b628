"""MobileNet V1 (Howard et al. 2017, table 1) and V2 (Sandler et al. 2018, table 2)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.backbones.contract import Backbone, BackboneOptions, ClassifierOptions
from detector.models.backbones.layers import Activation, activation_layer, depthwise, pointwise
from detector.options import Count, Flag, Positive

# Outputs of the separable convolutions of each stage; the first of a stage has the stride, except at stride 2.
V1_STAGES = ((64, 128, 128), (256, 256), (512,) * 6, (1024, 1024))
# Expansion, outputs, blocks, stride of the first block: table 2 of V2, in its letters t, c, n, s.
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
V2_ENDS = {6: "c3", 13: "c4", 17: "c5"}  # blocks after which the stride changes, or all ends


def _stem(outputs: int, activation: Activation) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        activation_layer(activation),
    )


def _separable(inputs: int, outputs: int, activation: Activation, *, stride: int, dilation: int) -> nn.Sequential:
    """Howard et al. 2017, figure 3: depthwise 3x3 and 1x1, each with BN and an activation."""
    return nn.Sequential(
        *depthwise(inputs, stride=stride, dilation=dilation),
        activation_layer(activation),
        *pointwise(inputs, outputs, activation),
    )


class MobileNetV1Options(BackboneOptions):
    """The defaults are MobileNet V1 1.0 (Howard et al. 2017, table 1)."""

    name: Literal["mobilenet_v1"] = "mobilenet_v1"
    width: Positive = 1.0
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

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential

    def __init__(self, options: MobileNetV1Options) -> None:
        super().__init__()
        width, activation, dilate_c5 = options.width, options.activation, options.dilate_c5
        inputs = int(32 * width)
        self.conv1 = _stem(inputs, activation)
        for number, outputs in enumerate(V1_STAGES, start=1):
            dilated = dilate_c5 and number == 4
            layers = []
            for place, channels in enumerate(outputs):
                # Stage 1 begins at stride 2 and goes to stride 4 with its second layer.
                stride = 2 if place == (1 if number == 1 else 0) and not dilated else 1
                dilation = 2 if dilated and place else 1
                layers.append(_separable(inputs, int(channels * width), activation, stride=stride, dilation=dilation))
                inputs = int(channels * width)
            self.add_module(f"stage{number}", nn.Sequential(*layers))
        self.channels = {"c3": int(256 * width), "c4": int(512 * width), "c5": int(1024 * width)}
        self.strides = {"c3": 8, "c4": 16, "c5": 16 if dilate_c5 else 32}
        self.stages = (("conv1", "stage1"), ("stage2",), ("stage3",), ("stage4",))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        x = self.conv1(images.contiguous(memory_format=torch.channels_last))
        c3 = self.stage2(self.stage1(x))
        c4 = self.stage3(c3)
        return {"c3": c3, "c4": c4, "c5": self.stage4(c4)}


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, figure 4: 1x1 that widens, depthwise 3x3, 1x1 without activation.

    Args:
        inputs, outputs: channels.
        expansion: channels of the depthwise convolution over those of the input; 1: there is no first 1x1.
        stride, dilation: of the depthwise convolution.
        shortcut: the input is added where it has as many channels as the output; false where the network's stride
            changes, also if the stage is dilated instead.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        expansion: int,
        stride: int,
        dilation: int,
        shortcut: bool,
        activation: Activation,
    ) -> None:
        super().__init__()
        middle = inputs * expansion
        widen = [nn.Sequential(*pointwise(inputs, middle, activation))] if expansion > 1 else []
        self.conv = nn.Sequential(
            *widen,
            nn.Sequential(*depthwise(middle, stride=stride, dilation=dilation), activation_layer(activation)),
            *pointwise(middle, outputs, None),
        )
        self.residual = shortcut and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2Options(BackboneOptions):
    """The defaults are MobileNet V2 1.0 (Sandler et al. 2018, table 2)."""

    name: Literal["mobilenet_v2"] = "mobilenet_v2"
    width: Positive = 1.0
    """Times the channels of table 2."""
    multiple_of: Count = 8
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
        super().__init__()
        width, multiple_of, dilate_c5 = options.width, options.multiple_of, options.dilate_c5
        activation = options.activation
        inputs = rounded_channels(32 * width, multiple_of)
        features: list[nn.Module] = [_stem(inputs, activation)]
        ends: list[int] = []  # outputs of every row of table 2
        for expansion, channels, count, stride in V2_STAGES:
            scaled = channels != 320 or options.scale_last
            outputs = rounded_channels(channels * width, multiple_of) if scaled else channels
            for number in range(count):
                strided = stride == 2 and number == 0
                dilated = dilate_c5 and channels >= 160
                features.append(
                    InvertedResidual(
                        inputs, outputs, expansion=expansion, stride=2 if strided and not dilated else 1,
                        dilation=2 if dilated and not strided else 1, shortcut=not strided, activation=activation,
                    )
                )  # fmt: skip
                inputs = outputs
            ends.append(outputs)
        self.features = nn.Sequential(*features)
        self.channels = {"c3": ends[2], "c4": ends[4], "c5": ends[6]}
        self.strides = {"c3": 8, "c4": 16, "c5": 16 if dilate_c5 else 32}
        parts = [f"features.{number}" for number in range(len(features))]
        self.stages = (parts[:4], parts[4:7], parts[7:14], parts[14:])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        x = images.contiguous(memory_format=torch.channels_last)
        maps = {}
        for number, block in enumerate(self.features):
            x = block(x)
            if number in V2_ENDS:
                maps[V2_ENDS[number]] = x
        return maps


def rounded_channels(channels: float, multiple_of: int) -> int:
    """The nearest multiple, at least one; the next one where that is less than nine tenths of `channels`."""
    nearest = max(multiple_of, int(channels + multiple_of / 2) // multiple_of * multiple_of)
    return nearest + multiple_of if nearest < 0.9 * channels else nearest
