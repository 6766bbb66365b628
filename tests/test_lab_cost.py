"""Costs against arithmetic on paper; the published ones of ShuffleNet V2 are in test_backbones_shufflenet_v2.py."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from detector.lab.cost import multiply_adds, parameters


def test_layers_by_hand() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 16 * 12, 10),
    )
    assert parameters(layers) == (3 * 8 * 9 + 8) + 16 + 8 * 9 + (8 * 16 * 12 * 10 + 10)
    convolutions = 16 * 12 * (3 * 8 * 9 + 8 * 9)
    assert multiply_adds(layers, torch.randn(1, 3, 32, 24)) == convolutions + 8 * 16 * 12 * 10
    assert multiply_adds(layers, torch.randn(5, 3, 32, 24)) == 5 * (convolutions + 8 * 16 * 12 * 10)


def test_frozen_parameters_count_and_statistics_do_not() -> None:
    norm = nn.BatchNorm2d(7).requires_grad_(False)
    assert parameters(norm) == 14


def test_torchvision_states_the_same() -> None:
    meta = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.meta
    model = torchvision.models.mobilenet_v2(weights=None)
    assert parameters(model) == meta["num_params"]
    assert round(multiply_adds(model, torch.zeros(1, 3, 224, 224)) / 1e9, 3) == meta["_ops"]


def test_the_module_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = model[1].running_mean.clone()
    multiply_adds(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert torch.equal(model[1].running_mean, before)
