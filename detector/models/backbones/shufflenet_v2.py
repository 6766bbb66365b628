"""ShuffleNet V2 and V2* (Ma et al. 2018: section 3.2 with table 5, section 4, and the appendix).

Module names are torchvision's, so that its ImageNet weights load by key; conv5 and the classifier are left out.
"""

from __future__ import annotations

import operator
from itertools import pairwise, zip_longest
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from detector.errors import InputError
from detector.models.backbones.channel_order import uneven_order
from detector.models.backbones.contract import (
    Backbone,
    BackboneOptions,
    ClassifierOptions,
    Place,
    Repeats,
    Widths,
)
from detector.models.backbones.unshuffled import UnshuffledStage, reorder_inputs
from detector.models.layers import Activation, Channels, activation_layer, conv_bn, depthwise
from detector.options import Flag, Natural

Pair = tuple[Tensor, Tensor]


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Shuffle two groups of channels: first 0, second 0, first 1, second 1, ...

    Args:
        first: (N, C, H, W); fastest in channels_last memory, the format of the result.
        second: (N, C, H, W).

    Returns:
        (N, 2C, H, W).
    """
    stacked = torch.stack((first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)), dim=-1)  # (N, H, W, C, 2)
    return stacked.flatten(-2).permute(0, 3, 1, 2)


class ExtraDepthwise(nn.Sequential):
    """What V2* adds in front of a main branch: depthwise 3x3, BN, no ReLU. Starts as the identity.

    So V2 weights warm-start V2* with equal outputs, bit for bit. In training mode too: this BN always keeps its mean 0
    and variance 1 and learns scale and shift alone. Chosen by this project, because the statistics of a batch would
    renormalise what passes and move the maps of a pretrained V2 by 22 to 37%. Its weights
    cannot run away: the next layers normalise.

    The paper says "an additional 3x3 depthwise convolution before the first pointwise convolution in each building
    block" and no more; BN without ReLU is how the same authors begin a branch in released code (DetNAS, `xception`).
    """

    starts_as_identity = True

    def __init__(self, channels: int, *, dilation: int) -> None:
        super().__init__(*depthwise(channels, dilation=dilation))
        parts: Any = tuple(self)
        convolution, norm = parts
        nn.init.dirac_(convolution.weight, groups=channels)
        # Normalisation divides by sqrt(running_var + eps): exactly one.
        norm.running_var.fill_(1 - norm.eps)
        self.train(self.training)  # Lightning trains in the modes that it finds, and does not call `train`

    def train(self, mode: bool = True) -> ExtraDepthwise:
        super().train(mode)
        for norm in list(self)[1:]:  # none where it is folded into the convolution
            norm.eval()
        return self


def main_branch(inputs: int, outputs: int, place: Place, options: ShuffleNetV2Options, last: Any) -> nn.Sequential:
    """1x1, depthwise 3x3, 1x1, each with BN, activations after the 1x1 (figure 3); then, in deeper variants, SE.

    SE is on the outputs, with fully connected layers of full width, as in the authors' released code
    (github.com/megvii-model/ShuffleNet-Series, ShuffleNetV2.Large).

    Args:
        inputs, outputs: channels; in between they are half of those of the unit.
        last: activation at the end; None where a residual is added before it.
    """
    middle, gate = place.outputs // 2, []
    if options.se:
        from torchvision.ops import SqueezeExcitation  # takes as long to import as torch

        gate = [SqueezeExcitation(outputs, outputs)]
    return nn.Sequential(
        *conv_bn(inputs, middle, activation=options.activation),
        *depthwise(middle, stride=place.stride, dilation=place.dilation),
        *conv_bn(middle, outputs, activation=last),
        *gate,
    )


class Unit(nn.Module):
    """Figure 3 (c): one half of the channels passes as it is, the other through the main branch.

    Units hand over their two halves before the shuffle, (N, C/2, H, W) each, so that shuffling and splitting again is
    one interleave for each half and no copy of a strided half.
    """

    def __init__(self, place: Place, options: ShuffleNetV2Options) -> None:
        super().__init__()
        half, activation = place.outputs // 2, options.activation
        self.extra = ExtraDepthwise(half, dilation=place.dilation) if options.extra_in(place) else nn.Identity()
        self.branch2 = main_branch(half, half, place, options, None if options.residual else activation)
        self.last = activation_layer(activation) if options.residual else None
        self.shuffle = options.shuffle

    def forward(self, pair: Pair) -> Pair:
        kept, x = split_shuffled(pair) if self.shuffle else pair
        y = self.branch2(self.extra(x))
        return kept, y if self.last is None else self.last(x + y)


def split_shuffled(pair: Pair) -> Pair:
    """The two halves (N, C/2, H, W) of the shuffled channels of a pair of halves."""
    first, second = pair
    middle = first.shape[1] // 2
    return interleave(first[:, :middle], second[:, :middle]), interleave(first[:, middle:], second[:, middle:])


class DownsamplingUnit(nn.Module):
    """Figure 3 (d): all channels go through both branches, and their outputs together are wider.

    In V2* too the projection begins with one depthwise convolution, which is there already.
    """

    order: Tensor | None

    def __init__(self, place: Place, options: ShuffleNetV2Options) -> None:
        super().__init__()
        inputs, activation = place.inputs, options.activation
        self.outputs, self.shuffle = place.outputs, options.shuffle
        projected = inputs if options.layout == "paper" else self.outputs // 2
        self.branch1 = nn.Sequential(
            *depthwise(inputs, stride=place.stride), *conv_bn(inputs, projected, activation=activation)
        )
        self.extra = ExtraDepthwise(inputs, dilation=1) if options.extra_in(place) else nn.Identity()
        self.branch2 = main_branch(inputs, self.outputs - projected, place, options, activation)
        # Kept in checkpoints: weights trained with another order of the channels must not load in silence.
        uneven = self.shuffle and 2 * projected != self.outputs
        self.register_buffer("order", torch.from_numpy(uneven_order(self.outputs)) if uneven else None)

    def forward(self, x: Tensor) -> Pair:
        first, second = self.branch1(x), self.branch2(self.extra(x))
        if first.shape[1] != second.shape[1]:
            both = torch.cat((first, second), dim=1)
            first, second = (both if self.order is None else both[:, self.order]).chunk(2, dim=1)
        return first, second


class Stage(nn.Sequential):
    """A DownsamplingUnit and the Units after it: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self
        pair: Pair = first(x)
        for unit in rest:
            pair = unit(pair)
        return interleave(*pair) if first.shuffle else torch.cat(pair, dim=1)


