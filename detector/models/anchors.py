"""Anchors: boxes of fixed sizes and shapes, centred on every cell of a feature map (Ren et al. 2015, section 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Sizes of map whose anchors are kept: a camera has one, a folder of photographs a few after padding to multiples of 32.
SIZES_KEPT = 8


def anchor_sizes(scales: Sequence[float], ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Width and height in pixels of each anchor of a cell; see AnchorGrid."""
    return [(scale * ratio**-0.5, scale * ratio**0.5) for scale in scales for ratio in ratios]


class AnchorGrid(nn.Module):
    """Makes one anchor tensor for a feature map; the same for every image of a batch.

    Args:
        scales: square roots of the anchors' areas, in pixels of the input (Light-Head R-CNN: 32 64 128 256 512).
        ratios: height / width (Light-Head R-CNN: 0.5 1 2).
        stride: input pixels per cell.
    """

    cells: Tensor

    def __init__(self, *, scales: Sequence[float], ratios: Sequence[float], stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Halved before there is a tensor: on the meta device arithmetic imports torch's compiler, see `check_fit`.
        cells = [(-width / 2, -height / 2, width / 2, height / 2) for width, height in anchor_sizes(scales, ratios)]
        self.register_buffer("cells", torch.tensor(cells), persistent=False)
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    @property
    def per_cell(self) -> int:
        return len(self.cells)

    def forward(self, height: int, width: int) -> Tensor:
        """Anchors (height * width * per_cell, 4) of a feature map, ordered by row, column, shape.

        Cell i's anchors are centred on pixel i * stride, where the cell looks: a 3x3 convolution of stride 2 and
        padding 1 is centred on pixel 2i of its input, so a chain of them is centred on stride * i, not on the middle
        of a stride x stride square. LightHead reads the map in the same frame. Source: torchvision's AnchorGenerator.

        Those of the last few sizes are kept: images of one camera have one size.
        """
        if torch.compiler.is_compiling():  # a kept tensor would be a constant of one size
            return self._make(height, width)
        key = (height, width, self.cells.device, self.cells.dtype)
        anchors = self._kept.get(key)
        if anchors is None:
            if len(self._kept) >= SIZES_KEPT:
                self._kept.clear()
            anchors = self._kept[key] = self._make(height, width)
        return anchors

    def _make(self, height: int, width: int) -> Tensor:
        y = torch.arange(height, device=self.cells.device, dtype=self.cells.dtype) * self.stride
        x = torch.arange(width, device=self.cells.device, dtype=self.cells.dtype) * self.stride
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (height, width, 2)
        return (centers.repeat(1, 1, 2)[:, :, None] + self.cells).flatten(0, 2)
