"""Backbones from their files in conf/backbone/, and what the tests of several families do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from detector.models.backbones import Backbone, build_backbone, parse_backbone

Module = TypeVar("Module", bound=nn.Module)
CONF = Path(__file__).parents[1] / "conf" / "backbone"


def entry(file_name: str) -> dict[str, Any]:
    """The options of a file, defaults included, as plain values."""
    return parse_backbone(yaml.safe_load((CONF / f"{file_name}.yaml").read_text())).to_dict()


def build(file_name: str, **changes: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(parse_backbone(entry(file_name) | changes))


def randomise(module: Module) -> Module:
    """As after training: no BN is near the identity, and convolutions keep the size of the signal."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return module
