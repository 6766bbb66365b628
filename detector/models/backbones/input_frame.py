"""Weights that were trained on pixels as they are, made to take normalised RGB images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from detector.errors import InputError

# What a network of this project takes: (RGB - MEAN) / STD, pixels in 0-255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
RGB, BGR = FRAMES = ("rgb_imagenet", "bgr255")


def for_normalised_rgb(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network that takes BGR pixels in 0-255, changed to take (RGB - MEAN) / STD instead.

    The kernels of conv1.0 change the order of their inputs and are multiplied by STD; what MEAN adds to each output
    is taken off the running mean of the BN after it.

    Exact wherever the 3x3 kernel lies inside the image. Outside lies zero, which is black to the network that was
    trained and mean grey here, and a convolution without bias that pads with one number cannot be told otherwise:
    so the first row and the first column of conv1's output differ (and the last ones, where the size is odd), and what
    sees them. Measured with torchvision's 0.5x weights on photographs of 224 x 224 to 800 x 1184 pixels: the other
    colour outside changes c3, c4 and c5 by 6-8, 3-6 and 9-12% (of their L2 norm), their first rows by 30-37, 11-13 and
    14-23%, the last quarter of c5 by 2% at 224 x 224 and 0.0% at 800 x 1184. The average of c5, which a classifier
    sees, turns by a cosine of 0.999. Fine-tuning starts from there.

    Args:
        tensors: with "conv1.0.weight" (C, 3, 3, 3) and "conv1.1.running_mean" (C,).

    Raises:
        InputError: there is no such stem.
    """
    weight, mean = tensors.get("conv1.0.weight"), tensors.get("conv1.1.running_mean")
    if weight is None or mean is None or weight.ndim != 4 or weight.shape[1] != 3 or mean.shape != weight.shape[:1]:
        raise InputError(
            "input=bgr255: only for a stem like ShuffleNet V2's, a convolution of three channels conv1.0 with its BN "
            "conv1.1. Leave input=null."
        )
    rgb = weight.double().flip(1)
    added = torch.einsum("oihw,i->o", rgb, rgb.new_tensor(MEAN))
    return dict(tensors) | {
        "conv1.0.weight": (rgb * rgb.new_tensor(STD).view(1, 3, 1, 1)).to(weight.dtype),
        "conv1.1.running_mean": (mean.double() - added).to(mean.dtype),
    }
