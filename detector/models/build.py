"""The composition root: options become a network. The only place where parts meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from detector.models.backbones import AnyBackboneOptions, build_backbone
from detector.models.backbones.external import TimmOptions, TorchvisionOptions
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2Options
from detector.models.light_head import LightHead, LightHeadOptions
from detector.models.light_head_rcnn import LightHeadRCNN
from detector.models.neck import NECKS, AnyNeckOptions, NoNeckOptions
from detector.models.rpn import RPN, RPNOptions
from detector.models.weights import check_weights
from detector.options import Options


class NetworkOptions(Options):
    """The parts of a detector's network. Without any: ShuffleNet V2 1x with setting S of Light-Head R-CNN."""

    backbone: AnyBackboneOptions = ShuffleNetV2Options()
    """Image in, feature maps out; `name` chooses the family."""
    neck: AnyNeckOptions = NoNeckOptions()
    """What stands between the backbone's maps and the two stages; `name` chooses it."""
    rpn: RPNOptions = RPNOptions()
    """The first stage: proposals."""
    light_head: LightHeadOptions = LightHeadOptions()
    """The second stage: classes and final boxes."""

    def spec(self) -> dict[str, Any]:
        """What a checkpoint holds, as plain values: what decides the network, and nothing else. `parse` reads it."""
        parts = {name: getattr(self, name).to_dict() for name in ("neck", "rpn", "light_head")}
        return {"backbone": self.backbone.spec()} | parts


def build_network(options: NetworkOptions, num_classes: int) -> LightHeadRCNN:
    """Assemble a network with random weights; channels and strides are derived.

    Args:
        num_classes: K, without background.

    Raises:
        InputError: another library has no such backbone.
    """
    backbone = build_backbone(options.backbone)
    neck: Any = NECKS[options.neck.name]
    neck = neck(backbone.channels, backbone.strides, options.neck)
    rpn = RPN(neck.rpn_channels, neck.rpn_stride, options.rpn)
    head = LightHead(neck.head_channels, neck.head_stride, num_classes, options.light_head)
    return LightHeadRCNN(backbone, neck, rpn, head)


def check_fit(options: NetworkOptions, num_classes: int, weights: Mapping[str, Any]) -> None:
    """Refuse weights that no network of these options has, before it takes memory, however large the options make it.

    A model of another library is as large as that library says, and is compared when it is built.

    Raises:
        InputError: see `check_weights`.
    """
    if not isinstance(options.backbone, TorchvisionOptions | TimmOptions):
        with torch.device("meta"), _NothingDrawn():
            check_weights(build_network(options, num_classes).state_dict(), weights)


class _NothingDrawn(TorchFunctionMode):
    """Normal weights of tensors on the meta device are not drawn: for that torch imports its compiler, in a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return [*args, *kwargs.values()][0] if func.__name__ == "normal_" else func(*args, **kwargs)
