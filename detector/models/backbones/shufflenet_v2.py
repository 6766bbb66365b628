"""ShuffleNet V2 and V2* (Ma et al. 2018: section 3.2 with table 5, section 4, and the appendix).

Module names are torchvision's, so that its ImageNet weights load by key; conv5 and the classifier are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from detector.errors import InputError
from detector.models.backbones.channel_order import uneven_order
from detector.models.backbones.contract import Backbone, BackboneOptions, ClassifierOptions, Stages
from detector.models.backbones.layers import Activation, activation_layer, depthwise, pointwise
from detector.models.backbones.unshuffled import UnshuffledStage, reorder_inputs
from detector.options import Count, Flag

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
        convolution, norm = depthwise(channels, stride=1, dilation=dilation)
        super().__init__(convolution, norm)
        nn.init.dirac_(convolution.weight, groups=channels)
        # Normalisation divides by sqrt(running_var + eps): exactly one.
        norm.get_buffer("running_var").fill_(1 - norm.eps)

    def train(self, mode: bool = True) -> ExtraDepthwise:
        super().train(mode)
        for norm in list(self)[1:]:  # none where it is folded into the convolution
            norm.eval()
        return self


class MainBranch(nn.Sequential):
    """1x1, depthwise 3x3, 1x1, each with BN, activations after the 1x1 (figure 3); then, in deeper variants, SE.

    Args:
        inputs, middle, outputs: channels.
        linear: no activation at the end, because a residual is added before it.
        se: squeeze-and-excitation on the outputs, fully connected layers of full width, as in the authors' released
            code (github.com/megvii-model/ShuffleNet-Series, ShuffleNetV2.Large).
    """

    def __init__(
        self, inputs: int, middle: int, outputs: int, *, stride: int, dilation: int, activation: Activation,
        linear: bool, se: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            *pointwise(inputs, middle, activation),
            *depthwise(middle, stride=stride, dilation=dilation),
            *pointwise(middle, outputs, None if linear else activation),
            *([SqueezeExcitation(outputs, outputs)] if se else []),
        )


class Unit(nn.Module):
    """Figure 3 (c): one half of the channels passes as it is, the other through the main branch.

    Units hand over their two halves before the shuffle, (N, C/2, H, W) each, so that shuffling and splitting again is
    one interleave for each half and no copy of a strided half.

    Args:
        channels: of input and output.
        dilation, extra_depthwise, se, residual, activation, shuffle: see ShuffleNetV2.
    """

    def __init__(
        self, channels: int, *, dilation: int, extra_depthwise: bool, se: bool, residual: bool, activation: Activation,
        shuffle: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        half = channels // 2
        self.extra = ExtraDepthwise(half, dilation=dilation) if extra_depthwise else nn.Identity()
        self.branch2 = MainBranch(
            half, half, half, stride=1, dilation=dilation, activation=activation, linear=residual, se=se
        )
        self.last = activation_layer(activation) if residual else None
        self.shuffle = shuffle

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

    Args:
        inputs: channels of the input.
        outputs: channels of the output, both branches together.
        stride: 2; 1 in a dilated stage, and in the first of four stages.
        extra_depthwise: V2*; the projection begins with a depthwise convolution already.
        layout, se, activation, shuffle: see ShuffleNetV2.
    """

    order: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, extra_depthwise: bool, layout: str, se: bool,
        activation: Activation, shuffle: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.outputs, half = outputs, outputs // 2
        projected = inputs if layout == "paper" else half
        self.branch1 = nn.Sequential(*depthwise(inputs, stride=stride), *pointwise(inputs, projected, activation))
        self.extra = ExtraDepthwise(inputs, dilation=1) if extra_depthwise else nn.Identity()
        self.branch2 = MainBranch(
            inputs, half, outputs - projected, stride=stride, dilation=1, activation=activation, linear=False, se=se
        )
        # Kept in checkpoints: weights trained with another order of the channels must not load in silence.
        uneven = shuffle and projected != half
        self.register_buffer("order", torch.from_numpy(uneven_order(outputs)) if uneven else None)

    def forward(self, x: Tensor) -> Pair:
        first, second = self.branch1(x), self.branch2(self.extra(x))
        if first.shape[1] != second.shape[1]:
            both = torch.cat((first, second), dim=1)
            first, second = (both if self.order is None else both[:, self.order]).chunk(2, dim=1)
        return first, second


