"""What every backbone gives. `tests/test_models_backbones_contract.py` checks it for every file in `conf/backbone/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from pydantic.types import Strict
from torch import Tensor, nn

from detector.models.layers import Activation, Channels, fold_frozen
from detector.options import BelowOne, Count, Flag, Options, Positive

Widths = tuple[Channels, ...]
"""Outputs of each stage."""
Repeats = tuple[Annotated[int, Strict(), Field(ge=1), Field(le=64)], ...]
"""Units of each stage."""
FEATURES = ("c3", "c4", "c5")


class ClassifierOptions(Options):
    """What an image classifier has on top of a backbone: what published costs count, and what is pre-trained."""

    conv5_channels: Channels | None = None
    """Outputs of a 1x1 convolution with BN before the average; null: there is none, the average of c5 is classified."""
    activation: Activation = "relu"
    """The one after conv5."""
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
    top1_error: Positive | None = None
    """On ImageNet in percent (Ma et al. 2018, table 8)."""
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
    classifier: ClassifierOptions | None = ClassifierOptions()
    """On top, for pre-training and for published costs."""
    published: PublishedCost | None = None
    """The cost that is published for this network."""

    def spec(self) -> dict[str, Any]:
        """What decides the architecture, as plain values: the entry of a checkpoint."""
        return self.model_dump(mode="json", exclude={"weights", "classifier", "published"})


class Place(NamedTuple):
    """Where a unit stands in a backbone.

    Attributes:
        stage: "stage1" to "stage4".
        first: of its stage.
        inputs, outputs: channels.
        stride: 2 where the map shrinks: in the first unit of a stage, but not in a dilated stage nor in stage1.
        dilation: of 3x3 convolutions: 2 in a dilated stage, from its second unit on.
        after: how many units of the stage follow.
    """

    stage: str
    first: bool
    inputs: int
    outputs: int
    stride: int
    dilation: int
    after: int = 0


class Backbone(nn.Module):
    """Image in, feature maps out.

    Keys follow the stride, because papers number their stages differently.

    Attributes:
        channels: of "c3", "c4", "c5".
        strides: of "c3", "c4", "c5": 8, 16, 32; c5 keeps 16 where the last stage is dilated.
        stages: names of the submodules of each stage from the stem on, in the order in which an image meets them. The
            first is everything up to stride 4, the others lead to c3, c4 and c5. What `forward` runs, and what `freeze`
            counts.
        chain: what `add_stages` makes of the units of a stage.
    """

    channels: dict[str, int]
    strides: dict[str, int]
    stages: Sequence[Sequence[str]]
    chain: type[nn.Sequential] = nn.Sequential

    def __init__(self, *, dilate_c5: bool = False) -> None:
        super().__init__()
        self.strides = {"c3": 8, "c4": 16, "c5": 16 if dilate_c5 else 32}

    def add_stages(
        self, stem: Sequence[str], widths: Sequence[int], repeats: Sequence[int], unit: Callable[[Place], nn.Module]
    ) -> None:
        """Add "stage2" to "stage4", which give c3, c4 and c5; of four stages, "stage1" at stride 4 before them.

        Args:
            stem: names of the submodules before.
            widths: channels of the stem, then of each stage.
            repeats: units of each stage.
            unit: makes a unit for its place.
        """
        names = [f"stage{number}" for number in range(5 - len(repeats), 5)]
        for name, inputs, outputs, count in zip(names, widths, widths[1:], repeats, strict=False):
            dilated = name == "stage4" and self.strides["c5"] == 16
            stride = 1 if dilated or name == "stage1" else 2
            first = unit(Place(name, True, inputs, outputs, stride, 1, count - 1))
            later = (
                Place(name, False, outputs, outputs, 1, 1 + dilated, after) for after in reversed(range(count - 1))
            )
            self.add_module(name, self.chain(first, *map(unit, later)))
        self.channels = dict(zip(FEATURES, widths[-3:], strict=True))
        self.stages = ((*stem, *names[:-3]), *((name,) for name in names[-3:]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised float images (N, 3, H, W) -> {"c3": (N, channels["c3"], H / 8, W / 8), "c4": ..., "c5": ...}.

        Where H or W is no multiple of a stride, the maps are rounded up, and they lie in channels_last memory.
        """
        x = images.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            for name in stage:
                x = self.get_submodule(name)(x)
            maps.append(x)
        return dict(zip(FEATURES, maps[1:], strict=True))

    def unshuffle(self) -> dict[str, Tensor]:
        """Give up the order of channels where that is faster, in place; for inference, with normalisation folded.

        Returns:
            For each map whose channels lie in another order now, that order (C,): channel p of the map is channel
            order[p] of what it was. Whoever reads it must follow.
        """
        return {}

    def freeze(self, stages: int, *, batch_norm: bool = False) -> set[nn.Module]:
        """Let pre-trained layers stay as they are.

        Layers that begin as the identity are new, whatever weights the others have, and stay free: what V2* has more
        than V2 would else never differ from it.

        Args:
            stages: how many, by the stride at which they end: 1 to stride 4, 2 to stride 8, 3 to stride 16, 4 all.
            batch_norm: freeze every normalisation too.

        Returns:
            The frozen normalisations; training must keep them in evaluation mode, so that their statistics stay.
        """
        frozen = {
            layer for stage in self.stages[:stages] for name in stage for layer in self.get_submodule(name).modules()
        }
        if batch_norm:
            frozen |= {layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d)}
        for new in self.modules():
            if getattr(new, "starts_as_identity", False):
                frozen -= set(new.modules())
        for layer in frozen:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        norms: set[nn.Module] = {layer for layer in frozen if isinstance(layer, nn.BatchNorm2d)}
        fold_frozen(self, norms)
        return norms
