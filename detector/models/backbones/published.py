"""ImageNet weights by name: what torchvision and timm publish for a backbone."""

from __future__ import annotations

import logging
from typing import Any

import torch

from detector.errors import InputError
from detector.models.backbones.contract import Backbone
from detector.models.backbones.external import TimmBackbone, TorchvisionBackbone
from detector.models.backbones.input_frame import MEAN, STD
from detector.models.backbones.mobilenet import MobileNetV2
from detector.models.backbones.shufflenet_v2 import ShuffleNetV2

log = logging.getLogger(__name__)

REMEDY = (
    "Give a file with backbone.weights=PATH, start from random weights with backbone.weights=null, or train on "
    "ImageNet with python tools/pretrain.py backbone=NAME data.root=DIR."
)


def published_weights(backbone: Backbone) -> tuple[Any, str]:
    """The published ImageNet weights of this backbone's model: a state dict, and where it comes from.

    Raises:
        InputError: there are none, or they cannot be had.
    """
    if isinstance(backbone, TimmBackbone):
        return _from_timm(backbone.model)
    url = imagenet_url(backbone)
    try:
        content = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, a proxy's answer, a damaged file in the cache: one remedy
        raise InputError(f"backbone.weights=imagenet: could not get {url} ({error}). {REMEDY}") from error
    return content, url


def imagenet_url(backbone: Backbone) -> str:
    """Address of torchvision's ImageNet weights for this backbone; the first published, as papers compare with.

    Raises:
        InputError: there are none.
    """
    from torchvision import models

    if isinstance(backbone, TorchvisionBackbone):
        weights = models.get_model_weights(backbone.model)
        return getattr(weights, "IMAGENET1K_V1", weights.DEFAULT).url
    published: dict[tuple[type[Backbone], tuple[int, ...]], Any] = {
        (ShuffleNetV2, (48, 96, 192)): models.ShuffleNet_V2_X0_5_Weights,
        (ShuffleNetV2, (116, 232, 464)): models.ShuffleNet_V2_X1_0_Weights,
        (ShuffleNetV2, (176, 352, 704)): models.ShuffleNet_V2_X1_5_Weights,
        (ShuffleNetV2, (244, 488, 976)): models.ShuffleNet_V2_X2_0_Weights,
        (MobileNetV2, (32, 96, 320)): models.MobileNet_V2_Weights,
    }
    kind, widths = type(backbone), tuple(backbone.channels.values())
    if (kind, widths) not in published:
        raise InputError(
            f"backbone.weights=imagenet: none are published for {kind.__name__} with stages of {widths} channels. "
            f"{REMEDY}"
        )
    return published[kind, widths].IMAGENET1K_V1.url


def _from_timm(model: str) -> tuple[Any, str]:
    """timm's own download, which knows every mirror and format; the tag of a name ("resnet50.a1_in1k") chooses."""
    import timm

    try:
        whole: Any = timm.create_model(model, pretrained=True)
    except Exception as error:  # as above, and models without weights
        raise InputError(f"backbone.weights=imagenet: timm could not get {model} ({error}). {REMEDY}") from error
    about = whole.pretrained_cfg
    frame = [[255 * value for value in about[key]] for key in ("mean", "std")]
    if not torch.allclose(torch.tensor(frame), torch.tensor([MEAN, STD]), atol=0.1):
        log.warning(
            "timm trained %s on images with mean %s and deviation %s, not on those that it gets here: its features "
            "differ until it is trained.",
            model,
            about["mean"],
            about["std"],
        )
    return whole.state_dict(), f"timm's {model}.{about.get('tag', '')}".rstrip(".")