class Stage(nn.Sequential):
    """A DownsamplingUnit and the Units after it: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, *units: nn.Module, outputs: int, shuffle: bool) -> None:
        super().__init__(*units)
        self.outputs, self.shuffle = outputs, shuffle

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self
        pair: Pair = first(x)
        for unit in rest:
            pair = unit(pair)
        return interleave(*pair) if self.shuffle else torch.cat(pair, dim=1)


class ShuffleNetV2Options(BackboneOptions):
    """The defaults are ShuffleNet V2 1x (Ma et al. 2018, table 5)."""

    name: Literal["shufflenet_v2"] = "shufflenet_v2"
    stem_channels: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = 24
    """Outputs of conv1 (table 5), or of each convolution of the stem, of which the first has stride 2 (appendix)."""
    channels: Stages = (116, 232, 464)
    """Outputs of the last three stages, c3, c4 and c5 (table 5), or of four, the first at stride 4 (appendix)."""
    repeats: Stages = (4, 8, 4)
    """Units in each stage, the one of stride 2 included (table 5)."""
    extra_depthwise: Flag = False
    """V2*: one more depthwise 3x3 at the start of every main branch (section 4)."""
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
        return self


class ShuffleNetV2(Backbone):
    """ShuffleNet V2 up to its last stage, V2* with `extra_depthwise`, and the deeper variants of the appendix.

    layout="paper": the projection of a downsampling unit keeps its number of channels and the main branch gives the
    rest, as in the authors' code; this reproduces the published 146 / 299 / 591 M multiply-adds. "torchvision": both
    branches give half of the outputs. Both shuffle at the end of every unit: the authors' code shuffles at the start of
    stride-1 units, which is the same up to the order of channels, see `channel_order`.

    dilate_c5: every second pixel of c5 is what it would be without (but for SE).
    """

    stage1: Stage
    stage2: Stage
    stage3: Stage
    stage4: Stage

    def __init__(self, options: ShuffleNetV2Options) -> None:
        super().__init__()
        channels, activation = options.channels, options.activation
        stages = len(channels)
        stem_channels = options.stem_channels
        stem = [stem_channels] if isinstance(stem_channels, int) else list(stem_channels)
        self.conv1 = _stem(stem, activation)
        last, pool = activation_layer(activation), nn.MaxPool2d(3, stride=2, padding=1)
        # A rising activation and the maximum commute; in this order the activation has a quarter of the pixels.
        self.maxpool = nn.Sequential(pool, last) if activation != "hard_swish" else nn.Sequential(last, pool)
        names_of_variant = ("extra_depthwise", "se", "activation", "shuffle")
        variant: Any = {name: getattr(options, name) for name in names_of_variant}
        names = [f"stage{number}" for number in range(5 - stages, 5)]
        inputs = stem[-1]
        for name, outputs, units in zip(names, channels, options.repeats, strict=True):
            dilated = options.dilate_c5 and name == "stage4"
            first = DownsamplingUnit(
                inputs, outputs, stride=1 if dilated or name == "stage1" else 2, layout=options.layout, **variant
            )
            dilation = 2 if dilated else 1
            rest = (Unit(outputs, dilation=dilation, residual=options.residual, **variant) for _ in range(units - 1))
            self.add_module(name, Stage(first, *rest, outputs=outputs, shuffle=options.shuffle))
            inputs = outputs
        self.channels = dict(zip(("c3", "c4", "c5"), channels[-3:], strict=True))
        self.strides = {"c3": 8, "c4": 16, "c5": 16 if options.dilate_c5 else 32}
        self.stages = (("conv1", *names[:-3]), *((name,) for name in names[-3:]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        x = self.maxpool(self.conv1(images.contiguous(memory_format=torch.channels_last)))
        if "stage1" in self._modules:
            x = self.stage1(x)
        c3 = self.stage2(x)
        c4 = self.stage3(c3)
        return {"c3": c3, "c4": c4, "c5": self.stage4(c4)}

    def unshuffle(self) -> dict[str, Tensor]:
        """See `Backbone.unshuffle`."""
        orders: dict[str, Tensor] = {}
        names = [name for stage in self.stages for name in stage if name.startswith("stage")]
        for name, following in zip(names, [*names[1:], None], strict=True):
            stage = getattr(self, name)
            # The two terms of a residual need one order.
            if not isinstance(stage, Stage) or not stage.shuffle or any(getattr(u, "last", None) for u in stage):
                continue
            unshuffled = UnshuffledStage(stage, stage.outputs)
            setattr(self, name, unshuffled)
            if name != "stage1":
                orders[f"c{int(name[-1]) + 1}"] = unshuffled.order
            if following:
                first = getattr(self, following)[0]
                reorder_inputs(first.branch1, unshuffled.order)
                reorder_inputs((first.extra, first.branch2), unshuffled.order)
        return orders


def _stem(channels: Sequence[int], activation: Activation) -> nn.Sequential:
    """Convolutions 3x3 with BN, the first of stride 2; an activation between them, none after the last."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise((3, *channels))):
        if number:
            layers.append(activation_layer(activation))
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=1 if number else 2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
    return nn.Sequential(*layers)
