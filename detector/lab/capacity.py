"""How much a detector may be able to learn, said without training it: proxies, tried in docs/search.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from detector.data.preprocess import canvas_size
from detector.data.scenes import CLASS_NAMES
from detector.lab.cost import Operation, operations
from detector.lab.space import DetectorOptions
from detector.models.backbones import build_backbone
from detector.models.build import build_network
from detector.models.fuse import fuse
from detector.models.light_head_rcnn import LightHeadRCNN

Proxy: TypeAlias = Literal["multiply_adds", "naswot"]
SIDE, IMAGES = 64, 16  # of the noise that `naswot` looks at
CLASSES = len(CLASS_NAMES)  # of the drawn data; what a class costs is little, and the same for all


class Layers(nn.Module):
    """All of a detection but decoding and suppression, which follow from values."""

    def __init__(self, network: LightHeadRCNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> object:
        network: Any = self.network
        rpn_map, head_map = network.features(images)
        proposals = images.new_zeros(len(images), network.rpn.options.test_limits.after_nms, 4)
        return network.rpn(rpn_map), network.head(network.head.thin(head_map), proposals)


def detection_operations(options: DetectorOptions) -> list[Operation]:
    """What is run, folded, for one image on its canvas; nothing is computed."""
    with torch.device("meta"):
        network = fuse(build_network(options, CLASSES))
    return operations(Layers(network), torch.empty(1, 3, *canvas(options), dtype=torch.uint8, device="meta"))


def multiply_adds(options: DetectorOptions) -> float:
    """log10 of the multiply-adds of a detection as it runs, folded, with its heads."""
    return math.log10(sum(one.multiply_adds for one in detection_operations(options)))


def naswot(options: DetectorOptions) -> float:
    """Mellor et al. 2021 (Neural Architecture Search without Training): the logarithm of the determinant of the kernel
    of IMAGES images, how many of the backbone's ReLUs agree on two of them. The size of the input does not count."""
    backbone = build_backbone(options.backbone)
    kernel = torch.zeros(IMAGES, IMAGES, dtype=torch.float64)

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        active = (output > 0).flatten(1).double()
        kernel.add_(active @ active.T + (1 - active) @ (1 - active).T)

    for layer in backbone.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(count)
    with torch.no_grad():
        backbone(torch.randn(IMAGES, 3, SIDE, SIDE))
    return float(torch.linalg.slogdet(kernel)[1])


PROXIES: dict[Proxy, Callable[[DetectorOptions], float]] = {
    "multiply_adds": multiply_adds,
    "naswot": naswot,
}
COUNTED = {"multiply_adds"}  # heads and the input count; `naswot` looks at the backbone alone


def capacity(options: DetectorOptions, proxy: Proxy) -> float:
    """The proxy of a detector; the same for the same options.

    Args:
        options: of the detector.
        proxy: its name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PROXIES[proxy](options)


def canvas(options: DetectorOptions) -> tuple[int, int]:
    """Height and width of the network's input for an image of just its sides."""
    return canvas_size([(options.input.short_side, options.input.long_side)])
