"""Make a network ready for inference: the same function with fewer and cheaper operations."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detector.models.layers import unfold_frozen

Module = TypeVar("Module", bound=nn.Module)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fuse(module: Module) -> Module:
    """A copy for inference: the same outputs up to rounding (1e-5 relative), sooner.

    Within every nn.Sequential a convolution and the batch normalisation right after it become one convolution, and a
    ReLU after a convolution works in place. Then each part that has a `to_inference` changes itself. Weights are laid
    out as channels_last. The copy is in evaluation mode and its parameters ask for no gradient; the original is left as
    it is.
    """
    fused = copy.deepcopy(module).eval().requires_grad_(False)
    unfold_frozen(fused)
    for part in fused.modules():
        if isinstance(part, nn.Sequential):
            _fold(part)
    for part in list(fused.modules()):
        change: Any = getattr(part, "to_inference", None)
        if change is not None:
            change()
    return fused.to(memory_format=torch.channels_last)


def round_weights(fused: nn.Module) -> None:
    """Let convolutions and matrices have bfloat16 weights, for use under torch.autocast: it would round them anew in
    every call. Everything about boxes stays float32."""
    for part in fused.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.to(torch.bfloat16)


class Pointwise(nn.Module):
    """A 1x1 convolution as a product of matrices, pixels x channels, and a ReLU where one follows.

    oneDNN's convolution packs its weights anew in every call, and loses a third of two cores on a map of 20 x 28.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        # (O, I, 1, 1), as exports want it: a weight that is reshaped in the graph would not be quantized as one.
        self.weight, self.bias = convolution.weight, convolution.bias
        self.relu = False

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[:2]
        return f"{inputs}, {outputs}, relu={self.relu}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), fastest in channels_last memory, the format of the result."""
        if torch.compiler.is_compiling():  # other runtimes know convolutions, and fuse what follows them
            y = F.conv2d(x, self.weight, self.bias)
        else:
            y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return y.relu_() if self.relu else y


def multiply_pointwise(module: nn.Module) -> None:
    """Put a Pointwise in the place of every 1x1 convolution that mixes all channels, in place."""
    for part in list(module.modules()):
        for name, layer in part.named_children():
            if type(layer) is nn.Conv2d and _is_pointwise(layer):
                setattr(part, name, Pointwise(layer))
        if isinstance(part, nn.Sequential):
            _take_in_relus(part)


def _take_in_relus(layers: nn.Sequential) -> None:
    for index in reversed(range(len(layers) - 1)):
        layer = layers[index]
        if isinstance(layer, Pointwise) and type(layers[index + 1]) is nn.ReLU:
            layer.relu = True
            del layers[index + 1]


def _is_pointwise(layer: Any) -> bool:
    geometry = layer.kernel_size, layer.stride, layer.padding
    return geometry == ((1, 1), (1, 1), (0, 0)) and layer.groups == 1


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
