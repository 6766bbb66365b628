"""Backbones: image in, feature maps out (`contract.Backbone`).

To add one: write the class, add a line to BACKBONES, add a file to `conf/backbone/`; the contract test finds the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from detector.errors import InputError
from detector.models.backbones.contract import Backbone
from detector.models.backbones.external import TimmBackbone, TorchvisionBackbone
from detector.models.backbones.mobilenet import MobileNetV1, MobileNetV2
from detector.models.backbones.shufflenet_v1 import ShuffleNetV1
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2
from detector.models.backbones.xception import Xception

__all__ = ["BACKBONES", "Backbone", "arguments_of", "build_backbone"]

# What a file in conf/backbone/ says besides the arguments of the class: weights to start from, what a classifier has on
# top, and the published figures that `tools/benchmark.py backbones` compares with.
ABOUT = ("weights", "classifier", "published")

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "shufflenet_v1": ShuffleNetV1,
    "shufflenet_v2": ShuffleNetV2,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "xception": Xception,
    "torchvision": TorchvisionBackbone,
    "timm": TimmBackbone,
}


def arguments_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `build_backbone` in the contents of a file of conf/backbone/."""
    return {key: value for key, value in entry.items() if key not in ABOUT}


def build_backbone(*, name: str, **arguments: Any) -> Backbone:
    """The backbone of this name, with random weights (`pretrained.load_weights` fills them).

    Args:
        name: a key of BACKBONES.
        arguments: those of the class; `arguments_of` a file in `conf/backbone/`.

    Raises:
        InputError: there is no backbone of this name, or it cannot be built from these arguments.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone.name={name!r} is unknown; there is {', '.join(sorted(BACKBONES))}.")
    try:
        return BACKBONES[name](**arguments)
    except TypeError as error:
        raise InputError(f"backbone {name}: {error}. Compare with the files in conf/backbone/.") from error