class ShuffleNetV2Options(BackboneOptions):
    """The defaults are ShuffleNet V2 1x (Ma et al. 2018, table 5)."""

    name: Literal["shufflenet_v2"] = "shufflenet_v2"
    stem_channels: Channels | Annotated[tuple[Channels, ...], Field(min_length=1, max_length=64)] = 24
    """Outputs of conv1 (table 5), or of each convolution of the stem, of which the first has stride 2 (appendix)."""
    channels: Widths = (116, 232, 464)
    """Outputs of the last three stages, c3, c4 and c5 (table 5), or of four, the first at stride 4 (appendix)."""
    repeats: Repeats = (4, 8, 4)
    """Units in each stage, the one of stride 2 included (table 5)."""
    extra_depthwise: Flag | tuple[Natural, ...] = False
    """V2*: one more depthwise 3x3 at the start of every main branch (section 4), or of so many of each stage, from its
    last unit on: [0,4,2]."""
    layout: Literal["torchvision", "paper"] = "torchvision"
    """Form of the downsampling units: torchvision, even branches, for public weights; paper, as the authors' code."""
    se: Flag = False
    """Squeeze-and-excitation at the end of every main branch (appendix, figure 2 b)."""
    residual: Flag = False
    """Units of stride 1 add the input of the main branch to its output (appendix, figure 2 a)."""
    activation: Activation = "relu"
    """relu in the paper; leaky_relu in NanoDet."""
    shuffle: Flag = True
    """False: halves are never mixed, the ablation of Zhang et al. 2018 (ShuffleNet V1), table 3."""
    classifier: ClassifierOptions | None = ClassifierOptions(conv5_channels=1024)
    """On top, for pre-training and for published costs (table 5)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = len(self.channels), len(self.repeats)
        if counts not in ((3, 3), (4, 4)) or any(width % 4 for width in self.channels):
            raise InputError(
                f"backbone: channels={list(self.channels)}, repeats={list(self.repeats)}; give three of each (or "
                "four), channels as multiples of 4."
            )
        extra = self.extra_depthwise
        if not isinstance(extra, bool) and (
            len(extra) != len(self.repeats) or any(map(operator.gt, extra, self.repeats))
        ):
            raise InputError(
                f"backbone: extra_depthwise={list(extra)}, repeats={list(self.repeats)}; give true, false, or for each "
                "stage a number of units that it has."
            )
        stem = self.stem_channels if isinstance(self.stem_channels, int) else self.stem_channels[-1]
        if self.layout == "paper" and any(after <= before for before, after in pairwise((stem, *self.channels))):
            raise InputError(
                f"backbone.channels={list(self.channels)}: with layout=paper every stage must be wider than the one "
                f"before it, the first wider than the stem of {stem}."
            )
        return self

    def extra_in(self, place: Place) -> bool:
        """Whether the unit of this place is one of V2*."""
        extra = self.extra_depthwise
        return extra if isinstance(extra, bool) else place.after < extra[int(place.stage[-1]) - 5]


class ShuffleNetV2(Backbone):
    """ShuffleNet V2 up to its last stage, V2* with `extra_depthwise`, and the deeper variants of the appendix.

    layout="paper": the projection of a downsampling unit keeps its number of channels and the main branch gives the
    rest, as in the authors' code; this reproduces the published 146 / 299 / 591 M multiply-adds. "torchvision": both
    branches give half of the outputs. Both shuffle at the end of every unit: the authors' code shuffles at the start of
    stride-1 units, which is the same up to the order of channels, see `channel_order`.

    dilate_c5: every second pixel of c5 is what it would be without (but for SE).
    """

    stage2: Stage
    stage3: Stage
    stage4: Stage
    chain = Stage

    def __init__(self, options: ShuffleNetV2Options) -> None:
        super().__init__(dilate_c5=options.dilate_c5)
        self.options, activation = options, options.activation
        stem = (options.stem_channels,) if isinstance(options.stem_channels, int) else options.stem_channels
        # Activations between the convolutions of a stem, none after the last.
        layers: list[nn.Module] = [*conv_bn(3, stem[0], 3, stride=2)]
        for inputs, outputs in pairwise(stem):
            layers += [activation_layer(activation), *conv_bn(inputs, outputs, 3)]
        self.conv1 = nn.Sequential(*layers)
        last, pool = activation_layer(activation), nn.MaxPool2d(3, stride=2, padding=1)
        # A rising activation and the maximum commute; in this order the activation has a quarter of the pixels.
        self.maxpool = nn.Sequential(pool, last) if activation != "hard_swish" else nn.Sequential(last, pool)
        self.add_stages(("conv1", "maxpool"), (stem[-1], *options.channels), options.repeats, self._unit)

    def _unit(self, place: Place) -> nn.Module:
        return DownsamplingUnit(place, self.options) if place.first else Unit(place, self.options)

    def unshuffle(self) -> dict[str, Tensor]:
        """See `Backbone.unshuffle`."""
        orders: dict[str, Tensor] = {}
        # The two terms of a residual need one order.
        if not self.options.shuffle or self.options.residual or isinstance(self.stage4, UnshuffledStage):
            return orders
        names = [name for stage in self.stages for name in stage if name.startswith("stage")]
        for name, following in zip_longest(names, names[1:]):
            stage = getattr(self, name)
            unshuffled = UnshuffledStage(stage, stage[0].outputs)
            setattr(self, name, unshuffled)
            if name != "stage1":  # nobody but stage2 reads it
                orders[f"c{int(name[-1]) + 1}"] = unshuffled.order
            if following:
                first = getattr(self, following)[0]
                reorder_inputs(first.branch1, unshuffled.order)
                reorder_inputs((first.extra, first.branch2), unshuffled.order)
        return orders
