"""Backbones: image in, feature maps out (`contract.Backbone`).

To add one: write the class, add a line to BACKBONES, add a file to `conf/backbone/`; the contract test finds the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detector.backbones.contract import Backbone
from detector.backbones.shufflenet_v2 import ShuffleNetV2
from detector.errors import InputError

__all__ = ["BACKBONES", "Backbone", "build_backbone"]

BACKBONES: dict[str, Callable[..., Backbone]] = {"shufflenet_v2": ShuffleNetV2}


def build_backbone(*, name: str, **arguments: Any) -> Backbone:
    """The backbone of this name, with random weights (`pretrained.load_weights` fills them).

    Args:
        name: a key of BACKBONES.
        arguments: those of the class; a file in `conf/backbone/` has them all, and `weights`, which is not one.

    Raises:
        InputError: there is no backbone of this name, or it cannot be built from these arguments.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone.name={name!r} is unknown; there is {', '.join(sorted(BACKBONES))}.")
    try:
        return BACKBONES[name](**arguments)
    except TypeError as error:
        raise InputError(f"backbone {name}: {error}. Compare with the files in conf/backbone/.") from error
