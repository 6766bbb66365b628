"""The controlled experiments behind the four guidelines: equal multiply-adds, different memory access and parallelism.

Source: Ma et al. 2018 (ShuffleNet V2, arXiv 1807.11164), section 2, tables 1 to 4, and figure 1 of the appendix: stacks
on a 56 x 56 map, on a GTX 1080 Ti (batches a second) and on one core of a Snapdragon 810 (images a second).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Guideline: TypeAlias = Literal["g1", "g2", "g3", "g4"]
Device: TypeAlias = Literal["cpu", "cuda"]

SIDE = 56  # of the map, tables 1 to 3; table 4 does not say, its blocks are those of the same stage
BLOCKS = 10
# Images at once. One on ARM. The paper gives batches a second on the GPU without their size; eight is that of table 8.
BATCH: Mapping[Device, int] = {"cpu": 1, "cuda": 8}
COLUMNS = ("x1", "x2", "x4")

TITLES: Mapping[Guideline, str] = {
    "g1": "G1: equal channel width minimizes memory access cost (table 1)",
    "g2": "G2: excessive group convolution increases memory access cost (table 2)",
    "g3": "G3: network fragmentation reduces the degree of parallelism (table 3)",
    "g4": "G4: element-wise operations are non-negligible (table 4)",
}


@dataclass(frozen=True)
class Stack:
    """What one row of a table is made of, but for its widths.

    Attributes:
        name: of the row, as in the paper.
        layers: one after the other.
        parallel: convolutions side by side in each layer, whose outputs are added.
        groups: of each convolution.
        relu, shortcut: table 4 alone; the layers are bottleneck units there.
    """

    name: str
    layers: int
    parallel: int = 1
    groups: int = 1
    relu: bool = False
    shortcut: bool = False
    bottleneck: bool = False

    def multiply_adds(self, widths: tuple[int, int]) -> int:
        """For each cell of the map."""
        first, second = widths
        if self.bottleneck:
            return self.layers * (2 * first * second + 9 * second**2)
        return self.layers * self.parallel * first * second // self.groups

    def build(self, widths: tuple[int, int]) -> nn.Module:
        """With random weights, in evaluation mode; takes (N, widths[0], H, W)."""
        if self.bottleneck:
            return nn.Sequential(*(Bottleneck(*widths, self) for _ in range(self.layers))).eval()
        sides = itertools.islice(itertools.cycle((widths, widths[::-1])), self.layers)
        return nn.Sequential(*(Layer(*side, self) for side in sides)).eval()


class Layer(nn.Module):
    """1x1 convolutions side by side, added. With a bias, as a convolution has whose normalisation is folded."""

    def __init__(self, in_channels: int, out_channels: int, stack: Stack) -> None:
        super().__init__()
        convs = (nn.Conv2d(in_channels, out_channels, 1, groups=stack.groups) for _ in range(stack.parallel))
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (conv(x) for conv in self.convs)
        for other in others:
            first = first + other
        return first


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (He et al. 2015), with ReLU and shortcut as the row says."""

    def __init__(self, channels: int, inner: int, stack: Stack) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            (nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, inner, 3, padding=1), nn.Conv2d(inner, channels, 1))
        )
        self.relu, self.shortcut = stack.relu, stack.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for place, conv in enumerate(self.convs):
            y = conv(y)
            if self.shortcut and place == 2:
                y = y + x
            if self.relu:
                y = torch.relu(y)
        return y


ROWS: Mapping[Guideline, tuple[Stack, ...]] = {
    "g1": tuple(Stack(name, 2 * BLOCKS) for name in ("1:1", "1:2", "1:6", "1:12")),
    "g2": tuple(Stack(f"g={groups}", BLOCKS, groups=groups) for groups in (1, 2, 4, 8)),
    "g3": (
        Stack("1-fragment", BLOCKS),
        Stack("2-fragment-series", 2 * BLOCKS),
        Stack("4-fragment-series", 4 * BLOCKS),
        Stack("2-fragment-parallel", BLOCKS, parallel=2),
        Stack("4-fragment-parallel", BLOCKS, parallel=4),
    ),
    # From the best row to the worst, as in the other tables; the paper lists them the other way round.
    "g4": tuple(
        Stack(name, BLOCKS, relu=relu, shortcut=shortcut, bottleneck=True)
        for name, relu, shortcut in (
            ("neither", False, False),
            ("shortcut", False, True),
            ("ReLU", True, False),
            ("ReLU and shortcut", True, True),
        )
    ),
}

# Widths in column x1, by row. Of table 3 the paper gives the widths of its first row; those of the others follow from
# equal multiply-adds. Table 4 gives the channels of the unit; the bottleneck's quarter is that of He et al. 2015.
_WIDTHS: Mapping[Device, Mapping[Guideline, Sequence[tuple[int, int]]]] = {
    "cpu": {
        "g1": ((32, 32), (22, 44), (13, 78), (9, 108)),
        "g2": ((64, 64), (90, 90), (128, 128), (180, 180)),
        "g3": ((64, 64),),
        "g4": ((32, 8),) * 4,
    },
    "cuda": {
        "g1": ((128, 128), (90, 180), (52, 312), (36, 432)),
        "g2": ((128, 128), (180, 180), (256, 256), (360, 360)),
        "g3": ((128, 128),),
        "g4": ((32, 8),) * 4,
    },
}

