"""What every backbone gives. `tests/test_models_backbones_contract.py` checks it for every file in `conf/backbone/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detector.models.backbones.layers import Activation
from detector.options import BelowOne, Count, Flag, Options, Positive

Stages = tuple[Count, ...]
"""Outputs, or units, of each stage."""


class ClassifierOptions(Options):
    """What an image classifier has on top of a backbone: what published costs count, and what is pre-trained."""

    conv5_channels: Count | None = None
    """Of a 1x1 convolution with BN before the average; null: there is none."""
    activation: Activation = "relu"
    """Of conv5."""
    dropout: BelowOne = 0.0
    """Before the fully connected layer."""


class PublishedCost(Options):
    """What a paper says of a classifier, for `light-head benchmark backbones`."""

    multiply_adds: Positive
    """In millions."""
    parameters: Positive | None = None
    """In millions."""
    image_size: Count = 224
    """Side of the square input."""
    source: str
    """Paper and table."""
    note: str = ""
    """Why the number here differs."""


class BackboneOptions(Options):
    """What every family has; `weights`, `classifier` and `published` are no part of the network."""

    name: str
    dilate_c5: Flag = False
    """The last stage keeps stride 16 and dilates its later 3x3 convolutions (setting L of Light-Head R-CNN)."""
    weights: str | None = None
    """To start from: imagenet, or a path; null: random."""
    classifier: ClassifierOptions | None = None
    """On top, for pre-training and for published costs; null: the average of c5 is classified."""
    published: PublishedCost | None = None
    """The cost that is published for this network."""

    def spec(self) -> dict[str, Any]:
        """What decides the architecture, as plain values: the entry of a checkpoint."""
        return self.model_dump(mode="json", exclude={"weights", "classifier", "published"})


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
