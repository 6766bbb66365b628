"""Layers that more than one family is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

Activation = Literal["relu", "relu6", "leaky_relu", "hard_swish"]
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "relu6": partial(nn.ReLU6, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, 0.1, inplace=True),  # NanoDet's slope
    "hard_swish": partial(nn.Hardswish, inplace=True),
}


def activation_layer(name: Activation) -> nn.Module:
    """The activation of this name."""
    return ACTIVATIONS[name]()


def pointwise(inputs: int, outputs: int, activation: Activation | None = "relu", *, groups: int = 1) -> list[nn.Module]:
    """Convolution 1x1, BN, and the activation unless it is None."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return layers if activation is None else [*layers, activation_layer(activation)]


def depthwise(channels: int, *, stride: int, dilation: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Depthwise convolution 3x3 and BN, no activation."""
    convolution = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)
    return convolution, nn.BatchNorm2d(channels)


def pooled_stem(outputs: int) -> nn.Sequential:
    """Image (N, 3, H, W) -> (N, outputs, H / 4, W / 4): convolution 3x3 and maximum 3x3, both of stride 2.

    Convolution, BN, ReLU and maximum, as in every paper; the last two commute, and in this order the ReLU has a quarter
    of the pixels.
    """
    return nn.Sequential(
        nn.Conv2d(3, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.MaxPool2d(3, stride=2, padding=1),
        activation_layer("relu"),
    )
