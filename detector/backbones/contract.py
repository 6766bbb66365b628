"""What every backbone gives. `tests/test_backbones_shufflenet_v2.py` checks it for every file in `conf/backbone/`."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Image in, feature maps out.

    Keys follow the stride, because papers number their stages differently.

    Attributes:
        channels: of "c3", "c4", "c5".
        strides: of "c3", "c4", "c5": 8, 16, 32; c5 keeps 16 where the last stage is dilated.
    """

    channels: dict[str, int]
    strides: dict[str, int]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised float images (N, 3, H, W) -> {"c3": (N, channels["c3"], H / 8, W / 8), "c4": ..., "c5": ...}."""
        raise NotImplementedError
