"""The composition root: a plain dict becomes a network. The only place where parts meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from detector.errors import InputError
from detector.models.backbones import build_backbone
from detector.models.light_head import LightHead
from detector.models.light_head_rcnn import LightHeadRCNN
from detector.models.neck import ContextEnhancement, NoNeck
from detector.models.rpn import RPN, ProposalLimits

NECKS = {"none": NoNeck, "cem": ContextEnhancement}


def build_network(spec: Mapping[str, Any], num_classes: int) -> LightHeadRCNN:
    """Assemble a network with random weights.

    Args:
        spec: `backbone`, `neck`, `rpn` and `light_head`, each the keyword arguments of its class as plain values;
            backbone and neck also carry `name`. Channels, strides and the class count are derived, never given.
        num_classes: K, without background.

    Raises:
        InputError: a part or a value of the spec is unknown or missing.
    """
    try:
        backbone = build_backbone(**spec["backbone"])
        neck = _build_neck(backbone, **spec["neck"])
        limits = {key: ProposalLimits(**spec["rpn"][key]) for key in ("train_limits", "test_limits")}
        rpn = RPN(neck.rpn_channels, neck.rpn_stride, **{**spec["rpn"], **limits})
        head = LightHead(neck.head_channels, neck.head_stride, num_classes, **spec["light_head"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"The model description does not fit this version: {error}. It holds {sorted(spec)}; "
            "compare it with conf/ or use the version that wrote it."
        ) from error
    return LightHeadRCNN(backbone, neck, rpn, head)


def _build_neck(backbone: nn.Module, *, name: str, **arguments: Any) -> Any:
    if name not in NECKS:
        raise InputError(f"Unknown neck '{name}'; there are: {', '.join(NECKS)}.")
    return NECKS[name](backbone.channels, backbone.strides, **arguments)