# Tables 1 to 4: a line for each row, columns x1, x2, x4. ARM: images a second; GPU: batches a second.
PUBLISHED: Mapping[str, Mapping[Guideline, Sequence[tuple[float, float, float]]]] = {
    "GTX 1080 Ti": {
        "g1": ((1480, 723, 232), (1296, 586, 206), (876, 489, 189), (748, 392, 163)),
        "g2": ((2451, 1289, 437), (1725, 873, 341), (1026, 644, 338), (634, 445, 230)),
        "g3": ((2446, 1274, 434), (1790, 909, 336), (752, 745, 349), (1537, 803, 320), (691, 572, 292)),
        "g4": ((2842, 2376, 1782), (2672, 2121, 1458), (2647, 2256, 1735), (2427, 2066, 1436)),
    },
    "Snapdragon 810": {
        "g1": ((76.2, 21.7, 5.3), (72.9, 20.5, 5.1), (69.1, 17.9, 4.6), (57.6, 15.1, 4.4)),
        "g2": ((40.0, 10.2, 2.3), (35.0, 9.5, 2.2), (32.9, 8.7, 2.1), (27.8, 7.5, 1.8)),
        "g3": ((40.2, 10.1, 2.3), (38.6, 10.1, 2.2), (38.4, 10.1, 2.3), (33.4, 9.1, 2.2), (35.0, 8.4, 2.1)),
        "g4": ((66.3, 20.2, 5.4), (57.3, 18.2, 5.1), (61.9, 18.8, 5.2), (56.7, 16.9, 5.0)),
    },
}
PUBLISHED_UNITS = {"GTX 1080 Ti": "batches/s", "Snapdragon 810": "images/s"}


@dataclass(frozen=True)
class Cell:
    """One network of a table.

    Attributes:
        stack: what it is made of.
        column: x1, x2 or x4, the multiple of the widths.
        widths: channels of its layers, which take turns; of a bottleneck outer and inner ones.
        published: name of a device -> speed there in the paper, see PUBLISHED_UNITS.
    """

    stack: Stack
    column: str
    widths: tuple[int, int]
    published: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.stack.name}, {self.column}"

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        return SIDE**2 * self.stack.multiply_adds(self.widths)

    @property
    def memory_access(self) -> int:
        """Values that its 1x1 convolutions read and write: hw(c1 + c2) + c1 c2 / g each (section 2, G1 and G2)."""
        first, second = self.widths
        one = SIDE**2 * (first + second) + first * second // self.stack.groups
        return self.stack.layers * self.stack.parallel * one

    @property
    def memory_access_bound(self) -> float:
        """The least that dense 1x1 convolutions of these multiply-adds can: 2 sqrt(hw B) + B / hw each (section 2)."""
        convs = self.stack.layers * self.stack.parallel
        cost = self.multiply_adds / convs
        return convs * (2 * math.sqrt(SIDE**2 * cost) + cost / SIDE**2)


def cells(guideline: Guideline, device: Device, *, equal: bool = False) -> list[Cell]:
    """A table of the paper, row by row.

    Args:
        guideline: which table.
        device: whose widths: the paper used wider networks on the GPU.
        equal: change the widths a little, so that the multiply-adds of a column lie within EQUAL of the first row's;
            the paper's differ by up to 5.5% in table 1, 1 to 2% elsewhere.
    """
    rows, found = ROWS[guideline], []
    for at, column in enumerate(COLUMNS):
        widths = list(_paper_widths(guideline, device, 2**at))
        if equal:
            cost = rows[0].multiply_adds(widths[0])
            widths = [_equalised(stack, pair, cost) for stack, pair in zip(rows, widths, strict=True)]
        for row, (stack, pair) in enumerate(zip(rows, widths, strict=True)):
            published = {name: tables[guideline][row][at] for name, tables in PUBLISHED.items()}
            found.append(Cell(stack, column, pair, published))
    return sorted(found, key=lambda cell: rows.index(cell.stack))


def spread(column: Sequence[Cell]) -> float:
    """How far the multiply-adds of cells lie apart: one minus the smallest over the largest."""
    costs = [cell.multiply_adds for cell in column]
    return 1 - min(costs) / max(costs)


def _paper_widths(guideline: Guideline, device: Device, multiple: int) -> Iterator[tuple[int, int]]:
    given = _WIDTHS[device][guideline]
    for row, stack in enumerate(ROWS[guideline]):
        if guideline == "g3":
            width = round(multiple * given[0][0] / math.sqrt(stack.layers * stack.parallel / BLOCKS))
            yield width, width
        else:
            first, second = (multiple * width for width in given[row])
            # 8 groups do not divide the 180 channels of table 2's last row: 176 and 184 take turns.
            rest = first % stack.groups
            yield first - rest, second + (stack.groups - rest if rest else 0)


EQUAL = 0.005
_REACH = 8  # steps that a width may move


def _equalised(stack: Stack, widths: tuple[int, int], cost: int) -> tuple[int, int]:
    """The widths nearest to the given ones whose multiply-adds lie within EQUAL of `cost`."""
    step = stack.groups
    ranges = [range(max(width - _REACH * step, step), width + _REACH * step + 1, step) for width in widths]
    pairs = [(first, second) for first in ranges[0] for second in ranges[1]]
    return min(
        (pair for pair in pairs if abs(stack.multiply_adds(pair) / cost - 1) <= EQUAL),
        key=lambda pair: sum(abs(math.log(new / old)) for new, old in zip(pair, widths, strict=True)),
    )
