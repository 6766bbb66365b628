"""What the layers have in common with torchvision's, and the operator that comes without its package."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torchvision.ops import Conv2dNormActivation

from detector.models.layers import ACTIVATIONS, Activation, conv_bn


@pytest.mark.parametrize("shape", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 4, "stride": 2}])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution_and_normalisation_are_torchvisions(
    kernel: int, activation: Activation | None, shape: dict[str, int]
) -> None:
    layer: Any = None if activation is None else ACTIVATIONS[activation]
    torch.manual_seed(0)
    theirs = Conv2dNormActivation(4, 8, kernel, activation_layer=layer, **shape)
    torch.manual_seed(0)
    own = conv_bn(4, 8, kernel, activation, **shape)
    assert own.state_dict().keys() == theirs.state_dict().keys()  # names in checkpoints
    x = torch.randn(2, 4, 9, 12)
    torch.testing.assert_close(own(x), theirs(x), rtol=0, atol=0)


def test_a_detector_is_loaded_without_slow_packages_and_gets_along_with_them() -> None:
    program = """
import sys, torch
from detector.inference.detector import Detector
from detector.models.build import NetworkOptions, build_network, check_fit
from detector.models.nms import nms
check_fit(NetworkOptions(), 3, build_network(NetworkOptions(), 3).state_dict())
assert {"torchvision", "torch._dynamo"}.isdisjoint(sys.modules)  # each takes a second
boxes = torch.rand(200, 4) * 50
boxes[:, 2:] += boxes[:, :2]
scores = torch.rand(200)
mine = nms(boxes, scores, 0.5)
import torchvision
assert torch.equal(mine, torchvision.ops.nms(boxes, scores, 0.5)) and 0 < len(mine) < 200
assert torch.equal(mine, nms(boxes, scores, 0.5))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
