"""ShuffleNet V1's ablations in small: one frame, other units in it, equal multiply-adds; and what the paper found.

Source: Zhang et al. 2018 (ShuffleNet V1, arXiv 1707.01083), sections 4.1 and 4.2, tables 2 to 4: the units of stages 2
to 4 are replaced, then the channels adapted so that the complexity stays. The frame here is the shallow one of table 5,
half of table 1's units, on images of 64 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from detector.lab.cost import multiply_adds
from detector.models.backbones.classifier import ImageClassifier
from detector.models.backbones.contract import Backbone, ClassifierOptions, Place
from detector.models.backbones.shufflenet_v1 import ShuffleNetV1, ShuffleNetV1Options
from detector.models.layers import conv_bn, pooled_stem

SIDE = 64  # pixels of the crops
STEM = 24  # channels, table 1; a multiple of every number of groups
REPEATS = (2, 4, 2)
CLASSES = 8  # of the crops
# Multiply-adds of an image. Chosen by this project: seconds an epoch, and a number that all units come near to.
COST = 2.5e6


class Trunk(Backbone):
    """Units of another family between the stem and the stages' proportions of ShuffleNet V1.

    Args:
        unit: makes one.
        width: channels of the first stage; the others have twice and four times as many.
    """

    def __init__(self, unit: Callable[[Place], nn.Module], width: int) -> None:
        super().__init__()
        self.stem = pooled_stem(STEM)
        self.add_stages(("stem",), (STEM, width, 2 * width, 4 * width), REPEATS, unit)


def vgg_unit(place: Place) -> nn.Module:
    """Two 3x3 convolutions, each with BN and ReLU; no shortcut (section 4.2)."""
    return nn.Sequential(
        *conv_bn(place.inputs, place.outputs, 3, "relu", stride=place.stride),
        *conv_bn(place.outputs, place.outputs, 3, "relu"),
    )


def bottleneck_unit(place: Place, groups: int, base_width: int) -> nn.Module:
    """torchvision's bottleneck; where a stage begins, its shortcut is a 1x1 convolution with BN.

    Args:
        groups, base_width: outputs * base_width / 256, rounded down, are the channels in each group of the 3x3
            convolution. 1 and 64: ResNet's bottleneck of 1/4; 16 and 8: ResNeXt's of 1/2 (section 4.2).
    """
    shortcut = conv_bn(place.inputs, place.outputs, stride=place.stride) if place.first else None
    planes = place.outputs // Bottleneck.expansion
    return Bottleneck(place.inputs, planes, place.stride, shortcut, groups, base_width)


def shufflenet(width: int, groups: int, shuffle: bool = True) -> Backbone:
    """ShuffleNet V1 in this frame."""
    channels = (width, 2 * width, 4 * width)
    shape: Any = {"groups": groups, "channels": channels, "stem_channels": STEM, "repeats": REPEATS}
    return ShuffleNetV1(ShuffleNetV1Options(shuffle=shuffle, **shape))


GROUPS = {1: 82, 2: 112, 3: 135, 4: 156, 8: 216}  # and the width of ShuffleNet with so many
# Name -> network of a first stage's width, and the width with which its cost comes nearest to COST.
NETWORKS: Mapping[str, tuple[Callable[[int], Backbone], int]] = {
    **{f"g={g}": (partial(shufflenet, groups=g), width) for g, width in GROUPS.items()},
    **{f"g={g}, no shuffle": (partial(shufflenet, groups=g, shuffle=False), GROUPS[g]) for g in (3, 8)},
    "ResNet": (partial(Trunk, partial(bottleneck_unit, groups=1, base_width=64)), 52),
    "ResNeXt": (partial(Trunk, partial(bottleneck_unit, groups=16, base_width=8)), 52),
    "VGG-like": (partial(Trunk, vgg_unit), 14),
}


def build(name: str, num_classes: int = CLASSES) -> nn.Module:
    """Images (N, 3, H, W) -> logits (N, num_classes): one of NETWORKS, with random weights."""
    make, width = NETWORKS[name]
    return ImageClassifier(make(width), num_classes, ClassifierOptions())


@cache
def cost(name: str) -> int:
    """Multiply-adds of one image of SIDE pixels."""
    with torch.device("meta"):
        return multiply_adds(build(name), torch.empty(1, 3, SIDE, SIDE))


@dataclass(frozen=True)
class Row:
    """One network of a table.

    Attributes:
        name: in the table.
        network: of NETWORKS.
        published: top-1 error on ImageNet in percent at PUBLISHED_SIZES; None: not given.
        base: the network that it is compared with; None where it is the base of others.
    """

    name: str
    network: str
    published: tuple[float | None, float | None, float | None]
    base: str | None = None


@dataclass(frozen=True)
class Table:
    """An ablation.

    Attributes:
        title, claim: the paper's.
        rows: as in the paper, from the one that the others are compared with.
        sign: of the differences to the base that the claim foretells.
    """

    title: str
    claim: str
    rows: tuple[Row, ...]
    sign: Literal[-1, 1]


What: TypeAlias = Literal["groups", "shuffle", "units"]
PUBLISHED_SIZES = ("1x, 140 M", "0.5x, 38 M", "0.25x, 13 M")
TABLES: Mapping[What, Table] = {
    "groups": Table(
        "Groups (table 2)",
        "networks with groups (g > 1) have a lower error than the one without (g = 1)",
        (
            Row("g=1", "g=1", (33.6, 45.1, 57.1)),
            Row("g=2", "g=2", (32.7, 44.4, 56.8), "g=1"),
            Row("g=3", "g=3", (32.6, 43.2, 55.0), "g=1"),
            Row("g=4", "g=4", (32.8, 41.6, 54.2), "g=1"),
            Row("g=8", "g=8", (32.4, 42.3, 52.7), "g=1"),
        ),
        -1,
    ),
    "shuffle": Table(
        "Channel shuffle (table 3)",
        "networks with channel shuffle have a lower error than those without",
        (
            Row("g=3, no shuffle", "g=3, no shuffle", (34.5, 45.7, 56.3)),
            Row("g=3, shuffle", "g=3", (32.6, 43.2, 55.0), "g=3, no shuffle"),
            Row("g=8, no shuffle", "g=8, no shuffle", (37.6, 48.1, 56.5)),
            Row("g=8, shuffle", "g=8", (32.4, 42.3, 52.7), "g=8, no shuffle"),
        ),
        -1,
    ),
    "units": Table(
        "Units (table 4)",
        "networks of other units have a higher error than ShuffleNet",
        (
            Row("ShuffleNet, g=8", "g=8", (32.4, 41.6, 52.7)),  # the paper's has 4 groups at 0.5x
            Row("Xception-like, g=1", "g=1", (33.6, 45.1, 57.1), "g=8"),
            Row("ResNeXt", "ResNeXt", (33.3, 46.0, 65.2), "g=8"),
            Row("ResNet", "ResNet", (37.3, 48.8, 63.7), "g=8"),
            Row("VGG-like", "VGG-like", (50.7, None, None), "g=8"),
        ),
        1,
    ),
}
