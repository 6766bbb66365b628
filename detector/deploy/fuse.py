"""Fold batch normalisation into convolutions, for inference."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Module = TypeVar("Module", bound=nn.Module)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fuse(module: Module) -> Module:
    """A copy for inference: the same outputs up to rounding (1e-5 relative), sooner.

    Within every nn.Sequential a convolution and the batch normalisation right after it become one convolution, and a
    ReLU after a convolution works in place; so do the pairs that a part names as `folds` (networks of other libraries,
    `backbones.external`). Weights are laid out as channels_last. The copy is in evaluation mode and its parameters ask
    for no gradient; the original is left as it is.
    """
    fused = copy.deepcopy(module).eval().requires_grad_(False)
    for part in list(fused.modules()):
        for convolution, norm in getattr(part, "folds", ()):
            _fold_pair(part, convolution, norm)
        if isinstance(part, nn.Sequential):
            _fold(part)
    return fused.to(memory_format=torch.channels_last)


def _fold_pair(part: nn.Module, convolution: str, norm: str) -> None:
    """Fold two submodules by name. Both names stay: the part's own forward may call them."""
    before: Any = part.get_submodule(convolution)
    after: Any = part.get_submodule(norm)
    # timm's BatchNormAct2d has dropout and an activation inside.
    rest = nn.Identity() if type(after) in NORMS else nn.Sequential(after.drop, after.act)
    part.set_submodule(convolution, fuse_conv_bn_eval(before, after))
    part.set_submodule(norm, rest)


def _fold(layers: nn.Sequential) -> None:
    for index in reversed(range(len(layers) - 1)):
        layer: Any = layers[index]
        norm: Any = layers[index + 1]
        # Not their subclasses, which do more (timm: standardised weights, an activation after the normalisation).
        if type(layer) is nn.Conv2d and type(norm) in NORMS and norm.running_mean is not None:
            layers[index] = fuse_conv_bn_eval(layer, norm)
            del layers[index + 1]
    for layer, following in pairwise(layers):
        # A convolution's output is its own: nobody else reads what a ReLU overwrites.
        if isinstance(layer, nn.Conv2d) and isinstance(following, nn.ReLU):
            following.inplace = True
