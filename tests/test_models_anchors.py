"""Anchors against a loop, and against the published base anchors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detector.models.anchors import AnchorGrid
from detector.models.backbones import build_backbone, parse_backbone


def naive(height: int, width: int, scales: list[float], ratios: list[float], stride: int) -> torch.Tensor:
    rows = []
    for row, column, scale, ratio in itertools.product(range(height), range(width), scales, ratios):
        x, y = column * stride, row * stride
        anchor_width = (scale * scale / ratio) ** 0.5
        anchor_height = anchor_width * ratio
        rows.append([x - anchor_width / 2, y - anchor_height / 2, x + anchor_width / 2, y + anchor_height / 2])
    return torch.tensor(rows, dtype=torch.float64).float()


@pytest.mark.parametrize(("height", "width", "stride"), [(1, 1, 16), (3, 5, 16), (4, 2, 32)])
def test_equals_a_loop(height: int, width: int, stride: int) -> None:
    scales, ratios = [32.0, 64.0, 100.0], [0.5, 1.0, 2.0]
    anchors = AnchorGrid(scales=scales, ratios=ratios, stride=stride)
    torch.testing.assert_close(anchors(height, width), naive(height, width, scales, ratios, stride))
    assert anchors.per_cell == 9


def test_areas_and_ratios_are_what_was_asked_for() -> None:
    anchors = AnchorGrid(scales=[32, 64, 128, 256, 512], ratios=[0.5, 1.0, 2.0], stride=16)(1, 1)
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.tensor([32.0, 64, 128, 256, 512]).repeat_interleave(3) ** 2)
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]).repeat(5))


def test_anchors_equal_torchvisions_up_to_its_rounding() -> None:
    theirs = AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),))
    expected = theirs(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), [torch.zeros(1, 8, 4, 6)])[0]
    ours = AnchorGrid(scales=[32, 64], ratios=[0.5, 1.0, 2.0], stride=16)(4, 6).view(4, 6, 2, 3, 4)
    # Theirs are ordered ratio by scale, and rounded to whole pixels.
    torch.testing.assert_close(ours.transpose(2, 3).reshape(-1, 4), expected, rtol=0, atol=0.5)


@pytest.mark.parametrize(("level", "stride"), [("c4", 16), ("c5", 32)])
def test_a_cell_looks_where_its_anchors_are(level: str, stride: int) -> None:
    """The gradient of a cell of the backbone is centred on stride * i, not on stride * (i + 0.5)."""
    torch.manual_seed(0)
    backbone = build_backbone(parse_backbone({
        "name": "shufflenet_v2", "stem_channels": 8, "channels": [16, 32, 64], "repeats": [2, 2, 2],
        "extra_depthwise": False, "layout": "torchvision", "dilate_c5": False,
    })).eval()  # fmt: skip
    centers = []
    for _ in range(20):
        images = torch.randn(1, 3, 512, 512, requires_grad=True)
        cell = 256 // stride
        backbone(images)[level][0, :, cell, cell].sum().backward()
        assert images.grad is not None
        weight = images.grad[0].abs().sum(dim=0)
        pixels = torch.arange(512) + 0.5  # pixel i covers [i, i + 1)
        centers.append(((weight.sum(dim=0) * pixels).sum() / weight.sum()).item())
    assert abs(sum(centers) / len(centers) - 256) < stride / 8


def test_has_no_weights_and_nothing_to_save() -> None:
    grid = AnchorGrid(scales=[16], ratios=[1.0], stride=16)
    assert not list(grid.parameters())
    assert not grid.state_dict()
    assert grid.to("meta")(2, 2).device.type == "meta"


def test_anchors_of_a_size_are_made_once_and_stay_right() -> None:
    grid = AnchorGrid(scales=[32, 64], ratios=[0.5, 1.0, 2.0], stride=16)
    first = grid(3, 5)
    assert grid(3, 5) is first
    fresh = AnchorGrid(scales=[32, 64], ratios=[0.5, 1.0, 2.0], stride=16)
    for height in range(1, 20):  # more sizes than are kept
        assert torch.equal(grid(height, 5), fresh._make(height, 5))
    assert len(grid._kept) <= 8
    assert grid.double()(3, 5).dtype == torch.float64
    assert "_kept" not in "".join(grid.state_dict())
