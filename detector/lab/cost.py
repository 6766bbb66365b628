"""Cost of a network in the papers' units: parameters and multiply-adds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
