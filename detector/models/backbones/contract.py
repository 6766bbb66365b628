"""What every backbone gives. `tests/test_backbones_contract.py` checks it for every file in `conf/backbone/`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Backbone(nn.Module):
    """Image in, feature maps out.

    Keys follow the stride, because papers number their stages differently.

    Attributes:
        channels: of "c3", "c4", "c5".
        strides: of "c3", "c4", "c5": 8, 16, 32; c5 keeps 16 where the last stage is dilated.
        stages: names of the submodules of each stage from the stem on, one stage per stride, in the order in which an
            image meets them. The stem is everything up to stride 4. What `freeze.stages` counts.
    """

    channels: dict[str, int]
    strides: dict[str, int]
    stages: Sequence[Sequence[str]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised float images (N, 3, H, W) -> {"c3": (N, channels["c3"], H / 8, W / 8), "c4": ..., "c5": ...}.

        Where H or W is no multiple of a stride, the maps are rounded up, and they lie in channels_last memory.
        """
        raise NotImplementedError
