"""Layers that more than one part is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.types import Strict
from torch import nn
from torchvision.ops import Conv2dNormActivation

# No layer has more, and a damaged number in a file must not take all memory.
Channels = Annotated[int, Strict(), Field(ge=1), Field(le=2**16)]
Width = Annotated[float, Strict(), Field(gt=0), Field(le=64)]
"""Times the channels of a paper's table."""
Activation = Literal["relu", "relu6", "leaky_relu", "hard_swish"]
ACTIVATIONS: dict[Activation, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": partial(nn.LeakyReLU, 0.1),  # NanoDet's slope
    "hard_swish": nn.Hardswish,
}


def activation_layer(name: Activation) -> nn.Module:
    """The activation of this name."""
    return ACTIVATIONS[name](inplace=True)


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, activation: Activation | None = None, **shape: int
) -> nn.Sequential:
    """Convolution, BN, and the activation where one is named; a map of stride 1 keeps its size.

    A part of a longer chain is unpacked there: `nn.Sequential(*conv_bn(...), *conv_bn(...))`.

    Args:
        shape: stride, dilation, groups.
    """
    layer = None if activation is None else ACTIVATIONS[activation]
    return Conv2dNormActivation(inputs, outputs, kernel, activation_layer=layer, **shape)


def depthwise(channels: int, kernel: int = 3, activation: Activation | None = None, **shape: int) -> nn.Sequential:
    """Depthwise convolution and BN, and the activation where one is named; `shape`: stride, dilation."""
    return conv_bn(channels, channels, kernel, activation, groups=channels, **shape)


def pooled_stem(outputs: int) -> nn.Sequential:
    """Image (N, 3, H, W) -> (N, outputs, H / 4, W / 4): convolution 3x3 and maximum 3x3, both of stride 2.

    Convolution, BN, ReLU and maximum, as in every paper; the last two commute, and in this order the ReLU has a quarter
    of the pixels.
    """
    return nn.Sequential(
        *conv_bn(3, outputs, 3, stride=2), nn.MaxPool2d(3, stride=2, padding=1), activation_layer("relu")
    )


def draw_small(layer: Any, std: float) -> None:
    """Let a convolution or a fully connected layer start near zero: N(0, std), no bias."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
