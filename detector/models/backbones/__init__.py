"""Backbones: image in, feature maps out (`contract.Backbone`).

To add one: write the class and its options, add a line to each of the two tables, add a file to `conf/backbone/`; the
contract test finds the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from detector.models.backbones.contract import Backbone, BackboneOptions
from detector.models.backbones.external import TimmBackbone, TimmOptions, TorchvisionBackbone, TorchvisionOptions
from detector.models.backbones.mobilenet import MobileNetV1, MobileNetV1Options, MobileNetV2, MobileNetV2Options
from detector.models.backbones.shufflenet_v1 import ShuffleNetV1, ShuffleNetV1Options
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2, ShuffleNetV2Options
from detector.models.backbones.xception import Xception, XceptionOptions
from detector.options import Options

__all__ = ["BACKBONES", "AnyBackboneOptions", "Backbone", "BackboneOptions", "build_backbone", "parse_backbone"]

AnyBackboneOptions = Annotated[
    ShuffleNetV1Options
    | ShuffleNetV2Options
    | MobileNetV1Options
    | MobileNetV2Options
    | XceptionOptions
    | TorchvisionOptions
    | TimmOptions,
    Field(discriminator="name"),
]
BACKBONES: dict[str, Any] = {
    "shufflenet_v1": ShuffleNetV1,
    "shufflenet_v2": ShuffleNetV2,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "xception": Xception,
    "torchvision": TorchvisionBackbone,
    "timm": TimmBackbone,
}


class _Choice(Options):
    backbone: AnyBackboneOptions


def parse_backbone(values: Mapping[str, Any]) -> BackboneOptions:
    """The options in a file of conf/backbone/, or in a checkpoint; `name` chooses the family.

    Raises:
        InputError: there is no such family, or a value does not fit.
    """
    return _Choice.parse({"backbone": dict(values)}).backbone


def build_backbone(options: BackboneOptions) -> Backbone:
    """The backbone of these options, with random weights (`pretrained.load_weights` fills them).

    Raises:
        InputError: another library has no such model, or none with maps at these strides.
    """
    backbone: Backbone = BACKBONES[options.name](options)
    return backbone
