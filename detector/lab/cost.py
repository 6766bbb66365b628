"""Cost of a network in the papers' units: parameters, multiply-adds, memory access cost."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from detector.models.light_head_rcnn import LightHeadRCNN


def parameters(module: nn.Module) -> int:
    """Number of learned values; running statistics are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of one forward pass in evaluation mode, what the papers call FLOPs.

    Convolutions and matrix products are counted; batch normalisation, activations and biases are not.

    Args:
        module: left as it is.
        inputs: what its forward takes.
    """
    module = copy.deepcopy(module).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def detection_multiply_adds(network: LightHeadRCNN, height: int, width: int) -> int:
    """Multiply-adds of a whole detection, from an image on a canvas of this size to boxes."""

    class Detect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> object:
            return self.network.detect(images, sizes)

    device = network.mean.device
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8, device=device)
    return multiply_adds(Detect(), image, torch.tensor([[height, width]], device=device))


def memory_access(module: nn.Module, *inputs: Any) -> int:
    """Memory access cost of one forward pass in evaluation mode, in values (not bytes).

    What every convolution and fully connected layer reads and writes: its input, its output and its weights. Layers
    without weights are not counted (normalisation and activations are taken as fused into them).

    Source: Ma et al. 2018, section 2, G1: hw(c1 + c2) + c1 c2 for a 1x1 convolution.

    Args:
        module: left as it is.
        inputs: what its forward takes.
    """
    module = copy.deepcopy(module).eval()
    total = 0

    def count(layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += arguments[0].numel() + output.numel() + layer.get_parameter("weight").numel()

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(*inputs)
    return total
