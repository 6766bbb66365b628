"""The speed tables of the ShuffleNet V2 paper: their networks and published speeds, and the units of the appendix.

Source: Ma et al. 2018 (arXiv 1807.11164), tables 7 and 8, and table 1 (a) and (b) of the appendix; on a GTX 1080 Ti,
and on one core of a Snapdragon 810, which had one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from detector.lab.controlled import BATCH, BLOCKS
from detector.models.backbones import mobilenet, shufflenet_v1, shufflenet_v2, xception
from detector.models.backbones.contract import Place

SpeedTable: TypeAlias = Literal["table8", "units", "appendix", "table7"]

# Of a family's networks at 40, 140, 300 and 500 M. Table 8 has two more of MobileNet V2, at 40 and 140 M, with inputs
# of 160 x 160 and 192 x 192; which of the two the other tables took is not said: here it is the one at 224 x 224.
_SHUFFLENET, UNIT_WIDTHS = ("0.5x", "1x", "1.5x", "2x"), (64, 128, 256)  # the units' are V2's
WIDTHS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("v2", "v1", "xception", "v2star"), _SHUFFLENET),
    "mobilenet_v2": ("0.15", "0.6", "1.0", "1.4", "0.4", "0.75"),
    "mobilenet_v1": ("0.25", "0.5", "0.75", "1.0"),
}


class Column(NamedTuple):
    """Speeds of a table on one device by network, and how many images that had at once."""

    device: str
    unit: str
    batch: int
    speeds: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Section:
    """Networks of a table that are measured together.

    Attributes:
        table, title: which.
        size: height and width of the input; None: those that a classifier's published cost belongs to.
        batches: measured here.
        gpu_batch: of the paper.
        published: by family, for each of its widths: on the GPU, then on ARM.
        gpu_eight: how many of a family's widths, from the first, had batches of eight on the GPU all the same.
    """

    table: SpeedTable
    title: str
    size: tuple[int, int] | None
    batches: tuple[int, int]
    gpu_batch: int
    published: Mapping[str, Sequence[Sequence[float]]]
    gpu_eight: int = 0

    def columns(self) -> list[Column]:
        """What the paper measured."""
        found: dict[tuple[str, str, int], dict[str, float]] = {}
        for family, devices in self.published.items():
            for arm, speeds in enumerate(devices):
                for at, (name, speed) in enumerate(zip(self._names(family), speeds, strict=False)):
                    unit = "images/s" if arm or self.table == "table7" else "batches/s"
                    batch = 1 if arm else 8 if at < self.gpu_eight else self.gpu_batch
                    device = "Snapdragon 810" if arm else "GTX 1080 Ti"
                    found.setdefault((device, unit, batch), {})[name] = speed
        return [Column(*key, found[key]) for key in sorted(found)]

    def levels(self) -> dict[str, int]:
        """The networks of the paper, and which of them cost about the same multiply-adds: those of one number."""
        return {
            name: at % 4
            for family, (speeds, *_) in self.published.items()
            for at, (name, _) in enumerate(zip(self._names(family), speeds, strict=False))
        }

    def _names(self, family: str) -> Iterator[str]:
        widths = [f"c{width}" for width in UNIT_WIDTHS] if self.table == "units" else WIDTHS[family]
        return (f"{family}_{width}" for width in widths)


_Published: TypeAlias = Mapping[str, Sequence[Sequence[float]]]
_TABLE_8: _Published = {
    "v2": ((417, 341, 255, 217), (57.0, 24.4, 11.8, 6.7)),
    "mobilenet_v1": ((502, 382, 314, 247), (36.4, 16.5, 10.6, 6.5)),
    "mobilenet_v2": ((351, 249, 180, 137, 333, 235), (33.6, 14.9, 8.9, 5.4, 33.2, 15.9)),
    "v1": ((347, 213, 164, 133), (56.8, 21.8, 10.3, 6.4)),
    "xception": ((384, 278, 219, 174), (52.9, 19.5, 10.5, 6.7)),
}
_UNITS_56: _Published = {
    "v2": ((216, 142, 81), (34.8, 12.3, 3.9)),
    "v1": ((127, 73, 45), (24.3, 9.4, 3.0)),
    "mobilenet_v2": ((89, 125, 69), (25.8, 10.0, 3.0)),
    "xception": ((185, 52, 68), (27.0, 9.7, 3.1)),
}
_UNITS_28: _Published = {
    "v2": ((407, 313, 237), (174.5, 53.4, 16.6)),
    "v1": ((298, 222, 60), (139.7, 43.9, 13.2)),
    "mobilenet_v2": ((381, 286, 189), (118.3, 46.2, 13.3)),
    "xception": ((254, 238, 169), (117.0, 45.8, 14.0)),
}
_AT_320: _Published = {
    "v2": ((315, 525, 474, 422), (28.1, 12.5, 6.1, 3.4)),
    "v1": ((236, 414, 344, 275), (27.2, 11.4, 5.1, 3.1)),
    "mobilenet_v2": ((187, 460, 389, 335), (11.4, 6.4, 4.6, 2.7)),
    "xception": ((279, 463, 408, 350), (31.1, 10.1, 5.6, 3.5)),
}
_AT_640: _Published = {
    "v2": ((424, 394, 297, 250), (9.3, 4.0, 1.9, 1.1)),
    "v1": ((396, 269, 198, 156), (8.0, 3.7, 1.6, 1.0)),
    "mobilenet_v2": ((338, 248, 208, 165), (3.8, 2.0, 1.4, 0.8)),
    "xception": ((399, 326, 244, 209), (9.6, 3.2, 1.7, 1.1)),
}
_AT_1080: _Published = {
    "v2": ((248, 197, 141, 115), (3.5, 1.5, 0.7, 0.4)),
    "v1": ((203, 131, 96, 77), (2.9, 1.4, 0.4, 0.3)),
    "mobilenet_v2": ((159, 117, 99, 78), (1.4, 0.7, 0.3, 0.3)),
    "xception": ((232, 160, 124, 106), (3.6, 1.2, 0.5, 0.4)),
}
_TABLE_7: _Published = {
    "xception": ((178, 131, 101, 83),),
    "v1": ((152, 85, 76, 60),),
    "mobilenet_v2": ((146, 111, 94, 72),),
    "v2": ((188, 146, 109, 87),),
    "v2star": ((183, 138, 105, 83),),
}
_A, _B = "Appendix, table 1 (a): classifiers at", "Appendix, table 1 (b): 10 units on a map of"
SECTIONS = (
    Section("table8", "Table 8: ImageNet classifiers", None, (1, 8), 8, _TABLE_8),
    # How many images the GPU had, the paper does not say.
    Section("units", f"{_B} 56 x 56", (56, 56), (1, 8), BATCH["cuda"], _UNITS_56),
    Section("units", f"{_B} 28 x 28", (28, 28), (1, 8), BATCH["cuda"], _UNITS_28),
    Section("appendix", f"{_A} 320 x 320", (320, 320), (1, 8), 1, _AT_320, gpu_eight=1),
    Section("appendix", f"{_A} 640 x 480", (480, 640), (1, 8), 1, _AT_640),
    Section("appendix", f"{_A} 1080 x 720", (720, 1080), (1, 8), 1, _AT_1080),
    Section("table7", "Table 7: Light-Head R-CNN at 1200 x 800", (800, 1200), (1, 4), 4, _TABLE_7),
)

# A unit of stride 1: its multiply-adds for each cell of the map, by its channels, and what makes it.
_UNITS: Mapping[str, tuple[Callable[[int], int], Callable[[Place], nn.Module]]] = {
    "v2": (
        lambda c: c * c // 2 + 9 * c // 2,
        lambda place: shufflenet_v2.Unit(place, shufflenet_v2.ShuffleNetV2Options()),
    ),
    "v1": (  # three groups
        lambda c: 2 * c * (m := c // 4 // 3 * 3) // 3 + 9 * m,
        lambda place: shufflenet_v1.Unit(place, shufflenet_v1.ShuffleNetV1Options()),
    ),
    "mobilenet_v2": (
        lambda c: 12 * c * c + 54 * c,
        lambda place: mobilenet.InvertedResidual(place, 6, "relu6"),
    ),
    "xception": (
        lambda c: 2 * c * (m := c // 6) + m * m + 9 * c + 18 * m,
        lambda place: xception.Block(place, 6),
    ),
}


class Units(nn.Sequential):
    """Units of stride 1: (N, C, H, W) -> the same shape. V2's shuffle when they begin: as often as there are units."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = isinstance(self[0], shufflenet_v2.Unit)
        y: Any = x.chunk(2, dim=1) if pairs else x
        for unit in self:
            y = unit(y)
        return torch.cat(y, dim=1) if pairs else y


def build_units(name: str) -> tuple[Units, int]:
    """A stack of table 1 (b) of the appendix, "v1_c64", with random weights, and its channels.

    Channels are those whose multiply-adds come closest to those of V2's unit of this width; the paper says no more than
    that FLOPs are equal.
    """
    family, _, width = name.rpartition("_c")
    cost, make = _UNITS[family]
    target, step = _UNITS["v2"][0](int(width)), {"v2": 2, "v1": 3}.get(family, 1)
    channels = min(range(12, 4 * int(width), step), key=lambda channels: abs(cost(channels) - target))
    place = Place("stage2", False, channels, channels, 1, 1)
    return Units(*(make(place) for _ in range(BLOCKS))), channels
